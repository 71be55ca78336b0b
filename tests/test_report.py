"Tables, pictures and pages of runs, on made logits with known answers"
import json, re, shlex, shutil, warnings
from functools import cache
from html.parser import HTMLParser
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from scipy import stats
from fclora.calibration.abstain import aurc
from fclora.calibration.calibrator import fit_calibration, promises_kept
from fclora.calibration.intervals import calibration_table
from fclora.calibration.temperature import class_accuracy
from fclora.plan import Plan
from fclora.report.html import *
from fclora.report.making import *
from fclora.report.page import *
from fclora.report.sections import *
from fclora.report.plots import *
from fclora.report.seeds import *
from fclora.report.tables import *
from fclora.cli import main
from fclora.runs.finetune import finetune
from fclora.runs.folder import load_run
from fclora.runs.run import Run
from fclora.sites import Site

titles = ['What it is','How good it is','How sure it is','What it gets wrong','Where the ranks went','How training went','What it costs','How to use it','How to repeat it']
history = pd.DataFrame(dict(epoch=[1,2], train_loss=[2.,1.5], valid_loss=[1.8,1.2], accuracy=[.4,.6], lr=[1e-3,1e-4], seconds=[1.,1.]))

def made_plan(metrics=True):
    sites = [Site(f'blocks.{b}.attn.qkv.{k}', f'blocks.{b}.attn.qkv', k, b, 8, 8, 8*i) for b in range(2) for i,k in enumerate('qkv')]
    vals = {m:{s.name:float(i) for i,s in enumerate(sites)} for m in ('fisher','grad','cov')} if metrics else {}
    return Plan('tiny', sites, {s.name:1+i for i,s in enumerate(sites)}, 21, metrics=vals, weights=dict(fisher=.6))

def logits_of(pred, c): return 2.*torch.nn.functional.one_hot(torch.as_tensor(pred), c) + .1*torch.rand(len(pred), c, generator=torch.Generator().manual_seed(0))

@cache
def calibration_of(c):
    "T = 0.5, and promises from 120 images that half of a good model's logits were right on"
    held = torch.arange(240)%c
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # every prediction is right
        return fit_calibration(.5*logits_of(held, c), held) | dict(T=.5)

def made_run(pred=(0,1,2,0), targs=(0,1,2,1), classes=('cat','dog','emu'), method='fclora', seed=0, plan=None, **test):
    z,y = logits_of(pred, len(classes)),torch.tensor(targs)
    calibration = calibration_of(len(classes))
    t = {**calibration_table(z, y, .5, n_boot=10), 'aurc':aurc(z, y), **promises_kept(z/.5, y, calibration['held_out']), **test}
    config = dict(model=dict(name='tiny'), method=method, classes=list(classes), seed=seed, **calibration, data=dict(name='zoo', train=8, valid=4, test=len(y)),
                  recipe=dict(lr=2e-3), versions=dict(torch='2'))
    metrics = dict(params=dict(adapter=336, head=27, backbone=1000, total=1363, trainable=363, paper_pct=33600/1363, pct=36300/1363), valid=t, test=t,
                   seconds=dict(load=.1, score=1., train=1234., calibrate=0., evaluate=0., total=1235.), epochs=2, total_rank=plan.total_rank if plan else None,
                   peak_memory_mb=1500., memory_kind='process', hardware='a CPU')
    return Run(config, metrics, history, plan, None, z, y, torch.randint(0, 255, (len(y),3,8,8), dtype=torch.uint8))

class Tags(HTMLParser):
    "Every start tag and the text of a page; fails on tags that do not close"
    def __init__(self, page): super().__init__(); self.tags,self.text,self.open = [],'',[]; self.feed(page); self.close(); assert not self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta','img'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.text += data

def check_page(page):
    "A whole page that loads nothing and describes its pictures"
    t = Tags(page)
    assert not re.search('https?://|@import|url\\(', page) and len(page)<2e6
    names = {n for n,_ in t.tags}
    assert not names & {'script','link','iframe','object','embed'}
    ids = {a['id'] for _,a in t.tags if 'id' in a}
    assert all(a['href'][0]=='#' and a['href'][1:] in ids for n,a in t.tags if n=='a')
    for n,a in t.tags:
        assert not any(k.startswith('on') for k in a)
        if 'src' in a: assert n=='img' and re.match('data:image/(png;base64,iVBOR|jpeg;base64,/9j/)', a['src']) and len(a['alt'])>5
    return t

