"""Walks families of models at their smallest, with random weights: sites, scores, ranks, a training step, merging, saving.

`python tests/test_compat.py nbs/results/compatibility.json` writes what the walk finds; the tests assert that the stored file says the same."""
import json, subprocess, sys, warnings
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
import pytest, timm, torch
from torch import nn
import torch.nn.functional as F
from timm.models import metaformer as mf, mlp_mixer as mlps, mvitv2 as mvits
from torch.testing import assert_close
from fclora.sites import *
from fclora.find import *
from fclora.adapt import *
from fclora.files import *
from fclora.scorers.measure import *
from fclora.plan import *
from fclora.make_plan import *

warnings.filterwarnings('ignore')
pytestmark = pytest.mark.usefixtures('one_thread')
stored = Path(__file__).parent.parent/'nbs'/'results'/'compatibility.json'

# --- models

vit = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
mixer = dict(cls='mlp_mixer.MlpMixer', img_size=32, patch_size=8, num_blocks=2, embed_dim=48)
def mvit(num_classes, **kw): return mvits.MultiScaleVit(mvits.MultiScaleVitCfg(depths=(1,1,1,1), embed_dim=24), num_classes=num_classes, **kw)
def caformer(num_classes):
    return mf.MetaFormer(depths=(1,1,1,1), dims=(16,32,64,64), token_mixers=[mf.SepConv,mf.SepConv,mf.Attention,mf.Attention],
                         norm_layers=[mf.LayerNorm2dNoBias]*2+[mf.LayerNormNoBias]*2, num_classes=num_classes)

