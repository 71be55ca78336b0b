"From a model and images to a Plan: seeds, early stopping, parts that replace others, searches that go on"
import json
import pytest, torch
from fclora.allocators.waterfill import allocators
from fclora import planning
from fclora.backbones import create_backbone,image_config
from fclora.cli import command_table, help_text, main
from fclora.data.loaders import get_dls,score_dl
from fclora.data.sources import load_images
from fclora.find import *
from fclora.make_plan import *
from fclora.options import registries
from fclora.planning import *
from fclora.presets import *
from fclora.runs.claim import was_stopped
from fclora.runs.folder import load_run
from fclora.scorers import measure as measuring
from fclora.scorers.composite import paper_weights
from fclora.systems.stiefel import retractions
from fclora.train.schedules import schedules
from conftest import make_images

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return create_backbone('vit_pico', 3)

@pytest.fixture(scope='module')
def dls(tmp_path_factory, model):
    images = load_images(make_images(tmp_path_factory.mktemp('d')/'d', ('a','b','c'), n=24), 32, progress=False)
    return get_dls(images, **image_config(model), bs=8, device='cpu')

def test_scores_are_the_same_for_the_same_seed(model, dls):
    a,b,c = (plan_model(model, dls, budget=60, score_batches=2, seed=s) for s in (1,1,2))
    assert a.ranks==b.ranks and a.metrics==b.metrics!=c.metrics and (a.seed,c.seed)==(1,2)
    assert make_plan('m', a.sites, a.metrics, budget=60, seed=1).ranks==a.ranks

def test_the_model_is_left_as_it_was(model, dls):
    before,rng = {n:p.clone() for n,p in model.state_dict().items()},torch.get_rng_state()
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    plan_model(model.train(), dls, budget=60, score_batches=2, weights='gora=1,explained_var=1', init='eva')
    assert model.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n,p in model.state_dict().items())
    assert flags==[(p.requires_grad, p.grad) for p in model.parameters()]

class Counted:
    "An allocation that stands still after a number of calls"
    def __init__(self, moves, sites): self.moves,self.sites,self.calls = moves,sites,0
    def __call__(self, metrics):
        shift = self.moves[min(self.calls, len(self.moves)-1)]
        self.calls += 1
        values = {s.name:1.+(i+shift)%5 for i,s in enumerate(self.sites)}
        return make_plan('m', self.sites, dict.fromkeys(paper_weights, values), budget=72)

def test_settled_when_two_allocations_in_a_row_agree(model):
    check = Settled(Counted([0,1,2,2], find_sites(model)), .02)
    assert [check({}, 8*2**i) for i in range(4)]==[False,False,False,True] and check.batches==64

def test_scoring_ends_early_only_when_asked_to(model, dls):
    def used(**kw): return plan_model(model, dls, budget=72, score_bs=2, **kw).settings['score_batches']
    n = len(score_dl(dls, bs=2))
    assert n>16 and used(settle=0)==n
    assert used(settle=.9)==16                     # the first two allocations are never further apart
    assert used(settle=.9, score_batches=12)==12   # too few to compare

@pytest.mark.parametrize('kw,piece', [
    (dict(settle=-.1), '--settle must be a number'),
    (dict(settle=1), '--settle must be a number'),
    (dict(settle=float('nan')), '--settle must be a number'),
    (dict(weights='hessian=1'), "no metric 'hessian'"), (dict(init='svd'), "unknown init 'svd'; there are kaiming, orthogonal, eva"),
    (dict(allocator='best'), "unknown allocator 'best'; there are waterfill"), (dict(adapter='dora?'), "unknown adapter 'dora\\?'"),
    (dict(normaliser='z'), "unknown normaliser 'z'; there are minmax, rank, log"),
    (dict(rank_schedule='cosine'), "unknown rank schedule 'cosine'; there are "),
    (dict(rank_schedule='stiefel_qr'), 'stiefel_qr is for the adapters stiefel, stella, and would do nothing to lora'),
    (dict(scaling='half'), "unknown scaling 'half'; there are sqrt, rank"),
    (dict(lora_alpha=-1.), '--lora-alpha must be a number in 0.0..1000000.0, got -1'), (dict(dropout=1.), 'dropout must be'),
    (dict(method='best'), "unknown method 'best'"), (dict(method='full'), "'full' is full fine-tuning"),
    (dict(from_block=6), 'end at 5, so none is left from block 6 on')])
