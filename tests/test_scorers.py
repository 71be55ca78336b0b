"Scores against naive loops and float64 numpy; sums of several processes; the model untouched; bad input; the composite"
import random
from threading import Thread
from copy import deepcopy
from types import SimpleNamespace
import numpy as np, pytest, timm, torch
from torch import nn
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader,TensorDataset
from fclora.adapt import *
from fclora.find import *
from fclora.sites import *
from fclora.scorers.composite import *
from fclora.scorers.activations import *
from fclora.scorers.gradients import *
from fclora.scorers.measure import *
from fclora.scorers.warmup import *
from fclora.scorers.watch import *

pytestmark = pytest.mark.usefixtures('one_thread')

def vit(seed=0, **kw):
    torch.manual_seed(seed)
    return timm.create_model('test_vit', **(dict(img_size=32, patch_size=8, num_classes=4, depth=3) | kw))

papers = ('fisher','grad','cov')
all_four = (*papers,'sample_fisher')

def measure_all(model, batches, sites=None, **kw): return measure(model, batches, sites, all_four, **kw)

def make_batches(sizes=(4,4,3,2), seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 32, 32, generator=g), torch.randint(4, (n,), generator=g)) for n in sizes]

def close(a, b, rtol=1e-4):
    assert list(a)==list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=rtol)

def grads(model, batch, sites, loss_func):
    "Each site's weight gradient, from plain backward"
    model.zero_grad()
    batch_loss(model, batch, loss_func).backward()
    return {s.name:site_weight(model, s).grad[s.rows].double() for s in sites}

def naive(model, batches, sites=None, loss_func=F.cross_entropy):
    "Batch Fisher and mean |gradient| from plain backward"
    model,sites = deepcopy(model).eval().requires_grad_(True),sites or find_sites(model)
    gs = [grads(model, b, sites, loss_func) for b in batches]
    mean = lambda f: {s.name:float(np.mean([f(g[s.name]).mean().item() for g in gs])) for s in sites}
    return dict(fisher=mean(torch.square), grad=mean(torch.abs))

def singly(model, batches, **kw): return naive(model, [tuple(o[i:i+1] for o in b) for b in batches for i in range(len(b[-1]))], **kw)['fisher']

@pytest.fixture
def model(): return vit()
@pytest.fixture
def batches(): return make_batches()
def raises(piece): return pytest.raises(ValueError, match=piece)

# --- against naive loops

losses = dict(ce=F.cross_entropy, smooth=nn.CrossEntropyLoss(label_smoothing=.1), mse=lambda o,y: F.mse_loss(o, F.one_hot(y, 4).float()),
              bce=lambda o,y: F.binary_cross_entropy_with_logits(o, F.one_hot(y, 4).float()))

@pytest.mark.parametrize('loss', losses)
def test_all_gradient_scores_equal_naive_loops(model, batches, loss):
    stats,kw = measure_all(model, batches, loss_func=losses[loss]),dict(loss_func=losses[loss])
    want = naive(model, batches, **kw)
    close(stats['fisher'], want['fisher']); close(stats['grad'], want['grad'])
    close(stats['sample_fisher'], singly(model, batches, **kw))
    assert len(set(stats['sample_fisher'].values()))==9   # slices of one layer are told apart

def test_other_kinds_of_sites(model, batches):
    sites = find_sites(model, kinds=('proj','fc1','fc2','k'))
    stats = measure_all(model, batches, sites)
    close(stats['fisher'], naive(model, batches, sites)['fisher'])
    close(stats['sample_fisher'], singly(model, batches, sites=sites))

def test_gora_is_the_weight_times_the_mean_gradient(model, batches):
    sites,stats = find_sites(model),measure(model, batches, scorers=['gora'])
    for s in sites:
        w = site_weight(model, s)
        mean = sum(torch.autograd.grad(F.cross_entropy(model(x), y), w)[0] for x,y in batches)/len(batches)
        assert stats['gora'][s.name]==pytest.approx((w*mean)[s.rows].abs().mean().item(), rel=1e-4)

def test_scorers_do_not_disturb_one_another(model, batches):
    together = measure(model, batches, scorers=[*scorers, InputPCA()])
    assert list(together)==[*scorers, 'input_pca']
    for name in scorers: close(measure(model, batches, scorers=[name])[name], together[name], rtol=1e-6)

