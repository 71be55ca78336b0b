"The site: notebooks with their stored outputs, docstrings and the real --help. Nothing is run, and no text is written twice"
import ast,json,os,re,sys
from pathlib import Path
from urllib.request import urlopen
import matplotlib
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from fastcore.docments import docments
from fastcore.nbio import dict2nb,mk_cell,nb2dict
from nbdev.doclinks import patch_name
from nbdev.process import NBProcessor,Processor
from nbdev.processors import clean_magics,hide_,hide_line,rm_header_dash

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))
matplotlib.use('agg')
import fclora
from fclora.cli import commands,parser,usage
from fclora.presets import methods_known

def reachable(url):
    "Can the inventory at `url` be had? Offline it is left out, so that the build neither fails nor warns"
    try: return urlopen(f'{url}objects.inv', timeout=3).close() is None
    except OSError: return False

project,author,release = 'fclora','The fclora authors',fclora.__version__
extensions = ['myst_nb','sphinx.ext.autodoc','sphinx.ext.viewcode','sphinx.ext.intersphinx','sphinx.ext.githubpages','sphinx_copybutton']
intersphinx_mapping = {k:(u, None) for k,u in dict(python='https://docs.python.org/3/', torch='https://docs.pytorch.org/docs/stable/').items() if reachable(u)}
exclude_patterns = ['**.ipynb_checkpoints','_*']
default_role,add_module_names,python_use_unqualified_type_names,toc_object_entries_show_parents = 'code',False,True,'hide'
autodoc_typehints,autodoc_typehints_format,autodoc_typehints_description_target = 'description','short','documented_params'
nb_execution_mode,nb_merge_streams,nb_render_markdown_format = 'off',True,'gfm'
myst_enable_extensions,myst_heading_anchors,myst_update_mathjax = ['dollarmath'],4,False
html_theme,html_title,html_math_renderer,html_show_copyright = 'furo',f'fclora {release}','mathml',False
html_static_path,html_css_files,html_extra_path,html_sourcelink_suffix,templates_path = ['style.css'],['style.css'],['../llms.txt'],'',['templates']
html_theme_options,pygments_dark_style = dict(top_of_page_buttons=['view']),'github-dark'
icon = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 2 2'><path fill='%23440154' d='M0 0h2v2H0z'/><path fill='%23fde725' d='M0 1h1v1H0z'/><path fill='%2321918c' d='M1 1h1v1H1z'/></svg>"

# --- a notebook as a page

def first_sentence(md): return re.split(r'(?<=[.:?!])\s', re.sub(r'^#.*$|[*`>]|\[(.+?)\]\(.*?\)', r'\1', md, flags=re.M).strip())[0].rstrip(':')

def directives(tree, mod):
    "The autodoc directives for what one top-level statement defines"
    if not isinstance(tree, (ast.FunctionDef,ast.ClassDef)): return
    names = patch_name(tree)
    for n in [names] if isinstance(names, str) else names:
        if n.startswith('_') or '._' in n: continue
        kind = 'class' if isinstance(tree, ast.ClassDef) else 'method' if '.' in n else 'function'
        yield f'.. auto{kind}:: {mod}.{n}'
        if kind!='class': continue
        for f in tree.body:
            if not isinstance(f, ast.FunctionDef) or f.name[0]=='_' or not ast.get_docstring(f): continue
            is_property = any(isinstance(o, ast.Name) and o.id=='property' for o in f.decorator_list)
            yield f"\n   .. auto{'property' if is_property else 'method'}:: {mod}.{n}.{f.name}\n"

class Reference(Processor):
    "Exported definitions become signature, docstring and docments; a picture's alternative text is the sentence beside it"
    def begin(self): self.mod = next((f"fclora.{c.directives_['default_exp']}" for c in self.nb.cells if 'default_exp' in c.directives_), None)
    def cell(self, cell):
        if cell.cell_type!='code': return
        if {'export','default_exp'} & set(cell.directives_):
            docs = [o for t in ast.parse(cell.source).body for o in directives(t, self.mod)]
            cell.cell_type,cell.source = 'markdown','\n'.join(['```{eval-rst}', *docs, '```']) if docs else None
            for k in ('outputs','execution_count'): cell.pop(k, None)
        elif any({'image/png','image/svg+xml'} & set(o.get('data', {})) for o in cell.outputs):
            near = (first_sentence(c.source) for c in self.nb.cells[cell.idx_+1:] + self.nb.cells[:cell.idx_][::-1] if c.cell_type=='markdown')
            cell.metadata.setdefault('mystnb', dict(image=dict(alt=next(filter(None, near), cell.source))))

