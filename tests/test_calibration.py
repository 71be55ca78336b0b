"Temperature and calibration errors: equality with torchmetrics and scipy, invariances, edges, errors"
import json,math,subprocess,sys,warnings
from copy import deepcopy
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np, pytest, torch
from hypothesis import given,settings,strategies as st
from scipy.optimize import minimize_scalar
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error
from fclora.calibration.temperature import *
from fclora.calibration.ece import *
from fclora.calibration.intervals import *
from fclora.calibration.reliability import *

def sample(seed, n=500, c=10, scale=3., sharp=1.):
    "Logits that are `sharp` times too sharp for the labels drawn from them"
    g = torch.Generator().manual_seed(seed)
    z = scale*torch.randn(n, c, generator=g)
    return sharp*z,torch.multinomial(z.softmax(1), 1, generator=g)[:,0]

cases = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 10**6)

# --- against torchmetrics

@cases
@given(seeds, st.integers(1, 400), st.integers(2, 30), st.sampled_from([1,2,5,10,15,50]), st.floats(.2, 4), st.floats(.2, 3))
def test_ece_and_mce_equal_torchmetrics(seed, n, c, n_bins, scale, T):
    z,y = sample(seed, n, c, scale)
    p = (z.double()/T).softmax(1)
    if p.max().float()==1: return
    for norm,f in (('l1',ece),('max',mce)):
        assert f(z, y, T, n_bins)==pytest.approx(multiclass_calibration_error(p, y, c, n_bins, norm).item(), abs=1e-6)

