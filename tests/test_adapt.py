"The LoRA layer against plain autograd on W0 + sBA; sites, freezing, counting, merging, saving"
import pickle
from copy import deepcopy
import pytest, timm, torch
from hypothesis import given,settings,strategies as st
from safetensors.torch import load_file,save_file
from torch import nn
import torch.nn.functional as F
from torch.testing import assert_close
from fclora.sites import *
from fclora.lora import *
from fclora.find import *
from fclora.fused import *
from fclora.adapt import *

pytestmark = pytest.mark.usefixtures('one_thread')

def vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4).eval()

def ranks_of(model, every=5): return {s.name:i%every for i,s in enumerate(find_sites(model))}   # 0 among them

def trained(model, seed=1):
    "Non-zero `B`, as after training"
    torch.manual_seed(seed)
    for m in adapted_layers(model).values():
        for B in m.lora_B.values(): nn.init.normal_(B, std=.05)
    return model

def images(n=3): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(2))
def is_adapter(name): return '.lora_' in name
def same(a, b): assert_close(a, b, rtol=0, atol=0)
def raises(piece): return pytest.raises(ValueError, match=piece)

@pytest.fixture
def model(): return vit()
@pytest.fixture
def adapted(model): return trained(adapt(model, ranks_of(model)))

# --- the layer against autograd

def qkv_layer(d_in, d_out, ranks, scaling, seed, dtype=torch.float32, bias=True, **kw):
    "A fused layer with the given ranks of q, k and v, its factors all random"
    torch.manual_seed(seed)
    base = nn.Linear(d_in, 3*d_out, bias=bias, dtype=dtype)
    sites = [Site(f'qkv.{k}', 'qkv', k, 0, d_in, d_out, i*d_out) for i,k in enumerate('qkv')]
    lora = adapt_layer(deepcopy(base), {s:r for s,r in zip(sites, ranks) if r}, scaling=scaling, **kw)
    for B in lora.lora_B.values(): nn.init.normal_(B)
    return base,lora

def by_hand(lora, x, d_out, A, B, s):
    "`x (W0 + sBA)^T + b` with the update written out, slice by slice"
    upd = torch.cat([s[k]*B[k]@A[k] if k in A else torch.zeros(d_out, x.shape[-1]) for k in 'qkv'])
    return F.linear(x, lora.weight.detach()+upd, lora.bias.detach() if lora.bias is not None else None)

@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(0, 6)]*3).filter(any), st.sampled_from(['sqrt','rank']), st.booleans(), st.integers(0, 9999),
       st.sampled_from([(4,),(2,5),(2,3,4)]), st.integers(6, 20), st.integers(6, 20))
def test_forward_and_gradients_equal_autograd_on_the_written_out_weight(ranks, scaling, bias, seed, shape, d_in, d_out):
    _,lora = qkv_layer(d_in, d_out, ranks, scaling, seed, bias=bias)
    s = {k:8/(r**.5 if scaling=='sqrt' else r) for k,r in zip('qkv', ranks) if r}
    x,fresh = torch.randn(*shape, d_in, requires_grad=True),lambda p: p.detach().clone().requires_grad_()
    x2,A,B = fresh(x),*[{k:fresh(p) for k,p in ps.items()} for ps in (lora.lora_A,lora.lora_B)]
    y,want = lora(x),by_hand(lora, x2, d_out, A, B, s)
    up = torch.randn_like(y)/y.numel()**.5
    (y*up).sum().backward(); (want*up).sum().backward()
    assert lora.scaling==s
    close = dict(rtol=1e-5, atol=1e-5)
    assert_close(y/want.abs().max(), want/want.abs().max(), **close)
    for got,ref in [(x,x2)] + [(lora.lora_A[k],A[k]) for k in A] + [(lora.lora_B[k],B[k]) for k in B]:
        top = ref.grad.abs().max()
        assert top>0
        assert_close(got.grad/top, ref.grad/top, **close)

def test_slices_without_a_rank_get_no_update_and_no_parameters():
    base,lora = qkv_layer(12, 8, (0,3,0), 'sqrt', 0)
    x = torch.randn(5, 12)
    q,k,v = (lora(x)-base(x)).chunk(3, -1)
    assert q.abs().max()==v.abs().max()==0 and k.abs().min()>0
    assert [n for n,_ in lora.named_parameters()]==['weight','bias','lora_A.k','lora_B.k']

