"Small models of several kinds, and what every adapter has to do in them"
from copy import deepcopy
import pytest, timm, torch
from torch import nn
from torch.testing import assert_close
from fclora.adapt import *
from fclora.find import *
from fclora.lora import adapters

every_kind = ('q','k','v','proj','fc1','fc2','gate','conv')

def deit():
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    return timm.create_model('deit_tiny_distilled_patch16_224', num_classes=4, **size)
def swin():
    torch.manual_seed(0)
    size = dict(img_size=32, window_size=4, embed_dim=16, depths=(1,1), num_heads=(1,2))
    return timm.create_model('swin_tiny_patch4_window7_224', num_classes=4, **size)
def beit():
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    model = timm.create_model('beit_base_patch16_224', num_classes=4, **size)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn_like(p)) # LayerScale and head start too small to see anything
    return model
def torch_encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0., batch_first=True), 2, enable_nested_tensor=False)
def conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8*16*16, 4))
def llama():
    T = pytest.importorskip('transformers')
    torch.manual_seed(0)
    cfg = T.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, pad_token_id=0, num_labels=4)
    return T.LlamaForSequenceClassification(cfg)

class Logits(nn.Module):
    "A text model that returns its logits"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(input_ids=x).logits

made = dict(deit=deit, swin=swin, beit=beit, mha=torch_encoder, conv=conv, llama=lambda: Logits(llama()))

def inputs(name, n=3):
    g = torch.Generator().manual_seed(1)
    if name=='llama': return torch.randint(1, 64, (n,7), generator=g)
    return torch.randn(n, *((5,16) if name=='mha' else (3,32,32)), generator=g)

def unequal(model, adapter='lora'):
    "Ranks 0 to 3, unequal in every fused layer; experts do not take convolutions"
    kinds = [k for k in every_kind if (adapter,k)!=('moe','conv')]
    sites = find_sites(model, include=['0','2']) if isinstance(model, nn.Sequential) else find_sites(model, kinds)
    return {s.name:(i+2)%4 for i,s in enumerate(sites)}

def shake(model, seed=2):
    "Move every part of every adapter, as training does"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_params(model, frozen=False).values(): p.add_(.1*torch.randn(p.shape, generator=g))
    return model

def starts_as_base(name, adapter):
    base,x = made[name]().eval(),inputs(name)
    net = adapt(deepcopy(base), unequal(base, adapter), adapter).eval()
    with torch.no_grad(): assert_close(net(x), base(x), rtol=0, atol=1e-6)
    assert len(set(current_ranks(net).values()))>1

def merges(name, adapter):
    base,x = made[name]().eval(),inputs(name)
    net = shake(adapt(deepcopy(base), unequal(base, adapter), adapter)).eval()
    with torch.no_grad():
        want = net(x)
        assert (want-base(x)).abs().max()>1e-3
        assert_close(merge_adapters(net)(x), want, atol=1e-5, rtol=1e-4)
        assert_close(unmerge_adapters(net)(x), want, atol=0, rtol=0)
        plain = unload(merge_adapters(net), merge=True)
        assert_close(plain(x), want, atol=1e-5, rtol=1e-4)
    same = {k:v for k,v in unload(unmerge_adapters(adapt(deepcopy(base), unequal(base, adapter), adapter))).state_dict().items()}
    assert all(torch.equal(v, same[k]) for k,v in base.state_dict().items())

def saves_and_loads(name, adapter):
    base,x = made[name]().eval(),inputs(name)
    net = shake(adapt(deepcopy(base), unequal(base, adapter), adapter)).eval()
    again = adapt(deepcopy(base), unequal(base, adapter), adapter).eval()
    missing = again.load_state_dict(adapter_state(net), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad(): assert_close(again(x), net(x), rtol=0, atol=0)

def trains_in_half_precision(name, adapter):
    net,x = shake(adapt(made[name](), ranks := unequal(made[name](), adapter), adapter)),inputs(name)
    freeze(net).eval()
    want = net(x).detach()
    with torch.autocast('cpu', torch.bfloat16):
        out = net(x)
        out.float().square().sum().backward()
    assert_close(out.float(), want, atol=.05*want.abs().max().item(), rtol=0)
    grads = [p.grad for p in adapter_params(net, frozen=False).values()]
    assert all(g.dtype==torch.float32 and g.isfinite().all() for g in grads) and sum((g!=0).any().item() for g in grads)>len(grads)/2
    half = adapt(made[name]().bfloat16(), ranks, adapter)
    assert {p.dtype for p in adapter_params(half).values()}=={torch.float32}
    with torch.no_grad(): assert half.eval()(x if name=='llama' else x.bfloat16()).dtype==torch.bfloat16

def compiles(name, adapter):
    "One graph for the forward pass of a training step"
    net,x = freeze(shake(adapt(made[name](), unequal(made[name](), adapter), adapter))).train(),inputs(name)
    for m in net.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    torch._dynamo.reset()
    want = net(x)
    out = torch.compile(net, backend='aot_eager', fullgraph=True)(x)
    assert_close(out, want, atol=1e-5, rtol=1e-4)
    out.square().sum().backward()
    assert all(p.grad is not None for p in adapter_params(net, frozen=False).values())

every_model = ('deit','swin','beit','mha','conv','llama')

def runs_end_to_end(folder, method, **options):
    "Plan, train, calibrate, test, save, load, predict, and merge or say why not; returns the run"
    from PIL import Image
    from fclora.runs.finetune import finetune
    from fclora.runs.folder import load_model
    from fclora.runs.use import merge_run, predict
    wanted = dict(dict(epochs=1, batch_size=32, score_batches=2, limit='96,32,32', probe=False, quiet=True, budget=40), **options)
    run = finetune('digits', method, out=str(folder/'run'), **wanted)
    net,config = load_model(folder/'run')
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = net(x)
        assert_close(want, run.model.eval()(x))
    if adapters[run.plan.adapter].mergeable:
        merge_run(folder/'run', folder/'merged')
        with torch.no_grad(): assert_close(timm.create_model(f"local-dir:{folder/'merged'}", pretrained=True).eval()(x), want, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match='use the model unmerged'): merge_run(folder/'run', folder/'merged')
    Image.new('RGB', (32,32)).save(folder/'image.png')
    assert len(predict(str(folder/'run'), str(folder/'image.png'))[0]['top'])==3
    assert (folder/'run/report.html').is_file() and run.config['method']==method and run.history.train_loss.iloc[-1]<10
    assert config['T']==run.metrics['test']['T']>0 and 0<=run.metrics['test']['ece']<=1
    return run
