"Every source, every kind of image and every mistake that the data modules must survive"
import hashlib, pickle, random, sys, tarfile, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from fastai.data.transforms import get_files
from fastai.torch_core import TensorImage
from fasttransform import Pipeline
from torch import nn, Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from fclora.data.images import stratified_split
from fclora.data.loaders import get_dls, input_tfms, score_dl
from fclora.data.pixels import decode, image_files, image_suffixes, load_batch, read_image, square_resize, to_input
from fclora.data.sources import find_splits, load_images

mean,std = (.5,.4,.3),(.2,.25,.3)
quiet = partial(load_images, progress=False)
plain = lambda x: x.as_subclass(Tensor)

def noise(seed, h=20, w=20): return np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)

def make(root, classes=('ant','bee'), n=8, size=(20,20), seed=0):
    "`n` PNG of noise in each class folder"
    for j,c in enumerate(classes):
        (root/c).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(noise(seed+100*j+i, *size)).save(root/c/f'{i:02}.png')
    return root

def cut(path, share=.6):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data)*share)])

def err(path, *pieces, exc=ValueError, **kw):
    with pytest.raises(exc) as e: quiet(path, **kw)
    msg = str(e.value)
    assert '\n' not in msg
    for o in pieces: assert str(o) in msg, msg

def all_pixels(images): return torch.cat([o for o,_ in (images.train, images.valid, images.test)])

# Splits

@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.floats(.01, .99), st.integers(0, 5))
def test_split_properties(counts, pct, seed):
    targs = np.repeat(np.arange(len(counts)), counts)
    kept,held = stratified_split(targs, pct, seed)
    assert sorted([*kept, *held]) == list(range(len(targs)))
    for c,n in enumerate(counts):
        k = (targs[held]==c).sum()
        assert 1<=k<=n-1 and (abs(k-n*pct)<=1 or k in (1,n-1))
    assert all(np.array_equal(a, b) for a,b in zip((kept,held), stratified_split(targs, pct, seed)))

@pytest.mark.parametrize('pct', [0, 1, -.1, 2])
def test_split_share(pct):
    with pytest.raises(ValueError, match='between 0 and 1'): stratified_split([0,0,1,1], pct)

# Sources

def test_digits():
    o = quiet('digits')
    assert [len(y) for _,y in (o.train, o.valid, o.test)] == [862,216,719] and not o.flip
    assert o.vocab == [str(i) for i in range(10)] and o.train[0].dtype==torch.uint8 and o.train[0].max()==255
    assert all(set(y.tolist())==set(range(10)) for _,y in (o.train, o.valid, o.test))
    assert torch.equal(o.train[0], quiet('digits').train[0]) and not torch.equal(o.train[0], quiet('digits', seed=1).train[0])

def pack_cifar(cls, folder, fine):
    "A tiny archive in the format of `cls`, and its checksums"
    src = folder/cls.base_folder; src.mkdir(parents=True)
    md5 = lambda p: hashlib.md5(p.read_bytes()).hexdigest()
    rng,key = np.random.default_rng(0),'fine_labels' if fine else 'labels'
    lists = []
    for names in ([o[0] for o in cls.train_list], [o[0] for o in cls.test_list]):
        for n in names: (src/n).write_bytes(pickle.dumps({'data':rng.integers(0, 256, (20,3072), dtype=np.uint8), key:[0,1]*10}))
        lists.append([[n, md5(src/n)] for n in names])
    (src/cls.meta['filename']).write_bytes(pickle.dumps({cls.meta['key']:['auto','bird']}))
    with tarfile.open(folder/cls.filename, 'w:gz') as t: t.add(src, cls.base_folder)
    return dict(train_list=lists[0], test_list=lists[1], tgz_md5=md5(folder/cls.filename),
                meta={**cls.meta, 'md5':md5(src/cls.meta['filename'])})

@pytest.fixture
def server(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    (tmp_path/'www').mkdir()
    srv = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path/'www')))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield tmp_path/'www', f'http://127.0.0.1:{srv.server_port}'
    srv.shutdown(); srv.server_close()

