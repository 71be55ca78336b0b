"The documentation site: it builds without a warning, every link and picture leads somewhere, and it works in a browser, offline"
import contextlib,functools,io,re,shlex,shutil,subprocess,sys,threading
from http.server import SimpleHTTPRequestHandler,ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote,urldefrag,urljoin,urlsplit
import pytest
from bs4 import BeautifulSoup
import fclora
from fclora.cli import commands,main

root = Path(__file__).parent.parent
command = next(l.strip() for l in (root/'CONTRIBUTING.md').read_text(encoding='utf-8').splitlines() if 'sphinx-build' in l and l.startswith('    '))

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built by the command of CONTRIBUTING into a folder of its own"
    out = tmp_path_factory.mktemp('docs')/'html'
    prog,*args = shlex.split(command)
    assert prog.endswith('/sphinx-build') and args[-1]=='_docs/html' and '-W' in args
    res = subprocess.run([sys.executable, '-m', 'sphinx', '-q', *args[:-1], str(out)], cwd=root, capture_output=True, text=True)
    assert res.returncode==0 and not res.stderr, res.stdout[-3000:]+res.stderr[-3000:]
    return out

@pytest.fixture(scope='module')
def pages(site): return read_pages(site)

# --- reading a site

def read_pages(site): return {p.relative_to(site).as_posix():BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in sorted(site.rglob('*.html'))}

def anchors(page): return {o[k] for k in ('id','name') for o in page.find_all(attrs={k:True})}

def refs(page): return [(o, o[k]) for t,k in (('a','href'),('link','href'),('img','src'),('script','src'),('source','src')) for o in page.find_all(t) if o.get(k)]

def problems(site, pages):
    "Links, anchors and pictures that lead nowhere, what is loaded from elsewhere, and pictures without a description"
    bad,ids = [],{n:anchors(p) for n,p in pages.items()}
    for name,page in pages.items():
        for tag,url in refs(page):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if parts.scheme!='data' and not (tag.name=='a' and parts.scheme in ('http','https')): bad.append(f'{name}: loads {url}')
                continue
            path,frag = urldefrag(urljoin(name, unquote(parts._replace(query='').geturl())))
            if not (site/path).is_file(): bad.append(f'{name}: no {path}')
            elif frag and path in ids and frag not in ids[path]: bad.append(f'{name}: no #{frag} in {path}')
        bad += [f"{name}: no alt text of {o['src']}" for o in page.find_all('img') if not o.get('alt', '').strip()]
    return bad

def test_the_check_finds_what_is_wrong(tmp_path):
    (tmp_path/'a.html').write_text('<h1 id="here">A</h1><img src="a.png"><a href="b.html">b</a><a href="#gone">c</a><a href="a.html#here">d</a>'
                                   '<a href="https://x.org">e</a><script src="https://x.org/x.js"></script>')
    assert sorted(problems(tmp_path, read_pages(tmp_path)))==['a.html: loads https://x.org/x.js', 'a.html: no #gone in a.html', 'a.html: no a.png',
                                                               'a.html: no alt text of a.png', 'a.html: no b.html']

# --- what is there

def test_every_link_anchor_and_picture_leads_somewhere(site, pages): assert not problems(site, pages)

def test_every_notebook_is_a_page_in_the_contents_and_can_be_opened(site, pages):
    listed = {a['href'] for a in pages['index.html'].select('.sidebar-tree a')}
    for nb in sorted((root/'nbs').rglob('*.ipynb')):
        name = nb.relative_to(root/'nbs').with_suffix('').as_posix()
        assert name=='index' or f'{name}.html' in listed
        assert (site/'_sources'/f'{name}.ipynb').read_bytes()==nb.read_bytes()
        assert len(pages[f'{name}.html'].find_all('h1'))==1 and pages[f'{name}.html'].select('a.notebook')
    assert {p.get_text() for p in pages['index.html'].select('.sidebar-tree .caption-text')}=={'Tutorials','Reference','Results','Project'}

def test_every_public_definition_has_its_reference_with_parameters_and_source(pages):
    ids = {i for n,p in pages.items() if not n.startswith('_') for i in anchors(p)}
    files = [p for p in (root/'fclora').rglob('*.py') if p.stem not in ('all','__init__','__main__','_modidx')]
    for mod in [import_module('.'.join(p.relative_to(root).with_suffix('').parts)) for p in sorted(files)]:
        own = [n for n in mod.__all__ if callable(getattr(mod, n)) and getattr(mod, n).__module__==mod.__name__]
        assert own and not [n for n in own if f'{mod.__name__}.{n}' not in ids], mod.__name__
    entry = next(d for d in pages['04_adapt.html'].select('dl.py.function') if d.dt.get('id')=='fclora.adapt.adapt')
    assert 'Numerator of the LoRA scaling' in entry.get_text() and 'lora_alpha=8.0' in entry.dt.get_text()
    assert entry.dt.select_one('a[href="_modules/fclora/adapt.html#adapt"]')

