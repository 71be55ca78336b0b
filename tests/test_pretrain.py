"Small backbones from a folder: what is written, what is learned, what is refused"
import json, shutil
import pytest, torch
from safetensors.torch import load_file
from conftest import make_images
from fclora.backbones import create_backbone
from fclora.cli import main
from fclora.files import sha256
from fclora.studies.pretrain import *

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Four classes in train/ and val/"
    root = tmp_path_factory.mktemp('pretrain')
    for i,(k,n) in enumerate((('train',16), ('val',6))): make_images(root/k, ('ant','bee','cat','dog'), n, seed=i)
    return root

def test_shifts_and_mirrors_are_those_of_each_image():
    torch.manual_seed(0)
    x = torch.randint(256, (64,3,8,8), dtype=torch.uint8)
    padded,y = torch.nn.functional.pad(x.float(), [2]*4, mode='reflect').to(torch.uint8),random_crop_flip(x, pad=2)
    found = set()
    for p,out in zip(padded, y):
        views = {(i,j,f):(v.flip(-1) if f else v) for i in range(5) for j in range(5) for f in (0,1) for v in [p[:,i:i+8,j:j+8]]}
        at = [k for k,v in views.items() if torch.equal(v, out)]
        assert at
        found.add(at[0])
    assert len(found)>20 and {f for *_,f in found}=={0,1}

def test_the_schedule_rises_then_falls_to_zero():
    lrs = [cosine_warmup(t/100) for t in range(101)]
    assert lrs[0]==0 and lrs[5]==1==max(lrs) and lrs[100]==pytest.approx(0, abs=1e-12)
    assert all(a<b for a,b in zip(lrs[:5], lrs[1:6])) and all(a>b for a,b in zip(lrs[5:], lrs[6:]))

def test_the_command_writes_weights_that_finetune_takes(data, tmp_path, capsys):
    out = tmp_path/'w.safetensors'
    args = ['--minutes', '.03', '--batch-size', '16', '--cutmix', '0', '--mixup', '0', '--patch-drop', '0', '--device', 'cpu']
    assert main(['pretrain', str(data), str(out), '--classes', '::2', *args])==0
    assert 'top-1' in capsys.readouterr().out
    rec = json.loads(out.with_suffix('.json').read_text())
    assert rec['classes']==['ant','cat'] and (rec['n_train'],rec['n_val'])==(32,12) and rec['sha256']==sha256(out)
    assert rec['curve'][-1]['progress']==1 and 'top5' not in rec['curve'][-1]
    sd = load_file(out)
    assert {v.dtype for v in sd.values()}=={torch.float16} and len(sd['head.weight'])==2
    net = create_backbone('vit_pico', 7, checkpoint=out)
    assert torch.equal(net.pos_embed.half(), sd['pos_embed'])

def test_bad_folders_are_refused(data, tmp_path, capsys):
    other = shutil.copytree(data, tmp_path/'data')
    shutil.rmtree(other/'val'/'ant')
    (other/'train'/'bee'/'0.png').write_bytes(b'no image')
    for args,word in ((['--classes', '3:'], 'at least two'), (['--minutes', '0'], '--minutes must be a number'), ([], 'cannot be read')):
        assert main(['pretrain', str(other), str(tmp_path/'w.safetensors'), '--quiet', *args])==1
        assert word in capsys.readouterr().err
    (other/'train'/'bee'/'0.png').unlink()
    assert main(['pretrain', str(other), str(tmp_path/'w.safetensors'), '--quiet'])==1 and 'different classes' in capsys.readouterr().err
    assert main(['pretrain', str(tmp_path/'nowhere'), str(tmp_path/'w.safetensors')])==1 and 'needs train/ and val/' in capsys.readouterr().err
    assert not (tmp_path/'w.safetensors').exists()
