"""The documentation: it builds strictly, asks nothing of other hosts, and its snippets run."""
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


class Loaded(HTMLParser):
    """Addresses of what a page loads by itself."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ('script', 'img', 'iframe', 'source') and attrs.get('src'):
            self.addresses.append(attrs['src'])
        if tag == 'link' and attrs.get('rel') in ('stylesheet', 'preconnect', 'icon', 'preload'):
            self.addresses.append(attrs['href'])


def test_the_site(tmp_path):
    result = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)], cwd=ROOT,
        capture_output=True, text=True, timeout=200, check=False, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
    assert result.returncode == 0, result.stderr
    nav = re.search(r'^nav:\n(.*)', (ROOT / 'mkdocs.yml').read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)[1]
    names = [name for entry in yaml.safe_load(nav) for name in entry.values()]
    assert set(names) == {path.name for path in (ROOT / 'docs').glob('*.md')}
    for name in names:
        page = tmp_path / ('' if name == 'index.md' else name.removesuffix('.md')) / 'index.html'
        loaded = Loaded()
        loaded.feed(page.read_text(encoding='utf-8'))
        assert len(loaded.addresses) >= 3
        for address in loaded.addresses:
            assert '//' not in address and (page.parent / address.partition('?')[0]).resolve().is_file(), address
    assert 'Where a NOAH model looks' in (tmp_path / 'reference' / 'index.html').read_text(encoding='utf-8')


@pytest.mark.parametrize('name', ['index.md', 'head.md'])
def test_snippets(name, tmp_path):
    text = (ROOT / 'docs' / name).read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert blocks
    output = subprocess.run(
        [sys.executable, '-c', '\n'.join(blocks)], cwd=tmp_path, capture_output=True, text=True, timeout=200,
        check=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'}).stdout
    assert all(shape in output.splitlines() for shape in re.findall(r'# (\(\d.*?\))', text))


def test_the_picture_is_what_its_command_draws(tmp_path):
    text = (ROOT / 'docs' / 'head.md').read_text(encoding='utf-8')
    command = re.search(r'```bash\n(python scripts/visualize.*?)```', text, re.DOTALL)[1].replace('\\\n', ' ').split()
    command[-1] = str(tmp_path / command[-1])
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, timeout=200)
    from PIL import Image
    with Image.open(tmp_path / 'bag.png') as drawn, Image.open(ROOT / 'docs' / 'bag.png') as kept:
        assert drawn.size == kept.size