timm_models = {   # family: (model, what makes it small, input size); `cls` builds what the model's function would not
    'ViT': ('test_vit', dict(img_size=32, patch_size=8, depth=2), 32),
    'ViT, attention pool': ('test_vit3', dict(img_size=32, patch_size=8, depth=2), 32),
    'ViT, relative positions': ('test_vit_relpos', dict(img_size=32, patch_size=8, depth=2), 32),
    'DeiT': ('deit_tiny_patch16_224', vit, 32), 'DeiT-3': ('deit3_small_patch16_224', vit, 32),
    'DeiT, distilled': ('deit_tiny_distilled_patch16_224', vit, 32),
    'BEiT': ('beit_base_patch16_224', vit, 32), 'BEiT v2': ('beitv2_base_patch16_224', vit, 32), 'BEiT-3': ('beit3_base_patch16_224', vit, 32),
    'EVA': ('eva_large_patch14_196', vit, 32), 'EVA02, fused': ('eva02_tiny_patch14_224', vit, 32),
    'EVA02, split': ('eva02_base_patch16_clip_224', vit, 32),
    'DINOv2, registers': ('vit_small_patch14_reg4_dinov2', vit, 32), 'DINOv2, SwiGLU': ('vit_giant_patch14_dinov2', vit, 32),
    'DINOv3': ('vit_small_patch16_dinov3', vit, 32), 'SigLIP': ('vit_base_patch16_siglip_224', vit, 32),
    'NaFlex ViT': ('naflexvit_base_patch16_gap', dict(embed_dim=48, depth=2, num_heads=3), 32),
    'SAM ViT': ('samvit_base_patch16_224', dict(vit, global_attn_indexes=(1,), window_size=2), 32),
    'Swin': ('swin_tiny_patch4_window7_224', dict(img_size=32, window_size=4, embed_dim=24, depths=(2,2), num_heads=(2,4)), 32),
    'Swin v2': ('swinv2_tiny_window8_256', dict(img_size=32, window_size=4, embed_dim=24, depths=(2,2), num_heads=(2,4)), 32),
    'Swin v2 CR': ('swinv2_cr_tiny_224', dict(img_size=32, window_size=4, embed_dim=24, depths=(2,2), num_heads=(2,4)), 32),
    'MaxViT': ('test_maxvit', dict(img_size=64), 64), 'CoAtNet': ('test_coatnet', dict(img_size=64), 64),
    'MViT v2': ('mvitv2_tiny', dict(cls=mvit, img_size=64), 64),
    'PVT v2': ('pvt_v2_b0', dict(depths=(1,1,1,1)), 64),
    'Hiera': ('hiera_tiny_224', dict(img_size=(64,64), embed_dim=24, num_heads=1, stages=(1,1,1,1)), 64),
    'CaiT': ('cait_xxs24_224', vit, 32), 'XCiT': ('xcit_nano_12_p16_224', vit, 32),
    'TinyViT': ('tiny_vit_5m_224', dict(depths=(1,1,1,1), embed_dims=(16,32,48,64), num_heads=(1,2,3,4), window_sizes=(4,4,4,2)), 64),
    'LeViT': ('levit_128s', dict(cls='levit.Levit', img_size=64, embed_dim=(32,48,64), depth=(1,1,1), num_heads=(2,3,4), key_dim=8), 64),
    'FastViT': ('fastvit_sa12', dict(layers=(1,1,1,1), embed_dims=(16,32,64,128)), 64),
    'MobileViT': ('mobilevit_xxs', {}, 64), 'MobileViT v2': ('mobilevitv2_050', {}, 64),
    'EfficientFormer': ('efficientformer_l1', dict(depths=(1,1,1,2), embed_dims=(16,24,32,48), num_vit=1), 224),
    'EfficientFormer v2': ('efficientformerv2_s0', dict(img_size=64, depths=(1,1,2,2), embed_dims=(16,24,32,48)), 64),
    'Twins': ('twins_svt_small', dict(depths=(2,2), embed_dims=(24,48), num_heads=(1,2), mlp_ratios=(2,2), sr_ratios=(4,2), wss=(2,2), img_size=32), 32),
    'TNT': ('tnt_s_patch16_224', dict(img_size=32, embed_dim=48, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=3), 32),
    'ConViT': ('convit_tiny', dict(img_size=32, patch_size=8, embed_dim=12, depth=2, local_up_to_layer=1), 32),
    'VOLO': ('volo_d1_224', dict(cls='volo.VOLO', img_size=64, layers=(1,1,1,1), embed_dims=(24,48,48,48), num_heads=(2,4,4,4)), 64),
    'CrossViT': ('crossvit_9_240', dict(img_size=48, img_scale=(1.,2/3), depth=[[1,1,0]], embed_dim=[24,48], num_heads=[2,4]), 48),
    'PiT': ('pit_ti_224', dict(cls='pit.PoolingVisionTransformer', img_size=64, base_dims=(16,16,16), depth=(1,1,1), heads=(1,2,4)), 64),
    'NesT': ('nest_tiny', dict(cls='nest.Nest', img_size=64, embed_dims=(24,24,24), num_heads=(1,2,3), depths=(1,1,1)), 64),
    'CoaT': ('coat_lite_tiny', dict(embed_dims=(16,24,32,48), img_size=64), 64),
    'DaViT': ('davit_tiny', dict(depths=(1,1,1,1), embed_dims=(16,24,32,48), num_heads=(1,2,2,2)), 64),
    'EdgeNeXt': ('edgenext_xx_small', {}, 64),
    'CAFormer': ('caformer_s18', dict(cls=caformer), 64),
    'Visformer': ('visformer_tiny', dict(img_size=64, embed_dim=48, depth=(1,1,1)), 64),
    'NextViT': ('nextvit_small', dict(depths=(1,2,5,1)), 64),
    'GC ViT': ('gcvit_xxtiny', dict(cls='gcvit.GlobalContextVit', img_size=64, embed_dim=16, depths=(1,1,2,1), num_heads=(1,2,2,4)), 64),
    'EfficientViT (MIT)': ('efficientvit_b0', {}, 64),
    'ConvNeXt': ('test_convnext', {}, 64), 'MLP-Mixer': ('mixer_s32_224', dict(mixer, block_layer=mlps.MixerBlock), 32),
    'gMLP': ('gmlp_ti16_224', dict(mixer, block_layer=mlps.SpatialGatingBlock, mlp_layer=mlps.GatedMlp, mlp_ratio=6), 32),
    'ResMLP': ('resmlp_12_224', dict(mixer, block_layer=mlps.ResBlock, mlp_ratio=4, norm_layer=mlps.Affine), 32),
    'ResNet': ('test_resnet', {}, 64)}

def timm_model(name, kw, size):
    kw = dict(kw)
    cls = kw.pop('cls', partial(timm.create_model, name))
    if isinstance(cls, str): cls = getattr(getattr(timm.models, cls.split('.')[0]), cls.split('.')[1])
    return cls(num_classes=4, **kw),images(size)

def images(size):
    "Two batches of images and labels"
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, size, size, generator=g), torch.tensor([0,1,2,3])) for _ in range(2)]

