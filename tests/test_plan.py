"The Plan in memory and on disk: what is written is read again, and nothing that cannot be is let in"
import json
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, timm, torch
from hypothesis import given,settings,strategies as st
from matplotlib.axes import Axes
from fclora.adapt import *
from fclora.allocators.controls import *
from fclora.allocators.waterfill import *
from fclora.files import atomic_path
from fclora.find import *
from fclora.fused import *
from fclora.lora import *
from fclora.make_plan import *
from fclora.plan import *
from fclora.presets import *
from fclora.scorers.composite import composite

controls = ('fclora','uniform','random','inverse','naive') # presets on the same adapter and metrics

def raises(piece, kind=ValueError): return pytest.raises(kind, match=piece)

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4)

@pytest.fixture
def sites(model): return find_sites(model)
@pytest.fixture
def metrics(sites):
    rng = np.random.default_rng(0)
    return {m:{s.name:float(v) for s,v in zip(sites, rng.lognormal(0, 1, len(sites)))} for m in ('fisher','grad','cov')}
@pytest.fixture
def plan(sites, metrics): return make_plan('test_vit', sites, metrics, budget=60, settings=dict(n_batches=8))

def rewrite(path, change):
    "Edit the JSON at `path` as a user would"
    d = json.loads(path.read_text())
    change(d)
    path.write_text(json.dumps(d))
    return path

class WithVector(LoRA):
    "An adapter of one's own: LoRA and a vector besides, whose length does not depend on the rank"
    parts = dict(LoRA.parts, extra=None)
    def new_parts(self, site, r): return super().new_parts(site, r) | dict(extra=self.raw.new_zeros(site.d_out))
    @staticmethod
    def cost(site, r): return r*(site.d_in+site.d_out)+(site.d_out if r else 0)

# --- made

def test_make_plan_holds_what_the_parts_say(plan, sites, metrics):
    assert plan.scores==composite(metrics) and plan.metrics==metrics and plan.sites==sites
    assert plan.ranks==waterfill(plan.scores, 60) and plan.total_rank==60 and plan.adapter_params==60*128
    assert plan.weights==dict(fisher=.6, grad=.2, cov=.2) and (plan.normaliser,plan.allocator,plan.seed)==('minmax', 'waterfill', 0)
    assert plan.settings==dict(n_batches=8) and (plan.adapter,plan.init,plan.lora_alpha,plan.scaling,plan.dropout)==('lora', 'kaiming', 8., 'sqrt', 0.)
    assert {'fclora','torch','timm','fastai'}<=set(plan.versions) and plan.versions['torch']==version('torch')

def test_a_plan_that_measures_nothing_has_no_weights(sites):
    plan = make_plan('m', sites, method='uniform', budget=60)
    assert plan.weights==plan.metrics==plan.scores=={} and plan.allocator=='uniform'

@pytest.mark.parametrize('method', controls)
def test_presets_differ_in_the_allocator_alone(sites, metrics, method):
    plan = make_plan('m', sites, metrics, method, 60, seed=2)
    want = dict(fclora=waterfill, inverse=inverse, naive=naive_proportional)
    rest = dict(uniform=uniform(metrics['cov'], 60), random=random_ranks(metrics['cov'], 60, seed=2))
    assert plan.ranks==(want[method](composite(metrics), 60) if method in want else rest[method]) and plan.method==method

def test_a_budget_of_parameters_counts_all_that_an_adapter_costs(sites, monkeypatch):
    monkeypatch.setitem(adapters, 'vector', WithVector)
    budget = 18*64+50*128
    plan = make_plan('m', sites, method='uniform', budget=budget, unit='params', adapter='vector')
    assert plan.total_rank==50 and plan.adapter_params==plan.spent==budget
    need,room = 18*(64+128),18*(64+16*128)
    with raises(f'a budget of {need-1} parameters .* give a budget in {need}..{room}'):
        make_plan('m', sites, method='uniform', budget=need-1, unit='params', adapter='vector')

def test_an_allocator_that_returns_nonsense_names_the_site(sites, monkeypatch):
    monkeypatch.setitem(allocators, 'bad', lambda scores, budget, lo, hi, costs=None: dict.fromkeys(scores, 99))
    with raises('rank of blocks.0.attn.qkv.q must be a whole number in 0..64'): make_plan('m', sites, method='uniform', budget=60, allocator='bad')