@pytest.mark.parametrize('c,n_bins', [(2,2),(2,4),(2,10),(4,4),(4,8),(4,20),(8,16),(3,15),(5,15)])
def test_confidence_on_a_bin_edge_goes_right_as_in_torchmetrics(c, n_bins):
    z = torch.zeros(4, c); z[2:,0] = -.5   # two at exactly 1/c, two a little above
    y = torch.tensor([0,1,0,1])
    t = reliability(z, y, n_bins=n_bins)
    assert t['count'][n_bins//c-1]==0 and t['count'][n_bins//c]>=2
    if c in (2,4,8): # elsewhere float32 may round the edge and the confidence apart
        assert ece(z, y, n_bins=n_bins)==pytest.approx(multiclass_calibration_error(z.softmax(1), y, c, n_bins).item(), abs=1e-6)

def test_confidence_of_exactly_one_is_counted_in_the_last_bin():
    p = torch.tensor([[1.,0.]]*2+[[.97,.03]]*2)
    z,y = p.log().clamp(min=-1000),torch.tensor([0,1,0,0])
    by_hand = abs((1+1+.97+.97)/4-3/4)   # one bin, 3 of 4 right
    assert ece(z, y)==pytest.approx(by_hand, abs=1e-6)==mce(z, y)
    assert reliability(z, y)['count'].tolist()==[0]*14+[4]
    if multiclass_calibration_error(p, y, 2).item()==pytest.approx(by_hand, abs=1e-6): pytest.skip('torchmetrics counts it too by now')
    assert multiclass_calibration_error(p, y, 2).item()==pytest.approx(.5*.5+.5*.03, abs=1e-6)   # two bins of 1.0 and 0.97

def test_confidence_of_exactly_zero_elsewhere_is_harmless():
    z,y = torch.tensor([[0.,-1e4,-1e30]]*3),torch.tensor([0,0,1])
    assert confidence(z)[0].tolist()==[1.]*3
    for f in (ece,mce,adaptive_ece): assert f(z, y)==pytest.approx(1/3)
    assert classwise_ece(z, y)==pytest.approx(2/9) and brier(z, y)==pytest.approx(2/3)

@cases
@given(seeds, st.integers(2, 12), st.sampled_from([1,4,15]))
def test_classwise_ece_equals_one_loop_per_class(seed, c, n_bins):
    z,y = sample(seed, 200, c)
    p,tot = z.double().softmax(1).numpy(),0.
    for k in range(c):
        b = np.minimum((p[:,k]*n_bins).astype(int), n_bins-1)
        for i in range(n_bins):
            if (b==i).any(): tot += (b==i).mean()*abs(p[b==i,k].mean()-(y.numpy()[b==i]==k).mean())
    assert classwise_ece(z, y, n_bins=n_bins)==pytest.approx(tot/c, abs=1e-9)

def test_adaptive_ece_equals_chunks_of_the_sorted_samples():
    z,y = sample(0, 600)
    conf,pred = confidence(z)
    order = conf.argsort()
    gaps = [(conf[i]-(pred[i]==y[i]).double()).mean().abs().item() for i in order.chunk(15)]
    assert adaptive_ece(z, y)==pytest.approx(np.mean(gaps), abs=1e-12)

def test_adaptive_ece_of_equal_confidences_is_one_bin():
    z,y = torch.tensor([[2.,0.]]*90),torch.tensor([0]*60+[1]*30)
    assert adaptive_ece(z, y)==pytest.approx(ece(z, y))==pytest.approx(abs(1/(1+math.exp(-2))-2/3))

@cases
@given(seeds, st.floats(.3, 3))
def test_nll_and_brier_equal_their_formulas(seed, T):
    z,y = sample(seed, 50, 4)
    p = (z.double()/T).softmax(1)
    assert nll(z, y, T)==pytest.approx(-p[range(50),y].log().mean().item(), abs=1e-10)
    assert brier(z, y, T)==pytest.approx((p-torch.eye(4)[y]).square().sum(1).mean().item(), abs=1e-10)

# --- the temperature

@settings(max_examples=80, deadline=None)
@given(seeds, st.integers(5, 300), st.integers(2, 20), st.floats(.05, 20), st.floats(.1, 10))
def test_temperature_equals_dense_search(seed, n, c, scale, sharp):
    z,y = sample(seed, n, c, scale, sharp)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); T = fit_temperature(z, y)
    grid = np.geomspace(.05, 20, 300)
    i = int(np.argmin([nll(z, y, t) for t in grid]))
    fine = minimize_scalar(lambda u: nll(z, y, math.exp(u)), bounds=np.log(grid[[max(i-1,0),min(i+1,299)]]), method='bounded', options=dict(xatol=1e-10))
    assert nll(z, y, T)<=min(fine.fun, nll(z, y, grid[i]))+1e-6*max(1, fine.fun)
    assert nll(z, y, T)<=nll(z, y) and .05<=T<=20

@pytest.mark.parametrize('zero', [.06,.5,1.,2.,19.])
@pytest.mark.parametrize('start', [.05,1.,20.])
def test_root_converges_where_newton_alone_would_cycle(zero, start):
    steep = lambda x: (math.atan(10*(x-zero)), 10/(1+100*(x-zero)**2))
    assert newton_root(steep, .05, 20., start)==pytest.approx(zero, rel=1e-9)
    assert newton_root(steep, .05, zero*.9, .05)==zero*.9 and newton_root(steep, zero*1.1, 30., 30.)==zero*1.1

def test_temperature_scales_with_the_logits():
    z,y = sample(2)
    assert fit_temperature(3*z.double(), y)==pytest.approx(3*fit_temperature(z.double(), y), rel=1e-7)

def test_temperature_of_hopeless_or_flat_logits_is_exactly_one():
    assert fit_temperature(torch.zeros(5, 3), torch.tensor([0,1,2,0,1]))==1.
    assert fit_temperature(torch.eye(3)*1e5, torch.arange(3))==1.   # NLL is 0 already

@pytest.mark.parametrize('z,y,T,why', [
    (torch.eye(4)*2, torch.arange(4), .05, 'every prediction is right'),
    (torch.eye(4)*2, torch.arange(4).roll(1), 20., 'same order'),
    (sample(0)[0].softmax(1)/20, sample(0)[1], .05, 'probabilities')])