def test_batch_and_sample_fisher_differ_for_batches_and_agree_for_single_images(model, batches):
    stats = measure_all(model, batches)
    assert all(stats['sample_fisher'][n]>stats['fisher'][n] for n in stats['fisher'])   # averaging gradients shrinks them
    one = measure_all(model, make_batches([1]*5))
    close(one['sample_fisher'], one['fisher'])

class Grid(nn.Module):
    "Inputs with four dims, and a linear that is called twice, once on windows that mix into the batch"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q,self.head = nn.Linear(6, 6),nn.Linear(6, 4)
    def forward(self, x): # (b, 2, 4, 6)
        x = self.q(x).tanh()
        x = self.q(x.reshape(-1, 4, 6)).reshape(x.shape)
        return self.head(x.mean((1,2)))

class Windows(nn.Module):
    "As Swin: the first linear sees windows as a longer batch; returns an output with a loss, as Hugging Face models do"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query,self.classifier = nn.Linear(6, 6),nn.Linear(6, 4)
    def forward(self, pixel_values, labels):
        x = self.query(pixel_values.reshape(-1, 4, 6)).tanh().reshape(len(labels), -1, 6)
        return SimpleNamespace(loss=F.cross_entropy(self.classifier(x.mean(1)), labels))

def grids(sizes=(3,5), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 2, 4, 6, generator=g), torch.randint(4, (n,), generator=g)) for n in sizes]

def test_a_linear_called_twice_on_inputs_with_more_than_three_dims():
    stats = measure_all(Grid(), grids())
    close(stats['fisher'], naive(Grid(), grids())['fisher'])
    close(stats['sample_fisher'], singly(Grid(), grids()))

def test_dict_batches_of_a_model_that_returns_its_loss():
    as_dict = lambda bs: [dict(pixel_values=x, labels=y) for x,y in bs]
    stats = measure_all(Windows(), as_dict(grids()))
    close(stats['fisher'], naive(Windows(), as_dict(grids()))['fisher'])
    singles = [dict(pixel_values=x[i:i+1], labels=y[i:i+1]) for x,y in grids() for i in range(len(y))]
    close(stats['sample_fisher'], naive(Windows(), singles)['fisher'])

# --- covariance

def test_covariance_trace_equals_float64_numpy_on_all_tokens(model, batches):
    with torch.no_grad(): model.blocks[0].attn.qkv.bias += 30*torch.randn(192)
    cov,sites = measure(model, batches)['cov'],find_sites(model)
    outs = {s.path:[] for s in sites}
    for p,o in outs.items():
        model.get_submodule(p).register_forward_hook(lambda m,i,y,o=o: o.append(y.double().numpy().reshape(-1, 192)))
    with torch.no_grad(): [model.eval()(x) for x,_ in batches]
    tokens = {p:np.concatenate(o) for p,o in outs.items()}
    assert tokens[sites[0].path].shape==(13*17, 192)
    close(cov, {s.name:np.trace(np.cov(tokens[s.path][:,s.rows].T)) for s in sites}, rtol=1e-5)

@pytest.mark.parametrize('mean,std', [(0,1),(50,.01),(1e3,.01),(-1e4,1),(0,1e-6)])
def test_running_variance_with_a_large_mean_and_blocks_of_unequal_size(mean, std):
    x = torch.randn(1001, 5, generator=torch.Generator().manual_seed(0))*std+mean
    rv = RunningVar()
    for b in x.split([1,2,300,7,691]): rv.update(b)
    want = x.double().numpy()
    np.testing.assert_allclose(rv.var, want.var(0, ddof=1), rtol=1e-4)
    np.testing.assert_allclose(rv.mean, want.mean(0), rtol=1e-6, atol=1e-6*std)
    assert rv.n==1001

def test_one_sample_has_no_variance():
    rv = RunningVar()
    rv.update(torch.ones(1, 3))
    assert rv.var.tolist()==[0,0,0]

def test_rows_in_any_leading_shape_and_precision():
    x = torch.randn(4, 3, 2, 5)
    a,b,c = RunningVar(),RunningVar(),RunningVar()
    a.update(x); b.update(x.reshape(-1, 5)); c.update(x.bfloat16().requires_grad_())
    assert_close(a.var, b.var, rtol=0, atol=0)
    assert_close(c.var, x.bfloat16().double().reshape(-1, 5).var(0), rtol=1e-5, atol=0)

# --- weights that are read, convolutions, unequal rows

