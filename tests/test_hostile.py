"Files from strangers, and slips of one's own: one clear line, before anything is lost; the page nbs/results/trust.ipynb lists what is tried here"
import csv, io, json, os, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file
from conftest import QUICK, make_images
from fuzz import guarded, make_run, peak_mib, watch
from fclora.backbones import create_backbone
from fclora.cli import command_table, main
from fclora.data.folders import find_splits
from fclora.data import sources
from fclora.data.pixels import decode, image_files, read_image
from fclora.deploy import demo as demo_module
from fclora.plan import Plan
from fclora.report.page import report_html
from fclora.runs import prepare as prepare_module
from fclora.runs.asked import planned_options
from fclora.runs.config import config_digest, deciding_fields
from fclora.runs.folder import load_model, load_run, save_run
from fclora.runs.use import print_predictions

bad_name = os.fsdecode(b'caf\xe9')

def fails(capsys, *args, status=1):
    "Run, and return the one line on stderr"
    capsys.readouterr()
    assert main([str(o) for o in args])==status
    err = capsys.readouterr().err.splitlines()
    assert len(err)==1 and err[0].startswith('fclora: error: ') and '--debug' not in err[0], err
    return err[0]

@pytest.fixture(scope='module')
def run(tmp_path_factory): return make_run(tmp_path_factory.mktemp('hostile')/'run')

@pytest.fixture
def copy(run, tmp_path): return Path(shutil.copytree(run, tmp_path/'copy'))

def edit(folder, digest='kept', **changes):
    d = json.loads((folder/'fclora.json').read_text())|changes
    if digest=='none': d.pop('digest', None)
    if digest=='anew': d['digest'] = config_digest(d)
    (folder/'fclora.json').write_text(json.dumps(d))

@pytest.fixture
def unread(monkeypatch):
    "No image may be read in this test"
    def never(*args, **kwargs): raise AssertionError('images were read')
    monkeypatch.setattr(prepare_module, 'load_images', never)

# --- names that are no text

def test_class_names_that_cannot_be_saved_are_refused_before_training(capsys, tmp_path):
    make_images(tmp_path/'d', ('cat','dog'))
    for name in (bad_name, 'red\x1b[31m', 'two\nlines'):
        (tmp_path/'d'/'cat').rename(tmp_path/'d'/name)
        msg = fails(capsys, 'finetune', tmp_path/'d', '--model', 'vit_pico', '--out', tmp_path/'r')
        assert 'rename' in msg and ascii(name) in msg.replace('\\\\', '\\') and not (tmp_path/'r').exists()
        (tmp_path/'d'/name).rename(tmp_path/'d'/'cat')

