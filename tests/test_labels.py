"Tables of labels and datasets: as people write them, and every mistake with its line"
import json
from functools import partial
import datasets, numpy as np, pytest, torch
from PIL import Image
from hypothesis import HealthCheck, given, settings, strategies as st
from fclora.data.labels import path_inside, read_labels
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.runs.evaluate import evaluate
from fclora.runs.finetune import finetune

quiet = partial(load_images, progress=False)
datasets.disable_progress_bars()

def noise(seed): return np.random.default_rng(seed).integers(0, 256, (12,12,3), dtype=np.uint8)

@pytest.fixture
def root(tmp_path):
    "Eight pictures of two kinds, in one folder"
    (tmp_path/'img').mkdir()
    for i in range(16): Image.fromarray(noise(i)).save(tmp_path/'img'/f'{i:02}.png')
    return tmp_path

def table(root, text, name='labels.csv', **kw):
    (root/name).write_text(text, **{'encoding':'utf-8', **kw})
    return root/name

def rows(sep=',', header='path,label', line='img/{i:02}.png,{c}', n=16):
    return '\n'.join([header, *(line.format(i=i, c='ant' if i%2 else 'bee') for i in range(n))]).replace(',', sep)+'\n'

def err(file, *pieces, exc=ValueError, **kw):
    with pytest.raises(exc) as e: quiet(file, **kw)
    msg = str(e.value)
    assert '\n' not in msg
    for o in pieces: assert str(o) in msg, msg
    return msg

# As people write them

@pytest.mark.parametrize('sep', [',','\t',';','|'])
@pytest.mark.parametrize('encoding', ['utf-8','utf-8-sig','utf-16'])
@pytest.mark.parametrize('newline', ['\n','\r\n'])
def test_any_separator_encoding_and_newline(root, sep, encoding, newline):
    images = quiet(table(root, rows(sep), encoding=encoding, newline=newline))
    assert images.vocab==['ant','bee'] and images.name=='labels'
    assert sum(len(y) for _,y in images.splits.values())==16
    for x,y,files in zip(images.train[0], images.train[1], images.files['train']):
        assert np.array_equal(x.permute(1,2,0), noise(int(files.stem))) and y==(int(files.stem)+1)%2

def test_a_table_is_read_as_the_folder_of_the_same_images(tmp_path):
    for i in range(20):
        (tmp_path/'d'/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i)).save(tmp_path/'d'/'ab'[i%2]/f'{i:02}.png')
    files = sorted((tmp_path/'d').rglob('*.png'))
    text = '\n'.join(['path,label', *(f'{o.relative_to(tmp_path)},{o.parent.name}' for o in files)])
    one,two = quiet(tmp_path/'d'),quiet(table(tmp_path, text))
    for k in one.splits:
        mine,other = [sorted((o.tolist(),y) for o,y in zip(x.flatten(1), ys.tolist())) for x,ys in (one.splits[k], two.splits[k])]
        assert mine==other

def test_names_of_columns_and_splits_quotes_blanks_and_further_columns(root):
    text = 'Remark, Filename ,CLASS,Subset\n"a; ""b"", c",img/00.png," a, b ",training\n\n'
    text += ''.join(f',img/{i:02}.png,"{"a, b" if i%2 else "c"}",{s}\n' for i,s in enumerate(['train','val','dev','test','Test','TRAIN','train'], 1))
    images = quiet(table(root, text))
    assert images.vocab==['a, b','c'] and [len(y) for _,y in images.splits.values()]==[4,2,2] and not images.made

def test_labels_stay_text(root):
    text = 'path,label\n' + ''.join(f'img/{i:02}.png,{["01","1","NA","1e3"][i%4]}\n' for i in range(16))
    assert quiet(table(root, text)).vocab==['01','1','1e3','NA']

def test_paths_from_another_folder_backslashes_and_absolute_ones(root, tmp_path_factory):
    file = tmp_path_factory.mktemp('tables')/'pets.tsv'
    file.write_text(rows('\t'))
    err(file, '16 of 16 images are missing', 'line 2 (img/00.png)', 'and 11 more', '--images')
    assert len(quiet(file, images=root).test[1])==3
    file.write_text(rows(line=r'img\{i:02}.png,{c}'))
    assert len(quiet(file, images=str(root)).test[1])==3
    file.write_text(rows(line=f'{root}/img/{{i:02}}.png,{{c}}'))
    assert len(quiet(file, images='/').test[1])==3
    err(file, 'outside the folder of the images', 'line 2')

