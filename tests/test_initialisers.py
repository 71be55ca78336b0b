"Adapters start at the directions that they should, and change nothing at first"
from copy import deepcopy
import pytest, timm, torch
from torch import nn
import torch.nn.functional as F
from torch.testing import assert_close
from fclora.adapt import *
from fclora.find import *
from fclora.initialisers import *

pytestmark = pytest.mark.usefixtures('one_thread')

def vit(name='test_vit', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=32, patch_size=8, num_classes=4, **kwargs).eval()

@pytest.fixture(scope='module')
def batches():
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 32, 32, generator=g), torch.randint(0, 4, (n,), generator=g)) for n in (8,5,8)]

def inputs_of(model, path, batches):
    "All rows that come into a layer, by a hook"
    rows = []
    h = model.get_submodule(path).register_forward_hook(lambda m,inp,out: rows.append(inp[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for x,_ in batches: model(x)
    h.remove()
    return torch.cat(rows)

@pytest.mark.parametrize('init', ['kaiming','orthogonal','eva'])
def test_a_fresh_adapter_stays_the_base_model(batches, init):
    model,x = vit(),batches[0][0]
    ranks = {s.name:i%4 for i,s in enumerate(find_sites(model))}
    net = init_adapters(adapt(deepcopy(model), ranks), init, batches)
    with torch.no_grad(): assert_close(net(x), model(x))
    for layer in adapted_layers(net).values():
        for A in layer.lora_A.values():
            orthonormal = torch.allclose(A@A.T, torch.eye(len(A)), atol=1e-5)
            assert orthonormal==(init!='kaiming') and A.requires_grad

def test_eva_starts_with_the_first_components(batches):
    net = init_adapters(adapt(vit(), {'blocks.0.attn.qkv.q':2, 'blocks.1.attn.qkv.v':5}), 'eva', batches)
    for path,kind in (('blocks.0.attn.qkv','q'), ('blocks.1.attn.qkv','v')):
        A,x = net.get_submodule(path).lora_A[kind].detach().double(),inputs_of(net, path, batches).double()
        var = torch.linalg.eigvalsh(x.T.cov()).flip(0)
        assert_close((x@A.T).T.cov(), var[:len(A)].diag(), rtol=1e-3, atol=1e-4)

def test_eva_where_the_weight_is_read_and_on_convolutions(batches):
    beit = adapt(vit('beit_base_patch16_224', embed_dim=32, depth=1, num_heads=2), {'blocks.0.attn.qkv.k':3})
    init_adapters(beit, 'eva', batches)
    A = beit.blocks[0].attn.qkv.lora_A['k']
    assert_close(A@A.T, torch.eye(3))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(6*16*16, 4))
    name = find_sites(net, include='0', kinds=('conv',))[0].name
    init_adapters(adapt(net, {name:2}), 'eva', batches)
    A = net[0].lora_A['conv'].detach()
    xs = [F.conv2d(x, A.view(2, 3, 3, 3), stride=2, padding=1).movedim(1, -1).flatten(0, 2) for x,_ in batches]
    windows = torch.cat([F.unfold(x, 3, stride=2, padding=1).mT.flatten(0, 1) for x,_ in batches])
    top = torch.linalg.eigvalsh(windows.double().T.cov())[-2:]
    assert_close(torch.cat(xs).double().T.cov(), top.flip(0).diag(), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('call,piece', [
    (lambda m: init_adapters(m, 'svd'), 'kaiming, orthogonal, eva'),
    (lambda m: init_adapters(adapt(m, {'blocks.0.attn.qkv.q':1}), 'eva', []), 'the data are empty')])
def test_errors(call, piece):
    with pytest.raises(ValueError, match=piece): call(vit())
