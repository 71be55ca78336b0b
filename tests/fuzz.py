"""Random damage to everything that fclora reads from strangers: nothing may come of it but a result or one clear line.

    python tests/fuzz.py MINUTES [SEED]

runs for so long and prints the counts so far as a line of JSON after every round. A case is known by its kind, seed and number, so that a failure can be repeated."""
import csv, io, json, math, os, random, resource, shutil, signal, sys, tempfile, time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, torch
from PIL import Image
from safetensors.torch import save, save_file
from fclora.adapt import adapter_params
from fclora.backbones import create_backbone, load_weights
from fclora.cli import command_table, main
from fclora.data.pixels import decode
from fclora.files import sha256
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.plan import Plan
from fclora.report.tables import paper_table, text_table
from fclora.runs.asked import check_registered
from fclora.runs.config import config_digest
from fclora.runs.folder import load_model, load_run, save_run
from fclora.runs.run import Run, model_config, run_config
from fclora.runs.use import predict_files, print_predictions

expected = (ValueError, OSError, ArithmeticError, ImportError) # which the command line says in one line
never = (UnicodeEncodeError, ZeroDivisionError) # of those kinds, but nothing that was checked

# --- what is damaged

def make_run(out, n=4):
    "A run folder of the smallest model with adapters filled at random, in a second and without training"
    torch.manual_seed(0)
    net = create_backbone('vit_pico', n)
    plan = make_plan('vit_pico', find_sites(net), method='uniform', budget=36)
    plan.adapt(net)
    with torch.no_grad():
        for p in adapter_params(net).values(): p.add_(.1*torch.randn_like(p))
    vocab = ['ant','bee','fly','moth'][:n]
    learn = SimpleNamespace(model=net, plan=plan, regime='adapters', recipe=dict(epochs=1, batch_size=32), dls=SimpleNamespace(vocab=vocab))
    data = dict(name='insects', source='insects', valid_pct=.2, test_pct=None, seed=0, skip_bad=False, classes=None, limit=None, train=9, valid=9, test=9)
    table = dict(n=9, n_bins=15, class_acc_mean=.5, class_acc_std=.1, brier=.2, brier_raw=.2, ece_floor=.1, ece_floor_upper=.2,
                 **{k+s:.5 for k in ('nll','ece','adaptive_ece','classwise_ece','mce') for s in ('','_raw')}, T=.9, accuracy=.5,
                 ece_interval=[.1,.2], ece_interval_raw=[.1,.2])
    metrics = dict(method='uniform', model='vit_pico', seed=0, epochs=1, total_rank=36, epoch_kept=1, params=dict(total=9, trainable=9, adapter=9, head=9, paper_pct=1.),
                   valid=table, test=table, peak_memory_mb=9., memory_kind='process', seconds=dict(train=1., total=2.), hardware='2 CPU cores')
    history = pd.DataFrame(dict(epoch=[1], train_loss=[1.], valid_loss=[1.], accuracy=[.5], lr=[.1], seconds=[1.]))
    config = run_config(learn, model_config('vit_pico'), data, T=.9)
    return save_run(Run(config, metrics, history, plan, net), out)

odd_values = [None, True, False, 0, 1, -1, 5, 3.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**30, '', 'x', '/../../../x', 'a\nb', '\x1b[31m',
              '\udce9', 'a'*10_000, '=1+1', [], [[]], {}, dict(a=1), list(range(100)), 'vit_pico', 'lora', 'full', 'head', 'resnet18', 'fclora', [0.]*3, 'nan']

def nodes(o, at=()):
    "The places of everything in JSON"
    yield at
    inner = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()
    for k,v in inner: yield from nodes(v, (*at,k))

def damage_json(o, rng):
    "One to three entries replaced, removed, exchanged, renamed, scaled or buried"
    o = [deepcopy(o)]
    for _ in range(rng.choice((1,1,1,2,3))):
        *way,last = rng.choice([n for n in nodes(o) if n])
        inner = o
        for k in way: inner = inner[k]
        old,what = inner[last],rng.randrange(6)
        if what<=1: inner[last] = deepcopy(rng.choice(odd_values))
        elif what==2 and way: del inner[last]
        elif what==3 and isinstance(old, (int,float)) and not isinstance(old, bool): inner[last] = old*rng.choice((-1, 0, .5, 2, 1e6)) if math.isfinite(old) else 0
        elif what==4 and isinstance(old, list): rng.shuffle(old)
        elif what==4 and isinstance(old, dict) and old: old[rng.choice(['x','','\x1b','../y'])] = old.pop(rng.choice(list(old)))
        else:
            for _ in range(rng.choice((1, 30, 200))): inner[last] = [inner[last]]
    return o[0]

