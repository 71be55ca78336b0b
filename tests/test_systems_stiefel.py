"Factors that stay orthonormal whatever trains them, and FoRA from plan to merged weights"
from copy import deepcopy
from dataclasses import replace
from functools import partial
import pytest, timm, torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from hypothesis import given,settings,strategies as st
from torch import nn
import torch.nn.functional as F
from torch.testing import assert_close
import system_models as S
from fclora.adapt import *
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.initialisers import init_adapters
from fclora.lora import adapt_layer, adapters
from fclora.make_plan import make_plan
from fclora.planning import plan_model
from fclora.presets import presets
from fclora.runs.folder import load_model
from fclora.sites import Site
from fclora.train.learner import fclora_learner
from fclora.train.recipe import recipe
from fclora.train.schedules import Schedule
from fclora.systems.stiefel import *

pytestmark = pytest.mark.usefixtures('one_thread')

def far(model):
    "Largest distance of an orthonormal factor's Gram matrix from I"
    Xs = [tall([p], m.parts[part])[0] for m in adapted_layers(model).values() for part in m.orthonormal for p in getattr(m, part).values()]
    assert Xs
    return max((X.mT@X-torch.eye(X.shape[1])).norm().item() for X in Xs)

# --- retractions

def tangent(d, r, seed, n=2):
    torch.manual_seed(seed)
    X,D = torch.linalg.qr(torch.randn(n, d, r).double())[0],torch.randn(n, d, r).double()
    D = D-X@(X.mT@D+D.mT@X)/2
    return X,D/D.norm(dim=(1,2), keepdim=True).clamp(min=1e-9)

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, d))), st.integers(0, 9999))
def test_retractions_agree_to_first_order(size, seed):
    X,D = tangent(*size, seed)
    r = size[1]
    for name,retract in retractions.items():
        assert_close(retract(X, torch.zeros_like(D)), X)
        Y = retract(X, D)
        assert_close(Y.mT@Y, torch.eye(r).double().expand(2, r, r))
        far_off = [(retract(X, t*D)-X-t*D).norm() for t in (1e-2,1e-3)]
        assert far_off[0]<3e-4 and far_off[1]<3e-6                   # of second order: a tenth of the step, a hundredth of the rest
    for a in retractions.values():
        for b in retractions.values(): assert (a(X, 1e-3*D)-b(X, 1e-3*D)).norm()<6e-6

def test_cayley_is_the_limit_of_the_fixed_point_of_the_reference():
    X,D = tangent(9, 3, 0)
    P = D-X@(X.mT@D)/2
    W,Y = P@X.mT-X@P.mT,X+D
    for _ in range(60): Y = X+W@(X+Y)/2
    assert_close(retractions['cayley'](X, D), Y)

# --- the adapter

def toy(r=3, adapter='stiefel', d_in=24, d_out=16, open=.5, **kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d_in, d_out, **kw).requires_grad_(False))
    adapt_layer(net[0], {Site('0', '0', 'fc1', 0, d_in, d_out):r}, adapter)
    net[0].gate.fc1.data.fill_(open)
    return net

def test_singular_values_of_BA_are_those_of_A():
    layer = toy(5)[0]
    A,B = layer.lora_A.fc1.detach(),layer.lora_B.fc1.detach()
    assert_close(torch.linalg.svdvals(B@A)[:5], torch.linalg.svdvals(A))
    assert_close(torch.linalg.svdvals(layer.delta().detach())[:5], .5*layer.scaling['fc1']*torch.linalg.svdvals(A))

def test_cost_counts_what_trains():
    layer = toy(4)[0]
    site = layer.sites['fc1']
    assert StiefelLoRA.cost(site, 4)==sum(p.numel() for part in layer.parts for p in getattr(layer, part).values())==4*40+1
    assert StiefelLoRA.cost(site, 0)==0

# --- around a step

def step_once(net, opt, x, y, retraction='polar'):
    opt.zero_grad()
    F.mse_loss(net(x), y).backward()
    with on_stiefel(net, retraction): opt.step()

@pytest.mark.parametrize('opt_func', [partial(torch.optim.SGD, lr=.02, momentum=.9), partial(torch.optim.Adam, lr=.05), partial(torch.optim.RMSprop, lr=.01)])
def test_any_optimiser_descends_on_the_manifold(opt_func):
    net,x = toy(),torch.randn(64, 24)
    y = x@torch.randn(24, 16)/5
    opt,losses = opt_func([p for p in net.parameters() if p.requires_grad]),[]
    for _ in range(60):
        losses.append(F.mse_loss(net(x), y).item())
        step_once(net, opt, x, y)
    assert losses[-1]<.9*losses[0] and far(net)<1e-5

