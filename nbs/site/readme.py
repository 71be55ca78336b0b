"README.md from nbs/index.ipynb: its prose and code without hidden cells and outputs, links made to start at the top of the repository"
import json,re
from pathlib import Path

root = Path(__file__).resolve().parents[2]

def block(cell):
    "The text of one cell as markdown, empty for a hidden one"
    text = ''.join(cell['source'])
    if text.startswith('#| hide'): return ''
    text = re.sub(r'^#\|.*\n', '', text, flags=re.M)
    return text if cell['cell_type']=='markdown' else f'```python\n{text}\n```'

def readme():
    "The text of README.md"
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(b for b in map(block, cells) if b) + '\n'
    return re.sub(r'(\]\(|src=")(?!https?:|#|\.\./)', r'\1nbs/', text).replace('](../', '](')

if __name__=='__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