def test_temperature_warns_at_a_bound(z, y, T, why):
    with pytest.warns(UserWarning, match=why): assert fit_temperature(z, y)==T

def test_temperature_inside_the_bounds_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter('error'); fit_temperature(*sample(3))

@pytest.mark.parametrize('scale', [1e-30,1e-4,1e4,1e30])
def test_extreme_logits_give_finite_numbers(scale):
    z,y = sample(4, scale=1.)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); T = fit_temperature(z*scale, y)
    assert nll(z*scale, y, T)<=nll(z*scale, y)<math.inf and 0<=ece(z*scale, y, T)<=1

def test_one_sample_and_one_missing_class():
    z,y = sample(5, 100, 4)
    T = fit_temperature(z[y!=2], y[y!=2])
    assert nll(z[y!=2], y[y!=2], T)<=nll(z[y!=2], y[y!=2])
    assert class_accuracy(z[y!=2], y[y!=2]).isnan().tolist()==[False,False,True,False]
    t = calibration_table(z[:1], y[:1], 1., n_boot=20)
    assert t['n']==1 and t['class_acc_std']==0

# --- invariances

@cases
@given(seeds, st.floats(.05, 20))
def test_order_of_samples_and_of_classes_does_not_matter(seed, T):
    z,y = sample(seed, 200, 6)
    z,g = z.double(),torch.Generator().manual_seed(seed)
    i,k = torch.randperm(200, generator=g),torch.randperm(6, generator=g)
    for zz,yy in ((z[i],y[i]), (z[:,k],k.argsort()[y])):
        for f in (nll,brier,ece,mce,adaptive_ece,classwise_ece): assert f(zz, yy, T)==pytest.approx(f(z, y, T), abs=1e-9)
        assert top1(zz, yy)==top1(z, y)
        assert fit_temperature(zz, yy)==pytest.approx(fit_temperature(z, y), rel=1e-7)
    torch.testing.assert_close(class_accuracy(z[:,k], k.argsort()[y]), class_accuracy(z, y)[k], equal_nan=True)

@cases
@given(seeds, st.floats(.05, 20), st.floats(-50, 50))
def test_a_shift_of_the_logits_does_nothing_and_T_keeps_the_predictions(seed, T, shift):
    z,y = sample(seed, 100)
    assert torch.equal(confidence(z, T)[1], z.argmax(1))
    assert ece(z.double()+shift, y, T)==pytest.approx(ece(z.double(), y, T), abs=1e-9)

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_any_float_type_numpy_and_gradients_are_accepted(dtype):
    z,y = sample(6)
    z = z.to(dtype)
    assert ece(z, y)==ece(z.double().numpy(), y.numpy())==ece(z.clone().requires_grad_(), y.int())

# --- noise

def coverage(f, reps, **kw): return np.mean([f(*sample(i, **kw)) for i in range(reps)])

def test_floor_is_the_mean_and_quantile_of_calibrated_eces():
    z,_ = sample(0, 400)
    g = torch.Generator().manual_seed(0)
    eces = [ece(z, torch.multinomial(z.softmax(1), 1, generator=g)[:,0]) for _ in range(600)]
    mean,upper = ece_floor(z)
    assert mean==pytest.approx(np.mean(eces), rel=.05) and .91<np.mean(np.array(eces)<upper)<.98

def test_floor_depends_on_seed_and_level_only():
    z,_ = sample(0, 100)
    assert ece_floor(z, n_sim=50)==ece_floor(z, n_sim=50)!=ece_floor(z, n_sim=50, seed=1)
    assert ece_floor(z, level=.5)[1]<ece_floor(z, level=.99)[1]

