"Vector scaling: against probmetrics and scipy, never worse than the temperature, and carried by everything that a run goes through"
import json,sys,types,warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from fclora.calibration.calibrator import *
from fclora.calibration.temperature import *
from fclora.calibration.vector import *
from fclora.data.sources import load_images
from fclora.deploy.bank import AdapterBank
from fclora.deploy.onnx import export_onnx, onnx_model
from fclora.runs.evaluate import evaluate
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_model
from fclora.runs.use import merge_cmd, predict
from PIL import Image
from conftest import untrained_run

def sample(n=400, c=5, seed=0, tilt=1.):
    g = torch.Generator().manual_seed(seed)
    z = 2*torch.randn(n, c, generator=g, dtype=torch.float64)
    shift = torch.zeros(c, dtype=torch.float64); shift[0],shift[-1] = tilt,-tilt
    return z-shift, torch.multinomial(z.softmax(1), 1, generator=g)[:,0]

def objective(z, y, T, v, b):
    logp = (z/T).log_softmax(1)
    return (F.cross_entropy(logp*v+b, y) + z.shape[1]/len(y)*((v-1).square().sum()+b.square().sum())).item()

# --- against others

def test_it_is_the_minimum_that_scipy_finds():
    z,y = sample()
    T,c = fit_temperature(z, y),z.shape[1]
    found = fit_vector(z, y, T)
    res = minimize(lambda x: objective(z, y, T, *torch.tensor(x).view(2, c)), np.r_[np.ones(c), np.zeros(c)], method='BFGS', options=dict(gtol=1e-7))
    np.testing.assert_allclose([*found['scale'], *found['bias']], res.x, atol=1e-4)

def test_it_is_probmetrics_vector_scaling(monkeypatch):
    monkeypatch.setitem(sys.modules, 'numba', types.SimpleNamespace(njit=lambda *a, **k: lambda f: f)) # for another of its solvers
    from probmetrics.calibrators import SVSCalibrator
    z,y = sample()
    T,(n,c) = fit_temperature(z, y),z.shape
    found,theirs = fit_vector(z, y, T),SVSCalibrator()
    v,b = theirs._fit_bfgs((z/T).log_softmax(1), y, c, c/n, c/n)
    np.testing.assert_allclose(found['scale'], v, atol=1e-3); np.testing.assert_allclose(found['bias'], b, atol=1e-3)
    p = z.softmax(1).numpy()
    theirs.fit(p, y.numpy()) # with the uniform part that its temperature mixes in, 1/(n+1)
    np.testing.assert_allclose(calibrated_logits(z, T, found).softmax(1), theirs.predict_proba(p), atol=.02)

# --- never worse

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(10, 120), st.floats(-2, 2))
def test_on_the_images_of_the_fit_the_nll_never_rises(seed, c, n, tilt):
    z,y = sample(n, c, seed, tilt)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        T = fit_temperature(z, y)
    assert nll(calibrated_logits(z, T, fit_vector(z, y, T)), y)<=nll(z, y, T)+1e-9

def test_the_temperature_is_kept_unless_cross_validation_prefers_the_vector():
    for seed in range(3):
        for tilt in (0., .1, 1.):
            z,y = sample(300, 5, seed, tilt)
            scores,chosen = cross_validated(z, y, seed=3),choose_vector(z, y, fit_temperature(z, y), seed=3)
            assert (chosen is not None)==(scores['vector']<scores['temperature'])
    assert choose_vector(*sample(9), 1.) is None

def test_cross_validation_never_judges_a_sample_by_its_own_fit(monkeypatch):
    import fclora.calibration.vector as V
    z,y = sample(100)
    z[:,0] = torch.arange(100.) # names the sample
    fitted,judged = [],[]
    monkeypatch.setattr(V, 'fit_temperature', lambda x, t: fitted.append(set(x[:,0].tolist())) or 1.)
    monkeypatch.setattr(V, 'fit_vector', lambda x, t, T: dict(scale=[1.]*5, bias=[0.]*5))
    monkeypatch.setattr(V, 'nll', lambda x, t: judged.append(len(t)) or 0.)
    cross_validated(z, y, folds=4)
    assert [len(o) for o in fitted]==[75]*4 and judged==[25]*8 and set.intersection(*fitted)==set()