class Reads(Grid):
    "As `Grid`, without ever calling the layer"
    def forward(self, x):
        x = F.linear(x, self.q.weight, self.q.bias).tanh()
        return self.head(F.linear(x.reshape(-1, 4, 6), weight=self.q.weight, bias=self.q.bias).reshape(x.shape).mean((1,2)))

def test_a_weight_that_is_read_scores_as_a_layer_that_is_called():
    want,got = (measure_all(m, grids()) for m in (Grid(),Reads()))
    assert find_sites(Reads())[0].param=='weight'
    for m in want: close(got[m], want[m], rtol=1e-6)

class Convs(nn.Module):
    "1 x 1 and k x k projections with stride, padding and dilation"
    def __init__(self, same=False):
        super().__init__()
        torch.manual_seed(0)
        self.q,self.k,self.head = nn.Conv2d(3, 5, 1),nn.Conv2d(5, 6, 3, stride=2, padding=1, dilation=2),nn.Linear(6, 4)
        if same: self.k = timm.layers.Conv2dSame(5, 6, 3, stride=2)
    def forward(self, x): return self.head(self.k(self.q(x).tanh()).tanh().mean((2,3)))

def small_images(): return [(x[...,:9,:9], y) for x,y in make_batches()]

def test_convolutions():
    stats,sites = measure_all(Convs(), small_images()),find_sites(Convs())
    assert [(s.name,s.d_in,s.d_out) for s in sites]==[('q',3,5),('k',45,6)]
    want = naive(Convs(), small_images())
    for m in want: close(stats[m], want[m])
    close(stats['sample_fisher'], singly(Convs(), small_images()))
    outs,model = [],Convs()
    model.k.register_forward_hook(lambda m,i,o: outs.append(o.movedim(1, -1).reshape(-1, 6).double()))
    with torch.no_grad(): [model(x) for x,_ in small_images()]
    close(dict(k=stats['cov']['k']), dict(k=torch.cat(outs).var(0).sum().item()))

def test_windows_that_cannot_be_told_are_refused_where_inputs_are_needed():
    measure(Convs(same=True), small_images())
    for name in ('sample_fisher','explained_var'):
        with raises('the windows that k sees, a Conv2dSame, cannot be told.*such as fisher'): measure(Convs(same=True), small_images(), scorers=[name])

class Attends(nn.Module):
    "nn.MultiheadAttention on its own tokens, or on others"
    def __init__(self, batch_first, cross):
        super().__init__()
        torch.manual_seed(0)
        self.attn,self.head,self.first,self.cross = nn.MultiheadAttention(6, 2, batch_first=batch_first),nn.Linear(6, 4),batch_first,cross
    def forward(self, x): # (b, 2, 4, 6)
        x = x.flatten(1, 2)
        x = x if self.first else x.transpose(0, 1)
        q = x[:,:3] if self.first else x[:3]
        return self.head(self.attn(q if self.cross else x, x, x)[0].mean(1 if self.first else 0))

@pytest.mark.parametrize('batch_first', [True,False])
@pytest.mark.parametrize('cross', [True,False])
def test_multihead_attention(batch_first, cross):
    model = Attends(batch_first, cross)
    sites = find_sites(model, ('q','k','v','proj'))
    assert [s.name for s in sites]==['attn.q','attn.k','attn.v','attn.out_proj']
    stats,want = measure_all(model, grids(), sites),naive(model, grids(), sites)
    for m in want: close(stats[m], want[m])
    close(stats['sample_fisher'], singly(model, grids(), sites=sites))
    x = torch.cat([x.flatten(1, 2) for x,_ in grids()]).double()
    W = model.attn.in_proj_weight.detach().double()
    for k,w,t in zip('qkv', W.chunk(3), (x[:,:3] if cross else x, x, x)):
        assert stats['cov'][f'attn.{k}']==pytest.approx((t.flatten(0, 1)@w.T).var(0).sum().item(), rel=1e-5)
    check_called(model, grids()[0][0], sites)

