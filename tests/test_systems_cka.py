"Blocks that change the representation most: CKA against the direct formulas, on several kinds of models"
import warnings
from copy import deepcopy
import pytest, timm, torch
from hypothesis import given,settings,strategies as st
from torch import nn
from torch.testing import assert_close
import system_models as S
from fclora.adapt import *
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.runs.folder import load_run
from fclora.scorers.measure import measure
from fclora.systems.blocks import block_means
from fclora.systems.cka import *

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:CKA of')]

# --- the formulas

def hsic_by_hand(X, Y, unbiased):
    "With Gram matrices, term by term (Gretton et al. 2005; Song et al. 2012, eq. 5)"
    n,K,L = len(X),X@X.T,Y@Y.T
    if not unbiased:
        H = torch.eye(n, dtype=X.dtype)-1/n
        return (K@H@L@H).trace()/(n-1)**2
    K,L = K-K.diag().diag(),L-L.diag().diag()
    return ((K*L).sum() + K.sum()*L.sum()/((n-1)*(n-2)) - 2/(n-2)*(K.sum(0)*L.sum(1)).sum())/(n*(n-3))

@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.floats(-3, 3), st.integers(0, 9999))
def test_equals_a_direct_hsic(n, d, e, unbiased, shift, seed):
    torch.manual_seed(seed)
    X = torch.randn(n, d).double()+shift
    Y = torch.randn(n, e).double()+X[:,:1]-shift
    by_hand = lambda A,B: hsic_by_hand(A, B, unbiased)
    assert_close(hsic(X, Y, unbiased), by_hand(X, Y), rtol=1e-8, atol=1e-8)
    size = by_hand(X, X)*by_hand(Y, Y)
    if size>1e-6: assert_close(linear_cka(X, Y, unbiased), (by_hand(X, Y)/size.sqrt()).item(), rtol=1e-6, atol=1e-6)

def test_independent_rows_are_alike_only_by_bias():
    torch.manual_seed(0)
    X,Y = torch.randn(64, 300),torch.randn(64, 300)
    assert linear_cka(X, Y)>.75 and abs(linear_cka(X, Y, True))<.05
    turn = torch.linalg.qr(torch.randn(300, 300))[0]
    for unbiased in (False,True): assert_close(linear_cka(X, 5*X@turn-3, unbiased), 1., rtol=1e-4, atol=0)

# --- the scorer on models

def seen_by(model, path, batches, row):
    "Input and output of one block, reduced by `row`, by a hook"
    states = []
    h = model.get_submodule(path).register_forward_hook(lambda m,x,y: states.append((row(x[0]), row(y[0] if isinstance(y, tuple) else y))))
    with torch.no_grad():
        for b in batches: model(**b) if isinstance(b, dict) else model(b[0])
    h.remove()
    return map(torch.cat, zip(*states))

def images(size=32): return [(torch.randn(n, 3, size, size), torch.randint(0, 4, (n,))) for n in (9,5,9)]
vit = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)
cases = dict(
    deit=('deit_tiny_distilled_patch16_224', vit, lambda h: h[:,0]),
    pooled=('vit_base_patch16_siglip_224', vit, lambda h: h.mean(1)),
    swin=('swin_tiny_patch4_window7_224', dict(img_size=32, window_size=4, embed_dim=24, depths=(2,2), num_heads=(2,4)), lambda h: h.mean((1,2))),
    convnext=('test_convnext', {}, lambda h: h.mean((2,3))))

@pytest.mark.parametrize('kind', cases)
def test_every_block_by_hand(kind):
    torch.manual_seed(0)
    name,kw,row = cases[kind]
    model = timm.create_model(name, num_classes=4, **kw).eval()
    kinds = ('fc1','fc2') if kind=='convnext' else ('q','k','v')
    sites,batches = find_sites(model, kinds),images(64 if kind=='convnext' else 32)
    values = block_means(measure(model, batches, sites, ['cka'])['cka'])
    for i,(path,value) in enumerate(values.items()):
        if kind=='deit' and i==0 or not path: assert value==0; continue      # '': the pooling of SigLIP, which is no block
        assert_close(value, 1-linear_cka(*seen_by(model, path, batches, row)), rtol=1e-3, atol=1e-5)
    assert len(set(values.values()))==len(values)>=3

