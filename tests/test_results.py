"The store of results: small, complete, each study with a command that works, and the numbers on README and pages are those of runs.csv"
import json,re,shlex,subprocess,sys
from functools import cache
from itertools import combinations
from pathlib import Path
import pytest
from fclora.plan import *
from fclora.studies.results import *
from fclora.studies.answers import *

root,bin = Path(__file__).parent.parent,Path(sys.executable).parent
folder = root/'nbs'/'results'
runs,studies = read_runs(folder),read_studies(folder)
pages = sorted(folder.glob('*.ipynb'))

def text(path): return (root/path).read_text(encoding='utf-8')
def cells(page): return json.loads(page.read_text(encoding='utf-8'))['cells']
def markdown(page): return '\n'.join(''.join(c['source']) for c in cells(page) if c['cell_type']=='markdown')
def outputs(page):
    outs = [o for c in cells(page) for o in c.get('outputs', [])]
    return '\n'.join(''.join(o.get('text') or o.get('data', {}).get('text/plain', '')) for o in outs)

# --- size

def test_the_store_is_small():
    weights = {'vit_pico_half.safetensors','vit_pico_half.json'}
    assert sum(f.stat().st_size for f in folder.iterdir() if f.suffix!='.ipynb' and f.name not in weights)<2**20

@pytest.mark.parametrize('page', pages, ids=lambda p: p.stem)
def test_no_page_is_large(page): assert page.stat().st_size<300_000

def close(a, b):
    "Do two names differ by one letter, put in, left out or changed?"
    if len(a)>len(b): a,b = b,a
    if len(b)-len(a)>1: return False
    i = next((i for i,(x,y) in enumerate(zip(a, b)) if x!=y), len(a))
    return a[i+(len(a)==len(b)):]==b[i+1:]

def test_names_differ_by_more_than_a_letter():
    files = {f.name for f in folder.iterdir()}
    assert not [p for names in (files,studies) for p in combinations(sorted(names), 2) if close(*p)]

# --- studies and their commands