def test_rows_of_heads():
    model = timm.models.tiny_vit.Attention(8, 3, num_heads=2, attn_ratio=2, resolution=(2,2))
    net = nn.Sequential(nn.ModuleDict(dict(attn=model)))
    net.forward = lambda x: model(x).mean(1)
    sites = find_sites(net)
    assert [(s.heads,s.step,s.start,s.d_out) for s in sites]==[(2,12,0,6),(2,12,3,6),(2,12,6,12)]
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(3, 4, 8, generator=g), torch.randint(8, (3,), generator=g)) for _ in range(2)]
    stats,whole = measure_all(net, batches, sites),{}
    singles = [(x[i:i+1], y[i:i+1]) for x,y in batches for i in range(len(y))]
    close(stats['sample_fisher'], measure(net, singles, sites)['fisher'])
    model.qkv.register_forward_hook(lambda m,i,o: whole.setdefault('o', []).append(o.detach().reshape(-1, 24).double()))
    with torch.no_grad(): [net.eval()(x) for x,_ in batches]
    var = torch.cat(whole['o']).var(0)
    close(stats['cov'], {s.name:var[s.rows].sum().item() for s in sites}, rtol=1e-5)

def test_an_adapted_read_weight_scores_as_its_base():
    want,model = measure_all(Reads(), grids()),adapt(Reads(), {'q':2})
    for m,v in measure_all(model, grids()).items(): close(v, want[m], rtol=1e-5)

# --- text

def tiny(name, **kw):
    T = pytest.importorskip('transformers')
    base = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    torch.manual_seed(0)
    cls = getattr(T, name)
    return cls(cls.config_class(**base, **kw)).eval()

def text(widths=(5,8,12), pad_to=None, side='right', label=None):
    "One sentence a batch, as it is or padded"
    g = torch.Generator().manual_seed(3)
    for n in widths:
        ids = torch.randint(3, 50, (1,n), generator=g)
        pad = ((0,(pad_to or n)-n) if side=='right' else ((pad_to or n)-n,0))
        mask = F.pad(torch.ones_like(ids), pad)
        ids = F.pad(ids, pad)
        targets = (mask.cumsum(1)>1)&(mask==1)   # nothing stands before the first token to predict it from, not even padding
        yield dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~targets, -100) if label is None else torch.tensor([label]))

lms = dict(llama=('LlamaForCausalLM', dict(num_key_value_heads=2, bos_token_id=1, eos_token_id=2), None), classifier=('LlamaForSequenceClassification', dict(num_labels=3, bos_token_id=1, eos_token_id=2), 1),
           bert=('BertForSequenceClassification', dict(num_labels=3), 1))

@pytest.mark.parametrize('name,side', [('llama','right'),('llama','left'),('classifier','right'),('classifier','left'),('bert','right')])
def test_padding_changes_no_score(name, side):
    cls,kw,label = lms[name]
    model = tiny(cls, **kw)
    tight,loose = (measure(model, text(pad_to=n, side=side, label=label)) for n in (None,17))
    for m in tight: close(loose[m], tight[m], rtol=2e-3 if side=='left' else 1e-4)   # left padding moves the rotary angles, which rounds
    unmasked = [{k:v for k,v in b.items() if k!='attention_mask'} for b in text(pad_to=17, side=side, label=label)]
    if name=='llama' and side=='right':
        cov = measure(model, unmasked)['cov']
        assert all(abs(cov[n]/tight['cov'][n]-1)>.01 for n in cov)   # it would, without the mask

def test_several_padded_sentences_in_a_batch():
    model,one = tiny('LlamaForCausalLM', num_key_value_heads=2, bos_token_id=1, eos_token_id=2),list(text(pad_to=12))
    batch = {k:torch.cat([b[k] for b in one]) for k in one[0]}
    close(measure(model, [batch])['cov'], measure(model, text())['cov'])

def test_sample_fisher_of_token_losses_is_refused_and_of_sentences_right():
    with raises('sample_fisher needs one label a sample'): measure_all(tiny('LlamaForCausalLM', bos_token_id=1, eos_token_id=2), text())
    model = tiny('LlamaForSequenceClassification', num_labels=3, bos_token_id=1, eos_token_id=2)
    one = list(text(pad_to=12, label=1))
    batch = {k:torch.cat([b[k] for b in one]) for k in one[0]}
    close(measure_all(model, [batch])['sample_fisher'], measure(model, one)['fisher'])

def test_text_batches_without_labels_and_heads():
    model = tiny('LlamaForCausalLM', bos_token_id=1, eos_token_id=2)
    with raises('returned no loss: its batches need `labels`'): measure(model, [{k:v for k,v in b.items() if k!='labels'} for b in text()])
    with raises('LlamaForCausalLM has no head to warm up'): warmup_head(model, list(text()), 1)
    head = tiny('LlamaForSequenceClassification', num_labels=3, bos_token_id=1, eos_token_id=2)
    assert head_names(head)==['score']
    before = head.score.weight.detach().clone()
    assert not torch.equal(warmup_head(head, list(text(label=1)), 2).score.weight, before)