def test_what_cannot_be_is_refused_before_scoring(model, kw, piece):
    with pytest.raises(ValueError, match=piece): plan_model(model, None, **kw) # without data

def test_from_block_leaves_lower_blocks_alone(model, dls):
    plan = plan_model(model, dls, budget=72, score_batches=2, from_block=3)
    assert {s.block for s in plan.sites}=={3,4,5} and plan.total_rank==72 and plan.settings['forecast']['lowest_block']==3

@pytest.mark.parametrize('method', ('fclora','uniform','random','inverse','naive'))
@pytest.mark.parametrize('allocator', ('waterfill','uniform','random','inverse','naive'))
def test_any_allocator_goes_with_any_preset(model, dls, method, allocator):
    plan = plan_model(model, dls, method, budget=60, allocator=allocator, score_batches=1, init='orthogonal', name='m')
    assert (plan.method,plan.allocator,plan.init)==(method, allocator, 'orthogonal')
    assert bool(plan.metrics)==(method in ('fclora','inverse','naive') and allocator in ('waterfill','inverse','naive'))
    assert allocator=='naive' or plan.total_rank==60

def test_options_of_the_adapter_are_in_the_plan(model, dls):
    plan = plan_model(model, dls, 'uniform', budget=60, lora_alpha=16., dropout=.1, rslora=False)
    assert (plan.lora_alpha,plan.dropout,plan.scaling)==(16., .1, 'rank')
    assert plan_model(model, dls, 'uniform', budget=60, scaling='rank', rslora=True).scaling=='sqrt'

def test_a_preset_of_ones_own_and_a_search(model, dls, monkeypatch):
    asked = []
    def search(scores, budget, lo, hi, costs=None, evaluate=None):
        ranks = allocators['uniform'](scores, budget, lo, hi, costs)
        asked.append(evaluate(ranks))
        return ranks
    monkeypatch.setitem(allocators, 'search', search)
    monkeypatch.setitem(presets, 'mine', Preset('a search by explained variance', dict(explained_var=1.), allocator='search'))
    plan = plan_model(model, dls, 'mine', budget=36, score_batches=20, score_bs=2, settle=.9)
    assert plan.method=='mine' and list(plan.metrics)==['explained_var'] and plan.weights==dict(explained_var=1.)
    assert len(asked)==1 and 0<asked[0]<5 and plan.settings['score_batches']==20   # a search is asked once, not after every 2^n batches

# --- the schedule of the ranks

@pytest.mark.parametrize('name', ['qr','polar','cayley'])
def test_the_retraction_of_a_run_is_the_one_asked_for(name, tmp_path, monkeypatch):
    used = []
    def noted(key, f):
        def retract(*args): used.append(key); return f(*args)
        return retract
    for k,f in list(retractions.items()): monkeypatch.setitem(retractions, k, noted(k, f))
    args = ['finetune','digits','--method','fora','--rank-schedule',f'stiefel_{name}','--limit','64,32,32','--epochs','1','--batch-size','16','--budget','36']
    assert main([*args, '--score-batches','1','--no-probe','--quiet','--out',str(tmp_path/'run')])==0
    run = load_run(tmp_path/'run')
    assert set(used)=={name} and run.plan.schedule==f'stiefel_{name}' and (run.plan.method,run.plan.adapter)==('fora','stiefel')
    assert json.loads((tmp_path/'run/plan.json').read_text())['schedule']==f'stiefel_{name}'

def test_a_schedule_that_prunes_brings_its_excess(model, dls):
    plans = {k:plan_model(model, dls, m, budget=40, adapter=a, rank_schedule=k) for k,m,a in (('cut','uniform',None), ('adalora','uniform','svd'))}
    assert {k:(p.total_rank,p.budget,p.schedule) for k,p in plans.items()}==dict(cut=(80,40,'cut'), adalora=(60,40,'adalora'))
    assert plan_model(model, dls, 'cut', budget=40, adapter='stiefel', rank_schedule='stiefel_qr').total_rank==40