@pytest.mark.parametrize('name,cls', [('cifar10',CIFAR10), ('cifar100',CIFAR100)])
def test_cifar_download(name, cls, server, tmp_path, monkeypatch):
    folder,url = server
    for k,v in dict(pack_cifar(cls, folder, name=='cifar100'), url=f'{url}/{cls.filename}').items(): monkeypatch.setattr(cls, k, v)
    o = quiet(name, data_root=tmp_path/'root')
    n = 20*len(cls.train_list)
    assert (tmp_path/'root'/cls.base_folder).is_dir() and o.vocab==['auto','bird'] and o.flip
    assert [len(y) for _,y in (o.train, o.valid, o.test)] == [n*8//10, n*2//10, 20]
    raw = pickle.loads((folder/cls.base_folder/cls.test_list[0][0]).read_bytes())['data']
    assert torch.equal(o.test[0], torch.tensor(raw).view(-1,3,32,32)) and o.test[1].tolist()==[0,1]*10

def test_cifar_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, 'url', 'http://127.0.0.1:9/cifar-10-python.tar.gz')
    err('cifar10', 'cannot get cifar10', 'refused', f'place cifar-10-python.tar.gz in {tmp_path}', 'digits', exc=ConnectionError, data_root=tmp_path)

def test_cifar_wrong_checksum(server, tmp_path, monkeypatch):
    folder,url = server
    (folder/CIFAR10.filename).write_bytes(b'not the archive')
    monkeypatch.setattr(CIFAR10, 'url', f'{url}/{CIFAR10.filename}')
    err('cifar10', 'corrupted', 'place cifar-10-python.tar.gz', exc=ConnectionError, data_root=tmp_path/'root')

def test_bare_folder(tmp_path):
    o = quiet(make(tmp_path/'bugs', n=10))
    assert o.name=='bugs' and o.vocab==['ant','bee'] and 'split off train: test 20%, valid 20%' in repr(o)
    assert [len(y) for _,y in (o.train, o.valid, o.test)] == [13,3,4]
    assert len(all_pixels(o).flatten(1).unique(dim=0))==20
    for x,y in (o.train, o.valid, o.test):
        for xi,yi in zip(x, y): assert any(np.array_equal(xi.permute(1,2,0), noise(100*yi.item()+i)) for i in range(10))

@pytest.mark.parametrize('val', ['val', 'valid'])
def test_split_folders(tmp_path, val):
    for i,(k,n) in enumerate(dict(train=5, test=3, **{val:2}).items()): make(tmp_path/k, n=n, seed=1000*i)
    o = quiet(tmp_path)
    assert [len(y) for _,y in (o.train, o.valid, o.test)] == [10,4,6] and o.notes==[]

def test_train_test(tmp_path):
    make(tmp_path/'train', n=10); make(tmp_path/'test', n=3)
    o = quiet(tmp_path)
    assert [len(y) for _,y in (o.train, o.valid, o.test)] == [16,4,6]

def test_train_val_only(tmp_path):
    make(tmp_path/'train', n=10); make(tmp_path/'val', n=3)
    o = quiet(tmp_path)
    assert [len(y) for _,y in (o.train, o.valid, o.test)] == [16,6,4] and 'split off train: test 20%' in repr(o)

def test_class_missing_in_val(tmp_path):
    make(tmp_path/'train', n=4); make(tmp_path/'test', n=2); make(tmp_path/'val', classes=['bee'], n=2)
    assert quiet(tmp_path).valid[1].tolist()==[1,1]

def test_hidden_nested_other(tmp_path):
    make(tmp_path, n=4); make(tmp_path/'ant', classes=['deep'], n=2, seed=50); make(tmp_path, classes=['.cache'], n=2)
    (tmp_path/'ant'/'.hidden.png').write_bytes(b'x'); (tmp_path/'ant'/'labels.csv').write_text('x')
    Image.fromarray(noise(1)).save(tmp_path/'bee'/'UPPER.JPG')
    splits = find_splits(tmp_path)
    assert {c:len(o) for c,o in splits['train'].items()} == dict(ant=6, bee=5)
    assert len(all_pixels(quiet(tmp_path)))==11