@pytest.mark.parametrize('kw,piece', [
    (dict(method='best'), "unknown method 'best'; there are fclora, uniform, random, inverse, naive"),
    (dict(method='head'), "'head' is a linear probe"),
    (dict(unit='bytes'), "unit of the budget must be one of ranks, params, got 'bytes'"),
    (dict(metrics=None), "method 'fclora' needs measurements"), (dict(metrics=None, method='naive'), "method 'naive' needs measurements"),
    (dict(method='naive', unit='params', budget=7680), 'naive rounding knows budgets in ranks only'),
    (dict(budget=17), 'give a budget in 18..288'),
    (dict(budget=60.), 'budget must be a whole number'), (dict(budget='60'), 'budget must be a whole number'),
    (dict(budget=2303, unit='params'), 'a budget of 2303 parameters .* give a budget in 2304..36864'),
    (dict(weights=dict(hessian=1)), "no metric 'hessian'"),
    (dict(normaliser='z'), "unknown normaliser 'z'"), (dict(lo=65, hi=99, budget=2000), 'bounds of blocks.0.attn.qkv.q are 65..64')])
def test_errors_of_make_plan(sites, metrics, kw, piece):
    with raises(piece): make_plan('test_vit', sites, **(dict(metrics=metrics, budget=60) | kw))

# --- used

def test_adapt_builds_what_the_plan_says(plan, model):
    plan = replace(plan, lora_alpha=3., scaling='rank', dropout=.1)
    net = plan.adapt(deepcopy(model))
    assert current_ranks(net)==plan.ranks and sum(p.numel() for p in adapter_params(net).values())==plan.adapter_params
    layer = net.blocks[2].attn.qkv
    assert layer.dropout_p==.1 and layer.scaling=={k:3./plan.ranks[f'blocks.2.attn.qkv.{k}'] for k in 'qkv'}
    own = {n:2.+i for i,n in enumerate(plan.ranks)}
    assert replace(plan, scaling=own).adapt(deepcopy(model)).blocks[0].attn.qkv.scaling==dict(q=2., k=3., v=4.)

def test_adapt_puts_in_the_adapter_of_the_plan_or_says_what_is_missing(plan, model, monkeypatch):
    mine = replace(plan, adapter='vector')
    with raises("unknown adapter 'vector'; there are lora"): mine.adapt(deepcopy(model))
    monkeypatch.setitem(adapters, 'vector', WithVector)
    net = mine.adapt(deepcopy(model))
    assert isinstance(net.blocks[0].attn.qkv, WithVector) and sum(p.numel() for p in adapter_params(net).values())==mine.adapter_params

def test_check_accepts_the_model_plain_or_adapted_and_no_other(plan, model):
    assert plan.check(model) is plan
    assert plan.check(adapt(deepcopy(model), plan.ranks)) is plan
    wide,short = timm.create_model('vit_tiny_patch16_224', depth=6),timm.create_model('test_vit', depth=3)
    with raises('this Plan was made for test_vit: its blocks.0.attn.qkv.q maps 64 to 64, here it maps 192 to 192'): plan.check(wide)
    with raises('this Plan was made for test_vit: VisionTransformer has no site blocks.3.attn.qkv.q'): plan.adapt(short)
    with raises('has no site blocks.0.attn.qkv.q'): plan.check(torch.nn.Sequential(torch.nn.Linear(3, 3)))

@pytest.mark.parametrize('kw', [dict(start=0),dict(path='head'),dict(kind='v'),dict(d_in=32)])
def test_check_notices_an_edited_site(plan, model, kw):
    with raises('this Plan was made for test_vit'): replace(plan, sites=[plan.sites[0], replace(plan.sites[1], **kw), *plan.sites[2:]]).check(model)

# --- saved and loaded

@pytest.mark.parametrize('method', controls)
@pytest.mark.parametrize('unit', ['ranks','params'])
def test_save_and_load_give_the_same_plan(sites, metrics, tmp_path, method, unit):
    if (method,unit)==('naive','params'): return
    given = metrics if presets[method].weights else None
    plan = make_plan('test_vit', sites, given, method, 60 if unit=='ranks' else 60*128, unit, seed=3, init='eva', lora_alpha=4., scaling='rank', dropout=.2)
    assert plan.save(tmp_path/'new/plan.json')==tmp_path/'new/plan.json'
    assert Plan.load(tmp_path/'new/plan.json')==plan
    assert [o.name for o in (tmp_path/'new').iterdir()]==['plan.json']   # no temporary file stays
    assert method=='naive' or plan.adapter_params==60*128