class SplitAttention(nn.Module):
    "timm's attention with one linear each for query, key and value"
    def __init__(self, attn):
        super().__init__()
        d,self.h,self.proj = attn.qkv.in_features,attn.num_heads,attn.proj
        for i,k in enumerate('qkv'):
            lin = nn.Linear(d, d)
            lin.weight,lin.bias = (nn.Parameter(p.detach()[i*d:(i+1)*d].clone()) for p in (attn.qkv.weight, attn.qkv.bias))
            setattr(self, k, lin)

    def forward(self, x, *args, **kw):
        q,k,v = (l(x).unflatten(-1, (self.h,-1)).transpose(1, 2) for l in (self.q,self.k,self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

@pytest.mark.parametrize('scaling', ['sqrt','rank'])
def test_fused_and_split_models_agree_in_output_and_gradients(model, scaling):
    split = deepcopy(model)
    for b in split.blocks: b.attn = SplitAttention(b.attn)
    x,short = images(),lambda n: n.replace('.qkv', '')
    assert [s.name for s in find_sites(split)]==[short(s.name) for s in find_sites(model)]
    assert_close(split(x), model(x), atol=1e-5, rtol=1e-5)
    trained(adapt(model, ranks := ranks_of(model), scaling=scaling))
    adapt(split, {short(n):r for n,r in ranks.items()}, scaling=scaling)
    pairs = [(p, split.get_parameter(short(n).replace(f'.lora_{f}.{k}', f'.{k}.lora_{f}.{k}')))
             for f in 'AB' for k in 'qkv' for n,p in model.named_parameters() if n.endswith(f'.lora_{f}.{k}')]
    assert len(pairs)==2*sum(r>0 for r in ranks.values())
    with torch.no_grad():
        for p,o in pairs: o.copy_(p)
    assert_close(split(x), model(x), atol=1e-5, rtol=1e-5)
    for m in (model,split): F.cross_entropy(m(x), torch.tensor([0,1,2])).backward()
    for p,o in pairs: assert_close(o.grad, p.grad, atol=1e-5, rtol=1e-3)

def test_dropout_acts_on_the_update_in_training_mode_only():
    base,lora = qkv_layer(64, 16, (4,4,4), 'sqrt', 0, dropout=.5)
    base2,plain = qkv_layer(64, 16, (4,4,4), 'sqrt', 0)
    x = torch.randn(2, 64)
    same(lora.eval()(x), plain(x))
    lora.train()
    assert not torch.equal(lora(x), lora(x))
    with torch.no_grad(): mean = torch.stack([lora(x) for _ in range(4000)]).mean(0)
    assert (mean-plain(x)).abs().max()<.1*(plain(x)-base(x)).abs().max()   # unbiased
    for B in lora.lora_B.values(): nn.init.zeros_(B)
    same(lora(x), base(x))                                                 # the base path drops nothing

def test_adapt_hands_on_dropout_and_the_mode_of_the_layer(model):
    model.train(); model.blocks[1].eval()
    adapt(model, ranks_of(model), dropout=.3)
    assert [m.dropout_p for m in adapted_layers(model).values()]==[.3]*6
    assert [m.training for m in adapted_layers(model).values()]==[True,False]+[True]*4

# --- one autograd function against the formula

def frozen_pair(d_in, d_out, ranks, seed, heads=1, bias=True, dtype=torch.float32):
    "The same adapted layer twice, its weight frozen; the second one never takes the fast path"
    torch.manual_seed(seed)
    base = nn.Linear(d_in, 3*d_out*heads, bias=bias, dtype=dtype).requires_grad_(False)
    at = lambda i: dict(start=i*d_out, heads=heads, step=3*d_out if heads>1 else 0)
    sites = {Site(k, '', k, 0, d_in, d_out*heads, **at(i)):r for i,(k,r) in enumerate(zip('qkv', ranks)) if r}
    fast = adapt_layer(base, sites)
    for B in fast.lora_B.values(): nn.init.normal_(B, std=.3)
    slow = deepcopy(fast)
    slow.fusable = lambda: False
    return fast,slow

def pulled(lora, x, autocast=False):
    "Output, and gradients of the input and all factors"
    x,up = x.detach().clone().requires_grad_(),torch.Generator().manual_seed(5)
    lora.zero_grad()
    with torch.autocast('cpu', torch.bfloat16, autocast): y = lora(x)
    y.backward(torch.randn(y.shape, generator=up).to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in lora.parameters() if p.requires_grad]]

def agree(fast, slow, tol):
    assert len(fast)==len(slow)>3
    for a,b in zip(fast, slow):
        assert a.dtype==b.dtype and b.abs().max()>0
        assert_close(a/b.abs().max(), b/b.abs().max(), rtol=0, atol=tol)

@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 6)]*3).filter(any), st.booleans(), st.integers(0, 9999), st.sampled_from([(4,),(1,3),(2,5),(6,9),(3,4,5)]),
       st.integers(6, 20), st.integers(6, 20), st.sampled_from([1,1,3]), st.sampled_from([torch.float32,torch.float64]))
