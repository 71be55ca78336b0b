"The method without fastai: any module, any batches, any loss"
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, timm, torch, torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from fclora.sites import *
from fclora.lora import *
from fclora.find import *
from fclora.adapt import *
from fclora.scorers.measure import *
from fclora.make_plan import *
from fclora.calibration.temperature import *

pytestmark = pytest.mark.usefixtures('one_thread')
page = Path(__file__).parent.parent/'nbs/tutorials/06_without_fastai.ipynb'

def toy(n=64, c=3, seed=0):
    "Images told apart by the brightness of one channel"
    gen = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%c
    return torch.randn(n, 3, 32, 32, generator=gen)*.3 + F.one_hot(y, 3)[:,:,None,None]*1., y

def batches(x, y, bs=16): return list(zip(x.split(bs), y.split(bs)))

def vit(c=3, seed=0):
    torch.manual_seed(seed)
    return timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=c)

def test_none_of_the_method_imports_fastai():
    mods = ['adapt','scorers.measure','scorers.warmup','make_plan','calibration.intervals']
    code = f'import sys\nfor m in {mods}: __import__("fclora."+m)\nprint([o for o in ("fastai","timm","transformers","peft") if o in sys.modules])'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert res.stdout.strip()=='[]'
    code = "import sys, fclora\nprint([o for o in ('torch','fastai') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'

def test_the_loop_of_the_page_learns_a_toy():
    cells = [''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    imports,loop = next(c for c in cells if 'fclora.lora' in c),next(c for c in cells if 'make_plan(' in c and 'AdamW' in c)
    assert sum(bool(l.strip()) for l in loop.splitlines())<=25
    model = vit()
    before = {k:v.clone() for k,v in model.state_dict().items()}
    ns = dict(model=model, train=batches(*toy())*4, valid=batches(*toy(seed=1)), test=batches(*toy(seed=2)))
    exec(imports, ns)
    exec(loop.replace("'vit_pico', sites, stats, budget=72", "'test_vit', sites, stats, budget=36"), ns)
    assert ns['res']['accuracy']>.9 and ns['plan'].total_rank==36
    now = {k.replace('base.', ''):v for k,v in model.state_dict().items()}
    assert {k for k,v in before.items() if not torch.equal(v, now[k])}=={'head.weight','head.bias'}   # and adapters, which were not there
    assert all(B.any() for l in adapted_layers(model).values() for B in l.lora_B.values())

def by_hand(model, sites, data, loss_func):
    "Mean squared gradient of each site, from torch.autograd alone"
    res = dict.fromkeys((s.name for s in sites), 0.)
    for x,y in data:
        for s in sites:
            g, = torch.autograd.grad(loss_func(model(x), y), model.get_submodule(s.path).weight)
            res[s.name] += g[s.rows].square().mean().item()/len(data)
    return res

losses = dict(
    bce=(lambda y: F.one_hot(y, 3).float(), nn.BCEWithLogitsLoss()),
    mse=(lambda y: y.float(), lambda out,y: F.mse_loss(out[:,0], y)),
    soft=(lambda y: F.one_hot(y, 3)*.9+.1/3, F.cross_entropy),
    margin=(lambda y: y, nn.MultiMarginLoss()))

@pytest.mark.parametrize('kind', losses)
def test_scores_are_those_of_the_loss_that_was_given(kind):
    target,loss_func = losses[kind]
    x,y = toy(16)
    model,data = vit().eval(),batches(x, target(y), 8)
    sites = find_sites(model)[:6]
    got = measure(model, data, sites, loss_func=loss_func)
    assert_close(got['fisher'], by_hand(model, sites, data, loss_func), rtol=1e-4, atol=1e-12)
    assert got['cov']==measure(model, batches(x, y, 8), sites)['cov']
    plan = make_plan('test_vit', sites, got, budget=24)
    assert plan.total_rank==24 and set(plan.ranks)=={s.name for s in sites}

def test_any_iterable_any_output_any_module():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query,self.key,self.value = (nn.Linear(12, 12) for _ in range(3))
        def forward(self, x): return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers,self.classifier = nn.ModuleList([Attention(), Attention()]),nn.Linear(12, 4)
        def forward(self, x, shift):
            for l in self.layers: x = x+l(x)
            return SimpleNamespace(logits=self.classifier(x.mean(1))+shift)
    torch.manual_seed(0)
    net = Net()
    loss_func = lambda out,y: F.cross_entropy(out.logits, y)
    def stream(): # a generator of (two inputs, target)
        gen = torch.Generator().manual_seed(1)
        while True: yield torch.randn(8, 5, 12, generator=gen), torch.zeros(8, 4), torch.randint(4, (8,), generator=gen)
    stats = measure(net, stream(), loss_func=loss_func, n_batches=3)
    assert stats==measure(net, [b for b,_ in zip(stream(), range(3))], loss_func=loss_func)
    plan = make_plan('net', find_sites(net), stats, budget=12)
    freeze(adapt(net, plan.ranks))
    assert count_params(net)['trainable']==12*24+12*4+4
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], .1)
    batch = next(stream())
    first = batch_loss(net, batch, loss_func).item()
    for _ in range(30):
        opt.zero_grad(); batch_loss(net, batch, loss_func).backward(); opt.step()
    assert batch_loss(net, batch, loss_func).item()<first

