"Plans, adapters and runs against the real PEFT, transformers, accelerate, and a Hub on this machine"
import ast, base64, hashlib, json, re, shutil, sys, threading, warnings
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import huggingface_hub, pytest, timm, torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from dataclasses import replace
import fclora
from fclora.adapt import *
from fclora.backbones import create_backbone, single_head
from fclora.cli import main
from fclora.deploy.hub import *
from fclora.deploy.peft import *
from fclora.files import write_json
from fclora.find import find_sites
from fclora.lora import *
from fclora.make_plan import make_plan
from fclora.plan import Plan
from fclora.runs.folder import load_model, load_run, read_config, run_files
from fclora.runs.run import Run, probe_logits
from fclora.scorers.measure import measure
from fclora.sites import kinds as all_kinds

peft,transformers,accelerate = (pytest.importorskip(o) for o in ('peft','transformers','accelerate'))
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing` is deprecated'),
              pytest.mark.filterwarnings('ignore:.*computes query, key and value in one'), pytest.mark.filterwarnings('ignore:Use .content=.*to upload raw bytes')]
def raises(piece, err=ValueError): return pytest.raises(err, match=piece)
vision = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8, num_labels=3)
language = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=40, num_labels=3, pad_token_id=0)

def make(name):
    "A model with random weights, the same ones every time"
    torch.manual_seed(0)
    if name.startswith('timm'):
        m = timm.create_model('test_vit' if name=='timm' else 'deit_tiny_distilled_patch16_224', img_size=32, num_classes=3, depth=2).eval()
        return single_head(m) if name=='timm one head' else m
    cls,cfg,kw = dict(vit=('ViTForImageClassification','ViTConfig',vision), deit=('DeiTForImageClassification','DeiTConfig',vision),
                      llama=('LlamaForCausalLM','LlamaConfig',language), score=('LlamaForSequenceClassification','LlamaConfig',language))[name]
    return getattr(transformers, cls)(getattr(transformers, cfg)(**kw)).eval()

def logits(model, name):
    g = torch.Generator().manual_seed(3)
    x = torch.randint(1, 40, (2,5), generator=g) if name in ('llama','score') else torch.randn(2, 3, *[32 if name.startswith('timm') else 16]*2, generator=g)
    with torch.no_grad(): out = model.eval()(x)
    return out if isinstance(out, torch.Tensor) else out.logits

kinds = tuple(k for k in all_kinds if k!='conv')

def some_plan(model, kinds=kinds, every=4):
    ss = [s for s in find_sites(model, kinds)]
    return Plan('m', ss, {s.name:(5*i+1)%every for i,s in enumerate(ss)}, 0, lo=0)   # 0 among them

def trained(model, seed=1, std=.1):
    "Adapters and head moved, whoever made them"
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad: nn.init.normal_(p, std=std)
    return model.eval()

def built(pm): return {n.removeprefix('base_model.model.'):(m.r['default'], m.scaling['default']) for n,m in pm.named_modules() if hasattr(m, 'lora_A') and hasattr(m, 'scaling')}
def own(model): return {n:(sum(map(len, m.lora_A.values())), *set(m.scaling.values())) for n,m in adapted_layers(model).items()}
def same_models(a, b, name, atol=1e-5): assert_close(logits(a, name), logits(b, name), atol=atol, rtol=0)

separate,fused = ['vit','deit','llama','score'],['timm','timm distilled','timm one head']

# --- Plan to PEFT

@pytest.mark.parametrize('scaling', ['sqrt','rank','by site'])
@pytest.mark.parametrize('name', separate)
def test_peft_builds_the_ranks_scalings_and_parameters_of_the_plan(name, scaling):
    model = make(name)
    plan = some_plan(model)
    if scaling=='by site': scaling = {n:1+i%3 for i,n in enumerate(plan.ranks)}
    plan = replace(plan, lora_alpha=5, scaling=scaling, dropout=.1)
    assert 0 in plan.ranks.values() and len(set(plan.ranks.values()))==4
    pm = get_peft_model(make(name), plan.to_peft(model))
    ours = freeze(plan.adapt(model))
    assert built(pm)=={n:(r, pytest.approx(s)) for n,(r,s) in own(ours).items()}
    n = count_params(ours)
    assert pm.get_nb_trainable_parameters()[0]==n['adapter']+n['head']==n['trainable']

def test_fused_layers_get_the_sum_of_ranks_and_a_word():
    model = make('timm')
    plan = some_plan(model)
    with pytest.warns(UserWarning, match='fills the zeros between their blocks'): cfg = plan.to_peft(model)
    want = {p:sum(plan.ranks[s.name] for s in plan.sites if s.path==p) for p in {s.path for s in plan.sites}}
    assert {p:r for p,(r,_) in built(get_peft_model(make('timm'), cfg)).items()}=={p:r for p,r in want.items() if r}

class Twins(nn.Module):
    "Names of which one is the end of another, and numbers that a loose dot would match"
    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict(dict(q=nn.Linear(4, 4), k=nn.Linear(4, 4)))
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.decoder = nn.ModuleDict(dict(blocks=nn.ModuleList(block() for _ in range(2))))
        self.blocksx0 = block()
    def forward(self, x): return self.blocks[0].q(x)

@pytest.mark.parametrize('with_model', [True,False])
def test_nothing_but_the_sites_of_the_plan_is_matched(with_model):
    m = Twins()
    ss = find_sites(m, ('q','k'))
    ranks = {'blocks.0.q':2, 'blocks.1.k':1, 'decoder.blocks.0.q':3, 'blocksx0.q':1}   # without decoder.blocks.1.k
    plan = Plan('twins', ss, {s.name:ranks.get(s.name, 0) for s in ss}, 7, lo=0)
    with pytest.warns() as seen:
        pm = get_peft_model(Twins(), plan.to_peft(m if with_model else None))
        warnings.warn('the only one')
    assert {k:r for k,(r,_) in built(pm).items()}==ranks and [str(w.message) for w in seen]==['the only one']

def test_plan_of_another_model_and_ambiguous_heads_are_refused():
    plan = some_plan(make('vit'))
    with raises('has no site'): plan.to_peft(make('deit'))
    m = make('vit')
    m.vit.my_classifier = nn.Linear(2, 2)
    with raises('vit.my_classifier together with the head classifier'): plan.to_peft(m)

def test_other_adapters_are_refused(tmp_path, monkeypatch):
    class Other(LoRA): pass
    monkeypatch.setitem(adapters, 'other', Other)
    m = make('vit')
    plan = replace(some_plan(m), adapter='other')
    with raises("the adapter 'other', only of lora"): plan.to_peft(m)
    with raises("the adapter 'other', only of lora"): save_peft(plan.adapt(m), tmp_path/'out')
    assert plan_of(m).adapter=='other' and not (tmp_path/'out').exists()

def test_further_settings_reach_peft():
    m = make('score')
    cfg = some_plan(m).to_peft(m, task_type='SEQ_CLS')
    assert type(get_peft_model(m, cfg)).__name__=='PeftModelForSequenceClassification'

# --- adapters to PEFT and back

@pytest.mark.parametrize('scaling', ['sqrt','rank'])
@pytest.mark.parametrize('name', separate+fused)
def test_peft_computes_what_we_compute_and_the_adapter_comes_back(name, scaling, tmp_path):
    ours = make(name)
    plan = some_plan(ours)
    trained(freeze(adapt(ours, plan.ranks, lora_alpha=6, scaling=scaling)))
    assert (logits(ours, name)-logits(make(name), name)).abs().max()>1e-2
    save_peft(ours, tmp_path)
    same_models(PeftModel.from_pretrained(make(name), tmp_path), ours, name)
    merged = PeftModel.from_pretrained(make(name), tmp_path).merge_and_unload()
    same_models(merged, ours, name, atol=1e-4)
    back = load_peft(make(name), tmp_path)
    assert plan_of(back).ranks=={k:r for k,r in plan.ranks.items() if r}
    want,got = adapter_state(ours),adapter_state(back)
    assert list(want)==list(got)
    for k in want: assert_close(got[k], want[k], atol=1e-6, rtol=1e-5)
    same_models(back, ours, name)

def test_a_weight_that_is_read_is_not_planned_for_peft():
    m = timm.create_model('beit_base_patch16_224', img_size=32, embed_dim=16, depth=1, num_heads=2)
    plan = make_plan('beit', find_sites(m), method='uniform', budget=3)
    with raises('without calling its layer'): plan.to_peft(m)

def test_a_convolution_is_not_handed_to_peft(tmp_path):
    m = make('timm')
    conv = next(s.name for s in find_sites(m, ('conv',)))
    with raises('patch_embed.proj is not a linear layer'): save_peft(adapt(m, {conv:2}), tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_adapters_that_never_trained_keep_their_ranks(tmp_path):
    ours = adapt(make('timm'), some_plan(make('timm')).ranks)
    back = load_peft(make('timm'), save_peft(ours, tmp_path))
    assert not any(B.any() for m in adapted_layers(back).values() for B in m.lora_B.values())
    assert {p:len(m.factors()[0])//len(m.sites) for p,m in adapted_layers(back).items()}=={p:len(m.factors()[0]) for p,m in adapted_layers(ours).items()}

made_by_peft = dict(
    plain=('vit', dict(r=4, target_modules=['q_proj','v_proj'])),
    head=('vit', dict(r=4, target_modules=['q_proj','v_proj'], modules_to_save=['classifier'], use_rslora=True, lora_alpha=16)),
    patterns=('deit', dict(r=3, lora_alpha=7, target_modules=['q_proj','k_proj','fc1'], rank_pattern={'layers.1.attention.q_proj':5, r'.*\.fc1':1}, alpha_pattern={'k_proj':2, 'q_proj':40}, use_rslora=True)),
    some_layers=('llama', dict(r=2, target_modules=r'.*\.(q_proj|o_proj|down_proj)', layers_to_transform=None, lora_dropout=.1, task_type='CAUSAL_LM')),
    layers=('llama', dict(r=2, target_modules=['k_proj','v_proj'], layers_to_transform=[1], layers_pattern='layers')),
    sequence=('score', dict(r=2, target_modules=['q_proj','v_proj'], task_type='SEQ_CLS')),
    fused=('timm', dict(r=5, target_modules=['qkv'], modules_to_save=['head'])),
    mixed=('timm', dict(r=2, target_modules=['qkv','attn.proj','fc1'], alpha_pattern={'qkv':3}, use_rslora=True)),
    two_heads=('timm distilled', dict(r=2, target_modules=['qkv'], modules_to_save=['head','head_dist'])))

@pytest.mark.parametrize('case', made_by_peft)
def test_an_adapter_made_by_peft_computes_the_same_in_ours(case, tmp_path):
    name,cfg = made_by_peft[case]
    theirs = trained(get_peft_model(make(name), LoraConfig(**cfg)))
    theirs.save_pretrained(tmp_path)
    model = make(name)
    flags,weights = {n:p.requires_grad for n,p in model.named_parameters()},{id(p) for p in model.parameters()}
    back = load_peft(model, tmp_path)
    assert back is model and {n:p.requires_grad for n,p in back.named_parameters() if n in flags}==flags and weights<={id(p) for p in back.parameters()}
    same_models(back, theirs, name)
    assert (logits(back, name)-logits(make(name), name)).abs().max()>1e-3
    per = {}
    for s,r in plan_of(back).ranks.items(): per.setdefault(re.sub(r'(qkv)\.[qkv]$', r'\1', s), set()).add(r)
    assert per=={p:{r} for p,(r,_) in built(theirs).items()}   # a dense B on a fused layer: its rank for q, k and v each
    again = save_peft(back, tmp_path/'again')
    same_models(PeftModel.from_pretrained(make(name), again), theirs, name)

def from_peft(tmp_path, name='vit', **cfg):
    "Folder of an adapter that PEFT has saved"
    trained(get_peft_model(make(name), cfg.pop('config', LoraConfig)(**cfg))).save_pretrained(tmp_path/'theirs')
    return tmp_path/'theirs'

qv = dict(r=2, target_modules=['q_proj','v_proj'])

@pytest.mark.parametrize('name,cfg,piece', [
    ('vit', dict(qv, use_dora=True), 'use_dora=True'), ('vit', dict(qv, bias='lora_only'), "bias='lora_only'"), ('vit', dict(qv, lora_bias=True), 'lora_bias=True'),
    ('vit', dict(qv, init_lora_weights='pissa'), "init_lora_weights='pissa'"), ('vit', dict(qv, config=peft.AdaLoraConfig, total_step=10), 'type ADALORA'),
    ('vit', dict(config=peft.LoHaConfig, target_modules=['q_proj']), 'type LOHA'), ('vit', dict(qv, target_modules=['projection']), 'is a Conv2d'),
    ('llama', dict(qv, target_modules=['embed_tokens','q_proj']), 'Embedding|embed_tokens'), ('llama', dict(qv, modules_to_save=['lm_head']), 'lm_head'),
    ('llama', dict(qv, target_modules=['lm_head']), 'lm_head is adapted, but is no site'), ('llama', dict(qv, trainable_token_indices=[1,2]), 'trainable_token_indices')])
def test_what_our_adapters_cannot_hold_is_refused_and_nothing_changes(name, cfg, piece, tmp_path):
    folder,model = from_peft(tmp_path, name, **cfg),make(name)
    before,mods = deepcopy(model.state_dict()),[type(m) for m in model.modules()]
    with raises(piece): load_peft(model, folder)
    assert [type(m) for m in model.modules()]==mods and all(p.requires_grad for p in model.parameters())
    for k,v in model.state_dict().items(): assert_close(v, before[k], rtol=0, atol=0)

def test_damaged_adapters_are_refused(tmp_path):
    folder = from_peft(tmp_path, **qv, modules_to_save=['classifier'])
    w,c = folder/'adapter_model.safetensors',folder/'adapter_config.json'
    sd,cfg = load_file(w),json.loads(c.read_text())
    def check(piece, err=ValueError):
        with raises(piece, err): load_peft(make('vit'), folder)
    a = next(k for k in sd if 'lora_A' in k)
    save_file({k:v for k,v in sd.items() if k!=a}, w); check('tensors are missing')
    save_file({k:v for k,v in sd.items() if 'classifier' not in k}, w); check('does not fit')
    save_file(dict(sd, **{a:sd[a][:1].clone()}), w); check('does not fit')
    save_file(dict(sd, **{'base_model.model.vit.other.lora_A.weight':torch.ones(1)}), w); check('fit nothing')
    save_file(sd, w)
    with raises('does not fit'): load_peft(make('llama'), folder)
    w.write_bytes(w.read_bytes()[:-9]); check('damaged')
    w.rename(folder/'adapter_model.bin'); check('pickled', FileNotFoundError)
    write_json(c, dict(cfg, some_future_switch=True)); check('some_future_switch')
    c.write_text('{'); check('damaged')
    c.unlink(); check('no adapter_config.json', FileNotFoundError)

def test_adapted_and_plain_models_are_told_apart(tmp_path):
    folder = from_peft(tmp_path, **qv)
    with raises('adapted already'): load_peft(load_peft(make('vit'), folder), folder)
    with raises('no adapters to save'): save_peft(make('vit'), tmp_path)
    with raises('no adapters'): plan_of(make('vit'))

def test_half_precision_base(tmp_path):
    ours = trained(freeze(adapt(make('vit').bfloat16(), some_plan(make('vit')).ranks)))
    back = load_peft(make('vit').bfloat16(), save_peft(ours, tmp_path))
    for k,v in adapter_state(ours).items(): assert_close(adapter_state(back)[k], v, atol=1e-6, rtol=1e-5)

def test_peft_is_imported_only_where_it_is_used(monkeypatch):
    for f in Path(fclora.__file__).parent.rglob('*.py'):
        body = ast.parse(f.read_text(encoding='utf-8')).body
        names = {a.name for n in body if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in body if isinstance(n, ast.ImportFrom) and not n.level}
        assert not {'peft','transformers','accelerate'}&{str(n).split('.')[0] for n in names}, f
    monkeypatch.setitem(sys.modules, 'peft', None)
    with raises(re.escape("pip install 'fclora[peft]'"), ImportError): some_plan(make('timm')).to_peft()

def test_a_run_leaves_for_peft(run, tmp_path, capsys):
    assert main(['peft', str(run[0]), str(tmp_path/'a')])==0
    said = capsys.readouterr().out
    base = eval(re.search(r'create_backbone\(.*?\)', said)[0], dict(create_backbone=create_backbone))
    pm = PeftModel.from_pretrained(base, tmp_path/'a')
    assert_close(probe_logits(pm, 32), probe_logits(load_model(run[0])[0], 32), atol=1e-5, rtol=0)
    assert main(['peft', str(run[0]), str(tmp_path/'a')])==1 and '--force' in capsys.readouterr().err

# --- transformers.Trainer and accelerate

def toy_images(n=24):
    "Images of three shades"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n)%3
    return [dict(pixel_values=torch.randn(3, 16, 16, generator=g)*.3+c-1, labels=c) for c in y]

def scored_plan(model, images):
    batches = [{k:torch.stack([o[k] for o in images[i:i+8]]) for k in images[0]} for i in range(0, len(images), 8)]
    ss = find_sites(model)
    return make_plan('tiny', ss, measure(model, batches, ss), budget=12)

def test_trainer_trains_a_plan(tmp_path):
    images,model = toy_images(),make('vit')
    plan = scored_plan(model, images)
    pm = get_peft_model(model, plan.to_peft(model))
    args = transformers.TrainingArguments(output_dir=str(tmp_path/'out'), max_steps=12, per_device_train_batch_size=12, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy='no', seed=0)
    trainer = transformers.Trainer(model=pm, args=args, train_dataset=images, eval_dataset=images)
    first = trainer.evaluate()['eval_loss']
    trainer.train()
    assert trainer.evaluate()['eval_loss']<.9*first
    trainer.save_model(tmp_path/'adapter')
    back = load_peft(make('vit'), tmp_path/'adapter')
    assert plan_of(back).ranks==plan.ranks
    same_models(back, pm, 'vit')

def test_accelerate_trains_our_adapters(tmp_path):
    images,model = toy_images(),make('vit')
    plan = scored_plan(model, images)
    freeze(adapt(model, plan.ranks))
    acc = accelerate.Accelerator(cpu=True)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model,opt,dl = acc.prepare(model, opt, torch.utils.data.DataLoader(images, 12))
    losses = []
    for _ in range(6):
        for batch in dl:
            loss = model(**batch).loss
            acc.backward(loss); opt.step(); opt.zero_grad()
            losses.append(loss.item())
    assert losses[-1]<.9*losses[0]
    ours = acc.unwrap_model(model)
    same_models(PeftModel.from_pretrained(make('vit'), save_peft(ours, tmp_path)), ours, 'vit')

# --- model card

def test_the_card_says_what_was_measured(run, tmp_path):
    shutil.copytree(run[0], tmp_path/'run')
    out = save_card(tmp_path/'run', 'me/digits')
    card,m,cfg = ModelCard.load(out),json.loads((run[0]/'metrics.json').read_text())['test'],read_config(run[0])
    d,got = card.data.to_dict(),{r.metric_name.split(' (')[0]:r for r in card.data.eval_results}
    assert d['library_name']=='fclora' and 'base_model' not in d and d['temperature']==pytest.approx(cfg['T'], abs=1e-6)
    for k,name in (('accuracy','Accuracy'), ('ece_raw','ECE before the temperature'), ('ece','ECE')):
        assert got[name].metric_value==pytest.approx(m[k], abs=1e-6) and got[name].metric_args['n']==m['n'] and f"({m['n']:,} images)" in got[name].metric_name
    assert str(Plan.load(run[0]/'plan.json')) in card.text and '| test accuracy |' in card.text and cfg['weights_sha256'] in card.text
    png = (tmp_path/'run'/'plan.png').read_bytes()
    assert png.startswith(b'\x89PNG') and '(plan.png)' in card.text

def test_the_lines_of_the_card_run(run, folder, tmp_path, monkeypatch):
    shutil.copy(next((folder/'cat').iterdir()), tmp_path/'photo.jpg')
    monkeypatch.chdir(tmp_path)
    code = re.search(r'```python\n(.*?)```', model_card(run[0], str(run[0])).text, re.S)[1]
    names = {}
    exec(code, names)
    assert names['probs'].shape==(1,10) and names['probs'].sum().item()==pytest.approx(1)

def test_cards_of_other_runs(run):
    r = load_run(run[0], model=False)
    deit,c = 'deit_tiny_patch16_224.fb_in1k',r.config
    d = lambda **kw: model_card(Run(dict(c, **kw), r.metrics, r.history, r.plan)).data.to_dict()
    named = d(model=dict(c['model'], name=deit))
    assert (named['base_model'], named['base_model_relation'])==('timm/'+deit, 'adapter')
    assert d(model=dict(c['model'], name=deit), method='full')['base_model_relation']=='finetune'
    assert d(data=dict(c['data'], name='cifar10'))['datasets']==['uoft-cs/cifar10']
    local = model_card(Run(dict(c, model=dict(c['model'], pretrained=False, checkpoint=dict(name='mine.pth', sha256='ab'*32))), r.metrics, r.history, r.plan)).text
    assert 'checkpoint=' in local and 'mine.pth' in local and 'ab'*32 in local
    early = model_card(Run(dict(c, T=None, status='epoch 1 of 3'), {}, None, r.plan))
    assert 'stopped at epoch 1 of 3' in early.text and '## Results' not in early.text and 'model-index' not in early.data.to_dict()
    own = model_card(run[0], license='mit', datasets=['me/pets']).data
    assert (own.license,own.datasets)==('mit',['me/pets'])

# --- the Hub

class Hub(BaseHTTPRequestHandler):
    "As much of the Hub's HTTP as creating, committing (small files inline, weights by LFS), listing and downloading take"
    repos,blobs,asked = {},{},[]
    def log_message(self, *a): pass
    def reply(self, body=b'', status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k,v in dict({'Content-Length':str(len(body)), 'Content-Type':'application/json'}, **headers).items(): self.send_header(k.replace('_','-'), v)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def none(self): self.reply(dict(error='Repository not found'), 401, X_Error_Code='RepoNotFound', X_Error_Message='Repository not found')
    def body(self): return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    def writer(self): return self.headers.get('Authorization')=='Bearer hf_writer'
    def at(self): return f'http://{self.headers["Host"]}'

    def do_POST(self):
        body,path = self.body(),self.path.split('?')[0]
        self.asked.append(('POST', path))
        if path=='/api/validate-yaml': return self.reply(dict(errors=[] if '---' in json.loads(body)['content'] else [dict(message='no front matter')], warnings=[]))
        if not self.writer(): return self.reply(dict(error='forbidden'), 403)
        if path=='/api/repos/create':
            d = json.loads(body)
            name = f"{d['organization']}/{d['name']}"
            if name in self.repos: return self.reply(dict(error='exists', url=f'{self.at()}/{name}'), 409)
            self.repos[name] = dict(files={}, private=d.get('visibility')=='private')
            return self.reply(dict(url=f'{self.at()}/{name}', name=name, id='1'))
        if m := re.fullmatch(r'/api/models/(.+)/preupload/main', path):
            return self.reply(dict(files=[dict(path=f['path'], uploadMode='lfs' if f['path'].endswith('.safetensors') else 'regular', shouldIgnore=False) for f in json.loads(body)['files']]))
        if m := re.fullmatch(r'/(.+)\.git/info/lfs/objects/batch', path):
            return self.reply(dict(transfer='basic', objects=[dict(o, actions=dict(upload=dict(href=f"{self.at()}/blobs/{o['oid']}"))) for o in json.loads(body)['objects']]), Content_Type='application/vnd.git-lfs+json')
        if m := re.fullmatch(r'/api/models/(.+)/commit/main', path):
            for l in map(json.loads, body.splitlines()):
                if l['key']=='file': self.repos[m[1]]['files'][l['value']['path']] = base64.b64decode(l['value']['content'])
                if l['key']=='lfsFile': self.repos[m[1]]['files'][l['value']['path']] = self.blobs[l['value']['oid']]
            return self.reply(dict(commitUrl=f'{self.at()}/{m[1]}/commit/{"a"*40}', commitOid='a'*40, success=True))
        self.reply(dict(error='?'), 404)

    def do_PUT(self):
        oid,body = self.path.rsplit('/', 1)[1],self.body()
        assert hashlib.sha256(body).hexdigest()==oid
        self.blobs[oid] = body
        self.reply()

    def do_GET(self):
        path = self.path.split('?')[0]
        self.asked.append(('GET', path))
        if path=='/page': return self.reply(b'<html>')
        m = re.fullmatch(r'/api/models/(.+?)(?:/revision/(.+)|/tree/(.+))?', path) or re.fullmatch(r'/(.+?)/resolve/(.+?)/(.+)', path)
        repo = self.repos.get(m and m[1])
        if repo is None or repo['private'] and not self.writer(): return self.none()
        oid = lambda b: hashlib.sha256(b).hexdigest()[:40]
        if path.startswith('/api'):
            if m[2] not in (None,'main','a'*40): return self.reply(dict(error='no revision'), 404, X_Error_Code='RevisionNotFound')
            if m[3]: return self.reply([dict(type='file', path=n, size=len(b), oid=oid(b)) for n,b in repo['files'].items()])
            return self.reply(dict(id=m[1], sha='a'*40, siblings=[dict(rfilename=n) for n in repo['files']], private=repo['private'], tags=[], downloads=0, likes=0))
        b = repo['files'].get(m[3])
        self.reply(b, ETag=f'"{oid(b)}"', X_Repo_Commit='a'*40, Content_Type='application/octet-stream') if b is not None else self.reply(status=404, X_Error_Code='EntryNotFound')
    do_HEAD = do_GET

@pytest.fixture(scope='module')
def run(run, tmp_path_factory):
    "The run of the session in a folder of its own, since an upload writes a card into it"
    out = tmp_path_factory.mktemp('hub')/'digits'
    shutil.copytree(run[0], out)
    return out,run[1]

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A Hub on this machine, with an empty cache and a token that may write"
    Hub.repos.clear(); Hub.blobs.clear(); Hub.asked.clear()
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    c = huggingface_hub.constants
    for k,v in dict(ENDPOINT=url, HF_HUB_CACHE=str(tmp_path/'cache'), HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=str(tmp_path/'token'), HF_STORED_TOKENS_PATH=str(tmp_path/'tokens'),
                    HUGGINGFACE_CO_URL_TEMPLATE=url+'/{repo_id}/resolve/{revision}/{filename}', HF_HUB_OFFLINE=False).items(): monkeypatch.setattr(c, k, v)
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    yield Hub
    server.shutdown()
    server.server_close()

def test_a_run_goes_to_the_hub_and_comes_back(hub, run, capsys):
    url = push_to_hub(run[0], 'me/digits', license='mit')
    files = hub.repos['me/digits']['files']
    assert url.endswith('/me/digits') and url in capsys.readouterr().out
    assert set(files)=={'adapter.safetensors','fclora.json','plan.json','metrics.json','history.csv','README.md','plan.png'}   # no report with the images in it
    assert b'license: mit' in files['README.md'] and files['adapter.safetensors']==(run[0]/'adapter.safetensors').read_bytes()
    back = from_pretrained('me/digits')
    assert_close(probe_logits(back.model, 32), probe_logits(load_model(run[0])[0], 32), atol=1e-6, rtol=0)
    assert back.metrics==load_run(run[0], model=False).metrics and back.plan==Plan.load(run[0]/'plan.json')

def test_pushing_again_keeps_a_card_that_was_edited_and_renews_one_of_other_weights(hub, run, tmp_path):
    shutil.copytree(run[0], tmp_path/'run')
    card = save_card(tmp_path/'run', 'me/digits')
    card.write_text(card.read_text()+'\nEdited.\n')
    push_to_hub(tmp_path/'run', 'me/digits', report=True)
    assert b'Edited.' in hub.repos['me/digits']['files']['README.md'] and 'report.html' in hub.repos['me/digits']['files']
    card.write_text('the card of an older run')
    push_to_hub(tmp_path/'run', 'me/digits')
    assert b'library_name: fclora' in hub.repos['me/digits']['files']['README.md']

def test_paths_of_this_machine_stay_here(hub, run, tmp_path):
    shutil.copytree(run[0], tmp_path/'run')
    for f in ('fclora.json','plan.json'):
        d = json.loads((tmp_path/'run'/f).read_text())
        d['settings' if f=='plan.json' else 'data'] = dict(data=dict(name='pets', source='/secret/pets')) if f=='plan.json' else dict(d['data'], name='pets', source='/secret/pets')
        write_json(tmp_path/'run'/f, d)
    push_to_hub(tmp_path/'run', 'me/pets')
    assert not [n for n,b in hub.repos['me/pets']['files'].items() if b'/secret' in b or str(tmp_path).encode() in b]
    assert from_pretrained('me/pets').config['data']['source']=='pets'

def test_private_repositories_need_the_token(hub, run, monkeypatch):
    push_to_hub(run[0], 'me/digits', private=True)
    assert hub.repos['me/digits']['private']
    monkeypatch.delenv('HF_TOKEN')
    with raises('no such repository, or it is private', FileNotFoundError): from_pretrained('me/digits')
    assert from_pretrained('me/digits', token='hf_writer').config['method']=='fclora'

def test_only_known_files_are_downloaded_and_damage_is_seen(hub, run, tmp_path):
    push_to_hub(run[0], 'me/digits')
    files = hub.repos['me/digits']['files']
    files['weights.pkl'] = files['model.bin'] = b'evil'
    got = fetch('me/digits', run_files)
    assert not {o.name for o in got.rglob('*')}&{'weights.pkl','model.bin'} and not any('weights.pkl' in p or 'model.bin' in p for _,p in hub.asked if '/resolve/' in p)
    hub.repos['me/other'] = dict(files=dict(files, **{'adapter.safetensors':files['adapter.safetensors'][:-4]+b'0000'}), private=False)
    with raises('damaged or was exchanged'): from_pretrained('me/other')

def test_a_peft_adapter_from_the_hub(hub, tmp_path):
    folder = from_peft(tmp_path, **qv)
    hub.repos['me/lora'] = dict(files={f.name:f.read_bytes() for f in folder.iterdir()}, private=False)
    same_models(load_peft(make('vit'), 'me/lora'), load_peft(make('vit'), folder), 'vit', atol=0)
    with raises('me/lora is no fclora run.*load_peft reads PEFT adapters'): from_pretrained('me/lora')

def test_mistakes_with_the_hub(hub, run, monkeypatch, capsys):
    with raises('OWNER/NAME'): from_pretrained('no such name!')
    with raises('OWNER/NAME'): push_to_hub(run[0], 'a/b/c')
    with raises('no such repository', FileNotFoundError): from_pretrained('me/none')
    push_to_hub(run[0], 'me/digits')
    with raises('no such revision', FileNotFoundError): from_pretrained('me/digits', revision='v9')
    hub.repos['me/empty'] = dict(files={}, private=False)
    with raises('no fclora run'): from_pretrained('me/empty')
    with raises('token.*does not allow', PermissionError): push_to_hub(run[0], 'me/digits', token='hf_reader')
    monkeypatch.delenv('HF_TOKEN')
    asked = len(hub.asked)
    capsys.readouterr()
    assert main(['push', str(run[0]), 'me/digits'])==1 and 'hf auth login' in capsys.readouterr().err and len(hub.asked)==asked

def test_no_network(hub, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with raises('cannot be reached', ConnectionError): from_pretrained('me/digits')
    with raises('cannot upload to me/digits', ConnectionError): push_to_hub(run[0], 'me/digits')
