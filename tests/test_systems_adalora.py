"AdaLoRA: its importances, masks and ranks against PEFT's, and its adapter in every kind of model"
from copy import deepcopy
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from functools import partial
from torch import nn
from torch.testing import assert_close
import system_models as S
from fclora.adapt import *
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.systems.adalora import *
from fclora.train.learner import fclora_learner
from fclora.train.recipe import recipe

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore')]
n_epoch,n_iter,width,targets = 3,8,16,2

class Net(nn.Module):
    "Separate q, k and v, and a loss as Hugging Face's models return it, which PEFT adds its term to"
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({k:nn.Linear(width, width) for k in ('q_proj','k_proj','v_proj')}) for _ in range(2))
        self.head = nn.Linear(width, 3)
    def forward(self, x, labels=None):
        for b in self.blocks: x = x + torch.tanh(b['q_proj'](x))*b['k_proj'](x)+b['v_proj'](x)
        logits = self.head(x)
        return logits if labels is None else SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))

def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, width, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(n_iter)]

@pytest.fixture(scope='module')
def pair():
    "The same training by PEFT in a plain loop and by a Learner with the schedule, and what both saw after each step"
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    base,data = Net(),batches()
    total,alpha,r = n_epoch*n_iter,8,4
    net = deepcopy(base)
    sites = find_sites(net)
    plan = make_plan('net', sites, method='adalora', budget=targets*len(sites)) # 12 of 18
    plan.ranks = dict.fromkeys(plan.ranks, r) # PEFT has one rank for all at the start
    plan.scaling = {n:alpha/(r+1e-5) for n in plan.ranks} # PEFT's rule
    freeze(plan.adapt(net))
    cfg = peft.AdaLoraConfig(init_r=r, target_r=targets, tinit=3, tfinal=10, deltaT=1, total_step=total, orth_reg_weight=.1, lora_alpha=alpha,
                             target_modules=[s.path for s in sites], modules_to_save=['head'])
    theirs = peft.get_peft_model(deepcopy(base), cfg)
    named = dict(theirs.named_parameters())
    named = {n.removeprefix('base_model.model.'):p for n,p in named.items()}
    def peers(n): return {part:f'{n}.{part}.default' for part in ('lora_A','lora_B','lora_E')}
    with torch.no_grad():
        for (n,part),p in svd_parts(net).items(): named[peers(n)[part]].copy_(p)
    opt = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], 1e-2, weight_decay=0, fused=True)
    want,step = [],0
    allocator = theirs.base_model.rankallocator
    for _ in range(n_epoch):
        for x,y in data:
            step += 1
            theirs.base_model(x, labels=y).loss.backward() # as PEFT's models with a task do; `theirs` itself adds no term
            opt.step()
            frozen = step>=total-cfg.tfinal
            theirs.base_model.update_and_allocate(step)
            opt.zero_grad()
            want.append(dict(sensitivity={n:{k:allocator.exp_avg_ipt[p].clone() for k,p in peers(n).items()} for n in plan.ranks} if not frozen else {},
                             uncertainty={n:{k:allocator.exp_avg_unc[p].clone() for k,p in peers(n).items()} for n in plan.ranks} if not frozen else {},
                             used={n:(named[peers(n)['lora_E']]!=0).flatten().tolist() for n in plan.ranks}))
    got,cb = [],AdaLoRA(warm=3/total, settle=10/total)
    class Look(Callback):
        order = AdaLoRA.order+1
        def after_step(self):
            s = {p:(n,part) for (n,part),p in svd_parts(self.model).items()}
            got.append(dict(sensitivity=dict(cb.scores.sensitivity), uncertainty=dict(cb.scores.uncertainty),
                            used={n:(p!=0).flatten().tolist() for p,(n,part) in s.items() if part=='lora_E'}))
    dl = SimpleDL(data)
    learn = Learner(DataLoaders(dl, dl), net, F.cross_entropy, partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True)), lr=1e-2, wd=0.,
                    cbs=[cb, Look()], train_bn=True)
    learn.plan = plan
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch)
    return SimpleNamespace(want=want, got=got, learn=learn, theirs=theirs, cfg=cfg, plan=plan, last=total-10)

