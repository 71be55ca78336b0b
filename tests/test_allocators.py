"Properties of water-filling and its controls, and the Plan on disk"
import itertools,json
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
import matplotlib; matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pytest, timm, torch
from hypothesis import assume,given,settings,strategies as st
from matplotlib.axes import Axes
from fclora.lora import *
from fclora.scorers import composite
from fclora.allocators import *

cases = settings(max_examples=80, deadline=None)
def raises(piece): return pytest.raises(ValueError, match=piece)
def named(vals): return {f'blocks.{i}.q':v for i,v in enumerate(vals)}
def spent(ranks, costs=None): return sum(r*(costs[n] if costs else 1) for n,r in ranks.items())

score = st.one_of(st.integers(0, 5).map(float), st.floats(0, 1e6, allow_subnormal=False))   # ties and zeros are common

@st.composite
def problems(draw, costs=None, n_max=12):
    "Scores, bounds per site and a budget that they can hold; costs too when a strategy for one is given"
    scores = named(draw(st.lists(score, min_size=1, max_size=n_max)))
    lo = {n:draw(st.integers(0, 3)) for n in scores}
    hi = {n:l+draw(st.integers(0, 8)) for n,l in lo.items()}
    cs = None if costs is None else {n:draw(costs) for n in scores}
    return scores,draw(st.integers(spent(lo, cs), spent(hi, cs))),lo,hi,cs

@st.composite
def equal_bounds(draw, of=score, n_max=40):
    scores = named(draw(st.lists(of, min_size=1, max_size=n_max)))
    lo = draw(st.integers(0, 2)); hi = lo+draw(st.integers(0, 15))
    return scores,draw(st.integers(lo*len(scores), hi*len(scores))),lo,hi

# --- water-filling a budget of ranks

@cases
@given(problems())
def test_spends_the_budget_exactly_within_bounds_per_site(p):
    scores,budget,lo,hi,_ = p
    r = waterfill(scores, budget, lo, hi)
    assert sum(r.values())==budget and all(lo[n]<=r[n]<=hi[n] for n in scores)
    assert list(r)==list(scores) and all(type(o) is int for o in r.values())

@cases
@given(equal_bounds())
def test_a_higher_score_never_gets_less_and_equal_scores_differ_by_one_at_most(p):
    r,scores = waterfill(*p),p[0]
    for a,b in itertools.combinations(scores, 2):
        if scores[a]>scores[b]: assert r[a]>=r[b]
        if scores[a]<scores[b]: assert r[a]<=r[b]
        if scores[a]==scores[b]: assert 0<=r[a]-r[b]<=1   # the first by name gets the odd one

@cases
@given(equal_bounds(st.floats(.01, 100)))
def test_ranks_are_proportional_to_scores_up_to_rounding(p):
    "Some λ has every rank within 1 of `clip(λs, lo, hi)`"
    scores,_,lo,hi = p
    r = waterfill(*p)
    least = max([(r[n]-1)/s for n,s in scores.items() if r[n]-1>=lo], default=0)
    most = min([(r[n]+1)/s for n,s in scores.items() if r[n]+1<=hi], default=np.inf)
    assert least<=most*(1+1e-9)

def test_clipped_sites_hand_on_what_they_cannot_take():
    assert waterfill(dict(a=100., b=2., c=1.), 12, lo=0, hi=6)==dict(a=6, b=4, c=2)
    assert waterfill(dict(a=6., b=3., c=0.), 10, lo=1, hi=16)==dict(a=6, b=3, c=1)
    assert waterfill(dict(a=1., b=1.), 6, lo=0, hi=dict(a=1, b=16))==dict(a=1, b=5)

@cases
@given(equal_bounds(), st.sampled_from([2.**-40,.5,3.,1e-9,1e9]))
def test_only_ratios_of_scores_matter(p, factor):
    scores,*rest = p
    assume(all(s==0 or s*factor>1e-200 for s in scores.values()))
    assert waterfill({n:s*factor for n,s in scores.items()}, *rest)==waterfill(*p)