class Pool(nn.Module):
    "torch's own encoder as a classifier of sequences"
    def __init__(self, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0., batch_first=batch_first)
        self.encoder,self.head,self.batch_first = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),nn.Linear(24, 4),batch_first
    def forward(self, x): # (b, 3, h, w), each row of pixels a token
        x = x.flatten(1, 2)[...,:24]
        return self.head(self.encoder(x if self.batch_first else x.transpose(0, 1)).mean(1 if self.batch_first else 0))

def torch_models():
    from torchvision.models import VisionTransformer, SwinTransformer
    from torchvision.models.swin_transformer import SwinTransformerBlockV2, PatchMergingV2
    swin = partial(SwinTransformer, [4,4], 24, [2,2], [2,4], [4,4], num_classes=4)
    return {'nn.TransformerEncoder': lambda: (Pool(), images(32)), 'nn.TransformerEncoder, tokens first': lambda: (Pool(False), images(32)),
            'torchvision ViT': lambda: (VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=4), images(32)), 'torchvision Swin': lambda: (swin(), images(32)),
            'torchvision Swin v2': lambda: (swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), images(32))}

def sentences(labels='tokens'):
    "Two batches of padded sentences"
    g = torch.Generator().manual_seed(1)
    def batch():
        mask = (torch.arange(9)<torch.tensor([9,7,5,6])[:,None]).long()
        ids = torch.randint(3, 64, (4,9), generator=g)*mask
        return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask==0, -100) if labels=='tokens' else torch.tensor([0,1,2,3]))
    return [batch(), batch()]

