"One fact in one place: metadata, version, generated files, stored outputs, README, and what wheel and sdist hold"
import ast,hashlib,json,re,shlex,shutil,subprocess,sys,tarfile,tomllib,zipfile
from configparser import ConfigParser
from functools import cache
from email import message_from_string
from importlib.metadata import packages_distributions, version
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
import fclora

root,bin = Path(__file__).parent.parent,Path(sys.executable).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg,pyproject = cfg['DEFAULT'],tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
notebooks = sorted(root.glob('nbs/**/*.ipynb'))
modules = sorted(root.glob('fclora/**/*.py'))
extras = {k.removesuffix('_requirements'):cfg[k].split() for k in cfg if k.endswith('_requirements')}

def text(path): return (root/path).read_text(encoding='utf-8')
def cells(nb, kind): return [(c, ''.join(c['source'])) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]
def run(*cmd, cwd):
    res = subprocess.run(list(map(str, cmd)), cwd=cwd, capture_output=True, text=True)
    assert res.returncode==0, res.stdout[-2000:]+res.stderr[-2000:]

def copy_to(dest):
    "What a commit of everything here would hold, and no build of this machine"
    if not (root/'.git').exists(): pytest.skip('needs a git checkout')
    names = subprocess.run(['git','ls-files','-co','--exclude-standard','-z'], cwd=root, capture_output=True, text=True, check=True).stdout
    for n in filter(None, names.split('\0')):
        if not (root/n).is_file(): continue
        (dest/n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/n, dest/n)
    return dest

def contents(folder, *patterns): return {str(p.relative_to(folder)):p.read_bytes() for pat in patterns for p in folder.glob(pat)}

def assert_same_files(new, old):
    assert sorted(new)==sorted(old)
    assert not [n for n in old if new[n]!=old[n]]

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "Folder with the sdist, and the wheel that was built from it"
    src,out = copy_to(tmp_path_factory.mktemp('src')),tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, cwd=src)
    return out

# --- metadata

def test_settings_and_pyproject_agree_and_repeat_nothing():
    project = pyproject['project']
    assert project['name']==cfg['lib_name']==pyproject['tool']['nbdev']['lib_name']=='fclora'
    assert set(project)<={'name','dynamic','urls'} and set(pyproject)<={'build-system','project','tool'}
    assert not set(pyproject['tool']['nbdev'])&set(cfg)-{'lib_name'}
    assert {'version','description','readme','license','requires-python','dependencies','optional-dependencies','scripts'}<=set(project['dynamic'])

def test_the_version_is_written_once():
    assert fclora.__version__==version('fclora')
    for f in ('settings.ini','pyproject.toml','setup.py'): assert not re.search(r'^\s*version\s*=\s*[\'"]?\d', text(f), re.M), f
    assert re.search(r'^## (\S+)', text('CHANGELOG.md'), re.M)[1]==fclora.__version__

def test_dev_requirements_hold_what_the_tests_import():
    dev = {Requirement(r).name for k in cfg if k.endswith('requirements') for r in cfg[k].split()}
    assert {'nbdev','pytest','pytest-cov','hypothesis','torchmetrics','build','ruff'}<=dev
    assert {Requirement(r).name for r in pyproject['build-system']['requires']}<=dev   # the wheel is built without isolation here

def names(requirements): return {canonicalize_name(Requirement(r).name) for r in requirements}

@cache
def distributions(): return packages_distributions()

def third_party(path):
    "Distributions that a module imports: (at import, inside functions); but for those that it tries and can do without"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    tried = {n for t in ast.walk(tree) if isinstance(t, ast.Try) and 'ImportError' in map(ast.unparse, (h.type for h in t.handlers if h.type))
             for n in t.body}
    res,dists = (set(), set()),distributions()
    for n in set(ast.walk(tree))-tried:
        if isinstance(n, ast.Import): found = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom) and not n.level: found = [n.module]
        else: continue
        for top in {o.split('.')[0] for o in found}-sys.stdlib_module_names-{'fclora'}:
            res[n in inside].add(canonicalize_name(dists.get(top, [top])[0]))
    return res

