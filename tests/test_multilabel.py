"Images with several labels or none: the same way from a table to a report"
import json
import datasets, numpy as np, pytest, torch, torch.nn.functional as F
from fastai.losses import BCEWithLogitsLossFlat
from PIL import Image
from sklearn.metrics import f1_score
from torchmetrics.functional.classification import multilabel_average_precision
from fclora.backbones import create_backbone, image_config
from fclora.calibration.labels import class_temperatures, decisions, task_nll, task_table
from fclora.calibration.temperature import fit_temperature, nll
from fclora.cli import main
from fclora.data.images import rarest_label
from fclora.data.loaders import get_dls
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.runs.evaluate import evaluate
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_run, read_config
from fclora.runs.use import predict
from fclora.scorers.measure import measure
from fclora.train.imbalance import MultiLabelLoss
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import recipe

pytestmark = pytest.mark.usefixtures('one_thread')
colours = dict(red=0, green=1, blue=2)

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "90 pictures with a bright channel for each of their labels, and some with none"
    root = tmp_path_factory.mktemp('d')
    (root/'img').mkdir()
    rng,lines = np.random.default_rng(0),['path,label']
    for i in range(90):
        has = rng.random(3)<.4
        px = rng.normal(60+120*has, 30, (32,32,3)).clip(0, 255).astype('uint8')
        Image.fromarray(px).save(root/'img'/f'{i:02}.png')
        lines.append(f'img/{i:02}.png,' + ' '.join(k for k,j in colours.items() if has[j]))
    (root/'labels.csv').write_text('\n'.join(lines))
    return root/'labels.csv'

@pytest.fixture(scope='module')
def images(table): return load_images(table, 32, multi_label=True, progress=False)

@pytest.fixture(scope='module')
def dls(images): return get_dls(images, **image_config(create_backbone('vit_pico', 3)), bs=16, device='cpu')

small = dict(model='vit_pico', multi_label=True, epochs=3, batch_size=8, score_batches=2, budget=18, device='cpu')

@pytest.fixture(scope='module')
def run(table, tmp_path_factory):
    out = tmp_path_factory.mktemp('r')/'run'
    return out,finetune(str(table), out=str(out), **small)

# Data

def test_targets_are_zeros_and_ones_and_every_split_has_its_share(images):
    assert images.vocab==['blue','green','red'] and 'several labels an image' in repr(images)
    for k,(x,y) in images.splits.items():
        assert y.shape==(len(x),3) and y.dtype==torch.int64 and (y.sum(0)>0).all() and not y.any(1).all()
        bright = (x.float().mean((2,3))>120)[:,[2,1,0]]
        assert (bright==y.bool()).float().mean()>.98

def test_splits_and_limits_go_by_the_rarest_label(table):
    some = load_images(table, 32, multi_label=True, limit='40,10,10', progress=False)
    assert [len(y) for _,y in some.splits.values()]==[40,10,10]
    y = np.array([[1,0,0]]*20+[[1,1,0]]*10+[[0,0,0]]*12+[[1,1,1]]*2)
    assert np.bincount(rarest_label(y)).tolist() in ([22,10,12],[20,12,12],[20,10,14])

@pytest.mark.parametrize('text,piece', [('a;b\nb;a','0 labels'), ('a\na','1 labels')])
def test_too_few_labels(table, text, piece):
    rows = ['path,label', *(f'img/{i:02}.png,{o if piece[0]!="0" else ""}' for i,o in enumerate(text.split('\n')))]
    (table.parent/'few.csv').write_text('\n'.join(rows))
    with pytest.raises(ValueError, match=piece): load_images(table.parent/'few.csv', multi_label=True, progress=False)

