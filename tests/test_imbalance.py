"Rare classes: weights, sampler, what they change and what they must not"
import math, warnings
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torchmetrics.functional.classification import multiclass_f1_score, multiclass_recall
from conftest import make_images
from PIL import Image
from fclora.backbones import create_backbone, image_config
from fclora.calibration.intervals import calibration_table
from fclora.calibration.labels import task_nll
from fclora.calibration.temperature import fit_temperature
from fclora.data.loaders import get_dls, score_dl
from fclora.data.sources import load_images
from fclora.runs.evaluate import evaluate
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_run
from fclora.train.imbalance import WeightedLoss, balanced_dls, class_weights, effective_number, inverse_frequency
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import recipe

pytestmark = pytest.mark.usefixtures('one_thread')
targs = torch.tensor([0]*60+[1]*30+[2]*3)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "66 images of a, 6 of b"
    root = make_images(tmp_path_factory.mktemp('d')/'pets', ('a','b'), n=66)
    for f in sorted((root/'b').iterdir())[6:]: f.unlink()
    return root

@pytest.fixture(scope='module')
def dls(folder):
    return get_dls(load_images(folder, 32, progress=False), **image_config(create_backbone('vit_pico', 2)), bs=8, device='cpu')

# Weights

@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=20))
def test_inverse_frequency_is_balanced_of_scikit_learn(counts):
    ys = np.repeat(range(len(counts)), np.minimum(counts, 50))
    got = class_weights('inverse', torch.tensor(ys), list(range(len(counts))))
    assert got.numpy()==pytest.approx(compute_class_weight('balanced', classes=np.unique(ys), y=ys), rel=1e-5)

@given(st.integers(1, 2000), st.sampled_from([0.,.9,.99,.999,.9999]))
def test_the_effective_number_is_the_expected_volume(n, beta):
    "Cui et al. 2019, eq. 1: E_n = 1 + beta*E_(n-1)"
    e = 0.
    for _ in range(n): e = 1+beta*e
    assert 1/effective_number(torch.tensor([n]), beta).item()==pytest.approx(e, rel=1e-9)

def test_effective_numbers_lie_between_no_weights_and_inverse_frequency():
    n = torch.tensor([1,10,100,1000,100000])
    inverse,effective = inverse_frequency(n),effective_number(n)
    assert torch.allclose(effective_number(n, 0.), torch.ones(5).double()) and torch.allclose(effective_number(n, 1-1e-9), inverse, rtol=1e-3)
    assert effective[0]/effective[-1]<inverse[0]/inverse[-1] and (effective.diff()<0).all()

@pytest.mark.parametrize('rule', ['auto','inverse','effective',dict(a=1,b=5,c=2)])
def test_weights_are_one_on_average_over_the_images(rule):
    assert class_weights(rule, targs, ['a','b','c'])[targs].mean().item()==pytest.approx(1)

def test_a_file_of_weights_and_its_mistakes(tmp_path):
    file = tmp_path/'w.csv'
    def text(s): file.write_text(s); return recipe(class_weights=str(file))
    assert text('class;weight\nb;5\na;1\n')['class_weights']==dict(a=1., b=5.)
    for s,piece in {'class,weight\na,x\n':'no number: line 2 (x)', 'class,w\na,1\n':'no column is called weight', 'class,weight\n':'no rows'}.items():
        with pytest.raises(ValueError) as e: text(s)
        assert piece in str(e.value)
    for w in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match='finite and above 0'): recipe(class_weights=dict(a=1, b=w))
    with pytest.raises(ValueError, match='no weight for b; no class B'): class_weights(dict(a=1, B=1), torch.tensor([0,1]), ['a','b'])
    with pytest.raises(ValueError, match='class_weights must be none, auto'): recipe(class_weights='often')

# Loss

@pytest.mark.parametrize('eps', [0.,.1])
def test_an_image_counts_as_often_as_its_weight_says(eps):
    z,y,w = torch.randn(30, 3),torch.randint(3, (30,)),torch.tensor([1.,2.,3.])
    repeated = torch.arange(30).repeat_interleave(w[y].long())
    got = WeightedLoss(w, eps)(z, y)
    assert got.item()==pytest.approx(F.cross_entropy(z[repeated], y[repeated], label_smoothing=eps, reduction='sum').item()/30, rel=1e-5)

def test_cutmix_mixes_the_weighted_losses_of_both_labels(dls):
    both = balanced_dls(dls) # so that a batch has images of both classes
    learn = fclora_learner(both, create_backbone('vit_pico', 2), 'head', recipe(epochs=1, cutmix=1., class_weights='inverse'))
    mix = learn.cut_mix
    learn._split(both.train.one_batch()); learn.model.train(); learn.training = True
    mix.before_train(); mix.before_batch()
    z = learn.model(learn.x)
    got,lam = learn.loss_func(z, *learn.yb).item(),mix.lam.item()
    mix.after_train()
    def one(y): return (F.cross_entropy(z, y, label_smoothing=.1, reduction='none')*learn.counted[y]).mean()
    y0,y1 = [o.as_subclass(torch.Tensor) for o in (learn.yb[0], mix.yb1[0])]
    want = lam*one(y0)+(1-lam)*one(y1)
    assert got==pytest.approx(want.item(), rel=1e-5) and 0<lam<1 and abs(got-one(y0).item())>1e-4

def test_without_weights_the_loss_is_the_old_one(dls):
    learn = fclora_learner(dls, create_backbone('vit_pico', 2), 'head', recipe(epochs=1))
    assert learn.counted is None and type(learn.loss_func).__name__=='LabelSmoothingCrossEntropyFlat'

