"An exported model computes what the run computes, needs no fclora, and says clearly what it cannot do"
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close
from conftest import QUICK, make_images
import fclora
import fclora.deploy.bank as bank_room, fclora.deploy.int8 as int8_room, fclora.deploy.onnx as onnx_room
from fclora.adapt import adapt, adapted_layers
from fclora.backbones import create_backbone, image_config
from fclora.cli import main
from fclora.deploy.bank import AdapterBank, BankLinear
from fclora.deploy.int8 import export
from fclora.deploy.onnx import export_onnx, export_program, metadata, onnx_model, random_pixels
from fclora.find import find_sites
from fclora.lora import LoRA, adapters
from fclora.runs.config import sealed
from fclora.runs.folder import load_model
from fclora.runs.use import predict

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Three small runs on the same base, with two or three classes"
    root,out = tmp_path_factory.mktemp('deploy'),{}
    make_images(root/'two', n=12)
    make_images(root/'three', ('ant','bee','fly'), n=12, seed=1)
    for name,data,args in (('two','two',()), ('three','three',('--method','uniform','--budget','40')), ('head','two',('--method','head'))):
        out[name] = root/f'run-{name}'
        assert main(['finetune', str(root/data), '--model', 'vit_pico', *QUICK, '--batch-size', '8', '--lr', '.01', '--out', str(out[name]), *args])==0
    return out

@pytest.fixture(scope='module')
def onnx(runs, tmp_path_factory): return export_onnx(runs['two'], tmp_path_factory.mktemp('onnx')/'m.onnx', probs=True)

def unfinished(run, to):
    shutil.copytree(run, to)
    d = json.loads((to/'fclora.json').read_text())
    (to/'fclora.json').write_text(json.dumps(sealed(dict(d, T=None, status='epoch 1 of 3'))))
    return to

def said(run, px):
    "Calibrated logits of the run for uint8 pixels, the way of `predict`"
    model,cfg = load_model(run)
    mean,std = (torch.tensor(cfg['image'][k])[:,None,None] for k in ('mean','std'))
    with torch.no_grad(): return model((px/255-mean)/std)/cfg['T']

def python(code, *args):
    res = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return res.stdout

# --- ONNX and torch.export

@pytest.mark.parametrize('n', [1,3,17])
def test_onnx_gives_the_probabilities_of_the_run(runs, onnx, n):
    px = random_pixels(n, 32)
    assert_close(onnx_model(onnx)(px), said(runs['two'], px).softmax(1), atol=1e-4, rtol=0)

def test_program_gives_the_logits_of_the_run(runs, tmp_path):
    f = export_program(runs['three'], tmp_path/'m.pt2')
    torch.save({n:(random_pixels(n, 32), said(runs['three'], random_pixels(n, 32))) for n in (1,3,17)}, tmp_path/'want.pt')
    python('''import sys, torch
prog = torch.export.load(sys.argv[1]).module()
for x,y in torch.load(sys.argv[2]).values(): torch.testing.assert_close(prog(x), y, atol=1e-4, rtol=0)
assert not [m for m in sys.modules if m.split('.')[0] in ('fclora','timm','fastai')]''', f, tmp_path/'want.pt')

def test_calibrated_is_a_choice(runs, tmp_path):
    about = {'fclora.json':''}
    f = torch.export.load(export_program(runs['two'], tmp_path/'raw.pt2', calibrated=False), extra_files=about).module()
    meta,px = json.loads(about['fclora.json']),random_pixels(2, 32)
    T = float(meta['T'])
    assert meta['calibrated']=='false' and meta['output']=='logits' and T==load_model(runs['two'])[1]['T']!=1
    assert_close(f(px)/T, said(runs['two'], px), atol=1e-4, rtol=0)

