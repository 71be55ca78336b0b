"The probe, the start of the head from it, the best epoch, and products in 16 bits"
import json
from copy import deepcopy
from unittest.mock import patch
import pytest, timm, torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.testing import assert_close
from fclora.adapt import current_ranks
from fclora.backbones import create_backbone, image_config
from fclora.calibration.temperature import nll
from fclora.data.loaders import get_dls, score_dl
from fclora.data.sources import load_images
from fclora.find import find_sites
from fclora.make_plan import make_plan
from fclora.precision import autocast, chosen_precision
from fclora.probes.depth import block_features, depth_profile
from fclora.probes.features import batch_features, head_features, head_linears
from fclora.probes.linear import fit_linear, fit_probe, fold_numbers, right, soft_probe, spread, start_head
from fclora.probes.start import first_look, soft_start
from fclora.planning import plan_model
from fclora.calibration.labels import task_nll
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_model, load_run
from fclora.train.learner import fclora_learner
from fclora.train.logits import get_logits
from fclora.train.recipe import bases, complete_recipe, recipe

able = lambda: dict(avx512_bf16=True)
unable = lambda: dict(avx2=True)
few = dict(limit='160,80,80', budget=36, score_batches=2, quiet=True)

@pytest.fixture(scope='module')
def images(): return load_images('digits', limit='160,80,80')

@pytest.fixture
def dls(images): return get_dls(images, **image_config(create_backbone('vit_pico', 10)), bs=32, device='cpu')

def pico(): return create_backbone('vit_pico', 10)
def blobs(n=90, c=3, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%c
    return torch.randn(c, d, generator=g)[y]*2+torch.randn(n, d, generator=g)*torch.linspace(.1, 30, d)+5,y

# --- the probe

@pytest.mark.parametrize('c,strength', [(4,.5), (3,.01), (3,5.)])
def test_regression_is_that_of_sklearn(c, strength):
    X,y = blobs(c=c)
    mean,std = spread(X[:,None])
    Z = ((X[:,None]-mean)/std)[:,0]
    w,b = fit_linear(Z, y, c, strength)
    theirs = LogisticRegression(C=1/(strength*len(y)), tol=1e-8, max_iter=2000).fit(Z, y)
    assert_close((Z@w.T+b).softmax(1), torch.tensor(theirs.predict_proba(Z)).float(), atol=2e-3, rtol=1e-2)

def test_rows_in_parts_give_the_same_regression():
    X,y = blobs()
    Z = (X-X.mean(0))/X.std(0)
    for a,b in zip(fit_linear(Z, y, 3, .1), fit_linear(Z, y, 3, .1, rows=7)): assert_close(a, b, atol=1e-3, rtol=1e-3)

def test_several_labels_and_a_single_logit():
    X,y = blobs()
    several = torch.stack([y==0, y!=2], 1).float()
    w,b = fit_linear(X, several, 2, 1e-3)
    assert right(X@w.T+b, several)>.9
    soft = soft_probe(X[:,None], several[:,:1], 1)
    assert soft.weight.shape==(1,1,8) and right(soft(X[:,None]), several[:,:1])>.6

def test_folds_share_out_every_class():
    y = torch.tensor([0]*10+[1]*5)
    fold = fold_numbers(y, 5)
    for k in range(5): assert (y[fold==k]==0).sum()==2 and (y[fold==k]==1).sum()==1

def test_a_probe_knows_what_it_can_do_on_new_images():
    (X,y),(X2,y2) = blobs(300, seed=0),blobs(300, seed=0)
    probe = fit_probe(X[:150,None], y[:150], 3)
    assert abs(probe.accuracy-right(probe(X2[150:,None]), y2[150:]))<.1

def test_a_constant_feature_does_no_harm():
    X,y = blobs()
    X[:,0] = 4.
    assert torch.isfinite(fit_probe(X[:,None], y, 3)(X[:,None])).all()

# --- features of any classifier

@pytest.mark.parametrize('name', ['vit_tiny_patch16_224','deit_tiny_distilled_patch16_224'])
def test_the_head_computes_the_logits_of_the_probe(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, img_size=32).eval()
    x,y = torch.randn(12, 3, 32, 32),torch.arange(12)%3
    with torch.no_grad():
        X,_ = batch_features(net, (x,y))
        probe = fit_probe(X, y, 3)
        assert_close(start_head(net, probe)(x), probe(X), atol=1e-3, rtol=1e-3)

def test_a_language_model_starts_from_its_last_token():
    from transformers import LlamaConfig, LlamaForSequenceClassification
    torch.manual_seed(0)
    net = LlamaForSequenceClassification(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                     num_labels=3, pad_token_id=0)).eval()
    ids = torch.randint(1, 50, (6,7))
    ids[0,4:] = 0
    batch = dict(input_ids=ids, attention_mask=(ids>0).long(), labels=torch.arange(6)%3)
    with torch.no_grad():
        X,y = batch_features(net, batch)
        hidden = net.model(input_ids=ids, attention_mask=batch['attention_mask']).last_hidden_state
    assert_close(X[:,0], hidden[torch.arange(6), (ids>0).sum(1)-1], atol=1e-5, rtol=1e-4)

