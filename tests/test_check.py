"A look at the data: what is found, what is not, and a page that can be trusted"
import io, json, os, re, warnings
import datasets, imagehash, numpy as np, pytest, torch
from cleanlab.filter import find_label_issues
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from fclora.data.duplicates import across_splits, difference_hash, exact_groups, near_pairs, quick_look
from fclora.data.sources import load_images
from fclora.probes.suspects import held_out_probs, suspects
from fclora.runs.check import check
from fclora.runs.finetune import finetune

pytestmark = pytest.mark.usefixtures('one_thread')
datasets.disable_progress_bars()

def spots(seed, size=64):
    "A soft colourful picture"
    px = np.random.default_rng(seed).integers(0, 256, (6,6,3), dtype=np.uint8)
    return Image.fromarray(px).resize((size,size), Image.BICUBIC)

def pixels(img): return torch.tensor(np.array(img)).permute(2, 0, 1)
def jpeg(img, quality=40):
    file = io.BytesIO(); img.save(file, 'JPEG', quality=quality)
    return Image.open(file).convert('RGB')

@pytest.fixture
def folder(tmp_path):
    "train/ and test/ of two classes, every picture another"
    for k,n in dict(train=20, test=6).items():
        for i in range(n):
            (tmp_path/'d'/k/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
            spots(1000*(k=='test')+i).save(tmp_path/'d'/k/'ab'[i%2]/f'{i:02}.png')
    return tmp_path/'d'

def look(folder, **kw): return check(str(folder), labels=False, quiet=True, out=str(folder.parent/'page.html'), **kw)

# Duplicates

@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_the_hash_is_that_of_imagehash(seed):
    assert np.array_equal(difference_hash(spots(seed)), imagehash.dhash(spots(seed)).hash.ravel())

@pytest.mark.parametrize('change', [jpeg, lambda o: o.resize((32,32)), lambda o: o.point(lambda v: int(.9*v)), lambda o: o.resize((40,40)).resize((90,90))],
                         ids=['jpeg','smaller','darker','resized'])
def test_copies_are_near_and_other_pictures_are_not(change):
    items = [pixels(spots(i)) for i in range(40)]+[pixels(change(spots(i))) for i in range(0, 40, 4)]
    assert near_pairs(items)==[(4*k,40+k) for k in range(10)]==near_pairs(items, rows=7)

def test_same_structure_in_other_colours_is_not_near():
    red = Image.merge('RGB', (spots(0).convert('L'), *[Image.new('L', (64,64))]*2))
    blue = Image.merge('RGB', (*red.split()[1:], red.split()[0]))
    assert near_pairs([pixels(red), pixels(blue)], bits=64)==[] and near_pairs([pixels(red)]*2)==[(0,1)]

def test_flat_pictures_are_told_apart_by_nothing_but_are_few_bits():
    "Brightness is taken off, so flat greys look the same; flat colours do not"
    flat = [torch.full((3,20,20), v, dtype=torch.uint8) for v in (10,200)]
    green = torch.zeros(3, 20, 20, dtype=torch.uint8); green[1] = 255
    assert near_pairs([*flat, green])==[(0,1)]

def test_the_same_file_in_two_splits_and_in_one(folder):
    for name,place in {'again.png':'test/a', 'twice.png':'train/b'}.items(): (folder/place/name).write_bytes((folder/'train/a/00.png').read_bytes())
    res = look(folder)
    group, = res['exact']
    assert group['leak'] and group['clash'] and len(group['names'])==3 and {'again.png','twice.png','00.png'}=={n.rsplit('/')[-1] for n in group['names']}
    assert res['near']==[]   # what is the same to the byte is not said again
    images = load_images(folder, progress=False)
    assert len(across_splits(exact_groups(images)))==1 and '1 IN TWO SPLITS' in quick_look(images)

def test_a_copy_in_another_format_is_near(folder):
    spots(0).save(folder/'test/b/copy.webp', quality=60)
    res = look(folder)
    assert res['exact']==[] and [o['leak'] for o in res['near']]==[True] and res['near'][0]['clash']

def test_files_that_are_not_in_memory_and_datasets_are_compared_too(folder):
    (folder/'test/a/again.png').write_bytes((folder/'train/a/00.png').read_bytes())
    lazy = load_images(folder, 64, in_memory=False, progress=False)
    assert isinstance(lazy.train[0], list) and [[k for k,_ in g] for g in exact_groups(lazy)] in ([['train','test']], [['valid','test']])
    ds = datasets.Dataset.from_dict(dict(image=[spots(i%7) for i in range(14)], label=['a','b']*7),
                                    datasets.Features(image=datasets.Image(), label=datasets.Value('string')))
    ds.save_to_disk(folder.parent/'ds')
    assert len(exact_groups(load_images(folder.parent/'ds', 64, in_memory=False, progress=False)))==7
    assert len(look(folder.parent/'ds')['exact'])==7

def test_nothing_wrong_is_said_to_be_nothing(folder, capsys):
    res = look(folder)
    assert res['exact']==res['near']==res['unreadable']==[] and res['labels'] is None and res['sizes']=='64 x 64'
    out = capsys.readouterr().out
    assert re.search(r'the same picture again +none', out) and re.search(r'unreadable +0', out)
    assert 'no exact duplicate in two splits' in quick_look(load_images(folder, progress=False))

def test_unreadable_files_and_sizes_are_listed(folder):
    (folder/'train/a/bad.png').write_bytes(b'junk')
    spots(77, 90).crop((0,0,90,50)).save(folder/'train/b/wide.png')
    res = look(folder)
    assert [(o.rsplit('/')[-1],why) for o,why in res['unreadable']]==[('bad.png','not an image that Pillow knows')]
    assert res['sizes']=='64 x 64 to 90 x 50' and sum(res['counts']['train'].values())+sum(res['counts']['valid'].values())==21

# Labels

@given(st.integers(0, 10**6), st.integers(2, 5), st.floats(.2, 3))
@example(28840, 5, 2.)
@settings(deadline=None, max_examples=40)
def test_suspects_are_those_of_cleanlab(seed, c, sharp):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(c), rng.integers(0, c, 60)])
    z = rng.normal(size=(len(y), c))*sharp; z[np.arange(len(y)),y] += 1
    probs = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        want = find_label_issues(y, probs, filter_by='confident_learning', n_jobs=1)
    got = suspects(torch.tensor(probs), torch.tensor(y))
    assert sorted(i for i,_,_ in got)==np.flatnonzero(want).tolist()
    assert [p for _,_,p in got]==sorted(p for _,_,p in got)

