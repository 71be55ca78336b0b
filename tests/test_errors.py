"Every mistake a user can make: one clear line, exit status 1, nothing lost"
import json, shutil
from pathlib import Path
import pytest, torch
from PIL import Image
from conftest import QUICK, make_images
from fclora import backbones
from fclora.cli import main
from fclora.files import sha256
from fclora.ranges import ranges
from fclora.runs import finetune, folder as run_folder

def fails(capsys, *args, status=1):
    "Run, and return the one line on stderr"
    capsys.readouterr()
    assert main([str(o) for o in args])==status
    err = [l for l in capsys.readouterr().err.splitlines() if l.startswith('fclora:')]
    assert len(err)==1 and 'Traceback' not in err[0]
    return err[0]

def tune(*args, model='vit_pico'): return ['finetune', *QUICK, *args, *(['--model', model] if model else [])]

def test_no_such_folder(capsys): assert 'no folder and no data set' in fails(capsys, *tune('no/such/folder'))
def test_misspelt_data_set(capsys): assert 'did you mean digits' in fails(capsys, *tune('digit'))
def test_no_images(capsys, tmp_path): assert 'no images' in fails(capsys, *tune(tmp_path))
def test_one_class(capsys, tmp_path): assert 'only one class' in fails(capsys, *tune(make_images(tmp_path/'d', ('cat',))))

def test_class_with_one_image(capsys, tmp_path):
    d = make_images(tmp_path/'d')
    for f in list((d/'dog').iterdir())[1:]: f.unlink()
    assert 'dog (1)' in fails(capsys, *tune(d))

