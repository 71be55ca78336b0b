"Cross-validation: every image is tested once, by a run that has not seen it; runs are kept, and can be used alone"
import json
import numpy as np, pandas as pd, pytest, torch
from conftest import make_images
from fclora.cli import main
from fclora.data.folds import fold_names, fold_rows, parse_fold, pool_images, take_fold
from fclora.data.sources import load_images
from fclora.runs import folds as folds_module
from fclora.runs.folder import load_run

pytestmark = pytest.mark.usefixtures('one_thread')
FEW = ['--model', 'vit_pico', '--method', 'head', '--epochs', '1', '--batch-size', '8', '--no-hold-out', '--quiet']

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return make_images(tmp_path_factory.mktemp('d')/'photos', ('ant','bee','cat'), n=9)

@pytest.fixture(scope='module')
def three(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp('folds')/'three'
    assert main(['folds', str(photos), '--folds', '3', *FEW, '--out', str(out)])==0
    return out

@pytest.mark.parametrize('k', [2,3,5])
@pytest.mark.parametrize('seed', [0,1])
def test_folds_are_a_partition_with_every_class_in_its_share(k, seed):
    targs = np.random.default_rng(seed).permutation(np.repeat([0,1,2], [11,20,30]))
    rows = [fold_rows(targs, f'{i+1}/{k}', .25, seed) for i in range(k)]
    assert sorted(np.concatenate([o['test'] for o in rows]))==list(range(61))
    for o in rows: assert sorted(np.concatenate(list(o.values())))==list(range(61))
    counts = np.stack([np.bincount(targs[o['test']], minlength=3) for o in rows])
    assert (counts.max(0)-counts.min(0)).max()<=1 and all(np.bincount(targs[o['valid']], minlength=3).min()>=1 for o in rows)

def test_the_same_seed_gives_the_same_folds_and_another_others(photos):
    images = load_images(photos, 32, progress=False)
    names = [fold_names(images, '1/3', seed) for seed in (0,0,1)]
    assert names[0]==names[1]!=names[2]
    fold = take_fold(images, '1/3')
    assert list(map(str, fold.files['test']))==names[0] and len(fold.train[1])+len(fold.valid[1])==18

def test_a_test_set_of_its_own_stays_out(tmp_path):
    root = tmp_path/'d'
    make_images(root/'train', ('ant','bee'), n=6)
    make_images(root/'test', ('ant','bee'), n=5, seed=1)
    assert len(pool_images(load_images(root, 32, progress=False))[1])==12

def test_one_row_an_image_with_probabilities_that_add_up(three, photos):
    table = pd.read_csv(three/'out_of_fold.csv')
    assert list(table.columns)==['path','label','fold','p(ant)','p(bee)','p(cat)']
    assert sorted(table.path)==sorted(str(o) for o in photos.rglob('*.png'))
    assert (table.path.map(lambda o: o.split('/')[-2])==table.label).all() and sorted(table.fold.unique())==[1,2,3]
    np.testing.assert_allclose(table.iloc[:,3:].sum(1), 1, atol=1e-5)

def test_mean_and_spread_are_those_of_the_runs(three):
    res = json.loads((three/'folds.json').read_text())
    runs = [load_run(three/f'fold-{i}', model=False) for i in (1,2,3)]
    accs = [r.metrics['test']['accuracy'] for r in runs]
    assert [o['accuracy'] for o in res['folds']]==accs
    assert res['mean']['accuracy']==pytest.approx(np.mean(accs)) and res['std']['accuracy']==pytest.approx(np.std(accs, ddof=1))
    table = pd.read_csv(three/'out_of_fold.csv')
    right = (table.iloc[:,3:].to_numpy().argmax(1)==table.label.map(dict(ant=0, bee=1, cat=2))).mean()
    assert res['pooled']['accuracy']==pytest.approx(right)==pytest.approx(np.mean(accs))
    assert res['command'].startswith('fclora folds ') and '--folds 3' in res['command']

def test_a_fold_is_a_run_like_any_other(three, tmp_path):
    run = load_run(three/'fold-2', model=False)
    assert run.config['data']['fold']=='2/3' and run.config['data']['test']==9
    assert main(['evaluate', str(three/'fold-2'), '--quiet', '--out', str(tmp_path/'e.json')])==0
    assert json.loads((tmp_path/'e.json').read_text())['nll']==pytest.approx(run.metrics['test']['nll'], abs=1e-5)

def test_resuming_keeps_what_is_finished_and_ends_at_the_same_table(three, photos, tmp_path, monkeypatch):
    out,real,asked = tmp_path/'f',folds_module.finetune,[]
    def stopped(data, **kw):
        if kw['fold']=='2/3': raise KeyboardInterrupt
        return real(data, **kw)
    def noted(data, **kw): asked.append(kw['fold']); return real(data, **kw)
    args = ['folds', str(photos), '--folds', '3', *FEW, '--out', str(out)]
    monkeypatch.setattr(folds_module, 'finetune', stopped)
    assert main(args)==130 and not (out/'folds.json').exists()
    monkeypatch.setattr(folds_module, 'finetune', noted)
    assert main([*args, '--resume'])==0 and asked==['2/3','3/3']
    whole = pd.read_csv(out/'out_of_fold.csv')
    assert len(whole)==27 and main([*args, '--resume'])==0 and asked==['2/3','3/3']
    for o in (out, three): pd.testing.assert_frame_equal(pd.read_csv(o/'out_of_fold.csv'), whole)

@pytest.mark.parametrize('args,word', [(['--folds','1'], '--folds must be'), (['--folds','10'], '10 folds need 10 images of each class'),
    (['--epochs','0'], '--epochs must be'), (['--method','best'], "'best'")])
def test_what_cannot_be_is_one_line_before_anything_is_trained(args, word, photos, tmp_path, capsys):
    assert main(['folds', str(photos), '--model', 'vit_pico', *args, '--out', str(tmp_path/'f')])==1
    assert word in capsys.readouterr().err and not (tmp_path/'f').exists()

@pytest.mark.parametrize('fold', ['0/5','6/5','1/1','x','1/2/3'])
def test_a_fold_is_two_numbers(fold, capsys):
    with pytest.raises(ValueError, match='such as 2/5'): parse_fold(fold)
    assert main(['finetune', 'digits', '--fold', fold])==1 and 'such as 2/5' in capsys.readouterr().err

def test_several_labels_are_refused():
    with pytest.raises(ValueError, match='one label an image'): fold_rows(torch.zeros(9, 3), '1/3')