# Bad input

def test_no_folder(tmp_path):
    make(tmp_path/'flowers')
    err(tmp_path/'flower', 'did you mean', tmp_path/'flowers', exc=FileNotFoundError)
    err('cifar1O', 'did you mean cifar10', exc=FileNotFoundError)
    err('/nowhere/at/all', 'data sets: digits', exc=FileNotFoundError)
    err(tmp_path/'flowers'/'ant'/'00.png', 'is a file')

def test_no_images(tmp_path):
    err(tmp_path, 'no images')
    Image.fromarray(noise(0)).save(tmp_path/'loose.png')
    err(tmp_path, 'no images', 'give each class a folder')
    (tmp_path/'ant').mkdir()
    err(tmp_path, 'no images')

@pytest.mark.parametrize('n,ok', [(1,False), (2,False), (3,True)])
def test_few_images_one_pool(tmp_path, n, ok):
    make(tmp_path, n=5); make(tmp_path, classes=['wasp'], n=n, seed=900)
    if ok: assert len(quiet(tmp_path).vocab)==3
    else: err(tmp_path, f'wasp ({n})', 'needs 3')

@pytest.mark.parametrize('n,ok', [(0,False), (1,False), (2,True)])
def test_few_images_with_test(tmp_path, n, ok):
    make(tmp_path/'train'); make(tmp_path/'test'); make(tmp_path/'test', classes=['wasp'], n=1); make(tmp_path/'train', classes=['wasp'], n=n)
    if ok: assert len(quiet(tmp_path).vocab)==3
    else: err(tmp_path, f'wasp ({n})', 'needs 2')

def test_classes_differ(tmp_path):
    make(tmp_path/'train', classes=['ant','bee','cow']); make(tmp_path/'test', classes=['ant','bee','dog'])
    err(tmp_path, 'only in train: cow', 'only in test: dog')
    make(tmp_path/'test', classes=['cow']+[f'x{i}' for i in range(8)], n=1)
    err(tmp_path, 'dog, x0, x1, x2, x3 and 4 more')

def test_class_only_in_val(tmp_path):
    make(tmp_path/'train'); make(tmp_path/'test'); make(tmp_path/'val', classes=['ant','emu'])
    err(tmp_path, 'only in valid: emu')

def test_test_without_train(tmp_path):
    make(tmp_path/'test')
    err(tmp_path, 'test/', 'no train/')

def test_corrupt(tmp_path):
    make(tmp_path); cut(tmp_path/'ant'/'03.png'); (tmp_path/'bee'/'01.png').write_bytes(b'junk'); (tmp_path/'bee'/'02.png').write_bytes(b'')
    err(tmp_path, '3 of 16', 'ant/03.png (', 'bee/01.png (not an image', 'bee/02.png', '--skip-bad')
    o = quiet(tmp_path, skip_bad=True)
    assert sorted(p.name for p,_ in o.skipped)==['01.png','02.png','03.png'] and len(all_pixels(o))==13 and 'skipped: 3' in repr(o)
    for x,y in (o.train, o.valid, o.test):
        for xi,yi in zip(x, y): assert any(np.array_equal(xi.permute(1,2,0), noise(100*yi.item()+i)) for i in range(8))

def test_truncated_jpeg(tmp_path):
    make(tmp_path); p = tmp_path/'ant'/'big.jpg'
    Image.fromarray(noise(5, 200, 200)).save(p); cut(p)
    err(tmp_path, 'ant/big.jpg (', 'truncated')

def test_many_corrupt(tmp_path):
    make(tmp_path)
    for p in tmp_path.rglob('*.png'): cut(p, .3)
    err(tmp_path, '16 of 16', 'and 11 more')
    err(tmp_path, 'no images', skip_bad=True)