def test_the_first_block_is_left_out_by_index_and_only_for_the_class_token():
    torch.manual_seed(0)
    model,batches = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4).eval(),images()
    sites = find_sites(model)
    score = lambda sites,scorer: block_means(measure(model, batches, sites, [scorer])[getattr(scorer, 'name', scorer)])
    by_class,by_mean,later = score(sites, 'cka'),score(sites, 'cka_mean'),score([s for s in sites if s.block>2], 'cka')
    assert by_class['blocks.0']==0<min(v for b,v in by_class.items() if b!='blocks.0')
    assert by_mean['blocks.0']>0
    assert later=={b:v for b,v in by_class.items() if b>'blocks.2'}    # scored from block 3 on, block 3 counts
    x,y = seen_by(model, 'blocks.0', batches, lambda h: h[:,0])
    assert x.var(0).max()<1e-10 and 1-linear_cka(x, y)>.5               # what it would have been, for nothing
    assert score(sites, CKA('mean', unbiased=True)).keys()==by_class.keys()
    plan = make_plan('m', sites, {'cka':measure(model, batches, sites, ['cka'])['cka']}, 'cka', budget=30)
    assert plan.total_rank==30 and len({s.block for s in sites if plan.ranks[s.name]})==3 and not any(plan.ranks[s.name] for s in sites if s.block==0)

def test_texts_by_their_last_real_token_or_the_mean_of_the_real_ones():
    from transformers import LlamaConfig, LlamaForSequenceClassification
    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_labels=3, pad_token_id=0)
    model = LlamaForSequenceClassification(cfg).eval()
    lengths = torch.tensor([3,7,5,4,6,7,2,3])
    mask = (torch.arange(7)<lengths[:,None]).long()
    batch = dict(input_ids=torch.randint(1, 50, (8, 7))*mask, attention_mask=mask, labels=torch.randint(0, 3, (8,)))
    sites = find_sites(model)
    last = lambda h: h[torch.arange(8), lengths-1]
    mean = lambda h: torch.stack([o[:n].mean(0) for o,n in zip(h, lengths)])
    for scorer,row in ((CKA('last'),last), (CKA(),mean)):
        values = block_means(measure(model, [batch], sites, [scorer])[scorer.name])
        for path,value in values.items(): assert_close(value, 1-linear_cka(*seen_by(model, path, [batch], row)), rtol=1e-3, atol=1e-5)

# --- a pass like any other

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4)

def test_forward_only_and_nothing_left_behind(model):
    def no_loss(*args): raise AssertionError('nobody needs a loss')
    measure(model, [(x,) for x,_ in images()], scorers=['cka'], loss_func=no_loss)
    with pytest.raises(AssertionError, match='divisible'): measure(model, [(torch.randn(2, 3, 5, 5), None)], scorers=['cka'])
    assert not any(m._forward_hooks for m in model.modules()) and all(p.requires_grad and p.grad is None for p in model.parameters())

def test_beside_scorers_with_gradients_and_from_two_processes(model):
    batches = images()
    alone = measure(model, batches, scorers=['cka'])
    for names in (['fisher','cka'], ['sample_block_fisher','cka'], ['cka','cka_mean','sample_block_fisher']): # the samples one by one are not taken for a batch
        assert measure(model, batches, scorers=names)['cka']==pytest.approx(alone['cka'], abs=1e-6)
    one,two = CKA(),CKA()
    measure(model, batches[:1]*1, scorers=[one]); measure(model, batches[1:], scorers=[two])
    one.add(two)
    assert one.result()==pytest.approx(alone['cka'], abs=1e-6)

def test_a_16_bit_model(model):
    got = measure(deepcopy(model).bfloat16(), [(x.bfloat16(),y) for x,y in images()], scorers=['cka'])['cka']
    assert all(0<=v<1 for v in got.values())

def test_warns_below_three_samples_a_feature(model):
    width = model.embed_dim
    with pytest.warns(UserWarning, match=f'CKA of 23 samples of width {width} .* score {3*width} or more'): measure(model, images(), scorers=['cka'])
    enough = [(torch.randn(64, 3, 32, 32), None)]*(3*width//64+1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        measure(model, enough, scorers=['cka'])
        measure(model, images(), scorers=['cka_unbiased'])

def test_models_without_blocks_and_few_images(model):
    stem = nn.ModuleDict(dict(stem=nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match='no block among these sites'): measure(stem, images(), find_sites(stem, ('conv',)), ['cka'])
    with pytest.raises(ValueError, match='at least 4 samples'): measure(model, [(torch.randn(3, 3, 32, 32), None)], scorers=['cka'])

def test_from_the_command_to_merged_logits(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'cka', budget=36, score_batches=4, limit='128,64,64')
    assert run.plan.total_rank==36 and run.plan.allocator=='blocks' and len({s.block for s in run.plan.sites if run.plan.ranks[s.name]})==3
    assert load_run(tmp_path/'run').plan.metrics['cka'].keys()==run.plan.ranks.keys()
    net,x = run.model.eval(),torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        want,plain = net(x),unload(deepcopy(net), merge=True)
        assert not adapted_layers(plain)
        assert_close(plain(x), want, atol=1e-5, rtol=1e-4)
        assert (unload(deepcopy(net))(x)-want).abs().max()>1e-3, 'the updates matter'