def test_held_out_probabilities_are_in_the_order_of_the_images():
    y = torch.arange(60)%3
    X = torch.nn.functional.one_hot(y, 3).float()[:,None]+.1*torch.randn(60, 1, 3, generator=torch.Generator().manual_seed(0))
    probs = held_out_probs(X, y, 3)
    assert torch.equal(probs.argmax(1), y) and torch.allclose(probs.sum(1), torch.ones(60))
    y2 = y.clone(); y2[7] = (y[7]+1)%3
    assert suspects(held_out_probs(X, y2, 3), y2)[0][:2]==(7, y[7].item())

def test_wrong_labels_of_a_folder_are_found_by_the_command(tmp_path, capsys):
    for c,grey in dict(dark=60, light=190).items():
        for i in range(15):
            (tmp_path/'d'/c).mkdir(parents=True, exist_ok=True)
            px = np.random.default_rng(i+grey).normal(grey, 30, (32,32,3)).clip(0, 255).astype('uint8')
            Image.fromarray(px).save(tmp_path/'d'/c/f'{i}.png')
    (tmp_path/'d/dark/3.png').rename(tmp_path/'d/light/wrong.png')
    res = check(str(tmp_path/'d'), model='vit_pico', quiet=True, out=str(tmp_path/'page.html'))
    assert [(os.path.basename(o['names'][0]),o['label'],o['suggested']) for o in res['labels']]==[('wrong.png','light','dark')]
    assert 'light → dark?' in (tmp_path/'page.html').read_text(encoding='utf-8')

# The page

def test_the_page_is_escaped_self_contained_and_small(folder):
    evil = '<script>alert(1)<'
    os.rename(folder/'train/a', folder/'train'/evil); os.rename(folder/'test/a', folder/'test'/evil)
    (folder/'train'/evil/'<img src=x>.png').write_bytes((folder/'test/b/01.png').read_bytes())
    (folder/'train/b/<b>.png').write_bytes(b'junk')
    look(folder)
    page = (folder.parent/'page.html').read_text(encoding='utf-8')
    assert '<script' not in page and '<img src=x' not in page and '<b>.png' not in page and '&lt;script&gt;' in page
    assert not re.search(r'(?:src|href)="(?!data:)', page) and len(page)<2e6 and "default-src 'none'" in page

def test_only_some_of_many_findings_are_drawn(folder):
    for i in range(9): (folder/'test/a'/f'x{i}.png').write_bytes((folder/'train/b'/f'{2*i+1:02}.png').read_bytes())
    look(folder, most=3)
    page = (folder.parent/'page.html').read_text(encoding='utf-8')
    assert page.count('<div class=same>')==3 and 'The first 3 of 9 are shown' in page

def test_wrong_use_is_one_clear_error(folder, tmp_path):
    with pytest.raises(ValueError, match='must be an .html file'): check(str(folder), out=str(tmp_path/'labels.csv'))
    with pytest.raises(ValueError, match='--most must be a whole number in 1'): check(str(folder), most=0)
    with pytest.raises(FileNotFoundError, match='no folder and no data set'): check(str(folder)+'x', model='vit_pico')
    assert list(tmp_path.glob('*.html'))==[]

def test_findings_are_plain_data(folder):
    assert json.loads(json.dumps(look(folder)))['sizes']=='64 x 64'

def test_a_run_says_one_line_about_its_images(folder, capsys, tmp_path):
    (folder/'test/a/again.png').write_bytes((folder/'train/a/00.png').read_bytes())
    finetune(str(folder), method='head', model='vit_pico', epochs=1, batch_size=4, probe=False, device='cpu', out=str(tmp_path/'run'))
    line, = [o for o in capsys.readouterr().out.splitlines() if o.startswith('checked:')]
    assert '64 x 64 pixels' in line and '1 IN TWO SPLITS' in line
