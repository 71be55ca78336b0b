"EVA gives the ranks, the start and the multipliers that PEFT's EVA gives, and spends any budget"
from copy import deepcopy
import pytest, timm, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
import system_models as S
from fclora.adapt import *
from fclora.find import *
from fclora.initialisers import *
from fclora.make_plan import *
from fclora.scorers.activations import *
from fclora.scorers.measure import *
import fclora.systems.dora # noqa: F401 its adapter is named below
from fclora.systems.eva import *

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def vit():
    "A ViT with separate query, key and value, and batches for it"
    T = pytest.importorskip('transformers')
    torch.manual_seed(0)
    net = T.ViTForImageClassification(T.ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                                                  image_size=32, patch_size=8, num_labels=4)).eval()
    with torch.no_grad():
        for p in net.parameters(): p.mul_(6 if p.ndim>1 else 1)   # attention that does something
    return net,[dict(pixel_values=x) for x in (torch.randn(360, 3, 32, 32)*torch.linspace(.2, 2, 32)).chunk(4)]

@pytest.mark.parametrize('r,rho', [(2,2.), (3,2.), (4,1.5), (3,1.)])
def test_ranks_start_and_multipliers_equal_those_of_peft(vit, r, rho):
    peft = pytest.importorskip('peft')
    net,batches = vit
    sites = find_sites(net)
    metrics = measure(net, batches, sites, ['spectrum'])
    cfg = peft.LoraConfig(r=r, lora_alpha=8, target_modules=['q_proj','k_proj','v_proj','query','key','value'], init_lora_weights='eva',
                          eva_config=peft.EvaConfig(rho=rho))
    theirs = peft.get_peft_model(deepcopy(net), cfg)
    torch.manual_seed(0)
    peft.initialize_lora_eva_weights(theirs, batches, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False)
    plan = make_plan('vit', sites, metrics, 'eva', budget=r*len(sites), lo=0)
    ranks = top_components(plan.scores, r*len(sites), 0, rank_caps_of(sites), metrics=metrics, rho=rho)
    if rho==2: assert ranks==plan.ranks
    ours = init_adapters(adapt(deepcopy(net), ranks, 'lora', 8., 'mean'), 'eva', batches)
    tm = theirs.base_model.model
    assert ranks=={s.name:len(tm.get_submodule(s.name).lora_A['default'].weight) for s in sites}
    for s in sites:
        them,us = tm.get_submodule(s.name),ours.get_submodule(s.path)
        assert us.scaling[s.kind]==pytest.approx(them.scaling['default'])
        A,B = us.lora_A[s.kind],them.lora_A['default'].weight
        assert (A[0]*B[0]).sum().abs()>.9, 'the first component, up to its sign; theirs is found from truncated ones'
    assert rho==1 or len(set(ranks.values()))>1

def rank_caps_of(sites): return {s.name:min(16, s.d_in, s.d_out) for s in sites}

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=2, max_size=6), st.integers(0, 2), st.floats(1, 3), st.data())
def test_every_budget_is_spent_within_bounds(shares, lo, rho, data):
    shares = {f's{i}':sorted(s, reverse=True) for i,s in enumerate(shares)}
    n = len(shares)
    budget = data.draw(st.integers(n*lo, n*8))
    ranks = top_components(dict.fromkeys(shares, 1.), budget, lo, 8, metrics=dict(spectrum=shares), rho=rho)
    assert sum(ranks.values())==budget and all(lo<=r<=8 for r in ranks.values())
    costs = {s:3+2*(i%2) for i,s in enumerate(shares)}
    params = data.draw(st.integers(lo*sum(costs.values()), 8*sum(costs.values())))
    ranks = top_components(dict.fromkeys(shares, 1.), params, lo, 8, costs, dict(spectrum=shares), rho)
    left = params-sum(costs[s]*r for s,r in ranks.items())
    assert 0<=left and all(r==8 or costs[s]>left for s,r in ranks.items())

def test_a_component_that_explains_more_is_never_passed_over(vit):
    net,batches = vit
    sites = find_sites(net)
    metrics = measure(net, batches, sites, ['spectrum','explained_var'])
    ranks = make_plan('vit', sites, metrics, 'eva', budget=30, lo=0).ranks
    shares = metrics['spectrum']
    assert min(shares[n][r-1] for n,r in ranks.items() if r)>=max(shares[n][r] for n,r in ranks.items() if r<5)
    assert all(sum(shares[n][:16])==pytest.approx(metrics['explained_var'][n]) for n in shares)

def test_fused_layers_get_the_ranks_of_separate_ones():
    x = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))*torch.linspace(.2, 2, 32)
    torch.manual_seed(0)
    fused = timm.create_model('test_vit', num_classes=4, img_size=32, patch_size=8).eval()
    sites = find_sites(fused)
    plan = make_plan('vit', sites, measure(fused, [(x,)], sites, ['spectrum']), 'eva', budget=52, lo=0)
    spectra = measure(fused, [(x[:20],), (x[20:],)], sites, ['spectrum'])
    again = make_plan('vit', sites, spectra, 'eva', budget=52, lo=0)
    assert plan.ranks==again.ranks and plan.total_rank==52
    by_block = [[plan.ranks[s.name] for s in sites if s.block==b] for b in range(6)]
    assert all(max(r)-min(r)<=1 for r in by_block), 'query, key and value of a block see the same'

@pytest.mark.parametrize('name', ['deit','swin','conv','llama'])
def test_every_model_has_a_spectrum_and_starts_as_the_base(name):
    base,x = S.made[name]().eval(),S.inputs(name, 40)
    sites = find_sites(base, include=['0','2']) if name=='conv' else find_sites(base, S.every_kind)
    plan = make_plan(name, sites, measure(base, [(x,)], sites, ['spectrum']), 'eva', budget=2*len(sites), lo=0, hi=3)
    net = init_adapters(plan.adapt(deepcopy(base)), plan.init, [(x,)])
    with torch.no_grad(): assert_close(net(x), base(x), rtol=0, atol=1e-6)
    assert len(set(plan.ranks.values()))>1

def test_the_method_from_the_command_to_merged_weights(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'eva', lo=0, score_batches=3)
    assert run.plan.total_rank==40 and run.plan.init=='eva' and len(set(run.config['scaling'].values()))==1

def test_its_allocator_goes_with_another_method(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'dora', allocator='eva')
    assert (run.plan.adapter,run.plan.scaling,run.plan.weights)==('dora','sqrt',{}) and len(set(run.plan.ranks.values()))>1
    assert set(run.plan.metrics)=={'spectrum'}

def test_other_scores_are_refused():
    sites = find_sites(S.deit())
    with pytest.raises(ValueError, match='needs the metric spectrum'):
        make_plan('deit', sites, dict(fisher={s.name:1. for s in sites}), 'eva', budget=12, weights=dict(fisher=1.))