def test_onnx_and_its_metadata_suffice_without_fclora_and_torch(runs, onnx, tmp_path):
    rng = np.random.default_rng(3)
    for i,(h,w) in enumerate([(32,32), (50,40), (200,300)]):
        small = Image.fromarray(rng.integers(0, 256, (5,5,3), dtype=np.uint8))
        small.resize((w,h), Image.Resampling.BILINEAR).save(tmp_path/f'{i}.png')
    files = sorted(tmp_path.glob('*.png'))
    got = json.loads(python('''import json, sys, numpy as np, onnxruntime
from PIL import Image
sess = onnxruntime.InferenceSession(sys.argv[1])
meta = sess.get_modelmeta().custom_metadata_map
size,method = json.loads(meta['input_size'])[-1],Image.Resampling[meta['interpolation'].upper()]
def pixels(f):
    img = Image.open(f).convert('RGB')
    s = min(img.size)
    left,top = round((img.width-s)/2),round((img.height-s)/2)
    return np.asarray(img.crop((left, top, left+s, top+s)).resize((size,size), method)).transpose(2, 0, 1)
p, = sess.run(None, {'pixels':np.stack([pixels(f) for f in sys.argv[2:]])})
assert not [m for m in sys.modules if m.split('.')[0] in ('fclora','torch','timm')]
print(json.dumps([dict(zip(json.loads(meta['classes']), row)) for row in p.tolist()]))''', onnx, *files))
    rows = predict(str(runs['two']), *files, top_k=2, format='jsonl')
    for p,r in zip(got, rows):
        for o in r['top']: assert p[o['class']]==pytest.approx(o['probability'], abs=.01)
    assert got[0][rows[0]['top'][0]['class']]==pytest.approx(rows[0]['top'][0]['probability'], abs=1e-4) # not resized

def test_metadata_says_everything(runs, onnx):
    meta,(_,cfg) = onnx_model(onnx).meta,load_model(runs['two'])
    got = {k:json.loads(meta[k]) for k in ('classes','input_size','mean','std','T','calibrated')}
    img = cfg['image']
    assert got==dict(classes=['cat','dog'], input_size=[3,32,32], mean=list(img['mean']), std=list(img['std']), T=cfg['T'], calibrated=True)
    assert (meta['interpolation'],meta['output'],meta['model'],meta['fclora'])==(img['interpolation'], 'probabilities', 'vit_pico', fclora.__version__)

@pytest.mark.parametrize('name,kw', [('test_vit',{}), ('test_efficientnet',{}), ('deit_tiny_distilled_patch16_224',dict(size=64, one_head=True))])
def test_other_architectures_from_memory(name, kw, tmp_path):
    torch.manual_seed(0)
    model = create_backbone(name, 5, pretrained=False, **kw).eval()
    if 'vit' in name or 'deit' in name: adapt(model, {s.name:2 for s in find_sites(model)})
    for l in adapted_layers(model).values():
        for B in l.lora_B.values(): torch.nn.init.normal_(B, std=.1)
    before = {k:v.clone() for k,v in model.state_dict().items()}
    cfg = dict(classes=list('abcde'), image=image_config(model), model=dict(name=name), T=.5)
    f = export_program((model,cfg), tmp_path/'m.pt2')     # compared with the adapted model as it is written
    assert f.stat().st_size>1e5 and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

def test_an_export_that_differs_is_not_written(runs, tmp_path, monkeypatch, capsys):
    keep = onnx_room.unload
    monkeypatch.setattr(onnx_room, 'unload', lambda model,merge: keep(model))     # forgets to merge
    assert main(['export', str(runs['two']), str(tmp_path/'m.onnx')])==1
    err = capsys.readouterr().err
    assert 'differs from the model by' in err and 'batch size 1' in err and err.count('\n')==1
    assert not list(tmp_path.iterdir())

# --- int8

def test_int8_is_smaller_and_its_price_is_reported(runs, tmp_path, capsys):
    t = export(runs['two'], tmp_path/'q.onnx', 'onnx-int8')
    out = capsys.readouterr().out
    assert list(t.index)==['fp32','int8'] and list(t)==['MiB','accuracy','NLL','ECE','same class']
    test = json.loads((runs['two']/'metrics.json').read_text())['test']
    assert t.accuracy['fp32']==pytest.approx(test['accuracy']) and t.NLL['fp32']==pytest.approx(test['nll'], abs=1e-4) and t.ECE['fp32']==pytest.approx(test['ece'], abs=1e-4)
    assert t.MiB['int8']<.4*t.MiB['fp32'] and t.MiB['int8']==pytest.approx((tmp_path/'q.onnx').stat().st_size/2**20, rel=1e-3)
    assert 'int8' in out and f"{t.NLL['int8']:.4f}" in out
    q,px = onnx_model(tmp_path/'q.onnx'),random_pixels(4, 32)
    want = said(runs['two'], px)
    assert 0<(q(px)-want).abs().max()<.2*want.abs().max()
    assert {k:v for k,v in q.meta.items() if not k.startswith('onnx.')}==metadata(load_model(runs['two'])[1])