@cases
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_sites_does_not_matter(p, rng):
    scores,budget,lo,hi,_ = p
    names = list(scores); rng.shuffle(names)
    assert waterfill({n:scores[n] for n in names}, budget, lo, hi)==waterfill(scores, budget, lo, hi)

@cases
@given(equal_bounds(), st.randoms(use_true_random=False))
def test_permuting_distinct_scores_permutes_the_ranks(p, rng):
    scores,*rest = p
    vals = list(dict.fromkeys(round(s, 3) for s in scores.values()))
    assume(len(vals)==len(scores))
    order = list(range(len(vals))); rng.shuffle(order)
    r,names = list(waterfill(named(vals), *rest).values()),list(named(vals))
    assert list(waterfill(named([vals[i] for i in order]), *rest).values())==[r[i] for i in order]

@cases
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 13), st.data())
def test_smallest_and_largest_budget(n, lo, more, data):
    scores = named(data.draw(st.lists(score, min_size=n, max_size=n)))
    assert set(waterfill(scores, n*lo, lo, lo+more).values())=={lo}
    assert set(waterfill(scores, n*(lo+more), lo, lo+more).values())=={lo+more}

@cases
@given(equal_bounds(st.just(0.)))
def test_without_any_score_the_budget_is_spread_evenly(p):
    scores,*rest = p
    assert waterfill(*p)==uniform(list(scores), *rest)

def test_ties_go_by_number_and_not_by_letter():
    r = waterfill({f'blocks.{i}.q':1. for i in (10,2,1)}, 4, lo=1)
    assert r=={'blocks.10.q':1, 'blocks.2.q':1, 'blocks.1.q':2}

def test_default_bounds_are_1_and_16():
    r = waterfill(named([1.]*35+[100.]), 60)
    assert sum(r.values())==60 and max(r.values())==16 and min(r.values())==1

# --- a budget of parameters

cost = st.sampled_from([2,3,4,6,10])

def reachable(budget, lo, hi, costs):
    "Largest sum of costs up to `budget`, trying every combination"
    return max(t for t in map(sum, itertools.product(*[[costs[n]*k for k in range(lo[n], hi[n]+1)] for n in lo])) if t<=budget)

@cases
@given(problems(cost, n_max=4))
def test_spends_as_many_parameters_as_brute_force_finds(p):
    scores,budget,lo,hi,costs = p
    r = waterfill(*p)
    assert spent(r, costs)==reachable(budget, lo, hi, costs)
    assert all(lo[n]<=r[n]<=hi[n] for n in scores)

@cases
@given(problems(st.sampled_from([1536,3840])))
def test_at_equal_cost_and_bounds_the_order_of_scores_is_kept(p):
    scores,_,_,_,costs = p
    lo,hi = 1,9
    budget = sum(costs.values())*4
    r = waterfill(scores, budget, lo, hi, costs)
    assert spent(r, costs)==budget
    for a,b in itertools.permutations(scores, 2):
        if costs[a]==costs[b] and scores[a]>scores[b]: assert r[a]>=r[b]