def damage_bytes(b, rng):
    "Bytes changed, cut off, doubled, put in or replaced altogether"
    b,what = bytearray(b),rng.randrange(7)
    if what==0: return bytes(b[:rng.randrange(len(b)+1)])
    if what==1: return bytes(rng.randrange(256) for _ in range(rng.choice((0, 1, 8, 300))))
    if what==2:
        i,j = sorted(rng.randrange(len(b)+1) for _ in range(2))
        return bytes(b[:j]+b[i:])
    head = rng.random()<.5 # most of a format's logic is in the first bytes
    for _ in range(rng.choice((1, 2, 8, 64))):
        i = rng.randrange(min(len(b), 200) if head else len(b))
        b[i] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
    return bytes(b)

def damage_text(text, rng):
    "A few letters of JSON or CSV changed, or its brackets nested without end"
    if rng.random()<.1: return rng.choice(['['*100_000, '{"a":'*50_000, 'null', '3', '""', '\ufeff'+text, text*2]).encode()
    return damage_bytes(text.encode(), rng)

# --- what must not happen meanwhile

class Watch:
    "Notes programs that are started, connections, pickled code, and files that are touched outside of `folder`, by Python's audit events"
    forbidden = {'subprocess.Popen','os.system','os.exec','os.posix_spawn','os.fork','os.forkpty','socket.connect','socket.getaddrinfo','pickle.find_class','os.symlink'}
    touching = {'os.remove','os.rename','os.mkdir','os.rmdir','os.link','os.truncate','os.chmod','shutil.rmtree','shutil.move','shutil.copyfile'}
    def __init__(self): self.folder,self.seen = None,[]
    def hook(self, event, args):
        if self.folder is None: return
        if event in self.forbidden: self.seen.append(f'{event} {args!r}'[:200])
        elif event in self.touching or event=='open' and self.writes(args):
            path = args[0]
            if isinstance(path, (str,bytes,os.PathLike)) and not os.path.abspath(os.fsdecode(path)).startswith((str(self.folder),'/dev/null')): self.seen.append(f'{event} {path!r}'[:200])
    def writes(self, args): return any(o in (args[1] or '') for o in 'wax+') or bool((args[2] or 0)&(os.O_WRONLY|os.O_RDWR|os.O_CREAT))

watch = Watch()
sys.addaudithook(watch.hook) # it cannot be removed, and is silent without a folder

class Hang(BaseException): pass

@contextmanager
def guarded(folder, seconds=60):
    "A block that may not take long, nor do what `Watch` forbids"
    def hang(*args): raise Hang(f'more than {seconds} s')
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    watch.folder,watch.seen = folder,[]
    try: yield
    finally:
        watch.folder = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

# --- the cases: each writes something damaged into its folder, and returns a function that reads it