def test_multipliers_a_site_are_saved(plan, tmp_path):
    plan.scaling = {n:1.5 for n in plan.ranks}
    assert Plan.load(plan.save(tmp_path/'p.json'))==plan
    with raises('scaling names blocks.9.x, which is not among its sites'): Plan.load(rewrite(tmp_path/'p.json', lambda d: d['scaling'].update({'blocks.9.x':1.})))

def test_a_plan_of_parts_that_are_not_here_is_shown_and_saved_but_not_built(plan, tmp_path, model):
    unknown = dict(adapter='mine', allocator='search', init='svd', schedule='prune', normaliser='z', weights={'hessian':1})
    path = rewrite(plan.save(tmp_path/'p.json'), lambda d: d.update(unknown))
    strange = Plan.load(path)
    assert 'of the unknown adapter mine' in str(strange) and strange.plot() is not None
    assert Plan.load(strange.save(tmp_path/'q.json'))==strange
    with raises("unknown adapter 'mine'"): strange.adapt(deepcopy(model))
    plt.close('all')

def test_an_edited_rank_counts(plan, tmp_path):
    path = rewrite(plan.save(tmp_path/'p.json'), lambda d: d['sites'][4].update(rank=11))
    new = Plan.load(path)
    assert new.ranks[plan.sites[4].name]==11 and {**new.ranks, plan.sites[4].name:plan.ranks[plan.sites[4].name]}==plan.ranks
    assert new.total_rank==60-plan.ranks[plan.sites[4].name]+11

@pytest.mark.parametrize('r', [65,-1,2.5,'4',None,True,[1],10**400])
def test_an_edited_rank_that_cannot_be_is_an_error(plan, tmp_path, r):
    path = rewrite(plan.save(tmp_path/'p.json'), lambda d: d['sites'][4].update(rank=r))
    with raises('p.json is not a Plan: blocks.1.attn.qkv.k: rank must be a whole number in 0..64'): Plan.load(path)

def test_a_metric_called_like_a_column_is_refused(plan):
    with raises('the metrics of a Plan must be plain names that no other column has'): replace(plan, metrics=dict(rank=plan.scores)).to_dict()

@pytest.fixture
def old(): return json.loads((Path(__file__).parent/'format1/plan.json').read_text())

def test_format_1_is_read(old):
    plan = plan_from_dict(old)
    assert old['format']==1 and plan.to_dict()['format']==2
    assert (plan.allocator,plan.adapter,plan.scaling,plan.lora_alpha)==('waterfill', 'lora', 'sqrt', 8.)
    assert plan.ranks=={r['name']:r['rank'] for r in old['sites']} and plan.total_rank==old['total_rank'] and plan.adapter_params==old['adapter_params']
    assert plan.weights==old['settings']['weights'] and plan.seed==old['settings']['seed'] and not {'weights','seed','normaliser'}&set(plan.settings)
    assert set(plan.metrics)=={'fisher','grad','cov'} and composite(plan.metrics, plan.weights, plan.normaliser)==pytest.approx(plan.scores)
    assert make_plan('m', plan.sites, plan.metrics, budget=plan.budget).ranks==plan.ranks
    assert plan_from_dict(plan.to_dict())==plan

@pytest.mark.parametrize('method', ['uniform','random','inverse','naive'])
def test_methods_of_format_1_were_allocators(old, method): assert plan_from_dict(old | dict(method=method)).allocator==method

# --- what is no Plan

