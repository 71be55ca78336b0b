"Every preset from its Plan to the predictions of the saved model and to one merged weight, and what is special about it in the end"
from copy import deepcopy
from functools import partial
import json
import pytest, torch
import torch.nn.functional as F
import system_models as S
from test_systems_stiefel import far
from fclora.adapt import *
from fclora.allocators.waterfill import allocators
from fclora.initialisers import init_adapters
from fclora.presets import presets
from fclora.runs.folder import load_model, load_run
from fclora.runs.systems import systems # noqa: F401 with it all presets are registered
from fclora.systems.floe import floe

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:CKA of')]
options = dict(eva=dict(lo=0), gora=dict(kinds='q,k,v,fc1', head_warmup=2))

def blocks_of(run): return len({s.block for s in run.plan.sites if run.plan.ranks[s.name]})
def ranks_of(run): return set(run.plan.ranks.values())
def at_ends(run): return tuple(run.plan.ranks[f(run.plan.scores, key=run.plan.scores.get)] for f in (min,max)) # of the lowest score, and of the highest

holds = dict(
    fclora=lambda run: set(run.plan.metrics)=={'fisher','grad','cov'} and at_ends(run)==(min(ranks_of(run)), max(ranks_of(run))),
    uniform=lambda run: ranks_of(run)=={2,3} and not run.plan.metrics,
    random=lambda run: len(ranks_of(run))>2 and not run.plan.metrics,
    inverse=lambda run: at_ends(run)==(max(ranks_of(run)), min(ranks_of(run))),
    naive=lambda run: at_ends(run)==(min(ranks_of(run)), max(ranks_of(run))),
    dora=lambda run: any('.magnitude.' in n for n in adapter_params(run.model)),
    eva=lambda run: len(ranks_of(run))>1 and len(set(run.config['scaling'].values()))==1,
    gora=lambda run: len(ranks_of(run))>2 and len(set(run.config['scaling'].values()))==1,
    cka=lambda run: blocks_of(run)==3 and not run.plan.ranks['blocks.0.attn.qkv.q'],
    cut=lambda run: len(ranks_of(run))>1,
    fora=lambda run: blocks_of(run)==3 and far(run.model)<1e-5,
    stella=lambda run: far(run.model)<1e-5,
    adalora=lambda run: {tuple(p.shape) for n,p in adapter_params(run.model).items() if '.lora_A.' in n}=={(r,128) for r in ranks_of(run)-{0}},
    floe=lambda run: blocks_of(run)<=6 and run.plan.allocator=='floe')

@pytest.mark.parametrize('method', presets)
def test_from_its_plan_to_merged_weights(method, tmp_path, monkeypatch):
    monkeypatch.setitem(allocators, 'floe', partial(floe, trials=2, path=tmp_path/'trials.json'))
    run,made = S.runs_end_to_end(tmp_path, method, **options.get(method, {})),presets[method]
    assert (run.plan.adapter, run.plan.allocator, run.plan.init, run.plan.schedule)==(made.adapter, made.allocator, made.init, made.schedule)
    if method!='naive': assert run.plan.total_rank==40 # which rounds as it likes
    assert sum(current_ranks(run.model).values())==run.plan.total_rank==sum(load_model(tmp_path/'run')[1]['ranks'].values())
    assert load_run(tmp_path/'run').plan==run.plan
    assert holds[method](run)
    if method=='floe': assert len(json.loads((tmp_path/'trials.json').read_text())['trials'])==2

# --- starts from data in a model of 16 bits

@pytest.mark.parametrize('name', ['deit','swin','llama'])
@pytest.mark.parametrize('init', ['eva','gora'])
def test_starts_in_16_bits_are_those_of_32(name, init):
    g = torch.Generator().manual_seed(0)
    batches = [(S.inputs(name, 24), torch.randint(0, 4, (24,), generator=g))]
    nets = []
    for dtype in (torch.float32, torch.bfloat16):
        base = S.made[name]().eval().to(dtype)
        torch.manual_seed(0)
        net = adapt(deepcopy(base), S.unequal(base))
        cast = [(x if name=='llama' else x.to(dtype), y) for x,y in batches]
        nets.append(init_adapters(net, init, cast))
        with torch.no_grad(): out,was = net(cast[0][0]),base(cast[0][0])
        assert out.dtype==dtype and torch.equal(out, was)==(init=='eva')
    assert {p.dtype for p in adapter_params(nets[1]).values()}=={torch.float32}
    for path,layer in adapted_layers(nets[0]).items():
        for kind in layer.sites:
            one,two = [net.get_submodule(path) for net in nets]
            if init=='gora': assert F.cosine_similarity(one.site_delta(kind).flatten(), two.site_delta(kind).flatten(), 0)>.98
            else: assert torch.linalg.svdvals(one.lora_A[kind]@two.lora_A[kind].T)[0]>.98*torch.linalg.svdvals(one.lora_A[kind]@one.lora_A[kind].T)[0]
