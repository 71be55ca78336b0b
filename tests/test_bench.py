"The benchmark: contenders compute the same, what is left out and what fails is said, the file survives"
import json, sys
from copy import deepcopy
import numpy as np, pytest, timm, torch
from torch.nn import functional as F
from torch.testing import assert_close
import fclora.studies.bench as B
import fclora.studies.growth as growth
from fclora.adapt import *
from fclora.cli import main
from fclora.forecast import *
from fclora.fused import rank_slices
from fclora.scorers.measure import Scorer, scorers
from fclora.sites import is_head
from fclora.studies.bench import *
from fclora.studies.contenders import *
from fclora.studies.growth import *
from fclora.studies.parts import *
from fclora.studies.scaling import *
from fclora.studies.scoring import *

pytestmark = pytest.mark.usefixtures('one_thread')
kw = dict(model='vit_pico', batch_size=2, steps=2, warmup=0, rank=2, device='cpu', models='')

def tiny(depth=2):
    torch.manual_seed(0)
    return timm.create_model('vit_pico', num_classes=5, depth=depth)

def setup(**o): return Setup(**dict(dict(net=tiny(), batch_size=2, steps=2, warmup=0, rank=2, device=torch.device('cpu')), **o))

# --- pure helpers

def test_after_is_called_untimed_after_every_function():
    after = []
    interleave(dict.fromkeys('abc', int), 4, 2, after=lambda: after.append(1))
    assert len(after)==18

def test_ratios_are_those_within_rounds():
    times = dict(full=[1.,2.,4.], ours=[.5,1.5,2.])
    assert ratios(times, 'full')['ours']==dict(ratio=.5, ratio_q25=.5, ratio_q75=.625)
    assert ratios(times, lambda k: k)['ours']['ratio']==1
    assert ratios(dict(a=[1.]), 'gone')=={}
    assert time_rows(times, 'full')['full']==dict(seconds=2., ratio=1., ratio_q25=1., ratio_q75=1.)

def test_compared_with_the_full_one_of_the_same_model():
    assert [full_of(k) for k in ('fclora','hf full','peft split','fclora split','peft fused compiled')]==['full','hf full','hf full','hf full','full compiled']

def test_kept_bytes_are_those_of_the_arithmetic():
    net,x = tiny(),torch.randn(8, 3, 32, 32)
    for m in (net, freeze(deepcopy(net)), by_hand(deepcopy(net), 2)):
        assert kept_bytes(m.train(), x)/8==pytest.approx(step_cost(m, (3,32,32))['kept_bytes'], rel=.15) # attention keeps less on a CPU than on the meta device

def test_sweep_points_differ_from_the_base_in_one_respect():
    base = dict(depth=6, width=192, size=112, classes=100, batch=8, rank=4, kinds=('q','k','v'))
    for axis,value,o in sweep_points(8, 4): assert {k for k in o if o[k]!=base[k]}<={axis} and o[axis]==value

# --- contenders

def is_adapter(name): return '.lora_A.' in name or '.lora_B.' in name

def filled(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for l in adapted_layers(model).values():
        for p in l.lora_B.values(): p.data.normal_(std=.1, generator=g)
    return model

def gradients(model, x, y):
    F.cross_entropy(out := model(x), y).backward()
    return out.detach(),{n:p.grad for n,p in model.named_parameters() if p.requires_grad}

def assert_same(a, b): assert_close(a, b, atol=1e-5, rtol=1e-4)

@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32),torch.tensor([0,1,2])

@pytest.fixture
def quick(monkeypatch): monkeypatch.setattr(B, 'random_vit', lambda *args, **kwargs: tiny())

@pytest.fixture
def made():
    makers,why = contenders(tiny(), rank=2)
    assert not why
    return makers

def test_all_start_as_the_same_model(batch, made):
    base = tiny()(batch[0])
    for k,f in made.items():
        if k.split()[-1]!='split' and not k.startswith('hf'): assert_same(f()(batch[0]), base)

