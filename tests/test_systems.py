"The systems side by side: every one listed with its source, and each timed over whole trainings"
import pytest, torch
from fclora.adapt import current_ranks
from fclora.cli import main, parser
from fclora.lora import adapters
from fclora.presets import presets, regimes
from fclora.runs.systems import *
import fclora.studies.systems as S

controls = {'random','inverse','naive'}

@pytest.fixture(scope='module')
def rows(): return {name:rest for name,*rest in systems(quiet=True)}

def test_every_method_and_every_adapter_is_listed(rows):
    assert set(rows)=={*presets,*regimes,*system_options}
    assert {o for parts,*_ in rows.values() for o in parts.split(' > ')}>=set(adapters)
    assert 'LoRA+' in rows['--b-ratio 16'][1]

def test_every_system_but_the_controls_has_a_source(rows):
    assert {name for name,(*_,source) in rows.items() if not source}=={*controls,*regimes}
    assert rows['fclora'][2]=='S. Bandyopadhyay, technical note of May 2025'

@pytest.mark.parametrize('option', system_options)
def test_what_is_listed_by_its_option_is_an_option(option):
    assert len(vars(parser('finetune').parse_args(option.split())))==1

def test_the_command_prints_a_line_each_in_columns(rows, capsys):
    assert main(['systems'])==0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)==len(rows)
    starts = {line.index(doc) for line,(_,doc,_) in zip(lines, rows.values())}
    assert len(starts)==1 and all(line.endswith(f'({source})') for line,(*_,source) in zip(lines, rows.values()) if source)

def test_every_training_that_is_timed_begins_with_the_ranks_of_the_start(monkeypatch, one_thread):
    seen,timed = [],S.training_seconds
    def noted(learn, epochs):
        before = learn.plan.total_rank
        seconds = timed(learn, epochs)
        seen.append((learn.plan.method, before, learn.plan.total_rank))
        return seconds
    monkeypatch.setattr(S, 'training_seconds', noted)
    found = S.system_costs(['uniform','adalora','cut'], rounds=2, epochs=1, limit='64,16,16')
    assert sorted(seen)==sorted(2*[('uniform',72,72), ('adalora',108,72), ('cut',144,72)])
    for name,o in found.items():
        assert set(o)=={'planning','lora_steps','step','steps','trained','ranks','mergeable','plan'} and o['steps']==2
        assert o['ranks']==o['plan']['total_rank']==72, name
    assert found['uniform']['step']==1 and found['cut']['plan']['budget']==72
