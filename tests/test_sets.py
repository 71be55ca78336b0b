"Prediction sets: scores and thresholds against direct formulas, coverage within its binomial bounds, and what a run keeps of them"
import json,math
from fractions import Fraction
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import stats
from fclora.calibration.calibrator import *
from fclora.calibration.sets import *
from fclora.calibration.temperature import fit_temperature
from fclora.data.sources import load_images
from fclora.runs.evaluate import evaluate
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_model
from fclora.runs.use import predict

def sample(n, c=6, seed=0, spread=2.):
    g = torch.Generator().manual_seed(seed)
    z = spread*torch.randn(n, c, generator=g, dtype=torch.float64)
    return z, torch.multinomial(z.softmax(1), 1, generator=g)[:,0]

# --- formulas

def test_scores_by_hand():
    z,_ = sample(50, 8)
    p = z.softmax(1).numpy()
    np.testing.assert_allclose(class_scores(z, 'threshold'), 1-p)
    want = np.array([[row[row>v].sum() + .01*max(0, (row>v).sum()+1-5) for v in row] for row in p])
    np.testing.assert_allclose(class_scores(z), want, atol=1e-12)
    np.testing.assert_allclose(class_scores(z, penalty=0), [[row[row>v].sum() for v in row] for row in p], atol=1e-12)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.sampled_from([.5,.8,.9,.95,.99]), st.integers(0, 1000))
def test_the_threshold_is_the_corrected_quantile(n, level, seed):
    s = np.random.default_rng(seed).random(n)
    k = math.ceil((n+1)*Fraction(str(level)))
    want = math.inf if k>n else sorted(s)[k-1]
    assert conformal_threshold(torch.tensor(s), level)==want
    if k<=n: assert (s<=want).sum()/(n+1)>=level>(s<want).sum()/(n+1) # the least that suffices

def test_exact_levels_are_not_lost_to_rounding():
    assert conformal_threshold(torch.arange(9.), .9)==8 and conformal_threshold(torch.arange(99.), .95)==94
    with pytest.raises(ValueError, match='level must lie'): conformal_threshold(torch.arange(9.), 1.)

@pytest.mark.parametrize('score', set_scores)
@pytest.mark.parametrize('level', [.9,.95])
def test_coverage_is_within_the_bounds_of_its_distribution(score, level):
    "One test image after another, each with fresh held-out images: a binomial count with the promised rate"
    n,reps,hits = 99,1500,0
    z,y = sample(reps*(n+1), seed=int(100*level))
    own = scores_of(class_scores(z, score), y).view(reps, n+1)
    for row in own: hits += bool(row[-1]<=conformal_threshold(row[:-1], level))
    exact = math.ceil(round((n+1)*level, 9))/(n+1)
    # adaptive scores tie at 0 wherever the first class is right, which only adds to the coverage
    low,high = stats.binom.interval(.9999, reps, exact)
    assert low<=hits and (hits<=high or score=='adaptive' and (own==0).double().mean()>level)

def test_adaptive_sets_are_never_empty_and_larger_levels_give_larger_sets():
    z,y = sample(400, seed=5)
    sets = fit_sets(z, y)
    for score in set_scores:
        sizes = [set_members(z, sets, l, score) for l in (.8,.9,.95,.99)]
        assert all((b|~a).all() for a,b in zip(sizes, sizes[1:]))
    assert set_members(z, sets, .8).any(1).all()

def test_too_few_images_give_every_class():
    z,y = sample(12)
    sets = fit_sets(z, y)
    assert sets['adaptive']['0.95'] is None and set_members(z, sets, .95).all()
    assert json.loads(json.dumps(sets, allow_nan=False))==sets

def test_the_table_counts_what_it_says():
    z,y = sample(300, 7, seed=2)
    y[y==3] = 4
    sets = fit_sets(*sample(300, 7, seed=1))
    o = set_table(z, y, sets)['threshold']['0.9']
    m = (1-z.softmax(1))<=sets['threshold']['0.9']
    hit = m[torch.arange(300),y]
    assert o['coverage']==pytest.approx(hit.double().mean().item()) and o['size']==pytest.approx(m.sum(1).double().mean().item())
    assert o['class_coverage'][3] is None and o['class_coverage'][4]==pytest.approx(hit[y==4].double().mean().item())
    assert o['single']==pytest.approx((m.sum(1)==1).double().mean().item()) and len(o['class_size'])==7

# --- the halves