def test_int8_is_measured_on_other_images_or_not_made(runs, onnx, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(int8_room, 'export_onnx', lambda run,out,*a: shutil.copy(onnx, out))
    gone = tmp_path/'run'
    shutil.copytree(runs['two'], gone)
    d = json.loads((gone/'fclora.json').read_text())
    (gone/'fclora.json').write_text(json.dumps(dict(d, data=dict(d['data'], source=str(tmp_path/'moved')))))
    assert main(['export', str(gone), str(tmp_path/'q.onnx'), '--format', 'onnx-int8'])==1
    assert 'name others' in capsys.readouterr().err and not (tmp_path/'q.onnx').exists()
    other = make_images(tmp_path/'other', n=5, seed=1)
    assert main(['export', str(gone), str(tmp_path/'q.onnx'), str(other), '--format', 'onnx-int8'])==0
    assert re.search(r'(?m)^int8 +1\.', capsys.readouterr().out) and (tmp_path/'q.onnx').exists()

# --- errors

@pytest.mark.parametrize('args,word', [
    (['{tmp}/none', '{tmp}/m.onnx'], 'no run folder'), (['{tmp}', '{tmp}/m.onnx'], 'is not a run folder'), (['{un}', '{tmp}/m.onnx'], 'no temperature'),
    (['{run}', '{tmp}/there.onnx'], '--force'), (['{run}', '{tmp}/m.onnx', '--format', 'tflite'], 'onnx, pt2, onnx-int8'), (['{run}', '{tmp}/m.onnx', '--format', 'pt2'], '.pt2')])
def test_mistakes_cost_one_line(args, word, runs, tmp_path, capsys):
    (tmp_path/'there.onnx').write_text('mine')
    un = unfinished(runs['two'], tmp_path/'un') if '{un}' in args else ''
    assert main(['export', *[a.format(tmp=tmp_path, run=runs['two'], un=un) for a in args]])==1
    err = capsys.readouterr().err
    assert word in err and err.startswith('fclora: error:') and err.count('\n')==1
    assert (tmp_path/'there.onnx').read_text()=='mine' and not (tmp_path/'m.onnx').exists()

def test_force_replaces_and_raw_logits_need_no_temperature(runs, tmp_path):
    (tmp_path/'m.pt2').write_text('old')
    assert main(['export', str(unfinished(runs['two'], tmp_path/'un')), str(tmp_path/'m.pt2'), '--format', 'pt2', '--force', '--no-calibrated'])==0
    assert (tmp_path/'m.pt2').stat().st_size>1e6

@pytest.mark.parametrize('module,args,extra', [('onnxscript',['export','{run}','{tmp}/m.onnx'],'onnx'), ('onnxruntime',['export','{run}','{tmp}/m.onnx','--format','onnx-int8'],'onnx'), ('gradio',['demo','{run}'],'demo')])
def test_a_missing_extra_is_named(module, args, extra, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert main([a.format(run=runs['two'], tmp=tmp_path) for a in args])==1
    assert capsys.readouterr().err==f"fclora: error: this needs {module}: pip install 'fclora[{extra}]'\n"

def test_modules_import_without_the_extras():
    for f in Path(fclora.__file__).parent.rglob('*.py'):
        body = ast.parse(f.read_text(encoding='utf-8')).body
        top = [a.name for n in body if isinstance(n, ast.Import) for a in n.names]
        top += [n.module for n in body if isinstance(n, ast.ImportFrom) and not n.level]
        assert not {o.split('.')[0] for o in top}&{'onnx','onnxscript','onnxruntime','gradio'}, f

# --- the bank

@pytest.fixture(scope='module')
def bank(runs): return AdapterBank({k:runs[k] for k in ('two','three','head')})

def test_every_row_of_a_mixed_batch_is_its_own_run(runs, bank):
    torch.manual_seed(0)
    x,who = torch.randn(12, 3, 32, 32),['two','three','head','three']*3
    logits = bank(x, who)
    assert logits.shape==(12,3)
    for n in bank.names:
        model,cfg = load_model(runs[n])
        rows,c = [i for i,o in enumerate(who) if o==n],len(cfg['classes'])
        with torch.no_grad(): alone = model(x)/cfg['T']
        assert_close(logits[rows,:c], alone[rows], atol=1e-5, rtol=1e-5)
        assert_close(bank(x, n), alone, atol=1e-5, rtol=1e-5)
        assert (logits[rows,c:]==-torch.inf).all() and (logits[rows].softmax(1)[:,c:]==0).all()
    assert_close(bank(x.flip(0), who[::-1]), logits.flip(0), atol=1e-5, rtol=1e-5)
    assert (bank(x[:1], 'two')-bank(x[:1], 'head')).abs().max()>1e-3

def test_the_bank_keeps_one_base(runs, bank):
    params = sum(v.numel() for n,v in bank.state_dict().items() if n.split('.')[-1] not in ('A','B','W','b','T'))
    assert params==sum(p.numel() for n,p in load_model(runs['head'])[0].named_parameters() if not n.startswith('head.'))
    assert not [p for p in bank.parameters() if p.requires_grad]

def test_windows_of_an_image_stay_with_its_run():
    torch.manual_seed(0)
    lin,x = torch.nn.Linear(6, 4),torch.randn(2*4, 9, 6)      # 2 images of 4 windows
    pairs = [(torch.randn(r, 6), torch.randn(4, r)) for r in (1,3)]
    layer = BankLinear(lin, pairs)
    layer.idx = torch.tensor([1,0])
    with torch.no_grad():
        want = [lin(o)+o@pairs[i][0].T@pairs[i][1].T for o,i in zip(x.split(4), (1,0))]
        assert_close(layer(x), torch.cat(want))

def test_a_layer_that_mixes_up_the_images_is_noticed(runs, monkeypatch):
    good = BankLinear.forward
    monkeypatch.setattr(BankLinear, 'forward', lambda self,x: good(self, x.flip(0)).flip(0))   # rows no longer in the order of the batch
    with pytest.raises(ArithmeticError, match='keep the images of a batch apart'): AdapterBank({k:runs[k] for k in ('two','three')})

def test_one_base_weight_is_enough_to_be_refused(runs, monkeypatch):
    def load(run, *a):
        model,cfg = load_model(run)
        if run==runs['three']: model.blocks[3].mlp.fc1.weight.data[0,0] += 1e-6
        return model,cfg
    monkeypatch.setattr(bank_room, 'load_model', load)
    with pytest.raises(ValueError, match='three and two were trained on different base weights'): AdapterBank({k:runs[k] for k in ('two','three')})

def test_what_a_bank_refuses(runs, bank, tmp_path, monkeypatch):
    x = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match='two, three, head'): bank(x, 'four')
    with pytest.raises(ValueError, match='1 names for 2 images'): bank(x, ['two'])
    with pytest.raises(ValueError, match='at least one'): AdapterBank({})
    with pytest.raises(ValueError, match='no temperature'): AdapterBank(dict(un=unfinished(runs['two'], tmp_path/'un')))

def test_a_bank_takes_no_other_adapter(runs, monkeypatch):
    class Other(LoRA): pass
    monkeypatch.setitem(adapters, 'other', Other)
    model,cfg = load_model(runs['head'])
    adapt(model, {s.name:1 for s in find_sites(model)}, adapter='other')
    monkeypatch.setattr(bank_room, 'load_model', lambda *a: (model,cfg))
    with pytest.raises(ValueError, match='a bank takes LoRA on linear layers.*is a Other'): AdapterBank(dict(head=runs['head']))

class Bent(LoRA):
    "h = W0 x + s B tanh(A x), which no weight can hold"
    mergeable = False
    def update(self, x):
        A,sB = self.factors()
        return (x@A.T).tanh()@sB.T

def test_an_adapter_that_cannot_be_merged_is_exported_as_it_is(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(adapters, 'bent', Bent)
    model,cfg = load_model(runs['head'])
    adapt(model, {s.name:2 for s in find_sites(model)}, adapter='bent')
    for l in adapted_layers(model).values():
        for B in l.lora_B.values(): torch.nn.init.normal_(B, std=.1)
    plain = export_onnx(runs['head'], tmp_path/'plain.onnx')
    bent = export_onnx((model,cfg), tmp_path/'bent.onnx')      # compared with the model as it is written
    px = random_pixels(3, 32)
    assert (onnx_model(bent)(px)-onnx_model(plain)(px)).abs().max()>1e-3
    assert all(type(l).__name__.startswith('Bent') for l in adapted_layers(model).values())
