"The Learner as a fastai user meets it, and what trains in it"
from copy import deepcopy
import pytest, timm, torch
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from torch.testing import assert_close
from conftest import make_images
from fclora.adapt import adapted_layers, adapter_params, adapter_state
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.planning import plan_model
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import complete_recipe, recipe

heads = {'head.weight','head.bias'}

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = make_images(tmp_path_factory.mktemp('d')/'shapes', ('a','b','c'), n=20)
    return load_images(root, 32, progress=False)

@pytest.fixture
def dls(images): return get_dls(images, **image_config(create_backbone('vit_pico', 3)), bs=8, device='cpu')

def pico(seed=0):
    torch.manual_seed(seed)
    return create_backbone('vit_pico', 3)

def uniform_plan(model, budget=36, name='vit_pico', **kw):
    return make_plan(name, find_sites(model), method='uniform', budget=budget, **kw)

def learner(dls, plan=None, rcp=None, **kw):
    model = pico()
    learn = fclora_learner(dls, model, plan or uniform_plan(model), rcp or recipe(epochs=1), **kw)
    learn.model_dir = '.'
    return learn

def fit(learn):
    with learn.no_bar(), learn.no_logging(): return learn.fit_recipe()

def changed_by_training(learn):
    before = {n:p.detach().clone() for n,p in learn.model.named_parameters()}
    fit(learn)
    return {n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])}

# --- what trains

@pytest.mark.parametrize('method', ['fclora','uniform'])
def test_only_adapters_and_head_change(dls, method):
    model = pico()
    learn = fclora_learner(dls, model, plan_model(model, dls, method, budget=36, score_batches=2), recipe(epochs=1))
    assert changed_by_training(learn)=={*adapter_params(learn.model), *heads} and len(adapter_params(learn.model))==36

@pytest.mark.parametrize('regime', ['head','full'])
def test_only_what_a_regime_trains_changes(dls, regime):
    learn = learner(dls, regime)
    assert changed_by_training(learn)==(heads if regime=='head' else {n for n,_ in learn.model.named_parameters()})
    assert learn.plan is None and learn.regime==regime

@pytest.mark.parametrize('method', ['fclora','uniform'])
def test_a_model_that_never_calls_its_projections_trains_them_where_it_reads_them(dls, method):
    beit = timm.create_model('beit_base_patch16_224', img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=3)
    learn = fclora_learner(dls, beit, plan_model(beit, dls, method, budget=12, score_batches=1), recipe(epochs=1))
    assert changed_by_training(learn)=={*adapter_params(beit), *heads} and len(adapted_layers(beit))==2

def test_a_projection_that_takes_no_part_is_refused(dls):
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=3)
    model.blocks[0].attn.q_proj = torch.nn.Linear(64, 64)
    plan = uniform_plan(model, 40, 'test_vit')
    with pytest.raises(ValueError, match='q_proj was never called'): fclora_learner(dls, model, plan)
    assert not adapted_layers(model)

# --- what the Learner takes

@pytest.mark.parametrize('plan', ['fclora', None, {'q':2}])
def test_a_plan_or_a_regime_is_asked_for(dls, plan):
    with pytest.raises(ValueError, match="plan must be a Plan.*'head' or 'full'"): fclora_learner(dls, pico(), plan)

def test_a_name_instead_of_a_model_says_how_to_build_it(dls):
    with pytest.raises(ValueError, match=r"create_backbone\('vit_pico', dls.c\)"): fclora_learner(dls, 'vit_pico', 'head')

def test_a_model_that_cannot_recompute_is_refused_before_it_is_changed(dls):
    class Plain(torch.nn.Module):
        def __init__(self): super().__init__(); self.attn,self.head = torch.nn.Linear(3*32*32, 8),torch.nn.Linear(8, 3)
        def forward(self, x): raise AssertionError('not to be run')
    with pytest.raises(ValueError, match='Plain cannot compute its blocks again'): fclora_learner(dls, Plain(), 'head', checkpointing=True)

def test_what_concerns_adapters_comes_from_the_plan(dls):
    model = pico()
    plan = uniform_plan(model, 72, lora_alpha=6., scaling='rank', dropout=.25, init='orthogonal')
    fclora_learner(dls, model, plan)
    for layer in adapted_layers(model).values():
        assert layer.dropout_p==.25
        for kind,A in layer.lora_A.items():
            assert layer.scaling[kind]==6/4
            assert_close(A@A.T, torch.eye(4), atol=1e-5, rtol=1e-5)

def test_adapters_begin_as_components_of_their_inputs(dls):
    model = pico()
    plan = plan_model(model, dls, budget=36, weights='explained_var=1', score_batches=2, init='eva')
    values = plan.metrics['explained_var']
    assert plan.scores[max(values, key=values.get)]==1 and values['blocks.0.attn.qkv.q']==values['blocks.0.attn.qkv.v']
    fclora_learner(dls, model, plan)
    for m in adapted_layers(model).values():
        for A in m.lora_A.values(): assert_close(A@A.T, torch.eye(len(A)), atol=1e-5, rtol=1e-5)

