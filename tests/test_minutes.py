"A time budget: what fits is said, the schedule ends in time, and time enough changes nothing. The clock is not that of the machine"
import re
from functools import partial
import pytest, torch
from fclora.backbones import create_backbone, image_config
from fclora.cli import main
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.planning import plan_model
from fclora.runs.folder import load_run
from fclora.train import learner as learner_module
from fclora.train.callbacks import KeepBest
from fclora.train.learner import fclora_learner
from fclora.train.minutes import InTime, plan_minutes, room
from fclora.train.recipe import recipe
import fclora.systems.adalora # noqa: F401 it registers its parts

pytestmark = pytest.mark.usefixtures('one_thread')
FEW = ['digits', '--limit', '120,30,30', '--batch-size', '20', '--score-batches', '1', '--budget', '36', '--no-probe', '--seed', '1']

class Clock:
    "Moves on by `tick` seconds with each look"
    def __init__(self, tick): self.now,self.tick = 0.,tick
    def __call__(self): self.now += self.tick; return self.now

@pytest.fixture(scope='module')
def images(): return load_images('digits', limit='120,30,30')

@pytest.fixture
def make(images):
    def make(method='head', cbs=None, bs=20, **kw):
        torch.manual_seed(0)
        model = create_backbone('vit_pico', 10)
        dls = get_dls(images, **image_config(model), bs=bs, device='cpu')
        plan = method if method=='head' else plan_model(model, dls, method, budget=36, score_batches=1)
        learn = fclora_learner(dls, model, plan, recipe(**kw), cbs=cbs)
        learn.logger = lambda *a: None
        return learn
    return make

@pytest.fixture
def ticking(monkeypatch):
    "Let a look at the clock of `fit_recipe` take so many seconds"
    def ticking(tick):
        clock = Clock(tick)
        monkeypatch.setattr(learner_module, 'plan_minutes', partial(plan_minutes, clock=clock))
        return clock
    return ticking

def fit(learn, **kw):
    said = []
    with learn.no_bar(): learn.fit_recipe(say=said.append, **kw)
    return said

def test_epochs_fit_and_the_rate_comes_down(make, ticking):
    ticking(3.) # three timed steps between two looks: one second a step, and one for a batch of the validation
    learn = make(epochs=50, minutes=3)
    said, = fit(learn, spent=60., after=4)
    # 171 of 180 s, less 60 and 15 (two looks apart make 5 intervals), less 2+4 batches: 90 s; 6 steps and 2 batches an epoch
    assert '3 minutes: 11.5 of 50 epochs fit, at 1000 ms a step; 75 s have gone, and 6 s are kept' in said
    assert learn.recipe['epochs']==12 and learn.recorder.lrs[-1]<learn.recorder.lrs[0]/20

def test_a_slow_machine_ends_the_schedule_all_the_same(make):
    learn = make(epochs=5, minutes=None)
    full = len(learn.dls.train)*5
    with learn.no_bar(): learn.fit_flat_cos(5, .01, pct_start=0, cbs=InTime(20., Clock(1.)))
    assert len(learn.recorder.lrs)<full and learn.recorder.lrs[-1]<.01/50
    assert all(a>=b for a,b in zip(learn.recorder.lrs, learn.recorder.lrs[1:]))
    assert [len(o) for o in learn.recorder.values]==[3]*3 # the last one, a part of an epoch, was validated

def test_one_cycle_goes_by_the_clock_too(make):
    learn = make(epochs=5, schedule='onecycle')
    with learn.no_bar(): learn.fit_one_cycle(5, .01, cbs=InTime(20., Clock(1.)))
    assert max(learn.recorder.lrs)>.009 and learn.recorder.lrs[-1]<.01/50

def test_less_than_an_epoch_is_trained_and_kept(make, ticking):
    ticking(3.)
    best = KeepBest()
    learn = make(epochs=9, minutes=.58, cbs=best, bs=5)
    said, = fit(learn)
    assert '0.6 of 9 epochs fit' in said and learn.recipe['epochs']==1 and best.epoch_kept==0 and [len(o) for o in learn.recorder.values]==[3]
    assert 0<len(learn.recorder.lrs)<len(learn.dls.train)

def test_ranks_come_to_their_end(make, ticking):
    ticking(3.)
    learn = make('adalora', epochs=50, minutes=1, cbs=KeepBest())
    said, = fit(learn)
    assert re.search(r': (\d)\.0 of 50 epochs fit', said) and learn.plan.spent<=learn.plan.budget
    learn = make('adalora', epochs=50, minutes=.4)
    with pytest.raises(ValueError, match='give at least --minutes'): fit(learn)

def test_ranks_come_to_their_end_even_where_steps_slow_down(make):
    best = KeepBest()
    learn = make('adalora', epochs=3, cbs=best)
    with learn.no_bar(): learn.fit_flat_cos(3, .005, pct_start=0, cbs=InTime(4., Clock(1.)))
    assert learn.plan.spent<=learn.plan.budget and best.losses

def test_too_few_minutes_are_refused_with_a_number_that_suffices():
    with pytest.raises(ValueError, match=r'0.5 minutes leave no time to train') as e: room(.5, 20, 1., .1, 100, 10, 20)
    enough = float(re.search(r'--minutes ([\d.]+)', str(e.value))[1])
    assert room(enough, 20, 1., .1, 100, 10, 20, whole=True)[1]>=1

def test_time_enough_changes_nothing(tmp_path, capsys):
    weights = []
    for args in ([], ['--minutes','600']):
        out = tmp_path/f'{len(weights)}'
        assert main(['finetune', *FEW, '--epochs', '2', *args, '--out', str(out)])==0
        weights.append((out/'adapter.safetensors').read_bytes())
    assert weights[0]==weights[1] and '600 minutes: all 2 epochs fit' in capsys.readouterr().out

def test_the_command_counts_what_has_gone_and_what_follows(tmp_path, capsys, monkeypatch):
    asked = []
    def planned(learn, spent, after, say): asked.append((spent, after)); return []
    monkeypatch.setattr(learner_module, 'plan_minutes', planned)
    assert main(['finetune', *FEW, '--epochs', '1', '--minutes', '600', '--quiet', '--out', str(tmp_path/'run')])==0
    assert len(asked)==1 and asked[0][0]>0 and asked[0][1]==4 # two batches each for temperature and test
    assert load_run(tmp_path/'run', model=False).config['recipe']['minutes']==600

@pytest.mark.parametrize('value', ['0','-3'])
def test_minutes_must_be_a_time(value, capsys):
    assert main(['finetune', 'no/such/folder', '--minutes', value])==1
    assert '--minutes must be a number in 0.01..' in capsys.readouterr().err
