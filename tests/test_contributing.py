"""What CONTRIBUTING.md says of extending the project, followed step by step in a copy of it; and the example."""
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner

from .pictures import make_photos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path):
    """A copy of what a change touches."""
    for name in ('noah_zoo', 'scripts', 'model_cards', 'docs'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '*.so'))
    shutil.copy(ROOT / 'noah_zoo_cli.py', tmp_path)
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


@pytest.mark.docs
@pytest.mark.slow
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
    assert 'resnet26_noah: val top-1' in run(
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


@pytest.mark.docs
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
    edit(factory, "'market1501': Market}", "'market1501': Market, 'pictures': Pictures}")
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
    assert printed.startswith('mobilenetv2_035_noah: val top-1')


@pytest.mark.docs
def test_the_example_in_a_new_process(tmp_path):
    make_photos(tmp_path / 'photos')
    printed = run(ROOT, 'examples/minimal.py', tmp_path / 'photos', '--epochs', 2).splitlines()
    assert printed[0].startswith('epoch 1: loss ') and printed[1].endswith(' %')
    assert printed[2] == 'attention (images, blocks, classes, height, width): (1, 8, 3, 7, 7)'


def test_the_example(photos, monkeypatch, capsys):
    example = str(ROOT / 'examples' / 'minimal.py')
    monkeypatch.setattr(sys, 'argv', [example, str(photos), '--backbone', 'test_resnet', '--epochs', '2'])
    runpy.run_path(example, run_name='__main__')
    epochs = r'epoch 1: loss \d\.\d{3}, top-1 \d+\.\d %\nepoch 2: loss \d\.\d{3}, top-1 \d+\.\d %\n'
    attention = r'attention \(images, blocks, classes, height, width\): \(1, \d, 3, 5, 5\)\n'
    assert re.fullmatch(epochs + attention, capsys.readouterr().out)
    assert len((ROOT / 'examples' / 'minimal.py').read_text().splitlines()) < 70


def test_another_owner(tmp_path):
    for name in subprocess.check_output(['git', 'ls-files', '-z'], cwd=ROOT, text=True).rstrip('\0').split('\0'):
        if not name.startswith(('results/', 'tests/goldens/', 'noah_zoo/assets/')):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    owner = re.search('^Repository = "https://github.com/(.*)/noah_zoo"$', project, re.M)[1]
    section = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8').split('## The address of the repository')[1]
    command = re.search('```bash\n(.*?)```', section, re.S)[1]
    for words in (['git', 'init', '-q'], ['git', 'add', '.'], ['bash', '-euo', 'pipefail', '-c', command]):
        subprocess.run(words, cwd=tmp_path, check=True)
    assert 'Repository = "https://github.com/you/noah_zoo"' in (tmp_path / 'pyproject.toml').read_text()
    for word in (f'{owner}/noah_zoo', 'OWNER'):  # nothing else is to be filled in
        found = subprocess.run(
            ['git', 'grep', '-n', word, '--', f':!tests/{Path(__file__).name}'], cwd=tmp_path, capture_output=True,
            text=True, check=False)
        assert found.returncode == 1, found.stdout


def test_the_changelog_and_the_release():
    text = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    version = re.search("^__version__ = '(.*)'$", (ROOT / 'noah_zoo' / 'version.py').read_text(), re.M)[1]
    newest = re.search('^## .*$', text, re.M)[0]
    assert re.fullmatch(rf'## {re.escape(version)} \((unreleased|\d{{4}}-\d\d-\d\d)\)', newest)
    groups = {'What you have to do', 'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}
    assert set(re.findall('^### (.*)$', text, re.M)) <= groups


def test_workflows_and_forms():
    workflows = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
    for schema, files in (('github-workflows', workflows), ('dependabot', [ROOT / '.github' / 'dependabot.yml'])):
        checked = CliRunner().invoke(check_jsonschema, ['--builtin-schema', f'vendor.{schema}', *map(str, files)])
        assert checked.exit_code == 0, checked.output
    for line in (line for path in workflows for line in path.read_text().splitlines() if ' uses: ' in line):
        assert re.fullmatch(r' +(- )?uses: [\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+', line), line  # a tag can be moved
    read = {path.name: yaml.safe_load(path.read_text()) for path in workflows}
    for workflow in read.values():
        for step in (step for job in workflow['jobs'].values() for step in job['steps']):
            for word in re.findall('[a-z_/.]+', step.get('run', '')):  # files that a command names are there
                assert not re.match(r'(tests|scripts|noah_zoo)/', word) or (ROOT / word).exists(), word
    kernels = read['release.yml']['jobs']['kernel']['strategy']['matrix']['include']
    compiled_for = re.findall(r"\('(\w+)', '(\w+)'\): \[", (ROOT / 'setup.py').read_text())
    names = {'Linux': 'manylinux', 'Darwin': 'macosx'}
    assert {row['build'] for row in kernels} == {f'cp312-{names[system]}_{machine}' for system, machine in compiled_for}
    form = yaml.safe_load((ROOT / '.github' / 'ISSUE_TEMPLATE' / 'bug.yml').read_text())
    fields = {field['id']: field for field in form['body']}
    assert '`noah-zoo env`' in fields['env']['attributes']['label'] and fields['env']['validations']['required']