def test_naive_and_checkpointed_have_the_gradients_of_fclora(batch, made):
    ours,hand,saved = filled(made['fclora']()),made['naive'](),filled(made['fclora checkpointed']())
    for p,l in adapted_layers(ours).items():
        h = hand.get_submodule(p)
        for k in l.sites: h.lora_A[k].data,h.lora_B[k].data = l.lora_A[k].data.clone(),l.lora_B[k].data.clone()
    saved.load_state_dict(ours.state_dict())
    (out,g),(hand_out,hand_g),(saved_out,saved_g) = (gradients(m.train(), *batch) for m in (ours,hand,saved))
    assert_same(hand_out, out); assert_same(saved_out, out)
    assert set(g)==set(hand_g)==set(saved_g) and any(v.abs().max()>1e-3 for k,v in g.items() if is_adapter(k))
    for k,v in g.items(): assert_same(hand_g[k], v); assert_same(saved_g[k], v)

def test_peft_on_fused_qkv_has_the_gradients_of_fclora(batch, made):
    ours,peft = filled(made['fclora']()),made['peft fused']()
    pl = {n:m for n,m in peft.named_modules() if hasattr(m, 'lora_A') and hasattr(m, 'base_layer')}
    for p,l in adapted_layers(ours).items():
        m,(A,sB) = pl[f'base_model.model.{p}'],l.factors()
        m.lora_A['default'].weight.data,m.lora_B['default'].weight.data = A.detach().clone(),(sB/m.scaling['default']).detach()
    (out,g),(peft_out,peft_g) = gradients(ours.train(), *batch),gradients(peft.train(), *batch)
    assert_same(peft_out, out)
    for p,l in adapted_layers(ours).items():
        gA,gB = (peft_g[f'base_model.model.{p}.lora_{o}.default.weight'] for o in 'AB')
        for k,rows in rank_slices(l).items():
            s = l.sites[k]
            assert_same(gA[rows], g[f'{p}.lora_A.{k}'])
            assert_same(gB[s.rows,rows]*pl[f'base_model.model.{p}'].scaling['default']/l.scaling[k], g[f'{p}.lora_B.{k}'])
    assert_same(peft_g['base_model.model.head.modules_to_save.default.weight'], g['head.weight'])

def test_peft_on_split_projections_has_the_gradients_of_fclora(batch, made):
    torch.manual_seed(2); ours = filled(made['fclora split']())
    torch.manual_seed(2); peft = made['peft split']()
    for n,p in ours.model.named_parameters():
        if is_head(n, ['classifier']): peft.model.base_model.model.get_parameter(n.replace('classifier.', 'classifier.modules_to_save.default.')).data = p.data.clone()
        elif not is_adapter(n):
            base = peft.model.base_model.model
            try: q = base.get_parameter(n)
            except AttributeError: q = base.get_parameter('.base_layer.'.join(n.rsplit('.', 1)))
            q.data = p.data.clone()
    pl = lambda p: peft.model.base_model.model.get_submodule(p)
    for p,l in adapted_layers(ours.model).items():
        k, = l.sites
        assert pl(p).scaling['default']==pytest.approx(l.scaling[k])
        pl(p).lora_A['default'].weight.data,pl(p).lora_B['default'].weight.data = l.lora_A[k].data.clone(),l.lora_B[k].data.clone()
    (out,g),(peft_out,peft_g) = gradients(ours.train(), *batch),gradients(peft.train(), *batch)
    assert_same(peft_out, out)
    for p,l in adapted_layers(ours.model).items():
        for o in 'AB': assert_same(peft_g[f'model.base_model.model.{p}.lora_{o}.default.weight'], g[f'model.{p}.lora_{o}.{next(iter(l.sites))}'])

def test_frozen_gives_the_head_the_gradients_of_a_linear_probe(batch, made):
    (out,g),(frozen_out,frozen_g) = (gradients(made[k]().train(), *batch) for k in ('head','frozen'))
    assert_same(out, frozen_out)
    assert set(g)==set(frozen_g)=={'head.weight','head.bias'}
    for k in g: assert_same(g[k], frozen_g[k])

def test_frozen_sends_the_gradient_down_to_the_first_block(batch, made):
    model,got = made['frozen'](),[]
    model.blocks[0].register_full_backward_hook(lambda m,gin,gout: got.append(gin[0].abs().max().item()))
    gradients(model, *batch)
    assert got and got[0]>0

def test_ranks_and_the_lowest_block_are_those_asked_for(made):
    assert {b for p,l in adapted_layers(made['fclora top']()).items() for b in [int(p.split('.')[1])]}=={1}
    count = lambda m: sum(p.numel() for n,p in m.named_parameters() if is_adapter(n))
    assert count(made['fclora']())==count(made['naive']())==count(made['fclora split']())==count(made['peft split']())