def test_a_head_without_a_linear_layer_is_refused():
    net = nn.ModuleDict(dict(body=nn.Linear(3, 8), head=nn.Conv2d(8, 2, 1)))
    with pytest.raises(ValueError, match='head=fresh'): head_linears(net)

def test_features_leave_the_model_as_it_was(dls):
    net = pico().train()
    before = deepcopy(net.state_dict())
    X,y = head_features(net, score_dl(dls))
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert X.shape==(len(y),1,128) and all(p.requires_grad for p in net.parameters())

# --- the start

def test_a_soft_start_points_in_the_right_direction(dls):
    net = pico()
    X,y = head_features(net, dls.valid)
    before = right(soft_probe(X, y, 10)(X)*0, y)
    soft_start(net, dls)
    logits,targs = get_logits(net, dls.valid)
    assert right(logits, targs)>before+.2 and nll(logits, targs)<2.3

def test_scores_see_the_start(dls):
    fresh,started = pico(),soft_start(pico(), dls)
    a,b = (plan_model(m, dls, budget=54, score_batches=4) for m in (fresh,started))
    assert a.ranks!=b.ranks and a.metrics['cov']==pytest.approx(b.metrics['cov']) # activations do not see the head

def test_blocks_are_probed_in_order(dls):
    net = pico()
    features,targs = block_features(net, score_dl(dls))
    assert list(features)==list(range(6)) and all(len(x)==len(targs) for x in features.values())
    assert depth_profile(net, score_dl(dls), 10).accuracy.between(0, 1).all()

# --- the probe is never lost to

def test_where_training_does_not_help_the_probe_is_kept(tmp_path, capsys):
    run = finetune('digits', epochs=1, lr=1e-8, head_lr=1e-8, out=str(tmp_path/'r'), **few)
    m = run.metrics
    assert m['epoch_kept']==0 and m['total_rank']==0 and current_ranks(run.model)=={}
    assert m['test']['accuracy']==pytest.approx(m['probe_accuracy']) and m['valid']['nll']<=m['probe_valid_nll']+1e-4
    back = load_run(tmp_path/'r')
    assert_close(get_logits(back.model, get_dls(load_images('digits', limit=few['limit']), **back.config['image'], device='cpu')[2])[0], run.logits)
    assert 'the probe kept' in capsys.readouterr().out

def test_full_fine_tuning_that_does_not_help_gives_the_backbone_back(tmp_path):
    run = finetune('digits', 'full', epochs=1, lr=.5, head_lr=.5, out=str(tmp_path/'r'), **few)
    assert run.metrics['epoch_kept']==0
    own = pico().state_dict()
    for k,v in run.model.state_dict().items():
        if not k.startswith('head.'): assert torch.equal(v, own[k]), k

@pytest.mark.parametrize('method', ['fclora','uniform','full','head'])
def test_every_method_is_at_least_the_probe_on_validation_images(method, tmp_path):
    m = finetune('digits', method, epochs=2, out=str(tmp_path/'r'), **few).metrics
    assert m['valid']['nll']<=m['probe_valid_nll']+2e-3

