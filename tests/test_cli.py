"The commands end to end, as a user runs them"
import csv, json, re, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest, timm, torch
from PIL import Image
from conftest import QUICK, fclora, make_images
import fclora as package
from fclora.cli import command_table, command_themes, commands, main, parser, usage
from fclora.data.pixels import to_input
from fclora.data.sources import load_images
from fclora.report import page
from fclora.runs.folder import load_model, load_run
from fclora.runs.run import probe_logits

def test_finetune_leaves_a_complete_run(run):
    out,res = run
    assert {o.name for o in out.iterdir()}=={'adapter.safetensors','fclora.json','plan.json','metrics.json','history.csv','report.html'}
    m = json.loads((out/'metrics.json').read_text())
    assert m['total_rank']==100 and m['params']['adapter']==25_600
    assert m['test']['n']==719 and 0<m['test']['ece']<1 and m['test']['T']>0
    assert m['test']['nll']<m['test']['nll_raw']
    assert f"{m['test']['accuracy']*100:.2f}" in res.stdout
    assert len(pd.read_csv(out/'history.csv'))==1

def test_evaluate_reproduces_the_test_numbers(run, tmp_path):
    out,_ = run
    res = fclora('evaluate', out, '--quiet', '--out', tmp_path/'e.json')
    assert res.returncode==0, res.stderr
    got,want = json.loads((tmp_path/'e.json').read_text()),json.loads((out/'metrics.json').read_text())['test']
    assert got['accuracy']==want['accuracy'] and got['ece']==pytest.approx(want['ece'], abs=1e-6)

def test_predict_tables_and_a_bad_file(run, tmp_path, capsys):
    out,_ = run
    x,y = load_images('digits').test
    for i in range(4): Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    (tmp_path/'bad.png').write_bytes(b'no image')
    res = fclora('predict', out, tmp_path, '--format', 'csv', '--top-k', 2)
    assert res.returncode==1 and 'bad.png' in res.stderr
    rows = list(csv.DictReader(res.stdout.splitlines()))
    assert len(rows)==8 and all(0<=float(r['probability'])<=1 for r in rows)
    assert main(['predict', str(out), str(tmp_path/'0.png'), '--format', 'jsonl', '--top-k', '10'])==0
    top = json.loads(capsys.readouterr().out)['top']
    assert sum(o['probability'] for o in top)==pytest.approx(1, abs=1e-5)
    assert main(['predict', str(out), str(tmp_path/'0.png')])==0
    assert 'probability' in capsys.readouterr().out