class Cases:
    "One damaged input after another"
    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        self.whole = make_run(self.folder/'whole')
        self.run = self.folder/'run'
        shutil.copytree(self.whole, self.run)
        self.texts = {n:(self.whole/n).read_text() for n in ('fclora.json','plan.json','metrics.json','history.csv')}
        self.weights = (self.whole/'adapter.safetensors').read_bytes()
        px = np.random.default_rng(0).integers(0, 255, (24,24,3), dtype=np.uint8)
        Image.fromarray(px).save(self.folder/'a.png')
        self.images = {}
        for fmt in ('PNG','JPEG','GIF','TIFF','BMP','WEBP','PPM','ICO','TGA','PCX','SGI','EPS','PDF'):
            buf = io.BytesIO()
            Image.fromarray(px).save(buf, fmt)
            self.images[fmt] = buf.getvalue()
        self.state = {k:v for k,v in create_backbone('vit_pico', 3).state_dict().items()}
        self.net = create_backbone('vit_pico', 3)
        self.before = self.predicted()

    def predicted(self):
        model,config = load_model(self.run)
        rows = predict_files(model, config, [self.folder/'a.png'], 99)
        assert abs(sum(o['probability'] for o in rows[0]['top'])-1)<1e-3
        return rows

    def put(self, name, content): (self.run/name).write_bytes(content)
    def put_back(self):
        for n,t in self.texts.items(): self.put(n, t.encode())
        self.put('adapter.safetensors', self.weights)

    def config(self, rng):
        digest = rng.choice(('kept','none','anew','text'))
        if digest=='text': content = damage_text(self.texts['fclora.json'], rng)
        else:
            d = damage_json(json.loads(self.texts['fclora.json']), rng)
            if isinstance(d, dict) and digest!='kept':
                d.pop('digest', None)
                if digest=='anew':
                    try: d['digest'] = config_digest(d)
                    except (TypeError, ValueError, RecursionError): pass
            content = json.dumps(d).encode()
        self.put('fclora.json', content)
        def read():
            rows = self.predicted()
            if digest=='kept': assert rows==self.before, 'other predictions without a word'
        return read

    def plan(self, rng):
        d = json.loads(self.texts['plan.json'])
        self.put('plan.json', damage_text(self.texts['plan.json'], rng) if rng.random()<.3 else json.dumps(damage_json(d, rng)).encode())
        def read():
            plan = check_registered(Plan.load(self.run/'plan.json'))
            str(plan)
            net = plan.adapt(deepcopy(self.net))
            assert net(torch.zeros(1, 3, 32, 32)).shape==(1,3)
            plan.save(self.run/'again.json')
            assert Plan.load(self.run/'again.json')==plan
        return read

    def metrics(self, rng):
        d = json.loads(self.texts['metrics.json'])
        self.put('metrics.json', damage_text(self.texts['metrics.json'], rng) if rng.random()<.3 else json.dumps(damage_json(d, rng)).encode())
        def read():
            run = load_run(self.run, model=False)
            if 'test' in run.metrics: text_table(paper_table(run)) # a stopped run has none
        return read

    def history(self, rng):
        self.put('history.csv', damage_text(self.texts['history.csv'], rng))
        return lambda: load_run(self.run, model=False)

    def adapter(self, rng):
        if rng.random()<.5: content = damage_bytes(self.weights, rng)
        else:
            from safetensors.torch import load
            state = load(self.weights)
            k = rng.choice(list(state))
            what = rng.randrange(6)
            if what==0: del state[k]
            elif what==1: state[k] = state[k].flatten()
            elif what==2: state[k] = torch.full_like(state[k], rng.choice((math.nan, math.inf, 1e38)))
            elif what==3: state[k] = state[k].to(rng.choice((torch.float16, torch.int64, torch.bool, torch.float64)))
            elif what==4: state['../x'] = state[k].clone()
            else: state = {}
            content = save(state)
        self.put('adapter.safetensors', content)
        d = json.loads(self.texts['fclora.json'])
        d['weights_sha256'] = sha256(self.run/'adapter.safetensors')
        self.put('fclora.json', json.dumps(dict(d, digest=config_digest(d))).encode())
        return self.predicted

    def checkpoint(self, rng):
        file = self.folder/rng.choice(('w.pth','w.safetensors'))
        state,what = dict(self.state),rng.randrange(8)
        k = rng.choice(list(state))
        if what==0: state[rng.choice((3, None, (1,2), 2.5, b'x'))] = state.pop(k)
        elif what==1: state[k] = rng.choice((None, 3, 'x', [1], dict(a=1)))
        elif what==2: state = rng.choice((dict(model=None), dict(state_dict={}), {}, [1], 'x', dict(model=state, epoch=3), dict(model=dict(model=state))))
        elif what==3: state[k] = state[k][...,:1] if state[k].ndim else torch.zeros(3)
        elif what==4: state = {f'module.{n}':v for n,v in state.items()}
        elif what==5: state = {n:state[n] for n in rng.sample(list(state), rng.randrange(len(state)))}
        odd = not isinstance(state, dict) or any(not isinstance(n, str) or not isinstance(v, torch.Tensor) for n,v in state.items())
        if file.suffix=='.pth' or odd: torch.save(state, file)
        else: save_file({n:v.contiguous().clone() for n,v in state.items()}, file)
        if what>=6: file.write_bytes(damage_bytes(file.read_bytes(), rng))
        return lambda: load_weights(deepcopy(self.net), file)

    def image(self, rng):
        fmt = rng.choice(list(self.images))
        file = self.folder/f'damaged{rng.choice((".png", ".jpg", ".gif", ".tif", ""))}'
        file.write_bytes(damage_bytes(self.images[fmt], rng))
        def read():
            x,why = decode(file, 16)
            assert (x is None)!=(why is None) and (x is None or x.dtype==torch.uint8 and x.shape[0]==3)
            if why: assert why and '\n' not in why; raise ValueError(why)
        return read

    def names(self, rng):
        letters = '=+-@\t\r\n\x1b\x00\udce9\u202e",;\'|<>&ab牛é '
        def name(): return ''.join(rng.choice(letters) for _ in range(rng.randrange(1, 9)))
        rows = [dict(file=name(), top=[{'class':name(), 'probability':.5} for _ in range(2)]) for _ in range(3)] + [dict(file=name(), error=name())]
        encoding = rng.choice(('utf-8','ascii','latin-1'))
        def read():
            for format in ('csv','table','jsonl'):
                raw = io.BytesIO()
                with redirect_stdout(io.TextIOWrapper(raw, encoding=encoding, errors='backslashreplace', newline='')) as out, redirect_stderr(io.StringIO()): print_predictions(rows, format); out.flush()
                text = raw.getvalue().decode(encoding)
                assert '\x1b' not in text
                if format=='csv':
                    cells = list(csv.reader(io.StringIO(text, newline='')))
                    assert len(cells)==7 and {len(o) for o in cells}=={4}
                    assert not [o for row in cells for o in row if o[:1] in set('=+-@\t\r')]
                if format=='jsonl': assert [json.loads(o) for o in text.splitlines() if o]==rows[:3] or any(o in text for o in '\u2028\u2029\x85')
                if format=='table': assert len(text.splitlines())==7
        return read

    def options(self, rng):
        cmd = rng.choice([c for c in command_table() if c not in ('systems','bench','push')])
        options = [o for o in command_table()[cmd]['options'] if o['kind']=='value' and o['name'] not in ('out','data_root','device','model')]
        texts = [*map(str, odd_values), '1e30', '1,2', '::', ':::', '[', '(?', 'fisher=nan', 'fisher=-1', 'q,,k', '0,0', '5,5,5', '/dev/zero', '..']
        argv = [cmd, *['no/such'+'/x'*(o['name']=='out') for o in command_table()[cmd]['options'] if o['kind']=='place']]
        if cmd in ('finetune','compare','score','tune','folds','check'): argv += ['no/such/folder', '--model=vit_pico'] # the weights of others would be looked for on the Hub
        for o in rng.sample(options, min(len(options), rng.choice((1,1,2,3)))): argv.append(f"--{o['name'].replace('_', '-')}={rng.choice(texts)}")
        def read():
            out,err = io.StringIO(),io.StringIO()
            with redirect_stdout(out), redirect_stderr(err):
                try: status = main(argv)
                except SystemExit as e: status = e.code
            lines = [o for o in err.getvalue().splitlines() if 'warning:' not in o]
            assert status in (1,2) and len(lines)==1 and '--debug shows' not in lines[0], (argv, status, err.getvalue()[:300])
            raise ValueError(lines[0])
        return read

