"Ranks that change while a model trains: optimiser, Plan and fastai's callbacks go along"
from dataclasses import replace
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Adam, OptimWrapper, RAdam
from torch.testing import assert_close
from conftest import make_images
from fclora.adapt import adapter_params, adapter_state, current_ranks
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.plan import Plan
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import recipe
from fclora.train.schedules import Schedule, rank_tensors, resize_adapters, schedules, take_ranks

pytestmark = [pytest.mark.usefixtures('one_thread')]
q0,v5 = 'blocks.0.attn.qkv.q','blocks.5.attn.qkv.v'

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = make_images(tmp_path_factory.mktemp('d')/'shapes', ('a','b','c'), n=20)
    return load_images(root, 32, progress=False)

def pico():
    torch.manual_seed(0)
    return create_backbone('vit_pico', 3)

@pytest.fixture
def make(images, tmp_path):
    def make(cbs=None, budget=72, named='', regime=None, **kw):
        model = pico()
        dls = get_dls(images, **image_config(model), bs=8, device='cpu')
        plan = replace(make_plan('vit_pico', find_sites(model), method='uniform', budget=budget), schedule=named)
        learn = fclora_learner(dls, model, regime or plan, recipe(**{'epochs':3, **kw}), cbs=cbs)
        learn.path = tmp_path
        return learn
    return make

def fit(learn):
    with learn.no_bar(), learn.no_logging(): return learn.fit_recipe()

def strongest(model, n):
    "The `n` ranks of each site with the largest norm of `B` column times `A` row"
    t = {k:p.detach() for k,(p,_) in rank_tensors(model).items()}
    return {s:(t[s,'lora_B'].norm(dim=0)*t[s,'lora_A'].norm(dim=1)).argsort(descending=True)[:n].tolist() for s in current_ranks(model)}

class Prune(Schedule):
    "Keep the strongest ranks at one moment, and remember what should stay"
    def __init__(self, event='after_epoch', n=2, epoch=0):
        super().__init__()
        self.event,self.n,self.when = event,n,epoch
        setattr(self, event, self.prune)
    def prune(self):
        if self.epoch!=self.when or self.event in ('after_step','after_batch') and self.iter!=2: return
        keep,state = strongest(self.model, self.n),self.opt.opt.state
        self.want = {k:{m:take_ranks(v, axis, keep[k[0]]).clone() if v.ndim else v.clone() for m,v in state[p].items()}
                     for k,(p,axis) in rank_tensors(self.model).items()}
        self.weights = {k:take_ranks(p.detach(), axis, keep[k[0]]).clone() for k,(p,axis) in rank_tensors(self.model).items()}
        self.resize(keep)
        self.got = {k:{m:v.clone() for m,v in state[p].items()} for k,(p,_) in rank_tensors(self.model).items()}

@pytest.mark.parametrize('schedule', ['cosine','onecycle'])
@pytest.mark.parametrize('event', ['before_epoch','after_step','after_batch','after_train','after_epoch'])
def test_pruning_under_the_whole_recipe(make, schedule, event):
    "Gradient clipping and CutMix are on, and the rate is changing"
    learn = fit(make(cbs=Prune(event, epoch=1), schedule=schedule))
    cb = learn.prune
    assert set(current_ranks(learn.model).values())=={2} and learn.plan.total_rank==36
    for k,want in cb.want.items():
        assert set(want)=={'step','exp_avg','exp_avg_sq'}
        for m in want: assert_close(cb.got[k][m], want[m], rtol=0, atol=0)
        assert (cb.got[k]['exp_avg_sq']>0).any()
    moved = [not torch.equal(p, cb.weights[k]) for k,(p,_) in rank_tensors(learn.model).items()]
    assert all(moved) # training went on
    held = [p for ps in learn.opt.param_lists for p in ps]
    assert {id(p) for p in held}=={id(p) for p in learn.model.parameters() if p.requires_grad} and len(held)==len(set(map(id, held)))
    assert [h['wd'] for h in learn.opt.hypers]==[.05,0,.05]
    assert len(learn.opt.opt.state)==len(held) # nothing is kept of parameters that are gone