def test_weight_decay_does_not_touch_what_is_orthonormal():
    ends = []
    for wd in (0., 1.):
        net,x,y = toy(),torch.randn(8, 24, generator=torch.Generator().manual_seed(1)),torch.zeros(8, 16)
        step_once(net, torch.optim.AdamW([net[0].lora_B.fc1], lr=.01, weight_decay=wd), x, y)
        ends.append(net[0].lora_B.fc1.detach())
    assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ends[0], toy()[0].lora_B.fc1)

def test_a_straight_gradient_step_follows_the_riemannian_gradient():
    net,x,y = toy().double(),torch.randn(8, 24).double(),torch.randn(8, 16).double()
    B = net[0].lora_B.fc1
    start = B.detach().clone()
    F.mse_loss(net(x), y).backward()
    G = B.grad.clone()
    G = G-start@G.T@start
    assert_close(start.T@G, -(start.T@G).T, rtol=0, atol=1e-5)                               # tangent
    with on_stiefel(net): torch.optim.SGD([B], lr=1e-3).step()
    assert_close(B.grad, G, rtol=1e-4, atol=1e-5)
    assert (B.detach()-start+1e-3*G).norm()<1e-2*(1e-3*G).norm()

def test_a_diverging_step_is_left_to_those_who_report_it():
    for retraction in retractions:
        net = toy()
        F.mse_loss(net(torch.randn(8, 24)), torch.randn(8, 16)).backward()
        with on_stiefel(net, retraction): net[0].lora_B.fc1.data.fill_(float('inf'))
        assert not net[0].lora_B.fc1.isfinite().all()
        net = toy()
        F.mse_loss(net(torch.randn(8, 24)), torch.randn(8, 16)).backward()
        with on_stiefel(net, retraction): net[0].lora_B.fc1.data.add_(torch.randn(16, 3)*1e3)
        if retraction!='cayley': assert far(net)<1e-4                      # however far the step

# --- drift in a Learner

class AutocastCPU(Callback):
    "bfloat16 on the CPU, in the places where fastai's callback has it"
    order,run_valid = 10,False
    def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.cast.__exit__(None, None, None)

class CountSteps(Callback):
    n = 0
    def after_step(self): self.n += 1

def plain_learner(net, cbs, n=80, bs=4, lr=3e-3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 24, generator=g)
    y = x@torch.randn(24, 16, generator=g)/5
    dl,valid = (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), size) for size in (bs, n))
    opt = partial(OptimWrapper, opt=torch.optim.AdamW)
    learn = Learner(DataLoaders(dl, valid, device='cpu'), net, nn.MSELoss(), opt, lr=lr, wd=.05, cbs=cbs, splitter=lambda m: [p for p in m.parameters() if p.requires_grad])
    return learn

@pytest.mark.parametrize('retraction', [*retractions, None])
def test_drift_after_a_thousand_steps_of_a_learner(retraction):
    "With accumulation over two batches, clipping, weight decay and bfloat16; without a retraction far fewer steps are too many"
    net,count = toy(),CountSteps()
    start = net[0].lora_B.fc1.detach().clone()
    kept = [StiefelSteps(retraction)] if retraction else []
    learn = plain_learner(net, [*kept, GradientAccumulation(8), GradientClip(.1), AutocastCPU(), count], n=800)
    with learn.no_bar(), learn.no_logging(): learn.fit(10 if retraction else 1)
    if not retraction: assert far(net)>1e-2; return
    assert count.n==1000 and far(net)<1e-5
    assert (net[0].lora_B.fc1-start).norm()>.1 and net[0].lora_B.fc1.dtype==torch.float32

class Skip(Callback):
    "Cancels every other step, as a loss scaler does that met an overflow, before or after the retraction's turn"
    def __init__(self, order): self.order,self.n = order,0
    def before_step(self):
        self.n += 1
        if self.n%2: raise CancelStepException

class Watch(Callback):
    "Notes whether `B` moved in a batch"
    order = 60
    def before_batch(self): self.start = self.model[0].lora_B.fc1.detach().clone()
    def after_batch(self):
        if self.training: moved.append(not torch.equal(self.start, self.model[0].lora_B.fc1))
    after_cancel_batch = after_batch
moved = []

