"Whole blocks are chosen by their mean score, and the budget is spent evenly in them"
from functools import partial
import pytest, timm, torch
import torch.nn.functional as F
from hypothesis import given,settings,strategies as st
from fclora.allocators.controls import uniform
from fclora.allocators.waterfill import allocators
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.scorers.measure import measure
from fclora.systems.blocks import *

pytestmark = pytest.mark.usefixtures('one_thread')

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=14), st.sampled_from([.25,.5,1.]), st.integers(0, 200))
def test_the_budget_is_held_in_the_best_blocks_and_nowhere_else(values, share, more):
    scores = {f'blocks.{i}.site{j}':v for i,vs in enumerate(values) for j,v in enumerate(vs)}
    top = top_blocks(block_means(scores), share)
    inside = [n for n in scores if n.rpartition('.')[0] in top]
    assert len(top)==max(1, int(len(values)*share))
    budget = min(len(inside)+more, 16*len(inside))
    ranks = blocks(scores, budget, share=share)
    assert list(ranks)==list(scores) and sum(ranks.values())==budget
    assert {n for n,r in ranks.items() if r}==set(inside)
    assert {n:ranks[n] for n in inside}==uniform(inside, budget)      # as even as can be, the remainder to the first
    means = block_means(scores)
    assert min(means[b] for b in top)>=max([means[b] for b in means if b not in top], default=0)

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 20))
def test_parameters_are_spent_exactly_where_whole_ranks_can(n, more):
    costs = {f'h.{i}.{k}':c for i in range(2*n) for k,c in (('qkv',7),('fc1',12))}
    scores = {name:float(name.startswith(tuple(f'h.{i}.' for i in range(n)))) for name in costs}
    budget = 140*n+more
    ranks = blocks(scores, budget, costs=costs)
    assert all((r>0)==(scores[name]>0) for name,r in ranks.items())
    assert sum(costs[name]*r for name,r in ranks.items())==budget

def test_blocks_of_swin_of_convolutions_and_of_a_model_without_numbers():
    swin = timm.create_model('swin_tiny_patch4_window7_224', img_size=32, window_size=4, embed_dim=24, depths=(2,2), num_heads=(2,4))
    sites = find_sites(swin)
    ranks = blocks({s.name:s.block for s in sites}, 24)
    assert {s.block for s in sites if ranks[s.name]}=={2,3} and len(by_block(ranks))==len({s.block for s in sites})
    assert blocks(dict(q=1., v=0.), 4)==dict(q=2, v=2)

def test_usable_alone_with_any_scores():
    torch.manual_seed(0)
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4)
    sites = find_sites(model)
    metrics = measure(model, [(torch.randn(4, 3, 32, 32), torch.tensor([0,1,2,3]))], sites)
    plan = make_plan('test_vit', sites, metrics, 'fclora', budget=30, allocator='blocks')
    best = top_blocks(block_means(plan.scores))
    assert plan.total_rank==30 and {n for n,r in plan.ranks.items() if r}=={n for b in best for n in by_block(plan.ranks)[b]}

def test_other_shares_by_name(monkeypatch):
    monkeypatch.setitem(allocators, 'first', partial(blocks, share=.01))
    assert allocators['first']({'b.0.q':1., 'b.1.q':2.}, 3)=={'b.0.q':0, 'b.1.q':3}

@pytest.mark.parametrize('call,piece', [
    (lambda: blocks({'b.0.q':1., 'b.1.q':2.}, 17), 'give a budget in 1..16'), (lambda: blocks({}, 3), 'no scores'),
    (lambda: blocks({'b.0.q':float('nan')}, 3), 'finite'), (lambda: top_blocks({'b.0':1.}, 1.5), 'share must be')])
def test_errors(call, piece):
    with pytest.raises(ValueError, match=piece): call()

# --- Fisher information of whole blocks

def batches(n=3, b=4): return [(torch.randn(b, 3, 32, 32), torch.randint(0, 4, (b,))) for _ in range(n)]