def test_corrupt_image_is_named_and_can_be_skipped(capsys, tmp_path):
    d = make_images(tmp_path/'d', n=8)
    data = (d/'cat'/'0.png').read_bytes()
    (d/'cat'/'0.png').write_bytes(data[:len(data)//2])
    msg = fails(capsys, *tune(d))
    assert '0.png' in msg and '--skip-bad' in msg
    assert main([str(o) for o in tune(d, '--skip-bad', '--batch-size', 4, '--out', tmp_path/'run')])==0

def test_class_folders_differ(capsys, tmp_path):
    make_images(tmp_path/'d'/'train'); make_images(tmp_path/'d'/'test', ('cat','bird'))
    msg = fails(capsys, *tune(tmp_path/'d'))
    assert 'bird' in msg and 'dog' in msg

def test_unknown_model_and_weights(capsys):
    assert 'vit_base_patch16_224' in fails(capsys, *tune('digits', model='vit_bas_patch16_224'))
    assert 'fb_in1k' in fails(capsys, *tune('digits', model='deit_tiny_patch16_224.fb'))
    assert 'no checkpoint' in fails(capsys, *tune('digits', '--checkpoint', 'no.pth'))

def test_no_network(capsys, monkeypatch, folder):
    monkeypatch.setattr(backbones, 'is_offline', lambda: True)
    monkeypatch.setattr(backbones, 'try_to_load_from_cache', lambda *a: None)
    msg = fails(capsys, *tune(folder, model=None))
    assert '--model vit_pico' in msg and '--checkpoint' in msg

def test_download_that_fails_half_way(capsys, monkeypatch, folder):
    monkeypatch.setattr(backbones, 'is_offline', lambda: False)
    def broken(*a, **k): raise OSError('connection reset')
    monkeypatch.setattr(backbones.timm, 'create_model', broken)
    assert 'connection reset' in fails(capsys, *tune(folder, model='deit_tiny_patch16_224'))

def test_checkpoint_that_is_no_state_dict(capsys, tmp_path, folder):
    torch.save(torch.zeros(3), tmp_path/'t.pth')
    assert 'holds a Tensor' in fails(capsys, *tune(folder, '--checkpoint', tmp_path/'t.pth'))

def test_pickled_checkpoint_is_refused(capsys, tmp_path, folder):
    class Evil:
        def __reduce__(self): return (exec, ('raise SystemExit(9)',))
    torch.save(Evil(), tmp_path/'evil.pth')
    assert 'weights alone' in fails(capsys, *tune(folder, '--checkpoint', tmp_path/'evil.pth'))

def test_model_without_sites(capsys): assert 'has no q, k, v site' in fails(capsys, *tune('digits', '--no-pretrained', model='test_convnext'))
def test_budget_out_of_range(capsys):
    for b in (17, 289): assert '18..288' in fails(capsys, *tune('digits', '--budget', b))
def test_bad_values(capsys):
    for args,word in ((('--epochs', 0), 'epochs'), (('--schedule', 'linear'), 'onecycle'), (('--method', 'lora'), 'uniform'), (('--weights', 'fisher'), 'fisher=.6'),
                      (('--weights', 'hessian=1'), 'explained_var'), (('--init', 'svd'), 'orthogonal'), (('--normaliser', 'z'), 'minmax'), (('--unit', 'mb'), 'params')):
        assert word in fails(capsys, *tune('digits', *args))
def test_loss_is_nan(capsys, monkeypatch, tmp_path):
    args = tune('digits', '--lr', '1e30', '--clip', 0, '--out', tmp_path/'r')
    assert '--lr must be' in fails(capsys, *args)
    monkeypatch.setitem(ranges, 'lr', (0., 1e38)) # so that training meets it
    assert 'a lower learning rate' in fails(capsys, *args)
def test_zero_head(capsys): assert 'the head is probably all zeros' in fails(capsys, *tune('digits', '--head', 'fresh', '--head-std', 0))

def test_plan_of_another_model_or_broken(capsys, tmp_path):
    assert main(['score', '--method', 'uniform', '--quiet', '--out', str(tmp_path/'p.json')])==0
    assert 'made for vit_pico' in fails(capsys, *tune('digits', '--no-pretrained', '--size', 32, '--plan', tmp_path/'p.json', model='test_vit'))
    plan = json.loads((tmp_path/'p.json').read_text())
    plan['sites'][0]['rank'] = 129
    (tmp_path/'big.json').write_text(json.dumps(plan))
    assert '0..128' in fails(capsys, *tune('digits', '--plan', tmp_path/'big.json'))
    (tmp_path/'half.json').write_text((tmp_path/'p.json').read_text()[:200])
    assert 'is not a Plan' in fails(capsys, *tune('digits', '--plan', tmp_path/'half.json'))
    assert 'no Plan at' in fails(capsys, *tune('digits', '--plan', tmp_path/'none.json'))

def test_output_folder_not_empty(capsys, tmp_path):
    (tmp_path/'mine.txt').write_text('keep')
    assert '--force' in fails(capsys, *tune('digits', '--out', tmp_path))
    assert (tmp_path/'mine.txt').read_text()=='keep'

def test_force_removes_nothing_when_other_options_are_wrong(capsys, copy, tmp_path):
    before = {f.name:f.read_bytes() for f in copy.iterdir()}
    for args in (('digits', '--budget', 5), (tmp_path/'none',), ('digits', '--head', 'fresh', '--head-std', 0)): fails(capsys, *tune(*args, '--out', copy, '--force'))
    assert {f.name:f.read_bytes() for f in copy.iterdir()}==before

def test_out_of_gpu_memory(capsys, monkeypatch):
    def full(*a, **k): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(finetune, 'fclora_learner', full)
    assert '--batch-size 64' in fails(capsys, *tune('digits'))

def test_unexpected_error_is_one_line_too(capsys, monkeypatch):
    def bug(*a, **k): raise KeyError('x')
    monkeypatch.setattr(finetune, 'prepare', bug)
    assert 'KeyError' in fails(capsys, *tune('digits'))
    main(tune('digits', '--debug'))
    assert 'Traceback' in capsys.readouterr().err

def test_unknown_command(capsys): assert 'finetune' in fails(capsys, 'train', status=2)

@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run[0], tmp_path/'copy')
    return tmp_path/'copy'

def edit(folder, **changes):
    "Change entries, and drop the digest that would notice it, as in folders of earlier versions"
    d = json.loads((folder/'fclora.json').read_text())
    d.pop('digest', None)
    (folder/'fclora.json').write_text(json.dumps(dict(d, **changes)))

def test_damaged_run_folders(capsys, copy, tmp_path):
    check = lambda: fails(capsys, 'evaluate', copy)
    assert 'no run folder' in fails(capsys, 'evaluate', tmp_path/'none')
    whole = (copy/'fclora.json').read_bytes()
    for changes,word in ((dict(format=3), 'newer fclora'), (dict(adapter='mine'), "unknown adapter 'mine'"), (dict(scaling={}), 'scaling has no multiplier'), (dict(ranks=None), 'ranks must be'), (dict(T=-1), 'T must be'), (dict(T='nan'), 'T must be'), (dict(method='magic', ranks={}), 'method must be'),
                         (dict(model=dict(name='../../../etc/passwd', pretrained=True, checkpoint=None, one_head=False, size=None)), 'timm has no model'),
                         (dict(classes=['a','b'], probe=[[0.,0.]]*2), 'does not fit'), (dict(classes=['a','b']), 'two lists of 2 numbers'), (dict(ranks={'blocks.0.attn.qkv.q':10**9}), '0..128'), (dict(ranks={'../x':1}, scaling={'../x':1.}), 'has no site'),
                         (dict(image=dict(size=10**9, mean=[0]*3, std=[1]*3)), 'image: size must be'), (dict(probe=[[0.]*10]*2), 'not reproduced')):
        edit(copy, **changes)
        assert word in check()
        (copy/'fclora.json').write_bytes(whole)
    (copy/'fclora.json').write_bytes(whole[:100])
    assert 'damaged' in check()
    (copy/'fclora.json').write_bytes(whole)
    w = (copy/'adapter.safetensors').read_bytes()
    (copy/'adapter.safetensors').write_bytes(w[:-50])
    assert 'damaged' in check()
    (copy/'adapter.safetensors').unlink()
    assert 'lost its adapter.safetensors' in check()
    (copy/'fclora.json').unlink()
    assert 'not a run folder' in check()

def test_hash_does_not_hide_a_broken_weights_file(capsys, copy):
    (copy/'adapter.safetensors').write_bytes(b'\xff'*64)
    edit(copy, weights_sha256=sha256(copy/'adapter.safetensors'))
    assert 'damaged' in fails(capsys, 'evaluate', copy)

def test_other_classes_than_the_run(capsys, copy, folder): assert 'cat' in fails(capsys, 'evaluate', copy, folder)
def test_predict_without_images(capsys, copy, tmp_path):
    assert 'no image' in fails(capsys, 'predict', copy)
    assert '--format' in fails(capsys, 'predict', copy, 'x.png', '--format', 'xml')

def test_nothing_is_left_half_written(monkeypatch, run, tmp_path):
    r = run_folder.load_run(run[0])
    out = run_folder.save_run(r, tmp_path/'r')
    before = (out/'adapter.safetensors').read_bytes()
    def killed(path, data):
        with open(path, 'wb') as f: f.write(data[:len(data)//2])
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_bytes', killed)
        with pytest.raises(KeyboardInterrupt): run_folder.save_run(r, out)
    assert (out/'adapter.safetensors').read_bytes()==before and not [o for o in out.iterdir() if o.suffix=='.tmp']
