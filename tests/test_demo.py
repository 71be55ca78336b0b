"The page of `fclora demo`, as a visitor sees it in a browser"
import re, shutil, signal, socket, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from conftest import QUICK, make_images
from fclora.cli import main
from fclora.runs.use import predict

gr = pytest.importorskip('gradio', reason="needs gradio: pip install 'fclora[demo]'")

@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    "A run on pictures of two colours"
    root = tmp_path_factory.mktemp('demo')
    make_images(root/'pets', n=12)
    assert main(['finetune', str(root/'pets'), '--model', 'vit_pico', *QUICK, '--batch-size', '8', '--lr', '.01', '--out', str(root/'run')])==0
    return root/'run'

@pytest.fixture
def pictures(tmp_path):
    "The modes that upset image readers"
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40,60,3), dtype=np.uint8))
    turned = Image.Exif()
    turned[274] = 6
    rgb.save(tmp_path/'plain.png')
    rgb.save(tmp_path/'turned.jpg', exif=turned)
    Image.fromarray(rng.integers(0, 256, (40,60,4), dtype=np.uint8)).save(tmp_path/'clear.png')
    Image.fromarray(rng.integers(0, 65536, (40,60), dtype=np.uint16)).save(tmp_path/'deep.png')
    return sorted(tmp_path.iterdir())

def probabilities(run, *files): return [{o['class']:o['probability'] for o in r['top']} for r in predict(str(run), *files, top_k=99, format='jsonl')]

def test_the_page_says_what_predict_says(shop, pictures):
    from fclora.deploy.demo import demo_app
    app = demo_app(shop)
    for f,want in zip(pictures, probabilities(shop, *pictures)): assert app.fn(str(f))==pytest.approx(want, abs=1e-6)
    assert app.fn(None) is None
    (pictures[0].parent/'notes.png').write_text('no image')
    with pytest.raises(gr.Error, match='not an image'): app.fn(str(pictures[0].parent/'notes.png'))

@pytest.mark.parametrize('run,word', [('none','no run folder'), ('.','not a run folder')])
def test_mistakes_cost_one_line(run, word, tmp_path, capsys):
    assert main(['demo', str(tmp_path/run)])==1
    assert word in capsys.readouterr().err

# --- in a browser

@pytest.fixture(scope='module')
def served(shop):
    "The address of `fclora demo`, which is interrupted afterwards"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    p = subprocess.Popen([Path(sys.executable).parent/'fclora', 'demo', shop, '--port', str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = p.stdout.readline()
    assert f':{port}' in line, p.communicate()[1]
    yield re.search(r'http://\S+:\d+', line)[0]
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=60)
    assert p.returncode==0 and 'Traceback' not in out+err, err

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='needs playwright to drive a browser')
    exe = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome','google-chrome-stable','chrome'))), None)
    if exe is None: pytest.skip('needs chromium or google-chrome on the PATH')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield b
        b.close()

def test_a_visitor_drops_a_picture_and_sees_the_class(browser, served, shop, pictures):
    page,asked = browser.new_page(),[]
    page.on('request', lambda r: asked.append(r.url))
    page.goto(served)
    for f,want in zip(pictures[:2], probabilities(shop, *pictures[:2])):
        page.locator('input[type=file]').first.set_input_files(f)
        first,second = want                                     # in falling order
        page.locator('[data-testid=label-output-value]').filter(has_text=first).wait_for()
        for c in want: page.get_by_text(re.compile(rf'^\s*{round(100*want[c])}%\s*$')).first.wait_for()
        page.get_by_role('button', name='Clear').last.click()
    (pictures[0].parent/'notes.png').write_text('no image')
    page.locator('input[type=file]').first.set_input_files(pictures[0].parent/'notes.png')
    page.get_by_text('cannot read this file: not an image that Pillow knows').wait_for()
    assert 'T = ' in page.inner_text('body') and '2 classes' in page.inner_text('body')
    assert not [u for u in asked if not u.startswith((served,'data:','blob:'))]   # nothing leaves this machine

def test_programs_can_ask_too(served, shop, pictures):
    from gradio_client import Client, handle_file
    ask = Client(served, verbose=False)
    got = ask.predict(handle_file(str(pictures[0])), api_name='/predict')
    want, = probabilities(shop, pictures[0])
    assert got['label']==next(iter(want)) and {o['label']:o['confidence'] for o in got['confidences']}==pytest.approx(want, abs=1e-6)