def test_skip_bad_leaves_too_few(tmp_path):
    make(tmp_path, n=3); cut(tmp_path/'bee'/'00.png', .3)
    err(tmp_path, 'bee (2)', skip_bad=True)

# Kinds of images

def grey16(x): return Image.fromarray(x.astype(np.uint16)*257)

@pytest.mark.parametrize('mode,ext', [('1','png'), ('L','png'), ('LA','png'), ('P','png'), ('P','gif'), ('RGB','png'), ('RGBA','png'), ('RGB','bmp'),
                                      ('RGBA','webp'), ('CMYK','tiff'), ('CMYK','jpg'), ('I;16','png'), ('I;16','tiff'), ('L','jpg')])
def test_modes(tmp_path, mode, ext):
    img = grey16(noise(0)[...,0]) if mode=='I;16' else Image.fromarray(noise(0)).convert(mode)
    img.save(tmp_path/f'a.{ext}', **(dict(lossless=True) if ext=='webp' else {}))
    res = read_image(tmp_path/f'a.{ext}')
    assert res.mode=='RGB' and res.size==(20,20)
    if ext in ('jpg','gif') or mode in ('CMYK',): return
    want = noise(0)[...,:1].repeat(3, -1) if mode=='I;16' else np.asarray(img.convert('RGB'))
    assert np.array_equal(np.asarray(res), want)

def test_transparency_is_white(tmp_path):
    rgba = Image.new('RGBA', (4,4), (255,0,0,0)); rgba.putpixel((0,0), (255,0,0,255)); rgba.putpixel((1,0), (0,0,0,128))
    p = Image.new('P', (4,4), 1); p.putpalette([0,0,255, 9,9,9]); p.putpixel((0,0), 0); p.info['transparency'] = 1
    for i,(img,px) in enumerate([(rgba,(255,0,0)), (p,(0,0,255)), (Image.new('LA', (4,4), (0,0)),(255,)*3)]):
        img.save(tmp_path/f'{i}.png')
        res = read_image(tmp_path/f'{i}.png')
        assert res.getpixel((0,0))==px and res.getpixel((3,3))==(255,255,255)
    assert read_image(tmp_path/'0.png').getpixel((1,0))==(127,127,127)

def test_exif(tmp_path):
    img = Image.fromarray(noise(0, 10, 20)); exif = img.getexif(); exif[0x0112] = 6
    img.save(tmp_path/'a.png', exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path/'a.png')), np.rot90(noise(0, 10, 20), -1))

def test_decode_square():
    assert decode(Image.fromarray(noise(0, 10, 21)))[0].shape==(3,10,10)
    assert decode(Image.fromarray(noise(0, 300, 200)), 64)[0].shape==(3,64,64)
    assert square_resize(torch.full((3,5,9), 77, dtype=torch.uint8), 32).unique().tolist()==[77]

@pytest.mark.parametrize('mode', ['bicubic','bilinear'])
def test_resizing_is_close_to_pillow(mode):
    x = noise(0, 90, 90); r = dict(bicubic=Image.BICUBIC, bilinear=Image.BILINEAR)[mode]
    for s in (32, 128):
        want = torch.tensor(np.asarray(Image.fromarray(x).resize((s,s), r)).astype(int)).permute(2,0,1)
        assert (square_resize(torch.tensor(x).permute(2,0,1), s, mode).int()-want).abs().max()<=1

# Loaders

@pytest.fixture(params=['same', 'large', 'mixed'])
def folder(request, tmp_path):
    if request.param=='same': return make(tmp_path, size=(20,26))
    if request.param=='large': return make(tmp_path, size=(60,48))
    make(tmp_path, n=8); return make(tmp_path, n=4, size=(50,70), seed=7)