def test_a_missing_class_and_few_samples():
    z,y = sample(60, 4)
    z,y = z[y!=2],y[y!=2]
    found = fit_vector(z, y, 1.)
    assert all(np.isfinite(found['scale']+found['bias'])) and found['bias'][2]<0
    with pytest.raises(ValueError, match='folds must be in 2..5'): cross_validated(z[:5], y[:5], folds=6)

# --- through a run

VECTOR = dict(scale=[1.,.5]+[1.]*8, bias=[1.5]+[0.]*9)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    held = fit_calibration(*sample(400, 10), seed=1)['held_out']
    return untrained_run(tmp_path_factory.mktemp('run')/'run', vector=VECTOR, held_out=held)

@pytest.fixture(scope='module')
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp('photos')/'a.png'
    Image.fromarray(load_images('digits').test[0][0].permute(1, 2, 0).numpy()).save(path)
    return path

def test_prediction_and_evaluation_apply_it(folder, photo, capsys):
    model,cfg = load_model(folder)
    from fclora.data.pixels import load_batch
    with torch.no_grad(): z = model(load_batch([photo], **cfg['image'])[0])
    want = ((z/cfg['T']).log_softmax(1)*torch.tensor(cfg['vector']['scale'])+torch.tensor(cfg['vector']['bias'])).softmax(1)[0]
    got = {o['class']:o['probability'] for o in predict(folder, photo, top_k=10, device='cpu')[0]['top']}
    for i,name in enumerate(cfg['classes']): assert got[name]==pytest.approx(want[i].item(), abs=1e-5)
    t = evaluate(folder, quiet=True, device='cpu')
    assert t['calibrator']=='vector' and t['nll_raw']!=t['nll'] and 'before the vector' in capsys.readouterr().out

def test_an_export_carries_it(folder, tmp_path):
    model,cfg = load_model(folder)
    px = torch.randint(256, (3,3,32,32), dtype=torch.uint8)
    mean,std = [torch.tensor(cfg['image'][k])[:,None,None] for k in ('mean','std')]
    with torch.no_grad(): want = calibrated(model((px/255-mean)/std), cfg)
    f = onnx_model(export_onnx(folder, tmp_path/'a.onnx'))
    torch.testing.assert_close(f(px), want, atol=1e-3, rtol=1e-3)
    assert json.loads(f.meta['vector'])==cfg['vector'] and json.loads(f.meta['held_out'])==cfg['held_out']

def test_what_cannot_hold_it_says_so(folder, tmp_path):
    with pytest.raises(ValueError, match='cannot be divided into the head'): merge_cmd(str(folder), str(tmp_path/'a'), calibrated=True)
    with pytest.raises(ValueError, match='has a vector'): AdapterBank(dict(a=folder))
    merge_cmd(str(folder), str(tmp_path/'b'))
    assert json.loads((tmp_path/'b'/'config.json').read_text())['vector']['bias'][0]==1.5

@pytest.mark.parametrize('bad', [5, {}, dict(scale=[1.]*9, bias=[0.]*10), dict(scale=[1.]*10, bias=[float('nan')]*10), dict(scale=['a']*10, bias=[0.]*10)])
def test_a_damaged_vector_is_refused(folder, tmp_path, bad):
    import shutil
    shutil.copytree(folder, tmp_path/'r')
    config = json.loads((folder/'fclora.json').read_text())
    del config['digest']
    (tmp_path/'r'/'fclora.json').write_text(json.dumps(dict(config, vector=bad)))
    with pytest.raises(ValueError, match='vector must be a scale and a bias of 10 numbers each|NaN'): load_model(tmp_path/'r')

def test_an_unknown_calibrator_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match='--calibrator must be temperature or vector'): finetune('no-such-folder', calibrator='beta')