class Sentences(nn.Module):
    "Padded text through nn.MultiheadAttention, which puts the tokens first, and an MLP"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed,self.attn,self.classifier = nn.Embedding(50, 8),nn.MultiheadAttention(8, 2, batch_first=True),nn.Linear(8, 2)
    def forward(self, input_ids, attention_mask, labels):
        x = self.embed(input_ids)
        x = self.attn(x, x, x, key_padding_mask=attention_mask==0)[0]*attention_mask[...,None]
        return SimpleNamespace(loss=F.cross_entropy(self.classifier(x.sum(1)), labels))

@pytest.mark.parametrize('width', [4,17]) # a square batch of 4 sentences, too
def test_padding_in_multihead_attention(width):
    model,g = Sentences(),torch.Generator().manual_seed(0)
    sites,lengths = find_sites(model, ('q','k','v','proj')),(2,4,3,4)
    rows = [torch.randint(3, 50, (n,), generator=g) for n in lengths]
    batch = dict(input_ids=torch.stack([F.pad(r, (0, width-len(r))) for r in rows]), labels=torch.tensor([0,1,1,0]),
                 attention_mask=torch.stack([F.pad(torch.ones_like(r), (0, width-len(r))) for r in rows]))
    single = [dict(input_ids=r[None], attention_mask=torch.ones(1, len(r)), labels=y[None]) for r,y in zip(rows, batch['labels'])]
    names = ('cov','explained_var','sample_fisher')
    got,want = (measure(model, b, sites, names) for b in ([batch], single))
    for m in names: close(got[m], want[m])

# --- forward only, sums, and scorers of one's own

def test_forward_only_scorers_cause_no_backward_pass_and_need_no_loss(model, batches, monkeypatch):
    want = measure(model, batches, scorers=['cov','explained_var','grad'])
    recorded = []
    def no_backward(*args, **kw): raise AssertionError('a backward pass')
    for name in ('grad','backward'): monkeypatch.setattr(torch.autograd, name, no_backward)
    model.head.register_forward_hook(lambda m, x, y: recorded.append(y.requires_grad))
    for unlabelled in ([(x, None) for x,_ in batches], [(x,) for x,_ in batches]):
        got = measure(model, unlabelled, scorers=['cov','explained_var',InputPCA()], loss_func=no_backward)
        for m in ('cov','explained_var'): close(got[m], want[m], rtol=1e-6)
    assert recorded==[False]*2*len(batches)
    with pytest.raises(AssertionError, match='a backward pass'): measure(model, batches, scorers=['cov','grad'])

def part(model, batches, name):
    scorer = InputPCA() if name=='input_pca' else scorers[name]()
    measure(model, batches, scorers=[scorer])
    return scorer

@pytest.mark.parametrize('name', [*(o for o in scorers if o!='gate_fisher'),'input_pca']) # that one trains as it goes
def test_two_halves_added_are_the_whole(model, batches, name):
    whole,one,two = (part(model, b, name) for b in (batches, batches[:1], batches[1:]))
    one.add(two)
    if name!='input_pca': close(one.result(), whole.result(), rtol=1e-5)
    for site,(share,comps) in whole.result().items() if name=='input_pca' else ():
        assert_close(one.result()[site][0], share, rtol=1e-4, atol=1e-7)
        assert_close((one.result()[site][1]*comps).sum(1)[:8].abs(), torch.ones(8).double(), rtol=1e-4, atol=0)

def test_a_scorer_can_be_used_again(model, batches):
    for name in scorers:
        scorer = part(model, batches[::-1], name)
        close(measure(model, batches, scorers=[scorer])[name], measure(model, batches, scorers=[name])[name], rtol=1e-6)

class Largest(Scorer):
    needs = ('weight_grad',)
    def value(self, seen, site): return seen.weight_grad(site).abs().max().item()

def test_a_name_in_the_registry_makes_a_metric(model, batches, monkeypatch):
    monkeypatch.setitem(scorers, 'largest', Largest)
    weights = parse_weights('largest=1, cov=.5')
    metrics = measure(model, batches, scorers=weights)
    assert list(metrics)==['largest','cov'] and set(composite(metrics, weights))=={s.name for s in find_sites(model)}

