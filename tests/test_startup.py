"What a command imports: help needs no torch, and a prediction none of the libraries that only training needs"
import re, subprocess, sys
from pathlib import Path
import pytest
from fclora.cli import commands

exe = Path(sys.executable).parent/'fclora'
training = {'fastai','matplotlib','pandas','sklearn','scipy'}
slow = training|{'torch','torchvision','timm','numpy','PIL','safetensors','huggingface_hub','fastcore','fasttransform','tqdm'}

def imported(*args):
    "The command's output, and the top-level packages that it imported"
    res = subprocess.run([sys.executable, '-X', 'importtime', exe, *map(str, args)], capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-2000:]
    names = re.findall(r'^import time:.*\|\s*(\S+)$', res.stderr, re.M)
    assert 'fclora.cli' in names
    return res.stdout,{o.split('.')[0] for o in names}

@pytest.mark.parametrize('args', [('--version',), ('--help',), *[(o,'--help') for o in commands]], ids=' '.join)
def test_version_and_help_import_nothing_slow(args):
    out,names = imported(*args)
    assert out.strip() and not names&slow

def test_predict_imports_nothing_that_only_training_needs(run, folder):
    out,names = imported('predict', run[0], folder/'cat'/'0.png')
    assert '0.png' in out and {'torch','timm'}<=names and not names&training

@pytest.mark.parametrize('module', ['fclora', 'fclora.data.pixels', 'fclora.backbones', 'fclora.runs.use'])
def test_modules_on_the_way_of_predict_import_nothing_that_only_training_needs(module):
    code = f'import sys, {module}; print(*{{o.split(".")[0] for o in sys.modules}})'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert not set(res.stdout.split())&(training if module!='fclora' else slow)
