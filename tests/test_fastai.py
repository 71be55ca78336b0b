"What people do with a fastai Learner, done with ours; each test backs a row of the table in nbs/tutorials/10_with_fastai.ipynb"
import inspect, json, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision, ModelToHalf
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import load_learner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from conftest import make_images
from fclora.adapt import adapter_params, adapter_state, count_params
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.plan import Plan
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import recipe

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:.*is deprecated:FutureWarning')]
page = Path(__file__).parent.parent/'nbs/tutorials/10_with_fastai.ipynb'
claims = set()

def claim(*rows):
    "Mark a test as the evidence for rows of the page's table"
    claims.update(rows)
    return lambda f: f

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return make_images(tmp_path_factory.mktemp('d')/'shapes', ('a','b','c'), n=20)

@pytest.fixture(scope='module')
def images(folder): return load_images(folder, 32, progress=False)

@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    import matplotlib; matplotlib.use('agg')
    monkeypatch.chdir(tmp_path)

def backbone(seed=0):
    torch.manual_seed(seed)
    return create_backbone('vit_pico', 3)

@pytest.fixture
def make(images):
    def make(regime=None, cbs=None, bs=8, seed=0, flip=None, budget=36, **kw):
        model = backbone(seed)
        dls = get_dls(images, **image_config(model), bs=bs, flip=flip, device='cpu')
        plan = regime or make_plan('vit_pico', find_sites(model), method='uniform', budget=budget)
        learn = fclora_learner(dls, model, plan, recipe(epochs=1, **kw), seed=seed, cbs=cbs)
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *a: None
        return learn
    return make

def state(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def trained(learn): return {n for n,p in learn.model.named_parameters() if p.requires_grad}
def changed(learn, before): return {k for k,v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
def logits(learn): return get_logits(learn.model, learn.dls.valid)[0]
def adapters_and_head(learn): return {*adapter_params(learn.model), 'head.weight', 'head.bias'}

# --- training

@claim('`fit`, `fit_one_cycle`, `fit_flat_cos`, `fine_tune`')
def test_training_again_goes_on_from_where_it_was(make):
    learn = make()
    learn.fit_one_cycle(1, 1e-3)
    between,opt = state(learn),learn.opt
    starts = []
    class Start(Callback):
        def before_fit(self): starts.append(state(self))
    learn.fit_one_cycle(2, 1e-3, cbs=Start())
    assert all(torch.equal(v, starts[0][k]) for k,v in between.items())
    assert learn.opt is opt and len(learn.recorder.values)==2
    assert changed(learn, between)==adapters_and_head(learn)
    learn.fit_flat_cos(1, [1e-3]*3)
    before = state(learn)
    learn.fine_tune(1)
    assert changed(learn, before)==adapters_and_head(learn)==trained(learn)

@claim('an interrupted fit')
@pytest.mark.parametrize('error', [KeyboardInterrupt, FloatingPointError])
def test_an_interrupted_learner_still_predicts_and_trains(make, error):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter==1: raise error('stop')
    learn = make()
    loss_func = learn.loss_func
    with pytest.raises(error): learn.fit(1, cbs=Stop())
    assert learn.loss_func is loss_func and not hasattr(learn, 'stop')
    assert_close(torch.Tensor(learn.get_preds()[0]).sum(1), torch.ones(len(learn.dls.valid_ds)))
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])

@claim('`lr_find`')
def test_lr_find_leaves_no_trace(make):
    learn = make()
    before = state(learn)
    assert 1e-6<learn.lr_find(num_it=20).valley<1
    assert not changed(learn, before)
    learn = make(clip=0)
    before = state(learn)
    learn.lr_find(num_it=40, end_lr=1e38, stop_div=False, suggest_funcs=None, show_plot=False)
    assert not torch.isfinite(learn.recorder.losses[-1]) and len(learn.recorder.losses)<40
    assert not changed(learn, before)
    assert not list(Path('models').rglob('*.pth'))

