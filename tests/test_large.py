"Data that are larger than memory: pixels without a second copy, a cache on disk, files that turn out to be broken, a million names"
import json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from conftest import fclora, make_images
from fclora.data import cache, reading, sources
from fclora.data.cache import cached_pixels
from fclora.data.duplicates import exact_groups
from fclora.data.folds import take_fold
from fclora.data.loaders import BrokenImage, get_dls
from fclora.data.pixels import image_files
from fclora.data.rows import Rows, put_in_order
from fclora.data.sources import load_images
from fclora.runs.finetune import finetune
from fclora.runs.resume import resume

stats = dict(mean=(.5,.5,.5), std=(.5,.5,.5))
quick = dict(model='vit_pico', epochs=2, batch_size=4, score_batches=1, probe=False, num_workers=0, in_memory=False, seed=0, quiet=True)

def load(folder, **kw): return load_images(folder, kw.pop('size', 32), progress=False, **kw)
def cut(file): file.write_bytes(file.read_bytes()[:-len(file.read_bytes())//2])

# --- memory

# `getrusage` would do, but a child inherits its parent's peak there
peak = '''
import sys
from fclora.data.sources import load_images
def memory(what): return 1024*next(int(o.split()[1]) for o in open('/proc/self/status') if o.startswith(what))
load_images(sys.argv[1], 224, progress=False, limit='40,20,20')
before = memory('VmRSS')
images = load_images(sys.argv[1], 224, progress=False, **eval(sys.argv[2]))
print((memory('VmHWM')-before)/sum(o.numel() if hasattr(o, 'numel') else len(o)*3*224**2 for o,_ in images.splits.values()))
'''
def times(folder, **options):
    "Memory that reading takes at its peak, in a process of its own, in units of the pixels"
    res = subprocess.run([sys.executable, '-c', peak, str(folder), repr(options)], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return float(res.stdout)

@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "1,600 files of 224 pixels, 240 MB when they are decoded"
    root,rng = tmp_path_factory.mktemp('many'),np.random.default_rng(0)
    for c in 'ab':
        (root/c).mkdir()
        for i in range(800): Image.fromarray(np.full((224,224,3), rng.integers(0, 256, 3), np.uint8)).save(root/c/f'{i:03}.png', compress_level=1)
    return root

def test_reading_into_memory_takes_little_more_than_the_pixels(many): assert times(many)<1.3
def test_what_stays_in_its_files_takes_nearly_nothing(many): assert times(many, in_memory=False)<.15

def test_rows_are_sorted_in_place():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 500):
        x = torch.arange(n)[:,None].repeat(1, 3)
        for order in (rng.permutation(n), rng.permutation(n)[:n//2], np.arange(n)):
            y = x.clone()
            assert put_in_order(y, order) is y and y[:len(order),0].tolist()==order.tolist() and sorted(y[:,2].tolist())==list(range(n))

def test_pixels_are_kept_where_they_fit_and_one_line_says_otherwise(folder, monkeypatch):
    assert isinstance(load(folder).train[0], torch.Tensor)
    monkeypatch.setattr(sources, 'free_memory', lambda: 100_000)
    small = load(folder)
    assert isinstance(small.train[0], list) and 'decoded from disk in every epoch (0.1 MB of pixels, 0.1 MB of memory free)' in repr(small)
    assert isinstance(load(folder, in_memory=True).train[0], torch.Tensor)
    monkeypatch.setattr(sources, 'free_memory', lambda: 200_000)
    assert isinstance(load(folder).train[0], torch.Tensor)

def test_a_later_picture_of_another_size_is_noticed(tmp_path, monkeypatch):
    make_images(tmp_path, n=300, size=8)
    Image.new('RGB', (20,20)).save(tmp_path/'cat/1.png')
    assert reading.stack_side(image_files(tmp_path), 16)==8 and load(tmp_path, size=16).train[0].shape[1:]==(3,16,16)

def test_the_three_ways_give_the_same_batches(folder, tmp_path):
    found = [load(folder, **o) for o in (dict(), dict(in_memory=False), dict(cache=tmp_path/'c'))]
    assert [type(o.train[0]) for o in found]==[torch.Tensor,list,Rows]
    batches = [[list(dl) for dl in get_dls(o, 32, **stats, bs=4, device='cpu', num_workers=0)] for o in found]
    for other in batches[1:]:
        for a,b in zip(batches[0], other):
            assert all(torch.equal(p, q) for u,v in zip(a, b) for p,q in zip(u, v))
    assert found[0].files==found[1].files==found[2].files

def test_options_that_contradict_or_have_no_meaning_are_errors(folder, tmp_path):
    with pytest.raises(ValueError, match='--cache reads pixels from disk'): load(folder, cache=tmp_path, in_memory=True)
    with pytest.raises(ValueError, match='cache is for a folder'): load_images('digits', cache=tmp_path)
    with pytest.raises(ValueError, match='in_memory is for a folder'): load_images('digits', in_memory=False)

def test_folds_and_duplicates_work_on_a_cache(folder, tmp_path):
    in_cache,plain = load(folder, cache=tmp_path/'c'),load(folder)
    for fold in ('1/3', '3/3'):
        a,b = take_fold(in_cache, fold),take_fold(plain, fold)
        assert isinstance(a.test[0], Rows) and torch.equal(a.test[0][:], b.test[0]) and a.files==b.files
    assert exact_groups(in_cache)==exact_groups(plain)==[]

# --- the cache

@pytest.fixture
def noted(monkeypatch):
    "How often files were decoded"
    n,real = [],cache.decode_each
    monkeypatch.setattr(cache, 'decode_each', lambda *args: n.append(1) or real(*args))
    return n

def test_a_second_run_starts_from_the_cache(folder, tmp_path, noted):
    a,b = [load(folder, cache=tmp_path/'c') for _ in range(2)]
    assert len(noted)==1 and torch.equal(a.train[0][:], b.train[0][:])
    assert torch.equal(load(folder, cache=tmp_path/'c', seed=1).train[0][:], load(folder, seed=1).train[0]) and len(noted)==1

@pytest.mark.parametrize('what', ['pixels','header','cut','empty','description','no description','other digest','gone'])
def test_a_damaged_cache_is_found_and_made_again(folder, tmp_path, what, noted):
    load(folder, cache=tmp_path)
    (file,),(about,) = tmp_path.glob('*.npy'),tmp_path.glob('*.json')
    data = bytearray(file.read_bytes())
    if what=='pixels': data[-1] ^= 1
    if what=='header': data[3] ^= 1
    if what=='cut': data = data[:-100]
    if what=='empty': data = b''
    file.write_bytes(data)
    if what=='description': about.write_text('{')
    if what=='no description': about.unlink()
    if what=='other digest': about.write_text(json.dumps(dict(sha256='0'*64, bad=[])))
    if what=='gone': file.unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        images = load(folder, cache=tmp_path)
    assert len(noted)==2 and torch.equal(images.train[0][:], load(folder).train[0])
    assert what in ('gone','no description') or any('is damaged, and is made again' in str(o.message) for o in said)

def test_changed_images_make_a_new_cache(tmp_path, noted):
    root = make_images(tmp_path/'d', n=8)
    load(root, cache=tmp_path/'c')
    for change in (lambda: Image.new('RGB', (32,32)).save(root/'cat/1.png'), lambda: os.utime(root/'cat/2.png', (1,1)),
                   lambda: (root/'cat/3.png').unlink(), lambda: (root/'cat/4.png').rename(root/'cat/40.png')):
        change()
        assert torch.equal(load(root, cache=tmp_path/'c').train[0][:], load(root).train[0])
    assert len(noted)==5
    load(root, cache=tmp_path/'c', interpolation='bilinear')
    assert len(noted)==6

def test_unreadable_files_are_remembered_by_the_cache(tmp_path):
    root = make_images(tmp_path/'d', n=8)
    cut(root/'cat/2.png')
    with pytest.raises(ValueError, match='1 of 16 image files'): load(root, cache=tmp_path/'c')
    for _ in range(2):
        images = load(root, cache=tmp_path/'c', skip_bad=True)
        assert [f.name for f,_ in images.skipped]==['2.png'] and torch.equal(images.train[0][:], load(root, skip_bad=True).train[0])

make = 'import sys; from fclora.data.sources import load_images; print(load_images(sys.argv[1], 32, cache=sys.argv[2], progress=False).train[0][:].sum().item())'
def test_processes_that_make_the_same_cache_do_not_break_each_other(folder, tmp_path):
    made = [subprocess.Popen([sys.executable, '-c', make, folder, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    res = [o.communicate() for o in made]
    assert {o for o,_ in res}=={f'{load(folder).train[0].sum().item()}\n'} and not any(e for _,e in res)
    assert sorted(o.suffix for o in tmp_path.iterdir())==['.json','.lock','.npy']

def test_what_a_killed_process_left_is_removed_and_one_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(cache, 'decode_each', fail)
        with pytest.raises(OSError, match='No space left'): load(folder, cache=tmp_path)
    assert [o.suffix for o in tmp_path.iterdir()]==['.lock']
    key = next(tmp_path.iterdir()).stem
    (tmp_path/f'.{key}.npy.1.tmp').write_bytes(b'half')
    load(folder, cache=tmp_path)
    assert not list(tmp_path.glob('.*'))

def test_a_disk_without_room_is_said_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=1000)))
    with pytest.raises(ValueError, match=r'--cache \S+ needs 0.1 MB, and its disk has 0.0 MB left'): load(folder, cache=tmp_path)

# --- broken in the first epoch

@pytest.fixture
def broken(tmp_path):
    "48 images, one of each class cut short behind its header"
    root = make_images(tmp_path/'d', n=24)
    for c in ('cat','dog'): cut(root/c/'5.png')
    return root

@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_that_turns_out_broken_is_skipped_with_a_warning(broken, workers):
    images = load(broken, in_memory=False, skip_bad=True)
    assert not images.skipped
    dls = get_dls(images, 32, **stats, bs=4, device='cpu', num_workers=workers)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        seen = [sum(len(y) for _,y in dl) for _ in range(2) for dl in (dls.valid, dls[2], dls.train.new(shuffle=False, drop_last=False))]
    assert sum(seen[:3])==sum(seen[3:])==46
    told = [str(o.message) for o in said if '5.png' in str(o.message)]
    assert len(told)==2 and all('truncated' in o and 'it is skipped' in o for o in told)
    assert sum(len(dl.dataset.readable()) for dl in dls)==46

@pytest.mark.parametrize('workers', [0, 2])
def test_otherwise_it_ends_with_one_line_from_the_main_process(broken, workers):
    dls = get_dls(load(broken, in_memory=False), 32, **stats, bs=4, device='cpu', num_workers=workers)
    with pytest.raises(BrokenImage, match=r'cannot read \S+5.png: .*truncated.*--skip-bad') as e:
        for dl in dls: list(dl)
    assert '\n' not in str(e.value)

def test_a_batch_of_broken_files_alone_is_left_out(tmp_path):
    root = make_images(tmp_path/'d', n=6)
    for o in image_files(root/'cat'): cut(o)
    dls = get_dls(load(root, in_memory=False, skip_bad=True), 32, **stats, bs=1, device='cpu', num_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert {len(y) for dl in dls for _,y in dl}=={1} and {int(y[0]) for dl in dls for _,y in dl}=={1}

def assert_same_weights(*runs):
    a,b = [load_file(o/'adapter.safetensors') for o in runs]
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('split,method', [('train','head'), ('valid','uniform'), ('test','head')])
def test_a_run_ends_with_its_state_saved_and_goes_on_when_the_file_is_repaired(tmp_path, split, method):
    root = make_images(tmp_path/'d', n=24)
    bad,run = load(root, in_memory=False).files[split][-1],tmp_path/'run'
    whole = bad.read_bytes()
    ask = dict(quick, data=str(root), method=method, head='fresh', cutmix=1., keep='best')
    finetune(**ask, out=tmp_path/'straight')
    cut(bad)
    with pytest.raises(BrokenImage, match=rf'{bad.name}: .*what was done is kept, and fclora resume {run} goes on'): finetune(**ask, out=run)
    assert list((run/'checkpoints').glob('*.safetensors'))
    bad.write_bytes(whole)
    resume(run, quiet=True)
    assert_same_weights(run, tmp_path/'straight')

def test_a_run_with_skip_bad_lists_what_it_skipped_and_one_without_can_go_on_so(broken, tmp_path, capsys):
    ask = dict(quick, data=str(broken))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        finetune(**ask, skip_bad=True, out=tmp_path/'skipped')
    assert sum('it is skipped' in str(o.message) for o in said)==2
    listed = json.loads((tmp_path/'skipped/metrics.json').read_text())['skipped']
    assert len(listed)==2 and all('5.png' in o for o in listed)
    with pytest.raises(BrokenImage, match='cannot read'): finetune(**ask, out=tmp_path/'run') # by the first pass over the images, before the first step
    resume(tmp_path/'run', skip_bad=True, quiet=True)
    assert_same_weights(tmp_path/'run', tmp_path/'skipped')

def test_the_command_says_it_in_one_line(broken, tmp_path):
    res = fclora('finetune', broken, '--model', 'vit_pico', '--no-in-memory', '--quiet', '--out', tmp_path/'run')
    assert res.returncode==1 and res.stderr.count('\n')==1 and '5.png: image file is truncated' in res.stderr and 'fclora resume' in res.stderr

# --- shards

webdataset = pytest.importorskip('webdataset')

def write_shards(root, names=('train-000','train-001'), n=8, label=lambda i: dict(cls=i%2)):
    root.mkdir(exist_ok=True)
    for k,name in enumerate(names):
        with webdataset.TarWriter(str(root/f'{name}.tar')) as sink:
            for i in range(n):
                px = np.random.default_rng(100*k+i).normal(80+100*(i%2), 20, (32,32,3)).clip(0, 255).astype('uint8')
                sink.write({'__key__':f'{k:02}{i:04}', 'png':Image.fromarray(px), **label(i)})
    return root

def test_shards_are_images_like_any_other(tmp_path):
    root = write_shards(tmp_path/'s', ('train-000','train-001','val-000'))
    found = [load(f'{root}/'+'{train-{000..001},val-000}.tar', **o) for o in (dict(), dict(in_memory=False), dict(cache=tmp_path/'c'))]
    for o in found:
        assert o.vocab==['0','1'] and len(o.valid[1])==8 and len(o.train[1])+len(o.test[1])==16
        for dl in get_dls(o, 32, **stats, bs=4, device='cpu', num_workers=2):
            for x,y in dl: assert ((x.mean((1,2,3))>0)==y.bool()).all()
        assert exact_groups(o)==[]
    seen = {f.name for o in found[0].files.values() for f in o}
    with webdataset.WebDataset([str(o) for o in sorted(root.iterdir())], shardshuffle=False) as ds: assert seen=={f"{o['__key__']}.png" for o in ds}

def test_bad_shards_are_one_clear_error(tmp_path):
    root = write_shards(tmp_path/'s')
    whole,second = (root/'train-001.tar').read_bytes(),root/'train-001.tar'
    for n in (0, 100, 1000, len(whole)//2):
        second.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='the shard .*train-001.tar'): load(f'{root}/*.tar')
    import gzip
    second.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match='uncompressed'): load(f'{root}/*.tar')
    second.unlink()
    with pytest.raises(FileNotFoundError, match='1 of 2 shards'): load(f'{root}/train-'+'{000..001}.tar')
    with pytest.raises(FileNotFoundError, match='no shard'): load(f'{tmp_path}/*.tar')

def test_labels_of_shards(tmp_path):
    a = load(write_shards(tmp_path/'a', label=lambda i: dict(json=dict(label='cat' if i%2 else 'dog')))/'*.tar')
    assert a.vocab==['cat','dog']
    several = write_shards(tmp_path/'b', n=20, label=lambda i: dict(json=dict(labels=['wet','cat'] if i%2 else ['cat','dry'])))/'*.tar'
    assert load(several, multi_label=True).vocab==['cat','dry','wet']
    with pytest.raises(ValueError, match='--multi-label'): load(several)
    with pytest.raises(ValueError, match='no label'): load(write_shards(tmp_path/'c', label=lambda i: {})/'*.tar')
    with pytest.raises(ValueError, match='the label of 000000 is unreadable'): load(write_shards(tmp_path/'d', label=lambda i: dict(json=b'{'))/'*.tar')

def test_a_broken_image_in_a_shard_is_named(tmp_path):
    root = write_shards(tmp_path/'s')
    one = load(f'{root}/*.tar', in_memory=False).files['train'][0]
    with open(one.file, 'r+b') as f:
        f.seek(one.offset)
        f.write(b'damage')
    with pytest.raises(ValueError, match=f'1 of 16 image files .*{one.name}'): load(f'{root}/*.tar', in_memory=False)
    assert len(load(f'{root}/*.tar', skip_bad=True).skipped)==1

def test_a_run_on_shards_finds_them_again(tmp_path, monkeypatch):
    write_shards(tmp_path/'s', n=16)
    monkeypatch.chdir(tmp_path)
    run = finetune(**quick|dict(data='s/train-{000..001}.tar', epochs=1, method='head'))
    assert str(next((tmp_path/'runs').iterdir()).name)=='train-head-1' and run.config['data']['name']=='train'
    from fclora.runs.evaluate import evaluate
    assert evaluate(str(tmp_path/'runs/train-head-1'), quiet=True)

# --- a million names

def test_names_take_little_memory_and_no_file_is_opened(monkeypatch):
    import tracemalloc
    from fclora.data.folders import list_files
    from fclora.data.images import split_images
    files = {f'c{c:03}':[Path(f'/no/such/c{c:03}/{i:06}.jpg') for i in range(200)] for c in range(100)}
    tracemalloc.start()
    splits = sources.class_splits(dict(train=files), 'made')
    listed,targs,rows = list_files(splits)
    images = split_images('made', list(files), listed, targs, rows, files=listed)
    _,most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most/20_000<1000 # bytes a name
    assert [torch.bincount(y).unique().tolist() for _,y in images.splits.values()]==[[128],[32],[40]]

def test_files_come_in_the_order_of_their_paths(tmp_path):
    for o in ('b/1.png','a/z/2.png','a/10.png','a/9.png','a-b/1.png','a/z.png','a.b/x.png'):
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/o).touch()
    assert image_files(tmp_path)==sorted(image_files(tmp_path)) and len(image_files(tmp_path))==7