def test_fast_path_equals_the_formula(ranks, bias, seed, shape, d_in, d_out, heads, dtype):
    fast,slow = frozen_pair(d_in, d_out, ranks, seed, heads, bias, dtype)
    assert fast.fusable()
    x = torch.randn(*shape, d_in, dtype=dtype)
    agree(pulled(fast, x), pulled(slow, x), 1e-5 if dtype==torch.float32 else 1e-13)
    with torch.no_grad(): assert_close(fast(x), slow(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('n', [3,100])
def test_fast_path_under_autocast_within_the_rounding_of_16_bits(n):
    fast,slow = frozen_pair(32, 16, (1,0,5), 0)
    x = torch.randn(n, 32)
    got,want,exact = pulled(fast, x, True),pulled(slow, x, True),pulled(slow, x)
    assert got[0].dtype==torch.bfloat16 and {g.dtype for g in got[1:]}=={torch.float32}
    agree(got, want, .03)
    for g,w,e in zip(got, want, exact): assert (g-e).norm()<=1.5*(w-e).norm()+.002*e.norm()   # no worse than the formula itself

def test_16_bits_do_not_swallow_a_small_update():
    fast,_ = frozen_pair(64, 64, (4,0,0), 0)
    signs = torch.tensor([1.,-1.]).repeat(32)
    with torch.no_grad():
        fast.weight.fill_(1.); fast.bias.zero_()
        fast.lora_A.q.copy_(1e-3*signs.expand(4, -1)); fast.lora_B.q.fill_(1e-2)
        fast.to(torch.bfloat16)
        x = signs.expand(200, -1).to(torch.bfloat16)          # its sum is zero, so what comes out is the update
        assert ((fast.weight+fast.delta()).to(torch.bfloat16)==1).all()
        got = fast(x)[:,:64].float()
        assert_close(got, (x.float()@fast.delta().float().T)[:,:64], rtol=.02, atol=0)
    assert (got>0).all()

def test_the_same_layer_called_twice(model):
    for m in (fast := [*frozen_pair(12, 4, (3,1,2), 3)]): m.train()
    x = torch.randn(7, 12)
    agree(*[pulled(lambda_twice(m), x) for m in fast], 1e-5)

def lambda_twice(m):
    "`m` applied to its own output"
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.m = m
        def forward(self, x): return self.m(self.m(x))
    return Twice()

def test_fast_path_keeps_the_input_and_no_copy_of_a_weight():
    fast,_ = frozen_pair(32, 32, (2,2,2), 0)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t): fast(torch.randn(500, 32, requires_grad=True))
    own = {p.data_ptr() for p in fast.parameters()}
    assert sum(t.numel() for p,t in kept.items() if p not in own)<=500*32 + 6*(32+96)   # x, and the stacked factors

def test_only_what_is_asked_for_gets_a_gradient():
    fast,_ = frozen_pair(12, 4, (3,0,2), 0)
    for p in fast.lora_B.parameters(): p.requires_grad_(False)
    fast(torch.randn(5, 12)).sum().backward()
    assert all(p.grad is not None for p in fast.lora_A.values()) and all(p.grad is None for p in fast.lora_B.values())
    fast.requires_grad_(False)
    x = torch.randn(5, 12, requires_grad=True)
    fast(x).sum().backward()
    assert_close(x.grad, (fast.weight+fast.delta()).sum(0).expand(5, -1), rtol=1e-4, atol=1e-5)

def test_changing_the_weight_between_forward_and_backward_is_an_error():
    fast,_ = frozen_pair(12, 4, (3,0,2), 0)
    y = fast(torch.randn(5, 12, requires_grad=True)).sum()
    merge_adapters(nn.Sequential(fast))
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.backward()

def test_other_tools_still_see_plain_torch():
    fast,slow = frozen_pair(12, 4, (3,0,2), 0)
    x = torch.randn(5, 12)
    params = {n:p.detach() for n,p in fast.named_parameters()}
    loss = lambda ps,x: torch.func.functional_call(fast, ps, (x,)).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), (None,0))(params, x)        # per-sample gradients
    slow(x).square().sum().backward()
    assert_close(each['lora_B.q'].sum(0), slow.lora_B.q.grad, rtol=1e-4, atol=1e-5)
    y = torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False)
    y.square().sum().backward()
    assert_close(fast.lora_B.q.grad, slow.lora_B.q.grad, rtol=1e-4, atol=1e-5)
    ep = torch.export.export(fast.eval(), (x,))
    assert_close(ep.module()(x), fast(x), rtol=1e-5, atol=1e-5)

def test_dropout_and_training_weights_take_the_formula():
    _,lora = qkv_layer(12, 4, (1,1,1), 'sqrt', 0, dropout=.5)
    assert not lora.fusable()                                 # the weight trains
    lora.weight.requires_grad_(False); lora.bias.requires_grad_(False)
    assert not lora.train().fusable() and lora.eval().fusable()
    lora.bias.requires_grad_(True)
    assert not lora.fusable()
    with torch.no_grad(): assert lora.fusable()

def test_factors_of_a_subclass_are_the_ones_used(monkeypatch):
    class Halved(LoRA):
        def site_factors(self, kind):
            A,B = super().site_factors(kind)
            return A/2,B

    monkeypatch.setitem(adapters, 'halved', Halved)
    fast,_ = frozen_pair(6, 8, [2], 0, 1, True, torch.float32)
    halved,x = deepcopy(fast),torch.randn(40, 6)
    halved.remove()
    adapt_layer(halved, {s:2 for s in fast.sites.values()}, 'halved')
    halved.load_state_dict(fast.state_dict())
    A,B = fast.factors()
    for n in (3,40): assert_close(halved(x[:n]), F.linear(x[:n], fast.weight+B@A/2, fast.bias))

def test_compiled_model_has_no_graph_break_and_the_same_gradients(adapted):
    freeze(adapted)
    x,y = images(),torch.tensor([0,1,2])
    def grads(f):
        adapted.zero_grad()
        F.cross_entropy(f(x), y).backward()
        return {n:p.grad.clone() for n,p in adapted.named_parameters() if p.grad is not None}
    want,got = grads(adapted),grads(torch.compile(adapted, fullgraph=True, backend='aot_eager'))
    assert want.keys()==got.keys()
    for n in want: assert_close(got[n], want[n], rtol=1e-3, atol=1e-6)

# --- merging

def test_merged_equals_unmerged_and_unmerging_is_exact(adapted):
    base,x = vit(),images()
    with torch.no_grad():
        before = adapted(x)
        assert (before-base(x)).abs().max()>.01
        assert_close(merge_adapters(adapted)(x), before, atol=1e-5, rtol=1e-5)
        assert not torch.equal(adapted.blocks[0].attn.qkv.weight, base.blocks[0].attn.qkv.weight)
        same(unmerge_adapters(adapted)(x), before)
    for n,p in base.named_parameters(): same(adapted.get_parameter(n), p)

def test_merging_or_unmerging_twice_is_harmless(adapted):
    once = deepcopy(merge_adapters(adapted).state_dict())
    for k,v in merge_adapters(adapted).state_dict().items(): same(v, once[k])
    unmerge_adapters(unmerge_adapters(adapted))
    for n,p in vit().named_parameters(): same(adapted.get_parameter(n), p)
    assert not any(m.merged for m in adapted_layers(adapted).values())