def test_the_calibrator_never_sees_the_images_of_the_sets():
    z,y = sample(500)
    z = z/3
    found = fit_calibration(z, y, seed=7)
    fit,held = halves(500, seed=7)
    assert set(fit.tolist()).isdisjoint(held.tolist()) and len(fit)+len(held)==500
    assert found['T']==fit_temperature(z[fit], y[fit])
    assert found['held_out']['sets']==fit_sets(z[held]/found['T'], y[held])
    other = z.clone(); other[held] = torch.randn_like(other[held])
    assert fit_calibration(other, y, seed=7)['T']==found['T']
    assert fit_calibration(z, y, seed=8)['T']!=found['T']

def test_without_sets_or_with_few_images_all_are_for_the_calibrator():
    z,y = sample(199)
    assert fit_calibration(z, y)==dict(T=fit_temperature(z, y), vector=None, held_out=None)
    assert 'need 200 validation images' in calibration_text(fit_calibration(z, y), 199)
    z,y = sample(200)
    assert fit_calibration(z, y, hold_out=False)['T']==fit_temperature(z, y)
    assert '100 validation images; the other 100' in calibration_text(fit_calibration(z, y), 200)

# --- a run

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'run'
    finetune('digits', 'head', epochs=1, limit='100,300,150', probe=False, quiet=True, out=str(out))
    return out

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    d = tmp_path_factory.mktemp('photos')
    for i in range(6): Image.fromarray(load_images('digits').test[0][i].permute(1, 2, 0).numpy()).save(d/f'{i}.png')
    return d

def test_a_run_keeps_them_and_measures_them(folder):
    config,test = [json.loads((folder/n).read_text()) for n in ('fclora.json','metrics.json')]
    assert config['held_out']['calibrated_on']==config['held_out']['n']==150
    assert is_held_out(config['held_out'])
    for score in set_scores:
        for level in ('0.9','0.95'):
            o = test['test']['sets'][score][level]
            low = stats.beta(*((k := math.ceil(151*float(level))), 151-k)).ppf(1e-4) - 3*(.25/150)**.5
            assert o['coverage']>=low and len(o['class_coverage'])==10
    assert test['test']['aurc']<1-test['test']['accuracy']

def test_prediction_prints_sets_in_every_format(folder, photos, capsys):
    rows = predict(folder, photos, sets=.9, device='cpu')
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()==['file','rank','class','set','probability']
    for o in rows: assert o['set'][0]==o['top'][0]['class'] and len(o['set'])==len(set(o['set']))
    predict(folder, photos, sets=.9, format='jsonl', device='cpu')
    assert [json.loads(l)['set'] for l in capsys.readouterr().out.splitlines()]==[o['set'] for o in rows]
    predict(folder, photos, sets=.9, format='csv', top_k=1, device='cpu')
    assert [l.split(',')[3] for l in capsys.readouterr().out.splitlines()[1:]]==[';'.join(o['set']) for o in rows]
    wider = predict(folder, photos, sets=.99, set_score='threshold', device='cpu')
    assert sum(len(o['set']) for o in wider)>=sum(len(o['set']) for o in predict(folder, photos, sets=.9, set_score='threshold', device='cpu'))

def test_evaluation_measures_the_promise_again(folder, capsys):
    t = evaluate(folder, quiet=True, device='cpu')
    want = json.loads((folder/'metrics.json').read_text())['test']['sets']
    assert t['sets']['adaptive']['0.9']['coverage']==pytest.approx(want['adaptive']['0.9']['coverage'], abs=.01)
    assert 'adaptive sets of 90%' in capsys.readouterr().out

def test_wrong_use_is_one_clear_error(folder, photos, tmp_path):
    for kw,msg in ((dict(sets=90.), '--sets must be a number in'), (dict(sets=.999), 'levels up to 0.99'),
                   (dict(sets=.9, set_score='lac'), '--set-score must be adaptive or threshold')):
        with pytest.raises(ValueError, match=msg): predict(folder, photos, device='cpu', **kw)
    config = json.loads((folder/'fclora.json').read_text())
    import shutil
    shutil.copytree(folder, tmp_path/'old')
    for k in ('held_out','vector','digest'): del config[k]   # as an older fclora wrote it
    (tmp_path/'old'/'fclora.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='200 validation images or more'): predict(tmp_path/'old', photos, sets=.9, device='cpu')
    assert len(predict(tmp_path/'old', photos, device='cpu'))==6
    for bad in (3, {}, [], dict(json.loads((folder/'fclora.json').read_text())['held_out'], n='many')):
        (tmp_path/'old'/'fclora.json').write_text(json.dumps(dict(config, held_out=bad)))
        with pytest.raises(ValueError, match='held_out must be what held-out images promise'): load_model(tmp_path/'old')