def test_lazy_equals_cached_equals_load_batch(folder):
    cached,lazy = quiet(folder, size=32),quiet(folder, size=32, in_memory=False)
    assert isinstance(cached.train[0], Tensor) and isinstance(lazy.train[0], list) and 'on the fly' in repr(lazy)
    a,b,c = [get_dls(o, 32, mean, std, bs=4, device='cpu', num_workers=w) for o,w in ((cached,0), (lazy,0), (lazy,2))]
    for i in range(3):
        for (xa,ya),(xb,yb),(xc,yc) in zip(a[i], b[i], c[i], strict=True):
            assert torch.equal(xa, xb) and torch.equal(xa, xc) and torch.equal(ya, yb) and torch.equal(ya, yc)
    x,bad = load_batch(lazy.test[0], 32, mean, std)
    assert bad==[] and torch.equal(x, torch.cat([plain(o) for o,_ in a[2]])) and type(x) is Tensor

def test_mixed_sizes_without_target_size(tmp_path):
    make(tmp_path, n=8); make(tmp_path, n=4, size=(50,70))
    assert isinstance(quiet(tmp_path).train[0], list)

@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'nearest'])
def test_to_input_is_the_pipeline_of_the_loaders(interpolation):
    for size,side in ((32,8), (32,32), (24,57)):
        x = torch.from_numpy(np.stack([noise(i, side, side) for i in range(5)])).permute(0,3,1,2)
        want = Pipeline(input_tfms(size, mean, std, interpolation))(TensorImage(x))
        assert torch.equal(to_input(x, size, mean, std, interpolation), plain(want))

def test_image_files_are_those_that_fastai_finds(tmp_path):
    make(tmp_path/'a', n=2); make(tmp_path/'a', classes=['.hidden','deep/er'], n=1); make(tmp_path/'b', classes=['linked'], n=1)
    (tmp_path/'a'/'link').symlink_to(tmp_path/'b', target_is_directory=True)
    for o in ('UPPER.JPG','.hidden.png','none.csv','no_suffix'): (tmp_path/'a'/o).write_bytes(b'x')
    want = sorted(get_files(tmp_path/'a', extensions=image_suffixes()))
    assert len(want)==7 and image_files(tmp_path/'a')==want

def test_load_batch_bad(tmp_path):
    make(tmp_path); cut(tmp_path/'ant'/'01.png', .3)
    x,bad = load_batch([tmp_path/'ant'/'00.png', tmp_path/'ant'/'01.png', tmp_path/'none.png', tmp_path/'ant', tmp_path/'bee'/'00.png'], 16, mean, std)
    assert x.shape==(2,3,16,16) and [p.name for p,_ in bad]==['01.png','none.png','ant'] and 'No such file' in bad[1][1]
    x,bad = load_batch([tmp_path/'none.png'], 16, mean, std)
    assert x.shape==(0,3,16,16) and len(bad)==1

def test_pixels_are_normalised(tmp_path):
    images = quiet(make(tmp_path))
    dls = get_dls(images, 20, mean, std, device='cpu', flip=False)
    want = (images.test[0].float()/255-torch.tensor(mean).view(3,1,1))/torch.tensor(std).view(3,1,1)
    x,y = dls[2].one_batch()
    torch.testing.assert_close(plain(x), want)
    assert y.tolist()==images.test[1].tolist() and x.device.type=='cpu'

def test_seeds():
    images = quiet('digits')
    def run(seed):
        dls = get_dls(images, 8, mean, std, seed=seed, flip=True, device='cpu')
        return [plain(torch.cat([x for x,_ in dls.train])) for _ in range(2)]
    random.seed(1); state = random.getstate(),torch.get_rng_state(),np.random.get_state()[1].tolist()
    a = run(0)
    assert (random.getstate(),np.random.get_state()[1].tolist())==(state[0],state[2]) and torch.equal(torch.get_rng_state(), state[1])
    random.seed(2); torch.manual_seed(2)
    b,c = run(0),run(1)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], c[0])

def test_epoch_covers_training(tmp_path):
    images = quiet(make(tmp_path, n=20))
    dls = get_dls(images, 20, mean, std, bs=10, device='cpu', flip=False)
    assert len(dls.train)==2 and [len(y) for _,y in dls.train]==[10,10]
    small = get_dls(images, 20, mean, std, bs=500, device='cpu')
    assert [len(y) for _,y in small.train]==[len(images.train[1])]
    seen = plain(torch.cat([x for x,_ in score_dl(dls, bs=7)]))
    assert len(seen.flatten(1).unique(dim=0))==len(images.train[1])