@pytest.mark.parametrize('name,piece', [('cosine','unknown rank schedule'), ('stiefel_qr','for the adapters stiefel, stella')])
def test_a_schedule_that_cannot_be_is_refused_before_an_image_is_read(name, piece, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('fclora.runs.job.Job.load', None) # would fail
    assert main(['finetune','digits','--rank-schedule',name,'--out',str(tmp_path/'run')])==1
    assert piece in capsys.readouterr().err and not (tmp_path/'run').exists()

def test_a_plan_has_decided_its_schedule(tmp_path, capsys, model, dls):
    plan_model(model, dls, 'uniform', budget=40).save(tmp_path/'p.json')
    assert main(['finetune','digits','--plan',str(tmp_path/'p.json'),'--rank-schedule','cut','--out',str(tmp_path/'run')])==1
    assert '--rank-schedule would say' in capsys.readouterr().err

def test_help_names_every_part_that_is_registered():
    of = {o['name']:o for o in command_table()['finetune']['options']}
    options = dict(scorers='weights', normalisers='normaliser', allocators='allocator', adapters='adapter', initialisers='init', schedules='rank_schedule')
    assert set(options)==set(registries)
    for name,option in options.items():
        said = help_text(of[option]).replace(',', ' ').split()
        assert len(registries[name])>3 and set(registries[name])<=set(said), name

# --- searches

SEARCH = ['finetune','digits','--method','floe','--limit','64,32,32','--epochs','1','--batch-size','16','--budget','36','--score-batches','4','--no-probe','--quiet']

@pytest.fixture
def trials(monkeypatch):
    "What was tried so far; the fourth trial is interrupted, once"
    tried,stop = [],[True]
    def loss(model, plan, *args, **kwargs):
        if len(tried)==3 and stop: stop.clear(); raise KeyboardInterrupt
        tried.append(dict(plan.ranks))
        return sum(i*r for i,r in enumerate(plan.ranks.values()))/100
    monkeypatch.setattr(planning, 'trial_loss', loss)
    return tried

def test_a_search_goes_on_where_it_was_stopped(trials, tmp_path, monkeypatch, capsys):
    pytest.importorskip('optuna')
    out,looked,look = tmp_path/'run',[],measuring.look
    def counted(*args): looked.append(1); return look(*args)
    monkeypatch.setattr(measuring, 'look', counted)
    assert main([*SEARCH, '--out', str(out)])==130 and 'go' in capsys.readouterr().err
    assert was_stopped(out) and len(json.loads((out/'checkpoints/scoring/trials.json').read_text())['trials'])==3 and len(looked)==4
    assert main(['resume', str(out), '--quiet'])==0
    run = load_run(out)
    assert len(looked)==4 # nothing is measured again
    assert len(trials)==len({str(o) for o in trials})==6 # six numbers of blocks, each of them once
    assert main([*SEARCH, '--out', str(tmp_path/'straight')])==0
    assert trials[6:]==trials[:6] and load_run(tmp_path/'straight').plan.ranks==run.plan.ranks
    assert not (out/'checkpoints').exists()

def test_a_search_of_a_run_that_is_replaced_is_not_gone_on_with(trials, tmp_path, monkeypatch):
    pytest.importorskip('optuna')
    looked,look = [],measuring.look
    def counted(*args): looked.append(1); return look(*args)
    monkeypatch.setattr(measuring, 'look', counted)
    assert main([*SEARCH, '--out', str(tmp_path/'run')])==130
    again = [*SEARCH, '--force', '--out', str(tmp_path/'run')]
    again[again.index('--budget')+1] = '40'
    assert main(again)==0 and load_run(tmp_path/'run').plan.total_rank==40 and {sum(o.values()) for o in trials[3:]}=={40}
    assert len(looked)==8 # four batches each time

def test_sums_of_a_run_that_is_replaced_do_not_count(tmp_path, monkeypatch, dls, model):
    removed = []
    def begin():
        if not removed: [o.unlink() for o in tmp_path.glob('*')]
        removed.append(1)
    class Stop(Exception): pass
    class Stopping(ScoringMemory):
        def keep(self, scorers, n):
            super().keep(scorers, n)
            if n==2: raise Stop
    with pytest.raises(Stop): plan_model(model, dls, budget=40, score_batches=3, memory=Stopping(tmp_path, 0))
    assert list(tmp_path.iterdir())
    fresh = plan_model(model, dls, budget=40, score_batches=3, seed=1)
    assert plan_model(model, dls, budget=40, score_batches=3, seed=1, memory=ScoringMemory(tmp_path, begin=begin)).metrics==fresh.metrics and removed
