"The Learner as a fastai user meets it, and what trains in it"
from copy import deepcopy
import pytest, timm, torch
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from safetensors.torch import save_file
from torch.testing import assert_close
from conftest import make_images
from fclora.all import *

@pytest.fixture(scope='module')
def images(tmp_path_factory): return load_images(make_images(tmp_path_factory.mktemp('d')/'shapes', ('a','b','c'), n=20), 32, progress=False)

@pytest.fixture
def dls(images): return get_dls(images, **image_config(create_backbone('vit_pico', 3)), bs=8, device='cpu')

def learner(dls, method='fclora', **kw):
    learn = fclora_learner(dls, 'vit_pico', method=method, rcp=recipe(method, 'vit_pico', epochs=1), **({} if method in ('head','full') else dict(budget=36, score_batches=2)), **kw)
    learn.model_dir = '.'
    return learn

@pytest.mark.parametrize('method', all_methods)
def test_only_what_the_method_trains_changes(dls, method):
    learn = learner(dls, method)
    before = {n:p.detach().clone() for n,p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    changed = {n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    heads = {'head.weight','head.bias'}
    if method=='full': assert changed==set(before)
    elif method=='head': assert changed==heads
    else: assert changed-heads=={n for n in before if is_adapter(n)}!=set() and heads<=changed

@pytest.mark.parametrize('method', ['fclora','uniform'])
def test_a_model_that_never_calls_its_projections_trains_them_where_it_reads_them(dls, method):
    beit = timm.create_model('beit_base_patch16_224', img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=3)
    learn = fclora_learner(dls, beit, budget=12, method=method, score_batches=1, rcp=recipe(epochs=1))
    before = {n:p.detach().clone() for n,p in beit.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    changed = {n for n,p in beit.named_parameters() if not torch.equal(p, before[n])}
    assert changed=={n for n in before if is_adapter(n) or n.startswith('head.')} and len(lora_layers(beit))==2

@pytest.mark.parametrize('method', ['fclora','uniform'])
def test_a_projection_that_takes_no_part_is_refused(dls, method):
    model = timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=3)
    model.blocks[0].attn.q_proj = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match='q_proj was never called'): fclora_learner(dls, model, budget=40, method=method, score_batches=1)
    assert not lora_layers(model)

def test_recipe_reaches_the_optimiser(dls):
    learn = fclora_learner(dls, 'vit_pico', budget=36, method='uniform', rcp=recipe(epochs=1, lr=1e-3, head_lr=4e-3, wd=.1, schedule='onecycle'))
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert isinstance(learn.opt.opt, torch.optim.AdamW)
    assert [h['wd'] for h in learn.opt.hypers]==[.1, 0, .1]
    assert max(learn.recorder.hps['lr'])==pytest.approx(4e-3, rel=.05)   # fastai records the last group, the head
    assert learn.opt.hypers[1]['lr']==pytest.approx(4*learn.opt.hypers[0]['lr'])

def test_scores_and_starts_from_the_inputs(dls):
    learn = fclora_learner(dls, 'vit_pico', budget=36, weights='explained_var=1', score_batches=2, rcp=recipe('fclora', 'vit_pico', epochs=1, init='eva'))
    values = learn.plan.metrics['explained_var']
    assert learn.plan.scores[max(values, key=values.get)]==1 and values['blocks.0.attn.qkv.q']==values['blocks.0.attn.qkv.v']
    for m in lora_layers(learn.model).values():
        for A in m.lora_A.values(): torch.testing.assert_close(A@A.T, torch.eye(len(A)))

def test_a_normal_learner(dls, tmp_path, monkeypatch):
    import matplotlib; matplotlib.use('agg')
    monkeypatch.chdir(tmp_path)
    learn = learner(dls, 'uniform', cbs=GradientAccumulation(16))
    with learn.no_bar(), learn.no_logging():
        before = deepcopy(learn.model.state_dict())
        assert learn.lr_find(num_it=10, show_plot=False).valley>0
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
        learn.fit_one_cycle(1, 1e-3, cbs=SaveModelCallback())
        learn.show_results()
        learn.freeze(); learn.unfreeze()
    assert {n for n,p in learn.model.named_parameters() if p.requires_grad}=={n for n in before if is_adapter(n) or n.startswith('head.')}
    preds,targs = learn.get_preds()
    assert_close(preds.sum(1), torch.ones(len(targs)))

def test_label_smoothing_and_cutmix_mix_losses(dls):
    learn = learner(dls, 'uniform')
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

@pytest.mark.parametrize('wrap', [lambda d: d, lambda d: dict(model=d), lambda d: dict(state_dict={f'module.{k}':v for k,v in d.items()})])
def test_checkpoints_in_the_usual_wrappings(tmp_path, wrap):
    src = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=7)
    torch.save(wrap(src.state_dict()), tmp_path/'w.pth')
    for one_head in (False, True):
        model = create_backbone('deit_tiny_distilled_patch16_224', 3, checkpoint=tmp_path/'w.pth', one_head=one_head)
        assert torch.equal(model.blocks[2].attn.qkv.weight, src.blocks[2].attn.qkv.weight) and torch.equal(model.dist_token, src.dist_token)
        assert head_names(model)==(['head'] if one_head else ['head','head_dist'])

