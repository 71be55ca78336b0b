"Updates kept as singular value decompositions, from their start to merged weights"
from copy import deepcopy
import pytest, timm, torch
import torch.nn.functional as F
from torch.testing import assert_close
from fclora.adapt import *
from fclora.find import find_sites
from fclora.initialisers import init_adapters
from fclora.lora import adapters
from fclora.planning import plan_model
from fclora.presets import presets
from fclora.train.learner import fclora_learner
from fclora.train.recipe import recipe
from fclora.systems.stella import *
from fclora.systems.stiefel import *
import test_systems_stiefel as st
from test_systems_stiefel import dls, far, fit, images, models, pico, run   # noqa: F401 (dls is a fixture)

pytestmark = pytest.mark.usefixtures('one_thread')

# --- what holds for every adapter with orthonormal factors

@pytest.mark.parametrize('kind', models)
def test_start_train_merge_and_state_on(kind): st.test_start_train_merge_and_state_on(kind, 'stella')
def test_a_16_bit_backbone_has_factors_of_32_bits(): st.test_a_16_bit_backbone_has_factors_of_32_bits('stella')
def test_autocast_and_compiling_without_a_graph_break(): st.test_autocast_and_compiling_without_a_graph_break('stella')
@pytest.mark.parametrize('init', ['kaiming','orthogonal','eva'])
def test_other_initialisers_fill_A(init): st.test_other_initialisers_fill_A('stella', init)

# --- its own

def test_the_start_is_one_whatever_the_scaling():
    torch.manual_seed(0)
    base = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=4, **st.vit).eval()
    ranks = {s.name:i%4 for i,s in enumerate(find_sites(base))}
    nets = [init_adapters(adapt(deepcopy(base), ranks, 'stella', lora_alpha=alpha, scaling=scaling), 'stella') for alpha,scaling in ((8,'sqrt'), (1,'rank'))]
    for net in nets:
        for m in adapted_layers(net).values():
            for kind in m.sites:
                r = m.rank(kind)
                assert_close(torch.linalg.svdvals(m.site_delta(kind).detach())[:r], torch.ones(r))
        for n,p in base.named_parameters(): assert torch.equal(net.get_parameter(n), p)    # the weights are not corrected
        assert (run(net, images())-run(base, images())).abs().max()>1e-3

def test_S_holds_the_singular_values_and_a_cost_is_what_trains():
    _,net = st.adapted('deit', 'stella')
    for m in adapted_layers(net).values():
        for kind,S in m.lora_S.items():
            torch.nn.init.normal_(S)
            values = (m.scaling[kind]*S.detach().abs()).sort(descending=True)[0]
            assert_close(torch.linalg.svdvals(m.site_delta(kind).detach())[:len(S)], values, rtol=1e-4, atol=1e-5)
            assert Stella.cost(m.sites[kind], len(S))==sum(getattr(m, part)[kind].numel() for part in m.parts)

@pytest.mark.parametrize('retraction', retractions)
def test_drift_of_both_factors_after_a_thousand_steps(retraction):
    "With accumulation over two batches, clipping, weight decay and bfloat16"
    torch.manual_seed(0)
    net,x,y = torch.nn.Sequential(torch.nn.Linear(24, 16).requires_grad_(False)),torch.randn(64, 24),torch.randn(64, 16)
    st.adapt_layer(net[0], {st.Site('0', '0', 'fc1', 0, 24, 16):3}, 'stella')
    init_adapters(net, 'stella')
    starts = {k:v.clone() for k,v in net.state_dict().items()}
    params = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=3e-3, weight_decay=.05)
    for i in range(2000):
        with torch.autocast('cpu', torch.bfloat16): loss = F.mse_loss(net(x[i%8::8]).float(), y[i%8::8])/2
        loss.backward()
        if i%2==0: continue
        torch.nn.utils.clip_grad_norm_(params, .1)
        with on_stiefel(net, retraction): opt.step()
        opt.zero_grad()
    assert far(net)<1e-5
    assert all((v-starts[k]).norm()>.1 for k,v in net.state_dict().items() if 'lora_' in k)

def test_pruning_keeps_and_growing_changes_nothing():
    _,net = st.adapted('deit', 'stella')
    for m in adapted_layers(net).values():
        for S in m.lora_S.values(): torch.nn.init.normal_(S)
    x = images()
    with torch.no_grad():
        before = net(x)
        grown = resize(deepcopy(net), {s:r+3 for s,r in current_ranks(net).items()})
        assert_close(grown(x), before, rtol=1e-4, atol=1e-5)
    assert far(grown)<1e-5
    m,kind = next((m,k) for m in adapted_layers(net).values() for k in m.sites if m.rank(k)==3)
    U,S,Vt = torch.linalg.svd(m.site_delta(kind).detach())
    best = m.lora_S[kind].detach().abs().topk(2).indices.tolist()
    m.resize(kind, best)
    assert_close(m.site_delta(kind).detach(), U[:,:2]*S[:2]@Vt[:2], rtol=1e-4, atol=1e-5)   # pruning small ones is the best approximation

def test_in_a_learner_with_a_retraction_by_itself(dls):  # noqa: F811
    for method,kw in (('stella',{}), ('uniform',dict(adapter='stella')), ('random',dict(adapter='stella', init='eva'))):
        plan = plan_model(pico(), dls, method, budget=36, **kw)
        learn = fit(fclora_learner(dls, pico(), plan, recipe(epochs=1)))
        assert [cb.retraction for cb in learn.cbs if isinstance(cb, StiefelSteps)]==['polar'] and far(learn.model)<1e-5
        assert plan.adapter_params==36*257==count_params(learn.model)['adapter']

def test_other_adapters_have_no_singular_values_to_fill():
    _,net = st.adapted('deit', 'lora')
    with pytest.raises(ValueError, match='the init stella fills lora_S'): init_adapters(net, 'stella')
    assert adapters['stella'] is Stella and presets['stella'].source=='arXiv 2510.01938'

@pytest.mark.parametrize('adapter', ['stiefel','stella'])
def test_peft_has_no_counterpart_and_says_so(adapter, tmp_path):
    from fclora.deploy.peft import save_peft
    _,net = st.adapted('deit', adapter)
    with pytest.raises(ValueError, match=f'PEFT has no counterpart of the adapter {adapter!r}'): save_peft(net, tmp_path)