@cases
@given(problems(), st.integers(1, 2000))
def test_one_cost_for_all_is_a_budget_of_ranks(p, c):
    scores,budget,lo,hi,_ = p
    assert waterfill(scores, budget*c+c//2 if budget<spent(hi) else budget*c, lo, hi, {n:c for n in scores})==waterfill(scores, budget, lo, hi)

@cases
@given(problems(cost), st.integers(0, 99))
def test_controls_never_spend_more_parameters_than_given(p, seed):
    scores,budget,lo,hi,costs = p
    for r in (uniform(scores, budget, lo, hi, costs), random_ranks(scores, budget, lo, hi, costs, seed)):
        assert all(lo[n]<=r[n]<=hi[n] for n in scores)
        assert all(r[n]==hi[n] or spent(r, costs)+costs[n]>budget for n in scores) and spent(r, costs)<=budget

# --- controls

@cases
@given(equal_bounds())
def test_uniform_is_even_and_gives_the_remainder_to_the_first(p):
    scores,budget,lo,hi = p
    r = uniform(list(scores), budget, lo, hi)
    k,more = divmod(budget, len(scores))
    assert list(r.values())==[k+1]*more+[k]*(len(scores)-more)

@cases
@given(problems(), st.integers(0, 99))
def test_random_ranks_are_exact_within_bounds_and_seeded(p, seed):
    scores,budget,lo,hi,_ = p
    r = random_ranks(list(scores), budget, lo, hi, seed=seed)
    assert sum(r.values())==budget and all(lo[n]<=r[n]<=hi[n] for n in scores)
    assert r==random_ranks(list(scores), budget, lo, hi, seed=seed)

def test_random_ranks_depend_on_the_seed_and_reach_every_site():
    draws = [random_ranks(list('abcdef'), 30, seed=s) for s in range(50)]
    assert len({tuple(d.values()) for d in draws})>40
    means = [np.mean([d[n] for d in draws]) for n in 'abcdef']
    assert min(means)>4 and max(means)<6

@cases
@given(problems())
def test_naive_rounding_stays_within_bounds(p):
    scores,budget,lo,hi,_ = p
    r = naive_proportional(scores, budget, lo, hi)
    assert all(lo[n]<=r[n]<=hi[n] for n in scores)

def test_naive_rounding_by_hand_misses_the_budget():
    assert naive_proportional(dict(a=8., b=1., c=1., d=0.), 40)==dict(a=16, b=4, c=4, d=1)
    assert naive_proportional(dict(a=0., b=0.), 10)==dict(a=1, b=1)

def test_rank_caps_are_the_narrower_of_bound_and_width():
    sites = [Site('a', 'a', 'q', 0, 64, 8), Site('b', 'b', 'q', 0, 4, 64), Site('c', 'c', 'q', 0, 64, 64)]
    assert rank_caps(sites)==dict(a=8, b=4, c=16) and rank_caps(sites, 6)==dict(a=6, b=4, c=6)

# --- bad input

allocators = dict(waterfill=lambda n,*a: waterfill(dict.fromkeys(n, 1.), *a), uniform=uniform, random=random_ranks)

@pytest.mark.parametrize('f', allocators.values(), ids=allocators)
def test_a_budget_that_does_not_fit_names_the_range(f):
    names = list(named(range(36)))
    for budget in (35,577,-1):
        with raises(rf'a budget of {budget} ranks does not fit 36 sites with 1..16 ranks each: give a budget in 36..576'): f(names, budget, 1, 16)
    with raises(r'a budget of 99 parameters does not fit 2 sites with 1..4 ranks each: give a budget in 100..400'):
        f(['a','b'], 99, 1, 4, dict(a=60, b=40))
    with raises(r'bounds of b are 3\.\.2; they must be whole numbers with 0 <= lower <= upper'): f(['a','b'], 5, dict(a=1, b=3), dict(a=2, b=2))
    with raises('bounds of a are -1..4'): f(['a','b'], 5, -1, 4)

@pytest.mark.parametrize('v', [float('nan'),float('inf'),-1.])
@pytest.mark.parametrize('f', [waterfill,naive_proportional])
def test_scores_that_are_no_numbers_name_the_site(f, v):
    with raises(rf'score of c must be a finite number of at least 0, got {v}'): f(dict(a=1., b=0., c=v), 6)
    with raises('there are no scores'): f({}, 6)

# --- the Plan

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=4)

@pytest.fixture
def sites(model): return find_sites(model)
@pytest.fixture
def stats(sites):
    rng = np.random.default_rng(0)
    return {m:{s.name:float(v) for s,v in zip(sites, rng.lognormal(0, 1, len(sites)))} for m in ('fisher','grad','cov')}
@pytest.fixture
def plan(sites, stats): return make_plan('test_vit', sites, stats, budget=60, settings=dict(n_batches=8))