# --- the recipe

def test_recipe_reaches_the_optimiser(dls):
    learn = fit(learner(dls, rcp=recipe(epochs=1, lr=1e-3, head_lr=4e-3, wd=.1, schedule='onecycle')))
    assert isinstance(learn.opt.opt, torch.optim.AdamW)
    assert [h['wd'] for h in learn.opt.hypers]==[.1, 0, .1]
    assert max(learn.recorder.hps['lr'])==pytest.approx(4e-3, rel=.05)   # fastai records the last group, the head
    assert learn.opt.hypers[1]['lr']==pytest.approx(4*learn.opt.hypers[0]['lr'])

@pytest.mark.parametrize('name,width', [('vit_pico',128), ('test_vit',64), ('resnet18',512), ('swin_tiny_patch4_window7_224',768)])
def test_learning_rates_follow_the_width_and_nothing_else(name, width):
    model = timm.create_model(name, num_classes=3)
    renamed = type('Other', (type(model),), {}) # the same model under another name
    for _ in range(2):
        rates = {r:complete_recipe(recipe(), model, r, 10) for r in ('adapters','head','full')}
        assert {r['head_lr'] for r in rates.values()}=={.64/width}
        assert [rates[r]['lr'] for r in ('adapters','full')]==[.64/width, .64/width/5]
        model.__class__ = renamed

def test_the_recipe_given_is_not_changed(dls):
    rcp = recipe(epochs=1)
    assert learner(dls, rcp=rcp).recipe['lr']==5e-3 and rcp['lr'] is None

def test_label_smoothing_and_cutmix_mix_losses(dls):
    learn = learner(dls, rcp=recipe(epochs=1, cutmix=1.))
    x,y = dls.train.one_batch()
    out = torch.randn(len(y), 3)
    want = torch.nn.functional.cross_entropy(out, y.as_subclass(torch.Tensor), label_smoothing=.1)
    assert_close(learn.loss_func(out, y).as_subclass(torch.Tensor), want)
    mix = learn.cut_mix
    learn.training = True
    learn._split((x.clone(), y)); mix.before_train(); mix.before_batch()
    lam = mix.lam.item()
    other = torch.nn.functional.cross_entropy(out, mix.yb1[0].as_subclass(torch.Tensor), label_smoothing=.1)
    assert_close(learn.loss_func(out, y).as_subclass(torch.Tensor), lam*want+(1-lam)*other, atol=1e-5, rtol=1e-5)
    mix.after_train()

# --- a normal Learner

def test_a_normal_learner(dls, tmp_path, monkeypatch):
    import matplotlib; matplotlib.use('agg')
    monkeypatch.chdir(tmp_path)
    learn = learner(dls, cbs=GradientAccumulation(16))
    with learn.no_bar(), learn.no_logging():
        before = deepcopy(learn.model.state_dict())
        assert learn.lr_find(num_it=10, show_plot=False).valley>0
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
        learn.fit_one_cycle(1, 1e-3, cbs=SaveModelCallback())
        learn.show_results()
        learn.freeze(); learn.unfreeze()
    assert {n for n,p in learn.model.named_parameters() if p.requires_grad}=={*adapter_params(learn.model), *heads}
    preds,targs = learn.get_preds()
    assert_close(preds.sum(1), torch.ones(len(targs)))

def test_the_same_seed_trains_the_same_model(images):
    a,b = one_epoch(images),one_epoch(images)
    for n in a: assert torch.equal(a[n], b[n])

def test_logits_come_in_the_order_of_the_images(dls):
    model = pico().eval()
    logits,targs = get_logits(model, dls[2])
    assert torch.equal(targs, torch.as_tensor(dls[2].dataset.y))
    with torch.no_grad(): want = torch.cat([model(x.as_subclass(torch.Tensor)) for x,_ in dls[2]])
    assert_close(logits, want, atol=1e-5, rtol=1e-5)

# --- less memory, compiled

def one_epoch(images, **kw):
    dls = get_dls(images, **image_config(create_backbone('vit_pico', 3)), bs=8, device='cpu')   # the same order each time
    return adapter_state(fit(learner(dls, **kw)).model)

@pytest.mark.parametrize('how', ['checkpointing','compile'])
def test_training_goes_the_same_way_when_recomputed_or_compiled(images, how, monkeypatch):
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: real(self, backend='eager')) # the default one takes minutes
    plain,other = one_epoch(images),one_epoch(images, **{how:True})
    assert plain.keys()==other.keys()
    for n in plain: assert_close(other[n], plain[n], rtol=1e-3, atol=5e-4) # steps of 5e-3, and Adam magnifies rounding
