"Several processes train as one does, fail as one does, and go on from one another's checkpoints"
import json, multiprocessing, os, signal, subprocess, sys, time
import pytest, torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from fclora.adapt import freeze
from fclora.backbones import create_backbone
from fclora.cli import check_processes, main
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.plan import Plan
from fclora.runs.folder import load_run
from fclora.runs.resume import resume

ASKED = ['--limit', '128,50,50', '--epochs', '2', '--batch-size', '16', '--budget', '36', '--score-batches', '6', '--no-probe',
         '--cutmix', '0', '--quiet']
LAUNCHERS = dict(torchrun=['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'],
                 accelerate=['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
                             '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0'])

def launch(launcher, *args):
    "`fclora finetune` in two processes, as a user starts them"
    cmd = [sys.executable, *LAUNCHERS[launcher], '-m', 'fclora', 'finetune', *ASKED, *map(str, args)]
    return subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))

def ours(err): return [l for l in err.splitlines() if 'fclora: ' in l] # a launcher says more

def child(args, env, log):
    "What a process that a launcher started does"
    torch.set_num_threads(1)
    os.environ.update(env)
    with open(log, 'a') as f:
        for fd in (1, 2): os.dup2(f.fileno(), fd)
    status = main(list(map(str, args)))
    sys.stderr.flush()
    os._exit(status)

@pytest.fixture(scope='module')
def started(tmp_path_factory):
    "Runs the command in `n` processes that start with the library loaded: gives their exit statuses, and all they printed"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['fclora.runs.resume'])
    def start(n, *args):
        log = tmp_path_factory.mktemp('log')/'log'
        store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False) # kept by the launcher, as torchrun does
        about = dict(WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE='True',
                     TORCHELASTIC_RESTART_COUNT='0')
        envs = [dict(about, RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]
        ps = [context.Process(target=child, args=(args, env, log)) for env in envs]
        for p in ps: p.start()
        for p in ps: p.join()
        return [p.exitcode for p in ps],log.read_text()
    return start

@pytest.fixture(scope='module')
def runs(started, tmp_path_factory):
    "The same run by one, two and four processes: {number: (folder, what was printed)}"
    made = {}
    for n in (1, 2, 4):
        out = tmp_path_factory.mktemp('runs')/str(n)
        status,printed = started(n, 'finetune', *ASKED, '--out', out)
        assert status==[0]*n, printed
        made[n] = out,printed
    return made

def test_scores_and_ranks_are_those_of_one_process(runs):
    one,*others = [Plan.load(out/'plan.json') for out,_ in runs.values()]
    assert len(set(one.ranks.values()))>1 # they say something
    for plan in others:
        assert plan.ranks==one.ranks
        for m,values in one.metrics.items(): assert plan.metrics[m]==pytest.approx(values, rel=1e-6), m

def test_weights_and_numbers_are_those_of_one_process(runs):
    "Up to rounding: sums over parts of a batch come in another order"
    folders = {n:out for n,(out,_) in runs.items()}
    weights = {n:load_file(out/'adapter.safetensors') for n,out in folders.items()}
    metrics = {n:json.loads((out/'metrics.json').read_text()) for n,out in folders.items()}
    for n in (2, 4):
        assert weights[n].keys()==weights[1].keys()
        for k,w in weights[1].items(): torch.testing.assert_close(weights[n][k], w, rtol=1e-4, atol=1e-5)
        for split in ('valid','test'):
            for k in ('accuracy','nll','nll_raw','T'): assert metrics[n][split][k]==pytest.approx(metrics[1][split][k], rel=1e-4), (n, split, k)
        assert metrics[n]['processes']==n
    histories = {n:(out/'history.csv').read_text().splitlines() for n,out in folders.items()}
    rows = {n:[[float(o) for o in l.split(',')[1:4]] for l in h[1:]] for n,h in histories.items()}
    for n in (2, 4): assert sum(rows[n], [])==pytest.approx(sum(rows[1], []), rel=1e-4)

def test_a_start_from_gradients_is_that_of_one_process(started, tmp_path):
    "GoRA reads the sums of its scorer, not only what `measure` returns"
    quick = ['--method', 'gora', '--limit', '64,20,20', '--batch-size', '16', '--epochs', '1', '--budget', '36', '--no-probe', '--quiet']
    for n in (1, 2):
        status,printed = started(n, 'finetune', *quick, '--out', tmp_path/str(n))
        assert status==[0]*n, printed
    one,two = [load_file(tmp_path/str(n)/'adapter.safetensors') for n in (1, 2)]
    for k,w in one.items(): torch.testing.assert_close(two[k], w, rtol=1e-4, atol=1e-5)

def test_one_process_prints_and_writes(runs):
    lines = {n:printed.splitlines() for n,(_,printed) in runs.items()}
    assert len(lines[1])==len(lines[2])==len(lines[4])
    names = {n:sorted(o.name for o in out.iterdir()) for n,(out,_) in runs.items()}
    assert names[1]==names[2]==names[4]

@pytest.mark.parametrize('args,what', [(['--batch-size', '15'], '15 cannot be shared equally by 2 processes; try 14 or 16'),
                                       (['--limit', '13,50,50'], '13 training images are one batch'),
                                       (['--epochs', '0'], 'epochs'), (['--zz'], 'unrecognized'), (['--plan', 'nowhere.json'], 'nowhere.json')])
def test_a_mistake_is_one_line(started, tmp_path, args, what):
    status,said = started(2, 'finetune', *ASKED, *args, '--out', tmp_path/'run')
    assert 0 not in status and len(said.splitlines())==1 and what in said, said
    assert not (tmp_path/'run').exists()

def test_other_commands_run_in_one_process(monkeypatch):
    check_processes('score')
    monkeypatch.setenv('WORLD_SIZE', '2')
    check_processes('finetune')
    with pytest.raises(ValueError, match='score runs in one process'): check_processes('score')

FAIL = '''import os
from fclora.runs.job import Job
evaluate = Job.evaluate
def failing(self, *args):
    if os.environ['RANK']=='1': raise OSError('the disk of process 1 is broken')
    return evaluate(self, *args)
Job.evaluate = failing
'''

def test_a_failure_of_one_process_ends_all(tmp_path):
    (tmp_path/'fail.py').write_text(FAIL)
    p = launch('accelerate', '--out', tmp_path/'run', '--plugin', tmp_path/'fail.py')
    out,err = p.communicate()
    assert p.returncode and out=='' and ours(err)==['fclora: error: the disk of process 1 is broken'], err
    assert load_run(tmp_path/'run').config['status']=='epoch 2 of 2' # what was done is kept

STEP = '''import os
from fclora.train.exchange import Exchange
averaged = Exchange.after_backward
def failing(self):
    if os.environ['RANK']=='{who}' and self.iter==2: {what}
    averaged(self)
Exchange.after_backward = failing
'''

@pytest.mark.parametrize('who,what,said', [
    (0, 'raise OSError("the disk is full")', 'the disk is full'), (1, 'raise OSError("the disk is full")', 'the disk is full'),
    (1, 'os.kill(os.getpid(), 9)', 'another process of this run has ended')])
def test_a_failure_while_others_wait_is_said_by_the_one_that_knows_why(started, tmp_path, who, what, said):
    "The others would say that a connection was closed, and may notice it before the first has spoken"
    (tmp_path/'fail.py').write_text(STEP.format(who=who, what=what))
    quick = ['--method', 'head', '--limit', '64,20,20', '--batch-size', '16', '--epochs', '1', '--no-probe']
    status,printed = started(2, 'finetune', *quick, '--quiet', '--out', tmp_path/'run', '--plugin', tmp_path/'fail.py')
    assert 0 not in status and len(printed.splitlines())==1 and said in printed, printed
    assert 'gloo' not in printed

SLOW = '''import time
from fastai.callback.core import Callback
from fclora.runs import finetune as page
made = page.fclora_learner
class Slow(Callback):
    def after_batch(self): time.sleep(.05)
page.fclora_learner = lambda *args, **kwargs: made(*args, **kwargs, cbs=[Slow()])
'''

def test_interrupted_and_taken_up_by_another_number_of_processes(runs, tmp_path):
    (tmp_path/'slow.py').write_text(SLOW)
    out = tmp_path/'run'
    p = launch('torchrun', '--out', out, '--save-minutes', '1e-9', '--plugin', tmp_path/'slow.py')
    while not list(out.glob('checkpoints/*.safetensors')) and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGTERM) # as a scheduler does
    _,err = p.communicate()
    assert p.returncode and len(ours(err))==1 and 'interrupted; what was done is kept' in ours(err)[0], err
    assert not (out/'metrics.json').exists()
    run = resume(str(out), quiet=True)
    assert run.metrics['resumed'] and run.metrics['processes']==1
    straight = load_file(runs[1][0]/'adapter.safetensors')
    for k,w in load_file(out/'adapter.safetensors').items(): torch.testing.assert_close(w, straight[k], rtol=1e-4, atol=1e-5)