# Sampler

def test_the_sampler_balances_training_and_nothing_else(dls):
    balanced = balanced_dls(dls)
    drawn = torch.cat([y for _ in range(30) for _,y in balanced.train])
    assert abs((drawn==1).float().mean().item()-.5)<.06 and len(balanced.train)==len(dls.train)
    natural = dls.train_ds.y.bincount()
    assert balanced.valid is dls.valid and balanced[2] is dls[2]
    assert torch.equal(torch.cat([y for _,y in score_dl(balanced)]).bincount(), natural)   # scores and probes see true frequencies
    one,two = [torch.cat([y for _,y in balanced_dls(dls).train]) for _ in range(2)]
    assert torch.equal(one, two)

def test_recipe_balanced_draws_so_and_is_not_given_with_weights(dls):
    learn = fclora_learner(dls, create_backbone('vit_pico', 2), 'head', recipe(epochs=1, balanced=True))
    assert learn.dls.train.wgts is not None and dls.train.wgts is None
    assert torch.equal(learn.counted, class_weights('inverse', dls.train_ds.y, dls.vocab))
    with pytest.raises(ValueError, match='give one of them'): recipe(balanced=True, class_weights='auto')

# Temperature and numbers

def test_weights_do_not_reach_the_temperature():
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))*3
    y = torch.randint(3, (200,), generator=torch.Generator().manual_seed(1))
    w = torch.tensor([1.,5.,9.])
    T = fit_temperature(z, y)
    assert task_nll(z, y, w)==pytest.approx(F.cross_entropy(z.double()/T, y, weight=w.double()).item())
    assert task_nll(z, y, torch.ones(3))==pytest.approx(task_nll(z, y))

@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_balanced_accuracy_and_macro_f1_are_those_of_other_libraries(seed, c):
    g = torch.Generator().manual_seed(seed)
    z,y = torch.randn(40, c, generator=g),torch.randint(c, (40,), generator=g)**2//c   # some classes are rare or missing
    table,pred = calibration_table(z, y, 1., n_boot=2),z.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert table['balanced_accuracy']==pytest.approx(balanced_accuracy_score(y, pred))
        assert table['macro_f1']==pytest.approx(f1_score(y, pred, average='macro'))
    assert table['macro_f1']==pytest.approx(multiclass_f1_score(pred, y, c, average='macro').item(), abs=1e-6)
    if len(y.unique())==c: assert table['balanced_accuracy']==pytest.approx(multiclass_recall(pred, y, c, average='macro').item(), abs=1e-6)

# Whole runs

def test_a_warning_at_the_start_where_classes_differ_by_ten(folder, tmp_path):
    few = make_images(tmp_path/'even', ('a','b'), n=12)
    options = dict(model='vit_pico', method='head', epochs=1, batch_size=8, probe=False, quiet=True)
    with pytest.warns(UserWarning, match='42 training images are of a and 4 of b'): finetune(str(folder), out=str(tmp_path/'one'), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*training images are of')
        finetune(str(few), out=str(tmp_path/'two'), **options)

@pytest.mark.parametrize('options', [dict(class_weights='auto'), dict(balanced=True), dict(class_weights='file', cutmix=1.)], ids=['weights','sampler','file'])
def test_a_run_with_weights_keeps_the_temperature_of_true_frequencies(folder, tmp_path, options, recwarn, capsys):
    if options.get('class_weights')=='file':
        (tmp_path/'w.csv').write_text('label,weight\na,1\nb,20\n')
        options = dict(options, class_weights=str(tmp_path/'w.csv'))
    out = tmp_path/'run'
    run = finetune(str(folder), model='vit_pico', epochs=2, batch_size=8, score_batches=1, budget=18, quiet=True, out=str(out), **options)
    (tmp_path/'w.csv').unlink(missing_ok=True)   # the run does not need the file any more
    dls = get_dls(load_images(folder, 32, progress=False), **run.config['image'], device='cpu')
    loaded = load_run(out)
    assert loaded.config['T']==pytest.approx(fit_temperature(*get_logits(loaded.model, dls.valid)), rel=1e-3)
    assert 'balanced accuracy / macro F1' in capsys.readouterr().out
    assert evaluate(str(out), quiet=True)['macro_f1']==pytest.approx(run.metrics['test']['macro_f1'])
    assert run.config['recipe']['class_weights']==(dict(a=1., b=20.) if 'cutmix' in options else options.get('class_weights', 'none'))

@pytest.mark.parametrize('options', [dict(class_weights='inverse'), dict(balanced=True)], ids=['weights','sampler'])
def test_what_says_nothing_is_taken_for_either_class_alike(options, tmp_path):
    "Pure noise, 9 of 10 of one class: the honest probability is .1, and training as if both were alike makes it .5"
    for i in range(100):
        (tmp_path/'ab'[i%10==0]).mkdir(exist_ok=True)
        px = np.random.default_rng(i).integers(0, 256, (32,32,3), dtype=np.uint8)
        Image.fromarray(px).save(tmp_path/'ab'[i%10==0]/f'{i}.png')
    dls = get_dls(load_images(tmp_path, 32, progress=False), **image_config(create_backbone('vit_pico', 2)), bs=16, device='cpu')
    def rare(**options):
        learn = fclora_learner(dls, create_backbone('vit_pico', 2), 'head', recipe(epochs=6, head_lr=.01, smoothing=0., cutmix=0, **options))
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
        return get_logits(learn.model, dls[2])[0].softmax(1)[:,1].mean().item()
    assert rare()<.25 and .35<rare(**options)<.65