def test_what_stays_trains_exactly_as_if_the_rest_had_never_been(make):
    "Ranks whose `B` and gradient are zero do not matter, so taking them away must change nothing"
    class Dead(Callback):
        "Two ranks of each site never train"
        order = 10
        def before_step(self):
            for (_,part),(p,axis) in rank_tensors(self.model).items():
                if part in ('lora_A','lora_B') and p.shape[axis]==4: p.grad.narrow(axis, 2, 2).zero_()
    class Drop(Schedule):
        "Take them away after the first epoch"
        def after_epoch(self):
            if self.epoch==0: self.resize({s:[0,1] for s in current_ranks(self.model)})
    a,b = make(cbs=Dead(), clip=0, wd=0),make(cbs=[Dead(), Drop()], clip=0, wd=0)
    for learn in (a,b): torch.manual_seed(1); fit(learn)
    assert set(current_ranks(b.model).values())=={2}
    for (k,(p,axis)),(q,_) in zip(rank_tensors(a.model).items(), rank_tensors(b.model).values()):
        assert_close(p.narrow(axis, 0, 2), q, atol=1e-5, rtol=1e-4)

def test_the_new_plan_builds_the_trained_model(make, tmp_path):
    learn = fit(make(cbs=Prune(n=3)))
    learn.plan.save(tmp_path/'plan.json')
    plan = Plan.load(tmp_path/'plan.json')
    assert plan.ranks==current_ranks(learn.model) and plan.total_rank==54
    model = plan.adapt(pico())
    model.load_state_dict(adapter_state(learn.model), strict=False)
    assert_close(get_logits(model, learn.dls.valid)[0], get_logits(learn.model, learn.dls.valid)[0], atol=1e-5, rtol=1e-5)

# --- sites that vanish, ranks that grow

class At(Schedule):
    "Resize after the first epoch"
    def __init__(self, keep): super().__init__(); self.keep = keep
    def after_epoch(self):
        if self.epoch==0: self.resize(self.keep)

def test_a_site_vanishes(make):
    learn = fit(make(cbs=At({q0:[], v5:[1]})))
    assert q0 not in current_ranks(learn.model) and current_ranks(learn.model)[v5]==1
    assert learn.plan.ranks[q0]==0 and learn.plan.ranks[v5]==1 and learn.plan.total_rank==72-4-3
    assert learn.plan.adapt(pico()) is not None

@pytest.mark.parametrize('schedule', ['cosine','onecycle'])
def test_every_site_vanishes_and_the_head_trains_on(make, schedule):
    sites = [s.name for s in find_sites(pico())]
    class Head(Callback):
        def before_train(self): heads.append(self.model.head.weight.detach().clone())
    heads = []
    learn = fit(make(cbs=[At({s:[] for s in sites}), Head()], schedule=schedule))
    assert not adapter_params(learn.model) and learn.plan.total_rank==0
    assert not torch.equal(heads[1], heads[2])
    assert [len(ps) for ps in learn.opt.param_lists]==[0,1,1]
    before = learn.model.head.weight.detach().clone()
    learn.remove_cb(At)
    fit(learn) # again, with rates for groups of which one is empty
    learn.opt = None
    fit(learn) # and with a new optimiser
    assert not torch.equal(learn.model.head.weight, before)

def test_ranks_grow(make):
    learn = fit(make(cbs=At({q0:7})))
    B,_ = rank_tensors(learn.model)[q0,'lora_B']
    assert B.shape[1]==7 and learn.plan.ranks[q0]==7 and (B[:,4:]!=0).any()

def test_a_resize_that_cannot_be_changes_nothing(make):
    learn = make()
    ranks,held = current_ranks(learn.model),None
    learn.create_opt()
    held = [id(p) for ps in learn.opt.param_lists for p in ps]
    for keep in ({q0:[0,9]}, {q0:[0,0]}, {'blocks.9':[0]}, {v5:[0], q0:3}):
        with pytest.raises(ValueError): resize_adapters(learn, keep)
    assert current_ranks(learn.model)==ranks and [id(p) for ps in learn.opt.param_lists for p in ps]==held

# --- other optimisers, other callbacks

