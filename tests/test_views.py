"Several views of an image: which they are, and the commands that average over them"
import pytest, torch
from PIL import Image
from torch import nn
from conftest import untrained_run
from fclora.calibration.calibrator import calibrated
from fclora.data.pixels import load_batch
from fclora.data.sources import load_images
from fclora.runs.evaluate import evaluate
from fclora.runs.folder import load_model
from fclora.runs.use import predict
from fclora.train.views import *

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return untrained_run(tmp_path_factory.mktemp('run')/'run')

def test_the_first_view_is_the_image_and_half_of_them_are_mirrored():
    x = torch.rand(2, 3, 32, 32)
    views = image_views(x)
    assert len(views)==10 and views[0] is x and all(v.shape==x.shape for v in views)
    for a,b in zip(views[:5], views[5:]): torch.testing.assert_close(a.flip(-1), b)
    assert len(image_views(x, flip=False))==5

def test_corners_are_corners():
    x = torch.zeros(1, 1, 64, 64)
    x[...,:8,:8] = 1 # seen by the upper left crop alone, at its full height
    bright = [v[...,:8,:8].mean().item() for v in crops(x, .75)]
    assert bright[0]>.95 and max(bright[1:])<.05
    torch.testing.assert_close(crops(torch.ones(1, 3, 32, 32))[2], torch.ones(1, 3, 32, 32))

def test_logits_are_averaged_and_a_mirrored_image_gets_the_same():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 4))
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(Views(net)(x), sum(net(v) for v in image_views(x))/10)
        torch.testing.assert_close(Views(net)(x), Views(net)(x.flip(-1)), atol=1e-5, rtol=1e-5)
        assert (Views(net, flip=False)(x)-Views(net, flip=False)(x.flip(-1))).abs().max()>1e-3

def test_what_training_never_mirrors_is_not_mirrored():
    assert not may_flip(dict(data=dict(name='digits'))) and not may_flip(dict(data=dict(name='pets', flip=False)))
    assert may_flip(dict(data=dict(name='pets'))) and may_flip(dict(data=dict(name='pets', flip=True)))

def test_predict_and_evaluate_take_the_flag(folder, tmp_path, capsys):
    path = tmp_path/'a.png'
    Image.fromarray(load_images('digits').test[0][0].permute(1, 2, 0).numpy()).save(path)
    model,cfg = load_model(folder)
    with torch.no_grad(): want = calibrated(Views(model, flip=False)(load_batch([path], **cfg['image'])[0]), cfg).softmax(1)[0]
    got = {o['class']:o['probability'] for o in predict(folder, path, top_k=10, tta=True, device='cpu')[0]['top']}
    assert got==pytest.approx(dict(zip(cfg['classes'], want.tolist())), abs=1e-5)
    assert got!=pytest.approx({o['class']:o['probability'] for o in predict(folder, path, top_k=10, device='cpu')[0]['top']}, abs=1e-5)
    assert evaluate(folder, tta=True, quiet=True, device='cpu')['nll']!=evaluate(folder, quiet=True, device='cpu')['nll']