def test_both_heads_of_a_distilled_model_train():
    model = freeze(create_backbone('deit_tiny_distilled_patch16_224', 3, pretrained=False, size=32))
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for n,p in model.named_parameters() if n.startswith('head'))

def test_the_head_is_never_zero():
    for name in ('vit_pico','test_vit'): assert create_backbone(name, 3, pretrained=name=='vit_pico').head.weight.std()>.01

def test_scores_are_the_same_for_the_same_seed(dls):
    model = create_backbone('vit_pico', 3)
    a,b,c = (plan_model(model, dls, budget=60, score_batches=2, seed=s) for s in (1,1,2))
    assert a.ranks==b.ranks and a.metrics==b.metrics!=c.metrics
    assert make_plan('m', a.sites, a.metrics, budget=60, seed=1).ranks==a.ranks

def test_linear_probe_is_a_probe(dls):
    model = create_backbone('vit_pico', 3)
    before = deepcopy(model.state_dict())
    assert linear_probe(model, dls)>=1/3
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

# --- scoring that stops by itself

class Counted:
    "Measurements whose ranking settles after a number of calls"
    def __init__(self, moves): self.moves,self.calls = moves,0
    def __call__(self, stats):
        self.calls += 1
        i = min(self.calls-1, len(self.moves)-1)
        return make_plan('m', sites := find_sites(create_backbone('vit_pico', 3)), {m:{s.name:1.+((j+self.moves[i])%5) for j,s in enumerate(sites)} for m in paper_weights}, budget=72)

def test_settled_when_two_allocations_in_a_row_agree():
    check = Settled(Counted([0,1,2,2]), .02)
    assert [check({}, 8*2**i) for i in range(4)]==[False,False,False,True] and check.batches==64

def test_scoring_ends_early_only_when_asked_to(dls):
    model = create_backbone('vit_pico', 3)
    used = lambda **kw: plan_model(model, dls, budget=72, score_bs=2, **kw).settings['score_batches']
    n = len(score_dl(dls, bs=2))
    assert n>16 and used(settle=0)==n
    assert used(settle=.9)==16                     # the first two allocations are never further apart
    assert used(settle=.9, score_batches=12)==12   # too few to compare

@pytest.mark.parametrize('settle', [-.1,1,float('nan')])
def test_a_tolerance_outside_its_range_is_refused(dls, settle):
    with pytest.raises(ValueError, match='settle must be at least 0'): plan_model(create_backbone('vit_pico', 3), dls, settle=settle)

# --- fewer blocks, less memory, compiled

def test_from_block_leaves_lower_blocks_alone(dls):
    model = create_backbone('vit_pico', 3)
    plan = plan_model(model, dls, budget=72, score_batches=2, from_block=3)
    assert {s.block for s in plan.sites}=={3,4,5} and plan.total_rank==72 and plan.settings['forecast']['lowest_block']==3
    with pytest.raises(ValueError, match='end at 5, so none is left from block 6 on'): plan_model(model, dls, budget=72, from_block=6)

def one_epoch(images, **kw):
    dls = get_dls(images, **image_config(create_backbone('vit_pico', 3)), bs=8, device='cpu')   # the same order each time
    learn = fclora_learner(dls, 'vit_pico', method='uniform', budget=36, rcp=recipe('uniform', 'vit_pico', epochs=1), **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return adapter_state(learn.model)

@pytest.mark.parametrize('how', ['checkpointing','compile'])
def test_training_goes_the_same_way_when_recomputed_or_compiled(images, how, monkeypatch):
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: real(self, backend='eager')) # the default one takes minutes
    plain,other = one_epoch(images),one_epoch(images, **{how:True})
    assert plain.keys()==other.keys()
    for n in plain: assert_close(other[n], plain[n], rtol=1e-3, atol=1e-4)

def test_a_model_that_cannot_recompute_is_refused_before_scoring(dls):
    class Plain(torch.nn.Module):
        def __init__(self): super().__init__(); self.attn,self.head = torch.nn.Linear(3*32*32, 8),torch.nn.Linear(8, 3)
        def forward(self, x): raise AssertionError('not to be run')
    with pytest.raises(ValueError, match='Plain cannot compute its blocks again'): fclora_learner(dls, Plain(), checkpointing=True)
