"""torch.hub: in this process, and from child processes that see the package only in copies of this project."""
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import noah_zoo
from noah_zoo.catalog import CATALOG, registered

ROOT = Path(__file__).resolve().parents[1]
START = '''
import importlib.util, os, sys

class Only:
    """A finder that finds noah_zoo only below the current folder, and nothing that is hidden."""
    hidden = set()

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        spec = self.finder.find_spec(name, path, target)
        elsewhere = name == 'noah_zoo' and spec is not None and not str(spec.origin).startswith(os.getcwd())
        return None if elsewhere or name in self.hidden else spec

def refuse(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'):
        raise RuntimeError(f'{event} {args}')

def raised(error, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error as caught:
        return str(caught)
    raise AssertionError(f'no {error.__name__}')

sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
sys.addaudithook(refuse)
assert importlib.util.find_spec('noah_zoo') is None
'''
GITHUB = START + '''
import torch
repo = 'owner/noah_zoo:main'

# The folder is in torch.hub's cache, so it is trusted, and nobody is asked: there is no standard input.
names = torch.hub.list(repo, trust_repo='check', verbose=False)
assert len(names) == len(set(names)) == 37, names
assert sum(name.endswith('_noah') for name in names) == 25
for name in names:
    text = torch.hub.help(repo, name)
    for part in (name, '(B, 3, 2', '(B, num_classes)', 'Args:', 'Raises:', 'num_classes',
                 f"torch.hub.load('OWNER/noah_zoo', '{name}', "):
        assert part in text, (name, part)
assert "pretrained_cfg='fashion_mnist'" in torch.hub.help(repo, 'mobilenetv2_035_noah')
assert '25,564,032 parameters' in torch.hub.help(repo, 'resnet50_noah')

message = raised(RuntimeError, torch.hub.load, repo, 'resnet51_noah', trust_repo=True, skip_validation=True)
assert message == 'Cannot find callable resnet51_noah in hubconf', message
Only.hidden = {'timm', 'safetensors'}
message = raised(RuntimeError, torch.hub.load, repo, 'resnet50_noah', trust_repo=True, skip_validation=True)
assert message == 'Missing dependencies: timm, safetensors', message
Only.hidden = set()
assert not {'timm', 'noah_zoo', 'safetensors'} & set(sys.modules)

path = list(sys.path)
model = torch.hub.load(
    repo, 'deit_tiny_050_patch16_224_noah', trust_repo=True, skip_validation=True, pretrained=False, num_classes=5)
assert sys.path == path
assert model.eval()(torch.randn(2, 3, 224, 224)).shape == (2, 5)
assert sys.modules['noah_zoo'].__file__.startswith(torch.hub.get_dir()), sys.modules['noah_zoo'].__file__
'''
LOCAL = START + '''
sys.path.insert(0, 'repo')
import hubconf
sys.path.remove('repo')
assert not {'torch', 'timm', 'noah_zoo'} & set(sys.modules)
names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith('_')]
for name in names:
    entry = getattr(hubconf, name)
    assert entry.__name__ == entry.__qualname__ == name

import copy, pickle, torch, timm
before = set(timm.list_models())
path = list(sys.path)
image = torch.randn(1, 3, 224, 224)

def load(name, *args, repo='repo', **kwargs):
    model = torch.hub.load(repo, name, *args, source='local', **kwargs).eval()
    assert sys.path == path
    return model

for name in ('shufflenetv2_100_noah', 'pvt_tiny_050', 'gmlp_ti16_050_224_noah'):
    model = load(name, pretrained=False, num_classes=5)
    assert model.pretrained_cfg['architecture'] == name
    assert model(image).shape == (1, 5)
assert load('noah', backbone='test_vit', num_classes=5, img_size=224)(image).shape == (1, 5)
import noah_zoo
assert noah_zoo.__file__ == os.path.abspath('repo/noah_zoo/__init__.py'), noah_zoo.__file__
assert set(timm.list_models()) - before == set(names), 'the entry points are not what is registered'

# What is passed on, and what is refused.
model = load('mobilenetv2_035_noah', num_groups=4, key_ratio=0.5, in_chans=1, num_classes=8)
assert (model.noah_cfg['num_groups'], model.noah_cfg['key_ratio']) == (4, 0.5)
assert model(image[:, :1]).shape == (1, 8)
assert 'num_groups=3' in raised(ValueError, load, 'resnet18_noah', num_groups=3)
assert 'groups_num' in raised(TypeError, load, 'resnet18_noah', groups_num=4)
assert 'fashion' in raised(RuntimeError, load, 'mobilenetv2_035_noah', pretrained_cfg='fashion')

# The weights that ship: positional `pretrained`, the tag as timm has it.
model = load('mobilenetv2_035_noah', True, pretrained_cfg='fashion_mnist')
images = torch.randn(4, 3, 64, 64)
same = timm.create_model('mobilenetv2_035_noah.fashion_mnist', pretrained=True).eval()
other = load('mobilenetv2_035_noah', pretrained_cfg='fashion_mnist')
with torch.no_grad():
    logits = model(images)
    assert logits.shape == (4, 10) and torch.equal(logits, same(images))  # the same operations: the same bits
    assert (logits - other(images)).abs().max() > 0.1

    # The model works where the repository, given by a relative path, is neither on the path nor below.
    os.chdir('elsewhere')
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and torch.equal(again(images), logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), logits)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (4, model.head_hidden_size)
    model.reset_classifier(3)
    assert isinstance(model.classifier, noah_zoo.NoahHead) and model(images).shape == (4, 3)
    model.reset_classifier(0)
    assert model(images).shape == (4, model.head_hidden_size)
from noah_zoo.weights import released
assert released.__file__.startswith(os.path.dirname(noah_zoo.__file__))

# Another copy comes second: what is imported stays.
other = load('resnet18_noah', repo=os.path.abspath('../other'), num_classes=2)
assert sys.modules['noah_zoo'] is noah_zoo and type(other).__mro__[1].__module__ == 'noah_zoo.models.attach'

# What the package imports from elsewhere is asked for by torch.hub first.
import ast
wanted = set()
for name, module in list(sys.modules.items()):
    if name.split('.')[0] == 'noah_zoo':
        for node in ast.parse(open(module.__file__, encoding='utf-8').read()).body:
            if isinstance(node, ast.Import):
                wanted.update(alias.name.split('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                wanted.add(node.module.split('.')[0])
wanted -= sys.stdlib_module_names
assert {'timm', 'torch', 'torchvision'} <= wanted <= set(hubconf.dependencies), wanted
'''


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """A folder with two copies of the project, and a third in the cache of torch.hub."""
    room = tmp_path_factory.mktemp('hubconf').resolve()
    (room / 'elsewhere').mkdir()
    for copy in ('repo', 'other', 'home/hub/owner_noah_zoo_main'):
        shutil.copytree(ROOT / 'noah_zoo', room / copy / 'noah_zoo', ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'hubconf.py', room / copy)
    return room