damage = dict(
    top_key=(lambda d: d.pop('budget'), 'is not a Plan: there is no budget'),
    no_format=(lambda d: d.pop('format'), 'is not a Plan: there is no format'),
    rank=(lambda d: d['sites'][3].pop('rank'), 'is not a Plan: blocks.1.attn.qkv.q: there is no rank'),
    metric=(lambda d: d['sites'][3].pop('grad'), 'is not a Plan: blocks.1.attn.qkv.q: there is no grad'),
    metric_text=(lambda d: d['sites'][3].update(grad='big'), "blocks.1.attn.qkv.q: grad must be a finite number in -inf..inf, got 'big'"),
    score=(lambda d: d['sites'][3].pop('score'), 'blocks.1.attn.qkv.q: there is no score'),
    no_sites=(lambda d: d['sites'].clear(), 'is not a Plan: sites must be a list of at least one object'),
    sites_text=(lambda d: d.update(sites='abc'), 'sites must be a list'),
    site_text=(lambda d: d.update(sites=['abc']), 'sites must be a list'),
    sites_null=(lambda d: d.update(sites=None), 'sites must be a list'),
    width_text=(lambda d: d['sites'][3].update(d_in='64'), "p.json is not a Plan: site 3: d_in must be a whole number in 1..2147483648, got '64'"),
    width_null=(lambda d: d['sites'][3].update(d_out=None), 'site 3: d_out must be a whole number'),
    kind=(lambda d: d['sites'][3].update(kind='z'), 'site 3: kind must be one of q, k, v'),
    heads=(lambda d: d['sites'][3].update(heads=[]), 'site 3: heads must be'),
    name=(lambda d: d['sites'][3].update(name={}), 'site 3: name must be a line of text, got a dict'),
    name_twice=(lambda d: d['sites'].append(d['sites'][0]), 'it names the site blocks.0.attn.qkv.q twice'),
    path=(lambda d: d.update(method='../../x'), "method must be a plain name of letters, digits and -_., got '../../x'"),
    method=(lambda d: d.update(method=['fclora']), 'method must be a plain name'),
    unit=(lambda d: d.update(unit='mb'), 'unit must be one of ranks, params'),
    escape=(lambda d: d.update(model='a\x1b[31m'), 'model must be a line of text'),
    budget=(lambda d: d.update(budget=-1), 'budget must be a whole number in 0..'),
    adapter=(lambda d: d.update(adapter=3), 'adapter must be a plain name'),
    alpha=(lambda d: d.update(lora_alpha='8'), 'lora_alpha must be a finite number'),
    scaling=(lambda d: d.update(scaling=2), 'scaling must be the name of a scaling rule'),
    zero=(lambda d: d.update(scaling={'blocks.0.attn.qkv.q':0}), 'scaling must be'),
    dropout=(lambda d: d.update(dropout=2), 'dropout must be'),
    weights=(lambda d: d.update(weights={'fisher':'x'}), 'weights must be an object, every value of it'),
    settings=(lambda d: d.update(settings=[]), 'settings must be an object'),
    batches=(lambda d: d['settings'].update(score_batches='8'), 'settings: score_batches must be'),
    forecast=(lambda d: d['settings'].update(forecast=3), 'settings: forecast must be an object'),
    seed=(lambda d: d.update(seed=.5), 'seed must be a whole number'),
    step=(lambda d: d['settings'].update(forecast=dict(adapter_params=1, lowest_block=0, step='x', kept=1, kept_mib=1, batch_size=1)), 'settings: forecast: step must be'),
    deep=(lambda d: d['settings'].update(x=json.loads('['*100+']'*100)), 'settings must be an object nested at most 20 deep'),
    metrics=(lambda d: d.update(metrics=['rank']), 'metrics must be a list of names'),
    versions=(lambda d: d.update(versions={'torch':2}), 'versions must be'),
    format=(lambda d: d.update(format='2'), 'format must be a whole number'),
    newer=(lambda d: d.update(format=3), 'p.json has format 3, made by a newer fclora; this one reads formats 1 and 2'))

@pytest.mark.parametrize('change,piece', damage.values(), ids=damage)
def test_a_damaged_plan_is_one_clear_error(plan, tmp_path, change, piece):
    with raises(piece) as e: Plan.load(rewrite(plan.save(tmp_path/'p.json'), change))
    assert '\n' not in str(e.value) and len(str(e.value))<350 and e.value.__cause__ is None

@pytest.mark.parametrize('change,piece', [
    (lambda d: d.update(settings=[]), 'settings must be'), (lambda d: d.update(sites=[3]), 'sites must be'),
    (lambda d: d.update(method={}), 'method must be'),
    (lambda d: d['settings'].update(weights=3), 'weights must be'),
    (lambda d: d['sites'][0].update(note='x'), 'note must be a finite number')])
def test_a_damaged_plan_of_format_1_too(old, change, piece):
    change(old)
    with raises(piece): plan_from_dict(old)