def fisher_by_hand(model, path, batches):
    "Mean over batches of the squared gradient of all parameters of one block"
    ps = list(model.get_submodule(path).parameters())
    grads = [torch.autograd.grad(F.cross_entropy(model.eval()(x), y), ps) for x,y in batches]
    return sum(g.square().sum() for gs in grads for g in gs).item()/len(batches)

models = dict(vit=('test_vit', dict(img_size=32, patch_size=8)), deit=('deit_tiny_distilled_patch16_224', dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)),
              swin=('swin_tiny_patch4_window7_224', dict(img_size=32, window_size=4, embed_dim=24, depths=(2,2), num_heads=(2,4))), conv=('test_resnet', {}))

@pytest.mark.parametrize('kind', models)
def test_block_fisher_over_all_parameters_in_both_forms(kind):
    torch.manual_seed(0)
    name,kw = models[kind]
    model,data = timm.create_model(name, num_classes=4, **kw),batches()
    sites = find_sites(model, ('conv',) if kind=='conv' else ('q','k','v'))
    flags = [p.requires_grad_(i%3>0).requires_grad for i,p in enumerate(model.parameters())]
    got = measure(model, data, sites, ['block_fisher','sample_block_fisher','fisher'])
    assert [p.requires_grad for p in model.parameters()]==flags and all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    singles = [one for b in data for one in one_by_one(b, 4)]
    for form,some in (('block_fisher',data), ('sample_block_fisher',singles)):
        values = block_means(got[form])
        for path in values: assert values[path]==pytest.approx(fisher_by_hand(model, path, some), rel=1e-3)
    assert got['fisher']==pytest.approx(measure(model, data, sites, ['fisher'])['fisher'])      # beside it nothing changes

@pytest.mark.parametrize('kind', models)
def test_block_fisher_of_a_16_bit_model(kind):
    torch.manual_seed(0)
    name,kw = models[kind]
    model,data = timm.create_model(name, num_classes=4, **kw),batches()
    sites,forms = find_sites(model, ('conv',) if kind=='conv' else ('q','k','v')),['block_fisher','sample_block_fisher']
    want = measure(model, data, sites, forms)
    got = measure(model.bfloat16(), [(x.bfloat16(),y) for x,y in data], sites, forms)
    for form in forms: assert got[form]==pytest.approx(want[form], rel=.1)

def test_the_sample_form_is_the_same_at_every_batch_size():
    torch.manual_seed(0)
    model,data = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4),batches(1, 6)
    halves = [(data[0][0][s], data[0][1][s]) for s in (slice(4), slice(4, 6))]
    one,two = SampleBlockFisher(),SampleBlockFisher()
    whole = measure(model, data, None, ['sample_block_fisher'])['sample_block_fisher']
    measure(model, halves[:1], None, [one]); measure(model, halves[1:], None, [two])
    one.add(two)
    assert one.result()==pytest.approx(whole, rel=1e-4)

def test_block_fisher_of_a_llama_and_of_a_site_outside_of_blocks():
    from transformers import LlamaConfig, LlamaForSequenceClassification
    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3, pad_token_id=0)
    model = LlamaForSequenceClassification(cfg)
    batch = dict(input_ids=torch.randint(1, 50, (3, 7)), attention_mask=torch.ones(3, 7).long(), labels=torch.tensor([0,1,2]))
    got = measure(model, [batch], None, ['block_fisher','sample_block_fisher'])
    ps = list(model.model.layers[1].parameters())
    want = sum(g.square().sum() for g in torch.autograd.grad(model.eval()(**batch).loss, ps)).item()
    assert block_means(got['block_fisher'])['model.layers.1']==pytest.approx(want, rel=1e-3)
    siglip = timm.create_model('vit_base_patch16_siglip_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4)
    params = block_params(siglip, find_sites(siglip))
    own = {id(p) for n in ('q','kv') for p in getattr(siglip.attn_pool, n).parameters()}
    assert {id(p) for p in params['']}==own and len(params)==3

def test_a_zero_head_is_an_error():
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4)
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match='every gradient is zero'): measure(model, batches(), None, ['block_fisher'])
