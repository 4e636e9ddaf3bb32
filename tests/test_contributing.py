"""What CONTRIBUTING.md says of extending the project, followed step by step in a copy of it; and the example."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .pictures import make_photos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path):
    """A copy of what a change touches."""
    for name in ('noah_zoo', 'scripts', 'model_cards', 'docs'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '*.so'))
    return tmp_path


def edit(path, before, after):
    text = path.read_text(encoding='utf-8')
    assert text.count(before) == 1, before
    path.write_text(text.replace(before, after), encoding='utf-8')


def run(copy, *words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=copy, env={**os.environ, 'PYTHONPATH': str(copy)}, capture_output=True,
        text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_new_family(copy):
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    section = text[text.index('## A new family'):text.index('## A new data set')]
    family, row, module = re.findall(r'```python\n(.*?)```', section, re.S)
    catalog = copy / 'noah_zoo' / 'catalog.py'
    edit(catalog, "    'gmlp': Family('gMLP', 'III', 'gmlp', _TOKEN_HEAD),\n",
         "    'gmlp': Family('gMLP', 'III', 'gmlp', _TOKEN_HEAD),\n" + family)
    edit(catalog, '\n)}\n\n\ndef family(', f'\n{row})}}\n\n\ndef family(')
    (copy / 'noah_zoo' / 'models' / 'noah_resnet26.py').write_text(module)
    edit(copy / 'noah_zoo' / 'models' / '__init__.py', 'noah_resnet,', 'noah_resnet, noah_resnet26,')
    assert 'brought up to date' in run(copy, 'scripts/cards.py')
    card = (copy / 'model_cards' / 'resnet26_noah.md').read_text()
    assert 'ResNet-26' in card and '16,005,192' in card
    assert '[`resnet26_noah`]' in (copy / 'docs' / 'models.md').read_text()
    make_photos(copy / 'photos')
    assert 'resnet26_noah: test top-1' in run(
        copy, 'scripts/train.py', '--model', 'resnet26_noah', '--dataset', 'folder', '--data-dir', 'photos',
        '--val-fraction', 0.3, '--img-size', 32, '--smoke', 1, '-b', 4, '--workers', 0, '--cpu', '--output', 'run')
    assert run(copy, '-c', '''
import timm, noah_zoo
from noah_zoo.weights import convert_released
from noah_zoo.weights.names import released_names
model = timm.create_model('resnet26_noah')
names = released_names(model.state_dict(), 'resnet26')
given = {names[key]: value for key, value in model.state_dict().items()}
print(convert_released(given, 'resnet26_noah').keys() == model.state_dict().keys())
''').strip() == 'True'


def test_a_new_data_set_ablation_and_task(copy):
    package = copy / 'noah_zoo'
    (package / 'data' / 'pictures.py').write_text('''
from pathlib import Path
from .base import Files


class Pictures(Files):
    """A class per first letter."""

    def __init__(self, data_dir, split):
        self.paths = sorted(map(str, Path(data_dir).rglob('*.jpg')))
        letters = [Path(path).parent.name[0] for path in self.paths]
        names = sorted(set(letters))
        super().__init__(names, [names.index(letter) for letter in letters])
''')
    factory = package / 'data' / 'factory.py'
    edit(factory, "    'market1501': Market}", "    'market1501': Market, 'pictures': Pictures}")
    edit(factory, 'from .market import Market\n', 'from .market import Market\nfrom .pictures import Pictures\n')
    ablations = package / 'layers' / 'ablations.py'
    edit(ablations, 'VARIANTS: Dict', '''class MedianMerge(PocaVariant):
    """The median over positions instead of the sum."""

    def merge(self, poca_BNKL):
        return poca_BNKL.median(dim=-1).values.sum(dim=1)


VARIANTS: Dict''')
    edit(ablations, "    'max': MaxMerge,", "    'median': MedianMerge,\n    'max': MaxMerge,")
    (package / 'tasks' / 'smooth.py').write_text('''
from torch import nn
from .multiclass import Multiclass


class Smooth(Multiclass):
    """One class per image, smoothed a lot."""
    name = 'smooth'

    def create_criterion(self, config, images):
        return nn.CrossEntropyLoss(label_smoothing=0.5)
''')
    tasks = package / 'tasks' / '__init__.py'
    edit(tasks, 'Multiclass(), Multilabel(), Reid())', 'Multiclass(), Multilabel(), Reid(), Smooth())')
    edit(tasks, 'from .reid import Reid\n', 'from .reid import Reid\nfrom .smooth import Smooth\n')
    make_photos(copy / 'photos')
    printed = run(
        copy, 'scripts/train.py', '--model', 'mobilenetv2_035_noah', '--noah-variant', 'median', '--task', 'smooth',
        '--recipe', 'none', '--dataset', 'pictures', '--data-dir', 'photos', '--val-fraction', 0.3, '--img-size', 32,
        '--epochs', 1, '-b', 4, '--workers', 0, '--cpu', '--output', 'run')
    assert printed.startswith('mobilenetv2_035_noah: test top-1')


def test_the_example(tmp_path):
    make_photos(tmp_path / 'photos')
    printed = run(ROOT, 'examples/minimal.py', tmp_path / 'photos', '--epochs', 2).splitlines()
    assert printed[0].startswith('epoch 1: loss ') and printed[1].endswith(' %')
    assert printed[2] == 'attention (images, blocks, classes, height, width): (1, 8, 3, 7, 7)'
    assert len((ROOT / 'examples' / 'minimal.py').read_text().splitlines()) < 70