def test_odd_names_of_files_and_folders_are_carried_through_training_without_a_connection(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    d = make_images(tmp_path/bad_name, ('=cat','Kühe 牛'), n=8)
    for f in list(d.glob('*/0.png')): f.rename(f.with_name(bad_name+'.png'))
    args = ['finetune', str(d), '--model', 'vit_pico', *QUICK, '--batch-size', '4']
    assert 'its name is not UTF-8' in fails(capsys, *args, '--out', tmp_path/(bad_name+'-run'))
    with guarded(tmp_path, 300): assert main(args)==0
    out, = (tmp_path/'runs').iterdir()
    str(out).encode('utf-8')
    assert not [o for o in watch.seen if 'socket' in o or 'subprocess' in o or 'pickle' in o]
    err = capsys.readouterr().err
    assert 'could not be drawn' not in err and (out/'report.html').is_file()
    r = load_run(out)
    assert r.config['classes']==['=cat','Kühe 牛'] and r.config['data']['source']==str(d)
    assert main(['evaluate', str(out), '--quiet'])==0

def named_pictures(folder, n):
    "`n` small pictures, one with a name that is no text and one with a letter that ASCII lacks"
    buf = io.BytesIO()
    Image.new('RGB', (8,8), 'navy').save(buf, 'PNG')
    for name in [*map(str, range(n-2)), bad_name, 'Kühe']: (folder/f'{name}.png').write_bytes(buf.getvalue())
    return {folder/f'{bad_name}.png', folder/'Kühe.png'}

def predicted_names(out): return {Path(json.loads(l)['file']) for l in out.splitlines()}

def test_predict_survives_one_odd_name_among_a_thousand(run, tmp_path, capfdbinary):
    odd = named_pictures(tmp_path, 1000)
    assert main(['predict', str(run), str(tmp_path), '--format', 'jsonl', '--top-k', '1'])==0
    files = predicted_names(capfdbinary.readouterr().out.decode())
    assert len(files)==1000 and odd<files

def test_predict_survives_a_terminal_without_letters(run, tmp_path):
    odd = named_pictures(tmp_path, 4)
    code = "import sys; from fclora.cli import main; [main(['predict', *sys.argv[1:], '--format', o]) for o in ('table','csv','jsonl')]"
    res = subprocess.run([sys.executable, '-c', code, run, tmp_path, '--top-k', '1'], capture_output=True, env=dict(os.environ, PYTHONIOENCODING='ascii'))
    assert res.returncode==0 and not res.stderr
    lines = res.stdout.decode('ascii').splitlines()
    assert len(lines)==5+5+4 and odd<predicted_names('\n'.join(lines[-4:]))

def test_a_poor_terminal_ends_no_command():
    for cmd in ('compare','score','--help'):
        res = subprocess.run([sys.executable, '-c', 'import sys; from fclora.cli import main; sys.exit(main())', cmd, '--help'], capture_output=True,
                             env=dict(os.environ, PYTHONIOENCODING='ascii'))
        assert res.returncode==0 and b'Traceback' not in res.stderr

def test_names_cannot_move_the_cursor(run, tmp_path, capsys):
    for name in ('\x1b[2Jgone.png','\x1b]0;title\x07.png'): Image.new('RGB', (8,8)).save(tmp_path/name)
    (tmp_path/'\x1b[31mbroken.png').write_bytes(b'no image')
    assert main(['predict', str(run), str(tmp_path)])==1
    out,err = capsys.readouterr()
    assert '\x1b' not in out+err and r'\u001b[2Jgone.png' in out and r'\u001b[31mbroken.png' in err

# --- Plans and descriptions of runs

def test_a_plan_cannot_lead_the_run_folder_out(run, tmp_path, capsys, monkeypatch, unread):
    monkeypatch.chdir(tmp_path)
    plan = json.loads((run/'plan.json').read_text())
    for method in ('/../../../x', '../x', '..', '', None, 5, ['a'], 'a/b', 'a\nb'):
        Path('p.json').write_text(json.dumps(dict(plan, method=method)))
        assert 'is not a Plan: method must be a plain name' in fails(capsys, 'finetune', 'digits', '--plan', 'p.json')
    assert [o.name for o in tmp_path.iterdir()]==['p.json']

def test_a_plan_without_an_end_is_refused(capsys, unread, tmp_path):
    before = peak_mib()
    assert '/dev/zero is not a Plan: it is larger than 64 MB' in fails(capsys, 'finetune', 'digits', '--plan', '/dev/zero', '--out', tmp_path/'r')
    assert peak_mib()<before+500

def test_parts_of_a_plan_are_names_from_the_registries(run, tmp_path, capsys, unread):
    plan = json.loads((run/'plan.json').read_text())
    for k,word in (('adapter','unknown adapter'), ('init','unknown init'), ('scaling','unknown scaling'), ('schedule','unknown schedule')):
        (tmp_path/'p.json').write_text(json.dumps(dict(plan, **{k:'magic'})))
        assert word in fails(capsys, 'finetune', 'digits', '--plan', tmp_path/'p.json', '--out', tmp_path/'r')

@pytest.mark.parametrize('option', planned_options)
def test_a_plan_and_what_it_has_decided_contradict_each_other(option, run, capsys, unread, tmp_path):
    value = dict(budget='36', unit='ranks', lo='1', hi='16', kinds='q,k,v', include='attn', weights='fisher=1', normaliser='minmax', allocator='uniform', from_block='0',
                 rank_schedule='stiefel_qr')[option]
    msg = fails(capsys, 'finetune', 'digits', '--plan', run/'plan.json', f"--{option.replace('_', '-')}", value, '--out', tmp_path/'r')
    assert f"has decided what --{option.replace('_', '-')} would say" in msg and not (tmp_path/'r').exists()

def test_another_method_than_that_of_the_plan_is_a_contradiction(run, capsys, unread):
    assert 'what --method would say' in fails(capsys, 'finetune', 'digits', '--plan', run/'plan.json', '--method', 'dora')

@pytest.mark.parametrize('args,word', [(('--normaliser','zz'), "unknown normaliser 'zz'"), (('--unit','zz'), 'ranks, params'), (('--weights','fisher=-1'), 'weight of fisher'),
    (('--weights','fisher=nan'), 'weight of fisher'), (('--weights','fisher=0'), 'every weight is 0'), (('--allocator','zz'), 'unknown allocator'), (('--adapter','zz'), 'unknown adapter'),
    (('--init','zz'), 'unknown init'), (('--scaling','zz'), 'unknown scaling'), (('--kinds','zz'), 'has no zz site'), (('--include','['), 'regular expression'), (('--budget','5'), '18..288'),
    (('--lo','9','--hi','3'), '9'), (('--from-block','99'), 'end at 5')])
def test_what_cannot_be_planned_is_said_before_an_image_is_read(args, word, capsys, unread, tmp_path):
    for cmd in ('finetune','score','compare'): assert word in fails(capsys, cmd, 'digits', *args, '--out', tmp_path/'out')
    assert not list(tmp_path.iterdir())

changes = dict(T=dict(T=.5), classes=dict(classes=['moth','fly','bee','ant']), std=dict(image=dict(size=32, mean=[.5]*3, std=[.5]*3, interpolation='bicubic')),
               interpolation=dict(image=dict(size=32, mean=[.4802,.4481,.3975], std=[.277,.2691,.2821], interpolation='nearest')), dropout=dict(dropout=.5),
               stopped=dict(T=None))

@pytest.mark.parametrize('change', changes)
def test_what_decides_predictions_does_not_change_without_a_word(change, copy, capsys, tmp_path):
    Image.new('RGB', (8,8)).save(tmp_path/'a.png')
    edit(copy, **changes[change])
    for args in (('predict', copy, tmp_path/'a.png'), ('merge', copy, tmp_path/'m')): assert 'was changed after it was written' in fails(capsys, *args)
    edit(copy, 'anew')
    assert main(['predict', str(copy), str(tmp_path/'a.png')])==0 # a digest is no signature

def test_every_deciding_field_is_covered_and_old_folders_have_no_digest(copy):
    d = json.loads((copy/'fclora.json').read_text())
    assert d['digest']==config_digest(d)
    for k in deciding_fields: assert config_digest(dict(d, **{k:'other'}))!=d['digest'], k
    edit(copy, 'none')
    model,config = load_model(copy)
    assert 'digest' not in config
    assert 'digest' in json.loads((save_run(load_run(copy), copy)/'fclora.json').read_text()) # saved again, it has one

@pytest.mark.parametrize('digest', ['none','anew'])
@pytest.mark.parametrize('change,word', [(dict(T=1e-300), 'T must be'), (dict(T=float('inf')), 'T must be'), (dict(image=dict(size=32, mean=[0]*3, std=[.2,0,.2], interpolation='bicubic')), 'std must be'),
    (dict(image=dict(size=64, mean=[0]*3, std=[1]*3, interpolation='bicubic')), 'have 64 px'), (dict(image=dict(size=32, mean=[0]*3, std=[1]*3, interpolation='magic')), 'interpolation must be'),
    (dict(classes=['ant','ant','fly','moth']), 'different names'), (dict(classes=None), 'classes must be'), (dict(model=dict(name='vit_pico', pretrained=True, one_head=False, size=7, checkpoint=None)), 'px'),
    (dict(model=dict(name='vit_pico', pretrained=True, one_head=False, size=None, checkpoint=dict(name='x'))), 'there is no sha256')])
def test_values_that_cannot_be_are_refused_whatever_the_digest_says(digest, change, word, copy, capsys):
    edit(copy, digest, **change)
    assert word in fails(capsys, 'predict', copy, 'x.png')

def test_a_stopped_run_warns_that_T_is_1(copy, capsys, tmp_path):
    Image.new('RGB', (8,8)).save(tmp_path/'a.png')
    edit(copy, 'anew', T=None, status='epoch 3 of 10')
    for args in (('predict', copy, tmp_path/'a.png'), ('merge', copy, tmp_path/'m')):
        assert main([*map(str, args)])==0
        err = capsys.readouterr().err
        assert err.startswith('fclora: warning: ') and 'was stopped at epoch 3 of 10' in err and 'T = 1 is used' in err and err.count('\n')==1

def test_a_temperature_that_is_lost_is_none(copy, capsys, tmp_path):
    Image.new('RGB', (8,8)).save(tmp_path/'a.png')
    d = json.loads((copy/'fclora.json').read_text())
    (copy/'fclora.json').write_text(json.dumps({k:v for k,v in d.items() if k!='T'}))
    assert 'was changed after it was written' in fails(capsys, 'predict', copy, tmp_path/'a.png')
    (copy/'fclora.json').write_text(json.dumps({k:v for k,v in d.items() if k not in ('T','digest')}))
    assert main(['predict', str(copy), str(tmp_path/'a.png')])==0 and 'T = 1 is used' in capsys.readouterr().err

def test_compare_resume_names_a_half_file_of_metrics(run, tmp_path, capsys):
    out = tmp_path/'c'
    args = ('compare', 'digits', '--methods', 'uniform', '--seeds', '0', '--out', out, '--resume')
    shutil.copytree(run, out/'uniform-0')
    for content in ((run/'metrics.json').read_text()[:90], '{}', 'null', json.dumps(dict(json.loads((run/'metrics.json').read_text()), test=None))):
        (out/'uniform-0'/'metrics.json').write_text(content)
        assert str(out/'uniform-0'/'metrics.json') in fails(capsys, *args)

def test_odd_checkpoints_are_one_line(capsys, tmp_path):
    state = create_backbone('vit_pico', 3).state_dict()
    (tmp_path/'empty.pth').write_bytes(b''); (tmp_path/'empty.safetensors').write_bytes(b''); (tmp_path/'text.pth').write_text('weights'); (tmp_path/'text.safetensors').write_text('weights'*99)
    torch.save({i:v for i,v in enumerate(state.values())}, tmp_path/'integers.pth')
    torch.save(dict.fromkeys(state), tmp_path/'none.pth'); torch.save({}, tmp_path/'nothing.pth'); torch.save([1,2], tmp_path/'list.pth')
    save_file({'x':torch.zeros(2)}, tmp_path/'other.safetensors')
    files = sorted(tmp_path.iterdir())
    assert len(files)==9
    for f in files: assert str(f) in fails(capsys, 'finetune', 'digits', '--checkpoint', f, *QUICK, '--out', tmp_path/'r') and not (tmp_path/'r').exists()

# --- folders of images

def test_a_link_to_a_folder_above_is_an_error(capsys, tmp_path, run):
    d = make_images(tmp_path/'d')
    (d/'cat'/'up').symlink_to(d)
    assert f"{d/'cat'/'up'} is a link to a folder above it" in fails(capsys, 'finetune', d, '--model', 'vit_pico')
    assert 'is a link to a folder above it' in fails(capsys, 'predict', run, d)
    (d/'cat'/'up').unlink(); (d/'cat'/'up').symlink_to('up')
    assert len(image_files(d))==12 # a link to itself is no folder

def test_one_file_under_two_labels_or_in_two_splits_is_an_error(capsys, tmp_path):
    d = make_images(tmp_path/'d')
    for link in (os.symlink, os.link):
        link(d/'cat'/'1.png', d/'dog'/'same.png')
        msg = fails(capsys, 'finetune', d, '--model', 'vit_pico')
        assert "under two classes: 'dog' and 'cat'" in msg and 'same.png' in msg
        (d/'dog'/'same.png').unlink()
    os.symlink(d/'cat', d/'kitten')
    assert "under two classes: 'kitten' and 'cat'" in fails(capsys, 'finetune', d, '--model', 'vit_pico')
    for split in ('train','test'): make_images(tmp_path/'s'/split)
    (tmp_path/'s'/'test'/'cat'/'old.png').symlink_to(tmp_path/'s'/'train'/'cat'/'0.png')
    assert 'in both test and train' in fails(capsys, 'finetune', tmp_path/'s', '--model', 'vit_pico')

def test_every_real_file_counts_once(tmp_path):
    d,store = make_images(tmp_path/'d'),make_images(tmp_path/'store', ('more',))
    for o in ('a','b'): (d/'cat'/o).symlink_to(store/'more')
    (d/'cat'/'again.png').symlink_to(d/'cat'/'0.png')
    assert {c:len(fs) for c,fs in sources.class_splits(find_splits(d), d)['train'].items()}==dict(cat=12, dog=6)

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning') # as page 41 asks; pytest has filters of its own
def test_a_picture_of_too_many_pixels_is_refused_by_its_name(capsys, tmp_path, run, monkeypatch):
    d = make_images(tmp_path/'d')
    Image.new('1', (10_000,9_500)).save(d/'cat'/'bomb.png')
    Image.new('1', (20_000,15_000)).save(d/'cat'/'bigger.png')
    assert (d/'cat'/'bigger.png').stat().st_size<1e5
    msg = fails(capsys, 'finetune', d, '--model', 'vit_pico')
    assert 'bomb.png' in msg and 'bigger.png' in msg and '89,478,485' in msg
    code = 'import sys; from fclora.cli import main; sys.exit(main())'
    res = subprocess.run([sys.executable, '-c', code, 'predict', run, d/'cat'/'bomb.png'], capture_output=True, text=True)
    assert res.returncode==1 and '10,000 x 9,500 pixels' in res.stderr and res.stderr.count('\n')==1
    for most,why in ((32*32, None), (32*32-1, '32 x 32 pixels are more than the 1,023 that are read'), (None, None)): # the limit is Pillow's, to be set there
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', most)
        assert decode(d/'cat'/'1.png')[1]==why

def test_a_picture_that_is_a_program_is_not_run(tmp_path):
    Image.new('RGB', (9,9)).save(tmp_path/'a.eps')
    shutil.copy(tmp_path/'a.eps', tmp_path/'a.png')
    with guarded(tmp_path): assert [decode(tmp_path/f'a.{o}')[1] for o in ('eps','png')]==['not an image that Pillow knows']*2
    assert not watch.seen and [o.name for o in image_files(tmp_path)]==['a.png']

def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'pipe.png')
    with guarded(tmp_path, 20): assert decode(tmp_path/'pipe.png')==(None, 'not a file')