# --- Hugging Face

def llama():
    tf = pytest.importorskip('transformers', reason='transformers is not installed')
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2)).eval()

def texts(n=3, seed=0, ignored=slice(0, 4)):
    gen = torch.Generator().manual_seed(seed)
    res = []
    for _ in range(n):
        ids = torch.randint(24, (4,10), generator=gen)
        labels = ids.clone()
        labels[:,ignored] = -100
        res.append(dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
    return res

def test_language_model_scores_count_only_tokens_with_a_label():
    model,data = llama(),texts()
    sites = find_sites(model)
    got = measure(model, data, sites)
    def loss_func(out, labels): # next token, labels of -100 left out
        z,y = out.logits[:,:-1].flatten(0, 1),labels[:,1:].flatten()
        return F.cross_entropy(z[y>=0], y[y>=0])
    want = by_hand(model, sites, [(b['input_ids'],b['labels']) for b in data], loss_func)
    assert_close(got['fisher'], want, rtol=1e-4, atol=1e-14)
    assert measure(model, [(b['input_ids'],b['labels']) for b in data], sites, loss_func=loss_func)['cov']==got['cov']
    assert measure(model, texts(ignored=slice(0)), sites)['fisher']!=got['fisher']
    assert {s.kind:LoRA.cost(s, 1) for s in sites}==dict(q=64, k=48, v=48)

def test_language_model_trains_merges_and_calibrates():
    model,data = llama(),texts()
    stats = measure(model, data)
    plan = make_plan('llama', find_sites(model), stats, budget=2000, unit='params')
    assert 2000-48<plan.adapter_params<=2000
    freeze(adapt(model, plan.ranks))
    assert count_params(model)['trainable']==plan.adapter_params
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    first = model(**data[0]).loss.item()
    for _ in range(20):
        for b in data: model(**b).loss.backward(); opt.step(); opt.zero_grad()
    assert model(**data[0]).loss.item()<first
    with torch.no_grad():
        want = model(**data[0]).logits
        assert_close(unload(model, merge=True)(**data[0]).logits, want, atol=1e-4, rtol=1e-4)
    y = data[0]['labels'][:,1:]
    T = fit_temperature(want[:,:-1][y>=0], y[y>=0])
    assert nll(want[:,:-1][y>=0], y[y>=0], T)<=nll(want[:,:-1][y>=0], y[y>=0])

def test_hugging_face_images():
    tf = pytest.importorskip('transformers', reason='transformers is not installed')
    torch.manual_seed(0)
    model = tf.ViTForImageClassification(tf.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, num_labels=3)).eval()
    x,y = toy(16)
    a = measure(model, [dict(pixel_values=x, labels=y)])
    b = measure(model, [(x,y)], loss_func=lambda out,y: F.cross_entropy(out.logits, y))
    for m in a: assert_close(a[m], b[m], rtol=1e-5, atol=1e-12)
    assert head_names(model)==['classifier'] and len(a['fisher'])==6
