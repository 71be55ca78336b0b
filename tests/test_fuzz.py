"Some of the cases of tests/fuzz.py, the same ones every time; FCLORA_FUZZ=10 tries ten times as many"
import os
import pytest
from fuzz import fuzz, kinds

cases = dict(config=60, plan=60, metrics=80, history=60, adapter=15, checkpoint=20, image=100, names=100, options=25)

def test_every_kind_of_case_is_tried(): assert set(cases)==set(kinds)

@pytest.mark.parametrize('kind', kinds)
def test_damage_gives_a_result_or_one_clear_line(kind):
    n = int(cases[kind]*float(os.environ.get('FCLORA_FUZZ', 1)))
    counts,failed = fuzz(kind, n, seed=17)
    assert not failed
    assert sum(counts.values())==n and counts['refused' if kind!='names' else 'read']>n/4