@pytest.mark.parametrize('cbs,pattern', [([GradientAccumulation(12)], [False,False,True]), ([Skip(10)], [False,True]), ([Skip(58)], [False,True])])
def test_only_real_steps(cbs, pattern):
    moved.clear()
    learn = plain_learner(toy(), [StiefelSteps(), *cbs, Watch()], n=48)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    batches = moved[::2] if len(moved)>12 else moved                     # a cancelled batch sends both events
    if isinstance(cbs[0], GradientAccumulation):
        seen = iter(moved)
        batches = []
        for i in range(12):
            batches.append(next(seen))
            if not batches[-1]: next(seen, None)
    assert batches==pattern*(12//len(pattern)) and far(learn.model)<1e-5

def test_looking_and_searching_rates_leave_it_orthonormal(tmp_path):
    learn = plain_learner(toy(), [StiefelSteps()])
    learn.path = tmp_path
    before = deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.validate(); learn.lr_find(num_it=8, show_plot=False)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    learn.model[0].lora_B.requires_grad_(False)                          # frozen: it has no gradient and stays
    B = learn.model[0].lora_B.fc1.detach().clone()
    learn.opt = None
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert torch.equal(learn.model[0].lora_B.fc1, B)

# --- models

vit = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
def llama():
    from transformers import LlamaConfig, LlamaForSequenceClassification
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                      num_key_value_heads=2, num_labels=3, pad_token_id=0))
images = lambda: torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
models = dict(deit=(lambda: timm.create_model('deit_tiny_distilled_patch16_224', num_classes=4, **vit), images),
              beit=(lambda: timm.create_model('beit_base_patch16_224', num_classes=4, **vit), images),
              swin=(lambda: timm.create_model('swin_tiny_patch4_window7_224', img_size=32, window_size=4, embed_dim=24, depths=(2,2), num_heads=(2,4), num_classes=4), images),
              conv=(lambda: timm.create_model('test_resnet', num_classes=4), images), llama=(llama, lambda: torch.arange(1, 22).view(3, 7)))
kinds = ('q','k','v','proj','fc1','fc2','gate','conv')

def run(model, x):
    out = model(x)
    return getattr(out, 'logits', out)

def adapted(kind, adapter, dtype=torch.float32):
    "A frozen model with unequal ranks of q, k and v, and the model itself"
    torch.manual_seed(0)
    base = models[kind][0]().eval().to(dtype)
    sites = [s for s in find_sites(base, kinds) if min(s.d_in, s.d_out)>=3]
    net = freeze(adapt(deepcopy(base), {s.name:i%4 for i,s in enumerate(sites)}, adapter))
    return base,net

def opened(net):
    "As after training: the update is not zero"
    for m in adapted_layers(net).values():
        for g in getattr(m, 'gate' if 'gate' in m.parts else 'lora_S').values(): g.data.fill_(.2)
    return net

