import os, subprocess, sys, warnings
os.environ.setdefault('OMP_WAIT_POLICY', 'passive') # waiting threads give up the core, which matters where cores are few
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1') # one core a worker, for the commands that tests start too
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image

warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated')

QUICK = ['--epochs', '1', '--batch-size', '128', '--score-batches', '2', '--quiet', '--no-probe']

def fclora(*args, **kw):
    "Run the installed command"
    exe = Path(sys.executable).parent/'fclora'
    return subprocess.run([exe, *map(str, args)], capture_output=True, text=True, **kw)

def make_images(root, classes=('cat','dog'), n=6, size=32, seed=0):
    "Class folders of small noisy images, told apart by their colour"
    rng = np.random.default_rng(seed)
    for i,c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for j in range(n):
            px = rng.normal(80+120*i/len(classes), 30, (size,size,3)).clip(0, 255).astype('uint8')
            Image.fromarray(px).save(root/c/f'{j}.png')
    return root

def untrained_run(out, method='uniform', **entries):
    "A run folder on the digits whose adapters and head are random, made without training; `entries` go into fclora.json"
    from types import SimpleNamespace
    from fclora.adapt import adapter_params
    from fclora.backbones import create_backbone
    from fclora.find import find_sites
    from fclora.make_plan import make_plan
    from fclora.runs.folder import save_run
    from fclora.runs.run import Run,model_config,run_config
    torch.manual_seed(0)
    net = create_backbone('vit_pico', 10)
    plan = make_plan('vit_pico', find_sites(net), method=method, budget=18)
    plan.adapt(net)
    with torch.no_grad():
        for p in adapter_params(net).values(): p.add_(.1*torch.randn_like(p))
    learn = SimpleNamespace(model=net, plan=plan, regime='adapters', recipe={}, dls=SimpleNamespace(vocab=[str(i) for i in range(10)]))
    data = dict(name='digits', source='digits', limit='100,20,60', seed=0)
    return save_run(Run(run_config(learn, model_config('vit_pico'), data, T=.5) | entries, {}, None, plan, net), out)

@pytest.fixture(scope='session')
def run(tmp_path_factory):
    "One short run on the embedded data, made by the installed command"
    out = tmp_path_factory.mktemp('runs')/'digits'
    res = fclora('finetune', *QUICK, '--out', out)
    assert res.returncode==0, res.stderr
    return out,res

@pytest.fixture(scope='session')
def folder(tmp_path_factory): return make_images(tmp_path_factory.mktemp('data')/'pets', n=12)

@pytest.fixture(scope='module')
def one_thread():
    "These models are so small that threads only wait for one another"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