def test_unmerge_is_exact_where_adding_and_subtracting_is_not():
    _,lora = qkv_layer(32, 16, (8,8,8), 'rank', 0)
    with torch.no_grad():
        lora.weight.mul_(1e-3)
        old = lora.weight.clone()
        assert not torch.equal(old+lora.delta()-lora.delta(), old)
    lora.merge(); lora.unmerge()
    same(lora.weight.detach(), old)

@pytest.mark.parametrize('fold', [True,False])
@pytest.mark.parametrize('merged_before', [True,False])
def test_unload_leaves_a_plain_model(adapted, fold, merged_before):
    x,base = images(),vit()
    with torch.no_grad(): want = adapted(x) if fold else base(x)
    if merged_before: merge_adapters(adapted)
    adapted.train(); adapted.blocks[2].eval()
    unload(adapted, merge=fold)
    assert list(adapted.state_dict())==list(base.state_dict())
    assert all(type(m) is nn.Linear for n,m in adapted.named_modules() if n.endswith('qkv'))
    assert adapted.blocks[1].attn.qkv.training and not adapted.blocks[2].attn.qkv.training
    with torch.no_grad(): assert_close(adapted.eval()(x), want, atol=1e-5, rtol=1e-5)
    if not fold:
        for n,p in base.named_parameters(): same(adapted.get_parameter(n), p)
    adapt(adapted, ranks_of(adapted))   # and can be adapted again

# --- copies, saving, precision

def test_deepcopy_is_independent(adapted):
    x = images()
    with torch.no_grad():
        twin,want = deepcopy(adapted),adapted(x)
        same(twin(x), want)
        twin.blocks[0].attn.qkv.lora_B['k'].add_(1.); twin.blocks[0].attn.qkv.weight.add_(1.)
        same(adapted(x), want)
        assert not torch.allclose(twin(x), want)
        for n,p in unmerge_adapters(deepcopy(merge_adapters(adapted))).named_parameters():
            if not is_adapter(n): same(p, vit().get_parameter(n))

def test_state_dict_round_trip(adapted):
    other = adapt(vit(seed=9), ranks_of(adapted))
    other.load_state_dict(adapted.state_dict())
    with torch.no_grad(): same(other(images()), adapted(images()))
    assert set(adapted.state_dict())=={n for n,_ in adapted.named_parameters()}

def test_adapter_state_through_safetensors(adapted, tmp_path):
    nn.init.normal_(adapted.head.weight)
    save_file(adapter_state(adapted), tmp_path/'a.safetensors')
    state,other = load_file(tmp_path/'a.safetensors'),adapt(vit(), ranks_of(adapted))
    assert all(is_adapter(n) or n.startswith('head.') for n in state) and len(state)==2*sum(r>0 for r in ranks_of(adapted).values())+2
    missing,unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and set(missing)==set(vit().state_dict())-{'head.weight','head.bias'}
    with torch.no_grad(): same(other(images()), adapted(images()))
    merge_adapters(adapted)
    for n,v in adapter_state(adapted).items(): same(v, state[n])

def test_adapter_state_is_a_copy(adapted):
    state = adapter_state(adapted)
    for v in state.values(): v.zero_()
    assert adapted.head.weight.abs().sum()>0 and not any(v.requires_grad for v in state.values())

def test_autocast_to_bfloat16(adapted):
    x,y = images(),torch.tensor([0,1,2])
    with torch.no_grad(): full = adapted(x)
    freeze(adapted)
    with torch.autocast('cpu', torch.bfloat16):
        out = adapted(x)
        loss = F.cross_entropy(out, y)
    loss.backward()
    assert out.dtype==torch.bfloat16
    assert_close(out.float(), full, atol=.05*full.abs().max().item(), rtol=0)
    for n,p in adapted.named_parameters():
        if is_adapter(n): assert p.dtype==p.grad.dtype==torch.float32 and p.grad.isfinite().all() and p.grad.abs().sum()>0, n
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): assert_close(merge_adapters(adapted)(x), out, atol=.05, rtol=.1)
    unmerge_adapters(adapted)
    same(adapted.blocks[0].attn.qkv.weight.detach(), vit().blocks[0].attn.qkv.weight.detach())

@pytest.mark.parametrize('dtype,factors,tol', [(torch.bfloat16,torch.float32,.05),(torch.float64,torch.float64,1e-12)])
def test_base_in_another_precision(model, dtype, factors, tol):
    trained(adapt(model.to(dtype), ranks_of(model)))
    base,x = vit().to(dtype),images().to(dtype)
    assert {p.dtype for n,p in model.named_parameters() if is_adapter(n)}=={factors}
    with torch.no_grad():
        out = model(x)
        assert out.dtype==dtype and (out-base(x)).abs().max()>.01
        assert_close(merge_adapters(model)(x), out, atol=tol*out.abs().max().item(), rtol=0)
    unmerge_adapters(model)
    for n,p in base.named_parameters(): same(model.get_parameter(n), p)

# --- sites

class Toy(nn.Module):
    "One transformer block's linears under other names"
    def __init__(self, names, head='classifier', d=8):
        super().__init__()
        for n in names:
            *path,last = n.split('.')
            at = self
            for p in path:
                if p not in dict(at.named_children()): at.add_module(p, nn.Module())
                at = at.get_submodule(p)
            at.add_module(last, nn.Linear(d, d))
        self.add_module(head, nn.Linear(d, 2))

