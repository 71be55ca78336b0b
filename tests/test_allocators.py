"Properties of water-filling and its controls"
import itertools
import numpy as np, pytest
from hypothesis import assume,given,settings,strategies as st
from fclora.allocators.controls import *
from fclora.allocators.waterfill import *
from fclora.sites import Site

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
    r = list(waterfill(named(vals), *rest).values())
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

def by_trying(classes, budget):
    "Every choice of ranks a class: the best amount, and of the choices that reach it the one nearest to what is wanted, cheapest class first"
    choices = itertools.product(*[range(c.fewest, c.most+1) for c in classes])
    def price(ns): return sum(n*c.price for n,c in zip(ns, classes))
    within = [ns for ns in choices if price(ns)<=budget]
    best = max(map(price, within))
    def distance(ns): return [(abs(n-c.wanted), n) for n,c in zip(ns, classes)]
    return min((ns for ns in within if price(ns)==best), key=distance)

@st.composite
def class_problems(draw):
    prices = draw(st.lists(st.sampled_from([2,3,4,6,10,15]), min_size=1, max_size=4, unique=True))
    spans = [(draw(st.integers(0, 4)), draw(st.integers(0, 5))) for _ in prices]
    classes = [PriceClass(p, lo, lo+more, draw(st.floats(lo, lo+more))) for p,(lo,more) in zip(sorted(prices), spans)]
    need,room = (sum(c.price*getattr(c, o) for c in classes) for o in ('fewest','most'))
    return classes,draw(st.integers(need, room))

@cases
@given(class_problems())
def test_ranks_of_price_classes_are_those_that_trying_everything_finds(p):
    classes,budget = p
    assert list(class_ranks(classes, budget).items())==[(c.price, n) for c,n in zip(classes, by_trying(classes, budget))]

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
def test_inverse_holds_the_budget_and_turns_the_order_round(p):
    scores,budget,lo,hi,_ = p
    r = inverse(scores, budget, lo, hi)
    assert sum(r.values())==budget and r==waterfill(mirrored(scores), budget, lo, hi)
    few,many = min(lo.values()),max(hi.values())
    r = inverse(scores, few*len(scores)+(many-few)*len(scores)//2, few, many)
    for a,b in itertools.permutations(scores, 2):
        if scores[a]>scores[b]+1e-6*max(scores.values()): assert r[a]<=r[b]

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

@pytest.mark.parametrize('name', ['waterfill','uniform','random','inverse'])
def test_a_budget_that_does_not_fit_names_the_range(name):
    f,two = allocators[name],dict(a=1., b=1.)
    for budget in (35,577,-1):
        with raises(rf'a budget of {budget} ranks does not fit 36 sites with 1..16 ranks each: give a budget in 36..576'): f(named([1.]*36), budget, 1, 16)
    with raises(r'a budget of 99 parameters does not fit 2 sites with 1..4 ranks each: give a budget in 100..400'): f(two, 99, 1, 4, dict(a=60, b=40))
    with raises(r'bounds of b are 3\.\.2; they must be whole numbers with 0 <= lower <= upper'): f(two, 5, dict(a=1, b=3), dict(a=2, b=2))
    with raises('bounds of a are -1..4'): f(two, 5, -1, 4)

@pytest.mark.parametrize('v', [float('nan'),float('inf'),-1.])
@pytest.mark.parametrize('f', [waterfill,inverse,naive_proportional])
def test_scores_that_are_no_numbers_name_the_site(f, v):
    with raises(rf'score of c must be a finite number of at least 0, got {v}'): f(dict(a=1., b=0., c=v), 6)
    with raises('there are no scores'): f({}, 6)