# --- FSDP2, for models of which one device cannot hold everything

def three_steps(model, images, labels):
    "Losses of three steps, of the part of the batch that this process sees"
    opt,losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2),[]
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)

def sharded(rank, folder):
    "Frozen weights, adapters and head in halves, one in each of two processes"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model,images,labels = torch.load(folder/'made.pt', weights_only=False)
    whole,mesh = sum(p.numel() for p in model.parameters()),init_device_mesh('cpu', (2,))
    for m in (*model.blocks, model): fully_shard(m, mesh=mesh)
    half = slice(4*rank, 4*rank+4)
    losses = three_steps(model, images[half], labels[half])
    dist.all_reduce(losses)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    here = sum(p.to_local().numel() for p in model.parameters())
    if rank==0: torch.save((losses/2, state, here/whole), folder/'found.pt')
    dist.destroy_process_group()

@pytest.mark.parametrize('adapter', ['lora','dora'])
def test_an_adapted_model_trains_in_shards(tmp_path, adapter):
    torch.manual_seed(0)
    model = create_backbone('vit_pico', 10)
    freeze(make_plan('vit_pico', find_sites(model), method='uniform', budget=36, adapter=adapter).adapt(model))
    for n,p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.05) # so that both factors learn from the first step
    images,labels = torch.randn(8, 3, 32, 32),torch.arange(8)
    torch.save((model, images, labels), tmp_path/'made.pt')
    torch.multiprocessing.spawn(sharded, (tmp_path,), nprocs=2)
    losses,state,share = torch.load(tmp_path/'found.pt')
    torch.testing.assert_close(losses, three_steps(model, images, labels))
    for k,v in model.state_dict().items(): torch.testing.assert_close(state[k], v, rtol=1e-3, atol=1e-4)
    assert .49<share<.52