def test_classes_limit_and_label_column(root):
    text = 'path,label,species\n' + ''.join(f'img/{i:02}.png,x,{"abc"[i%3]}\n' for i in range(15))
    assert quiet(table(root, text), label_column='species', classes=':2').vocab==['a','b']
    assert [len(y) for _,y in quiet(table(root, text), label_column='Species', limit='6,3,3').splits.values()]==[6,3,3]
    err(root/'labels.csv', 'no column is called kind', label_column='kind')

# Mistakes

@pytest.mark.parametrize('text,pieces', [
    ('', ['has no rows']), ('path,label\n', ['has no rows']),
    ('img/00.png,a\nimg/01.png,b\n', ['line 1', 'no column is called path', 'path,label']),
    ('path,label,Class\nimg/00.png,a,b\n', ['name the same thing']),
    ('path,label\nimg/00.png,a\n\nimg/01.png\n', ['names 2 columns, but line 4 has 1']),
    ('path,label\nimg/00.png,"a\nimg/01.png,b\n', ['line 3', 'quote']),
    ('path,label\nimg/00.png,a\nimg/01.png, \n', ['no label: line 3']),
    ('path,label\n,a\nimg/01.png,b\n', ['no path: line 2']),
    ('path,label,split\nimg/00.png,a,train\nimg/01.png,b,trian\nimg/02.png,b,\n', ['unknown split: line 3 (trian), line 4']),
    ('path,label\nimg/00.png,a\nimg/nope.png,b\nimg,c\n', ['2 of 3 images are missing', 'line 3 (img/nope.png), line 4 (img)']),
    ('path,label\nimg/00.png,a\n./img//00.png,b\n', ['the same image in two lines: line 3 (as in line 2)']),
    ('path,label\nimg/00.png,a\n../secret.png,b\nimg/../../x,b\n', ['outside the folder', 'line 3 (../secret.png), line 4']),
    ('path,label\nimg/00.png,a\nimg/01.png,a\nimg/02.png,a\nimg/03.png,a\n', ["only one class, 'a'"]),
    ('path,label\nimg/00.png,a\nimg/01.png,a\nimg/02.png,a\nimg/03.png,b\n', ['b (1); each class needs 3']),
    ('path,label,split\nimg/00.png,a,test\nimg/01.png,b,test\n', ['no training images']),
    ('path,label,split\n'+''.join(f'img/{i:02}.png,{"ab"[i%2]},train\n' for i in range(8))+'img/08.png,z,test\nimg/09.png,a,test\n',
     ['only in train: b', 'only in test: z'])])
def test_one_clear_error_with_line_numbers(root, text, pieces): err(table(root, text), *pieces)

def test_text_that_is_not_utf8_is_named_by_its_line(root):
    (root/'labels.csv').write_bytes('path,label\nimg/00.png,a\nimg/01.png,bär\n'.encode('latin-1'))
    err(root/'labels.csv', 'line 3', 'UTF-8')

def test_unreadable_images_of_a_table_are_named_and_can_be_skipped(root):
    (root/'img'/'03.png').write_bytes(b'junk')
    err(table(root, rows()), '1 of 16', 'img/03.png (not an image', '--skip-bad')
    assert len(quiet(root/'labels.csv', skip_bad=True).skipped)==1

def test_options_that_do_not_belong_to_a_source(root):
    err('digits', 'images is for a table; digits is a name', images=root)
    err(root/'img', 'label_column is for a table or a dataset', label_column='x')
    err(table(root, rows(), 'labels.dat'), 'is a file', '.csv')
    err(root/'label.csv', 'did you mean', 'labels.csv') if (root/'labels.csv').write_text(rows()) and False else None
    err(table(root, rows()), 'no folder of images at', images=root/'nowhere', exc=FileNotFoundError)

@settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=200)
@given(text=st.text())
def test_whatever_the_text_it_is_rows_or_one_clear_error(tmp_path, text):
    try: found = read_labels(tmp_path/'t.csv')
    except (ValueError, FileNotFoundError) as e: assert 't.csv' in str(e)
    else: assert found

@given(parts=st.lists(st.sampled_from(['..','.','a','/','\\','b c','~']), min_size=1, max_size=8))
def test_no_path_leaves_its_folder(parts):
    found = path_inside('/data/pets', '/'.join(parts))
    assert found is None or str(found).startswith('/data/pets') and '..' not in found.parts

# Datasets

tone = datasets.ClassLabel(names=['dark','light'])
def dataset(labels, feature=tone, seed=0):
    pictures = [Image.fromarray(noise(seed+i)) for i in range(len(labels))]
    return datasets.Dataset.from_dict(dict(image=pictures, label=labels), datasets.Features(image=datasets.Image(), label=feature))

