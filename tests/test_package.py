"""What importing the package does and does not do, and what it imports."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .scripts import call

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {  # lower floors know nothing of higher ones
    'poca': 1, 'poca_cpu': 1, 'poca_triton': 1, 'head': 1, 'ablations': 1, 'catalog': 1, 'recipes': 1, 'images': 1,
    'attach': 2, 'models': 2, 'weights': 3, 'attention': 4, 'demo': 4, 'export': 4, 'figures': 4, 'inference': 4,
    'training': 4, 'benchmark': 4, 'benchmark_report': 4, 'measure': 4, 'other_heads': 4, 'probe': 4}
SOURCES = sorted((ROOT / 'noah_zoo').rglob('*.py')) + sorted((ROOT / 'scripts').glob('*.py'))


def imported_names(path):
    """Every imported module and name of a file, relative imports resolved inside the package."""
    package = path.relative_to(ROOT).with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:-node.level]) + '.' if node.level else ''
            module = (base + (node.module or '')).rstrip('.')
            yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_timm(path):
    names = [name for name in imported_names(path) if name.split('.')[0] == 'timm']
    assert not [name for name in names if any(part.startswith('_') for part in name.split('.'))]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__'):
            assert not ast.unparse(node.value).startswith('timm'), ast.unparse(node)


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    parts = path.relative_to(ROOT).parts
    if parts[1] == '__init__.py':
        return
    floor = 5 if parts[0] == 'scripts' else FLOORS[parts[1].removesuffix('.py')]
    assert ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))).startswith(f'Floor {floor}: ')
    for name in imported_names(path):
        room = name.split('.')[1] if name.startswith('noah_zoo.') else None
        assert room is None or FLOORS[room] <= floor, name


@pytest.mark.parametrize('script', sorted(path.name for path in (ROOT / 'scripts').glob('*.py')))
def test_help(script):
    done = call(script, '--help')
    assert done.returncode == 0 and f'scripts/{script}' in done.stdout and 'Floor' not in done.stdout


def run(code):
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout


def test_import_is_quick():
    code = 'import time, timm; start = time.perf_counter(); import noah_zoo; print(time.perf_counter() - start)'
    assert min(float(run(code)) for _ in range(2)) < 1


def test_import_needs_no_network_and_compiles_nothing():
    # An audit hook refuses every connection, name look-up and process.
    print(run('''
import sys
def refuse(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'subprocess.Popen', 'os.system'):
        raise RuntimeError(f'{event} {args}')
import timm
sys.addaudithook(refuse)
import noah_zoo
timm.create_model('mobilenetv2_035_noah.fashion_mnist', pretrained=True)
'''))


def test_names():
    code = '''
import timm
before = set(timm.list_models())
import warnings; warnings.simplefilter('error')
import noah_zoo
after = set(timm.list_models())
assert before < after, before - after
print(len(timm.list_models('*_noah')), len(after - before), 'noah' in after)
'''
    assert run(code).split() == ['25', '37', 'True']
