"Products in 16 bits on a CPU: what comes out is what the formula gives, and nothing is left behind"
from contextlib import suppress
from copy import deepcopy
from unittest.mock import patch
import pytest, timm, torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import to_pil_image
from fastai.callback.core import Callback, CancelFitException, CancelTrainException
from fclora.adapt import adapt, adapted_layers, freeze, merge_adapters, unmerge_adapters
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.lora import LoRA, adapters
from fclora.precision import autocast, most_plain_tokens, plain_attention
from fclora.runs.finetune import finetune
from fclora.runs.use import predict
from fclora.train.learner import fclora_learner
from fclora.train.recipe import recipe

@pytest.fixture(autouse=True)
def able():
    "The products of bfloat16 work on any CPU; only slowly where it has no instructions for them"
    with patch('torch.cpu.get_capabilities', lambda: dict(avx512_bf16=True)): yield

def vit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32, patch_size=8, depth=3, **kwargs)

def adapted(adapter='lora', **kwargs):
    "q of rank 2, k without one, v of rank 4, filled as by training"
    net = vit()
    ranks = {s.name:dict(q=2, k=0, v=4)[s.kind] for s in find_sites(net)}
    net = freeze(adapt(net, ranks, adapter, **kwargs))
    torch.manual_seed(1)
    for m in adapted_layers(net).values():
        for B in m.lora_B.values(): nn.init.normal_(B, std=.1)
    return net

def batch(): return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)),torch.arange(6)

def one_step(net, block):
    "Loss and gradients of one batch"
    x,y = batch()
    net.zero_grad()
    with block: loss = F.cross_entropy(net(x).float(), y)
    loss.backward()
    return loss.detach(),{n:p.grad.clone() for n,p in net.named_parameters() if p.grad is not None}

def near(a, b, tol):
    "Losses agree, and gradients in direction and size"
    assert abs(a[0]-b[0])<=tol and a[1].keys()==b[1].keys()
    for n in a[1]: assert (a[1][n]-b[1][n]).norm()<=4*tol*b[1][n].norm()+1e-6, n

def as_formula(net):
    "The same model, its updates by the formula of `LoRA` instead of in one function"
    with patch.dict(adapters, lora=LoRA):
        plain = adapted()
        plain.load_state_dict(net.state_dict())
    return plain

def test_the_fast_path_is_the_formula():
    fast = adapted()
    near(one_step(fast, autocast(fast, 'fp32')), one_step(as_formula(fast), autocast(fast, 'fp32')), 1e-5)
    near(one_step(fast, autocast(fast, 'bf16')), one_step(as_formula(fast), autocast(fast, 'bf16')), .02)
    near(one_step(fast, autocast(fast, 'bf16')), one_step(fast, autocast(fast, 'fp32')), .03)

def test_the_block_is_that_of_torch():
    net = adapted()
    plain_attention(net)
    a,b = one_step(net, autocast(net, 'bf16')),one_step(net, torch.autocast('cpu', torch.bfloat16))
    assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][n], b[1][n]) for n in b[1])

def test_dropout_runs_the_formula():
    net = adapted(dropout=.5).train()
    loss,grads = one_step(net, autocast(net, 'bf16'))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())

def test_merging_inside_the_block_starts_from_32_bits():
    a,b = adapted(),adapted()
    weights = {n:p.detach().clone() for n,p in a.named_parameters()}
    with autocast(a, 'bf16'):
        a(batch()[0])
        merge_adapters(a)
    merge_adapters(b)
    for m,n in zip(adapted_layers(a).values(), adapted_layers(b).values()): assert torch.equal(m.weight, n.weight)
    with autocast(a, 'bf16'): unmerge_adapters(a)
    for n,p in a.named_parameters(): assert torch.equal(p, weights[n]), n