@pytest.mark.parametrize('sharp', [.5,1.3,2.])
def test_interval_holds_the_ece_of_a_large_sample(sharp):
    truth = ece(*sample(10**6, n=400_000, sharp=sharp))
    def holds(z, y):
        lo,hi = ece_interval(z, y, n_boot=200)
        return lo<=truth<=hi
    assert coverage(holds, 150, n=600, sharp=sharp)>.83

def test_interval_contains_the_measured_value_and_narrows():
    for n in (3,30,300):
        z,y = sample(7, n)
        lo,hi = ece_interval(z, y, n_boot=100)
        assert 0<=lo<=ece(z, y)<=hi
    z,y = sample(8, 4000, sharp=2.)
    width = lambda k, **kw: np.diff(ece_interval(z[:k], y[:k], n_boot=300, **kw))[0]
    assert width(4000)<.7*width(1000) and width(1000, level=.5)<width(1000)
    assert ece_interval(z, y, n_boot=20)==ece_interval(z, y, n_boot=20)!=ece_interval(z, y, n_boot=20, seed=1)

# --- table, picture, wrapper

def test_32_bits_give_the_confidence_of_64():
    z,y = sample(8, n=5000, c=100)
    assert confidence(z)[0].dtype==torch.float64
    torch.testing.assert_close(confidence(z)[0], confidence(z.double())[0], rtol=1e-5, atol=0)
    assert ece(z, y)==pytest.approx(ece(z.double(), y), abs=1e-6)

def test_table_is_plain_json_and_agrees_with_the_functions():
    z,y = sample(9, sharp=2.)
    z = z.double()
    t = calibration_table(z, y, 2., n_bins=10, n_boot=50)
    assert json.loads(json.dumps(t, allow_nan=False))==t
    for f in (ece,mce,adaptive_ece,classwise_ece): assert (t[f.__name__+'_raw'],t[f.__name__])==(f(z, y, 1., 10),f(z, y, 2., 10))
    for f in (nll,brier): assert (t[f.__name__+'_raw'],t[f.__name__])==(f(z, y),f(z, y, 2.))
    assert t['ece_interval']==list(ece_interval(z, y, 2., 10, 50)) and [t['ece_floor'],t['ece_floor_upper']]==list(ece_floor(z, 2., 10, 50))
    assert (t['n'],t['T'],t['n_bins'],t['accuracy'])==(500,2.,10,top1(z, y))
    accs = class_accuracy(z, y).numpy()
    assert (t['class_acc_mean'],t['class_acc_std'])==(pytest.approx(np.nanmean(accs)),pytest.approx(np.nanstd(accs)))

def test_reliability_table_adds_up_to_the_ece():
    z,y = sample(10)
    t = reliability(z, y, n_bins=7)
    full = t['count']>0
    assert t['count'].sum()==500 and t['lo'][0]==0 and t['hi'][-1]==1
    assert ((t['conf']>=t['lo'])&(t['conf']<=t['hi']))[full].all()
    assert ((t['conf']-t['acc']).abs()*t['count'])[full].sum()/500==pytest.approx(ece(z, y, n_bins=7))

def test_plot_draws_one_bar_for_each_bin_on_the_axes_given():
    fig,axs = plt.subplots(1, 2)
    z,y = sample(11)
    res = plot_reliability(z, y, 2., n_bins=8, axs=axs)
    assert res is axs and [len(ax.containers[0]) for ax in axs]==[8,8] and f'{ece(z, y, 2., 8):.3f}' in axs[1].get_title()
    counts = fig.axes[-1].containers[0]
    assert sum(o.get_height() for o in counts)==500
    plt.close(fig)

def test_matplotlib_waits_for_a_picture():
    code = 'import sys, fclora.calibration.reliability; print("matplotlib" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='False'