def rewrite(path, change):
    "Edit the JSON at `path` as a user would"
    d = json.loads(path.read_text())
    change(d)
    path.write_text(json.dumps(d))
    return path

def test_make_plan_holds_what_the_parts_say(plan, sites, stats):
    assert plan.scores==composite(stats) and plan.metrics==stats and plan.sites==sites
    assert plan.ranks==waterfill(plan.scores, 60) and plan.total_rank==60 and plan.adapter_params==60*128
    assert plan.settings==dict(weights=dict(fisher=.6, grad=.2, cov=.2), normaliser='minmax', seed=0, n_batches=8)
    assert {'fclora','torch','timm','fastai'}<=set(plan.versions) and plan.versions['torch']==version('torch')

@pytest.mark.parametrize('method', ['fclora','uniform','random','inverse','naive'])
@pytest.mark.parametrize('unit', ['ranks','params'])
def test_save_and_load_give_the_same_plan(sites, stats, tmp_path, method, unit):
    if (method,unit)==('naive','params'): return
    plan = make_plan('test_vit', sites, stats if method in ('fclora','inverse','naive') else None, method, 60 if unit=='ranks' else 60*128, unit, seed=3)
    assert plan.save(tmp_path/'new/plan.json')==tmp_path/'new/plan.json'
    assert Plan.load(tmp_path/'new/plan.json')==plan
    assert [o.name for o in (tmp_path/'new').iterdir()]==['plan.json']   # no temporary file stays
    assert method=='naive' or plan.adapter_params==60*128

def test_an_edited_rank_counts(plan, tmp_path):
    path = rewrite(plan.save(tmp_path/'p.json'), lambda d: d['sites'][4].update(rank=11))
    new = Plan.load(path)
    assert new.ranks[plan.sites[4].name]==11 and {**new.ranks, plan.sites[4].name:plan.ranks[plan.sites[4].name]}==plan.ranks
    assert new.total_rank==60-plan.ranks[plan.sites[4].name]+11

@pytest.mark.parametrize('r', [65,-1,2.5,'4',None])
def test_an_edited_rank_that_cannot_be_is_an_error(plan, tmp_path, r):
    path = rewrite(plan.save(tmp_path/'p.json'), lambda d: d['sites'][4].update(rank=r))
    with raises('rank of blocks.1.attn.qkv.k must be a whole number in 0..64'): Plan.load(path)

damage = dict(
    top_key=(lambda d: d.pop('budget'), "is not a Plan: KeyError 'budget'"),
    no_format=(lambda d: d.pop('format'), "is not a Plan: KeyError 'format'"),
    rank=(lambda d: d['sites'][3].pop('rank'), "is not a Plan: KeyError 'rank'"),
    metric=(lambda d: d['sites'][3].pop('grad'), "is not a Plan: KeyError 'grad'"),
    no_sites=(lambda d: d['sites'].clear(), 'is not a Plan'), sites_text=(lambda d: d.update(sites='abc'), 'is not a Plan'),
    site_text=(lambda d: d.update(sites=['abc']), 'is not a Plan'), sites_null=(lambda d: d.update(sites=None), 'is not a Plan'),
    width_text=(lambda d: d['sites'][3].update(d_in='64'), 'p.json is not a Plan'),
    width_null=(lambda d: d['sites'][3].update(d_out=None), 'p.json is not a Plan'),
    name_twice=(lambda d: d['sites'].append(d['sites'][0]), 'blocks.0.attn.qkv.q.*twice'),
    newer=(lambda d: d.update(format=2), 'p.json has format 2, made by a newer fclora; this one reads format 1'))

@pytest.mark.parametrize('change,piece', damage.values(), ids=damage)
def test_a_damaged_plan_is_one_clear_error(plan, tmp_path, change, piece):
    with raises(piece): Plan.load(rewrite(plan.save(tmp_path/'p.json'), change))