def test_a_label_without_training_images_and_options_that_do_not_go_together(table):
    text = 'path,label,split\n' + ''.join(f'img/{i:02}.png,{"a b"[:3*(i%2)]},train\n' for i in range(12)) + 'img/12.png,c,test\nimg/13.png,a,test\n'
    (table.parent/'lost.csv').write_text(text)
    with pytest.raises(ValueError, match='has the label c'): load_images(table.parent/'lost.csv', multi_label=True, progress=False)
    with pytest.raises(ValueError, match='classes is for one label'): load_images(table, multi_label=True, classes=':2', progress=False)
    with pytest.raises(ValueError, match='multi_label is for a table or a dataset'): load_images('digits', multi_label=True)

def test_a_dataset_with_lists_of_labels(images, tmp_path):
    names = datasets.ClassLabel(names=images.vocab)
    x,y = images.train
    data = dict(image=[Image.fromarray(o.permute(1, 2, 0).numpy()) for o in x], label=[o.nonzero()[:,0].tolist() for o in y])
    datasets.Dataset.from_dict(data, datasets.Features(image=datasets.Image(), label=datasets.List(names))).save_to_disk(tmp_path/'d')
    found = load_images(tmp_path/'d', multi_label=True, progress=False)
    assert found.vocab==images.vocab and sum(y.sum(0) for _,y in found.splits.values()).tolist()==y.sum(0).tolist()
    with pytest.raises(ValueError, match='--multi-label'): load_images(tmp_path/'d', progress=False)

def test_batches_can_be_shown(dls):
    x,y = dls.train_ds[0]
    assert list(dls.train_ds.decode((x, y))[1])==[dls.vocab[i] for i in y.nonzero()[:,0]]

# Loss

@pytest.mark.parametrize('eps', [0.,.2])
def test_the_loss_is_binary_cross_entropy_with_targets_towards_a_half(eps):
    z,y = torch.randn(8, 3),torch.randint(2, (8, 3))
    soft = y.float()*(1-eps)+.5*eps
    assert MultiLabelLoss(eps)(z, y).item()==pytest.approx(F.binary_cross_entropy_with_logits(z, soft).item())
    if not eps: assert MultiLabelLoss()(z, y).item()==pytest.approx(BCEWithLogitsLossFlat()(z, y.float()).item())

def test_cutmix_mixes_the_targets(dls):
    learn = fclora_learner(dls, create_backbone('vit_pico', 3), 'head', recipe(epochs=1, cutmix=1., smoothing=.1))
    mix = learn.cut_mix
    learn._split(dls.train.one_batch()); learn.model.train(); learn.training = True
    mix.before_train(); mix.before_batch()
    z = learn.model(learn.x)
    got,lam = learn.loss_func(z, *learn.yb).item(),mix.lam.item()
    mix.after_train()
    mixed = lam*learn.yb[0].as_subclass(torch.Tensor).float()+(1-lam)*mix.yb1[0].as_subclass(torch.Tensor).float()
    assert got==pytest.approx(F.binary_cross_entropy_with_logits(z, mixed*.9+.05).item(), rel=1e-5) and 0<lam<1

def test_scores_come_from_the_bernoulli_likelihood(dls):
    torch.manual_seed(0)
    model = create_backbone('vit_pico', 3)
    torch.nn.init.normal_(model.head.weight, std=.1)
    sites,batch = find_sites(model)[:3],dls.valid.one_batch()
    got = measure(model, [batch], sites, ['fisher'])['fisher']
    x,y = [o.as_subclass(torch.Tensor) for o in batch]
    F.binary_cross_entropy_with_logits(model.eval()(x), y.float()).backward()
    grad = model.get_submodule(sites[0].path).weight.grad[sites[0].rows]
    assert got[sites[0].name]==pytest.approx(grad.square().mean().item(), rel=1e-4)

def test_weights_and_the_sampler_are_refused(dls):
    for o in (dict(class_weights='auto'), dict(balanced=True)):
        with pytest.raises(ValueError, match='one label an image'): fclora_learner(dls, create_backbone('vit_pico', 3), 'head', recipe(**o))

# Calibration