def test_what_is_imported_is_declared_and_the_other_way_round():
    base = names(cfg['requirements'].split())
    user,dev = [base|names(r for k in ks for r in extras[k]) for ks in (('peft','bench','onnx','demo','tune','datasets','webdataset','tensorboard','wandb','mlflow'), extras)]
    used = {p:third_party(p) for p in modules}
    undeclared = {f'{p.relative_to(root)}: {o}' for p,(top,inner) in used.items()
                  for o in (top-base)|(inner-(dev if p.parent.name=='studies' else user))}
    assert not undeclared
    assert not base-{o for top,inner in used.values() for o in top|inner}

def test_lower_bounds_are_the_versions_that_were_tried():
    tried = [l for l in text('tests/oldest.txt').splitlines() if l and l[0]!='#']
    pinned,lower = [{canonicalize_name(r.name):Version(next(iter(r.specifier)).version) for r in map(Requirement, rs)}
                    for rs in (tried, cfg['requirements'].split()+extras['peft'])]
    assert {k:pinned[k] for k in lower}==lower

# --- the house: pages in order, nothing private across a wall, lines that can be read

def test_lines_and_names_are_in_order(): run(bin/'ruff', 'check', '--output-format', 'concise', 'fclora', cwd=root)

def page(path):
    "The notebook that exports a module, as a path below nbs; None for one made by hand"
    m = re.search(r'File to edit: (?:\.\./)+nbs/(\S+)\.ipynb', path.read_text(encoding='utf-8'))
    return m and m[1]

def own_imports(path):
    "(module of ours, imported names) of every import in a module"
    here = path.relative_to(root).with_suffix('').parts
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.ImportFrom):
            mod = '.'.join([*here[:-n.level], n.module or '']).strip('.') if n.level else n.module
            if mod.split('.')[0]=='fclora': yield mod,[a.name for a in n.names]
        if isinstance(n, ast.Import): yield from ((a.name,[]) for a in n.names if a.name.split('.')[0]=='fclora')

def test_page_numbers_are_unique():
    for folder in ('.','studies','tutorials'):
        numbers = [p.name.split('_')[0] for p in (root/'nbs'/folder).glob('[0-9][0-9]*_*.ipynb')]
        assert len(numbers)==len(set(numbers)), folder

def test_modules_import_only_from_earlier_pages_and_nothing_private():
    pages = {'.'.join(p.relative_to(root).with_suffix('').parts):page(p) for p in modules if page(p)}
    assert len(pages)>30
    for p in modules:
        if p.name in ('all.py','__main__.py','_modidx.py'): continue
        for mod,what in own_imports(p):
            assert not [o for o in [*mod.split('.'), *what] if o[0]=='_' and o!='__version__'], (p, mod, what)
            mine,other = page(p),pages.get(mod)
            if other: assert (mine.startswith('studies/'),mine)>(other.startswith('studies/'),other), (p, mod)

def exported_lines(nb): return sum(s.count('\n') for _,s in cells(nb, 'code') if re.match(r'#\| *exporti?\b', s))

def test_a_page_exports_few_lines():
    for nb in notebooks: assert exported_lines(nb)<=250, (nb, exported_lines(nb))

def test_a_page_of_a_system_exports_fewer():
    pages = [nb for nb in notebooks if any(re.match(r'#\| *default_exp +systems\.', s) for _,s in cells(nb, 'code'))]
    assert len(pages)>=14
    for nb in pages: assert exported_lines(nb)<=120, (nb, exported_lines(nb))

# --- generated files

def test_modules_are_what_the_notebooks_export(tmp_path):
    repo = copy_to(tmp_path)
    old = contents(repo, 'fclora/**/*.py', 'nbs/llms.txt')
    made = [n for n,b in old.items() if b'AUTOGENERATED! DO NOT EDIT! File to edit' in b]
    assert len(made)>30
    for n in made: (repo/n).unlink()   # a module whose notebook is gone stays away
    run(bin/'nbdev-export', cwd=repo)
    assert_same_files(contents(repo, 'fclora/**/*.py', 'nbs/llms.txt'), old)

def test_notebooks_are_clean(tmp_path):
    repo = copy_to(tmp_path)
    old = contents(repo, 'nbs/**/*.ipynb')
    assert len(old)>=9
    run(bin/'nbdev-clean', cwd=repo)
    assert_same_files(contents(repo, 'nbs/**/*.ipynb'), old)

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_stored_outputs_are_there_and_hold_no_error_or_machine_path(nb):
    outs = [o for c,_ in cells(nb, 'code') for o in c['outputs']]
    assert outs and not [o for o in outs if o['output_type']=='error']
    shown = [{k:v for k,v in o.get('data', {'':o.get('text')}).items() if not k.startswith('image/')} for o in outs]
    page = re.sub(r'base64,[\w+/=\\n]+', '', json.dumps(shown)) + ''.join(s for kind in ('code','markdown') for _,s in cells(nb, kind))
    assert not re.findall(r'.{0,40}(?:/root/|/work/|/home/|/Users/).{0,40}', page)
    assert 'Traceback (most recent call last)' not in page