def test_without_the_extras_the_others_run(quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'peft', None)
    makers,why = contenders(tiny(), rank=2)
    assert list(makers)==['full','head','frozen','fclora','fclora top','fclora checkpointed','naive'] and "pip install 'fclora[bench]'" in why
    res = bench(**kw, parts='memory')
    assert set(res['memory']['rows'])==set(makers) and "fclora[bench]" in capsys.readouterr().err

# --- parts

@pytest.mark.parametrize('part', ['step','memory','scoring','inference','io','data'])
def test_a_part_has_rows_with_positive_numbers(part):
    block = bench_parts[part](setup())
    assert all(np.isfinite(v) and v>=0 for r in block['rows'].values() for v in r.values())
    json.dumps(block)
    table = bench_table(block)
    assert list(table.index)==list(block['rows']) and not table.map(lambda o: not isinstance(o, str)).any().any()
    if part=='memory': assert block['measure']=='bytes kept for the backward pass'
    if part=='inference': assert block['rows']['merged']['max_diff']<1e-4

def test_every_scorer_has_its_cost_beside_training_steps(monkeypatch):
    class Broken(Scorer):
        name = 'broken'
        def start(self, model, sites): raise ValueError('it needs more')
    monkeypatch.setitem(scorers, 'broken', Broken)
    block = bench_parts['scoring'](setup(steps=1))
    rows,alone = block['rows'],[k for k in scorers if k!='broken']
    assert list(rows)==['steps','scoring',*alone] and len(alone)>12 and {'gate_fisher','spectrum','cka'}<=set(alone)
    assert all(rows[k]['steps100']>0 and rows[k]['ratio']>0 for k in alone) and 'steps100' not in rows['steps']
    assert block['left_out']=='broken: it needs more'
    assert set(block['rounds'])=={'steps','scoring','steps beside the scorers',*alone,*(f'{k}, 2 batches' for k in alone)}
    assert set(bench_table(block).loc['steps'][['100 batches / 100 steps']])=={'–'}

def test_what_needs_more_images_than_there_are_is_left_out_with_its_reason():
    block = bench_parts['scoring'](setup(steps=1, batch_size=1))
    missing = set(scorers)-set(block['rows'])
    assert missing=={'cka','cka_mean','cka_unbiased'}
    assert all(f'{k}: CKA needs at least 4 samples, got 2' in block['left_out'] for k in missing)

def test_a_hundred_batches_from_two_lengths():
    once,batch,step = 3.,.5,.25 # seconds
    def passes(n): return [k*(once+batch*n) for k in (1,2,4)] # rounds on a machine that gets slower
    assert steps_of_100(passes(5), passes(2), [5*k*step for k in (1,2,4)], 5)==pytest.approx((once+100*batch)/(100*step))
    assert steps_of_100([1.], [1.2], [1.], 5)==pytest.approx(1.2/20) # more batches take no less time

def test_two_processes_beside_one():
    block = bench_parts['processes'](setup(steps=2))
    rows,ring = block['rows'],block['ring']
    assert {k.split(', ')[1] for k in rows}=={'one','shared'} and len(rows)==9
    assert all(r['speedup']*r['ratio']==pytest.approx(1) for r in rows.values())
    assert ring['bandwidth']>0 and list(bench_table(block).columns)==['ms','ratio','25 %','75 %','times faster','predicted ms']
    for k,r in rows.items():
        if 'predicted' in r: assert r['predicted']==pytest.approx(rows[f'{k}, no exchange']['seconds']+exchange_seconds(block['bytes'], 2, **ring))

def test_a_ring_takes_what_its_line_takes():
    assert exchange_seconds(8_000_000, 2, 0, 1e6)==pytest.approx(8) # two messages of half the bytes
    assert exchange_seconds(0, 5, .1, 1e6)==pytest.approx(.8)
    fit = fit_ring([1e3,1e6], [exchange_seconds(b, 3, 1e-4, 1e9) for b in (1e3,1e6)], 3)
    assert fit==pytest.approx(dict(latency=1e-4, bandwidth=1e9))