hf_vit = [f'encoder.layer.{i}.{o}' for i in range(2) for o in ('attention.attention.query','attention.attention.key',
    'attention.attention.value','attention.output.dense','intermediate.dense','output.dense')]
llama = [f'layers.{i}.{o}' for i in range(2) for o in ('self_attn.q_proj','self_attn.k_proj','self_attn.v_proj','self_attn.o_proj',
    'mlp.up_proj','mlp.down_proj')]
clip = [f'layers.{i}.{o}' for i in range(2) for o in ('self_attn.q_proj','self_attn.k_proj','self_attn.v_proj','self_attn.out_proj','mlp.fc1','mlp.fc2')]

@pytest.mark.parametrize('names', [hf_vit,llama,clip], ids=['vit','llama','clip'])
def test_hugging_face_names(names):
    toy,every = Toy(names),('q','k','v','proj','fc1','fc2')
    found = find_sites(toy, kinds=every)
    assert [s.name for s in found]==[s.path for s in found]==names
    assert [(s.block,s.kind) for s in found]==[(b,k) for b in (0,1) for k in every]
    assert [s.kind for s in find_sites(toy)]==list('qkv')*2
    assert head_names(toy)==['classifier']

def test_selection_by_kind_expression_and_list(model):
    pick = lambda **kw: [s.name for s in find_sites(model, **kw)]
    assert pick(kinds=('v',))==[f'blocks.{i}.attn.qkv.v' for i in range(6)]
    assert pick(kinds=('fc2','proj'), include=r'blocks\.[01]\.')==['blocks.0.attn.proj','blocks.0.mlp.fc2','blocks.1.attn.proj','blocks.1.mlp.fc2']
    assert pick(include=['blocks.3.mlp.fc1','blocks.2.attn.qkv.k'])==['blocks.2.attn.qkv.k','blocks.3.mlp.fc1']
    assert [(s.start,s.d_in,s.d_out,s.rows) for s in find_sites(model, include=['blocks.2.attn.qkv.k'])]==[(64,64,64,slice(64,128))]

def test_sites_stay_the_same_when_the_model_is_adapted(model):
    before = find_sites(model, kinds=kinds)
    assert find_sites(adapt(model, ranks_of(model)), kinds=kinds)==before

def test_what_a_model_has_instead():
    with raises('it has fc1, fc2, conv'): find_sites(timm.create_model('test_convnext'))
    with raises('Sequential has no q, k, v site; it has no projection'): find_sites(nn.Sequential(nn.Linear(3, 3)))

@pytest.mark.parametrize('kw,piece', [
    (dict(include='blocks.9'), "no q, k, v site matching 'blocks.9'; it has fc1, fc2, k, proj, q, v"),
    (dict(kinds=('gate',)), 'no gate site; it has fc1'),
    (dict(include=['blocks.0.attn.qvk.q']), "no site 'blocks.0.attn.qvk.q'; did you mean blocks.0.attn.qkv")])
def test_errors_of_find_sites(model, kw, piece):
    with raises(piece): find_sites(model, **kw)

# --- adapting and freezing

@pytest.mark.parametrize('r', [-1,65,2.,True,'3',None,float('nan')])
def test_a_rank_must_be_a_whole_number_that_fits(model, r):
    with raises(r'rank of blocks.0.attn.qkv.q must be a whole number in 0..64 \(it maps 64 to 64\), got '): adapt(model, {'blocks.0.attn.qkv.q':r})
    assert not adapted_layers(model)

def test_an_unknown_site_is_an_error_that_offers_near_names(model):
    with raises('VisionTransformer has no site .blocks.0.attn.q.; did you mean blocks.0.attn.qkv'): adapt(model, {'blocks.0.attn.q':2})
    assert not adapted_layers(model)

def test_a_refused_adapt_changes_nothing(model):
    adapt(model, {'blocks.3.attn.qkv.q':2})
    with raises('blocks.3.attn.qkv is adapted already; call unload'): adapt(model, {'blocks.0.attn.qkv.q':2, 'blocks.3.attn.qkv.v':2})
    assert list(adapted_layers(model))==['blocks.3.attn.qkv']

def test_adapted_equals_base_at_the_start_and_shares_its_weights(model):
    base,weight,x = deepcopy(model),model.blocks[0].attn.qkv.weight,images()
    assert adapt(model, ranks_of(model)) is model and model.blocks[0].attn.qkv.weight is weight
    with torch.no_grad(): same(model(x), base(x))
    A = torch.cat([a.detach().flatten() for m in adapted_layers(model).values() for a in m.lora_A.values()])
    assert A.abs().max()<=1/64**.5 and A.std().item()==pytest.approx(1/(3*64)**.5, rel=.05)   # Kaiming-uniform, a=sqrt(5)

def test_rank_zero_everywhere_is_a_linear_probe(model):
    names = [n for n,_ in model.named_parameters()]
    for ranks in ({},dict.fromkeys(ranks_of(model), 0)): adapt(model, ranks)
    assert not adapted_layers(model) and [n for n,_ in freeze(model).named_parameters()]==names
    assert [n for n,p in model.named_parameters() if p.requires_grad]==['head.weight','head.bias']==list(adapter_state(model))
    assert count_params(model)['adapter']==0 and count_params(model)['trainable']==4*64+4