@claim('`freeze`, `unfreeze`, `freeze_to`')
@pytest.mark.parametrize('regime', [None,'head','full'])
def test_freezing_is_for_adapters_and_unfreezing_never_for_the_backbone(make, regime):
    learn = make(regime)
    everything,before = trained(learn),state(learn)
    learn.freeze()
    # fastai goes on training norms, which are free in full fine-tuning
    assert {n for n in trained(learn) if 'norm' not in n}=={'head.weight','head.bias'}
    learn.fit_recipe()
    assert {n for n in changed(learn, before) if 'norm' not in n}=={'head.weight','head.bias'}
    learn.export(); learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None) # both make or load an optimiser
    learn.unfreeze()
    assert trained(learn)==everything
    before = state(learn)
    learn.fit_recipe()
    assert changed(learn, before)==everything
    learn.freeze_to(0 if regime=='head' else 1)
    assert {n for n in trained(learn) if 'norm' not in n}=={'head.weight','head.bias'}
    with pytest.raises(ValueError, match=r'freeze_to\(2\) is out of range'): learn.freeze_to(2)

@claim('`GradientAccumulation`')
def test_accumulated_batches_are_one_large_batch(make):
    grads = []
    class Grads(Callback):
        order = 100
        def before_step(self): grads.append([p.grad.clone() for ps in self.opt.param_lists for p in ps])
    make(bs=8, cutmix=0, flip=False, cbs=[GradientAccumulation(32), Grads()]).fit(1)
    make(bs=32, cutmix=0, flip=False, cbs=Grads()).fit(1)
    a,b = grads # one step each
    assert sum(o.norm() for o in a)>.1
    for x,y in zip(a, b): assert_close(x, y, atol=1e-5, rtol=1e-3)

@claim('`MixUp`')
def test_mixup_takes_the_place_of_cutmix(make):
    learn = make(cutmix=0, cbs=MixUp(.4))
    learn.fit_recipe()
    assert np.isfinite(learn.recorder.values[-1][0])
    assert type(learn.loss_func).__name__=='LabelSmoothingCrossEntropyFlat'
    learn = make(cutmix=1)
    before = state(learn)
    for f in (lambda: learn.fit(1, cbs=MixUp()), lambda: learn.add_cb(MixUp), lambda: make(cutmix=1, cbs=[MixUp()])):
        with pytest.raises(ValueError, match='cutmix=0'): f()
    assert not changed(learn, before) and not hasattr(learn, 'mix_up')
    learn.remove_cb(CutMix)
    learn.fit(1, cbs=MixUp())
    assert changed(learn, before)

@claim('`to_fp16`, `to_bf16`, `to_fp32`')
def test_mixed_precision_is_there_where_the_device_has_it_and_never_twice(make):
    learn = make()
    for f in (learn.to_fp16, lambda: learn.fit(1, cbs=MixedPrecision)):
        with pytest.raises(ValueError, match='needs a CUDA device, and this Learner is on the cpu'): f()
    with patch('torch.cpu.get_capabilities', lambda: {}), pytest.raises(ValueError, match='no instructions for bfloat16'): learn.to_bf16()
    assert not any(isinstance(cb, MixedPrecision) for cb in learn.cbs)
    with patch('torch.cpu.get_capabilities', lambda: dict(avx512_bf16=True)): learn.to_bf16(); learn.fit(1)
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}
    learn.to_fp32()
    learn.dls = SimpleNamespace(device=torch.device('cuda')) # what `add_cb` looks at
    learn.to_bf16(); learn.to_fp16()
    assert [cb.amp_mode for cb in learn.cbs if isinstance(cb, MixedPrecision)]==[AMPMode.FP16]

@claim('`to_non_native_fp16`, `ModelToHalf`')
def test_frozen_weights_are_never_rounded(make):
    learn = make()
    before = state(learn)
    for f in (learn.to_non_native_fp16, lambda: learn.add_cb(ModelToHalf())):
        with pytest.raises(ValueError, match='ModelToHalf rounds the frozen weights'): f()
    learn.fit(1)
    assert changed(learn, before)==adapters_and_head(learn)

# --- watching

@claim('`SaveModelCallback`, `EarlyStoppingCallback`')
def test_the_best_epoch_is_kept_and_a_hopeless_fit_ends(make):
    class Scores(Callback):
        order = 51 # after the Recorder, before the tracker
        def after_epoch(self):
            self.recorder.values[-1][1] = [1., .5, 2., 2., 2.][self.epoch] # made-up validation losses
            seen.append(state(self))
    seen = []
    learn = make(cbs=[Scores(), SaveModelCallback(), EarlyStoppingCallback(patience=2)])
    loss_func = learn.loss_func
    learn.fit_one_cycle(5, 1e-3)
    assert len(seen)==4
    assert all(torch.equal(v, seen[1][k]) for k,v in state(learn).items())
    assert learn.loss_func is loss_func