def test_a_reader_that_stops_is_no_error(run, tmp_path):
    Image.new('RGB', (32,32)).save(tmp_path/'0.png')
    exe = Path(sys.executable).parent/'fclora'
    p = subprocess.Popen([exe, 'predict', run[0], tmp_path/'0.png'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    assert (p.wait(), p.stderr.read())==(141, '')

def test_merge_needs_no_fclora(run, tmp_path):
    out,_ = run
    assert main(['merge', str(out), str(tmp_path/'plain'), '--calibrated'])==0
    model,cfg = load_model(out)
    want = probe_logits(model, 32)/cfg['T']
    torch.save(want, tmp_path/'want.pt')
    code = f'''import sys, timm, torch
m = timm.create_model('local-dir:{tmp_path}/plain', pretrained=True).eval()
x = torch.sin(torch.arange(2*3*32*32, dtype=torch.float64)*.37).view(2, 3, 32, 32).float()
torch.testing.assert_close(m(x), torch.load('{tmp_path}/want.pt'), atol=1e-4, rtol=1e-4)
assert not any(n.startswith('fclora') for n in sys.modules)'''
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    assert main(['merge', str(out), str(tmp_path/'plain')])==1

def test_the_first_lines_say_what_will_happen(folder, tmp_path, capsys):
    args = [o for o in QUICK if o!='--quiet']
    assert main(['finetune', str(folder), '--model', 'vit_pico', *args, '--batch-size', '8', '--out', str(tmp_path/'run')])==0
    first = [o for o in capsys.readouterr().out.splitlines() if not o.startswith('checked: ')]
    for word in ('vit_pico (1,204,866 parameters)', '2 classes'): assert word in first[0]
    for word in ('100 ranks (25,600 parameters)', '18 sites (q,k,v)', 'head (258 parameters)', '1 epochs at batch size 8'): assert word in first[1]

def test_score_forecasts_what_the_upper_blocks_cost(tmp_path, capsys):
    costs = {}
    for k in ('0','3'):
        assert main(['score', '--budget', '54', '--score-batches', '2', '--quiet', '--from-block', k, '--out', str(tmp_path/k)])==0
        costs[k] = json.loads((tmp_path/k).read_text())['settings']['forecast']
        assert f"a step: {costs[k]['step']:.0%} of the arithmetic of full fine-tuning" in capsys.readouterr().out
    assert costs['3']['lowest_block']==3 and costs['3']['step']<costs['0']['step'] and costs['3']['kept']<costs['0']['kept']
    assert main(['score', '--from-block', '9', '--out', str(tmp_path/'x')])==1 and not (tmp_path/'x').exists()
    assert 'end at 5' in capsys.readouterr().err

def test_score_and_finetune_from_its_plan(tmp_path, capsys):
    assert main(['score', '--budget', '54', '--score-batches', '2', '--quiet', '--weights', 'sample_fisher=1', '--out', str(tmp_path/'p.json')])==0
    assert 'block' in capsys.readouterr().out
    plan = json.loads((tmp_path/'p.json').read_text())
    assert sum(o['rank'] for o in plan['sites'])==54 and 'sample_fisher' in plan['sites'][0]
    for o in plan['sites']: o['rank'] = int(o['kind']=='v')
    plan['method'] = 'by-hand'
    (tmp_path/'p.json').write_text(json.dumps(plan))
    assert main(['finetune', *QUICK, '--plan', str(tmp_path/'p.json'), '--out', str(tmp_path/'run')])==0
    cfg = json.loads((tmp_path/'run'/'fclora.json').read_text())
    assert {k for k,v in cfg['ranks'].items() if v}=={f'blocks.{i}.attn.qkv.v' for i in range(6)}
    assert load_run(tmp_path/'run').config['method']=='by-hand'

@pytest.mark.parametrize('method', ['uniform','random','inverse','naive','head','full'])
def test_every_method_round_trips(method, folder, tmp_path):
    out = tmp_path/'run'
    assert main(['finetune', str(folder), '--model', 'vit_pico', '--method', method, *QUICK, '--batch-size', '8', '--out', str(out)])==0
    r = load_run(out)
    assert r.config['method']==method and r.config['classes']==['cat','dog']
    assert r.metrics['params']['trainable' if method!='full' else 'total']>0
    assert (r.plan is None)==(method in ('head','full'))

def test_compare_tabulates_and_resumes(folder, tmp_path, capsys):
    args = ['compare', str(folder), '--model', 'vit_pico', '--methods', 'uniform,head', '--seeds', '0,1', *QUICK, '--batch-size', '8', '--out', str(tmp_path/'c')]
    assert main(args)==0
    assert 'uniform' in capsys.readouterr().out
    d = json.loads((tmp_path/'c'/'compare.json').read_text())
    stamps = {f:f.stat().st_mtime_ns for f in (tmp_path/'c').glob('*/metrics.json')}
    assert len(stamps)==4 and (tmp_path/'c'/'compare.html').stat().st_size>1000
    shutil.rmtree(tmp_path/'c'/'head-1')
    assert main([*args, '--resume'])==0
    assert {f for f,t in stamps.items() if f.exists() and f.stat().st_mtime_ns!=t}=={tmp_path/'c'/'head-1'/'metrics.json'}
    assert json.loads((tmp_path/'c'/'compare.json').read_text()).keys()==d.keys()
    assert main([*args, '--resume', '--epochs', '2'])==1
    assert 'other settings' in capsys.readouterr().err
    assert main([*args, '--seeds', 'a,b'])==1
    assert '0,1,2' in capsys.readouterr().err

def test_the_first_blocks_alone(folder, tmp_path, capsys):
    args = ['finetune', str(folder), '--model', 'vit_pico', *QUICK, '--blocks']
    for n,word in (('7', 'between 1 and 6'), ('0', '--blocks must be'), ('many', '--blocks must be a number')):
        assert main([*args, n, '--out', str(tmp_path/'run')])==1 and word in capsys.readouterr().err
    assert main([*args, '4', '--out', str(tmp_path/'run')])==0
    model,cfg = load_model(tmp_path/'run')
    assert len(model.blocks)==cfg['model']['blocks']==4 and {k.split('.')[1] for k in cfg['ranks']}==set('0123')
    assert main(['merge', str(tmp_path/'run'), str(tmp_path/'plain')])==0
    plain = timm.create_model(f"local-dir:{tmp_path/'plain'}", pretrained=True)
    assert len(plain.blocks)==4 and torch.allclose(probe_logits(plain, 32), probe_logits(model, 32), atol=1e-5)
    assert main(['peft', str(tmp_path/'run'), str(tmp_path/'peft')])==0 and 'blocks=4)' in capsys.readouterr().out
    assert main([o for o in args if o!='--quiet']+['auto', '--budget', '36', '--out', str(tmp_path/'auto')])==0
    assert 'a probe is best after block' in capsys.readouterr().out
    model,cfg = load_model(tmp_path/'auto')
    assert 1<=len(model.blocks)==cfg['model']['blocks']<=6
    made = json.loads((tmp_path/'run/fclora.json').read_text())
    (tmp_path/'run/fclora.json').write_text(json.dumps(made | dict(model=made['model'] | dict(blocks='four'))))
    assert main(['evaluate', str(tmp_path/'run')])==1 and 'blocks' in capsys.readouterr().err

def test_other_seeds_choose_the_learning_rate(folder, tmp_path, capsys):
    out = tmp_path/'c'
    args = ['compare', str(folder), '--model', 'vit_pico', '--methods', 'uniform', '--seeds', '0', '--lr-seeds', '5,6', *QUICK, '--out', str(out)]
    assert main(args)==1 and 'add --lrs' in capsys.readouterr().err and not out.exists()
    assert main([*args, '--lrs', '0,1e-2'])==0
    d = json.loads((out/'compare.json').read_text())
    runs = [load_run(o, model=False) for o in sorted(out.glob('uniform*')) if o.is_dir()]
    tried = {lr:[r.metrics['valid']['nll'] for r in runs if r.metrics['seed'] in (5,6) and r.config['recipe']['lr']==lr] for lr in (0,.01)}
    assert d['tuning']['uniform']=={f'{lr:g}':pytest.approx(sum(v)/2) for lr,v in tried.items()} and [len(v) for v in tried.values()]==[2,2]
    assert [r['metrics']['seed'] for r in d['runs']]==[0] and '--lr-seeds 5,6' in d['command']

def test_compare_tunes_each_row_on_validation_images(folder, tmp_path, capsys):
    out = tmp_path/'c'
    args = ['compare', str(folder), '--model', 'vit_pico', '--methods', 'uniform budget=18; uniform; head', '--seeds', '0', '--lrs', '0,1e-2', *QUICK, '--batch-size', '4', '--out', str(out)]
    assert main(args)==0
    d = json.loads((out/'compare.json').read_text())
    assert list(d['methods'])==['uniform budget=18','uniform','head'] and d['tuning'].keys()==d['methods'].keys()
    assert [r['plan'] and sum(s['rank'] for s in r['plan']['sites']) for r in d['runs']]==[18,100,None]
    for r in d['runs']:
        tried = d['tuning'][r['config']['row']]
        assert tried[f"{r['config']['recipe']['lr']:g}"]==min(tried.values())==r['metrics']['valid']['nll']
    assert d['runs'][2]['config']['recipe']['head_lr'] in (0, .01) and len(list(out.glob('*/metrics.json')))==6
    assert shlex.split(d['command'])[:3]==['fclora','compare',str(folder)] and '--lrs 0,1e-2' in d['command']
    capsys.readouterr()
    shutil.rmtree(out)
    for rows,word in (('uniform; fclora budget=9999', 'give a budget in 18..288'), ('uniform; fclora weights=luck=1', "no metric 'luck'"), ('uniform; head smoothing=2', '--smoothing must be'),
                      ('fclora; best', "unknown method 'best'"), ('fclora seed=3', 'no option'), ('fclora colour=red', "no option 'colour'")):
        assert main(['compare', str(folder), '--model', 'vit_pico', '--methods', rows, '--out', str(out)])==1 and word in capsys.readouterr().err
    assert not out.exists()

def test_part_of_a_data_set_and_its_evaluation(tmp_path, capsys):
    data = make_images(tmp_path/'data', classes=('ant','bee','cat','dog'), n=12)
    args = ['finetune', str(data), '--model', 'vit_pico', *QUICK, '--batch-size', '4', '--classes', '1::2', '--limit', '8,4,6', '--out', str(tmp_path/'run')]
    assert main(args)==0
    cfg = json.loads((tmp_path/'run'/'fclora.json').read_text())
    assert cfg['classes']==['bee','dog'] and [cfg['data'][k] for k in ('train','valid','test')]==[8,4,6]
    assert main(['evaluate', str(tmp_path/'run'), '--out', str(tmp_path/'e.json')])==0
    assert json.loads((tmp_path/'e.json').read_text())['accuracy']==json.loads((tmp_path/'run'/'metrics.json').read_text())['test']['accuracy']
    capsys.readouterr()
    for opts,word in ((['--classes','7:'], 'at least two'), (['--limit','8,4'], 'three numbers'), (['--limit','1,1,1'], 'classes')):
        assert main(['finetune', str(data), '--model', 'vit_pico', *opts])==1 and word in capsys.readouterr().err
    assert main(['finetune', 'digits', '--classes', '::2'])==1 and 'digits is a name' in capsys.readouterr().err

def test_same_seed_same_result(folder, tmp_path):
    accs = []
    for name,seed in (('a',3), ('b',3), ('c',4)):
        assert main(['finetune', str(folder), '--model', 'vit_pico', *QUICK, '--batch-size', '8', '--seed', str(seed), '--out', str(tmp_path/name)])==0
        accs.append((tmp_path/name/'adapter.safetensors').read_bytes())
    assert accs[0]==accs[1]!=accs[2]

def test_evaluate_on_a_folder_without_splits(folder, tmp_path):
    out = tmp_path/'run'
    assert main(['finetune', str(folder), '--model', 'vit_pico', *QUICK, '--batch-size', '8', '--schedule', 'onecycle', '--head-warmup', '3', '--out', str(out)])==0
    other = make_images(tmp_path/'other', n=5, seed=1)
    assert main(['evaluate', str(out), str(other), '--out', str(tmp_path/'e.json')])==0
    assert json.loads((tmp_path/'e.json').read_text())['n']==10

def test_local_checkpoint_is_asked_for_again(folder, tmp_path, capsys):
    ckpt = tmp_path/'w.pth'
    torch.save({'model':timm.create_model('vit_pico', pretrained=True).state_dict()}, ckpt)
    out = tmp_path/'run'
    assert main(['finetune', str(folder), '--model', 'vit_pico', '--checkpoint', str(ckpt), *QUICK, '--batch-size', '8', '--out', str(out)])==0
    assert str(tmp_path) not in (out/'fclora.json').read_text().replace(str(folder), '')
    assert main(['evaluate', str(out)])==1
    assert '--checkpoint FILE' in capsys.readouterr().err
    assert main(['evaluate', str(out), '--checkpoint', str(ckpt)])==0

def test_random_weights_are_stored_whole(folder, tmp_path):
    out = tmp_path/'run'
    assert main(['finetune', str(folder), '--model', 'test_vit', '--size', '32', '--no-pretrained', *QUICK, '--batch-size', '8', '--out', str(out)])==0
    assert (out/'model.safetensors').is_file() and load_model(out)[1]['model']['size']==32
    assert main(['merge', str(out), str(tmp_path/'plain')])==0
    plain = timm.create_model(f'local-dir:{tmp_path}/plain', pretrained=True)
    torch.testing.assert_close(probe_logits(plain, 32), probe_logits(load_model(out)[0], 32), atol=1e-4, rtol=1e-4)

def test_one_headed_deit_merges_into_plain_timm(folder, tmp_path):
    out = tmp_path/'run'
    args = ['--model', 'deit_tiny_distilled_patch16_224', '--size', '32', '--one-head', '--no-pretrained', '--budget', '36']
    assert main(['finetune', str(folder), *args, *QUICK, '--batch-size', '8', '--out', str(out)])==0
    assert main(['merge', str(out), str(tmp_path/'plain')])==0
    plain = timm.create_model(f'local-dir:{tmp_path}/plain', pretrained=True)
    torch.testing.assert_close(probe_logits(plain, 32), probe_logits(load_model(out)[0], 32), atol=1e-4, rtol=1e-4)

def test_interrupt_keeps_what_was_finished(tmp_path):
    out = tmp_path/'run'
    p = subprocess.Popen([Path(sys.executable).parent/'fclora', 'finetune', '--epochs', '200', '--batch-size', '128', '--score-batches', '1', '--out', out],
                         stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for _ in range(600):
        if (out/'fclora.json').exists() or p.poll() is not None: break
        time.sleep(.2)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode==130 and 'kept' in err and 'Traceback' not in err
    r = load_run(out)
    assert r.config['T'] is None and r.config['status'].startswith('epoch') and len(r.history)>=1 and r.plan.total_rank==100

def test_a_folder_of_format_1_is_read_as_it_was_written(capsys):
    old = Path(__file__).parent/'format1'
    model,cfg = load_model(old)
    assert cfg['format']==2 and cfg['adapter']=='lora' and cfg['init']=='orthogonal' and cfg['dropout']==.1
    assert cfg['scaling']['blocks.0.attn.qkv.v']==pytest.approx(8/3**.5) and cfg['scaling']['blocks.0.attn.qkv.k']==8
    with torch.no_grad(): logits = model(to_input(load_images('digits').test[0][:6], **cfg['image']))
    torch.testing.assert_close(logits, torch.tensor(json.loads((old/'logits.json').read_text())), atol=5e-5, rtol=1e-4)
    r = load_run(old)
    assert r.plan.total_rank==20 and r.plan.weights==dict(fisher=.6, grad=.2, cov=.2) and r.metrics['total_rank']==20 and len(r.history)==1
    assert main(['evaluate', str(old), '--quiet'])==0
    assert f"{r.metrics['test']['accuracy']:.2%}" in capsys.readouterr().out

def test_a_format_1_run_is_saved_again_in_format_2(tmp_path):
    from fclora.runs.folder import save_run
    old = load_run(Path(__file__).parent/'format1')
    save_run(old, tmp_path/'new')
    model,cfg = load_model(tmp_path/'new')
    assert json.loads((tmp_path/'new'/'fclora.json').read_text())['format']==2
    torch.testing.assert_close(probe_logits(model, 32), probe_logits(old.model, 32))

def test_options_of_the_plan_reach_the_run_folder(folder, tmp_path):
    out,plan,few = str(tmp_path/'run'),str(tmp_path/'p.json'),[str(folder), '--model', 'vit_pico', '--budget', '36']
    args = ['--no-rslora', '--lora-alpha', '16', '--init', 'orthogonal', '--allocator', 'uniform']
    assert main(['finetune', *few, *QUICK, '--batch-size', '8', *args, '--out', out])==0
    cfg = load_run(out).config
    assert (cfg['init'],cfg['lora_alpha'],cfg['adapter'])==('orthogonal',16.,'lora') and set(cfg['scaling'].values())=={8.}
    assert main(['score', *few, '--method', 'uniform', '--quiet', '--dropout', '.1', '--out', plan])==0
    args = ['--plan', plan, '--scaling', 'rank', '--force']
    assert main(['finetune', *few[:3], *QUICK, '--batch-size', '8', *args, '--out', out])==0
    cfg = load_run(out).config
    assert (cfg['dropout'],cfg['method'])==(.1,'uniform') and set(cfg['scaling'].values())=={4.} and cfg['lora_alpha']==8

def test_a_report_that_fails_costs_no_run(monkeypatch, folder, tmp_path, capsys):
    def broken(*args): raise RuntimeError('no fonts')
    monkeypatch.setattr(page, 'report_html', broken)
    out = tmp_path/'run'
    assert main(['finetune', str(folder), '--model', 'vit_pico', *QUICK, '--batch-size', '8', '--method', 'head', '--out', str(out)])==0
    assert 'report could not be drawn: RuntimeError: no fonts' in capsys.readouterr().err
    assert load_run(out).config['status']=='done' and not (out/'report.html').exists()

def test_help_names_every_option(capsys):
    for cmd in commands:
        with pytest.raises(SystemExit) as e: main([cmd, '--help'])
        assert e.value.code==0
        text = capsys.readouterr().out
        assert '--debug' in text
        for line in text.splitlines():
            if line.strip().startswith('--'): assert len(line.split())>1, line
    assert main(['--version'])==0 and package.__version__ in capsys.readouterr().out
    assert main([])==2 and main(['--help'])==0

def test_commands_json_is_what_the_functions_say():
    from fclora.options import command_specs
    assert command_table()==json.loads(json.dumps(command_specs(commands))), 'run the notebook 90_cli again'

def test_help_shows_every_option_under_its_theme():
    from fclora.options import themes
    used = set()
    for cmd in commands:
        lines,shown,theme = parser(cmd).format_help().splitlines(),{},None
        for line in lines:
            if line.endswith(':') and line[0]!=' ': theme = line[:-1]
            for flag in re.findall(r'^  (?:-h, )?(--[\w-]+)', line): shown[flag.removeprefix('--no-').removeprefix('--').replace('-', '_')] = theme
        wanted = {o['name'].removeprefix('no_'):o['theme'] for o in command_table()[cmd]['options'] if o['kind'] not in ('place','maybe','many')}
        assert {k:v for k,v in shown.items() if v!='Help'}==wanted and set(wanted.values())<=set(themes), cmd
        assert lines[0].startswith(f'usage: fclora {cmd}') and lines[0].endswith('[options]')
        used |= {o['name'] for o in command_table()[cmd]['options']}
    assert not set(' '.join(themes.values()).split())-used

def test_fclora_help_groups_the_commands():
    text = usage()
    for theme,group in command_themes.items(): assert text.index(f'\n{theme}:\n')<min(text.index(f'\n  {cmd} ') for cmd in group)
    assert [cmd for group in command_themes.values() for cmd in group]==list(commands)

def test_an_option_without_a_theme_is_refused():
    from fclora.options import command_spec
    def paint(size:int=3, # Side
              colour:str='red' # Of the brush
    ): "Paint"
    with pytest.raises(ValueError, match="'colour' has no theme; enter it in the themes of the page 89_options"): command_spec(paint)

SLOW = ['torch','fastai','timm','numpy','pandas','matplotlib','sklearn','scipy','fastcore']

def loaded(code, names=SLOW):
    "Which of the modules `names` are loaded after `code`"
    code = f'import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint("loaded", *[o for o in {names} if o in sys.modules])'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return res.stdout.splitlines()[-1].split()[1:]

@pytest.mark.parametrize('args', [['--help'], ['--version'], *[[c,'--help'] for c in commands]])
def test_help_imports_the_standard_library_only(args): assert loaded(f'from fclora.cli import main; main({args})')==[]

def test_predict_loads_no_training_library(run, tmp_path):
    Image.new('RGB', (32,32)).save(tmp_path/'0.png')
    code = f'from fclora.cli import main; main(["predict", {str(run[0])!r}, {str(tmp_path)!r}])'
    assert loaded(code, ['fastai','pandas','matplotlib','sklearn','scipy'])==[]

def test_a_plugin_registers_parts_before_the_command_runs(tmp_path, capsys):
    (tmp_path/'parts.py').write_text('''
from fclora.all import *
class InputSize(Scorer):
    def value(self, seen, site): return seen.inputs(site).abs().mean()
scorers['input_size'] = InputSize
presets['mine'] = Preset('by the size of inputs', dict(input_size=1.), allocator='waterfill')
''')
    args = ['score', 'digits', '--method', 'mine', '--score-batches', '1', '--batch-size', '64', '--quiet', '--out', tmp_path/'plan.json']
    res = fclora(*args, '--plugin', tmp_path/'parts.py')
    assert res.returncode==0, res.stderr
    plan = json.loads((tmp_path/'plan.json').read_text())
    assert plan['metrics']==['input_size'] and plan['method']=='mine' and plan['total_rank']==100
    assert main([*map(str, args)])==1 and "unknown method 'mine'" in capsys.readouterr().err
    assert main([*map(str, args), '--plugin', 'no.py'])==1 and '--plugin no.py is not a file' in capsys.readouterr().err