def test_training_moves_adapters_and_head_and_nothing_else(adapted):
    before = {n:p.detach().clone() for n,p in freeze(adapted).named_parameters()}
    opt = torch.optim.SGD(adapted.parameters(), .1)
    F.cross_entropy(adapted(images()), torch.tensor([0,1,2])).backward()
    opt.step()
    moved = {n for n,p in adapted.named_parameters() if not torch.equal(p, before[n])}
    wanted = {n for n in before if is_adapter(n) or n in ('head.weight','head.bias')}
    assert moved==wanted=={n for n,p in adapted.named_parameters() if p.grad is not None}

class Twice(nn.Module):
    "Calls one layer twice, under two names when `shared`"
    def __init__(self, shared):
        super().__init__()
        self.q,self.head = nn.Linear(8, 8),nn.Linear(8, 2)
        if shared: self.tail = nn.ModuleDict(dict(q=self.q))
        self.shared = shared
    def forward(self, x): return self.head((self.tail.q if self.shared else self.q)(self.q(x).tanh()))

@pytest.mark.parametrize('shared', [False,True])
def test_a_layer_that_is_used_twice_is_adapted_in_both_places(shared):
    torch.manual_seed(0)
    toy,x = Twice(shared),torch.randn(4, 8)
    trained(adapt(toy, {'q':3}))
    with torch.no_grad():
        W = toy.q.weight + toy.q.scaling['q']*toy.q.lora_B['q']@toy.q.lora_A['q']
        want = toy.head(F.linear(F.linear(x, W, toy.q.bias).tanh(), W, toy.q.bias))
        assert_close(toy(x), want, atol=1e-5, rtol=1e-5)
        assert_close(merge_adapters(toy)(x), want, atol=1e-5, rtol=1e-5)
        assert_close(unload(toy, merge=True)(x), want, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, Adapter) for m in toy.modules())

def test_two_heads_both_train(adapted):
    with torch.device('meta'): m = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=5)
    freeze(adapt(m, ranks_of(m)))
    assert {n for n,p in m.named_parameters() if p.requires_grad and not is_adapter(n)}=={f'{h}.{o}' for h in ('head','head_dist') for o in ('weight','bias')}
    assert count_params(m)['head']==2*(192*5+5)

# --- the papers' counts