@claim('`CSVLogger`, `ShowGraphCallback`, progress bars')
def test_logs_and_graphs(make, capfd):
    learn = make()
    learn.add_cbs([ProgressCallback, CSVLogger, ShowGraphCallback])
    learn.fit_one_cycle(2, 1e-3)
    log = learn.csv_logger.read_log()
    assert list(log.columns)==['epoch','train_loss','valid_loss','accuracy','time'] and len(log)==2
    assert_close(log.valid_loss.tolist(), [float(v[1]) for v in learn.recorder.values])
    learn.fit(1)
    assert 'accuracy' in capfd.readouterr().out

@claim('`TensorBoardCallback`')
def test_tensorboard(make):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make(cbs=TensorBoardCallback('tb'))
    learn.fit_one_cycle(2, 1e-3)
    acc = EventAccumulator('tb')
    acc.Reload()
    assert {'train_loss','valid_loss','accuracy','lr_0','lr_2','wd_0'}<=set(acc.Tags()['scalars'])
    assert [e.value for e in acc.Scalars('accuracy')]==pytest.approx([v[2] for v in learn.recorder.values])
    assert acc.Tags()['graph'] and acc.Tags()['images']==['Sample results']

@claim('`WandbCallback`')
def test_wandb_offline(make, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb', reason='wandb is not installed')
    from fastai.callback.wandb import WandbCallback
    for k in ('CONFIG_DIR','CACHE_DIR','DATA_DIR'): monkeypatch.setenv(f'WANDB_{k}', str(tmp_path/'home'))
    learn = make(cutmix=1, cbs=WandbCallback(n_preds=4, seed=1))
    with wandb.init(mode='offline', dir=tmp_path, config=learn.recipe, settings=wandb.Settings(silent=True)) as run:
        learn.fit_recipe()
        assert run.summary['accuracy']==pytest.approx(learn.recorder.values[-1][2]) and 'lr_2' in run.summary.keys()
        assert 'Prediction_Samples' in run.summary.keys()
        assert run.config['cutmix']==1 and run.config['lr']==5e-3
    assert list(tmp_path.glob('wandb/offline-run-*/*.wandb'))

# --- keeping

@claim('`save`, `load`')
def test_saved_weights_come_back_and_those_of_other_ranks_do_not(make):
    learn = make()
    learn.fit_recipe()
    learn.save('best')
    other = make(seed=1)
    assert not torch.equal(logits(other), logits(learn))
    other.load('best')
    assert torch.equal(logits(other), logits(learn))
    other.fit(1)
    assert other.opt.hypers[0]['wd']==.05
    with pytest.raises(RuntimeError, match='size mismatch'): make(budget=54).load('best')

@claim('`export`, `load_learner`')
def test_an_exported_learner_says_the_same_in_another_process(make, folder):
    learn,img = make(),next(folder.rglob('*.png'))
    learn.fit(1, cbs=CSVLogger())
    want = learn.predict(img)
    learn.export('learner.pkl')
    assert Path('learner.pkl').stat().st_size<7e6 # without the images
    back = load_learner('learner.pkl')
    assert torch.equal(get_logits(back.model, learn.dls.valid)[0], logits(learn))
    assert back.plan.ranks==learn.plan.ranks and back.recipe==learn.recipe
    code = f"from fastai.learner import load_learner; l = load_learner('learner.pkl'); print(l.predict({str(img)!r})[2].tolist())"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    assert_close(torch.tensor(json.loads(re.search(r'\[\d[^\]]*e?\]$', res.stdout.strip())[0])), torch.Tensor(want[2]))
    before = state(learn)
    learn.fit(1) # the exporting one goes on
    assert changed(learn, before)

@claim('`export`, `load_learner`')
def test_the_same_without_a_pickle(make):
    learn = make()
    learn.fit_recipe()
    save_file(adapter_state(learn.model), 'adapter.safetensors')
    learn.plan.save('plan.json')
    back = fclora_learner(learn.dls, backbone(3), Plan.load('plan.json'), seed=3)
    back.model.load_state_dict(load_file('adapter.safetensors'), strict=False)
    assert torch.equal(logits(back), logits(learn))

# --- looking

@claim('`get_preds`, `validate`')
def test_predictions_losses_and_classes(make):
    learn = make()
    learn.fit_recipe()
    probs,targs,classes,losses = learn.get_preds(with_decoded=True, with_loss=True)
    z,y = get_logits(learn.model, learn.dls.valid)
    assert_close(torch.Tensor(probs), z.softmax(1), atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.as_tensor(targs), y) and torch.equal(torch.as_tensor(classes), z.argmax(1))
    assert_close(torch.Tensor(losses), torch.nn.functional.cross_entropy(z, y, label_smoothing=.1, reduction='none'), atol=1e-5, rtol=1e-4)
    assert list(learn.validate())==pytest.approx([float(losses.mean()), (z.argmax(1)==y).float().mean().item()])
    assert len(learn.get_preds(ds_idx=2)[0])==len(learn.dls[2].dataset)

@claim('`predict`')
def test_predict_takes_files_pictures_and_pixels(make, folder):
    learn,img = make(),next(folder.rglob('*.png'))
    px = np.array(Image.open(img))
    want = learn.predict(img)
    assert want[0]==learn.dls.vocab[want[1]] and want[2].sum()==pytest.approx(1)
    for o in (str(img), Image.open(img), px, torch.from_numpy(px).permute(2, 0, 1)):
        assert_close(torch.Tensor(learn.predict(o)[2]), torch.Tensor(want[2]))
    ds = learn.dls.valid_ds
    assert_close(torch.Tensor(learn.predict(ds[0][0])[2]), torch.Tensor(learn.get_preds()[0][0]), atol=1e-5, rtol=1e-5)
    for o in (torch.zeros(3, 32, 32), px/255.):
        with pytest.raises(ValueError, match='pixels must be uint8'): learn.predict(o)

@claim('`tta`')
def test_tta_mirrors_only_what_may_be_mirrored(make):
    plain,mirrored = make(flip=False),make(flip=True)
    for learn in (plain,mirrored): learn.model.load_state_dict(plain.model.state_dict())
    preds = torch.Tensor(plain.get_preds()[0])
    assert_close(torch.Tensor(plain.tta(n=2)[0]), preds)
    res,targs = mirrored.tta(n=4)
    assert 1e-5<(torch.Tensor(res)-preds).abs().max()<.2
    assert_close(torch.Tensor(res).sum(1), torch.ones(len(targs)))
    assert mirrored.dls.valid_ds.split_idx==1 and torch.equal(targs, mirrored.dls.valid_ds.y)

@claim('`ClassificationInterpretation`, `Interpretation`')
def test_interpretation(make):
    learn = make()
    learn.fit_recipe()
    z,y = get_logits(learn.model, learn.dls.valid)
    it = ClassificationInterpretation.from_learner(learn)
    cm = it.confusion_matrix()
    want = np.zeros((3,3), int)
    np.add.at(want, (y.numpy(), z.argmax(1).numpy()), 1)
    assert (cm==want).all() and sum(n for *_,n in it.most_confused())==cm.sum()-cm.trace()
    losses,idxs = Interpretation.from_learner(learn, ds_idx=2).top_losses(3)
    assert losses.tolist()==sorted(losses.tolist(), reverse=True) and len(set(idxs.tolist()))==3
    it.plot_confusion_matrix(); it.plot_top_losses(4); it.show_results([0,1]); it.print_classification_report()

@claim('`dls.show_batch`, `show_results`, `summary`')
def test_pictures_and_summary(make):
    learn = make(cutmix=1)
    learn.dls.show_batch(max_n=4); learn.show_results(max_n=4)
    n,text = count_params(learn.model),str(learn.summary())
    assert f"Total params: {n['total']:,}\nTotal trainable params: {n['trainable']:,}\n" in text and 'CutMix' in text
    learn.freeze()
    assert 'Total trainable params: 387\n' in str(learn.summary()) # 128*3 weights and 3 biases

# --- the page

def test_every_row_of_the_page_has_its_test_and_the_reverse():
    text = '\n'.join(''.join(c['source']) for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='markdown')
    rows = re.findall(r'^\| (.*?) \| .* \|$', text, re.M)[2:]
    assert len(rows)==len(set(rows))>10
    assert set(rows)==claims

def test_what_a_user_imports_hides_no_name_of_fastai_or_torch():
    import fclora.all as ours, fastai.vision.all as fastai_all, torch.nn as nn, torch.nn.functional as F
    names = {n for n,o in vars(ours).items() if not n.startswith('_') and not inspect.ismodule(o)}
    assert len(names)>80 and not [(m.__name__, n) for m in (fastai_all, torch, nn, F) for n in names if hasattr(m, n)]
