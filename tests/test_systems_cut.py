"Cutting trained updates by their singular values: in a model, in training, and in a finished run"
from copy import deepcopy
import json
import pytest, timm, torch
from torch import nn
from torch.testing import assert_close
import system_models as S
from fclora.adapt import *
from fclora.backbones import create_backbone, image_config
from fclora.calibration.intervals import calibration_table
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.lora import LoRA, adapters
from fclora.make_plan import make_plan
from fclora.runs.cut_run import *
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_model, load_run
from fclora.runs.use import merge_run
from fclora.systems import adalora, dora, experts, stella, step_sizes # noqa: F401 their adapters are named below
from fclora.systems.cut import *
from fclora.systems.cut_schedule import *
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import recipe
from fclora.train.schedules import rank_tensors

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]

def vit(name='test_vit', **kw):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(img_size=32, num_classes=4), **kw}).eval()

def filled(model, std=.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapter_params(model).values(): p.normal_(0, std)
    return model

def some_ranks(model, **kw): return {s.name:1+i%4 for i,s in enumerate(find_sites(model, **kw))}
def deltas(model): return {s.name:m.site_delta(k).detach() for m in adapted_layers(model).values() for k,s in m.sites.items()}

models = dict(
    vit=lambda: vit(patch_size=8),
    deit=lambda: vit('deit_tiny_distilled_patch16_224', patch_size=8, depth=2),
    swin=lambda: vit('swin_tiny_patch4_window7_224', window_size=2, embed_dim=24, depths=(1,1), num_heads=(2,2)))

@pytest.mark.parametrize('name', models)
def test_without_a_threshold_the_logits_are_unchanged(name):
    net,x = filled(adapt(models[name](), some_ranks(models[name]()))),torch.randn(2, 3, 32, 32)
    total = sum(current_ranks(net).values())
    with torch.no_grad():
        for budget,unit in ((total,'ranks'), (total+9,'ranks'), (count_params(net)['adapter'],'params')):
            assert torch.equal(cut_model(deepcopy(net), budget, unit)(x), net(x))

@pytest.mark.parametrize('scaling', ['sqrt','rank'])
@pytest.mark.parametrize('name', models)
def test_each_site_has_its_best_approximation(name, scaling):
    "Eckart and Young, against a dense decomposition"
    net = filled(adapt(models[name](), some_ranks(models[name]()), scaling=scaling))
    small = cut_model(deepcopy(net), sum(current_ranks(net).values())//2)
    ranks,now = current_ranks(small),deltas(small)
    for n,d in deltas(net).items():
        U,S,Vh = torch.linalg.svd(d, full_matrices=False)
        k = ranks.get(n, 0)
        best = U[:,:k]*S[:k]@Vh[:k]
        assert_close(now.get(n, torch.zeros_like(d)), best, atol=1e-4, rtol=1e-3)

@pytest.mark.parametrize('scaling', ['sqrt','rank'])
@pytest.mark.parametrize('name', models)
def test_a_frozen_a_stays_orthonormal_and_the_approximation_the_best(name, scaling):
    net = adapt(models[name](), {s.name:4 for s in find_sites(models[name]())}, 'frozen_a', scaling=scaling)
    torch.manual_seed(1)
    with torch.no_grad():
        for n,p in adapter_params(net).items():
            if '.lora_B.' in n: p.normal_(0, .2)
    freeze(net)
    small,want = cut_model(deepcopy(net), sum(current_ranks(net).values())//2),deltas(net)
    assert any(1<r<4 for r in current_ranks(small).values())
    for n,d in deltas(small).items():
        U,S,Vh = torch.linalg.svd(want[n], full_matrices=False)
        k = current_ranks(small)[n]
        assert_close(d, U[:,:k]*S[:k]@Vh[:k], atol=1e-4, rtol=1e-3)
    for path,m in adapted_layers(small).items():
        for kind in m.sites:
            A,old = m.lora_A[kind].detach(),net.get_submodule(path).lora_A[kind].detach()
            assert_close(A@A.T, torch.eye(len(A)), atol=1e-5, rtol=0)
            assert_close(A@old.T@old, A, atol=1e-5, rtol=0) # no direction is new
            assert not m.lora_A[kind].requires_grad and m.lora_B[kind].requires_grad

def test_an_untrained_update_is_cut_to_zero_without_dividing_by_it():
    for adapter in ('lora','frozen_a'):
        net = cut_model(adapt(models['vit'](), some_ranks(models['vit']()), adapter), 9)
        assert sum(current_ranks(net).values())==9 and all(p.isfinite().all() for p in adapter_params(net).values())
        assert all(not d.any() for d in deltas(net).values())

def test_one_threshold_for_all_and_no_other_choice_keeps_more():
    net = filled(adapt(models['vit'](), some_ranks(models['vit']())))
    values = update_values(net)
    ranks = cut_choice(net, 20)
    stay = torch.cat([v[:ranks[n]] for n,v in values.items()])
    gone = torch.cat([v[ranks[n]:] for n,v in values.items()])
    assert len(stay)==20 and stay.min()>=gone.max()
    assert_close(stay.square().sum(), torch.cat(list(values.values())).square().topk(20)[0].sum())
    small = cut_model(deepcopy(net), 20)
    lost = sum((d-deltas(small).get(n, 0*d)).square().sum() for n,d in deltas(net).items())
    assert_close(lost.double(), gone.square().sum(), rtol=1e-3, atol=1e-4)

def test_ranks_of_zero_are_allowed():
    net = filled(adapt(models['vit'](), some_ranks(models['vit']())))
    layer = net.blocks[0].attn.qkv
    with torch.no_grad(): layer.lora_B['q'].mul_(1e-6)
    small = cut_model(net, 12)
    assert 'blocks.0.attn.qkv.q' not in current_ranks(small) and sum(current_ranks(small).values())==12
    assert current_ranks(cut_model(small, 0))=={} and type(small.blocks[0].attn.qkv) is nn.Linear

def test_a_budget_in_parameters():
    net = filled(adapt(models['vit'](), {s.name:3 for s in find_sites(models['vit'](), kinds=('q','fc1','fc2'))}))
    values = {n:v for n,v in update_values(net).items()}
    budget = count_params(net)['adapter']//2
    small = cut_model(deepcopy(net), budget, 'params')
    spent,ranks = count_params(small)['adapter'],current_ranks(small)
    prices,_ = rank_costs(net, 'params')
    assert len(set(prices.values()))>1 and budget-max(prices.values())<spent<=budget
    worth = {n:v.square()/prices[n] for n,v in values.items()}
    stay,gone = (torch.cat([w[slice(*((0,ranks.get(n, 0)) if o else (ranks.get(n, 0),None)))] for n,w in worth.items()]) for o in (1,0))
    assert stay.min()>=gone.max() # one threshold per parameter

def test_a_convolution_a_language_model_and_bf16():
    torch.manual_seed(0)
    conv,x = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Flatten(), nn.Linear(6*49, 4)),torch.randn(2, 3, 16, 16)
    net = filled(adapt(conv, {find_sites(conv, include='0', kinds=('conv',))[0].name:3}))
    d = deltas(net)['0'] if '0' in deltas(net) else next(iter(deltas(net).values()))
    S = torch.linalg.svdvals(d)
    small = cut_model(net, 2)
    assert_close((next(iter(deltas(small).values()))-d).norm(), S[2:].norm(), rtol=1e-3, atol=1e-4)
    transformers = pytest.importorskip('transformers')
    cfg = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=40)
    llama = filled(adapt(transformers.LlamaForCausalLM(cfg).to(torch.bfloat16).eval(), some_ranks(transformers.LlamaForCausalLM(cfg))))
    small = cut_model(deepcopy(llama), 8)
    assert sum(current_ranks(small).values())==8 and small(torch.randint(0, 40, (2,5))).logits.isfinite().all()

def test_what_cannot_be_cut_says_why(monkeypatch):
    class Scaled(LoRA):
        "Its factors are of another form"
        def site_factors(self, kind):
            A,B = super().site_factors(kind)
            return torch.tanh(A),B
    monkeypatch.setitem(adapters, 'scaled', Scaled)
    net = adapt(models['vit'](), some_ranks(models['vit']()), 'scaled')
    with pytest.raises(ValueError, match='only LoRA can be cut'): cut_model(net, 3)
    with pytest.raises(ValueError, match='has no adapters'): cut_model(models['vit'](), 3)
    with pytest.raises(ValueError, match='unmerge_adapters'): cut_model(merge_adapters(adapt(models['vit'](), some_ranks(models['vit']()))), 3)

@pytest.mark.parametrize('adapter', ['dora','svd','stiefel','stella','moe'])
def test_other_adapters_are_refused_as_they_are(adapter):
    net = filled(adapt(models['vit'](), {s.name:2 for s in find_sites(models['vit']())}, adapter))
    before = {n:p.clone() for n,p in net.state_dict().items()}
    with pytest.raises(ValueError, match=f'has the adapter {adapters[adapter].__name__}, whose update is not .*: only LoRA can be cut'): cut_model(net, 3)
    assert_close(net.state_dict(), before, rtol=0, atol=0)

# --- the schedule

@pytest.fixture(scope='module')
def data():
    torch.manual_seed(0)
    return create_backbone('vit_pico', 10),load_images('digits', limit='160,64,64')

@pytest.mark.parametrize('kw', [dict(budget=36), dict(budget=30, allocator='random', lo=0), dict(budget=36*256, unit='params')])
def test_the_schedule_cuts_once_and_trains_on(data, kw):
    model = deepcopy(data[0])
    dls = get_dls(data[1], **image_config(model), bs=16, device='cpu')
    plan = make_plan('vit_pico', find_sites(model), method='cut', **kw)
    learn = fclora_learner(dls, model, plan, recipe(epochs=2))
    first,seen = learn.plan.spent,[]
    assert first==2*kw['budget']
    class Look(Cut):
        def after_step(self): seen.append(sum(current_ranks(self.model).values()))
    learn.add_cb(Look())
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert learn.plan.spent==kw['budget'] and len(set(seen))==2 and seen.count(seen[-1])==20-14+1
    held = [p for ps in learn.opt.param_lists for p in ps]
    assert {id(p) for p in held}=={id(p) for p in learn.model.parameters() if p.requires_grad}
    assert all('exp_avg' in learn.opt.opt.state[p] for p,_ in rank_tensors(learn.model).values()) # the moments began anew
    again = learn.plan.adapt(deepcopy(data[0]))
    again.load_state_dict(adapter_state(learn.model), strict=False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert_close(again.eval()(x), learn.model.eval()(x), atol=1e-5, rtol=1e-5)

def trained(data, adapter='lora', measure=None):
    model = deepcopy(data[0])
    dls = get_dls(data[1], **image_config(model), bs=16, device='cpu')
    plan = make_plan('vit_pico', find_sites(model), method='cut', budget=36, adapter=adapter)
    learn = fclora_learner(dls, model, plan, recipe(epochs=2, cutmix=0))
    if measure: measure_cut(learn, lambda: measure(learn))
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return learn

def test_the_schedule_cuts_a_frozen_a_and_refuses_dora_before_it_trains(data):
    learn = trained(data, 'frozen_a')
    assert learn.plan.total_rank==36
    for layer in adapted_layers(learn.model).values():
        for A in layer.lora_A.values(): assert_close(A.detach()@A.detach().T, torch.eye(len(A)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='DoRA, whose update is not .*: only LoRA can be cut'): trained(data, 'dora')

def test_what_is_measured_around_the_cut_is_the_model_then_and_changes_nothing(data):
    seen,drawn = [],[]
    def look(learn):
        seen.append((sum(current_ranks(learn.model).values()), learn.model.training, learn.train_iter+1))
        drawn.append(torch.rand(3))
        return dict(accuracy=get_logits(learn.model, learn.dls.valid)[0].mean().item())
    looked,plain = trained(data, measure=look),trained(data)
    assert seen==[(72,False,14),(36,False,14)] and looked.model.training==plain.model.training
    stages = cut_numbers(looked)['cut']
    assert [*stages]==['before','after'] and stages['before']!=stages['after'] and cut_numbers(plain)=={}
    assert torch.equal(*drawn) # each look begins with the random state of the training
    assert_close(adapter_state(looked.model), adapter_state(plain.model), rtol=0, atol=0)

def test_a_checkpoint_keeps_what_was_measured():
    cut,again = Cut(),Cut()
    cut.stages = dict(before=dict(accuracy=.5), after=dict(accuracy=.4))
    again.load_state_dict(cut.state_dict())
    assert again.stages==cut.stages
    again.load_state_dict(dict(unfinished=True)) # of an older version
    assert again.stages=={} and again.unfinished

# --- a finished run

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('r')/'run'
    return out,finetune('digits', 'cut', budget=36, epochs=2, batch_size=32, limit='160,96,200', out=str(out), probe=False, quiet=True)

def test_finetune_by_the_preset(run):
    out,made = run
    assert made.plan.total_rank==36==sum(load_model(out)[1]['ranks'].values())

def test_the_preset_measures_before_and_after_its_cut_and_at_the_end(run, tmp_path, capsys):
    kept = json.loads((run[0]/'metrics.json').read_text())
    rows = [*kept['cut'].values(), kept['valid']]
    assert [*kept['cut']]==['before','after'] and all(row['n']==96 for row in rows)
    assert len({row['nll_raw'] for row in rows})==3 # three different models
    finetune('digits', 'cut', budget=36, epochs=1, batch_size=32, limit='64,48,32', out=str(tmp_path/'run'), probe=False)
    said,kept = capsys.readouterr().out,json.loads((tmp_path/'run'/'metrics.json').read_text())
    line = next(o for o in said.splitlines() if 'before the cut' in o)
    for row in (*kept['cut'].values(), kept['valid']): assert f"{row['accuracy']:.4f}, {row['ece_raw']:.4f} / {row['ece']:.4f}" in line

@pytest.mark.parametrize('method', ['cut','adalora'])
def test_from_the_command_to_predictions_and_merged_logits(method, tmp_path):
    run = S.runs_end_to_end(tmp_path, method, budget=36, epochs=2)
    assert run.plan.total_rank==36

def test_a_run_is_cut_and_measured_three_times(run, tmp_path, capsys):
    made = cut_run(str(run[0]), 12, recover=3, out=str(tmp_path/'cut'), quiet=True)
    stages = json.loads((tmp_path/'cut'/'metrics.json').read_text())['cut']
    assert [stages[k]['ranks'] for k in ('before','after','recovered')]==[36,12,12]
    assert stages['before']['test']['accuracy']==run[1].metrics['test']['accuracy']
    assert stages['before']['test']['ece']==pytest.approx(run[1].metrics['test']['ece'], abs=1e-4)
    printed = capsys.readouterr().out
    for k in ('before','after','recovered'):
        assert f"{stages[k]['test']['accuracy']:.4f}" in printed and f"{stages[k]['test']['ece']:.4f}" in printed
    model,cfg = load_model(tmp_path/'cut')
    assert sum(cfg['ranks'].values())==12 and cfg['T']==stages['recovered']['test']['T']
    back = load_run(tmp_path/'cut')
    assert back.plan.total_rank==back.plan.budget==12 and back.metrics['test']==made.metrics['test']
    merge_run(tmp_path/'cut', tmp_path/'plain')
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert_close(timm.create_model(f'local-dir:{tmp_path}/plain', pretrained=True).eval()(x), model(x), atol=1e-4, rtol=1e-4)

def test_the_plain_command_recovers_for_a_few_steps(run, tmp_path, capsys):
    from fclora.cli import main
    assert main(['cut', str(run[0]), '--budget', '12', '--out', str(tmp_path/'cut'), '--quiet'])==0
    rows = [o.split() for o in capsys.readouterr().out.splitlines()]
    assert [r[0] for r in rows if r and r[0] in ('before','after','recovered')]==['before','after','recovered']
    stages = json.loads((tmp_path/'cut'/'metrics.json').read_text())['cut']
    assert stages['recover']==20 and stages['recovered']['test']['nll_raw']!=stages['after']['test']['nll_raw']

def test_a_run_may_lose_all_of_its_ranks_and_its_head_recovers(run, tmp_path):
    made = cut_run(str(run[0]), 0, recover=3, out=str(tmp_path/'none'), quiet=True)
    assert made.metrics['cut']['recovered']['ranks']==0 and not any(load_model(tmp_path/'none')[1]['ranks'].values())

def test_without_recovery_there_are_two_rows(run, tmp_path):
    assert [*cut_run(str(run[0]), 12, recover=0, out=str(tmp_path/'two'), quiet=True).metrics['cut']]==['run','recover','before','after']

def test_cutting_nothing_changes_nothing(run, tmp_path):
    made = cut_run(str(run[0]), 36, out=str(tmp_path/'same'), quiet=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(made.model.eval()(x), load_model(run[0])[0](x))
    assert 'recovered' not in made.metrics['cut'] and made.metrics['cut']['recover']==0

def test_errors(run, tmp_path):
    head = finetune('digits', 'head', epochs=1, limit='64,32,32', out=str(tmp_path/'head'), probe=False, quiet=True)
    with pytest.raises(ValueError, match='head, without a Plan'): cut_run(str(tmp_path/'head'), 3, out=str(tmp_path/'x'))
    with pytest.raises(ValueError, match='unit of the budget'): cut_run(str(run[0]), 3, unit='bytes')
    with pytest.raises(ValueError, match='recover must be a whole number'): cut_run(str(run[0]), 3, recover=-1)
    with pytest.raises(FileNotFoundError): cut_run(str(tmp_path/'nowhere'), 3)
    assert head and not (tmp_path/'x').exists()

def test_the_command_takes_its_budget_by_name(capsys, tmp_path):
    from fclora.cli import main, parser
    assert vars(parser('cut').parse_args(['RUN', '--budget', '9']))==dict(run='RUN', budget=9)
    assert main(['cut', str(tmp_path/'none')])==1 and 'budget must be a whole number' in capsys.readouterr().err