# --- README

def code_lines(md):
    "Lines of fenced and of indented blocks"
    fenced = re.findall(r'^ *```[^\n]*\n(.*?)^ *```', md, re.M|re.S)
    return [l.strip() for block in fenced for l in block.splitlines() if l.strip()] + re.findall(r'^ {4,}(\S.*)', md, re.M)

def test_ci_runs_the_test_command_of_the_readme():
    tests = [l for l in code_lines(text('README.md')) if 'pytest' in l]
    assert tests and tests[0] in map(str.strip, text('.ci/run').splitlines())
    assert 'nbdev-test' in tests[0] and any('fclora finetune' in l for l in code_lines(text('README.md')))

def test_readme_is_the_index_notebook():
    made = subprocess.run([sys.executable, '-c', 'import readme; print(readme.readme(), end="")'], cwd=root/'nbs/site', capture_output=True, text=True)
    assert made.returncode==0 and text('README.md')==made.stdout
    assert len(text('README.md').splitlines())<=90

def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\((?!https?:)([^)#]+)', text('README.md'))
    assert len(links)>15 and not [l for l in links if not (root/l).exists()]

def test_contributing_names_files_and_commands_that_exist():
    cmds = re.findall(r'\.venv/bin/([\w-]+)', text('CONTRIBUTING.md'))
    assert cmds and not [c for c in cmds if not (bin/c).exists()]
    assert not [f for f in re.findall(r'`?(nbs/\w+\.ipynb)', text('CONTRIBUTING.md')) if not (root/f).exists()]

# --- wheel, sdist, weights

package = {str(p.relative_to(root)) for p in modules}
data = {'fclora/weights/vit_pico.safetensors','fclora/weights/README.md','fclora/commands.json'}

def test_the_wheel_holds_the_package_and_nothing_else(dist):
    wheel, = dist.glob('*.whl')
    assert wheel.name==f'fclora-{fclora.__version__}-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as z:
        assert {n for n in z.namelist() if '.dist-info/' not in n}==package|data
        assert z.read('fclora/weights/vit_pico.safetensors')==(root/'fclora/weights/vit_pico.safetensors').read_bytes()
        info = f'fclora-{fclora.__version__}.dist-info/'
        assert any(n.startswith(info) and n.endswith('LICENSE') for n in z.namelist())
        assert re.findall(r'\S+ *= *\S+', z.read(info+'entry_points.txt').decode())==[cfg['console_scripts'].replace('=', ' = ')]
        meta = message_from_string(z.read(info+'METADATA').decode())
    groups = dict(extras, dev={o for rs in extras.values() for o in rs})   # all tests run in CI
    wanted = [Requirement(r) for r in cfg['requirements'].split()]
    wanted += [Requirement(f'{r}; extra == "{k}"') for k,rs in groups.items() for r in rs]
    assert {str(Requirement(r)) for r in meta.get_all('Requires-Dist')}==set(map(str, wanted))
    assert (meta['Name'],meta['Version'],meta['Summary'],meta['Requires-Python'])==('fclora',fclora.__version__,cfg['description'],f">={cfg['min_python']}")
    assert meta.get_payload().strip()==text('README.md').strip()

def test_the_sdist_holds_what_a_build_needs(dist):
    sdist, = dist.glob('*.tar.gz')
    with tarfile.open(sdist) as t: names = {n.split('/', 1)[1] for n in t.getnames() if '/' in n}
    assert package|data|{'LICENSE','README.md','settings.ini','pyproject.toml','setup.py'}<=names
    assert not [n for n in names if re.search(r'\.ipynb|__pycache__|\.venv|(^|/)(_proc|_docs)(/|$)|^runs/', n)]

def test_weights_are_the_file_that_their_card_describes():
    file,card = root/'fclora/weights/vit_pico.safetensors',text('fclora/weights/README.md')
    assert re.search(r'sha256\W+`?([0-9a-f]{64})', card)[1]==hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.stat().st_size<=12*2**20
