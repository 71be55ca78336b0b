"DoRA is PEFT's DoRA, in fused layers and with unequal ranks too"
from copy import deepcopy
import pytest, torch
from torch import nn
from torch.testing import assert_close
import system_models as S
from fclora.adapt import *
from fclora.find import *
from fclora.initialisers import *
from fclora.lora import *
from fclora.sites import *
from fclora.systems.dora import *

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.mark.parametrize('name', S.every_model)
@pytest.mark.parametrize('check', [S.starts_as_base, S.merges, S.saves_and_loads, S.trains_in_half_precision])
def test_every_model(name, check): check(name, 'dora')

@pytest.mark.parametrize('name', ['deit','conv'])
def test_one_graph(name): S.compiles(name, 'dora')

class Net(nn.Module):
    "Separate projections, one of them a convolution"
    def __init__(self):
        super().__init__()
        self.conv,self.q,self.v,self.head = nn.Conv2d(3, 8, 3, padding=1),nn.Linear(8, 12),nn.Linear(12, 10),nn.Linear(10, 4)
    def forward(self, x): return self.head(self.v(self.q(self.conv(x).flatten(2).mT).tanh()).mean(1))

def pair(dropout=0.):
    "The same DoRA by PEFT and by us, trained a little, with a batch"
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    base,ranks,x = Net(),dict(conv=2, q=3, v=5),torch.randn(6, 3, 5, 5)
    cfg = peft.LoraConfig(r=1, lora_alpha=8, target_modules=list(ranks), rank_pattern=ranks, use_dora=True, lora_dropout=dropout)
    theirs = peft.get_peft_model(deepcopy(base), cfg)
    ours = freeze(adapt(deepcopy(base), ranks, 'dora', 8., 'rank', dropout))
    tm = theirs.base_model.model
    for n in ranks:
        layer,kind = getattr(ours, n),next(iter(getattr(ours, n).sites))
        A,B,m = getattr(tm, n).lora_A['default'],getattr(tm, n).lora_B['default'],getattr(tm, n).lora_magnitude_vector['default']
        with torch.no_grad():
            assert_close(layer.magnitude[kind], m.weight.flatten())
            B.weight.normal_(std=.3)
            m.weight.mul_(1+.2*torch.rand_like(m.weight))
            for p,q in ((layer.lora_A[kind],A), (layer.lora_B[kind],B), (layer.magnitude[kind],m)): p.copy_(q.weight.reshape(p.shape))
    return theirs,tm,ours,ranks,x

def test_forward_gradients_and_merged_weight_equal_those_of_peft():
    theirs,tm,ours,ranks,x = pair()
    assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    ours(x).square().sum().backward(); theirs(x).square().sum().backward()
    for n in ranks:
        layer,them = getattr(ours, n),getattr(tm, n)
        for part,g in (('lora_A',them.lora_A), ('lora_B',them.lora_B), ('magnitude',them.lora_magnitude_vector)):
            p = next(iter(getattr(layer, part).values())).grad
            g = g['default'].weight.grad.reshape(p.shape)
            assert_close(p/g.abs().max(), g/g.abs().max(), atol=1e-5, rtol=0)
    x0 = x.clone()
    want = ours(x0).detach()
    merge_adapters(ours); merged = theirs.merge_and_unload()
    for n in ranks: assert_close(getattr(ours, n).raw, getattr(merged, n).weight, atol=1e-5, rtol=1e-5)
    assert_close(ours(x0), want, atol=1e-5, rtol=1e-5)

def test_dropout_is_that_of_peft():
    theirs,_,ours,_,x = pair(.5)
    x = x[:,:,:1,:1]
    lin,them = ours.q.train(),theirs.base_model.model.q.train()
    h = torch.randn(40, 8)
    torch.manual_seed(5); a = lin(h)
    torch.manual_seed(5); b = them(h)
    assert_close(a, b, atol=1e-5, rtol=1e-5)

def test_fused_equals_split():
    torch.manual_seed(0)
    fused,x,ranks = nn.Linear(16, 48),torch.randn(7, 16),dict(q=3, k=0, v=1)
    sites = {k:Site(k, '', k, 0, 16, 16, start=16*i) for i,k in enumerate('qkv')}
    one = adapt_layer(deepcopy(fused), {sites[k]:r for k,r in ranks.items() if r}, 'dora')
    outs = []
    for i,(k,r) in enumerate(ranks.items()):
        part = nn.Linear(16, 16)
        part.load_state_dict({n:t[16*i:16*i+16] for n,t in fused.state_dict().items()})
        if r:
            adapt_layer(part, {Site(k, '', k, 0, 16, 16):r}, 'dora')
            with torch.no_grad():
                for n in part.parts:
                    p = getattr(part, n)[k].normal_()
                    getattr(one, n)[k].copy_(p)
        outs.append(part(x))
    assert_close(one(x), torch.cat(outs, 1), atol=1e-5, rtol=1e-5)

def test_no_dense_product_is_formed_where_the_layer_is_called():
    from torch.utils._python_dispatch import TorchDispatchMode
    class Shapes(TorchDispatchMode):
        def __init__(self): super().__init__(); self.seen = set()
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            if 'mm' in f.__name__: self.seen.add(tuple(out.shape))
            return out
    layer = adapt_layer(nn.Linear(16, 48), {Site('q', '', 'q', 0, 16, 16):3}, 'dora')
    with Shapes() as shapes: layer(torch.randn(5, 16))
    assert (5,48) in shapes.seen and not {(16,16),(48,16),(16,48)} & shapes.seen

def test_resizing_keeps_lengths_and_a_grown_adapter_its_function():
    net,x = S.shake(adapt(S.deit(), {'blocks.0.attn.qkv.q':3, 'blocks.1.attn.qkv.v':2}, 'dora')).eval(),S.inputs('deit')
    with torch.no_grad():
        want,m = net(x),net.blocks[0].attn.qkv.magnitude['q'].clone()
        resize(net, {'blocks.0.attn.qkv.q':5})
        assert_close(net(x), want, atol=1e-5, rtol=1e-5)
        resize(net, {'blocks.0.attn.qkv.q':[0,1], 'blocks.1.attn.qkv.v':[]})
    assert torch.equal(net.blocks[0].attn.qkv.magnitude['q'], m) and current_ranks(net)=={'blocks.0.attn.qkv.q':2}

@pytest.mark.parametrize('init', ['orthogonal','eva'])
def test_other_initialisers_leave_the_start_as_it_is(init):
    base,x = S.deit().eval(),S.inputs('deit', 40)
    net = init_adapters(adapt(deepcopy(base), S.unequal(base), 'dora'), init, [(x,None)]).eval()
    with torch.no_grad(): assert_close(net(x), base(x), rtol=0, atol=1e-6)

def test_a_row_of_zeros_stays_finite():
    layer = nn.Linear(4, 3)
    with torch.no_grad(): layer.weight[1] = 0
    adapt_layer(layer, {Site('q', '', 'q', 0, 4, 3):2}, 'dora')
    layer(torch.randn(2, 4)).sum().backward()
    assert all(p.grad.isfinite().all() for part in layer.parts for p in getattr(layer, part).values())

def test_the_method_from_the_command_to_merged_weights(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'dora')
    assert run.plan.adapter=='dora' and run.plan.total_rank==40

def test_its_adapter_goes_with_the_scores_of_another_method(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'fclora', adapter='dora', unit='params', budget=20_000, lo=0)
    assert run.plan.adapter=='dora' and len(set(run.plan.ranks.values()))>2
    assert 19_000<run.metrics['params']['adapter']<=20_000