def test_a_module_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.fc1 = nn.Linear(32, 32)
        def forward(self, x): return self.fc1(F.gelu(self.fc1(x)))
    torch.manual_seed(0)
    net = Twice()
    adapt(net.requires_grad_(False), {'fc1':3})
    nn.init.normal_(net.fc1.lora_B['fc1'], std=.1)
    x = torch.randn(7, 32)
    def grads(block):
        net.zero_grad()
        with block: out = net(x).float().square().mean()
        out.backward()
        return out.detach(),{n:p.grad.clone() for n,p in net.named_parameters() if p.grad is not None}
    near(grads(autocast(net, 'bf16')), grads(autocast(net, 'fp32')), .02)

def test_checkpointing_recomputes_the_same():
    net = adapted()
    kept = one_step(net, autocast(net, 'bf16'))
    net.set_grad_checkpointing()
    again = one_step(net, autocast(net, 'bf16'))
    assert torch.equal(kept[0], again[0]) and all(torch.equal(kept[1][n], again[1][n]) for n in kept[1])

def test_copies_of_the_model_and_no_grad():
    net = adapted()
    twin = deepcopy(net)
    with torch.no_grad(), autocast(net, 'bf16'): a = net(batch()[0])
    with torch.no_grad(), autocast(twin, 'bf16'): b = twin(batch()[0])
    assert torch.equal(a, b) and a.dtype==torch.bfloat16

def test_compiled():
    net = adapted().eval()
    with torch.no_grad(), autocast(net, 'bf16'):
        plain = net(batch()[0])
        torch._dynamo.reset()
        compiled = torch.compile(net, backend='eager')(batch()[0])
    assert (plain-compiled).abs().max()<.05

def test_images_of_many_tokens_keep_the_kernel():
    few,many = vit(),timm.create_model('vit_tiny_patch16_224', img_size=384, depth=1)
    assert few.patch_embed.num_patches<=most_plain_tokens<many.patch_embed.num_patches
    for net in (few, many): autocast(net, 'bf16')
    assert [net.blocks[0].attn.fused_attn for net in (few, many)]==[False,True]

def test_in_32_bits_nothing_is_touched():
    net = adapted()
    block = autocast(net, 'fp32')
    assert torch.equal(one_step(net, block)[0], one_step(adapted(), torch.autocast('cpu', enabled=False))[0])
    assert net.blocks[0].attn.fused_attn

def test_predictions_in_16_bits_are_near_those_in_32(tmp_path, monkeypatch):
    finetune('digits', 'uniform', epochs=1, probe=False, limit='64,16,16', out=str(tmp_path/'run'), quiet=True)
    (tmp_path/'images').mkdir()
    for i,x in enumerate(load_images('digits', limit='10,10,10').test[0]): to_pil_image(x).save(tmp_path/f'images/{i}.png')
    def probabilities(): return [o['top'][0]['probability'] for o in predict(tmp_path/'run', tmp_path/'images')]
    exact = probabilities()
    monkeypatch.setattr('fclora.precision.tiny', 0) # so that `auto` is bf16 for the smallest model
    assert probabilities()==pytest.approx(exact, abs=.03) and probabilities()!=exact

errors = [CancelTrainException(), CancelFitException(), KeyboardInterrupt()]

@pytest.mark.parametrize('event', ['before_batch','after_pred'])
@pytest.mark.parametrize('error', errors, ids=lambda e: type(e).__name__)
def test_a_training_that_ends_within_a_batch_leaves_nothing_behind(error, event):
    class Stop(Callback):
        order = 80
        def __call__(self, name):
            if name==event and self.training: raise error
    net = create_backbone('vit_pico', 10)
    dls = get_dls(load_images('digits', limit='32,16,16'), **image_config(net), bs=16)
    learn = fclora_learner(dls, net, 'head', recipe(precision='bf16', epochs=1), cbs=Stop())
    with learn.no_bar(), learn.no_logging(), suppress(KeyboardInterrupt): learn.fit_recipe()
    assert not torch.is_autocast_enabled('cpu')
    assert net(torch.randn(2, 3, 32, 32)).dtype==torch.float32
