"Arithmetic and memory of a step, counted before it runs"
import pytest, timm, torch
from torch import nn
from fclora.adapt import *
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import *
from fclora.forecast import *
from fclora.lora import *
from fclora.make_plan import *
from fclora.plan import *
from fclora.planning import plan_model
from conftest import make_images

pytestmark = pytest.mark.usefixtures('one_thread')
shape = (3,32,32)

def vit(**kw): return timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4, **kw)
def adapted(from_block=0, r=2):
    model = vit()
    return freeze(adapt(model, {s.name:r for s in find_sites(model, from_block=from_block)}))

def test_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    forward,weights,inputs = 2*(4*8+8*3), 2*(4*8+8*3), 2*8*3          # the first layer's input needs no gradient
    assert step_cost(net, (4,))==dict(forward_flops=forward, flops=forward+weights+inputs, kept_bytes=4*(4+8))
    net[0].requires_grad_(False)
    assert step_cost(net, (4,))==dict(forward_flops=forward, flops=forward+2*8*3, kept_bytes=4*8)

def test_kept_bytes_are_those_of_a_real_step():
    for model in (vit().train(), adapted().train()):
        own,kept = {p.untyped_storage().data_ptr() for p in model.parameters()},{}
        def keep(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): out = model(torch.randn(8, *shape))
        real = sum(s.nbytes() for p,s in kept.items() if p not in own)/8
        out.sum().backward()
        assert step_cost(model, shape)['kept_bytes']==pytest.approx(real, rel=.1)

def test_the_higher_the_lowest_block_the_less():
    costs = [step_cost(adapted(k), shape) for k in range(len(vit().blocks))]
    for a,b in zip(costs, costs[1:]): assert a['flops']>b['flops'] and a['kept_bytes']>b['kept_bytes']
    assert step_cost(vit(), shape)['flops']>costs[0]['flops']

def test_recomputing_blocks_keeps_less_and_computes_more():
    model = adapted()
    before = step_cost(model, shape)
    model.set_grad_checkpointing(True)
    after = step_cost(model, shape)
    assert after['kept_bytes']<.3*before['kept_bytes'] and 1.2<after['flops']/before['flops']<1.6

def test_the_model_is_left_as_it_was():
    model = adapted().eval()
    before,flags = {n:p.clone() for n,p in model.state_dict().items()},[p.requires_grad for p in model.parameters()]
    step_cost(model, shape)
    assert all(torch.equal(before[n], p) for n,p in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()]==flags and not model.training and all(p.grad is None for p in model.parameters())

def test_forecast_of_a_plan():
    model = vit()
    low,high = (forecast(model, make_plan('m', find_sites(model, from_block=k), method='uniform', budget=40), shape, 16) for k in (0,3))
    assert low['lowest_block']==0 and high['lowest_block']==3 and high['step']<low['step']<1 and high['kept']<low['kept']<1
    assert low['params']-low['adapter_params']==count_params(model)['head']
    twice = forecast(model, make_plan('m', find_sites(model), method='uniform', budget=40), shape, 32)
    assert twice['kept_mib']==2*low['kept_mib'] and twice['step']==low['step']

class WithVector(LoRA):
    "LoRA and a vector at every site besides"
    parts = dict(LoRA.parts, extra=None)
    def new_parts(self, site, r): return super().new_parts(site, r) | dict(extra=self.raw.new_zeros(site.d_out))
    @staticmethod
    def cost(site, r): return r*(site.d_in+site.d_out)+(site.d_out if r else 0)

def test_the_forecast_is_that_of_the_adapter_of_the_plan(monkeypatch):
    monkeypatch.setitem(adapters, 'vector', WithVector)
    model = vit()
    plain,mine = (make_plan('m', find_sites(model), method='uniform', budget=36, adapter=a) for a in ('lora','vector'))
    a,b = (forecast(model, p, shape) for p in (plain, mine))
    assert b['params']-a['params']==18*64 and sum(p.numel() for p in adapter_params(mine.adapt(vit())).values())==b['adapter_params']

def test_frozen_blocks_of_a_wide_model_halve_the_step():
    with torch.device('meta'): model = timm.create_model('deit_base_patch16_224', num_classes=10)
    f = forecast(model, make_plan('deit', find_sites(model, from_block=6), method='uniform', budget=54), (3,224,224))
    assert f['step']==pytest.approx(.502, abs=.002) and f['kept']<.37

def test_a_plan_prints_its_forecast_until_its_ranks_are_edited(tmp_path):
    model = vit()
    plan = make_plan('m', find_sites(model), method='uniform', budget=40)
    plan.settings['forecast'] = forecast(model, plan, shape)
    assert 'of the arithmetic of full fine-tuning' in str(plan)
    again = Plan.load(plan.save(tmp_path/'p.json'))
    assert str(again)==str(plan)
    again.ranks[again.sites[0].name] += 1
    assert 'arithmetic' not in str(again)

class Peeking(nn.Module):
    "A model that looks at its data, which cannot be done without data"
    def __init__(self): super().__init__(); self.vit = vit()
    @property
    def head(self): return self.vit.head
    def forward(self, x): return self.vit(x) if x.sum().item()<1e9 else None

def test_a_model_that_needs_data_has_a_plan_without_forecast(tmp_path):
    dls = get_dls(load_images(make_images(tmp_path/'d', n=10), 32, progress=False), 32, (.5,)*3, (.2,)*3, bs=4, device='cpu')
    model = Peeking()
    plan = plan_model(model, dls, 'uniform', budget=40)
    assert plan.total_rank==40 and 'forecast' not in plan.settings and 'arithmetic' not in str(plan)
