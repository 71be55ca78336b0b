"A run that was stopped goes on to the same result, and its folder can be loaded at any moment"
import errno, multiprocessing, os, random, shutil, signal, time
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from fclora.adapt import adapter_params
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.planning import ScoringMemory, plan_model
from fclora.runs.claim import claimed, is_done, set_aside, status_of, tidy, was_stopped
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_run, save_run
from fclora.runs.resume import resume
from fclora.scorers import measure as measuring
from fclora.train.callbacks import KeepBest, KeepEpochs, LateCutMix, trained_state
from fclora.train.checkpoint import Checkpoints, last_checkpoint, save_checkpoint
from fclora.train.learner import FCLoRALearner, fclora_learner
from fclora.train.recipe import recipe

KILLS = int(os.environ.get('FCLORA_KILLS', 4)) # 100 in the study of the page about trust
ASKED = dict(data='digits', epochs=2, limit='128,32,32', budget=36, score_batches=1, batch_size=16, probe=False, cutmix=1., dropout=.1, save_minutes=1e-9)

@pytest.fixture(scope='module')
def images(): return load_images('digits', limit='64,32,32')

def model_and_dls(images):
    torch.manual_seed(0)
    model = create_backbone('vit_pico', len(images.vocab))
    return model,get_dls(images, **image_config(model), bs=16, flip=True)

@cache
def plan_of(images, method):
    if method in ('head','full'): return method
    return plan_model(*model_and_dls(images), method, budget=36, score_batches=1, score_bs=16, progress=False, dropout=.1)

def made(images, method, **options):
    "A Learner, the same at every call"
    model,dls = model_and_dls(images)
    return fclora_learner(dls, model, plan_of(images, method), recipe(epochs=3, **dict(cutmix=1.)|options))

def fit(learn, *cbs):
    with ExitStack() as stack:
        for o in (learn.no_bar(), learn.no_logging(), learn.added_cbs([KeepEpochs(lambda *_: None), KeepBest(), *cbs])): stack.enter_context(o)
        learn.fit_recipe()
        return dict(weights=trained_state(learn.model), losses=[float(o) for o in learn.recorder.losses], best=learn.keep_best.losses)

def stopped(learn, folder, step, **kwargs):
    "Train until `step` steps are done"
    with pytest.raises(KeyboardInterrupt): fit(learn, Checkpoints(folder, stop=lambda: learn.train_iter>=step, **kwargs))

def same(a, b):
    assert a['losses']==b['losses'] and a['best']==b['best'] and a['weights'].keys()==b['weights'].keys()
    for k in a['weights']: assert torch.equal(a['weights'][k], b['weights'][k]), k

@pytest.mark.parametrize('method,options', [('fclora',{}), ('fclora',dict(ema=.9)), ('full',{}), ('head',{}), ('adalora',{}), ('cut',{}), ('fora',{})])
def test_the_weights_are_those_of_a_training_that_was_never_stopped(images, tmp_path, method, options, one_thread):
    straight = fit(made(images, method, **options))
    for step in (4, 10): # of 12; 4 is the last of an epoch
        stopped(made(images, method, **options), tmp_path/str(step), step)
        assert last_checkpoint(tmp_path/str(step))['train_iter']==step
        same(fit(made(images, method, **options), Checkpoints(tmp_path/str(step))), straight)

def test_cutmix_that_has_begun_goes_on(images, tmp_path, one_thread):
    class Knows(Callback):
        "The model is said to know the images by heart after the first epoch"
        order = LateCutMix.order+1
        def after_epoch(self): self.learn.late_cut_mix.on = True
    def late(): return made(images, 'head', cutmix=None)
    straight,learn = fit(late(), Knows()),late()
    with pytest.raises(KeyboardInterrupt): fit(learn, Knows(), Checkpoints(tmp_path, stop=lambda: learn.train_iter>=6)) # in the second
    same(fit(late(), Knows(), Checkpoints(tmp_path)), straight)
    assert fit(late())['losses']!=straight['losses']

def test_stopped_twice(images, tmp_path, one_thread):
    straight = fit(made(images, 'fclora'))
    for step in (2, 5): stopped(made(images, 'fclora'), tmp_path, step)
    assert last_checkpoint(tmp_path)['train_iter']==5
    same(fit(made(images, 'fclora'), Checkpoints(tmp_path)), straight)

def test_a_damaged_checkpoint_is_passed_over(images, tmp_path, one_thread):
    straight = fit(made(images, 'fclora'))
    stopped(made(images, 'fclora'), tmp_path, 6, minutes=1e-9)
    older,newer = sorted(tmp_path.iterdir())
    newer.write_bytes(newer.read_bytes()[:1000])
    assert last_checkpoint(tmp_path)['train_iter']==int(older.name[:9])
    same(fit(made(images, 'fclora'), Checkpoints(tmp_path)), straight)