@pytest.mark.parametrize('attrs,piece', [(dict(name=''), 'Mine has no name'), (dict(needs=('loss',)), "Mine needs 'loss'; a scorer can need weight_grad and output_grad")])
def test_errors_of_a_scorer_of_ones_own(model, batches, attrs, piece):
    with raises(piece): measure(model, batches, scorers=[type('Mine', (Largest,), dict(name='mine') | attrs)])
    with pytest.raises(TypeError, match='define value'): measure(model, batches, scorers=[type('Mine', (Scorer,), dict(name='mine'))])

def test_settled_is_asked_with_the_results_of_all_scorers(model, batches):
    asked = {}
    def settled(metrics, n): asked[n] = metrics
    got = measure(model, batches*8, scorers=['cov','gora'], settled=settled)
    assert list(asked)==[8,16,32] and list(asked[8])==['cov','gora']
    close(asked[32]['gora'], got['gora'], rtol=1e-6)

# --- watching

def test_watching_changes_nothing_outside_the_block_and_in_no_other_thread(model, batches):
    linear,conv,x = F.linear,F.conv2d,batches[0][0]
    reads,seen = Reads(),[]
    with watch(reads, find_sites(reads)) as products:
        assert F.linear is linear and F.conv2d is conv
        other = Thread(target=lambda: seen.append(reads(grids()[0][0])))
        other.start(); other.join()
        assert seen and products=={'q':[]}
        reads(grids()[0][0])
    reads(grids()[0][0])
    assert len(products['q'])==2

def test_the_fused_kernel_of_torch_hides_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1), nn.Flatten(), nn.Linear(32, 4)).eval()
    sites = find_sites(net, ('q','k','v','proj','fc1','fc2'))
    data = [(torch.randn(3, 4, 8), torch.randint(4, (3,))) for _ in range(2)]
    forward,both = measure(net, data, sites, ['cov']),measure(net, data, sites, ['cov','sample_fisher','fisher'])
    close(forward['cov'], both['cov'])
    close(both['fisher'], naive(net, data, sites)['fisher'])
    close(both['sample_fisher'], singly(net, data, sites=sites))

# --- what must not matter

def test_order_of_the_batches(model, batches):
    a,b = (measure_all(model, o) for o in (batches, [batches[i] for i in (2,0,3,1)]))
    for m in a: close(a[m], b[m], rtol=1e-6)

def test_mode_flags_grad_mode_and_progress(model, batches):
    want = measure(model, batches)
    drop = vit(proj_drop_rate=.5, attn_drop_rate=.5)
    with torch.no_grad(): others = [measure(deepcopy(model).requires_grad_(False).eval(), batches), measure(drop.train(), batches, progress=True)]
    for o in others:
        for m in want: close(o[m], want[m], rtol=1e-6)

def test_generators_are_read_no_further_than_needed(model, batches):
    def forever():
        for b in batches: yield b
        raise AssertionError('read too far')
    got = measure(model, forever(), n_batches=len(batches))
    for m,v in measure(model, batches).items(): close(got[m], v, rtol=1e-6)
    short = measure(model, forever(), n_batches=2)
    for m,v in measure(model, batches[:2]).items(): close(short[m], v, rtol=1e-6)

def test_half_precision_scores_are_near_and_accumulated_in_float32(model, batches):
    want = measure(model, batches)
    half = measure(deepcopy(model).bfloat16(), [(x.bfloat16(), y) for x,y in batches], loss_func=lambda o,y: F.cross_entropy(o.float(), y))
    for m in ('grad','cov'): close(half[m], want[m], rtol=.1)

def test_an_adapted_model_scores_as_its_base(model, batches):
    want = measure(model, batches)
    adapt(model, {s.name:2 for s in find_sites(model)})
    for m,v in measure(model, batches).items(): close(v, want[m], rtol=1e-5)

# --- the model is left as it was

class Busy(nn.Module):
    "A ViT with batch norm and dropout before it"
    def __init__(self):
        super().__init__()
        self.bn,self.drop,self.vit,self.head = nn.BatchNorm2d(3),nn.Dropout(.1),vit(num_classes=0),nn.Linear(64, 4)
    def forward(self, x): return self.head(self.vit(self.drop(self.bn(x))))

