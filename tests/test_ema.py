"The moving average of what trains, and early stopping: what is validated, kept, saved and tested"
import json
import pytest, torch
from fastai.callback.core import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from fclora.adapt import adapter_params
from fclora.backbones import create_backbone, image_config
from fclora.cli import main
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.planning import plan_model
from fclora.runs.folder import load_model, load_run
from fclora.train import ema as ema_module
from fclora.train.callbacks import KeepBest
from fclora.train.ema import EMA
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import recipe
import fclora.systems.adalora, fclora.systems.cut # noqa: F401 they register their parts

pytestmark = pytest.mark.usefixtures('one_thread')
FEW = ['digits', '--limit', '60,30,30', '--batch-size', '20', '--method', 'uniform', '--budget', '36', '--head', 'fresh', '--no-probe', '--quiet']

@pytest.fixture(scope='module')
def images(): return load_images('digits', limit='60,30,30')

@pytest.fixture
def make(images):
    def make(regime=None, method='uniform', cbs=None, **kw):
        torch.manual_seed(0)
        model = create_backbone('vit_pico', 10)
        dls = get_dls(images, **image_config(model), bs=20, device='cpu')
        plan = regime or plan_model(model, dls, method, budget=36, score_batches=1)
        learn = fclora_learner(dls, model, plan, recipe(**{'epochs':2, **kw}), cbs=cbs)
        learn.logger = lambda *a: None
        return learn
    return make

def fit(learn):
    with learn.no_bar(): return learn.fit_recipe(say=lambda *a: None)

class Snapshots(Callback):
    "The trained weights after every step"
    order,run_valid = EMA.order-1,False
    def __init__(self): self.seen = []
    def after_step(self): self.seen.append({n:p.detach().clone() for n,p in self.model.named_parameters() if p.requires_grad})

@pytest.mark.parametrize('regime', [None,'head','full'])
def test_the_result_is_the_average_of_what_trained(make, regime):
    shots = Snapshots()
    learn = make(regime, cbs=shots, ema=.9)
    frozen = {n:p.clone() for n,p in learn.model.named_parameters() if not p.requires_grad}
    fit(learn)
    average = {}
    for i,now in enumerate(shots.seen, 1):
        d = min(.9, (1+i)/(10+i))
        average = {n:d*average[n]+(1-d)*p if average else p.clone() for n,p in now.items()}
    assert len(shots.seen)==6
    for n,p in learn.model.named_parameters(): assert_close(p, average[n] if n in average else frozen[n], atol=1e-6, rtol=1e-5)
    if regime is None: assert average.keys()=={*adapter_params(learn.model), 'head.weight', 'head.bias'}

def test_the_update_is_that_of_torch(make, monkeypatch):
    monkeypatch.setattr(ema_module, 'ema_decay', lambda decay, step: decay) # torch has no slow start
    learn = make(ema=.8)
    theirs = AveragedModel(learn.model, multi_avg_fn=get_ema_multi_avg_fn(.8))
    class Theirs(Callback):
        run_valid = False
        def after_step(self): theirs.update_parameters(self.model)
    learn.add_cb(Theirs())
    fit(learn)
    for (n,p),q in zip(learn.model.named_parameters(), theirs.module.parameters()): assert_close(p, q, atol=1e-6, rtol=1e-5, msg=n)

def test_validation_and_the_best_epoch_use_the_average(make):
    best = KeepBest()
    learn = make(cbs=best, ema=.9, epochs=3)
    fit(learn)
    assert learn.recorder.values[best.epoch_kept][1]>0 and best.losses[best.epoch_kept]==min(best.losses)
    loss = torch.nn.functional.cross_entropy(*get_logits(learn.model, learn.dls.valid)).item()
    assert loss==pytest.approx(min(best.losses), abs=1e-5)

def test_the_run_folder_holds_the_average(tmp_path):
    temperatures = []
    for decay in ('0','.9'):
        out = tmp_path/decay
        assert main(['finetune', *FEW, '--epochs', '2', '--keep', 'last', '--ema', decay, '--out', str(out)])==0
        run,(model,config) = load_run(out),load_model(out)
        dls = get_dls(load_images('digits', limit='60,30,30'), **config['image'], device='cpu')
        nll = torch.nn.functional.cross_entropy(*get_logits(model, dls[2])).item()
        assert nll==pytest.approx(run.metrics['test']['nll_raw'], abs=1e-4) and config['recipe']['ema']==float(decay)
        temperatures.append(config['T'])
    assert temperatures[0]!=temperatures[1]

@pytest.mark.parametrize('method', ['adalora','cut'])
def test_the_average_starts_over_where_ranks_change(make, method):
    learn = make(method=method, ema=.9, epochs=3)
    steps = []
    class Count(Callback):
        order,run_valid = EMA.order+1,False
        def after_step(self): steps.append(self.ema.steps)
    learn.add_cb(Count())
    fit(learn)
    again = steps.index(1, 1)
    assert steps==[*range(1, again+1), *range(1, 10-again)] and learn.plan.spent<=learn.plan.budget
    assert torch.isfinite(get_logits(learn.model, learn.dls.valid)[0]).all()

def test_evaluation_between_epochs_leaves_the_average_alone(make):
    learn = make(ema=.9, epochs=1)
    learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
    assert learn.ema.average=={}
    fit(learn)
    before = {n:p.clone() for n,p in learn.model.named_parameters()}
    learn.validate()
    learn.get_preds()
    assert learn.ema.average=={} and all(torch.equal(p, before[n]) for n,p in learn.model.named_parameters())

@pytest.mark.parametrize('args,word', [
    (['--ema','1'], '--ema must be a number in 0.0..0.9999999, got 1.0'), (['--ema','-.1'], '--ema must be a number in'),
    (['--ema','.9','--method','stella'], 'the adapter stella keeps lora_A and lora_B orthonormal'),
    (['--ema','.9','--adapter','stiefel'], 'leave ema at 0')])
def test_what_cannot_be_averaged_is_refused_before_anything_is_loaded(args, word, tmp_path, capsys):
    assert main(['finetune', 'no/such/folder', *args, '--out', str(tmp_path/'run')])==1
    assert word in capsys.readouterr().err and not (tmp_path/'run').exists()

def test_a_learner_refuses_it_too(images):
    model = create_backbone('vit_pico', 10)
    plan = make_plan('vit_pico', find_sites(model), method='uniform', budget=36, adapter='stiefel')
    with pytest.raises(ValueError, match='orthonormal'):
        fclora_learner(get_dls(images, **image_config(model), device='cpu'), model, plan, recipe(ema=.9))

# --- patience

def test_patience_ends_the_training_and_says_so(tmp_path, capsys):
    out = tmp_path/'run'
    assert main(['finetune', *[o for o in FEW if o!='--quiet'], '--epochs', '9', '--patience', '2', '--lr', '0', '--head-lr', '0', '--out', str(out)])==0
    text,run = capsys.readouterr().out,load_run(out)
    assert 'stopped after epoch 3 of 9: the last 2 were no better' in text and text.count('valid loss')==3
    assert list(run.history.epoch)==[1,2,3] and run.metrics['epoch_kept']==1
    assert json.loads((out/'fclora.json').read_text())['recipe']['patience']==2

def test_patience_needs_the_best_epoch(capsys):
    assert main(['finetune', 'no/such/folder', '--patience', '2', '--keep', 'last'])==1
    assert "needs keep='best'" in capsys.readouterr().err
