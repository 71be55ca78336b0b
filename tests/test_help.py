"Whoever asks `help` gets an answer: modules, public names, parameters"
import importlib, inspect, pkgutil, pydoc, subprocess, sys
import pytest
from fastcore.docments import docments
import fclora

found = [m for m in pkgutil.walk_packages(fclora.__path__, 'fclora.') if not m.ispkg]
modules = sorted(n for m in found if (n := m.name.removeprefix('fclora.')) not in ('all','__main__','_modidx'))
# of one obvious parameter, or to be documented in their notebooks
def module(name): return importlib.import_module(f'fclora.{name}')
def plain(f): return getattr(f, '__func__', f)

def own_methods(cls):
    "Functions that `cls` defines and no base knows, so that nobody else has documented them"
    for n,f in vars(cls).items():
        f = plain(f)
        if inspect.isfunction(f) and not n.startswith('_') and not any(hasattr(b, n) for b in cls.__mro__[1:]): yield n,f

def functions(name):
    "Every public function of a module: its name, itself, and what its parameters are documented by"
    mod = module(name)
    for n in mod.__all__:
        o = getattr(mod, n)
        if inspect.isclass(o):
            if '__init__' in vars(o) and not hasattr(o, '__dataclass_fields__'): yield n,o.__init__,o
            for k,f in own_methods(o): yield f'{n}.{k}',f,f
        elif inspect.isfunction(o): yield n,o,o

def parameters(f):
    "Names of the parameters written down in `f` itself, without those that it passes on"
    c = inspect.unwrap(f).__code__
    return [k for k in c.co_varnames[:c.co_argcount+c.co_kwonlyargcount] if k not in ('self','cls')]

def test_help_of_the_package_says_what_it_is_and_where_to_start():
    res = subprocess.run([sys.executable, '-c', 'import fclora; help(fclora)'], capture_output=True, text=True, check=True).stdout
    for o in ('low-rank adapters', 'fclora finetune', 'from fclora.all import *', 'help(fclora.', '`Plan`'): assert o in res, o
    for m in modules: assert f'`fclora.{m}`' in res, m

@pytest.mark.parametrize('name', modules)
def test_modules_say_what_they_are_for(name):
    first,_,rest = module(name).__doc__.partition('\n\n')
    assert 3<=len(first.split())<=25 and len(rest.split())>=20
    public = [n for n in module(name).__all__ if not n.startswith('_')]
    assert any(f'`{n}' in rest for n in public), 'no public name is mentioned'

@pytest.mark.parametrize('name', modules)
def test_every_public_name_has_a_docstring(name):
    mod = module(name)
    things = [(n,getattr(mod, n)) for n in mod.__all__ if inspect.isclass(getattr(mod, n)) or inspect.isfunction(getattr(mod, n))]
    things += [(f'{n}.{k}',f) for n,o in things if inspect.isclass(o) for k,f in own_methods(o)]
    bare = [n for n,o in things if not (o.__doc__ or '').strip()]
    assert not bare
    assert not [n for n,o in things if o.__doc__ and o.__doc__.startswith(o.__name__+'(')], 'a dataclass without a docstring'

@pytest.mark.parametrize('name', modules)
def test_every_parameter_says_what_it_takes(name):
    bare = {}
    for n,f,doc in functions(name):
        d = docments(doc, returns=False)
        if (missing := [k for k in parameters(f) if not d.get(k)]): bare[n] = missing
    assert not bare

@pytest.mark.parametrize('name', modules)
def test_fields_of_dataclasses_say_what_they_hold(name):
    for n in module(name).__all__:
        o = getattr(module(name), n)
        if inspect.isclass(o) and '__dataclass_fields__' in vars(o): assert not [k for k,v in docments(o, returns=False).items() if not v], n

def test_help_renders():
    for m in modules: assert f'fclora.{m}' in pydoc.plain(pydoc.render_doc(module(m)))