def test_floats_in_0_to_1_are_no_black_picture(tmp_path):
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for scale in (1, 255):
        Image.fromarray(x*scale).save(tmp_path/'a.tif')
        assert np.abs(np.asarray(read_image(tmp_path/'a.tif'))[...,0]-x*255).max()<=1
    for bad in (x*4000, x-1, x*np.nan):
        Image.fromarray(bad).save(tmp_path/'a.tif')
        assert 'its floating-point pixels lie in' in decode(tmp_path/'a.tif')[1]

# --- what is written

formulas = ['=1+1', '+1', '-1', '@SUM(A1)', '\t=1', '\r=1', '=cmd|"/c calc"!A0']

def test_cells_of_a_table_are_no_formulas(capsys):
    print_predictions([dict(file=o, top=[{'class':o,'probability':.5}]) for o in [*formulas, 'plain.png']], 'csv')
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))[1:]
    assert all(row[i].startswith("'") for row in rows[:-1] for i in (0,2)) and rows[-1][0]=='plain.png'
    print_predictions([dict(file='=1', top=[{'class':'-','probability':.5}])], 'jsonl')
    assert json.loads(capsys.readouterr().out)['file']=='=1' # JSON has no formulas, and keeps names as they are

with_out = [cmd for cmd,spec in command_table().items() if 'out' in {o['name'] for o in spec['options']}]

