"GoRA's ranks follow its shares, its start goes down the projected gradient, and the weights stay as they are"
import math
from collections import OrderedDict
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
import system_models as S
from fclora.systems import adalora, dora, experts, stella, step_sizes # noqa: F401 their adapters are named below
from fclora.adapt import *
from fclora.find import *
from fclora.initialisers import *
from fclora.lora import *
from fclora.make_plan import *
from fclora.runs.finetune import finetune
from fclora.scorers.measure import *
from fclora.scorers.watch import batch_loss
from fclora.sites import *
from fclora.systems.gora import *

pytestmark = pytest.mark.usefixtures('one_thread')

def batches(name, n=3):
    g = torch.Generator().manual_seed(4)
    y = [torch.randint(0, 4, (8,), generator=g) for _ in range(n)]
    return [(S.inputs(name, 8), t) for t in y]

def gradients(net, data):
    "The average gradient of every weight, taken by hand"
    net = deepcopy(net).eval().requires_grad_(True)
    sum(F.cross_entropy(net(x), y) for x,y in data).div(len(data)).backward()
    return {n:p.grad for n,p in net.named_parameters()}

@pytest.mark.parametrize('adapter', ['lora','dora','frozen_a'])
@pytest.mark.parametrize('name', ['deit','swin','beit','conv','llama'])
def test_the_update_at_the_start_is_the_projected_gradient_and_weights_are_untouched(name, adapter):
    base,data = S.made[name]().eval(),batches(name)
    grads = gradients(base, data)
    net = adapt(deepcopy(base), S.unequal(base), adapter)
    before = {n:p.clone() for n,p in net.state_dict().items()}
    init_adapters(net, 'gora', data)
    assert {n for n,p in net.state_dict().items() if not torch.equal(p, before[n])}=={n for n in before if '.lora_B.' in n}
    for path,layer in adapted_layers(net).items():
        for kind,s in layer.sites.items():
            G,A = grads[f'{path}.weight'].flatten(1)[s.rows],layer.lora_A[kind].detach()
            delta = layer.scaling[kind]*layer.lora_B[kind].detach()@A
            projected = G@torch.linalg.pinv(A)@A
            assert_close(delta, -.05*math.sqrt(s.d_in/len(A))*projected, rtol=1e-3, atol=1e-5*projected.abs().max().item())
            assert F.cosine_similarity(delta.flatten(), -projected.flatten(), 0)>1-1e-4
            assert (delta*G).sum()<0, 'it goes down'
    assert_close(unload(net).state_dict(), base.state_dict(), rtol=0, atol=0)

def test_the_output_at_the_start_is_not_that_of_the_base_and_the_loss_is_lower():
    base,data = S.deit().eval(),batches('deit')
    net = init_adapters(adapt(deepcopy(base), {s.name:4 for s in find_sites(base)}), 'gora', data).eval()
    with torch.no_grad():
        assert (net(data[0][0])-base(data[0][0])).abs().max()>1e-4
        assert sum(batch_loss(net, b, F.cross_entropy) for b in data)<sum(batch_loss(base, b, F.cross_entropy) for b in data)

def test_full_rank_expresses_the_whole_gradient():
    layer,data = nn.Sequential(OrderedDict(q=nn.Linear(6, 8))),[(torch.randn(20, 6), torch.randint(0, 8, (20,)))]
    G,net = gradients(layer, data)['q.weight'],adapt(deepcopy(layer), dict(q=6))
    downhill(net, data, gamma=1.)
    assert_close(net.q.delta(), -G, rtol=1e-3, atol=1e-5)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(.1, 1), min_size=2, max_size=8), st.integers(1, 12))
def test_ranks_are_those_of_the_formula_where_no_bound_is_met(values, mean):
    sites = [Site(f's{i}', f's{i}', 'q', i, 64, 64 if i%2 else 512) for i in range(len(values))]
    scores = {s.name:v/sum(values) for s,v in zip(sites, values)}
    root = {s.name:math.sqrt(s.d_in+s.d_out) for s in sites}
    formula = {n:mean*sum(root.values())*v/root[n] for n,v in scores.items()}   # He et al. 2025, eq. 9, before rounding
    ranks = by_root_cost(scores, round(sum(formula.values())), 0, 64*len(values), sites=sites)
    assert sum(ranks.values())==round(sum(formula.values())) and all(abs(ranks[n]-r)<1.5 for n,r in formula.items())

def test_sites_of_one_width_share_by_score_alone():
    base,data = S.deit().eval(),batches('deit')
    sites = find_sites(base)
    metrics = measure(base, data, sites, ['gora'])
    plan = make_plan('deit', sites, metrics, 'gora', budget=60, lo=0, hi=48)
    total = sum(metrics['gora'].values())
    assert plan.total_rank==60 and all(abs(plan.ranks[n]-60*v/total)<1 for n,v in metrics['gora'].items())

def test_what_cannot_start_there_says_so():
    class Own(Adapter):
        "An adapter with an `A` and no `B`"
        parts = dict(lora_A=0)
        def new_parts(self, site, r): return dict(lora_A=torch.zeros(r, site.d_in))
        def site_delta(self, kind): return self.lora_A[kind].sum(0).expand(self.sites[kind].d_out, -1)
    adapters['own'] = Own
    try:
        net = adapt(S.deit(), {'blocks.0.attn.qkv.q':2}, 'own')
        with pytest.raises(ValueError, match='and Own has another product: take the adapter lora'): init_adapters(net, 'gora', batches('deit'))
    finally: del adapters['own']
    with pytest.raises(ValueError, match='give it batches'): init_adapters(adapt(S.deit(), {'blocks.0.attn.qkv.q':2}), 'gora')
    with pytest.raises(ValueError, match='needs the sites'): by_root_cost(dict(a=1.), 1)

@pytest.mark.parametrize('adapter', ['svd','stiefel','stella','moe','held'])
def test_another_product_is_refused_before_anything_is_measured_or_changed(adapter, monkeypatch):
    class Held(LoRA):
        "LoRA's product, whose `B` is to stay orthonormal"
        orthonormal = ('lora_B',)
    monkeypatch.setitem(adapters, 'held', Held)
    def unread():
        raise AssertionError('no gradient is needed to refuse')
        yield
    net = adapt(S.deit(), {s.name:2 for s in find_sites(S.deit())}, adapter)
    before = {n:p.clone() for n,p in net.state_dict().items()}
    with pytest.raises(ValueError, match=f'init gora .* and {adapters[adapter].__name__} has another product'): init_adapters(net, 'gora', unread())
    assert_close(net.state_dict(), before, rtol=0, atol=0)

@pytest.mark.parametrize('adapter', ['svd','stiefel','stella'])
def test_the_method_refuses_them_too(adapter, tmp_path):
    options = dict(budget=40, epochs=1, batch_size=32, score_batches=1, limit='64,32,32', probe=False, quiet=True, out=str(tmp_path/'run'))
    with pytest.raises(ValueError, match='has another product'): finetune('digits', 'gora', adapter=adapter, **options)

def test_the_method_from_the_command_to_merged_weights(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'gora', kinds='q,k,v,fc1', head_warmup=2)
    assert run.plan.total_rank==40 and run.plan.init=='gora' and len(set(run.plan.ranks.values()))>2

def test_its_allocator_spends_parameters_and_goes_with_dora(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'gora', adapter='dora', unit='params', budget=30_000, lo=0)
    assert 29_000<run.metrics['params']['adapter']<=30_000
