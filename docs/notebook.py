"""Writes photographs.ipynb, for Colab, from the page photographs.md: its blocks as cells, its pictures as those made.

    python docs/notebook.py
"""
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

PAGE = Path(__file__).with_name('photographs.md')
REPOSITORY = 'https://github.com/OWNER/noah_zoo'
SETUP = f"""%%bash
# The address is that of your copy of the code.
[ -d noah_zoo ] || git clone --quiet {REPOSITORY}
apt-get -qq install tuxpaint-stamps-default > /dev/null
pip install --quiet -e noah_zoo"""
PARTS = re.compile(r'^```(python|bash)\n(.*?)\n```$|^!\[[^]]*\]\((\S+)\)$', re.MULTILINE | re.DOTALL)


def notebook(page: str) -> Dict[str, Any]:
    """The notebook, without outputs, of a page in Markdown."""
    cells: List[Tuple[str, str]] = []

    def tell(text: str) -> None:
        text = re.sub(r'\]\((?!https?:)(\S+?)\)', rf']({REPOSITORY}/blob/main/docs/\1)', text.strip())
        if text:
            cells.append(('markdown', text))

    end = page.index('\n## ')
    tell(page[:end])
    cells += [('code', SETUP), ('code', '%cd noah_zoo')]
    for part in PARTS.finditer(page, end):
        tell(page[end:part.start()])
        language, code, picture = part.groups()
        if picture:
            code = f"from PIL import Image\n\nImage.open('{picture}')"
        cells.append(('code', f'%%bash\n{code}' if language == 'bash' else code))
        end = part.end()
    tell(page[end:])
    of_code = {'execution_count': None, 'outputs': []}
    return {
        'cells': [
            {'cell_type': kind, 'id': f'cell-{i}', 'metadata': {}, 'source': text.splitlines(keepends=True),
             **(of_code if kind == 'code' else {})}
            for i, (kind, text) in enumerate(cells)],
        'metadata': {
            'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
            'language_info': {'name': 'python'}},
        'nbformat': 4, 'nbformat_minor': 5}


if __name__ == '__main__':
    text = json.dumps(notebook(PAGE.read_text(encoding='utf-8')), indent=1, ensure_ascii=False)
    PAGE.with_suffix('.ipynb').write_text(text + '\n', encoding='utf-8', newline='\n')
