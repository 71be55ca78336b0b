"The search for settings: seeded, resumable, bounded by trials or by minutes, and blind to the test images"
import csv, json, shlex
import optuna, pytest, torch
from fclora.cli import main
from fclora.runs import tune as tune_module
from fclora.runs.folder import load_run
from fclora.runs.tune import (best_row, default_settings, load_problem, open_study, possible, run_trial, search, search_space, trial_rows, tune)

pytestmark = pytest.mark.usefixtures('one_thread')
FEW = dict(model='vit_pico', limit='60,30,30', batch_size=20, score_batches=1, epochs=2)
ARGS = [o for k,v in FEW.items() for o in (f"--{k.replace('_', '-')}", str(v))]

def losses(values):
    "A stand-in for `run_trial`: the course of each trial is given, and what was asked for is noted"
    asked = []
    def trial(problem, settings, report):
        asked.append(settings)
        course = values[len(asked)-1] if len(asked)<=len(values) else [2.]*9
        if isinstance(course, BaseException): raise course
        for i,v in enumerate(course): report(i+1, v)
        return min(course),len(course)
    return trial,asked

@pytest.fixture(scope='module')
def problem():
    return load_problem('digits', 'uniform', **{k:v for k,v in FEW.items()})

@pytest.fixture
def fake(monkeypatch):
    def fake(*values):
        trial,asked = losses(values)
        monkeypatch.setattr(tune_module, 'run_trial', trial)
        return asked
    return fake

space = dict(lr=(5e-4, 5e-2), cutmix=[None, 0., 1.], budget=(50, 400))

def test_the_recipe_comes_first_and_the_worse_ends_early(problem, tmp_path, fake):
    problem.job.options['epochs'] = 9
    fake([.9,.8,.7]+[.6]*6, [1.5]*9, [.5]*9, [.95]*9)
    rows = search(problem, open_study(tmp_path), space, trials=4, say=lambda text: None)
    assert rows[0]['settings']==dict(lr=problem.job.rcp['lr'], cutmix=None, budget=100)
    assert [(o['state'],o['epochs']) for o in rows]==[('finished',9), ('pruned',1), ('finished',9), ('pruned',1)]
    assert best_row(rows)['trial']==2 and rows[1]['nll']==1.5

def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(problem, tmp_path, fake):
    problem.job.options['epochs'] = 9
    course = [[.6]*9, [.7]*9, [.5]*9, [.8]*9, [.4]*9]
    whole = fake(*course)
    search(problem, open_study(tmp_path/'a'), space, trials=5, say=lambda text: None)
    first = fake(*course[:2], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): search(problem, open_study(tmp_path/'b'), space, trials=5, say=lambda text: None)
    assert len(trial_rows(open_study(tmp_path/'b')))==2
    second = fake(*course[2:])
    rows = search(problem, open_study(tmp_path/'b'), space, trials=5, say=lambda text: None)
    assert first+second[1:]==whole and second[0]==first[2] and [o['trial'] for o in rows]==[0,1,2,3,4]
    assert fake()==[] and search(problem, open_study(tmp_path/'b'), space, trials=5, say=lambda text: None)==rows

def test_another_seed_tries_something_else(problem, tmp_path, fake):
    tried = []
    for seed in (0,0,1):
        problem.job.seed = seed
        asked = fake()
        search(problem, open_study(tmp_path/str(len(tried))), space, trials=3, say=lambda text: None)
        tried.append(asked[1:])
    problem.job.seed = 0
    assert tried[0]==tried[1]!=tried[2]

def test_a_trial_that_cannot_be_costs_only_itself(problem, tmp_path, fake):
    fake([.6]*2, ValueError('no such budget'), FloatingPointError('the loss is nan'), [.5]*2)
    said = []
    rows = search(problem, open_study(tmp_path), space, trials=4, say=said.append)
    assert [o['state'] for o in rows]==['finished','failed','failed','finished'] and rows[1]['why']=='no such budget'
    assert 'trial 1: no number, failed' in said[1]
    fake(ValueError('unknown adapter'))
    with pytest.raises(ValueError, match='unknown adapter'): search(problem, open_study(tmp_path/'other'), space, trials=4)