def test_nothing_that_is_not_finite_is_kept(images, tmp_path, one_thread):
    learn = made(images, 'fclora')
    class Spoil(Callback):
        order = 70
        def after_batch(self):
            if self.train_iter==6: next(iter(adapter_params(self.model).values())).data.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='not finite any more'): fit(learn, Spoil(), Checkpoints(tmp_path, minutes=1e-9))
    assert last_checkpoint(tmp_path)['train_iter']==5

# --- runs

def child(out, **kwargs):
    "What a process of its own does"
    torch.set_num_threads(1)
    with open(os.devnull, 'w') as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    finetune(**ASKED, out=str(out), auto_resume=True, quiet=True, **kwargs)

@pytest.fixture(scope='module')
def processes():
    "Processes that start with the library loaded"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['fclora.runs.resume'])
    def start(*args, **kwargs):
        p = context.Process(target=child, args=args, kwargs=kwargs)
        p.start()
        return p
    return start

@pytest.fixture(scope='module')
def straight(tmp_path_factory, processes):
    "A run that was never stopped, and how long it took"
    out = tmp_path_factory.mktemp('straight')/'run'
    processes(tmp_path_factory.mktemp('warm')/'run').join()
    began = time.monotonic()
    p = processes(out)
    p.join()
    assert p.exitcode==0
    return out,time.monotonic()-began

def numbers(out):
    run = load_run(out)
    return run.config['status'],run.config['T'],run.config['probe'],run.metrics['test']

def test_killed_at_random_moments(straight, processes, tmp_path):
    theirs,seconds = straight
    weights = (theirs/'adapter.safetensors').read_bytes()
    rng = random.Random(0)
    loaded = empty = 0
    for i in range(KILLS):
        out,sig = tmp_path/str(i),[signal.SIGKILL,signal.SIGTERM,signal.SIGINT][i%3]
        p = processes(out)
        time.sleep(rng.uniform(0, 1.05*seconds))
        if p.is_alive(): os.kill(p.pid, sig)
        p.join()
        if status_of(out): load_run(out); loaded += 1
        else: empty += 1
        p = processes(out)
        p.join()
        assert p.exitcode==0, (i, sig)
        assert (out/'adapter.safetensors').read_bytes()==weights and numbers(out)==numbers(theirs), (i, sig)
        assert {o.name for o in out.iterdir()}=={o.name for o in theirs.iterdir()}
    print(f'{KILLS} kills: {loaded} left a run that loads, {empty} none yet; all went on to the same bytes')

def test_resume_by_the_folder_alone(straight, processes, tmp_path, monkeypatch):
    theirs,_ = straight
    one_batch = FCLoRALearner.one_batch
    def batch(self, i, b):
        if self.training and self.train_iter==11: raise KeyboardInterrupt
        one_batch(self, i, b)
    with monkeypatch.context() as m:
        m.setattr(FCLoRALearner, 'one_batch', batch)
        with pytest.raises(KeyboardInterrupt): finetune(**ASKED, out=str(tmp_path/'run'), quiet=True)
    assert was_stopped(tmp_path/'run') and not is_done(tmp_path/'run') and load_run(tmp_path/'run').config['status']=='epoch 1 of 2'
    with pytest.raises(ValueError, match='resume'): finetune(**ASKED, out=str(tmp_path/'run'), quiet=True)
    with pytest.raises(ValueError, match='other options .epochs'): finetune(**{**ASKED, 'epochs':3}, out=str(tmp_path/'run'), resume=True, quiet=True)
    monkeypatch.setattr('fclora.planning.plan_model', None) # the Plan is there
    assert resume(tmp_path/'run', quiet=True).metrics['resumed']
    assert not was_stopped(tmp_path/'run') and is_done(tmp_path/'run')
    assert numbers(tmp_path/'run')[1]==pytest.approx(numbers(theirs)[1], rel=1e-4) # this process may have other threads
    with pytest.raises(ValueError, match='went to its end'): resume(tmp_path/'run')
    with pytest.raises(ValueError, match='no run'): finetune(**ASKED, out=str(tmp_path/'none'), resume=True)
    assert not (tmp_path/'none').exists()

def test_scoring_goes_on_where_it_was_stopped(tmp_path, monkeypatch, one_thread):
    asked,seen,shown = dict(ASKED, epochs=1, score_batches=8),[],measuring.look
    theirs = finetune(**asked, out=str(tmp_path/'straight'), quiet=True)
    def look(*args):
        seen.append(args[-1])
        if len(seen)==6: raise KeyboardInterrupt
        return shown(*args)
    monkeypatch.setattr(measuring, 'look', look)
    monkeypatch.setattr('fclora.runs.finetune.ScoringMemory', partial(ScoringMemory, minutes=0))
    with pytest.raises(KeyboardInterrupt): finetune(**asked, out=str(tmp_path/'run'), quiet=True)
    assert was_stopped(tmp_path/'run') and not (tmp_path/'run/checkpoints/plan.json').exists()
    run = resume(tmp_path/'run', quiet=True)
    assert seen==[1,2,3,4,5,6,6,7,8] and run.plan.metrics==theirs.plan.metrics and run.plan.ranks==theirs.plan.ranks
    assert (tmp_path/'run/adapter.safetensors').read_bytes()==(tmp_path/'straight/adapter.safetensors').read_bytes()