def hf_models():
    import transformers as T
    T.logging.set_verbosity_error()
    v = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8)
    swin = dict(image_size=32, patch_size=4, embed_dim=16, depths=[1,1], num_heads=[2,4], window_size=4)
    b = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    l,old = dict(b, num_key_value_heads=2),dict(vocab_size=64, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    as_images = [dict(pixel_values=x, labels=y) for x,y in images(32)]
    def model(name, kind, batches, **kw): return lambda: (getattr(T, name+kind)(getattr(T, f'{name}Config')(**kw)), batches)
    vision = lambda name,**kw: model(name, 'ForImageClassification', as_images, num_labels=4, **kw)
    lm = lambda name,**kw: model(name, 'ForCausalLM', sentences(), **kw)
    text = lambda name,**kw: model(name, 'ForSequenceClassification', sentences('one'), num_labels=4, **kw)
    return {'ViT': vision('ViT', **v), 'DeiT': vision('DeiT', **v), 'DINOv2': vision('Dinov2', **v),
            'DINOv2, registers and SwiGLU': vision('Dinov2WithRegisters', **v, use_swiglu_ffn=True), 'Swin': vision('Swin', **swin),
            'Swin v2': vision('Swinv2', **swin), 'BEiT': vision('Beit', **v), 'CLIP vision': vision('CLIP', vision_config=v),
            'SigLIP vision': vision('Siglip', vision_config=v), 'Llama': lm('Llama', **l), 'Llama, classifier': text('Llama', **l),
            'Qwen2': lm('Qwen2', **l), 'Qwen3': lm('Qwen3', **l, head_dim=8), 'Gemma': lm('Gemma', **l, head_dim=8), 'Mistral': lm('Mistral', **l),
            'Phi-3': lm('Phi3', **l), 'BERT': text('Bert', **b), 'ModernBERT': text('ModernBert', **b, cls_token_id=1, sep_token_id=2),
            'GPT-NeoX': lm('GPTNeoX', **b), 'Persimmon': lm('Persimmon', **b),
            'BLOOM': lm('Bloom', **old, n_layer=2, n_head=4), 'Falcon': lm('Falcon', **old, num_hidden_layers=2, num_attention_heads=4),
            'Falcon, grouped': lm('Falcon', **old, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
            'GPT-2': model('GPT2', 'LMHeadModel', sentences(), vocab_size=64, n_embd=32, n_layer=2, n_head=4)}

@cache
def every():
    "{(library, family): function that makes model and batches}"
    res = {('timm',f): partial(timm_model, *o) for f,o in timm_models.items()}
    return res | {('torch',f):o for f,o in torch_models().items()} | {('Hugging Face',f):o for f,o in hf_models().items()}

# --- the walk

options = [('q','k','v'), ('proj','fc1','fc2'), ('fc1','fc2'), ('conv',)]   # what is tried until something works

def out(model, batch):
    x = {k:v for k,v in batch.items() if k!='labels'} if isinstance(batch, dict) else batch[0]
    with torch.no_grad(): res = model.eval()(**x) if isinstance(x, dict) else model.eval()(x)
    return getattr(res, 'logits', res)

def near(a, b): assert_close(a, b, atol=1e-4*max(1, b.abs().max().item()), rtol=1e-5)
def params(model): return {n:p.detach().clone() for n,p in model.named_parameters()}

def go_through(model, batches, ks):
    "Sites of the kinds `ks`, after scoring, allocating, training, merging and saving them"
    sites,base,before = find_sites(model, ks),deepcopy(model).eval(),out(model, batches[0])
    stats = measure(model, batches, sites)
    assert set(stats)=={'fisher','grad','cov'} and all(v>=0 for m in stats.values() for v in m.values())
    silent = [n for n,v in stats['fisher'].items() if not v]   # a single token has no use for q and k; SigLIP's pooling head may not be asked
    assert len(silent)<=len(sites)/3
    plan = make_plan(type(model).__name__, sites, stats, budget=2*len(sites))
    assert plan.check(model).total_rank==2*len(sites)
    check_called(model, {k:v for k,v in batches[0].items() if k!='labels'} if isinstance(batches[0], dict) else batches[0][0], sites)
    freeze(adapt(model, plan.ranks))
    assert count_params(model)['adapter']==plan.adapter_params
    near(out(model, batches[0]), before) # the same products, but for the order of their sums
    train_a_step(model, batches[1])
    after = out(model, batches[0])
    assert (after-before).abs().max()>1e-6
    near(out(merge_adapters(deepcopy(model)), batches[0]), after)
    near(out(unload(deepcopy(model), merge=True), batches[0]), after)
    again = adapt(deepcopy(base), plan.ranks)
    assert not again.load_state_dict(adapter_state(model), strict=False).unexpected_keys
    near(out(again, batches[0]), after)
    plain = unload(model)
    assert type(plain) is type(base) and [type(m) for m in plain.modules()]==[type(m) for m in base.modules()]
    for n,p in plain.named_parameters(): assert is_head(n, head_names(base)) or torch.equal(p, base.get_parameter(n))
    return sites

def train_a_step(model, batch):
    "Two steps, as `lora_A` gets no gradient while `lora_B` is zero; everything but adapters and head must stay"
    before,opt = params(model.train()),torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2, eps=1e-12)
    for _ in range(2):
        batch_loss(model, batch, F.cross_entropy).backward()
        opt.step(); opt.zero_grad()
    moved = {n for n,p in model.named_parameters() if not torch.equal(p, before[n])}
    ours,heads = adapter_params(model).keys(),head_names(model)
    assert all(n in ours or is_head(n, heads) for n in moved) and len(moved&ours)>.6*len(ours)

def can(model, kind):
    try: return bool(find_sites(model, (kind,)))
    except ValueError: return False

def row(library, family):
    "What the walk finds for one family"
    first = ''
    for ks in options:
        torch.manual_seed(0)
        model,batches = every()[library, family]()
        with torch.no_grad():
            for p in model.parameters(): p.add_(.05*torch.randn_like(p))   # zero heads and LayerScales of 1e-5 let nothing through
        res = dict(library=library, family=family, model=timm_models[family][0] if library=='timm' else type(model).__name__)
        try: find_sites(model, ks)
        except ValueError as e: first = first or str(e)
        else: break
    else: return dict(res, result='refused', kinds=[], sites=0, fused=0, read=0, all_kinds=[], all_sites=0, reason=first)
    sites,has = find_sites(model, ks),tuple(k for k in kinds if can(model, k))
    return dict(res, result='works with options' if first else 'works', kinds=[k for k in kinds if k in {s.kind for s in sites}], sites=len(sites),
                fused=sum(s.name!=s.path for s in sites), read=sum(bool(s.param) for s in sites), all_kinds=list(has),
                all_sites=len(go_through(model, batches, has)), reason=first)

# --- the tests

@pytest.mark.parametrize('library,family', every(), ids=lambda o: o.replace(' ', '-'))
def test_the_stored_table_says_what_the_walk_finds(library, family):
    assert row(library, family) in json.loads(stored.read_text())

def test_the_stored_table_has_no_other_rows():
    assert [(r['library'], r['family']) for r in json.loads(stored.read_text())]==list(every())

class SeenAttention:
    "Arguments of every attention and softmax while the block lasts"
    def __enter__(self):
        self.seen,self.patch = [],pytest.MonkeyPatch()
        def watched(f, n): return lambda *a,**kw: self.seen.append(a[:n]) or f(*a, **kw)
        self.patch.setattr(F, 'scaled_dot_product_attention', watched(F.scaled_dot_product_attention, 3))
        for o in (F,torch,torch.Tensor): self.patch.setattr(o, 'softmax', watched(o.softmax, 1))
        return self
    def __exit__(self, *args): self.patch.undo()

def rows_behind(t, out, axis):
    "Rows of the fused product `out` that `t` was computed from"
    g, = torch.autograd.grad((t*torch.rand_like(t)).sum(), out, retain_graph=True, allow_unused=True) if t.requires_grad else (None,)
    return set() if g is None else set(g.movedim(axis, -1).flatten(0, -2).abs().sum(0).nonzero().flatten().tolist())

def fused(): return [(r['library'],r['family']) for r in json.loads(stored.read_text()) if r['fused']] if stored.exists() else []

@pytest.mark.parametrize('library,family', fused(), ids=lambda o: o.replace(' ', '-'))
def test_rows_of_fused_layers_are_those_that_reach_the_attention_as_query_key_and_value(library, family):
    torch.manual_seed(0)
    model,batches = every()[library, family]()
    paths = [s.path for s in find_sites(model)]
    sites = [s for s in find_sites(model) if paths.count(s.path)>1]
    sites = [s for s in sites if s.path==sites[0].path]
    with preserved(model), SeenAttention() as w, watch(model, sites) as products: batch_loss(model, batches[0], F.cross_entropy)
    out = products[sites[0].path][0].y
    rows = {s.kind:set(torch.arange(len(site_weight(model, s)))[s.rows].tolist()) for s in sites}
    got = [r for a in w.seen if any(r := [rows_behind(t, out, 1 if out.ndim==4 and isinstance(model.get_submodule(sites[0].path), nn.Conv2d) else -1) for t in a])]
    assert got, 'the fused layer reaches no attention'
    if len(got[0])==3:
        for k,r in zip('qkv', got[0]): assert r==rows.get(k, set()), k
    else: assert got[0][0] in [set.union(*[rows.get(k, set()) for k in ks]) for ks in ('qk','q','k')]   # the softmax of q k^T, or of one of them

plain_torch = """
import sys
sys.modules['fastai'] = None                      # importing it would fail
import torch, torch.nn.functional as F
from fclora.find import *
from fclora.adapt import *
from fclora.scorers.measure import *
from fclora.make_plan import *
from fclora.calibration.temperature import *
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q,self.v,self.head = (torch.nn.Linear(8, n) for n in (8,8,3))
    def forward(self, x): return self.head(self.q(x).tanh()*self.v(x))
torch.manual_seed(0)
model,batches = Net(),[(torch.randn(6, 8), torch.randint(3, (6,))) for _ in range(4)]
plan = make_plan('Net', find_sites(model), measure(model, batches), budget=4)
freeze(adapt(model, plan.ranks))
opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
for b in batches:
    batch_loss(model, b, F.cross_entropy).backward()
    opt.step(); opt.zero_grad()
with torch.no_grad(): T = fit_temperature(torch.cat([model(x) for x,_ in batches]), torch.cat([y for _,y in batches]))
assert T>0 and not [m for m in sys.modules if m.startswith(('fastai.','timm','transformers'))]
"""

def test_plain_torch_needs_no_fastai():
    res = subprocess.run([sys.executable, '-c', plain_torch], capture_output=True, text=True)
    assert res.returncode==0, res.stderr

def test_versions_report_only_what_is_installed():
    assert list(versions(('torch','no-such-package')))==['torch']

@pytest.mark.parametrize('family', ['ViT','TinyViT','BEiT','CoAtNet'])
def test_a_plan_of_any_layout_survives_its_file(family, tmp_path):
    model,_ = every()['timm', family]()
    plan = make_plan(family, find_sites(model), method='uniform', budget=2*len(find_sites(model)))
    back = Plan.load(plan.save(tmp_path/'plan.json'))
    assert back==plan and back.check(model).sites==find_sites(model)
    keys = set(json.loads((tmp_path/'plan.json').read_text())['sites'][0])
    assert ('step' in keys, 'param' in keys)==dict(ViT=(False,False), TinyViT=(True,False), BEiT=(False,True), CoAtNet=(True,False)).get(family)

if __name__=='__main__':
    torch.set_num_threads(1)
    rows = [row(*o) for o in every()]
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1)+'\n')
    for r in rows: print(f"{r['library']:13s} {r['family']:30s} {r['result']:19s} {','.join(r['kinds']):12s} {r['sites']:3d}  {r['reason']}")