def busy():
    "A model in an uncommon state: mixed modes, mixed flags, gradients and hooks of its own"
    m = Busy().train()
    m.vit.blocks[2].eval()
    for p in list(m.parameters())[::3]: p.requires_grad_(False)
    for i,p in enumerate(m.parameters()):
        if i%2: p.grad = torch.full_like(p, i)
    m.vit.blocks[0].attn.qkv.register_forward_hook(lambda m,i,o: None)
    return m

def snapshot(m):
    grads = {n:(id(p.grad), p.grad.clone()) if p.grad is not None else None for n,p in m.named_parameters()}
    return (deepcopy(m.state_dict()), grads, {n:p.requires_grad for n,p in m.named_parameters()}, {n:o.training for n,o in m.named_modules()},
            {n:[list(h) for h in (o._forward_hooks, o._forward_pre_hooks, o._backward_hooks, o._backward_pre_hooks)] for n,o in m.named_modules()},
            torch.get_rng_state(), np.random.get_state()[1:3], random.getstate(), torch.is_grad_enabled())

def assert_unchanged(m, old):
    new = snapshot(m)
    for a,b in zip(old[:2], new[:2]): assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert old[2:5]==new[2:5] and torch.equal(old[5], new[5]) and old[6][0].tolist()==new[6][0].tolist() and old[6][1]==new[6][1]
    assert old[7:]==new[7:]

def noisy(batches, fail_at=None):
    "Batches whose making draws from all three random states, and perhaps fails"
    for i,b in enumerate(batches):
        torch.rand(1); np.random.rand(); random.random()
        if i==fail_at: raise RuntimeError('the disk is gone')
        yield b

def test_model_and_random_states_are_untouched(batches):
    m = busy()
    old = snapshot(m)
    measure_all(m, noisy(batches))
    assert_unchanged(m, old)
    dl = DataLoader(TensorDataset(torch.cat([x for x,_ in batches]), torch.cat([y for _,y in batches])), 4, shuffle=True)
    measure(m, dl)
    assert_unchanged(m, old)

def breaks(o, y): raise KeyError('no such loss')
class Interrupts(nn.Module):
    def forward(self, x): raise KeyboardInterrupt

@pytest.mark.parametrize('how', ['data','loss','nan','interrupt'])
def test_model_is_untouched_when_scoring_fails_midway(batches, how):
    m = busy()
    if how=='interrupt': m.vit.blocks[1].mlp.act = Interrupts()
    bad = batches[:2]+[(batches[2][0]*float('nan'), batches[2][1])] if how=='nan' else batches
    old = snapshot(m)
    with pytest.raises((RuntimeError,KeyError,ValueError,KeyboardInterrupt)):
        measure_all(m, noisy(bad, 2 if how=='data' else None), loss_func=breaks if how=='loss' else F.cross_entropy)
    assert_unchanged(m, old)

# --- bad input

def test_a_loss_that_is_no_number_names_the_batch(model, batches):
    for v in (float('nan'), float('inf')):
        bad = lambda o,y: F.cross_entropy(o, y)*(v if len(y)==3 else 1)   # the third batch is the one of three images
        with raises(f'the loss is {v} in scoring batch 3; check'): measure(model, batches, loss_func=bad)

def test_a_gradient_that_is_not_finite_names_site_and_batch(model, batches):
    huge = lambda o,y: F.cross_entropy(o, y)*(1e30 if len(y)==3 else 1)
    with raises('fisher of blocks.0.attn.qkv.q is inf in scoring batch 3; check the weights and the images'): measure(model, batches, loss_func=huge)
    with raises('fisher of blocks.0.attn.qkv.q is nan in scoring batch 1'): measure(model, batches, loss_func=lambda o,y: (o*0).sum().abs().sqrt())

def test_a_head_of_zeros_is_an_error_that_says_so(model, batches):
    nn.init.zeros_(model.head.weight)
    with raises('every gradient is zero: the head is probably all zeros.*--head-warmup'): measure(model, batches)
    assert max(measure(warmup_head(model, batches, 1), batches)['grad'].values())>0

def test_activations_that_are_not_finite_name_the_site(model, batches):
    with raises('cov of blocks.0.attn.qkv.q is nan after the pass'): measure(model, [(x*float('nan'), y) for x,y in batches], scorers=['cov'])

@pytest.mark.parametrize('none', [[],iter([])])
def test_no_batches(model, none):
    with raises('no batch to score'): measure(model, none)

def test_no_batches_because_none_are_wanted(model, batches):
    with raises('no batch to score'): measure(model, batches, n_batches=0)