def test_exports_are_references_and_directives_stay_inside(pages):
    for n,p in pages.items():
        if n.startswith(('_modules','site')): continue
        text = p.select_one('article').get_text()
        assert '#|' not in text and 'nbdev_export()' not in text and 'show_doc(' not in text, n

def test_the_options_of_every_command_are_its_help(pages, monkeypatch):
    monkeypatch.setenv('COLUMNS', '88')
    text = pages['site/commands.html'].select_one('article').get_text()
    for argv in ['--help'],*([c,'--help'] for c in commands):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): main(argv)
        assert len(out.getvalue())>100 and out.getvalue().strip() in text

def test_landing_page_shows_the_picture_the_measured_table_and_the_version(pages):
    page = pages['index.html']
    assert 'ranks' in page.select_one('article img')['alt'] and fclora.__version__ in page.title.get_text()
    assert len(page.select('article table tbody tr'))==6 and 'uniform' in page.select_one('article table').get_text()
    assert 'fclora finetune' in page.select_one('pre').get_text() and 'set_index' not in page.select_one('article').get_text()

def test_texts_of_the_root_are_pages(site, pages):
    for name,path in {'changelog':'CHANGELOG.md','contributing':'CONTRIBUTING.md','weights':'fclora/weights/README.md','citation':'CITATION.cff'}.items():
        words = lambda s: re.findall('[A-Za-z]{2,}', s)
        shown = words(pages[f'site/{name}.html'].select_one('article').get_text())
        assert not set(words((root/path).read_text(encoding='utf-8')))-set(shown)
    assert (site/'llms.txt').read_bytes()==(root/'nbs/llms.txt').read_bytes()

def test_the_workflow_publishes_what_the_same_command_builds():
    flow = (root/'.github/workflows/docs.yml').read_text(encoding='utf-8')
    assert command in flow and 'path: _docs/html' in flow

# --- in a browser

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: the site is not tried in a browser')
    exe = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
    if not exe: pytest.skip('no Chromium on this machine: the site is not tried in a browser')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture(scope='module')
def base(site):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    server.handle_error = lambda *args: None # a browser that turns to another page hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.mark.parametrize('width,height', [(1280,900),(390,844)], ids=['desktop','phone'])
def test_a_reader_finds_the_way(browser, base, width, height):
    page,bad = browser.new_page(viewport=dict(width=width, height=height), color_scheme='light'),[]
    page.on('console', lambda m: m.type=='error' and bad.append(m.text))
    page.on('pageerror', lambda e: bad.append(str(e)))
    page.on('requestfailed', lambda r: 'ABORTED' in r.failure or bad.append(f'failed: {r.url}')) # aborted: the search reads pages until one is chosen
    page.on('request', lambda r: r.url.startswith((base,'data:')) or bad.append(f'external: {r.url}'))
    page.on('response', lambda r: r.status>=400 and bad.append(f'{r.status}: {r.url}'))
    for name in ('index','01_lora','site/commands'):
        page.goto(f'{base}{name}.html')
        assert page.locator('h1').is_visible() and page.locator('button.copybtn').count()>0
        assert page.evaluate('document.documentElement.scrollWidth')<=width, f'{name} is wider than the screen'
        assert not page.evaluate('[...document.images].filter(o => !o.complete || !o.naturalWidth).length')
    # search, and follow a result
    if width<600: page.locator('label[for=__navigation].nav-overlay-icon').click()
    page.locator('input[name=q]').fill('temperature')
    page.keyboard.press('Enter')
    hit = page.locator('#search-results li a', has_text='Temperature').first
    hit.click()
    page.wait_for_url('**/60_temperature.html*')
    # from there by a link in the text to a definition, with its anchor in sight
    link = page.locator('article p a.reference.internal:has(code)').first
    target = link.get_attribute('href').rpartition('#')[2]
    link.click()
    page.wait_for_function('id => location.hash=="#"+id && document.getElementById(id).getBoundingClientRect().top<innerHeight', arg=target)
    # dark and light
    shade = lambda: sum(map(int, re.findall(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[:3]))/3
    assert shade()>200
    for _ in range(3):
        if page.evaluate('document.body.dataset.theme')!='dark': page.locator('button.theme-toggle:visible').first.click()
    assert page.evaluate('document.body.dataset.theme')=='dark' and shade()<60
    page.close()
    assert not bad