def mirrored(dl, x):
    "For each image of `dl`: is it in `x`, and is its mirror image"
    rows = lambda o: {r.numpy().tobytes() for r in o}
    have,flip = rows(x),rows(x.flip(-1))
    out = [r.numpy().tobytes() for b,_ in dl for r in plain(b)]
    return sum(o in have for o in out),sum(o in flip for o in out)

def test_flip_only_in_training(tmp_path):
    images = quiet(make(tmp_path, n=40))
    dls = get_dls(images, 20, (0,)*3, (1,)*3, bs=8, device='cpu')
    pix = [o.float()/255 for o,_ in (images.train, images.valid, images.test)]
    same,flip = mirrored(dls.train, pix[0])
    assert same+flip==48 and 12<flip<36
    for dl,x in ((dls.valid,pix[1]), (dls[2],pix[2]), (score_dl(dls),pix[0])): assert mirrored(dl, x)==(len(x),0)
    off = get_dls(images, 20, (0,)*3, (1,)*3, bs=8, device='cpu', flip=False)
    assert mirrored(off.train, pix[0])==(48,0)

def test_score_dl_does_not_touch_training():
    images = quiet('digits')
    a,b = [get_dls(images, 8, mean, std, flip=True, device='cpu') for _ in range(2)]
    first = [y.tolist() for _,y in score_dl(a, seed=5)]
    assert first==[y.tolist() for _,y in score_dl(b, seed=5)] and first!=[y.tolist() for _,y in score_dl(b, seed=6)]
    c = get_dls(images, 8, mean, std, flip=True, device='cpu')
    for (xa,_),(xc,_) in zip(a.train, c.train, strict=True): assert torch.equal(xa, xc)
    assert a.train_ds.split_idx==0

def test_fastai_learner(tmp_path):
    import matplotlib; matplotlib.use('agg')
    from fastai.vision.all import ClassificationInterpretation, Learner, CrossEntropyLossFlat, accuracy
    for lazy in (False, True):
        images = quiet(make(tmp_path, n=12), in_memory=not lazy)
        dls = get_dls(images, 20, mean, std, bs=4, device='cpu')
        assert dls.c==2 and list(dls.vocab)==['ant','bee']
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(1200, 2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
            for i in range(3):
                preds,targs = learn.get_preds(ds_idx=i)
                assert len(preds)==len(targs)==len(dls[i].dataset)
            assert targs.tolist()==images.test[1].tolist()
            files = [tmp_path/'ant'/'00.png', tmp_path/'bee'/'00.png']
            preds,_ = learn.get_preds(dl=dls.test_dl(files))
            x,_ = load_batch(files, 20, mean, std)
            torch.testing.assert_close(preds, learn.model(x).softmax(-1).detach())
            label,_,probs = learn.predict(files[0])
            assert label in ('ant','bee') and torch.allclose(probs, preds[0])
            learn.show_results(max_n=4); dls.show_batch(max_n=4); dls[2].show_batch(max_n=2)
            interp = ClassificationInterpretation.from_learner(learn, ds_idx=2)
            assert interp.confusion_matrix().sum()==len(images.test[1])
            interp.plot_top_losses(3)
        assert len(dls.new_empty().train_ds)==0
        matplotlib.pyplot.close('all')

def test_vanished_file_is_named(tmp_path):
    images = quiet(make(tmp_path), in_memory=False)
    images.valid[0][0].unlink()
    with pytest.raises(OSError, match='cannot read .*No such file'): list(get_dls(images, 20, mean, std, bs=4, device='cpu').valid)

def test_bar_on_a_terminal_only(tmp_path, capsys, monkeypatch):
    load_images(make(tmp_path)); assert capsys.readouterr().err==''
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    load_images(tmp_path); assert 'reading images' in capsys.readouterr().err
    quiet(tmp_path); assert capsys.readouterr().err==''