def test_the_best_epoch_is_what_is_stored(tmp_path):
    out = tmp_path/'r'
    run = finetune('digits', 'uniform', epochs=3, lr=.05, probe=False, out=str(out), **few)
    kept = run.metrics['epoch_kept']
    assert 1<=kept<=3
    stored,_ = load_model(out)
    dls = get_dls(load_images('digits', limit=few['limit']), **run.config['image'], device='cpu')
    assert task_nll(*get_logits(stored, dls.valid))==pytest.approx(run.metrics['valid']['nll'], abs=1e-3)

# --- the papers' recipe

def test_the_papers_recipe_is_theirs():
    r = recipe(base='paper')
    assert (r['head'], r['keep'], r['cutmix'], r['smoothing'], r['schedule'], r['epochs'])==('fresh','last',1.,.1,'cosine',10)
    assert recipe(base='paper', cutmix=0.)['cutmix']==0 and recipe()['head']=='probe'
    with pytest.raises(ValueError, match='auto, paper'): recipe(base='mine')

def test_the_papers_recipe_is_one_flag(tmp_path):
    run = finetune('digits', 'uniform', recipe='paper', epochs=1, out=str(tmp_path/'r'), **few)
    r = run.config['recipe']
    assert (r['head'], r['keep'], r['cutmix'])==('fresh','last',1.) and run.metrics['epoch_kept'] is None

# --- 16 bits

@pytest.mark.parametrize('capable', [able,unable])
def test_precision_follows_the_processor(capable, tmp_path):
    net = timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32)
    with patch('torch.cpu.get_capabilities', capable):
        assert chosen_precision('auto', net)==('bf16' if capable is able else 'fp32')
        assert complete_recipe(recipe(), net, 'adapters', 10)['precision']==chosen_precision('auto', net)

def test_without_instructions_everything_works_in_32_bits(dls):
    net = timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32)
    with patch('torch.cpu.get_capabilities', unable):
        plan = plan_model(net, dls, 'fclora', budget=72, score_batches=1)
        learn = fclora_learner(dls, net, plan, recipe(epochs=1))
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
        assert 'auto_mixed_precision' not in [cb.name for cb in learn.cbs]
        with pytest.raises(ValueError, match='no instructions'): learn.to_bf16()

@pytest.mark.parametrize('method', ['fclora','full'])
def test_a_run_in_16_bits_ends_near_one_in_32(method, dls):
    def losses(precision):
        torch.manual_seed(0)
        net = soft_start(pico(), dls)
        plan = method if method=='full' else make_plan('vit_pico', find_sites(net), method='uniform', budget=54)
        with patch('torch.cpu.get_capabilities', able):
            learn = fclora_learner(dls, net, plan, recipe(epochs=10, precision=precision))
            with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
        return torch.tensor(learn.recorder.losses[-50:]),learn
    (a,learn),(b,_) = losses('bf16'),losses('fp32')
    assert len(a)==50 and (a-b).abs().mean()<.06
    assert {p.dtype for p in learn.model.parameters()}=={torch.float32}

def test_scores_in_16_bits_give_nearly_the_same_ranks(dls):
    net = soft_start(pico(), dls)
    with patch('torch.cpu.get_capabilities', able):
        a,b = (plan_model(net, dls, budget=100, score_batches=4, precision=p) for p in ('bf16','fp32'))
    assert sum(abs(a.ranks[n]-b.ranks[n]) for n in a.ranks)/2<=5

def test_logits_are_32_bits_fine(dls):
    net = soft_start(pico(), dls).eval()
    with patch('torch.cpu.get_capabilities', able): logits,_ = get_logits(net, dls.valid, precision='bf16')
    assert logits.dtype==torch.float32 and not torch.equal(logits, logits.bfloat16().float())

def test_a_run_says_its_precision(tmp_path):
    run = finetune('digits', 'uniform', epochs=1, probe=False, precision='fp32', out=str(tmp_path/'r'), **few)
    assert json.loads((tmp_path/'r'/'fclora.json').read_text())['recipe']['precision']==run.config['recipe']['precision']=='fp32'