def sections(page): return re.findall('<h2>(.*?)</h2>', page)
def plots(page): return len(re.findall('<img class="plot', page))

# Pages
def test_page_has_every_section_and_loads_nothing():
    before = plt.get_fignums()
    page = report_html(made_run(plan=made_plan()))
    t = check_page(page)
    assert sections(page)==titles and plots(page)==7 and page.count('<figure>')==1
    assert plt.get_fignums()==before
    assert 'An image classifier for zoo' in t.text and 'mean by kind of site: q 2.5, k 3.5, v 4.5' in t.text
    assert 'prefers-color-scheme' in page and 'width=device-width' in page and "default-src 'none'" in page

evil = '<script>alert(1)</script>'
def test_user_text_is_escaped_everywhere():
    r = made_run(classes=(evil, '"><img src=x onerror=1>', '$\\frac{$ & $x$'), plan=made_plan(), pred=(1,1,0,0), targs=(0,1,0,1))
    r.config.update(model=dict(name=evil), recipe={evil:evil}); r.config['data']['name'] = r.metrics['hardware'] = evil
    page = report_html(r)
    check_page(page)
    assert evil not in page and '&lt;script&gt;' in page and 'src=x' not in page.replace('&lt;img src=x', '')
    assert page.count('<figure>')==2 and '&lt;script&gt;alert(1)&lt;/script&gt; → &quot;&gt;&lt;img' in page
    check_page(compare_html([r]))

@pytest.mark.parametrize('method', ['head','full'])
def test_page_without_plan(method):
    page = report_html(made_run(method=method))
    assert sections(page)==titles and 'no adapters' in page
    check_page(page)

def test_plan_without_metrics_has_one_picture_of_ranks():
    page = report_html(made_run(method='uniform', plan=made_plan(metrics=False)))
    check_page(page)
    assert plots(page)==6 and 'without any measurement' in page

def test_one_mistake_and_none():
    one,none = report_html(made_run()),report_html(made_run(pred=(0,1,2,1)))
    assert 'wrong on 1 of 4' in one and plots(one)==5 and one.count('<figure>')==1
    assert 'All 4 test images' in none and plots(none)==4 and '<figure>' not in none
    for o in (one,none): check_page(o); assert sections(o)==titles

def test_run_without_logits_images_or_history():
    r = made_run()
    r.images = None
    assert report_html(r).count('not at hand')==1
    r.logits,r.history = None,None
    page = report_html(r)
    assert sections(page)==titles and page.count('not at hand')==3 and 'no history' in page and plots(page)==1

def test_hundred_classes_and_missing_ones():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 90, 400)
    pred = np.where(rng.random(400)<.6, y, rng.integers(0, 100, 400))
    r = made_run(pred, y.tolist(), [f'species number {i} with a name that is long' for i in range(100)])
    page = report_html(r)
    check_page(page)
    assert 'Without test images:' in page and 'species number 95 with' in page
    ax = plot_class_accuracy(r.logits, r.targs, r.config['classes'])
    shown = [p.get_width() for p in ax.patches]
    accs = class_accuracy(r.logits, r.targs)
    np.testing.assert_allclose(shown, 100*accs[~accs.isnan()].sort().values[:20])
    assert 'lowest of' in ax.get_title() and all(len(t.get_text())<=24 for t in ax.get_yticklabels())
    plt.close('all')