@pytest.mark.parametrize('cmd', with_out)
def test_whether_out_can_be_written_is_tried_first(cmd, tmp_path, capsys, unread, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').write_text('mine'); (tmp_path/'gone').symlink_to(tmp_path/'nowhere')
    name = dict(export='x.onnx', pretrain='x.safetensors', check='x.html').get(cmd, 'x')
    options = {o['name']:o for o in command_table()[cmd]['options']}
    first = 'digits' if cmd in ('finetune','compare','score') else 'checks' if cmd=='study' else 'no/such/run'
    for out in (tmp_path/'file'/name, tmp_path/'gone'/name, Path('/sys')/name, Path('/dev/null')/name, tmp_path/('x'*300)/name):
        given = [first] if cmd!='bench' else []
        given += [out] if options['out']['kind']=='place' else ['--out', out]
        if cmd=='cut': given += ['--budget', 20]
        assert f'--out {out} cannot be written: ' in fails(capsys, cmd, *given)
    assert sorted(o.name for o in tmp_path.iterdir())==['file','gone']

def test_where_runs_would_be_numbered_is_tried_first_too(tmp_path, capsys, unread, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('runs').write_text('mine')
    assert '--out runs is a file' in fails(capsys, 'finetune', 'digits')

class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags,self.attributes,self.links = set(),set(),set()
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attributes |= {k for k,_ in attrs}; self.links |= {v for k,v in attrs if k in ('href','src')}

def test_a_report_holds_no_html_of_strangers(run):
    r = load_run(run)
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)><a href="javascript:x">&lt;b&gt;'
    r.config = dict(r.config, method=evil, classes=[evil+str(i) for i in range(4)], data=dict(r.config['data'], name=evil, source=evil), model=dict(r.config['model'], name=evil),
                    recipe={evil:evil}, versions={evil:evil})
    r.metrics = dict(r.metrics, hardware=evil, memory_kind=evil)
    rng = np.random.default_rng(0)
    r.logits,r.targs,r.images = torch.tensor(rng.normal(size=(20,4))),torch.tensor(rng.integers(0, 4, 20)),torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    page = report_html(r)
    found = Tags(page)
    assert 'alert(1)' in page and not found.tags & {'script','iframe','object','embed'} and not [o for o in found.attributes if o.startswith('on')]
    assert all(o.startswith(('#','data:image/')) for o in found.links), found.links

def test_the_demo_listens_on_this_machine_alone(monkeypatch, capsys):
    seen = {}
    class App:
        def launch(self, **kwargs): seen.update(kwargs); return None,'http://127.0.0.1:7860/',None
        def block_thread(self): pass
    monkeypatch.setattr(demo_module, 'demo_app', lambda *args: App())
    monkeypatch.setenv('GRADIO_SERVER_NAME', '0.0.0.0')
    assert main(['demo', 'run'])==0
    assert seen['server_name']=='127.0.0.1' and seen['share'] is False and seen['inbrowser'] is False

def test_reading_a_plan_takes_no_time_however_deep_it_is(tmp_path):
    for text in ('['*200_000, '{"format":2,"settings":'+'{"a":'*200_000, '{"format":2,"budget":'+'9'*100_000+'}'):
        (tmp_path/'p.json').write_text(text)
        with guarded(tmp_path, 20), pytest.raises(ValueError, match='p.json'): Plan.load(tmp_path/'p.json')

@pytest.mark.parametrize('argv', [['finetune', '--limit='], ['check', '--checkpoint', ''], ['predict', ''], ['tune', '--kinds=']])
def test_a_value_of_an_unset_variable_is_said(argv, capsys):
    assert main(argv)==1
    assert 'is empty: leave it out' in capsys.readouterr().err