@pytest.mark.parametrize('opt_func', [Adam, RAdam, torch.optim.Adam])
def test_other_optimisers(make, opt_func):
    learn = make(cbs=At({q0:[3,0]}))
    learn.opt_func = partial(OptimWrapper, opt=opt_func) if opt_func is torch.optim.Adam else opt_func
    seen = {}
    class Look(Callback):
        def state(self):
            p = rank_tensors(self.model)[q0,'lora_A'][0]
            state = self.opt.opt.state[p] if hasattr(self.opt, 'opt') else self.opt.state[p]
            return state['exp_avg' if 'exp_avg' in state else 'grad_avg'].clone()
    class Before(Look):
        order = Schedule.order-1
        def after_epoch(self): seen.setdefault('before', self.state())
    class After(Look):
        order = Schedule.order+1
        def after_epoch(self): seen.setdefault('after', self.state())
    learn.add_cbs([Before(), After()])
    fit(learn)
    assert seen['before'].abs().max()>0
    assert torch.equal(seen['after'], seen['before'][[3,0]])

def test_accumulated_gradients_survive(make):
    class Between(Schedule):
        "Resize while a gradient is half accumulated"
        def after_batch(self):
            if self.epoch==0 and self.iter==0:
                before = rank_tensors(self.model)[q0,'lora_B'][0].grad.clone()
                self.resize({q0:[2,1]})
                grads.append((before[:,[2,1]], rank_tensors(self.model)[q0,'lora_B'][0].grad.clone()))
    grads = []
    fit(make(cbs=[GradientAccumulation(16), Between()]))
    assert grads[0][0].abs().max()>0 and torch.equal(*grads[0])

def test_frozen_adapters_stay_frozen(make):
    learn = make()
    learn.create_opt()
    learn.freeze()
    resize_adapters(learn, {q0:[0]})
    assert not any(p.requires_grad for p in adapter_params(learn.model).values())
    learn.unfreeze()
    assert all(p.requires_grad for p in adapter_params(learn.model).values())

def test_the_best_epoch_of_the_last_ranks_is_loaded(make):
    class Scores(Callback):
        order = 51 # after the Recorder: the first epoch, before pruning, would be the best
        def after_epoch(self): self.recorder.values[-1][1] = [.1, .9, .5][self.epoch]
    learn = fit(make(cbs=[Scores(), SaveModelCallback(), Prune(epoch=1)]))
    assert set(current_ranks(learn.model).values())=={2}
    assert learn.save_model.best==.5

def test_looking_never_prunes(make, monkeypatch):
    import matplotlib; matplotlib.use('agg')
    learn = make(cbs=Prune(n=1, epoch=0), epochs=1)
    fit(learn)
    learn.add_cb(At({s:[] for s in current_ranks(learn.model)}))
    assert learn.epoch==0
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.get_preds(); learn.show_results(); learn.summary(); learn.tta(n=1)
        learn.lr_find(num_it=5, show_plot=False)
    assert set(current_ranks(learn.model).values())=={1}

def test_a_learner_with_a_schedule_is_exported(make, tmp_path):
    from fastai.learner import load_learner
    learn = fit(make(cbs=At({q0:[0]})))
    learn.export(tmp_path/'l.pkl')
    back = load_learner(tmp_path/'l.pkl')
    assert back.plan.ranks==learn.plan.ranks==current_ranks(back.model)
    assert torch.equal(get_logits(back.model, learn.dls.valid)[0], get_logits(learn.model, learn.dls.valid)[0])

# --- by name

def test_a_plan_names_its_schedule(make, monkeypatch):
    monkeypatch.setitem(schedules, 'prune', Prune)
    learn = fit(make(named='prune'))
    assert learn.plan.total_rank==36 and learn.plan.schedule=='prune'
    with pytest.raises(ValueError, match="unknown schedule 'prone'"): make(named='prone')

@pytest.mark.parametrize('regime', ['head','full'])
def test_regimes_have_nothing_to_resize(make, regime):
    with pytest.raises(ValueError, match='has no adapter to resize'): fit(make(cbs=At({q0:[0]}), regime=regime))