words = st.text(max_size=5)
def grown(values): return st.lists(values, max_size=3)|st.dictionaries(words, values, max_size=3)
json_values = st.recursive(st.none()|st.booleans()|st.integers()|st.floats()|words, grown, max_leaves=6)

def objects(d):
    "Where a plan can be damaged: above, in its settings, in its first row"
    rows = d.get('sites')
    return [d] + [o for o in (d.get('settings'), rows[0] if isinstance(rows, list) and rows else None) if isinstance(o, dict)]

@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([1,2]))
def test_whatever_is_put_in_a_plan_it_is_read_or_refused_by_a_value_error(data, form):
    d = json.loads((Path(__file__).parent/'format1/plan.json').read_text())
    if form==2: d = plan_from_dict(d).to_dict()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(objects(d)))
        at[data.draw(st.sampled_from(sorted(at))) if at else 'x'] = data.draw(json_values)
    try: plan = plan_from_dict(d, 'p.json')
    except ValueError as e: assert str(e).startswith('p.json') and '\n' not in str(e)
    else: assert str(plan) and plan_from_dict(json.loads(json.dumps(plan.to_dict()))) is not None

@pytest.mark.parametrize('text', ['','{"format": 1,','[1, 2]','"x"','null','3',b'\xff\xfe\x00','['*10**6, '{"format":'+'1'*5000+'}'])
def test_what_is_no_plan_is_said_to_be_none(tmp_path, text):
    (tmp_path/'p.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with raises('p.json is not a Plan: '): Plan.load(tmp_path/'p.json')

def test_a_truncated_file_a_missing_one_and_a_folder(plan, tmp_path):
    path = plan.save(tmp_path/'p.json')
    path.write_text(path.read_text()[:-200])
    with raises('p.json is not a Plan: '): Plan.load(path)
    with raises('no Plan at .*q.json', FileNotFoundError): Plan.load(tmp_path/'q.json')
    with raises('is not a Plan: Is a directory', IsADirectoryError): Plan.load(tmp_path)

def test_a_failing_save_keeps_the_old_file(plan, tmp_path):
    old = plan.save(tmp_path/'p.json').read_text()
    with pytest.raises(TypeError): replace(plan, settings=dict(x=object())).save(tmp_path/'p.json')
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path/'p.json') as tmp:
            tmp.write_text('half'); raise KeyboardInterrupt
    assert (tmp_path/'p.json').read_text()==old and len(list(tmp_path.iterdir()))==1

# --- shown

def test_str_shows_every_rank_in_its_row_and_column(plan, sites):
    head,blocks,*rows = str(plan).splitlines()
    assert '60 ranks' in head and '7,680 parameters over 18 sites of test_vit' in head and blocks.split()==['block',*'012345']
    def number(cell): return int(''.join(c for c in cell if c.isdigit()))
    for k,row in zip('qkv', rows, strict=True):
        assert row[0]==k and [number(row[5+5*b:10+5*b]) for b in range(6)]==[plan.ranks[s.name] for s in sites if s.kind==k]

def test_str_of_zero_ranks_and_of_gaps(sites):
    some = [s for s in sites if s.name!='blocks.1.attn.qkv.k']
    assert '0 ranks' in str(make_plan('m', some, method='uniform', budget=0, lo=0))
    row = str(make_plan('m', some, method='uniform', budget=20)).splitlines()[3]
    assert row[10:15]==' '*5 and row[15:20].strip()

def test_plots_return_labelled_axes_with_the_numbers(plan):
    ax = plan.plot()
    assert isinstance(ax, Axes) and ax.get_xlabel()=='block' and '60 ranks' in ax.get_title()
    assert sorted(int(t.get_text()) for t in ax.texts)==sorted(plan.ranks.values())
    axs = plan.plot_metrics()
    assert [o.get_ylabel() for o in axs]==['fisher','grad','cov'] and axs[-1].get_xlabel()=='block'
    for o in axs: assert len(o.patches)==18 and max(b.get_height() for b in o.patches)==1 and min(b.get_height() for b in o.patches)==0
    mine = plt.subplots()[1]
    assert plan.plot(mine) is mine
    plt.close('all')

def test_a_plan_without_measurements_has_no_metrics_to_plot(sites):
    with raises('this uniform plan was made without measurements'): make_plan('m', sites, method='uniform', budget=60).plot_metrics()