def test_the_old_run_stays_until_the_new_one_is_done(straight, processes, tmp_path):
    theirs,seconds = straight
    out = tmp_path/'run'
    shutil.copytree(theirs, out)
    (out/'mine.txt').write_text('not of a run')
    set_aside(out)
    assert load_run(out/'replaced').config['status']=='done' and not status_of(out)
    set_aside(out) # an attempt that never got to an epoch
    assert load_run(out/'replaced').config['status']=='done'
    finetune(**ASKED, out=str(out), force=True, quiet=True)
    assert is_done(out) and not (out/'replaced').exists() and (out/'mine.txt').exists()

def test_two_processes_never_share_a_folder(processes, tmp_path):
    with claimed(tmp_path/'run'):
        with pytest.raises(ValueError, match=f'process {os.getpid()}'), claimed(tmp_path/'run'): pass
        p = processes(tmp_path/'run')
        p.join()
        assert p.exitcode!=0
    assert not (tmp_path/'run').exists()

def test_numbered_folders_are_claimed_at_once(tmp_path, monkeypatch):
    from fclora.runs.prepare import new_folder
    monkeypatch.chdir(tmp_path)
    assert [new_folder(None, 'x').name for _ in range(3)]==['x-1','x-2','x-3']

# --- failures of the disk

class Failing:
    "The k-th call of the functions that write fails as on a full disk, or as when the process ends"
    places = [(os,'replace'),(os,'fsync'),(Path,'write_bytes'),(Path,'write_text'),(shutil,'copy2')]
    def __init__(self, monkeypatch, k, error):
        self.left,self.error = k,error
        for owner,name in self.places: monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))
    def counted(self, f):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left==0: raise self.error
            return f(*args, **kwargs)
        return call

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()], ids=['full','killed'])
def test_whatever_write_fails_the_folder_loads(straight, tmp_path, monkeypatch, error):
    first,second = load_run(straight[0]),load_run(straight[0])
    with torch.no_grad(): next(iter(adapter_params(second.model).values())).add_(.01)
    first.config['status'],second.config['status'] = 'epoch 1 of 2','epoch 2 of 2'
    from fclora.runs.run import probe_logits
    second.config['probe'] = probe_logits(second.model, 32).tolist()
    hits = {}
    for k in range(1, 100):
        out = tmp_path/str(k)
        with monkeypatch.context() as m:
            fails = Failing(m, k, error)
            try:
                for run in (first, second, first): save_run(run, out)
            except (OSError, KeyboardInterrupt): pass
        if fails.left>0: break
        if (out/'fclora.json').exists():
            status = load_run(out).config['status'] # raises where weights and description are not of one epoch
            hits[status] = hits.get(status, 0)+1
            save_run(second, out) # and the next epoch can be saved
            assert load_run(out).config['status']=='epoch 2 of 2'
        else: hits['none'] = hits.get('none', 0)+1
    assert k>20 and set(hits)=={'none','epoch 1 of 2','epoch 2 of 2'}, hits

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()], ids=['full','killed'])
def test_whatever_write_fails_a_finished_run_is_there(straight, tmp_path, monkeypatch, error):
    for k in range(1, 100):
        out = tmp_path/str(k)
        shutil.copytree(straight[0], out)
        with monkeypatch.context() as m:
            fails = Failing(m, k, error)
            try: set_aside(out)
            except (OSError, KeyboardInterrupt): pass
        assert is_done(out) and load_run(out) or load_run(out/'replaced').config['status']=='done'
        set_aside(out)
        assert load_run(out/'replaced').config['status']=='done' and not status_of(out)
        if fails.left>0: break
    assert k>4

def test_checkpoints_survive_failures(tmp_path, monkeypatch):
    state = lambda i: dict(step=i, model=dict(w=torch.ones(3)*i))
    for k in range(1, 20):
        folder = tmp_path/str(k)
        save_checkpoint(state(1), folder, 1)
        with monkeypatch.context() as m:
            fails = Failing(m, k, OSError(errno.ENOSPC, 'full'))
            try: save_checkpoint(state(2), folder, 2)
            except OSError: pass
        assert last_checkpoint(folder)['step'] in (1, 2)
        if fails.left>0: break
    assert k>3

def test_tidy_removes_what_killed_processes_left(tmp_path):
    for name in ('.adapter.safetensors.123.tmp','mine.txt','.keep'): (tmp_path/name).write_text('x')
    tidy(tmp_path)
    assert {o.name for o in tmp_path.iterdir()}=={'mine.txt','.keep'}
