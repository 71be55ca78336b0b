"Every numeric option has its range in one table, and whatever lies outside it is one line, before anything happens"
import inspect, math
import pytest
from fclora import cli
from fclora.cli import command, command_table, main
from fclora.ranges import check_ranges, in_range, ranges

numeric = [(cmd,o) for cmd,spec in command_table().items() for o in spec['options'] if o['type'] in ('int','float')]
names = sorted({o['name'] for _,o in numeric})

def test_every_numeric_option_has_a_range():
    assert len(names)>30
    lost = [n for n in names if n not in ranges]
    assert not lost, f'{lost}: add (lowest, highest) to `ranges` on page 18a_ranges'

def test_whole_numbers_have_whole_bounds_and_defaults_lie_inside():
    for _,o in numeric:
        low,high = ranges[o['name']]
        assert low<=high and {type(low),type(high)}=={int if o['type']=='int' else float}, o['name']
        if o['default'] is not None: assert in_range(o['default'], low, high), o
        assert in_range(low, low, high) and in_range(high, low, high)
        check_ranges(**{o['name']:low}); check_ranges(**{o['name']:high}); check_ranges(**{o['name']:None})

def bad_values(name):
    "Values that are no legal ones for an option: of a table for all, and just outside its bounds"
    low,high = ranges[name]
    step = 1 if isinstance(low, int) else 1e-6
    table = [math.nan, math.inf, -math.inf, -1, 0, 1e30, -1e30, 1e308, 2**63, low-step, high+max(step, abs(high)*1e-6)]
    return [v for v in table if not in_range(v, low, high)]

def text(v): return str(v) if isinstance(v, int) else repr(v)

@pytest.mark.parametrize('cmd', sorted({cmd for cmd,_ in numeric}))
def test_the_command_line_names_the_option_in_one_line_and_does_nothing(cmd, monkeypatch, capsys, tmp_path):
    def never(*args): raise AssertionError('the command was called')
    monkeypatch.setattr(cli, 'call', never)
    monkeypatch.chdir(tmp_path)
    places = ['x' for o in command_table()[cmd]['options'] if o['kind']=='place']
    n = 0
    for o in [o for c,o in numeric if c==cmd]:
        flag = '--'+o['name'].replace('_', '-')
        for v in [*map(text, bad_values(o['name'])), 'x', '', '1,5', '0x10', '--']:
            try: status = main([cmd, *places, f'{flag}={v}'])
            except SystemExit as e: status = e.code
            err = capsys.readouterr().err.splitlines()
            assert status in (1,2) and len(err)==1 and flag in err[0], (v, err)
            n += 1
    assert n>=5 and not list(tmp_path.iterdir())

first = dict(pretrain=('nowhere','out.safetensors'), bench=(), finetune=('digits',), compare=('digits',), score=('digits',))
@pytest.mark.parametrize('cmd,option', [(cmd,o['name']) for cmd,o in numeric])
def test_the_function_checks_it_first_too(cmd, option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flag = '--'+option.replace('_', '-')
    for v in bad_values(option):
        with pytest.raises(ValueError, match=f'{flag} must be'): command(cmd)(*first.get(cmd, ('no/such/run',)), **{option:v})
    assert not list(tmp_path.iterdir())

def test_text_and_flags_are_no_numbers():
    for v in ('32', '', True, False, [32], b'3', 3+0j):
        with pytest.raises(ValueError, match='--batch-size must be a whole number in 1..65536'): check_ranges(batch_size=v)
    with pytest.raises(ValueError, match='--epochs must be a whole number'): check_ranges(epochs=2.)

@pytest.mark.parametrize('args', [
    ('--num-workers', '100000'), ('--num-workers', '-1'), ('--size', '0'), ('--valid-pct', 'nan', '--limit', '20,20,20'), ('--lr', 'inf'), ('--from-block', '-1'),
    ('--score-bs', '0'), ('--seed', '-1'), ('--settle', '1')])
def test_what_once_hung_or_trained_or_was_ignored(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    takes = [cmd for cmd in ('finetune','score','compare') if args[0][2:].replace('-', '_') in {o['name'] for o in command_table()[cmd]['options']}]
    assert len(takes)>=2
    for cmd in takes:
        assert main([cmd, 'digits', f'{args[0]}={args[1]}', *args[2:]])==1
        err = capsys.readouterr().err.splitlines()
        assert len(err)==1 and f'{args[0]} must be' in err[0]
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('seeds,why', [('0,0','twice'), ('0,-1','whole numbers'), ('nan','whole numbers'), ('1.5','whole numbers'), ('0,1e30','whole numbers'),
                                       (str(2**40),'whole numbers'), ('','is empty'), ('0,','whole numbers')])
def test_seeds_of_a_comparison_are_checked_first(seeds, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['compare', 'digits', f'--seeds={seeds}'])==1
    err = capsys.readouterr().err
    assert '--seeds' in err and why in err and err.count('\n')==1 and not list(tmp_path.iterdir())

@pytest.mark.parametrize('args', [('--lrs=nan',), ('--lrs=1e-3,inf',), ('--lrs=-1',), ('--lrs=1e-3,0.001',), ('--methods', 'uniform; uniform'), ('--methods', 'uniform,uniform'),
                                  ('--methods', 'uniform lr=inf; head'), ('--methods', 'uniform batch_size=0; head'), ('--methods', 'uniform epochs=x; head'),
                                  ('--methods', 'fclora weights=fisher=-1; head'), ('--methods', 'fclora normaliser=zz; head')])
def test_rows_of_a_comparison_are_checked_first(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['compare', 'digits', *args])==1
    assert capsys.readouterr().err.count('\n')==1 and not list(tmp_path.iterdir())

def test_functions_of_the_recipe_and_the_plan_name_the_value(tmp_path):
    from fclora.train.recipe import recipe
    for k in inspect.signature(recipe).parameters:
        if k not in ranges: continue
        for v in bad_values(k):
            with pytest.raises(ValueError, match='--'+k.replace('_', '-')+' must be'): recipe(**{k:v})
    with pytest.raises(ValueError, match='needs a value for wd'): recipe(wd=None)