@pytest.mark.parametrize('n_classes,n_ranks,adapter,with_head,pct', [(100,129,198_144,275_044,.23),(10,82,125_952,133_642,.15)])
@pytest.mark.parametrize('spread', ['even','uneven'])
def test_parameter_counts_of_the_paper(n_classes, n_ranks, adapter, with_head, pct, spread):
    with torch.device('meta'): m = timm.create_model('deit_base_distilled_patch16_224', num_classes=n_classes)
    m.head_dist = nn.Identity()
    names = [s.name for s in find_sites(m)]
    ranks = {n:n_ranks//36+(i<n_ranks%36) for i,n in enumerate(names)}
    if spread=='uneven': ranks = {n:1 for n in names} | {n:16 for n in names[:(n_ranks-36)//15]} | {names[-1]:1+(n_ranks-36)%15}
    c = count_params(freeze(adapt(m, ranks)))
    assert sum(ranks.values())==n_ranks and (c['adapter'],c['trainable'],c['adapter']+c['head'])==(adapter,with_head,with_head)
    assert round(c['paper_pct'], 2)==pct and c['total']==c['backbone']+with_head==sum(p.numel() for p in m.parameters())
    assert c['pct']==pytest.approx(100*with_head/c['total'])

def test_rank_four_on_query_and_value_of_vit_base():
    with torch.device('meta'): m = timm.create_model('vit_base_patch16_224', num_classes=10)
    assert count_params(adapt(m, {s.name:4 for s in find_sites(m, kinds=('q','v'))}))['adapter']==147_456

# --- layers fused head by head, or unequally

def test_rows_of_heads_get_their_own_update():
    torch.manual_seed(0)
    base,sites = nn.Linear(6, 20),[Site(k, 'qkv', k, 0, 6, w*2, o, heads=2, step=10) for k,w,o in (('q',3,0),('k',3,3),('v',4,6))]
    assert sites[0].rows==[0,1,2,10,11,12] and sorted(i for s in sites for i in s.rows)==list(range(20))
    lora = adapt_layer(deepcopy(base), {sites[0]:2, sites[2]:1})
    for B in lora.lora_B.values(): nn.init.normal_(B)
    want,x = torch.zeros(20, 6),torch.randn(4, 6)
    for s in (sites[0],sites[2]): want[s.rows] = lora.scaling[s.kind]*lora.lora_B[s.kind]@lora.lora_A[s.kind]
    assert_close(lora.delta(), want)
    want = (base(x)+x@want.T).detach()
    assert_close(lora(x), want, atol=1e-5, rtol=1e-5)
    lora.merge()
    assert_close(F.linear(x, lora.weight, lora.bias), want, atol=1e-5, rtol=1e-5)

def test_grouped_query_attention_makes_narrower_and_cheaper_keys_and_values():
    T = pytest.importorskip('transformers')
    kw = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    for cls,cfg in ((T.LlamaForCausalLM,T.LlamaConfig),(T.Phi3ForCausalLM,T.Phi3Config)):   # separate, and fused with unequal parts
        sites = find_sites(cls(cfg(**kw)))
        assert [(s.kind,s.d_out,LoRA.cost(s, 1)) for s in sites]==[('q',32,64),('k',16,48),('v',16,48)]
    assert [s.rows for s in sites]==[slice(0,32),slice(32,48),slice(48,64)]

@pytest.mark.parametrize('rows', [63,96])
def test_rows_that_the_heads_do_not_explain_are_not_guessed(model, rows):
    model.blocks[0].attn.qkv = nn.Linear(64, rows)
    with raises(f'blocks.0.attn.qkv has {rows} rows, and its heads do not tell which of them are q, k, v; or leave it out with `include`'): find_sites(model)
    assert {s.block for s in find_sites(model, include=r'blocks\.[1-5]')}=={1,2,3,4,5}

# --- weights that are read, and convolutions

def shake(model, seed=1):
    "`trained` for every kind of adapter"
    return trained(model, seed).eval()

class Same(nn.Module):
    "Convolutions of several sorts as projections"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q,self.k,self.v = nn.Conv2d(3, 6, 1),nn.Conv2d(6, 6, 3, stride=2, padding=1, dilation=2),timm.layers.Conv2dSame(6, 8, 3, stride=2)
        self.proj,self.head = nn.Conv1d(8, 5, 2),nn.Linear(5, 2)
    def forward(self, x): return self.head(self.proj(self.v(self.k(self.q(x)).tanh()).flatten(2)).mean(-1))

def beit():
    torch.manual_seed(0)
    model = timm.create_model('beit_base_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1*torch.randn_like(p))   # LayerScale and head start too small to see anything
    return model
def torch_encoder(batch_first=True):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0., batch_first=batch_first), 2, enable_nested_tensor=False).eval()

read = dict(beit=(beit, (3,32,32)), conv=(Same, (3,9,9)), mha=(torch_encoder, (5,16)))
def made(name):
    model,shape = read[name]
    torch.manual_seed(0)
    return model(),torch.randn(4, *shape)
every_kind = ('q','k','v','proj','fc1','fc2','conv')

@pytest.mark.parametrize('name', read)
def test_adapting_where_the_weight_is_read(name):
    model,x = made(name)
    base,sites = deepcopy(model),find_sites(model, every_kind)
    names = set(model.state_dict())
    adapt(model, {s.name:2 if min(s.d_in, s.d_out)>1 else 1 for s in sites})
    assert names==set(model.state_dict())-{n for n in model.state_dict() if is_adapter(n)} and find_sites(model, every_kind)==sites
    with torch.no_grad(): assert_close(model(x), base(x), rtol=0, atol=1e-6)
    shake(model)
    with torch.no_grad():
        want = model(x)
        assert (want-base(x)).abs().max()>1e-3
        plain = deepcopy(base)
        for s in sites:
            W,layer = site_weight(plain, s),model.get_submodule(s.path)
            D = layer.scaling[s.kind]*layer.lora_B[s.kind]@layer.lora_A[s.kind]
            W[s.rows] += D.view_as(W[s.rows])
        assert_close(plain(x), want, atol=1e-5, rtol=1e-4)
        assert_close(merge_adapters(deepcopy(model))(x), want, atol=1e-5, rtol=1e-4)
        assert_close(unload(deepcopy(model), merge=True)(x), want, atol=1e-5, rtol=1e-4)
        same(unmerge_adapters(merge_adapters(deepcopy(model)))(x), want)
        same(unload(deepcopy(model))(x), base(x))
        same(pickle.loads(pickle.dumps(model))(x), want)
    assert [type(m) for m in unload(deepcopy(model)).modules()]==[type(m) for m in base.modules()]
    with raises('adapted already'): adapt(model, {sites[0].name:1})

@pytest.mark.parametrize('name', read)
def test_a_copy_has_its_own_factors_and_gradients_reach_them(name):
    model,x = made(name)
    freeze(shake(adapt(model, {s.name:1 for s in find_sites(model, every_kind)})))
    twin = deepcopy(model)
    twin(x).square().sum().backward()
    assert all(p.grad is not None for n,p in twin.named_parameters() if is_adapter(n)) and not any(p.grad is not None for p in model.parameters())
    assert not any(p.grad is not None for n,p in twin.named_parameters() if not is_adapter(n) and not n.startswith('head.'))
    with torch.no_grad():
        before = model(x)
        for n,p in twin.named_parameters():
            if is_adapter(n): p.zero_()
        same(model(x), before)

@pytest.mark.parametrize('batch_first', [True,False])
def test_torch_fast_paths_see_the_update(batch_first):
    model,x = torch_encoder(batch_first),torch.randn(3, 5, 16)
    shake(adapt(model, {s.name:2 for s in find_sites(model, every_kind)}))
    slow = model(x).detach()
    with torch.no_grad(): assert_close(model(x), slow, atol=1e-5, rtol=1e-4)    # one fused kernel for a whole layer
    with torch.inference_mode(): assert_close(model(x), slow, atol=1e-5, rtol=1e-4)

def test_precision_and_dropout_where_the_weight_is_read():
    model = shake(adapt(beit(), {s.name:2 for s in find_sites(beit())}, dropout=.5))
    x = images()
    with torch.no_grad():
        full,half = model(x),deepcopy(model).bfloat16()
        assert half.blocks[0].attn.qkv.weight.dtype==half(x.bfloat16()).dtype==torch.bfloat16
        with torch.autocast('cpu', torch.bfloat16): assert_close(model(x).float(), full, atol=.05*full.abs().max().item(), rtol=0)
        assert not torch.equal(model.train()(x), model(x)) and torch.equal(model.eval()(x), full)
    assert {p.dtype for n,p in adapt(beit().bfloat16(), {'blocks.0.attn.qkv.q':2}).named_parameters() if is_adapter(n)}=={torch.float32}

def test_running_statistics_are_saved_with_the_adapters():
    def net(): return timm.create_model('test_resnet', num_classes=3)
    torch.manual_seed(0)
    model = net()
    base,ranks,x = deepcopy(model),{s.name:1 for s in find_sites(model, ('conv',))},torch.randn(4, 3, 32, 32)
    freeze(adapt(model, ranks)).train()(x)
    again = adapt(base, ranks)
    again.load_state_dict(adapter_state(model), strict=False)
    with torch.no_grad(): same(again.eval()(x), model.eval()(x))

# --- what cannot be adapted says so

def test_embeddings_groups_and_other_layers_are_refused_by_name():
    net = nn.ModuleDict(dict(emb=nn.Embedding(5, 4), norm=nn.LayerNorm(4), q=nn.Linear(4, 4), dw=nn.Conv2d(4, 4, 3, groups=4), up=nn.ConvTranspose2d(4, 4, 2)))
    for n,why in dict(emb='emb is an embedding', norm='norm is a LayerNorm, not a linear layer', dw='dw is a grouped convolution', up='up is a ConvTranspose2d').items():
        with raises(why): find_sites(net, include=[n])
        with raises(why): adapt(net, {n:1})

def test_quantised_layers_are_refused():
    net = nn.Sequential(nn.ModuleDict(dict(q=nn.Linear(4, 4), v=nn.Linear(4, 4))))
    with raises('0.q is quantised: adapt the model before'): find_sites(torch.ao.quantization.quantize_dynamic(net))
    packed = nn.Linear(8, 8)
    packed.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)   # as bitsandbytes stores four bits
    net[0]['q'] = packed
    with raises('0.q is quantised'): find_sites(net)
    assert [s.name for s in find_sites(net, include='v')]==['0.v']

def test_a_model_that_peft_adapted_is_refused(model):
    peft = pytest.importorskip('peft')
    net = peft.get_peft_model(model, peft.LoraConfig(target_modules=['qkv']))
    with raises('attn.qkv is adapted by PEFT already: call merge_and_unload'): find_sites(net)
    assert len(find_sites(net.merge_and_unload()))==18

def test_tied_weights_are_refused_and_shared_modules_are_not():
    net = nn.ModuleDict(dict(q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4)))
    net['k'].weight = net['q'].weight
    for n,o in (('q','k'),('k','q')):
        with raises(f'{n} shares its weight with {o}'): find_sites(net, kinds=(n,))
        with raises(f'{n} shares its weight with {o}'): adapt(net, {n:1})
    assert [s.name for s in find_sites(net, kinds=('v',))]==['v']
    assert [s.name for s in find_sites(Twice(True))]==['q']

