"Principal components of inputs against scikit-learn; scores and starts made of them"
from copy import deepcopy
import numpy as np, pytest, timm, torch
from hypothesis import given,settings,strategies as st
from sklearn.decomposition import PCA
from torch import nn
from torch.testing import assert_close
from fclora.inputs import *
from fclora.learner import *
from fclora.lora import *

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

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(2, 9), st.floats(-100, 100), st.integers(0, 999))
def test_streamed_covariance_is_that_of_all_rows(sizes, d, shift, seed):
    x = torch.randn(sum(sizes)+1, d, generator=torch.Generator().manual_seed(seed))+shift
    rc = RunningCov()
    for b in x.split([*sizes,1]): rc.update(b)
    assert rc.n==len(x)
    assert_close(rc.M2/(rc.n-1), x.double().T.cov(), rtol=1e-3, atol=1e-3)

def test_components_are_those_of_scikit_learn(batches):
    model = vit()
    rows = inputs_of(model, 'blocks.1.attn.qkv', batches).double().numpy()
    want,(share,comps) = PCA().fit(rows),input_pca(model, batches)['blocks.1.attn.qkv']
    np.testing.assert_allclose(share, want.explained_variance_ratio_, atol=1e-5)
    np.testing.assert_allclose(np.abs((comps.numpy()[:8]*want.components_[:8]).sum(1)), 1, atol=1e-3)

def test_constant_inputs_explain_nothing():
    rc = RunningCov()
    rc.update(torch.ones(20, 3))
    assert rc.pca()[0].tolist()==[0,0,0]

def test_score_is_shared_within_a_layer_and_ends_at_one(batches):
    model = vit()
    before,rng = deepcopy(model.train().state_dict()),torch.get_rng_state()
    sites = find_sites(model, kinds=('q','k','v','fc2'))
    some,all_ = (explained_var(model, batches, sites, k=k) for k in (3,10**6))
    assert len({some['blocks.0.attn.qkv.'+k] for k in 'qkv'})==1 and some['blocks.0.attn.qkv.q']!=some['blocks.0.mlp.fc2']
    assert all(0<some[n]<all_[n]==pytest.approx(1) for n in some)
    assert model.training and torch.equal(rng, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    back = explained_var(model, batches[::-1], sites, k=3)
    assert back==pytest.approx(some, rel=1e-5)

@pytest.mark.parametrize('how', inits)
def test_a_fresh_adapter_stays_the_base_model(batches, how):
    model,x = vit(),batches[0][0]
    ranks = {s.name:i%4 for i,s in enumerate(find_sites(model))}
    net = init_factors(adapt(deepcopy(model), ranks), how, batches)
    with torch.no_grad(): assert_close(net(x), model(x))
    for m in lora_layers(net).values():
        for A in m.lora_A.values():
            orthonormal = torch.allclose(A@A.T, torch.eye(len(A)), atol=1e-5)
            assert orthonormal==(how!='kaiming') and A.requires_grad

def test_eva_starts_with_the_first_components(batches):
    net = init_factors(adapt(vit(), {'blocks.0.attn.qkv.q':2, 'blocks.1.attn.qkv.v':5}), 'eva', batches)
    for path,kind in (('blocks.0.attn.qkv','q'), ('blocks.1.attn.qkv','v')):
        A,x = net.get_submodule(path).lora_A[kind].detach().double(),inputs_of(net, path, batches).double()
        var = torch.linalg.eigvalsh(x.T.cov()).flip(0)
        assert_close((x@A.T).T.cov(), var[:len(A)].diag(), rtol=1e-3, atol=1e-4)

def test_eva_where_the_weight_is_read_and_on_convolutions(batches):
    beit = adapt(vit('beit_base_patch16_224', embed_dim=32, depth=1, num_heads=2), {'blocks.0.attn.qkv.k':3})
    init_factors(beit, 'eva', batches)
    A = beit.blocks[0].attn.qkv.lora_A['k']
    assert_close(A@A.T, torch.eye(3))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(6*16*16, 4))
    name = find_sites(net, include='0', kinds=('conv',))[0].name
    init_factors(adapt(net, {name:2}), 'eva', batches)
    A = net[0].lora_A['conv'].detach()
    xs = [nn.functional.conv2d(x, A.view(2, 3, 3, 3), stride=2, padding=1).movedim(1, -1).flatten(0, 2) for x,_ in batches]
    top = torch.linalg.eigvalsh(torch.cat([nn.functional.unfold(x, 3, stride=2, padding=1).mT.flatten(0, 1) for x,_ in batches]).double().T.cov())[-2:]
    assert_close(torch.cat(xs).double().T.cov(), top.flip(0).diag(), rtol=1e-3, atol=1e-4)

def test_padding_does_not_count():
    from transformers import LlamaConfig,LlamaForCausalLM
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    def padded(n, width):
        ids,mask = torch.arange(3, 3+n)[None],torch.ones(1, n, dtype=torch.long)
        return dict(input_ids=nn.functional.pad(ids, (0, width-n)), attention_mask=nn.functional.pad(mask, (0, width-n)), labels=nn.functional.pad(ids, (0, width-n), value=-100))
    tight,loose = (explained_var(llama, [padded(n, w or n) for n in (5,9,12)], find_sites(llama), k=2) for w in (0,16))
    assert loose==pytest.approx(tight, rel=1e-3)

@pytest.mark.parametrize('call,piece', [
    (lambda m: init_factors(m, 'svd'), 'there are kaiming, orthogonal, eva'),
    (lambda m: init_factors(adapt(m, {'blocks.0.attn.qkv.q':1}), 'eva', []), 'the data are empty'),
    (lambda m: recipe(init='svd'), 'init must be one of kaiming, orthogonal, eva')])
def test_errors(call, piece):
    with pytest.raises(ValueError, match=piece): call(vit())
