"The package's metadata lives in settings.ini; this hands it to setuptools"
from configparser import ConfigParser
from pathlib import Path
import re
from setuptools import setup, find_packages

root = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
version = re.search(r"__version__ = ['\"](.+?)['\"]", (root/'fclora/__init__.py').read_text(encoding='utf-8'))[1]

extras = {k.removesuffix('_requirements'):v.split() for k,v in s.items() if k.endswith('_requirements')}
extras['dev'] = sorted({o for v in extras.values() for o in v})

setup(
    version=version, description=s['description'], keywords=s['keywords'].split(),
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    license='Apache-2.0', author=s['author'], author_email=s['author_email'],
    packages=find_packages(include=['fclora', 'fclora.*']), package_data={'fclora': ['weights/*', 'commands.json']},
    python_requires=f">={s['min_python']}", install_requires=s['requirements'].split(),
    extras_require=extras,
    entry_points=dict(console_scripts=s['console_scripts'].split('\n')),
)