texts = {'CHANGELOG.md':'changelog', 'CONTRIBUTING.md':'contributing', 'fclora/weights/README.md':'weights', 'CITATION.cff':'citation'}
contents = {'Tutorials':['tutorials/*'], 'Reference':['[0-9][0-9]*_*','site/commands','glossary*'], 'Results':['results/*','studies/*'], 'Project':[f'site/{o}' for o in texts.values()]}

def landing(nb):
    "The table of contents behind the text"
    nb.cells += [mk_cell('\n'.join(['```{toctree}', ':hidden:', ':glob:', f':caption: {k}', *v, '```']), cell_type='markdown') for k,v in contents.items()]

def as_page(app, docname, source):
    "Turn the source of a notebook into what the page shows"
    if docname=='site/commands': source[0] += commands_md()
    if app.env.doc2path(docname).suffix!='.ipynb': return
    text = re.sub(r'\]\((?:\.\./)+([\w/.]+)\)', lambda m: f'](/site/{texts[m[1]]}.md)' if m[1] in texts else m[0], source[0])
    proc = NBProcessor(nb=dict2nb(json.loads(text)), procs=[rm_header_dash, hide_, hide_line, clean_magics, Reference])
    if docname=='index': landing(proc.nb)
    proc.process()
    proc.nb.metadata['source_map'] = list(range(len(proc.nb.cells))) # else line 10,000 for each cell, which rst then counts up to
    source[0] = json.dumps(nb2dict(proc.nb))

def commands_md():
    "The help of every command, as the command prints it on a terminal 88 columns wide"
    os.environ['COLUMNS'] = '88'
    helps = {'fclora':usage(), **{f'fclora {k}':parser(k).format_help() for k in commands}}
    return ''.join(f'\n## {k}\n\n```text\n{v.strip()}\n```\n' for k,v in helps.items())

# --- docstrings, links, formulas

def with_docments(app, what, name, obj, options, lines):
    "Plain text that no markup can break, and one field a documented parameter"
    docs = {k:v for k,v in docments(obj).items() if v} if what in ('function','class','method') else {}
    lines += ['', *(f":{'returns' if k=='return' else f'param {k}'}: {v}" for k,v in docs.items())]
    lines[:] = [''.join(s+'\\ ' if i%2 else re.sub(r'([\\*|_])', r'\\\1', s) for i,s in enumerate(re.split('(`[^`]+`)', l))) for l in lines]

def targets(app):
    "What a word in backticks can mean: {text: (page, anchor)}; names that are also methods or commands are left out"
    objs = app.env.domains.python_domain.objects
    pages = {Path(d).name+'.ipynb':(d,'') for d in app.env.found_docs}
    pages.update({k.removesuffix('.ipynb'):v for k,v in pages.items() if re.match(r'\d\d_', k)})
    def short(k, o): return '.'.join(k.split('.')[-2 if o.objtype=='method' else -1:]) # without the module
    names = {short(k, o):(o.docname,'#'+o.node_id) for k,o in objs.items()}
    return {**pages, **{n:at for n,at in names.items() if n not in {*commands,*methods_known()}}}

def link_names(app, doctree, docname):
    "Link the names of functions, notebooks and commands to where they are explained"
    known = targets(app)
    for lit in list(doctree.findall(nodes.literal)):
        if any(isinstance(o, (nodes.reference,addnodes.desc_signature,nodes.title)) for o in (lit.parent, lit.parent.parent)): continue
        text = lit.astext().removesuffix('()')
        if (m := re.match(r'fclora ([a-z]+)', text)) and m[1] in commands: page,anchor = 'site/commands',f'#fclora-{m[1]}'
        elif (at := known.get(text.rpartition('/')[2])): page,anchor = at
        else: continue
        if page==docname and not anchor: continue
        ref = nodes.reference('', '', internal=True, refuri=(app.builder.get_relative_uri(docname, page) if page!=docname else '')+anchor)
        lit.replace_self(ref); ref += lit

def mathml(self, node):
    "Formulas as MathML, which browsers draw without scripts or fonts"
    block = isinstance(node, nodes.math_block)
    math = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="math">{math}</div>' if block else math)
    raise nodes.SkipNode

def setup(app):
    app.connect('source-read', as_page)
    app.connect('autodoc-process-docstring', with_docments)
    app.connect('doctree-resolved', link_names)
    app.connect('html-page-context', lambda app,page,template,context,doctree: context.update(favicon_url=icon))
    app.add_html_math_renderer('mathml', (mathml, None), (mathml, None))
