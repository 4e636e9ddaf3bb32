"""How tests are distributed to processes, a Hub on loopback, and what many tests read."""
import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from .hub_server import HubServer

# The Hub's client reads its environment when it is imported. No test reaches the real Hub or the user's cache.
HUB = HubServer(users={'hf_owner': 'noah-zoo', 'hf_you': 'you'})
HUB.start()
HOME = Path(tempfile.mkdtemp(prefix='hub-home-'))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for name in set(os.environ) - set(HUB.env(HOME)):
    del os.environ[name]
os.environ.update(HUB.env(HOME))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # threads of PyTorch that wait for a core spin


def pytest_xdist_auto_num_workers(config):
    """Return one process per core for all tests, and none besides this one for a selection of files or names."""
    chosen = config.args_source is config.ArgsSource.ARGS or config.option.keyword
    return 0 if chosen else min(os.cpu_count() or 1, 8)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub of this process, for code that is called in process. `monkeypatch.setenv('HF_TOKEN', ...)` logs in.

    Repositories stay for the session, so that each test needs names of its own.
    """
    HUB.requests.clear()
    yield HUB
    HUB.clear_faults()


@pytest.fixture(scope='session')
def idx_dir(tmp_path_factory):
    from .pictures import make_fashion_mnist
    root = tmp_path_factory.mktemp('idx')
    make_fashion_mnist(root)
    return root


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    from .pictures import make_photos
    root = tmp_path_factory.mktemp('photos')
    make_photos(root)
    return root


@pytest.fixture(scope='session')
def trained_run(tmp_path_factory, photos):
    """The folder of a finished run of timm's test_resnet with NOAH on `photos`. Tests that change it copy it."""
    from noah_zoo.training.settings import configure
    from noah_zoo.training.trainer import train
    output = tmp_path_factory.mktemp('runs') / 'photos'
    train(configure(
        'noah', str(output), recipe='none', dataset='folder', data_dir=str(photos), val_fraction=0.25, img_size=32,
        model_kwargs={'backbone': 'test_resnet'}, epochs=2, batch_size=8, workers=0, cpu=True))
    return output


@pytest.fixture(scope='session')
def other_tools(tmp_path_factory):
    """The Python of an environment with all that is installed here, and with what the extra `other_tools` names."""
    from .environments import install, make_environment, share_packages
    python = make_environment(tmp_path_factory.mktemp('other_tools'))
    share_packages(python)
    text = (Path(__file__).resolve().parents[1] / 'pyproject.toml').read_text(encoding='utf-8')
    wanted = re.findall('"(.*?)"', re.search(r'^other_tools = \[(.*)\]$', text, re.MULTILINE)[1])
    install(python, *wanted)
    return str(python)