class SimpleDL:
    "The same batches in every epoch"
    def __init__(self, data): self.data,self.bs,self.device,self.dataset = data,16,torch.device('cpu'),data
    def __iter__(self): return iter(self.data)
    def __len__(self): return len(self.data)
    def to(self, device): return self
    def __getattr__(self, k): raise AttributeError(k)

def test_importances_equal_pefts(pair):
    for step in range(pair.last-1):
        for what in ('sensitivity','uncertainty'):
            for (n,part),v in pair.got[step][what].items(): assert_close(v, pair.want[step][what][n][part], rtol=1e-3, atol=1e-9)

def test_masks_equal_pefts(pair):
    counts = []
    for step in range(pair.last):
        counts.append(sum(map(sum, pair.want[step]['used'].values())))
        if step<pair.last-1: assert pair.got[step]['used']==pair.want[step]['used'], step
    assert counts[2]==24>counts[5]>counts[-1]==12 # the budget sinks

def test_final_ranks_equal_pefts(pair):
    ranks = {n:sum(pair.want[-1]['used'][n]) for n in pair.plan.ranks}
    assert {n:sum(v) for n,v in ((k.removeprefix('base_model.model.').removesuffix('.lora_E.default').removesuffix('.lora_E'),v) for k,v in pair.cfg.rank_pattern.items())}==ranks
    assert pair.learn.plan.ranks==ranks and {**dict.fromkeys(ranks, 0), **current_ranks(pair.learn.model)}==ranks
    assert sum(ranks.values())==12 and len(set(ranks.values()))>1

# --- the form

@pytest.mark.parametrize('name', S.every_model)
@pytest.mark.parametrize('check', [S.starts_as_base, S.merges, S.saves_and_loads, S.trains_in_half_precision])
def test_every_model(name, check): check(name, 'svd')

def test_one_graph(): S.compiles('deit', 'svd')

# --- the schedule

@pytest.fixture(scope='module')
def data():
    torch.manual_seed(0)
    model = create_backbone('vit_pico', 10)
    return model,load_images('digits', limit='160,64,64')

def learner(data, cbs=None, bs=16, epochs=2, **kw):
    model = deepcopy(data[0])
    dls = get_dls(data[1], **image_config(model), bs=bs, device='cpu')
    plan = make_plan('vit_pico', find_sites(model), method='adalora', **{**dict(budget=36), **kw})
    return fclora_learner(dls, model, plan, recipe(epochs=epochs), cbs=cbs)

def fit(learn):
    with learn.no_bar(), learn.no_logging(): return learn.fit_recipe()

@pytest.mark.parametrize('kw', [dict(), dict(epochs=1, bs=128), dict(cbs=GradientAccumulation(32)), dict(allocator='random', budget=40),
                                dict(unit='params', budget=36*257)])
def test_the_budget_holds_in_the_end(data, kw):
    learn = learner(data, **kw)
    budget,unit = learn.plan.budget,learn.plan.unit
    assert learn.plan.spent==round(1.5*budget) or unit=='params' and learn.plan.spent>1.4*budget
    loss_func = learn.loss_func
    fit(learn)
    assert learn.plan.spent==budget and learn.loss_func is loss_func
    assert sum(current_ranks(learn.model).values())==learn.plan.total_rank
    assert count_params(learn.model)['adapter']==learn.plan.adapter_params

def test_the_orthogonality_term_acts(data):
    class Loud(AdaLoRA):
        "Removes nothing"
        def after_step(self): pass
    ends = []
    for gamma in (0, 10):
        learn = learner(data, epochs=1)
        learn.remove_cb(AdaLoRA)
        learn.add_cb(Loud(gamma=gamma))
        before = orthogonality(learn.model).item()
        fit(learn)
        ends.append(orthogonality(learn.model).item())
    assert ends[1]<before*.9 and ends[1]<ends[0]

def test_a_second_fit_and_frozen_adapters(data):
    learn = fit(learner(data, epochs=1))
    ranks = current_ranks(learn.model)
    fit(learn)
    assert current_ranks(learn.model)==ranks
    learn = learner(data, epochs=1)
    learn.create_opt(); learn.freeze()
    ranks = current_ranks(learn.model)
    fit(learn)
    assert current_ranks(learn.model)==ranks
