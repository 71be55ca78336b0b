"FLoE: gates against finite differences, a search that repeats nothing and itself, and experts that are never merged"
from copy import deepcopy
from functools import partial
import json, sys
import pytest, timm, torch
import torch.nn.functional as F
from torch.testing import assert_close
import system_models as S
from fclora.adapt import *
from fclora.allocators.waterfill import allocators
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls, score_dl
from fclora.data.sources import load_images
from fclora.deploy.onnx import export_onnx
from fclora.deploy.peft import save_peft
from fclora.find import block_path,find_sites
from fclora import planning
from fclora.planning import plan_model
from fclora.scorers.measure import measure, scorers
from fclora.scorers.watch import batch_loss
from fclora.systems.experts import *
from fclora.systems.floe import *

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]

def vit(name='test_vit', **kw):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(img_size=32, num_classes=4), **kw}).eval()

def filled(model, std=.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter_params(model).values(): p.normal_(0, std)
    return model

def some_ranks(model, **kw): return {s.name:1+i%3 for i,s in enumerate(find_sites(model, **kw))}

models = dict(
    vit=lambda: vit(patch_size=8),
    deit=lambda: vit('deit_tiny_distilled_patch16_224', patch_size=8, depth=2),
    swin=lambda: vit('swin_tiny_patch4_window7_224', window_size=2, embed_dim=24, depths=(1,1), num_heads=(2,2)))

# --- gates

def batches_of(name, n=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return [(x if name=='llama' else x.to(dtype), torch.randint(0, 4, (len(x),), generator=g)) for x in S.inputs(name, 8*n).split(8)]

@pytest.mark.parametrize('name,adapter', [(name, adapter) for name in ('deit','swin','conv','llama') for adapter in ('lora','moe') if (name, adapter)!=('conv','moe')])
def test_the_gradient_of_a_gate_is_a_finite_difference(name, adapter):
    std,eps,rel = (.05,3e-3,1e-3) if name=='llama' else (.2,1e-4,1e-4) # the norms of Llama work in 32 bits
    net = filled(adapt(S.made[name]().double().eval(), S.unequal(S.made[name](), adapter), adapter), std)
    batch = batches_of(name, 1, torch.float64)[0]
    batch_loss(net, batch, F.cross_entropy).backward()
    def loss(block, gate):
        copied = deepcopy(net)
        for m in adapted_layers(copied).values(): # a gate before all that the block's adapters add
            m.scaling = {kind:v*(gate if block_path(m.sites[kind].name)==block else 1) for kind,v in m.scaling.items()}
        with torch.no_grad(): return batch_loss(copied, batch, F.cross_entropy).item()
    grads = gate_gradients(net)
    for block,g in grads.items():
        assert (loss(block, 1+eps)-loss(block, 1-eps))/(2*eps)==pytest.approx(g, rel=rel, abs=1e-7)
    assert all(grads.values())

@pytest.fixture(scope='module')
def data():
    torch.manual_seed(0)
    model = create_backbone('vit_pico', 10)
    return model,get_dls(load_images('digits', limit='160,64,64'), **image_config(model), bs=16, device='cpu')

def test_scoring_leaves_no_trace_and_repeats(data):
    model,dls = data
    before,rng = {n:p.clone() for n,p in model.state_dict().items()},torch.get_rng_state()
    def scores(**kw): return measure(model, score_dl(dls), None, [GateFisher(**kw)], n_batches=6)['gate_fisher']
    a,b = scores(warm=4),scores(warm=4)
    assert a==b!=scores(warm=4, seed=1) and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n,p in model.state_dict().items()) and not adapted_layers(model)
    assert all(v>0 for v in a.values()) and len(set(a.values()))==6

@pytest.mark.parametrize('name', ['swin','conv','llama'])
def test_other_models_and_16_bits_score_by_the_gates_of_their_blocks(name):
    base = S.made[name]().eval()
    sites = find_sites(base, include=['0','2']) if name=='conv' else find_sites(base)
    scorer = GateFisher(warm=2)
    scores = measure(base, batches_of(name), sites, [scorer])['gate_fisher']
    assert scores.keys()=={s.name for s in sites} and all(v>0 for v in scores.values())
    by_hand = {b:sum(g[b]**2 for g in scorer.gates[2:])/2 for b in scorer.gates[0]}
    assert len(scorer.gates)==4 and scores=={s.name:by_hand[block_path(s.name)] for s in sites}
    half = measure(S.made[name]().eval().bfloat16(), batches_of(name, dtype=torch.bfloat16), sites, [GateFisher(warm=2)])['gate_fisher']
    assert half==pytest.approx(scores, rel=.2)

def test_only_batches_after_the_warm_up_count():
    s = GateFisher(warm=2)
    s.sites,s.gates = find_sites(vit(patch_size=8))[:1],[{'blocks.0':g} for g in (100., 50., 1., 3.)]
    assert s.result()=={'blocks.0.attn.qkv.q':5}
    with pytest.raises(ValueError, match='two passes do not add up'): s.add(s)
    s.gates = s.gates[:2]
    assert s.result()=={'blocks.0.attn.qkv.q':2500}

# --- the search

def hills(o): return -(o-9)**2/30+(o==3)*.5+o/7
options = list(range(1, 13))

def test_the_search_reproduces_with_its_seed_and_repeats_nothing():
    asked = []
    def loss(o): asked.append(o); return hills(o)
    a,b = search(loss, options, 9, seed=3),search(loss, options, 9, seed=3)
    assert list(a.items())==list(b.items()) and asked[:9]==asked[9:]==list(a) and len(set(asked[:9]))==9
    assert list(search(hills, options, 9, seed=4))!=list(a)
    assert sorted(search(hills, options, 99))==options # all of them, once

def test_the_search_resumes_where_it_was_stopped(tmp_path):
    whole,asked,file = search(hills, options, 8),[],tmp_path/'trials.json'
    class Stop(Exception): pass
    def loss(o):
        if len(asked)==4: raise Stop
        asked.append(o)
        return hills(o)
    with pytest.raises(Stop): search(loss, options, 8, path=file)
    assert list(search(hills, options, 8, path=file).items())==list(whole.items()) and asked==list(whole)[:4]
    assert json.loads(file.read_text())['trials']==[list(o) for o in whole.items()]
    with pytest.raises(ValueError, match='of another search'): search(hills, options[:5], 8, path=file)

def test_the_search_finds_the_valley_sooner_than_chance():
    def valley(o): return (o-17)**2/100
    ways = list(range(24))
    found = [list(search(valley, ways, 8, seed=s)).index(17) for s in range(3) if 17 in search(valley, ways, 8, seed=s)]
    assert len(found)==3 # eight trials at random hit it once in three

def test_losses_that_are_no_numbers(tmp_path):
    def broken(o): return float('nan') if o<6 else float(o)
    tried = search(broken, options, 12, path=tmp_path/'t.json')
    assert min(tried, key=tried.get)==6 and sorted(tried)==options and search(broken, options, 12, path=tmp_path/'t.json')==tried

def test_without_optuna_one_error_names_the_extra(monkeypatch):
    import fclora.files
    monkeypatch.setattr(fclora.files, 'find_spec', lambda p: None)
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r"needs optuna: pip install 'fclora\[tune\]'"): search(hills, options)