kinds = ('config','plan','metrics','history','adapter','checkpoint','image','names','options')

def peak_mib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform=='darwin' else 2**10)

def case(cases, kind, seed, i):
    "What came of one case: read, refused, or how it failed"
    rng = random.Random(f'{kind} {seed} {i}')
    cases.put_back()
    read,most = getattr(cases, kind)(rng),peak_mib()+2000
    try:
        with guarded(cases.folder): read()
        res = 'read'
    except Hang as e: return f'Hang: {e}'
    except Exception as e:
        if not isinstance(e, expected) or isinstance(e, never) or not str(e).strip(): return f'{type(e).__name__}: {e}'[:400]
        res = 'refused'
    return '; '.join([*watch.seen, *['more than 2000 MiB of memory']*(peak_mib()>most)]) or res

def fuzz(kind, n, seed=0, folder=None):
    "{'read': number, 'refused': number}, and failures as {number of the case: what happened}"
    with tempfile.TemporaryDirectory() as d:
        cases,counts,failed = Cases(folder or d),dict(read=0, refused=0),{}
        home = os.getcwd()
        os.chdir(cases.folder)
        try:
            for i in range(n):
                res = case(cases, kind, seed, i)
                if res in counts: counts[res] += 1
                else: failed[i] = res
        finally: os.chdir(home)
    return counts,failed

if __name__=='__main__':
    minutes,seed = float(sys.argv[1]),int(sys.argv[2]) if len(sys.argv)>2 else 0
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12*2**30,)*2) # what has no end ends here
    res,end,block = {k:dict(read=0, refused=0, failed=0) for k in kinds},time.monotonic()+60*minutes,0
    while time.monotonic()<end:
        for kind in kinds: # blocks of 50, so that every kind gets its share
            counts,failed = fuzz(kind, 50, seed=f'{seed}.{block}')
            for k,v in counts.items(): res[kind][k] += v
            res[kind]['failed'] += len(failed)
            for i,why in failed.items(): print(f'{kind} {seed}.{block} {i}: {why}', file=sys.stderr, flush=True)
        block += 1
        print(json.dumps(res), flush=True)