def test_names_that_look_like_mathematics_or_have_no_glyph():
    r = made_run(classes=('$\\frac{$','$x$','犬'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_page(report_html(r))

def test_saved_or_left_alone(tmp_path):
    path = save_report(made_run(), tmp_path/'sub'/'report.html')
    old = path.read_text(encoding='utf-8')
    assert old.endswith('</html>\n') and [o.name for o in path.parent.iterdir()]==['report.html']
    broken = made_run()
    del broken.metrics['test']['ece']
    with pytest.raises(KeyError): save_report(broken, path)
    assert path.read_text(encoding='utf-8')==old and len(list(path.parent.iterdir()))==1
    runs = [made_run(method=m, seed=s) for m in ('fclora','uniform') for s in (0,1)]
    assert '4 runs by 2 methods' in save_report(runs, tmp_path/'compare.html').read_text(encoding='utf-8')

def test_what_was_asked_is_said_in_words_and_numbers():
    r = made_run(plan=made_plan())
    page,t = report_html(r, 'runs/my zoo'),r.metrics['test']
    text = Tags(page).text
    for o in ('to train on8','low-rank adapters','363 of its 1,363 numbers', f"{t['nll']:.4f}", f"{t['brier']:.4f}", f"{t['smooth_ece']:.4f}", f"{t['aurc']:.4f}", '120 validation images',
              'breaks every one of these promises', '75.0\u00a0% of 4 test images', "fclora predict 'runs/my zoo' photo.jpg", '--sets .9', "fclora evaluate 'runs/my zoo' FOLDER"): assert o in text, o
    assert scores_table(t).index.tolist()[:2]==['NLL','Brier score']
    for score,d in t['sets'].items():
        for level in d: assert f'{float(level):.0%}'.replace('%', '\u00a0%')+f', {score}' in text

def test_a_run_without_held_out_images_says_so():
    r = made_run()
    r.config.update(held_out=None)
    for k in ('sets','abstain'): del r.metrics['test'][k]
    page = report_html(r)
    check_page(page)
    assert 'no prediction sets' in page and 'No confidence can be named' in page and '--sets' not in page and sections(page)==titles

def test_an_older_run_has_a_page_too():
    r = made_run(plan=made_plan())
    for k in [k for k in r.metrics['test'] if k in ('sets','abstain','aurc','calibrator') or k.startswith(('smooth','accuracy_raw'))]: del r.metrics['test'][k]
    del r.config['vector'], r.config['held_out']
    check_page(report_html(r))
    assert paper_table(r)['fclora']['smooth ECE, raw / scaled']=='–'

def test_many_large_photographs_stay_small():
    noise = torch.randint(255, (40,3,600,600), dtype=torch.uint8)
    r = made_run([1]*40, [0]*40)
    r.images = noise
    assert len(report_html(r))<2e6 and report_html(r).count('image/jpeg')==12

def test_the_command_repeats_what_was_asked():
    r = made_run(method='head', seed=3)
    assert repeat_command(r)=='' and 'does not say by which command' in report_html(r)
    r.config['asked'] = dict(data='my pets', method='head', plan=None, seed=3, recipe='auto', probe=True, compile=False, checkpointing=True, pretrained=False, hold_out=False,
                             skip_bad=True, limit='9,9,9', lr=.1, classes='::2')
    assert shlex.split(repeat_command(r))==['fclora','finetune','my pets','--method','head','--seed','3','--checkpointing','--no-pretrained','--no-hold-out','--skip-bad',
                                            '--limit','9,9,9','--lr','0.1','--classes','::2']
    assert 'fclora finetune &#x27;my pets&#x27; --method head' in report_html(r)

def test_the_command_of_a_run_makes_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = finetune('digits', 'uniform', budget=18, epochs=1, limit='60,20,40', probe=False, head='fresh', quiet=True, out='a')
    words = shlex.split(repeat_command(load_run('a', model=False)))
    assert words[:3]==['fclora','finetune','digits'] and main([*words[1:], '--out', 'b', '--quiet'])==0
    again = load_run('b', model=False)
    for k in ('accuracy','nll','T'): assert again.metrics['test'][k]==first.metrics['test'][k]
    assert again.plan.ranks==first.plan.ranks and again.config['asked']==first.config['asked']

def test_a_probe_that_was_kept_is_not_called_an_adapter():
    r = made_run(plan=made_plan())
    r.plan.ranks.update(dict.fromkeys(r.plan.ranks, 0))
    r.metrics['params'].update(adapter=0)
    page = report_html(r)
    check_page(page)
    assert 'Every rank is 0' in page and 'were no better than a new last layer' in page and 'low-rank' not in page

@pytest.mark.parametrize('scheme', ['light','dark'])
@pytest.mark.parametrize('width', [1100,390])
def test_in_a_browser_it_fits_loads_nothing_and_follows_the_scheme(width, scheme, tmp_path):
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: the report is not tried in a browser')
    exe = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
    if not exe: pytest.skip('no Chromium on this machine: the report is not tried in a browser')
    r = made_run(classes=('cat','a name that is very long and has nowhereanyplacewhereitcouldbebroken'*2,'emu'), plan=made_plan())
    path,bad = save_report(r, tmp_path/'report.html'),[]
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        page = b.new_page(viewport=dict(width=width, height=844), color_scheme=scheme)
        page.on('request', lambda o: o.url.startswith(('file:','data:')) or bad.append(o.url))
        page.on('console', lambda m: bad.append(m.text))
        page.goto(path.as_uri())
        for o in page.locator('summary').all(): o.click()
        assert page.evaluate('document.documentElement.scrollWidth')<=width
        assert not page.evaluate('[...document.images].filter(o => !o.complete || !o.naturalWidth).length')
        ink = sum(map(int, re.findall(r'\d+', page.evaluate('getComputedStyle(document.documentElement).color'))[:3]))
        assert (ink>600)==(scheme=='dark') and (page.evaluate('getComputedStyle(document.querySelector(".plot")).filter')!='none')==(scheme=='dark')
        assert page.evaluate("getComputedStyle(document.querySelector('pre')).userSelect")=='all'
        b.close()
    assert not bad

# Tables
def test_paper_table():
    t = paper_table([made_run(plan=made_plan()), made_run(method='head', seed=3)])
    assert list(t)==['fclora','head']
    col = t['fclora']
    assert col['adapter parameters (as the papers count)']=='336 (25 %)' and col['trained parameters (with head)']=='363 (27 %)'
    assert col['test accuracy']=='75.00 %' and list(col.index).index('test loss (NLL), raw / scaled')<list(col.index).index('test Brier score, raw / scaled')<list(col.index).index('test ECE, raw / scaled') and col['total rank']=='21' and col['peak memory']=='1,500 MB (process)'
    assert col['seconds, scoring / training / total']=='1.0 / 1,234 / 1,235'
    assert col['class accuracy']==f'{np.mean([1,.5,1]):.2f} ± {np.std([1,.5,1]):.2f}'
    assert t.loc['total rank','head']=='–'

def test_column_names_are_unique():
    assert list(paper_table([made_run(), made_run(seed=1), made_run(seed=1)]))==['fclora, seed 0','fclora, seed 1 (1)','fclora, seed 1 (2)']

def test_full_fine_tuning_trains_everything():
    r = made_run(method='full')
    r.metrics['params'].update(adapter=0, trainable=1027, total=1027, paper_pct=0.)
    col = paper_table(r)['full']
    assert col['trained parameters (with head)']=='1,027 (100 %)' and col['adapter parameters (as the papers count)']=='0 (0 %)'

def three_methods():
    accs = dict(fclora={0:.9,1:.8,2:.95}, uniform={0:.85,1:.82}, head={0:.5})
    return [made_run(method=m, seed=s, accuracy=a) for m,d in accs.items() for s,a in d.items()]

def test_compare_against_hand_computed_numbers():
    d = compare_json(three_methods())['methods']
    acc = d['fclora']['accuracy']
    assert acc['mean']==pytest.approx(2.65/3) and acc['std']==pytest.approx(np.std([.9,.8,.95], ddof=1))
    diff = d['fclora']['points_to_uniform']
    assert diff['seeds']==[0,1] and diff['mean']==pytest.approx(1.5) and (diff['lo'],diff['hi'])==(pytest.approx(-2),pytest.approx(5))
    t = stats.ttest_1samp([5,-2], 0).confidence_interval()
    assert (diff['t_lo'],diff['t_hi'])==(pytest.approx(t.low),pytest.approx(t.high))
    assert d['head']['points_to_uniform']==dict(mean=pytest.approx(-35), lo=None, hi=None, t_lo=None, t_hi=None, seeds=[0])
    assert d['head']['accuracy']['std'] is None and d['uniform']['points_to_uniform'] is None

def test_compare_table_text():
    t = compare_table(three_methods())
    assert t.loc['fclora','accuracy, %']=='88.33 ± 7.64' and t.loc['head','accuracy, %']=='50.00'
    assert t['to uniform, points'].tolist()==['+1.50 (-2.00 to +5.00)','–','-35.00'] and t.seeds.tolist()==['3','2','1']
    assert t['t interval'].tolist()[1:]==['–','–']
    assert 'to uniform, points' not in compare_table([made_run()])

def test_rows_of_one_method_are_kept_apart_and_held_against_their_own_uniform(tmp_path):
    accs = {'uniform':.8, 'uniform budget=9':.6, 'fclora budget=9':.65, 'fclora rslora=0':.9}
    runs = [made_run(method=k.split()[0], accuracy=a) for k,a in accs.items()]
    for r,k in zip(runs, accs): r.config['row'] = k
    ms = compare_json(runs)['methods']
    assert list(ms)==list(accs)
    assert {k:d['points_to_uniform'] and round(d['points_to_uniform']['mean'], 9) for k,d in ms.items()}=={'uniform':None, 'uniform budget=9':None, 'fclora budget=9':5, 'fclora rslora=0':10}
    (tmp_path/'c.json').write_text(json.dumps(compare_json(runs)))
    assert compare_table(read_compare(tmp_path/'c.json')).index.tolist()==list(accs)

def test_no_common_seed_no_difference():
    assert compare_table([made_run(seed=0), made_run(method='uniform', seed=1)])['to uniform, points'].tolist()==['–','–']

def test_compare_json_is_plain():
    d = compare_json(three_methods())
    assert json.loads(json.dumps(d, allow_nan=False))==d and len(d['runs'])==6 and d['runs'][0]['metrics']['epochs']==2

def test_compare_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match='no runs'): compare_table([])
    other = made_run(seed=1); other.config['model'] = dict(name='huge')
    with pytest.raises(ValueError, match='model .huge, tiny.'): compare_table([made_run(), other])

def test_bootstrap_interval():
    assert bootstrap_interval([3.,3.,3.])==(3,3)
    x = np.random.default_rng(0).normal(size=400)
    lo,hi = bootstrap_interval(x)
    assert (lo,hi)==bootstrap_interval(x) and hi-lo==pytest.approx(2*1.96*x.std()/20, rel=.05) and lo<x.mean()<hi

def test_markdown_and_text_tables():
    df = pd.DataFrame(dict(n=['1','1,234'], note=['a|b','two\nlines']), index=pd.Index(['x','long name'], name='what'))
    assert markdown_table(df)=='| what | n | note |\n| --- | ---: | ---: |\n| x | 1 | a\\|b |\n| long name | 1,234 | two lines |'
    assert text_table(df)=='what           n       note\nx              1        a|b\nlong name  1,234  two lines'

# Pictures
def test_confused_pairs_by_hand():
    p = confused_pairs(logits_of([1,1,0,2,1], 3), torch.tensor([0,0,0,1,1]), ['a','b','c'])
    assert p.values.tolist()==[['a','b',2,pytest.approx(200/3)],['b','c',1,50.]]
    assert confused_pairs(logits_of([0,1], 3), [0,1], ['a','b','c']).empty

def test_most_confident_mistakes_first(tmp_path):
    from PIL import Image
    z,y = torch.tensor([[3.,0],[0,1],[0,2],[0,9]]),torch.tensor([0,0,0,1])
    for i in range(2): Image.new('RGB', (20,10), 'red').save(tmp_path/f'{i}.png')
    axs = plot_wrong([tmp_path/f'{i}.png' for i in (0,1,2,0)], z, y, ['a','b'], T=2.)
    assert [a.get_title() for a in axs]==['a → b\n73.1 %','a → b\n62.2 %']
    assert axs[0].texts[0].get_text()=='file not readable' and axs[1].images[0].get_array().shape==(10,10,3)
    plt.close('all')

def test_pictures_use_given_axes():
    axs = plt.subplots(1, 3)[1]
    assert list(plot_history(history, axs))==list(axs) and len(plt.get_fignums())==1
    assert plot_compare(three_methods(), plt.subplots(1, 2)[1])[0].get_xlabel()=='test accuracy (%)'
    plt.close('all')