def test_a_saved_dataset(tmp_path):
    parts = dict(train=dataset([0,1]*6), test=dataset([1,0]*2, seed=50), unsupervised=dataset([-1,-1], seed=90))
    datasets.DatasetDict(parts).save_to_disk(tmp_path/'d')
    images = quiet(tmp_path/'d')
    assert images.name=='d' and images.vocab==['dark','light'] and images.made==['valid'] and [len(y) for _,y in images.splits.values()]==[10,2,4]
    assert {o.tobytes() for o in images.test[0].permute(0,2,3,1).numpy()}=={noise(50+i).tobytes() for i in range(4)}

def test_a_dataset_without_splits_with_text_and_one_label_missing(tmp_path):
    dataset(['a','b']*5, datasets.Value('string')).save_to_disk(tmp_path/'d')
    assert quiet(tmp_path/'d').made==['valid','test']
    dataset(['a','b']*5+[None], datasets.Value('string')).save_to_disk(tmp_path/'e')
    err(tmp_path/'e', 'no label: line 10')

def test_pictures_too_many_for_the_memory_stay_in_the_dataset(tmp_path):
    dataset([0,1]*8).save_to_disk(tmp_path/'d')
    few,all_ = quiet(tmp_path/'d', 12, in_memory=False),quiet(tmp_path/'d', 12)
    args = dict(size=12, mean=(.5,)*3, std=(.2,)*3, bs=4, device='cpu')
    for dl in (0,1,2): assert torch.equal(next(iter(get_dls(few, **args)[dl]))[0], next(iter(get_dls(all_, **args)[dl]))[0])

def test_a_broken_picture_of_a_dataset_is_named(tmp_path):
    ds = dataset([0,1]*8).cast_column('image', datasets.Image(decode=False))
    def spoil(o, i): return dict(o, image=dict(o['image'], bytes=b'junk')) if i==3 else o
    ds.map(spoil, with_indices=True).cast_column('image', datasets.Image()).save_to_disk(tmp_path/'d')
    err(tmp_path/'d', '1 of 16', 'row 3 of train (not an image')

def test_a_name_of_the_hub(tmp_path, monkeypatch):
    asked = []
    def load(name, config): asked.append((name,config)); return datasets.DatasetDict(train=dataset([0,1]*8))
    monkeypatch.setattr(datasets, 'load_dataset', load)
    assert quiet('hf:somebody/tones').name=='tones' and quiet('hf:somebody/tones:small').vocab==['dark','light']
    assert asked==[('somebody/tones',None),('somebody/tones','small')]
    def gone(*args): raise ConnectionError('no route to the Hub')
    monkeypatch.setattr(datasets, 'load_dataset', gone)
    err('hf:somebody/tones', 'cannot read the dataset hf:somebody/tones: no route')

def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr('fclora.files.find_spec', lambda name: None)
    err('hf:somebody/tones', "pip install 'fclora[datasets]'", exc=ImportError)

# Whole runs

small = dict(model='vit_pico', epochs=1, batch_size=4, score_batches=1, budget=18, probe=False, quiet=True)

def test_a_run_finds_its_table_again(root, capsys):
    (root/'tables').mkdir()
    file = table(root/'tables', rows())
    run = finetune(str(file), images=str(root), out=str(root/'run'), **small)
    assert json.loads((root/'run'/'fclora.json').read_text())['data']['images']==str(root)
    assert evaluate(str(root/'run'), quiet=True)['nll']==pytest.approx(run.metrics['test']['nll'], rel=1e-5)
    other = table(root/'tables', rows(n=12), 'later.csv')
    assert evaluate(str(root/'run'), str(other), images=str(root), quiet=True)['n']==12
    capsys.readouterr()
    other.write_text(rows().replace('bee', 'wasp'))
    with pytest.raises(ValueError, match="only in the data .'wasp'."): evaluate(str(root/'run'), str(other), images=str(root), quiet=True)

def test_a_run_finds_its_dataset_again(tmp_path):
    dataset([0,1]*10).save_to_disk(tmp_path/'d')
    run = finetune(str(tmp_path/'d'), out=str(tmp_path/'run'), **small)
    assert evaluate(str(tmp_path/'run'), quiet=True)['nll']==pytest.approx(run.metrics['test']['nll'], rel=1e-5)

def test_a_run_without_out_is_called_by_the_table(root, monkeypatch):
    monkeypatch.chdir(root)
    table(root, rows(), 'pets.csv')
    finetune('pets.csv', method='head', **small)
    assert (root/'runs'/'pets-head-1'/'metrics.json').is_file()
