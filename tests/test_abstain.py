"Abstaining: the bound against scipy, the curve by hand, the promise by simulation, and the commands that use it"
import json
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from conftest import untrained_run
from scipy.stats import binom,binomtest
from fclora.calibration.abstain import *
from fclora.calibration.calibrator import fit_calibration
from fclora.calibration.ece import judged
from fclora.data.sources import load_images
from fclora.runs.use import decisions, lowest_confidence, predict

def sample(n, seed=0, spread=5., sharp=1.):
    g = torch.Generator().manual_seed(seed)
    z = spread*torch.randn(n, 8, generator=g)
    return sharp*z, torch.multinomial(z.softmax(1), 1, generator=g)[:,0]

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([.9,.95,.99]))
def test_the_bound_is_clopper_and_pearsons(n, share, certainty):
    errors = round(share*n)
    want = binomtest(errors, n, alternative='less').proportion_ci(certainty, 'exact').high
    assert error_bound(errors, n, certainty)==pytest.approx(want, abs=1e-9)

def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match='errors must be in 0..10'): error_bound(11, 10)
    with pytest.raises(ValueError, match='level must lie'): error_bound(1, 10, 95)

def test_curve_and_area_by_hand():
    z,y = sample(200, 3)
    conf,right = [o.numpy() for o in judged(z, y)]
    order = np.argsort(-conf, kind='stable')
    risk = np.cumsum(1-right[order])/np.arange(1, 201)
    curve = risk_coverage(z, y)
    np.testing.assert_allclose(curve['risk'], risk); np.testing.assert_allclose(curve['coverage'], np.arange(1, 201)/200)
    assert aurc(z, y)==pytest.approx(risk.mean()) and curve['risk'][-1].item()==pytest.approx(1-right.mean())
    assert (curve['confidence'].diff()<=0).all()

def test_a_better_order_has_a_smaller_area():
    z,y = sample(1000, 4)
    conf,right = judged(z, y)
    shuffled = z[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert aurc(z, y)<1-right.mean()<aurc(shuffled, y)+.5 and aurc(z, z.argmax(1))==0

@pytest.mark.parametrize('sharp', [.6,1.,1.3])
def test_the_promise_is_broken_at_most_as_often_as_it_says(sharp):
    "Calibrated or not, the true error rate of what is answered is above the wanted one in at most 5 % of held-out sets"
    big = sample(100_000, 999, sharp=sharp)
    found = [safe_threshold(*judged(*sample(400, s, sharp=sharp)), .1) for s in range(200)]
    true = {t:answered_above(*big, t)['error'] for t in set(found) if t is not None}
    broken = sum(t is not None and true[t]>.1 for t in found)
    assert sum(t is not None for t in found)>100
    assert broken<=binom.ppf(.9999, 200, .05)

def test_more_certainty_and_fewer_errors_ask_for_more_confidence():
    conf,right = judged(*sample(3000, 1))
    ts = [safe_threshold(conf, right, e) for e in (.02,.05,.1,.2)]
    assert ts==sorted(ts, reverse=True)
    assert safe_threshold(conf, right, .1, .999)>=safe_threshold(conf, right, .1, .9)
    assert safe_threshold(conf[:20], torch.ones(20), .05) is None # 20 images cannot promise 5 %, whatever they show
    assert safe_threshold(conf, torch.zeros(3000), .05) is None

def test_all_right_is_answered_in_full():
    z = 9*torch.eye(5).repeat(40, 1)
    t = safe_threshold(*judged(z, torch.arange(200)%5), .05)
    assert answered_above(z, torch.arange(200)%5, t)==dict(coverage=1., error=0.)

def test_nothing_answered_has_no_error_rate(): assert answered_above(*sample(10), 1.1)==dict(coverage=0., error=None)

def test_a_stricter_rate_stands_in_for_one_between():
    ts = {'0.01':None, '0.02':.97, '0.05':.9, '0.1':.8}
    assert kept_threshold(ts, .05, 100)==(.05,.9) and kept_threshold(ts, .07, 100)==(.05,.9) and kept_threshold(ts, .5, 100)==(.1,.8)
    with pytest.raises(ValueError, match='100 held-out images cannot promise an error rate of 0.01 .*can promise: 0.02, 0.05, 0.1'): kept_threshold(ts, .01, 100)
    with pytest.raises(ValueError, match='none at all'): kept_threshold({'0.1':None}, .1, 5)

# --- a run

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp('run')/'run', held_out=fit_calibration(*sample(400), seed=1)['held_out'])

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    d = tmp_path_factory.mktemp('photos')
    for i in range(8): Image.fromarray(load_images('digits').test[0][i].permute(1, 2, 0).numpy()).save(d/f'{i}.png')
    return d

def test_prediction_abstains_below_the_threshold(folder, photos, capsys):
    config = json.loads((folder/'fclora.json').read_text())
    rate,t = kept_threshold(config['held_out']['min_confidence'], .12, 200)
    rows = predict(folder, photos, max_error=.12, device='cpu')
    out,err = capsys.readouterr()
    assert f'from a confidence of {t:.3f} on' in err and f'at most {rate:.1%}' in err and '200 held-out' in err
    assert [o['abstains'] for o in rows]==[o['top'][0]['probability']<t for o in rows] and 'abstains' in out.splitlines()[0]
    by_hand = predict(folder, photos, min_confidence=t, device='cpu')
    assert [o['abstains'] for o in by_hand]==[o['abstains'] for o in rows] and not capsys.readouterr().err
    assert 'abstains' not in predict(folder, photos, device='cpu')[0]

def test_wrong_use_is_one_clear_error(folder, photos):
    for kw,msg in ((dict(min_confidence=1.5), '--min-confidence must be a number in 0.0..1.0'), (dict(min_confidence=.5, max_error=.1), 'not both'),
                   (dict(max_error=5.), '--max-error must be a number in'), (dict(max_error=.0001), '200 held-out images cannot promise')):
        with pytest.raises(ValueError, match=msg): predict(folder, photos, device='cpu', **kw)
    with pytest.raises(ValueError, match='--max-error needs promises'): lowest_confidence({}, max_error=.1)

def test_sets_and_abstaining_go_together():
    config = dict(classes=list('abcdefgh'), held_out=fit_calibration(*sample(400), seed=1)['held_out'])
    z,_ = sample(5, 3)
    rows = decisions(config, .9, 'threshold', lowest=.5)(z)
    assert [o['abstains'] for o in rows]==(z.softmax(1).amax(1)<.5).tolist() and all(set(o)=={'set','abstains'} for o in rows)