def test_minutes_leave_time_for_the_winner(problem, tmp_path, fake):
    class Clock:
        now = 0.
        def __call__(self): return self.now
    clock,lasts = Clock(),10.
    trial,asked = losses([])
    def slow(*args): clock.now += lasts; return trial(*args)
    fake()
    tune_module.run_trial = slow # put back by `fake`
    rows = search(problem, open_study(tmp_path), space, seconds=100., say=lambda text: None, clock=clock)
    assert all(o['seconds']==lasts for o in rows)
    assert len(rows)==8 and clock.now+2.25*lasts>100 and clock.now+1.25*lasts<=100
    assert asked[0]['minutes']==pytest.approx(100/240) and 'minutes' not in rows[0]['settings'] and not any('minutes' in o for o in asked[1:])

def test_given_options_are_not_searched():
    p = load_problem('digits', 'uniform', **FEW, lr=.01, kinds='q,v')
    assert list(search_space(p))==['cutmix','budget','from_block']
    assert 'head_lr' in search_space(load_problem('digits', 'head', **FEW)) and 'kinds' not in search_space(load_problem('digits', 'full', **FEW))

def test_budgets_are_possible(problem):
    for kinds in search_space(problem)['kinds']:
        for block in search_space(problem)['from_block']:
            for budget in (50,400):
                s = possible(problem, dict(kinds=kinds, from_block=block, budget=budget))
                n = len(kinds.split(','))*(6-block)
                assert n<=s['budget']<=16*n

def test_a_trial_is_what_finetune_does(tmp_path):
    p = load_problem('digits', 'uniform', **FEW)
    nll,epochs = run_trial(p, default_settings(p, search_space(p)))
    out = tmp_path/'run'
    assert main(['finetune', 'digits', '--method', 'uniform', *ARGS, '--no-probe', '--quiet', '--out', str(out)])==0
    run = load_run(out, model=False)
    assert run.metrics['valid']['nll']==pytest.approx(nll, abs=1e-5) and epochs==2

def test_the_command_end_to_end(tmp_path, capsys):
    out = tmp_path/'t'
    args = ['tune', 'digits', '--method', 'uniform', *ARGS, '--no-probe', '--kinds', 'q,k,v', '--quiet', '--out', str(out)]
    assert main([*args, '--trials', '2'])==0
    text = capsys.readouterr().out
    found = json.loads((out/'tune.json').read_text())
    run = load_run(out/'best', model=False)
    assert 'best of 2 trials' in text and found['command'] in text
    assert run.metrics['valid']['nll']==pytest.approx(found['nll'], abs=1e-5) and found['nll']<=found['default_nll']
    assert len(list(csv.DictReader((out/'trials.csv').open())))==2 and '<svg' in (out/'tune.svg').read_text()
    again = shlex.split(found['command'])
    assert again[:2]==['fclora','finetune'] and main([*again[1:], '--quiet', '--out', str(tmp_path/'again')])==0
    assert (tmp_path/'again'/'adapter.safetensors').read_bytes()==(out/'best'/'adapter.safetensors').read_bytes()
    stamp = (out/'best'/'metrics.json').stat().st_mtime_ns
    assert main([*args, '--trials', '2', '--resume'])==0 and (out/'best'/'metrics.json').stat().st_mtime_ns==stamp
    capsys.readouterr()
    for more,word in ((['--trials','2'], 'is not empty'), (['--resume','--lr','.1'], 'other settings (lr)'), (['--trials','0','--force'], 'trials'),
                      (['--minutes','0','--force'], 'minutes'), (['--budget','9999','--force'], 'budget')):
        assert main([*args, *more])==1 and word in capsys.readouterr().err, word

def test_test_images_are_not_looked_at():
    p = load_problem('digits', 'uniform', **FEW)
    p.dls.loaders[2].dataset.x = None
    assert torch.isfinite(torch.tensor(run_trial(p, {})[0]))

def test_without_optuna_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr('fclora.files.find_spec', lambda name: None)
    assert main(['tune', 'no/such/folder'])==1 and "pip install 'fclora[tune]'" in capsys.readouterr().err