@pytest.mark.parametrize('adapter', ['stiefel'])
@pytest.mark.parametrize('kind', models)
def test_start_train_merge_and_state_on(kind, adapter):
    base,net = adapted(kind, adapter)
    x = models[kind][1]()
    with torch.no_grad(): assert_close(run(net, x), run(base, x), rtol=1e-5, atol=1e-6)
    opened(net)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=.01)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(run(net.train(), x), torch.tensor([0,1,2])).backward()
        with on_stiefel(net): opt.step()
    assert far(net.eval())<1e-5 and all(p.grad is not None for p in adapter_params(net).values())
    with torch.no_grad():
        want = run(net, x)
        assert (want-run(base, x)).abs().max()>1e-3
        again = adapt(deepcopy(base), current_ranks(net), adapter)
        again.load_state_dict(adapter_state(net), strict=False)
        assert_close(run(again, x), want)
        assert_close(run(merge_adapters(net), x), want, rtol=1e-3, atol=1e-4)
        unmerge_adapters(net)
        assert_close(run(net, x), want)
        assert_close(run(unload(deepcopy(net), merge=True), x), want, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('adapter', ['stiefel'])
def test_a_16_bit_backbone_has_factors_of_32_bits(adapter):
    base,net = adapted('deit', adapter, torch.bfloat16)
    x = images().bfloat16()
    with torch.no_grad(): assert torch.equal(net(x), base(x))
    F.cross_entropy(opened(net)(x).float(), torch.tensor([0,1,2])).backward()
    ours = adapter_params(net)
    assert {p.dtype for p in ours.values()}=={torch.float32}
    with on_stiefel(net): torch.optim.AdamW(ours.values(), lr=.01).step()
    assert far(net)<1e-5

@pytest.mark.parametrize('adapter', ['stiefel'])
def test_autocast_and_compiling_without_a_graph_break(adapter):
    _,net = adapted('deit', adapter)
    opened(net)
    x,y = images(),torch.tensor([0,1,2])
    def grads(f):
        net.zero_grad()
        F.cross_entropy(f(x).float(), y).backward()
        return {n:p.grad.clone() for n,p in adapter_params(net).items()}
    want,got = grads(net),grads(torch.compile(net, fullgraph=True, backend='aot_eager'))
    for n in want: assert_close(got[n], want[n], rtol=1e-3, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16): cast = grads(net)
    for n in want: assert (cast[n]-want[n]).norm()<.2*want[n].norm()+1e-4

@pytest.mark.parametrize('adapter', ['stiefel'])
@pytest.mark.parametrize('init', ['kaiming','orthogonal','eva'])
def test_other_initialisers_fill_A(adapter, init):
    base,net = adapted('deit', adapter)
    batches = [(images(), torch.tensor([0,1,2]))]
    init_adapters(net, init, batches)
    with torch.no_grad(): assert_close(net(images()), base(images()))
    assert far(net)<1e-5

# --- in a Learner of ours

def pico():
    torch.manual_seed(0)
    return create_backbone('vit_pico', 10)

@pytest.fixture(scope='module')
def dls(): return get_dls(load_images('digits', limit='96,48,48'), **image_config(pico()), bs=16, device='cpu')

def fit(learn):
    with learn.no_bar(), learn.no_logging(): return learn.fit_recipe()

@pytest.mark.parametrize('method,adapter,want', [('uniform','stiefel','polar'), ('fora',None,'cayley'), ('fclora','stiefel','polar'), ('fora','lora','cayley')])
def test_the_adapter_brings_its_retraction_and_the_plan_may_name_another(dls, method, adapter, want):
    plan = plan_model(pico(), dls, method, budget=36, adapter=adapter, score_batches=2)
    learn = fit(fclora_learner(dls, pico(), plan, recipe(epochs=1)))
    assert [cb.retraction for cb in learn.cbs if isinstance(cb, StiefelSteps)]==[want]
    assert plan.total_rank==36
    if plan.adapter=='stiefel': assert far(learn.model)<1e-5 and all(g!=0 for m in adapted_layers(learn.model).values() for g in m.gate.values())

@pytest.mark.parametrize('retraction', ['qr','cayley'])
def test_mixed_precision_of_ours_leaves_it_orthonormal(dls, retraction):
    plan = replace(make_plan('vit_pico', find_sites(pico()), method='uniform', budget=36, adapter='stiefel'), schedule=f'stiefel_{retraction}')
    learn = fit(fclora_learner(dls, pico(), plan, recipe(epochs=2, precision='bf16', clip=.5), cbs=GradientAccumulation(32)))
    assert far(learn.model)<1e-5 and {p.dtype for p in adapter_params(learn.model).values()}=={torch.float32}

@pytest.mark.parametrize('keep', [[2,0], 7])
def test_resizing_in_the_middle(dls, keep):
    class At(Schedule):
        def after_step(self):
            if self.epoch==0 and self.iter==2:
                x = self.xb[0].as_subclass(torch.Tensor)
                with torch.no_grad(): before = self.model.eval()(x)
                self.resize({s:keep for s in current_ranks(self.model)})
                with torch.no_grad(): after = self.model(x)
                if keep==7: assert_close(after, before, rtol=1e-3, atol=1e-4)
                assert far(self.model.train())<1e-5
    plan = make_plan('vit_pico', find_sites(pico()), method='uniform', budget=72, adapter='stiefel')
    learn = fit(fclora_learner(dls, pico(), plan, recipe(epochs=2), cbs=At()))
    assert set(current_ranks(learn.model).values())=={2 if keep!=7 else 7} and far(learn.model)<1e-5
    if keep==7: assert all(A[4:].abs().max()>0 for m in adapted_layers(learn.model).values() for A in m.lora_A.values())

def test_a_learner_with_retractions_is_exported(dls, tmp_path):
    from fastai.learner import load_learner
    learn = fit(fclora_learner(dls, pico(), make_plan('vit_pico', find_sites(pico()), method='uniform', budget=36, adapter='stiefel'), recipe(epochs=1)))
    learn.export(tmp_path/'l.pkl')
    assert far(load_learner(tmp_path/'l.pkl').model)<1e-5

def test_the_adapter_alone_end_to_end(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'uniform', adapter='stiefel')
    assert run.plan.adapter=='stiefel' and far(load_model(tmp_path/'run')[0])<1e-5

def test_registered_with_its_source():
    assert adapters['stiefel'] is StiefelLoRA and presets['fora'].source=='arXiv 2605.29317'