@cache
def options_of(command):
    "The `--options` that a command of fclora knows"
    res = subprocess.run([bin/'fclora', command, '--help'], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return set(re.findall(r'--[a-z][a-z0-9-]*', res.stdout))

def check_command(line):
    _,name,*args = shlex.split(line[line.index('fclora '):], comments=True)
    assert {a.split('=')[0] for a in args if a.startswith('--')}<=options_of(name), line
    return name,args

def option(args, name, default): return args[args.index(name)+1] if name in args else default

@pytest.mark.parametrize('study', studies)
def test_every_study_says_what_it_asked_and_how_it_was_made(study):
    from fclora.runs.compare import parse_rows
    about,mine = studies[study],runs[runs.study==study]
    assert about['question'].endswith('?') and about['hardware'] and re.fullmatch(r'20\d\d-\d\d-\d\d', about['date'])
    name,args = check_command(about['command'])
    if name!='compare': return
    rows = parse_rows(option(args, '--methods', None))
    seeds = [int(s) for s in option(args, '--seeds', '0,1,2').split(',')]
    asked = {(r,s) for r in rows for s in seeds}
    assert asked=={*zip(mine['row'], mine.seed)} and len(asked)==len(mine)

def test_the_runs_are_those_of_the_studies():
    assert list(runs.study.unique())==list(studies)
    assert not runs.duplicated(['study','row','seed']).any() and runs.versions.str.contains('torch=').all()

@pytest.mark.parametrize('page', ['main_tables','speed'])
def test_commands_for_a_gpu_are_commands_that_we_have(page):
    from fclora.runs.compare import parse_rows
    blocks = re.findall(r'```sh\n(.*?)```', markdown(folder/f'{page}.ipynb'), re.S)
    lines = [l for b in blocks for l in b.splitlines() if 'fclora ' in l]
    assert len(lines)>=3
    for line in lines:
        name,args = check_command(line)
        if name=='compare': assert len(parse_rows(option(args, '--methods', '')))>=3

# --- Plans and pictures

def test_every_plan_is_there_once_and_is_a_plan():
    keys = runs.plan.dropna().unique()
    lines = read_lines(folder/'plans.jsonl')
    assert {o['key'] for o in lines if 'plan' in o}==set(keys) and len({o['key'] for o in lines})==len(lines)
    rank = runs.dropna(subset='plan').drop_duplicates('plan').set_index('plan').total_rank
    for key,d in read_plans(folder, *keys).items(): assert plan_from_dict(d, key).total_rank==rank[key]

def test_stored_bins_give_the_ece():
    drawn = read_lines(folder/'drawn.jsonl')
    assert drawn
    for o in drawn:
        run, = runs[(runs.study==o['study'])&(runs['row']==o['row'])&(runs.seed==o['seed'])].itertuples()
        for bins,ece in ((o['bins_raw'],run.ece_raw), (o['bins'],run.ece)):
            gaps = [n*abs(c-a) for n,c,a in zip(bins['count'], bins['conf'], bins['acc']) if n]
            assert sum(gaps)/run.n==pytest.approx(ece, abs=1e-4)

# --- numbers on the pages

def known_numbers():
    "Every mean ± standard deviation that a page may print"
    groups = [g for _,g in runs.groupby(['study','row'])]
    return {pm(g.accuracy, d, unit=100) for g in groups for d in (1,2)} | {pm(g[k], 3) for g in groups for k in ('ece_raw','ece','nll')} | \
        {pm(g.probe_accuracy, 2, unit=100) for g in groups if g.probe_accuracy.notna().all()}

@pytest.mark.parametrize('page', [p for p in pages if p.stem not in ('speed','compatibility','pretraining')], ids=lambda p: p.stem)
def test_means_on_a_page_are_those_of_the_runs(page):
    found = set(re.findall(r'\d+\.\d+ ± \d+\.\d+', outputs(page)+markdown(page)))
    assert found<=known_numbers(), found-known_numbers()

def test_means_in_the_readme_are_those_of_the_runs():
    readme = text('README.md')
    found = set(re.findall(r'\d+\.\d+ ± \d+\.\d+', readme))
    assert found<=known_numbers() | {'0.98 ± 0.03'}, found-known_numbers()
    accuracy = 100*runs[runs.study=='readme-run'].accuracy.item()
    assert f'{accuracy:.2f} %' in readme or f'{accuracy:.1f} %' in readme

def test_speed_in_the_readme_is_that_of_the_stored_run():
    rows = json.loads(text('nbs/results/speed-cpu.json'))['step']['rows']
    known = {f'{rows[r][k]:.2f}'.removeprefix('0') for r,k in (('fclora','ratio'), ('fclora','limit'), ('fclora top','ratio'))}
    said = re.findall(r'(?<!\d)0?(\.\d\d) of (?:the time of )?full fine-tuning', text('README.md'))
    assert set(said)<=known

def test_storing_a_comparison_again_changes_nothing(tmp_path):
    bins = {k:dict(count=[1,9], conf=[.4,.9], acc=[0.,1.], lo=[0.,.5], hi=[.5,1.]) for k in ('bins_raw','bins')}
    config = dict(method='uniform', row='uniform', seed=0, model=dict(name='vit_pico'), data=dict(name='digits'), recipe=dict(epochs=1), versions=dict(torch='2'))
    metrics = dict(total_rank=2, params=dict(adapter=8, trainable=9, total=10), test=dict(accuracy=.9, ece=.1, **bins), valid=dict(accuracy=.8),
                   seconds=dict(train=1., total=2.), hardware='2 CPU cores')
    plan = dict(format=1, sites=[dict(name='a', rank=2)])
    (tmp_path/'compare.json').write_text(json.dumps(dict(runs=[dict(config=config, metrics=metrics, plan=plan, history=[])], command='fclora compare digits')))
    def stored():
        store_runs(tmp_path, 'study', 'Why?', folder=tmp_path, drawn=['uniform'])
        return {f:(tmp_path/f).read_bytes() for f in ('runs.csv','studies.json','plans.jsonl','drawn.jsonl')}
    first = stored()
    assert stored()==first and read_runs(tmp_path).accuracy.tolist()==[.9]