@pytest.fixture(scope='module')
def hubconf():
    spec = importlib.util.spec_from_file_location('hubconf_of_the_project', ROOT / 'hubconf.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_entry_points(hubconf):
    names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith('_')]
    assert sorted(names) == sorted(registered()) and len(names) == 37
    for name in names:
        entry = getattr(hubconf, name)
        assert entry.__name__ == entry.__qualname__ == name
        for part in (name, '(B, 3, 2', '(B, num_classes)', 'Args:', 'Raises:',
                     f"torch.hub.load('OWNER/noah_zoo', '{name}', "):
            assert part in entry.__doc__, (name, part)
    for name, row in CATALOG.items():
        assert f'N={row.num_groups}, key ratio {row.key_ratio:g}' in getattr(hubconf, name).__doc__
        assert f'{row.params:,} parameters' in getattr(hubconf, name).__doc__
        if row.vanilla in names:
            assert f'vanilla twin of {name}' in getattr(hubconf, row.vanilla).__doc__
    assert "pretrained_cfg='fashion_mnist'" in hubconf.mobilenetv2_035_noah.__doc__
    assert "pretrained_cfg='fashion_mnist'" not in hubconf.mobilenetv2_050_noah.__doc__


def test_models():
    def load(*args, **kwargs):
        return torch.hub.load(str(ROOT), *args, source='local', **kwargs).eval()

    path = list(sys.path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model = load('mobilenetv2_035_noah', True, pretrained_cfg='fashion_mnist')
        same = timm.create_model('mobilenetv2_035_noah.fashion_mnist', pretrained=True).eval()
        assert torch.equal(model(images), same(images))
        assert load('noah', backbone='test_vit', num_classes=5, img_size=64)(images).shape == (2, 5)
        model = load('mobilenetv2_035_noah', num_groups=4, key_ratio=0.5, in_chans=1, num_classes=8)
        assert model(images[:, :1]).shape == (2, 8)
    assert (model.noah_cfg['num_groups'], model.noah_cfg['key_ratio']) == (4, 0.5)
    assert load('pvt_tiny_050', num_classes=5).pretrained_cfg['architecture'] == 'pvt_tiny_050'
    for error, kwargs, message in (
            (ValueError, dict(num_groups=3), 'num_groups=3'), (TypeError, dict(groups_num=4), 'groups_num'),
            (RuntimeError, dict(pretrained_cfg='fashion'), 'fashion')):
        with pytest.raises(error, match=message):
            load('mobilenetv2_035_noah', **kwargs)
    assert sys.path == path and Path(noah_zoo.__file__).parent == ROOT / 'noah_zoo'


@pytest.mark.process
@pytest.mark.parametrize('code', [GITHUB, LOCAL], ids=['github', 'local'])
def test_torch_hub(room, code):
    child = subprocess.run(
        [sys.executable, '-c', code], cwd=room, env={**os.environ, 'TORCH_HOME': str(room / 'home')},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