class Unused(Grid):
    def forward(self, x): return self.head((x@self.q.weight.T).mean((1,2)))
class Aside(Grid):
    def forward(self, x): return self.head(x.mean((1,2)))

def test_a_layer_that_is_never_called(model):
    for m in (Unused(),Aside()):
        with raises('q was never called, nor its weight given to F.linear.*`include`'): measure(m, grids())
        with raises('q was never called'): check_called(m, grids()[0][0], find_sites(m))

def test_a_loss_cut_off_from_the_model(model, batches):
    with raises('does not depend on any site'): measure(model, batches, loss_func=lambda o,y: F.cross_entropy(o.detach(), y))

# --- warming up the head

def test_warm_up_trains_the_head_and_nothing_else(batches):
    m = busy()
    for p in m.head.parameters(): p.grad = None
    old,loss = snapshot(m),lambda: sum(batch_loss(deepcopy(m).eval(), b, F.cross_entropy).item() for b in batches)
    cold = loss()
    assert warmup_head(m, batches, 30) is m and loss()<.9*cold
    for n in ('head.weight','head.bias'):
        assert not torch.equal(m.state_dict()[n], old[0][n])
        m.get_parameter(n).data.copy_(old[0][n])
    assert_unchanged(m, old)

def test_warm_up_takes_exactly_as_many_steps_as_asked(model, batches):
    seen = []
    warmup_head(model, batches, 6, loss_func=lambda o,y: seen.append(len(y)) or F.cross_entropy(o, y))
    assert seen==[4,4,3,2,4,4]
    weight = model.head.weight.detach().clone()
    warmup_head(model, batches, 0)
    assert_close(model.head.weight.detach(), weight, rtol=0, atol=0)

class Empty:
    "Yields nothing, and complains when asked again and again"
    asked = 0
    def __iter__(self):
        self.asked += 1
        assert self.asked<100, 'asked for batches for ever'
        return iter([])

def test_warm_up_without_batches_is_an_error(model):
    with raises('no batch'): warmup_head(model, Empty(), 3)

# --- normalisers and the composite

vals = dict(a=4., b=1., c=1000., d=0.)

def test_normalisers_by_hand():
    assert normalise(vals)==pytest.approx(dict(a=.004, b=.001, c=1, d=0))
    assert normalise(vals, 'rank')==pytest.approx(dict(a=2/3, b=1/3, c=1, d=0))
    assert normalise(vals, 'log')==pytest.approx(dict(a=np.log(4)/np.log(1000), b=0, c=1, d=0))
    assert normalise(dict(a=1., b=1., c=2.), 'rank')==pytest.approx(dict(a=.25, b=.25, c=1))   # ties share a rank

@pytest.mark.parametrize('how', ('minmax','rank','log'))
def test_normalisers_keep_order_and_ignore_scale(how):
    x = {str(i):v for i,v in enumerate(np.random.default_rng(0).lognormal(0, 3, 36))}
    n = normalise(x, how)
    assert sorted(n, key=n.get)==sorted(x, key=x.get) and min(n.values())==0 and max(n.values())==1
    assert normalise({k:v*1e-12 for k,v in x.items()}, how)==pytest.approx(n, abs=1e-9)

@pytest.mark.parametrize('how', normalisers)
@pytest.mark.parametrize('v', [0.,3.,1e-300])
def test_equal_values_and_a_single_site_stay_finite_and_equal(how, v):
    n = normalise(dict(a=v, b=v, c=v), how)
    assert n['a']==n['b']==n['c'] and 0<=n['a']<=1
    assert 0<=normalise(dict(a=v), how)['a']<=1

stats = dict(fisher=dict(a=0., b=1., c=4.), grad=dict(a=2., b=1., c=3.), cov=dict(a=10., b=0., c=5.))

def test_composite_by_hand():
    assert composite(stats)==pytest.approx(dict(a=.6*0+.2*.5+.2, b=.6*.25, c=.6+.2+.2*.5))
    assert composite(stats, dict(fisher=1.))==normalise(stats['fisher'])
    assert composite(stats, dict(grad=2., cov=0.), 'rank')==pytest.approx(dict(a=1, b=0, c=2))

@pytest.mark.parametrize('weights,piece', [
    (dict(fisher=-1.), 'weight of fisher must be a finite number of at least 0, got -1'), (dict(grad=float('nan')), 'weight of grad')])
def test_errors_of_composite(weights, piece):
    with raises(piece): composite(stats, weights)