def test_a_parametrised_weight_is_refused():
    net = nn.ModuleDict(dict(q=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))))
    with raises('q has a weight that is computed: remove its parametrisation first'): find_sites(net)

def test_reading_a_weight_is_told_from_asking_for_its_type():
    class Reads(nn.Module):
        def __init__(self): super().__init__(); self.q,self.k,self.v = (nn.Linear(2, 2) for _ in range(3))
        def reset(self): nn.init.zeros_(self.v.weight)
        def forward(self, x): return F.linear(x.to(self.k.weight.dtype), self.q.weight) + self.k(x) + self.v(x)
    assert layers_read(Reads)=={'q'}
    assert [(s.name,s.param) for s in find_sites(Reads())]==[('q','weight'),('k',''),('v','')]

@pytest.mark.parametrize('names', [['heads'],['classifier'],['score'],['cls_classifier','distillation_classifier']])
def test_heads_by_their_usual_names(names):
    net = nn.ModuleDict({n:nn.Linear(2, 2) for n in ['backbone','lm_head',*names]})
    assert head_names(net)==names

# --- resizing

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=6), st.integers(0, 9999))
def test_pruning_drops_what_is_not_listed_and_nothing_else(keep, seed):
    _,lora = qkv_layer(12, 8, (6,2,0), 'sqrt', seed)
    A,B,s,other = lora.lora_A['q'].detach(),lora.lora_B['q'].detach(),lora.scaling['q'],lora.site_delta('k').detach()
    lora.lora_A['q'].requires_grad_(False)
    lora.resize('q', keep)
    assert lora.rank('q')==len(keep) and not lora.lora_A['q'].requires_grad and lora.lora_B['q'].requires_grad
    assert_close(lora.site_delta('q'), s*B[:,keep]@A[keep])
    same(lora.site_delta('k').detach(), other)

def test_a_layer_without_sites_is_plain_again(adapted):
    base = vit()
    resize(adapted, {n:[] for n in current_ranks(adapted)})
    assert not adapted_layers(adapted) and list(adapted.state_dict())==list(base.state_dict())
    with torch.no_grad(): same(adapted(images()), base(images()))

@pytest.mark.parametrize('keep', [[4],[0,0],[-1],1,65,'1',None,2.])
def test_a_resize_that_cannot_be_is_refused_before_anything_changes(adapted, keep):
    ranks = current_ranks(adapted)
    with raises('blocks.0.attn.qkv.k has rank 1: keep a list'): resize(adapted, {'blocks.0.attn.qkv.v':[0], 'blocks.0.attn.qkv.k':keep})
    with raises('no.such has no adapter'): resize(adapted, {'no.such':[0]})
    with raises('merged'): resize(merge_adapters(adapted), {'blocks.0.attn.qkv.v':[0]})
    assert current_ranks(adapted)==ranks

def test_growing_keeps_the_function(adapted):
    x,r = images(),current_ranks(adapted)
    with torch.no_grad():
        want = adapted(x)
        assert_close(resize(adapted, {n:k+2 for n,k in r.items()})(x), want, atol=1e-5, rtol=1e-5)
    assert current_ranks(adapted)=={n:k+2 for n,k in r.items()}