def made(n=400, c=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = 2*torch.randn(n, c, generator=g)
    return z*torch.tensor([1.,2.,4.]),(torch.rand(n, c, generator=g)<z.sigmoid()).long()

def test_numbers_are_those_of_other_libraries():
    z,y = made()
    table = task_table(z, y, [1.,2.,4.], n_boot=10)
    assert table['mean_average_precision']==pytest.approx(multilabel_average_precision(z.double().sigmoid(), y, 3, average='macro').item(), abs=1e-5)
    assert table['macro_f1']==pytest.approx(f1_score(y, z>0, average='macro'))
    assert table['nll_raw']==pytest.approx(F.binary_cross_entropy_with_logits(z, y.float()).item(), rel=1e-5)
    assert table['nll']==pytest.approx(F.binary_cross_entropy_with_logits(z/torch.tensor([1.,2.,4.]), y.float()).item(), rel=1e-5)
    assert table['accuracy']==pytest.approx(((z>0)==y.bool()).float().mean().item()) and table['n']==400
    assert table['exact_match']==pytest.approx(((z>0)==y.bool()).all(1).float().mean().item())

def test_each_label_has_the_temperature_of_its_own_problem():
    z,y = made()
    for k,T in enumerate(class_temperatures(z, y)): assert T==pytest.approx(fit_temperature(*decisions(z[:,[k]], y[:,[k]])))
    y[:,2] = 0; y[:5,2] = 1
    assert class_temperatures(z, y)[2]==pytest.approx(fit_temperature(*decisions(z, y)))   # five images are too few
    assert task_nll(*made())<nll(*decisions(*made()))

# The whole way

def test_a_run_learns_is_saved_and_found_again(run, table):
    out,r = run
    t = r.metrics['test']
    assert read_config(out)['task']=='multi' and len(r.config['T'])==3 and t['n']==len(r.targs)==18
    assert t['mean_average_precision']>.8 and t['mean_average_precision']==pytest.approx(
        multilabel_average_precision(r.logits, r.targs, 3, average='macro').item(), abs=1e-5)
    assert json.loads((out/'metrics.json').read_text())['test']['T']==r.config['T']
    back = load_run(out)
    dls = get_dls(load_images(table, 32, multi_label=True, progress=False), **back.config['image'], device='cpu')
    assert torch.allclose(get_logits(back.model, dls[2])[0], r.logits, atol=1e-4)
    assert back.config['T']==pytest.approx(class_temperatures(*get_logits(back.model, dls.valid)), rel=1e-3)
    assert evaluate(str(out), quiet=True)['mean_average_precision']==pytest.approx(t['mean_average_precision'])

def test_the_table_and_the_report_speak_of_labels(run):
    out,r = run
    assert 'mean average precision' in repr(r) and 'by label' in repr(r)
    page = (out/'report.html').read_text(encoding='utf-8')
    assert 'Labels' in page and page.count('<img')>=2 and 'mean average precision' in page

def test_predict_gives_the_probability_of_every_label(run, table):
    out,r = run
    rows = predict(str(out), *[str(table.parent/'img'/f'{i:02}.png') for i in range(8)], top_k=3, device='cpu')
    for o in rows:
        probs = {t['class']:t['probability'] for t in o['top']}
        assert set(probs)==set(colours) and sorted(k for k,p in probs.items() if p>=.5)==sorted(o['labels'])

@pytest.mark.parametrize('method', ['head','full'])
def test_other_regimes_train_too(table, tmp_path, method):
    r = finetune(str(table), method=method, out=str(tmp_path/'run'), quiet=True, **dict(small, epochs=1, probe=method=='head'))
    assert r.metrics['test']['mean_average_precision']>.3

@pytest.mark.parametrize('args', [['merge','RUN','x','--calibrated'], ['export','RUN','x.onnx'], ['cut','RUN','--budget','9'], ['peft','RUN','x']])
def test_commands_that_know_one_label_only_say_so(run, capsys, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    assert main([str(run[0]) if o=='RUN' else o for o in args])==1
    err, = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fclora: error')]
    assert 'is for runs with one label an image' in err and list(tmp_path.iterdir())==[]
