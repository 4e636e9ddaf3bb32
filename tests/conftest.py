"""How the tests are shared among processors, the images that many of them read, and an environment with other tools."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    folder = tmp_path_factory.mktemp('other_tools')
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    python, = folder.glob('bin/python')
    packages, = folder.glob('lib/python*/site-packages')
    ours = [path for path in sys.path if path.endswith('-packages')]
    (packages / 'of_the_tests.pth').write_text('\n'.join(ours) + '\n')
    text = (Path(__file__).resolve().parents[1] / 'pyproject.toml').read_text(encoding='utf-8')
    wanted = re.findall('"(.*?)"', re.search(r'^other_tools = \[(.*)\]$', text, re.MULTILINE)[1])
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', *wanted], check=True)
    return str(python)
