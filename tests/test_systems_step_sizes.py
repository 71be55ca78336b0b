"First steps under three rules, LoRA+ in the optimiser's groups, and an A that does not train"
from copy import deepcopy
from dataclasses import replace
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch.testing import assert_close
import system_models as S
import fclora.systems.dora # noqa: F401 its adapter is named below
from conftest import make_images
from fclora.adapt import *
from fclora.backbones import create_backbone, image_config
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.deploy.peft import plan_of
from fclora.find import *
from fclora.initialisers import *
from fclora.lora import *
from fclora.make_plan import *
from fclora.plan import Plan
from fclora.systems.step_sizes import *
from fclora.train.learner import fclora_learner, param_groups
from fclora.train.recipe import recipe

pytestmark = pytest.mark.usefixtures('one_thread')

# --- the first step

def example():
    base = S.deit().eval()
    y = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(0))
    return base,find_sites(base),(S.inputs('deit', 8), y)

def test_the_first_step_is_that_of_the_formula():
    base,sites,batch = example()
    plan = make_plan('deit', sites, method='uniform', budget=18)
    before = {n:p.clone() for n,p in base.state_dict().items()}
    steps = first_steps(base, plan, batch, lr=1e-3)
    assert all(torch.equal(p, before[n]) for n,p in base.state_dict().items()) and not adapted_layers(base)
    torch.manual_seed(plan.seed)
    net,rows = plan.adapt(deepcopy(base)),{}
    def note(path): return lambda m,i,o: rows.__setitem__(path, i[0].detach())
    for path,layer in adapted_layers(net).items(): layer.register_forward_hook(note(path))
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    for path,layer in adapted_layers(net).items():
        for kind,s in layer.sites.items():
            step = -1e-3*layer.scaling[kind]*layer.lora_B[kind].grad.sign()@layer.lora_A[kind]
            assert steps[s.name]==pytest.approx((rows[path]@step.T).square().mean().sqrt().item(), rel=.02)   # 1e-8 in Adam's denominator

def test_the_powers_of_the_rank_under_the_three_rules():
    base,sites,batch = example()
    power = {}
    for rule in ('rank','sqrt','mean'):
        r,v = [],[]
        for seed in range(8):
            plan = replace(make_plan('deit', sites, method='random', budget=36, lo=1, seed=seed), scaling=rule)
            steps = first_steps(base, plan, batch)
            r += [plan.ranks[n] for n in steps]; v += list(steps.values())
        power[rule] = np.polyfit(np.log(r), np.log(v), 1)[0]
    assert power['mean']-power['sqrt']==pytest.approx(.5, abs=.05) and power['sqrt']-power['rank']==pytest.approx(.5, abs=.05)
    assert .5-.15<power['mean']<1+.15, 'between terms that disagree in sign and terms that agree'

# --- the rule `mean`

def test_the_rule_mean_gives_every_site_one_multiplier(tmp_path):
    base,sites,_ = example()
    plan = make_plan('deit', sites, method='random', budget=21, lo=0, scaling='mean', lora_alpha=4.)
    net = plan.adapt(deepcopy(base))
    want = 4/(21/len(sites))
    assert 0 in plan.ranks.values() or len(set(plan.ranks.values()))>1
    assert {s for layer in adapted_layers(net).values() for s in layer.scaling.values()}=={want}
    again = Plan.load(plan.save(tmp_path/'plan.json'))
    assert again.scaling=='mean' and site_scalings(again.ranks, again.lora_alpha, again.scaling)==site_scalings(plan.ranks, 4., 'mean')
    assert lora_scaling(5, 10., 'mean')==lora_scaling(5, 10., 'rank')==2.   # alone, a site has the mean rank

def test_rules_of_one_s_own_keep_their_two_parameters():
    scalings['one'] = lambda r, lora_alpha: lora_alpha
    try: assert site_scalings(dict(a=1, b=0, c=7), 3., 'one')==dict(a=3., c=3.)
    finally: del scalings['one']

def test_peft_gets_the_multipliers_of_the_rule_mean():
    peft = pytest.importorskip('peft')
    base = S.llama()
    sites = find_sites(base)
    plan = make_plan('llama', sites, method='random', budget=20, scaling='mean')
    theirs = peft.get_peft_model(deepcopy(base), plan.to_peft(task_type='SEQ_CLS')).base_model.model
    for s in sites: assert theirs.get_submodule(s.path).scaling['default']==pytest.approx(8/(20/len(sites)))

# --- LoRA+

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return load_images(make_images(tmp_path_factory.mktemp('d')/'shapes', ('a','b','c'), n=12), 32, progress=False)

def learner(images, adapter='lora', init='kaiming', **kw):
    torch.manual_seed(0)
    model = create_backbone('vit_pico', 3)
    dls = get_dls(images, **image_config(model), bs=8, device='cpu')
    plan = make_plan('vit_pico', find_sites(model), method='uniform', budget=36, adapter=adapter, init=init)
    return fclora_learner(dls, model, plan, recipe(**dict(dict(epochs=1, lr=1e-3, head_lr=5e-3), **kw)))

