"Runs in TensorBoard, W&B and MLflow, all without a network: the numbers of the history and of the test, and two pictures"
import json, sys, warnings
import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from fclora.cli import main
from fclora.report.trackers import Trackers, tracker_names, trackers
from fclora.runs.folder import load_run

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore::DeprecationWarning')]
FEW = ['digits', '--limit', '60,30,30', '--batch-size', '20', '--method', 'uniform', '--budget', '36', '--epochs', '2', '--no-probe', '--head', 'fresh', '--quiet']

@pytest.fixture(scope='module')
def logged(tmp_path_factory):
    "A run that is logged to all three tools"
    root = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('WANDB_MODE', 'offline')
        m.setenv('WANDB_SILENT', 'true')
        m.delenv('MLFLOW_TRACKING_URI', raising=False)
        for k in ('CONFIG_DIR','CACHE_DIR','DATA_DIR'): m.setenv(f'WANDB_{k}', str(root/'home'))
        assert main(['finetune', *FEW, '--log', 'tensorboard,wandb,mlflow', '--out', str(root/'run')])==0
    return load_run(root/'run', model=False),root/'run'

def client(root): return MlflowClient((root/'mlruns').as_uri())
def mlflow_runs(root): return client(root).search_runs([client(root).get_experiment_by_name('fclora').experiment_id])

def test_tensorboard_has_history_test_and_pictures(logged):
    run,out = logged
    seen = EventAccumulator(str(out/'tensorboard')).Reload()
    for k in ('train_loss','valid_loss','accuracy','lr'):
        assert [e.value for e in seen.Scalars(k)]==pytest.approx(list(run.history[k]), rel=1e-5) and [e.step for e in seen.Scalars(k)]==[1,2]
    assert seen.Scalars('test_nll')[0].value==pytest.approx(run.metrics['test']['nll'], rel=1e-5)
    assert seen.Tags()['images']==['reliability','ranks'] and 'settings/text_summary' in seen.Tags()['tensors']

def test_mlflow_has_the_same(logged):
    run,out = logged
    stored, = mlflow_runs(out.parent)
    assert (stored.info.run_name,stored.info.status)==('run','FINISHED')
    assert stored.data.params['method']=='uniform' and stored.data.params['epochs']=='2'
    assert stored.data.metrics['test_accuracy']==run.metrics['test']['accuracy']
    assert [m.value for m in client(out.parent).get_metric_history(stored.info.run_id, 'valid_loss')]==pytest.approx(list(run.history.valid_loss))
    assert [o.path for o in client(out.parent).list_artifacts(stored.info.run_id)]==['ranks.png','reliability.png']

def test_wandb_wrote_an_offline_run_with_pictures(logged):
    _,out = logged
    folder, = out.glob('wandb/offline-run-*')
    assert list(folder.glob('*.wandb'))[0].stat().st_size>1000
    assert {o.name.split('_')[0] for o in folder.rglob('*.png')}=={'ranks','reliability'}

def test_wandb_is_told_the_same_numbers(tmp_path, monkeypatch):
    told = []
    class Fake:
        __spec__ = object() # so that it counts as installed
        class Image:
            def __init__(self, fig): self.fig = fig
        @staticmethod
        def init(**kw): told.append(kw); return Fake()
        def log(self, values, step): told.append((step, sorted(values)))
        def finish(self): told.append('finished')
    monkeypatch.setitem(sys.modules, 'wandb', Fake)
    assert main(['finetune', *FEW, '--log', 'wandb', '--out', str(tmp_path/'run')])==0
    assert told[0]['config']['epochs']==2 and told[0]['name']=='run'
    assert [o[0] for o in told[1:-1]]==[1,2,2,2,2] and told[1][1]==['accuracy','lr','seconds','train_loss','valid_loss']
    assert 'test_ece' in told[3][1] and told[4:]==[(2,['reliability']), (2,['ranks']), 'finished']

def test_the_run_itself_does_not_change(logged, tmp_path):
    _,out = logged
    assert main(['finetune', *FEW, '--out', str(tmp_path/'plain')])==0
    assert (tmp_path/'plain'/'adapter.safetensors').read_bytes()==(out/'adapter.safetensors').read_bytes()
    configs = [json.loads((o/'fclora.json').read_text()) for o in (tmp_path/'plain', out)]
    for o in configs: del o['asked']['log']
    assert configs[0]==configs[1]

def test_a_run_that_is_replaced_starts_its_curves_anew(tmp_path):
    for _ in range(2): assert main(['finetune', *FEW, '--method', 'head', '--log', 'tensorboard', '--force', '--out', str(tmp_path/'run')])==0
    assert len(EventAccumulator(str(tmp_path/'run'/'tensorboard')).Reload().Scalars('accuracy'))==2

def test_a_tool_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    class Broken:
        package = 'torch'
        def __init__(self, out, settings): pass
        def numbers(self, values, step): raise ConnectionError('no network')
        def picture(self, name, fig, step): raise ConnectionError('no network')
        def close(self): raise ConnectionError('no network')
    monkeypatch.setitem(trackers, 'broken', Broken)
    assert main(['finetune', *FEW, '--log', 'broken', '--out', str(tmp_path/'run')])==0
    assert 'torch could not log: ConnectionError: no network' in capsys.readouterr().err
    assert load_run(tmp_path/'run', model=False).config['status']=='done'

def test_an_interrupted_run_is_closed(tmp_path, monkeypatch):
    def interrupted(self, history): raise KeyboardInterrupt
    monkeypatch.setattr(Trackers, 'epoch', interrupted)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    assert main(['finetune', *FEW, '--log', 'mlflow', '--out', str(tmp_path/'run')])==130
    assert [r.info.status for r in mlflow_runs(tmp_path)]==['FINISHED']

@pytest.mark.parametrize('log', ['excel','tensorboard,excel','wandb;mlflow'])
def test_an_unknown_name_is_refused_before_anything_is_loaded(log, capsys):
    assert main(['finetune', 'no/such/folder', '--log', log])==1
    assert 'log must name trackers, of tensorboard, wandb, mlflow' in capsys.readouterr().err

@pytest.mark.parametrize('name', ['tensorboard','wandb','mlflow'])
def test_a_tool_that_is_not_installed_says_how_to_get_it(name, monkeypatch, capsys):
    monkeypatch.setattr('fclora.files.find_spec', lambda o: None)
    assert main(['finetune', 'no/such/folder', '--log', name])==1 and f"pip install 'fclora[{name}]'" in capsys.readouterr().err

def test_none_is_asked_for_by_default():
    assert tracker_names(None)==[] and Trackers().names==[]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with Trackers() as track:
            track.start('nowhere', {})
            track.finish(None)
