"""How the tests are shared among processors, the images that many of them read, and an environment with other tools."""
import os
import re
from pathlib import Path

import pytest

from .environments import install, make_environment, share_packages
from .pictures import make_fashion_mnist, make_photos


def pytest_xdist_auto_num_workers(config):
    """One process per processor for the whole of the tests, this one alone for a choice of them."""
    chosen = config.args_source is config.ArgsSource.ARGS or config.option.keyword
    if not chosen:
        os.environ.setdefault('OMP_NUM_THREADS', '1')  # of PyTorch in each
    return 0 if chosen else min(os.cpu_count() or 1, 8)


@pytest.fixture(scope='session')
def idx_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp('idx')
    make_fashion_mnist(root)
    return root


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    make_photos(root)
    return root


@pytest.fixture(scope='session')
def other_tools(tmp_path_factory):
    """The Python of an environment with all that is installed here, and with what the extra `other_tools` names."""
    python = make_environment(tmp_path_factory.mktemp('other_tools'))
    share_packages(python)
    text = (Path(__file__).resolve().parents[1] / 'pyproject.toml').read_text(encoding='utf-8')
    wanted = re.findall('"(.*?)"', re.search(r'^other_tools = \[(.*)\]$', text, re.MULTILINE)[1])
    install(python, *wanted)
    return str(python)