def test_without_optuna_nothing_is_measured(data, monkeypatch):
    import fclora.files
    model,dls = data
    monkeypatch.setattr(fclora.files, 'find_spec', lambda p: None)
    monkeypatch.setitem(scorers, 'gate_fisher', None) # would fail if it were asked
    with pytest.raises(ImportError, match=r"fclora\[tune\]"): plan_model(model, dls, 'floe', budget=36)

# --- the allocator

def test_every_trial_spends_the_budget_and_sees_the_same(data, monkeypatch):
    model,dls = data
    seen = []
    def spy(model, plan, dl, valid, **kw):
        first = [b[1].tolist() for b in dl]
        seen.append((plan.total_rank, first, kw['seed']))
        return sum(r*i for i,r in enumerate(plan.ranks.values()))/100
    monkeypatch.setattr(planning, 'trial_loss', spy)
    plans = [plan_model(model, dls, 'floe', budget=36, hi=12, score_batches=6, seed=1) for _ in range(2)]
    assert plans[0].ranks==plans[1].ranks and plans[0].total_rank==36 and plans[0].allocator=='floe'
    assert {o[0] for o in seen}=={36} and len({str(o[1]) for o in seen})==1 and {o[2] for o in seen}=={1}
    assert len(seen)==12 # six numbers of blocks, twice

