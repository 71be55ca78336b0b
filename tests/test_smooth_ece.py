"Smooth ECE: against relplot, and what must hold of it"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from fclora.calibration.ece import *
from fclora.calibration.intervals import calibration_table
from fclora.calibration.smooth_ece import *

def sample(n=500, seed=0, c=5, spread=1.5, sharp=1.):
    g = torch.Generator().manual_seed(seed)
    z = spread*torch.randn(n, c, generator=g)
    return sharp*z, torch.multinomial(z.softmax(1), 1, generator=g)[:,0]

@pytest.mark.parametrize('n,c,spread,sharp', [(200,3,1.,1.),(500,10,1.5,2.),(2000,10,2.,.5),(300,10,4.,1.),(5000,5,3.,1.3),(60,2,1.,1.)])
def test_against_relplot(n, c, spread, sharp, monkeypatch):
    relplot = pytest.importorskip('relplot')
    monkeypatch.setattr(relplot.config, 'use_logit_scaling', False)
    from relplot.metrics import smECE
    z,y = sample(n, n, c, spread, sharp)
    conf,right = judged(z, y)
    assert smooth_ece(z, y)==pytest.approx(smECE(conf.numpy(), right.numpy()), abs=2e-3)

def test_smoothing_is_convolution_with_the_reflected_gaussian():
    m,w = 400,.07
    gaps = np.random.default_rng(0).normal(size=m)
    x = (np.arange(m)+.5)/m
    kernel = sum(np.exp(-(x[:,None]-centre)**2/(2*w*w)) for k in range(-3, 4) for centre in (x+2*k, 2*k-x))
    np.testing.assert_allclose(smoothed_gaps(gaps, w), kernel@gaps/(m*w*np.sqrt(2*np.pi)), atol=1e-10)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 300), st.floats(.2, 5))
def test_it_lies_between_0_and_the_finest_ece_and_equals_its_own_width(seed, n, sharp):
    z,y = sample(n, seed, sharp=sharp)
    s = smooth_ece(z, y)
    conf,right = judged(z, y)
    cell = (conf*4096).long().clamp(max=4095).numpy()
    gaps = np.bincount(cell, (conf-right).numpy(), 4096)/n
    assert abs((conf-right).mean().item())-1e-4<=s<=np.abs(gaps).sum()+1e-6
    assert np.abs(smoothed_gaps(gaps, s)).sum()==pytest.approx(s, abs=1e-4)

def test_order_and_shift_do_nothing_and_it_is_in_the_table():
    z,y = sample(300)
    i = torch.randperm(300)
    assert smooth_ece(z[i], y[i])==pytest.approx(smooth_ece(z, y)) and smooth_ece(z+7., y)==pytest.approx(smooth_ece(z, y), abs=1e-4)
    t = calibration_table(z, y, 2., n_boot=10)
    assert (t['smooth_ece_raw'],t['smooth_ece'])==(pytest.approx(smooth_ece(z, y), abs=1e-6),pytest.approx(smooth_ece(z, y, 2.), abs=1e-6))

def test_extremes():
    sure = torch.tensor([[50.,0]]).repeat(10, 1)
    assert smooth_ece(sure, torch.zeros(10).long())==pytest.approx(0, abs=1e-6)
    assert smooth_ece(sure, torch.ones(10).long())==pytest.approx(1, abs=1e-3)
