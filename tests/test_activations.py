"Streamed covariances and principal components against scikit-learn; what padding, convolutions and read weights do to them"
from copy import deepcopy
import numpy as np, pytest, timm, torch
from hypothesis import given,settings,strategies as st
from sklearn.decomposition import PCA
from torch import nn
import torch.nn.functional as F
from torch.testing import assert_close
from fclora.adapt import *
from fclora.find import *
from fclora.scorers.activations import *
from fclora.scorers.measure import *

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

def input_pca(model, batches, sites=None): return measure(model, batches, sites, [InputPCA()])['input_pca']
def explained_var(model, batches, sites=None, k=16): return measure(model, batches, sites, [ExplainedVar(k)])['explained_var']

@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(2, 9), st.floats(-100, 100), st.integers(0, 999))
def test_streamed_covariance_is_that_of_all_rows(sizes, d, shift, seed):
    x = torch.randn(sum(sizes)+1, d, generator=torch.Generator().manual_seed(seed))+shift
    rc = RunningCov()
    for b in x.split([*sizes,1]): rc.update(b)
    assert rc.n==len(x)
    assert_close(rc.M2/(rc.n-1), x.double().T.cov(), rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('stream', [RunningVar,RunningCov])
def test_an_empty_half_adds_nothing(stream):
    full,empty = stream(),stream()
    full.update(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    old = deepcopy(full)
    full.add(stream()); empty.add(old)
    for s in (full,empty): assert s.n==9 and torch.equal(s.M2, old.M2) and torch.equal(s.mean, old.mean)

def test_components_are_those_of_scikit_learn(batches):
    model = vit()
    rows = inputs_of(model, 'blocks.1.attn.qkv', batches).double().numpy()
    want,(share,comps) = PCA().fit(rows),input_pca(model, batches)['blocks.1.attn.qkv.k']
    np.testing.assert_allclose(share, want.explained_variance_ratio_, atol=1e-5)
    np.testing.assert_allclose(np.abs((comps.numpy()[:8]*want.components_[:8]).sum(1)), 1, atol=1e-3)

def test_constant_inputs_explain_nothing():
    rc = RunningCov()
    rc.update(torch.ones(20, 3))
    assert rc.pca()[0].tolist()==[0,0,0]

def test_score_ends_at_one_and_leaves_the_model_as_it_was(batches):
    model = vit()
    before,rng = deepcopy(model.train().state_dict()),torch.get_rng_state()
    sites = find_sites(model, kinds=('q','k','v','fc2'))
    some,all_ = (explained_var(model, batches, sites, k) for k in (3,10**6))
    assert some['blocks.0.attn.qkv.q']!=some['blocks.0.mlp.fc2']
    assert all(0<some[n]<all_[n]==pytest.approx(1) for n in some)
    assert model.training and torch.equal(rng, torch.get_rng_state()) and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert explained_var(model, batches[::-1], sites, 3)==pytest.approx(some, rel=1e-5)

def test_an_adapted_model_sees_what_its_base_sees(batches):
    want = explained_var(vit(), batches, k=3)
    model = adapt(vit(), {s.name:2 for s in find_sites(vit())})
    assert explained_var(model, batches, k=3)==pytest.approx(want, rel=1e-5)

def test_where_the_weight_is_read(batches):
    beit = vit('beit_base_patch16_224', embed_dim=32, depth=1, num_heads=2)
    name = 'blocks.0.attn.qkv.k'
    share,comps = input_pca(beit, batches)[name]
    rows = inputs_of(beit, 'blocks.0.norm1', batches) # hooked before the norm
    rows = F.layer_norm(rows, (32,), beit.blocks[0].norm1.weight, beit.blocks[0].norm1.bias, beit.blocks[0].norm1.eps).detach()
    var = torch.linalg.eigvalsh(rows.double().T.cov()).flip(0)
    assert_close(share, var/var.sum(), rtol=1e-3, atol=1e-6)
    assert_close((rows.double()@comps.T).T.cov(), var.diag(), rtol=1e-3, atol=1e-4)
    assert_close(input_pca(adapt(beit, {name:3}), batches)[name][0], share, rtol=1e-4, atol=1e-6)

def test_windows_of_convolutions(batches):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(6*16*16, 4))
    sites = find_sites(net, include='0', kinds=('conv',))
    share,comps = input_pca(net, batches, sites)[sites[0].name]
    windows = torch.cat([F.unfold(x, 3, stride=2, padding=1).mT.flatten(0, 1) for x,_ in batches]).double()
    assert_close((windows@comps.T).T.cov(), share.diag()*windows.T.cov().trace(), rtol=1e-3, atol=1e-4)
    xs = [F.conv2d(x, comps[:2].float().view(2, 3, 3, 3), stride=2, padding=1).movedim(1, -1).flatten(0, 2) for x,_ in batches]
    assert_close(torch.cat(xs).double().T.cov(), (share[:2]*windows.T.cov().trace()).diag(), rtol=1e-3, atol=1e-4)

class Cross(nn.Module):
    "Queries from one half of the tokens, keys and values from the other"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn,self.head = nn.MultiheadAttention(6, 2, batch_first=True),nn.Linear(6, 4)
    def forward(self, x):
        queries,others = x[:,:4],x[:,4:]
        return self.head(self.attn(queries, others, others)[0].mean(1))

def test_queries_and_keys_of_cross_attention_see_different_inputs():
    data = [(torch.randn(5, 9, 6, generator=torch.Generator().manual_seed(i)), None) for i in range(2)]
    pca,x = input_pca(Cross(), data),torch.cat([x for x,_ in data]).double()
    assert pca['attn.k'] is pca['attn.v']
    for name,rows in (('attn.q', x[:,:4]), ('attn.k', x[:,4:])):
        var = torch.linalg.eigvalsh(rows.flatten(0, 1).T.cov()).flip(0)
        assert_close(pca[name][0], var/var.sum(), rtol=1e-4, atol=1e-6)

def test_padding_does_not_count():
    from transformers import LlamaConfig,LlamaForCausalLM
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    def padded(n, width):
        ids,mask = torch.arange(3, 3+n)[None],torch.ones(1, n, dtype=torch.long)
        return dict(input_ids=F.pad(ids, (0, width-n)), attention_mask=F.pad(mask, (0, width-n)))
    tight,loose = (explained_var(llama, [padded(n, w or n) for n in (5,9,12)], k=2) for w in (0,16))
    assert loose==pytest.approx(tight, rel=1e-3)