@pytest.mark.parametrize('text', ['','{"format": 1,','[1, 2]','"x"','null','3',b'\xff\xfe\x00'])
def test_what_is_no_plan_is_said_to_be_none(tmp_path, text):
    (tmp_path/'p.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with raises('p.json is not a Plan: '): Plan.load(tmp_path/'p.json')

def test_a_truncated_file_and_a_missing_one(plan, tmp_path):
    path = plan.save(tmp_path/'p.json')
    path.write_text(path.read_text()[:-200])
    with raises('p.json is not a Plan: '): Plan.load(path)
    with pytest.raises(FileNotFoundError, match='no Plan at .*q.json'): Plan.load(tmp_path/'q.json')

def test_a_failing_save_keeps_the_old_file(plan, tmp_path):
    old = plan.save(tmp_path/'p.json').read_text()
    with pytest.raises(TypeError): replace(plan, settings=dict(x=object())).save(tmp_path/'p.json')
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path/'p.json') as tmp:
            tmp.write_text('half'); raise KeyboardInterrupt
    assert (tmp_path/'p.json').read_text()==old and len(list(tmp_path.iterdir()))==1

def test_check_accepts_the_model_plain_or_adapted_and_no_other(plan, model):
    assert plan.check(model) is plan
    assert plan.check(adapt(deepcopy(model), plan.ranks)) is plan
    wide,short = timm.create_model('test_vit2', img_size=32, patch_size=8, depth=6),timm.create_model('test_vit', depth=3)
    d = wide.blocks[0].attn.qkv.in_features
    if d!=64:
        with raises(f'this Plan was made for test_vit: its blocks.0.attn.qkv.q maps 64 to 64, here it maps {d} to {d}'): plan.check(wide)
    with raises('this Plan was made for test_vit: VisionTransformer has no site blocks.3.attn.qkv.q'): plan.check(short)
    with raises('has no site blocks.0.attn.qkv.q'): plan.check(torch.nn.Sequential(torch.nn.Linear(3, 3)))

@pytest.mark.parametrize('kw', [dict(start=0),dict(path='head'),dict(kind='v'),dict(d_in=32)])
def test_check_notices_an_edited_site(plan, model, kw):
    with raises('this Plan was made for test_vit'): replace(plan, sites=[plan.sites[0], replace(plan.sites[1], **kw), *plan.sites[2:]]).check(model)

def test_str_shows_every_rank_in_its_row_and_column(plan, sites):
    head,blocks,*rows = str(plan).splitlines()
    assert '60 ranks' in head and '7,680 parameters over 18 sites of test_vit' in head and blocks.split()==['block',*'012345']
    number = lambda cell: int(''.join(c for c in cell if c.isdigit()))
    for k,row in zip('qkv', rows, strict=True):
        assert row[0]==k and [number(row[5+5*b:10+5*b]) for b in range(6)]==[plan.ranks[s.name] for s in sites if s.kind==k]

def test_str_of_zero_ranks_and_of_gaps(model, sites):
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

@pytest.mark.parametrize('kw,piece', [
    (dict(method='best'), "unknown method 'best'; there are fclora, uniform, random, inverse, naive"), (dict(unit='bytes'), "must be ranks or params, got 'bytes'"),
    (dict(stats=None), "method 'fclora' needs measurements"), (dict(stats=None, method='naive'), "method 'naive' needs measurements"),
    (dict(method='naive', unit='params'), 'naive rounding knows budgets in ranks only'), (dict(budget=17), 'give a budget in 18..288'),
    (dict(budget=2303, unit='params'), 'a budget of 2303 parameters .* give a budget in 2304..36864'), (dict(weights=dict(hessian=1)), "no metric 'hessian'"),
    (dict(how='z'), "unknown normaliser 'z'"), (dict(lo=65, hi=99, budget=2000), 'bounds of blocks.0.attn.qkv.k are 65..64')])
def test_errors_of_make_plan(sites, stats, kw, piece):
    with raises(piece): make_plan('test_vit', sites, **(dict(stats=stats, budget=60) | kw))