def test_calibrated_divides_and_survives_state_dict_and_copy():
    model,x = nn.Linear(4, 3),torch.randn(5, 4)
    cal,other = Calibrated(model, 2.5),Calibrated(nn.Linear(4, 3))
    other.load_state_dict(cal.state_dict())
    for m in (cal,other,deepcopy(cal)): torch.testing.assert_close(m(x), model(x)/2.5)
    assert dict(cal.named_buffers()).keys()=={'T'} and not cal.T.requires_grad
    assert cal.to(torch.bfloat16)(x.bfloat16()).dtype==torch.bfloat16

# --- errors

z4,y4 = torch.zeros(4, 3),torch.zeros(4).long()
@pytest.mark.parametrize('z,y,msg', [
    (torch.zeros(0, 3), y4[:0], r'at least 1 sample.*\(0, 3\)'),
    (torch.zeros(4, 1), y4, r'2 classes, got \(4, 1\)'),
    (torch.zeros(4), y4, r'\(n, c\).*\(4,\)'),
    (torch.zeros(2, 2, 2), y4, r'\(n, c\)'),
    (z4, y4[:3], r'targs must be \(4,\).*\(3,\)'),
    (z4, y4[:,None], r'targs must be \(4,\).*\(4, 1\)'),
    (z4, y4.float(), 'integer type, got torch.float32'),
    (z4, y4.bool(), 'integer type, got torch.bool'),
    (z4, y4-1, r'0\.\.2, got -1\.\.-1'),
    (z4, y4+3, r'0\.\.2, got 3\.\.3'),
    (z4.index_fill(0, torch.tensor([2]), math.nan), y4, '1 of 4 rows, first in row 2'),
    (z4.index_fill(0, torch.tensor([1,3]), math.inf), y4, '2 of 4 rows, first in row 1')])
def test_bad_logits_and_targets(z, y, msg):
    for f in (top1,class_accuracy,nll,brier,fit_temperature,ece,mce,adaptive_ece,classwise_ece,reliability,ece_interval):
        with pytest.raises(ValueError, match=msg): f(z, y)
    for f in (calibration_table,plot_reliability):
        with pytest.raises(ValueError, match=msg): f(z, y, 1.)

@pytest.mark.parametrize('T', [0,-1.,math.nan,math.inf])
def test_bad_temperature(T):
    for f in (nll,brier,ece,mce,adaptive_ece,classwise_ece,reliability,ece_interval,calibration_table):
        with pytest.raises(ValueError, match='T must be'): f(z4, y4, T)
    for f in (confidence,ece_floor):
        with pytest.raises(ValueError, match='T must be'): f(z4, T)
    with pytest.raises(ValueError, match='T must be'): Calibrated(nn.Identity(), T)

@pytest.mark.parametrize('bad', [0,-1,2.5,None])
def test_bad_counts(bad):
    for f in (ece,mce,adaptive_ece,classwise_ece,reliability,ece_interval):
        with pytest.raises(ValueError, match='n_bins must be'): f(z4, y4, n_bins=bad)
    with pytest.raises(ValueError, match='n_bins must be'): ece_floor(z4, n_bins=bad)
    with pytest.raises(ValueError, match='n_sim must be'): ece_floor(z4, n_sim=bad)
    with pytest.raises(ValueError, match='n_boot must be'): ece_interval(z4, y4, n_boot=bad)

@pytest.mark.parametrize('level', [0,1,1.5,-.1])
def test_bad_level(level):
    with pytest.raises(ValueError, match='level must lie'): ece_floor(z4, level=level)
    with pytest.raises(ValueError, match='level must lie'): ece_interval(z4, y4, level=level)

@pytest.mark.parametrize('bounds', [(0,2),(2,5),(.1,.5),(5,.1),(.1,math.inf)])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match='bounds must be'): fit_temperature(z4, y4, bounds)

def test_class_accuracy_needs_room_for_the_classes():
    with pytest.raises(ValueError, match='at least 3'): class_accuracy(torch.eye(3), torch.arange(3), n_classes=2)
    assert class_accuracy(torch.eye(3), torch.arange(3), n_classes=5).isnan().tolist()==[False]*3+[True]*2