def test_the_same_ranks_have_the_same_loss(data):
    model,dls = data
    losses = []
    def twice(scores, budget, lo, hi, costs=None, evaluate=None):
        ranks = allocators['uniform'](scores, budget, lo, hi, costs)
        losses.extend([evaluate(ranks), evaluate(ranks)])
        return ranks
    allocators['twice'] = twice
    try: plan_model(model, dls, 'uniform', allocator='twice', budget=36)
    finally: del allocators['twice']
    assert losses[0]==losses[1]

def test_ranks_of_the_best_blocks(tmp_path):
    scores = {f'blocks.{i}.attn.qkv.{k}':float(i) for i in range(4) for k in 'qkv'}
    ranks = floe(scores, 24, 1, 16, evaluate=lambda ranks: abs(sum(r>0 for r in ranks.values())-6), trials=9)
    assert {n for n,r in ranks.items() if r}=={n for n in scores if n[7] in '23'} and sum(ranks.values())==24
    assert list(block_choices(scores, 24, 1, 4))==[2,3,4]
    with pytest.raises(ValueError, match='does not fit'): block_choices(scores, 999, 1, 4)
    file = tmp_path/'trials.json'
    for _ in range(2): assert floe(scores, 24, 1, 16, evaluate=lambda ranks: max(ranks.values()), path=file)==block_choices(scores, 24)[4]
    with pytest.raises(ValueError, match='of another search'): floe(scores, 23, 1, 16, evaluate=len, path=file)

# --- experts

@pytest.mark.parametrize('name', ['deit','swin','llama'])
@pytest.mark.parametrize('check', [S.starts_as_base, S.saves_and_loads, S.trains_in_half_precision])
def test_experts_in_every_model_that_calls_its_layers(name, check): check(name, 'moe')

@pytest.mark.parametrize('name', ['beit','conv','mha'])
def test_experts_refuse_what_is_no_linear_layer_that_is_called(name):
    with pytest.raises(ValueError, match='experts need its input: take lora there'): adapt(S.made[name](), S.unequal(S.made[name]()), 'moe')

def test_experts_are_one_graph(): S.compiles('deit', 'moe')

@pytest.mark.parametrize('name', models)
def test_experts_are_a_mixture(name):
    model = models[name]()
    ranks = some_ranks(model)
    net = filled(adapt(deepcopy(model), ranks, 'moe'))
    with torch.no_grad():
        m = next(iter(adapted_layers(net).values()))
        tokens = torch.randn(5, m.raw.shape[1])
        want = torch.zeros(5, len(m.raw))
        for kind,s in m.sites.items(): # the formula, token by token
            A,B,R = m.lora_A[kind],m.lora_B[kind],m.router[kind]
            for t,w in zip(range(5), (tokens@R.T).softmax(1)): want[t,s.rows] += m.scaling[kind]*sum(w[e]*B[e]@A@tokens[t] for e in range(3))
        assert_close(m.update(tokens), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match='depends on the input of the layer'): merge_adapters(net)
    assert count_params(net)['adapter']==sum(MoELoRA.cost(s, ranks[s.name]) for s in find_sites(model))

def test_experts_resize_and_have_no_counterpart_in_peft():
    model = models['vit']()
    net,x = filled(adapt(deepcopy(model), {s.name:3 for s in find_sites(model)}, 'moe')),torch.randn(2, 3, 32, 32)
    name = 'blocks.0.attn.qkv.q'
    layer = net.blocks[0].attn.qkv
    with torch.no_grad():
        before = net(x)
        assert_close(resize(deepcopy(net), {name:5})(x), before, atol=1e-5, rtol=1e-5) # new ranks add nothing
        layer.lora_B['q'][:,:,1] = 0
        want = net(x)
        assert_close(resize(net, {name:[0,2]})(x), want, atol=1e-5, rtol=1e-5)
    assert net.blocks[0].attn.qkv.rank('q')==2
    if __import__('importlib').util.find_spec('peft'):
        with pytest.raises(ValueError, match="no counterpart of the adapter 'moe'"): save_peft(net, 'nowhere')

# --- end to end

def test_finetune_with_experts_and_their_exports(tmp_path, monkeypatch):
    monkeypatch.setitem(allocators, 'floe', partial(floe, trials=2, path=tmp_path/'trials.json'))
    run = S.runs_end_to_end(tmp_path, 'floe', adapter='moe')
    assert run.plan.total_rank==40 and len(json.loads((tmp_path/'trials.json').read_text())['trials'])==2
    pytest.importorskip('onnxscript')
    export_onnx(tmp_path/'run', tmp_path/'m.onnx') # compared with the model before it is written
    assert (tmp_path/'m.onnx').is_file()