def fit(learn):
    with learn.no_bar(), learn.no_logging(): return learn.fit_recipe()

@pytest.mark.parametrize('adapter', ['lora','dora','frozen_a'])
def test_lora_plus_gives_b_a_multiple_of_the_rate_of_a(images, adapter):
    learn = learner(images, adapter, b_ratio=16.)
    rates = []
    step = learn.opt_func
    def spy(params, **kw):
        opt = step(params, **kw)
        inner = opt.step
        def note(): rates.append({id(p):h['lr'] for ps,h in zip(opt.param_lists, opt.hypers) for p in ps}); inner()
        opt.step = note
        return opt
    learn.opt_func = spy
    fit(learn)
    for seen in rates:
        trained = adapter_params(learn.model, frozen=False).items()
        lrs = {part:{seen[id(p)] for n,p in trained if f'.{part}.' in n} for part in learn.model.blocks[0].attn.qkv.parts}
        b, = lrs['lora_B']
        for part,lr in lrs.items():
            if lr and part!='lora_B': assert b==pytest.approx(16*next(iter(lr)))
    assert rates[0][id(next(p for n,p in adapter_params(learn.model).items() if '.lora_B.' in n))]==pytest.approx(.016)

def test_without_a_ratio_the_groups_are_as_they_were(images):
    learn = learner(images)
    assert learn.groups==[('backbone',True), ('head',False), ('head',True)]
    assert learner(images, b_ratio=2.).groups==[('backbone',True), ('backbone_B',True), ('head',False), ('head',True)]

def test_lora_plus_freezes_and_unfreezes_as_a_whole(images):
    learn = learner(images, b_ratio=4.)
    learn.create_opt()
    ours = adapter_params(learn.model).values()
    learn.freeze(); assert not any(p.requires_grad for p in ours)
    learn.unfreeze(); assert all(p.requires_grad for p in ours)

def test_a_ratio_below_zero_is_refused():
    with pytest.raises(ValueError, match='--b-ratio must be a number'): recipe(b_ratio=-1.)

def test_lora_plus_from_the_command_to_merged_weights(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'uniform', b_ratio=4., lr=1e-3)
    assert run.config['recipe']['b_ratio']==4.

# --- an A that stays

@pytest.mark.parametrize('name', S.every_model)
@pytest.mark.parametrize('check', [S.starts_as_base, S.merges, S.saves_and_loads, S.trains_in_half_precision])
def test_every_model(name, check): check(name, 'frozen_a')

def test_one_graph(): S.compiles('deit', 'frozen_a')

@pytest.mark.parametrize('init', ['kaiming','eva'])
def test_a_stays_orthonormal_through_training_and_loading(images, init):
    learn = learner(images, 'frozen_a', init, lr=5e-3)
    A = {n:p.clone() for n,p in adapter_params(learn.model).items() if '.lora_A.' in n}
    B = {n:p.clone() for n,p in adapter_params(learn.model).items() if '.lora_B.' in n}
    fit(learn)
    learn.unfreeze()
    now = adapter_params(learn.model)
    assert all(torch.equal(p, now[n]) and not now[n].requires_grad for n,p in A.items())
    assert all((now[n]!=p).any() for n,p in B.items())
    for p in A.values(): assert_close(p@p.T, torch.eye(len(p)), atol=1e-5, rtol=1e-5)
    assert set(A)<=set(adapter_state(learn.model))
    assert not {id(now[n]) for n in A} & {id(p) for ps in param_groups(learn.model).values() for p in ps}

def test_only_b_counts_and_costs():
    base,sites,_ = example()
    plan = make_plan('deit', sites, method='uniform', budget=48*6*3, unit='params', adapter='frozen_a')
    net = freeze(plan.adapt(deepcopy(base)))
    assert set(plan.ranks.values())=={3} and count_params(net)['adapter']==plan.adapter_params==48*6*3
    assert plan_of(net).adapter=='frozen_a'

def test_resizing_leaves_a_frozen():
    base,sites,_ = example()
    net,x = S.shake(freeze(adapt(deepcopy(base), {sites[0].name:3}, 'frozen_a'))).eval(),S.inputs('deit')
    with torch.no_grad():
        want = net(x)
        resize(net, {sites[0].name:5})
        assert_close(net(x), want, atol=1e-5, rtol=1e-5)
        resize(net, {sites[0].name:[1,2]})
    A = net.get_submodule(sites[0].path).lora_A['q']
    assert not A.requires_grad and A.shape[0]==2 and net.get_submodule(sites[0].path).lora_B['q'].requires_grad

def test_a_frozen_a_from_the_command_to_merged_weights(tmp_path):
    run = S.runs_end_to_end(tmp_path, 'fclora', adapter='frozen_a')
    assert run.plan.adapter=='frozen_a' and len(set(run.plan.ranks.values()))>1