def test_calibration_goes_on_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchmetrics.functional.classification', None)
    assert 'ece of torchmetrics' not in bench_calibration(setup(steps=1), n=500, c=5)['rows']
    monkeypatch.undo()
    assert 'ece of torchmetrics' in bench_calibration(setup(steps=1), n=500, c=5)['rows']

def test_sweep_over_points_and_models(monkeypatch):
    point = dict(depth=1, width=64, size=32, classes=3, batch=1, rank=1, kinds=('q','v'))
    monkeypatch.setattr(growth, 'sweep_points', lambda bs,rank: [('kinds', ('q','v'), point)])
    rows = bench_sweep(setup(steps=1, batch_size=1, models=('vit_pico',)), images=(32,))['rows']
    assert list(rows)==['kinds q+v','images 32','vit_pico'] and rows['images 32']['seconds']>0 and rows['kinds q+v']['x']==2 and rows['kinds q+v']['total_rank']==2 and rows['vit_pico']['axis']=='model'
    bench_table(dict(rows=rows))

# --- the command

def test_file_holds_environment_and_parts_of_several_calls(quick, tmp_path, capsys):
    out,threads = tmp_path/'b.json',torch.get_num_threads()
    bench(**kw, parts='scoring', out=str(out), threads=2)
    assert torch.get_num_threads()==threads
    assert main(['bench','--model','vit_pico','--batch-size','1','--steps','1','--warmup','0','--device','cpu','--parts','io','--out',str(out)])==0
    res = json.loads(out.read_text())
    assert list(res)==['scoring','io'] and res['scoring']['threads']==2 and res['io']['batch_size']==1
    assert {'command','hardware','device','threads','model','batch_size','steps','warmup','rank','dtype','versions','rows','took'}<=set(res['io'])
    assert res['scoring']['command'].startswith('fclora bench --model vit_pico --batch-size 2') and str(tmp_path) not in out.read_text()
    assert len(res['scoring']['rounds']['steps'])==2 and 'scoring' in capsys.readouterr().out

def test_out_of_memory_loses_no_other_part(quick, tmp_path, monkeypatch):
    def full(s): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has')
    monkeypatch.setitem(bench_parts, 'step', full)
    res = bench(**kw, parts='step,scoring', out=str(tmp_path/'b.json'))
    assert res['step']['error']=='out of memory: CUDA out of memory' and res['scoring']['rows']
    assert json.loads((tmp_path/'b.json').read_text())==json.loads(json.dumps(res))

def test_what_stops_a_part_keeps_those_before(quick, tmp_path, monkeypatch):
    def stop(s): raise KeyboardInterrupt
    monkeypatch.setitem(bench_parts, 'step', stop)
    with pytest.raises(KeyboardInterrupt): bench(**kw, parts='scoring,step', out=str(tmp_path/'b.json'))
    assert list(json.loads((tmp_path/'b.json').read_text()))==['scoring']

@pytest.mark.parametrize('args,piece', [(dict(parts='step,speed'), "unknown part 'speed'"), (dict(parts=','), 'names none'), (dict(model='vit_pica'), 'did you mean'),
    (dict(model='resnet18'), 'plain vision transformers'), (dict(batch_size=0), '--batch-size must be a whole number in 1..65536, got 0'), (dict(steps=0), '--steps'), (dict(warmup=-1), '--warmup'),
    (dict(rank=0), '--rank'), (dict(rank=999), 'rank of blocks.0.attn.qkv.q must be'), (dict(threads=0), '--threads'), (dict(models='vit_pico,vit_nano', parts='sweep'), 'no model')])
def test_bad_input_is_one_clear_error_before_anything_runs(args, piece, monkeypatch):
    def ran(*a): raise AssertionError('it ran')
    monkeypatch.setattr(B, 'run_part', ran)
    with pytest.raises(ValueError, match=piece.replace('.', r'\.')): bench(**dict(dict(kw, parts='scoring'), **args))

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu():
    with pytest.raises(ValueError, match='no GPU'): bench(**dict(kw, device='cuda'))

@pytest.mark.parametrize('text', ['{"something": 1}', '[1]', 'no json'])
def test_a_file_that_is_no_benchmark_is_not_overwritten(tmp_path, text):
    (f := tmp_path/'other.json').write_text(text)
    with pytest.raises(ValueError): bench(**kw, parts='io', out=str(f))
    assert f.read_text()==text
