"""What importing the package does and does not do, and what it imports."""
import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from noah_zoo.catalog import CATALOG

ROOT = Path(__file__).resolve().parents[1]
STOREYS = (  # from the ground up; a room knows those below it
    {'catalog', 'config', 'files', 'layers', 'recipes', 'text', 'version'}, {'data', 'models'}, {'tasks', 'weights'},
    {'inference', 'publish'}, {'training'}, {'benchmark'}, {'cli'}, {'__main__'})
SOURCES = [
    ROOT / 'noah_zoo_cli.py', *sorted((ROOT / 'noah_zoo').rglob('*.py')), *sorted((ROOT / 'scripts').glob('*.py'))]


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding='utf-8'))))


def imported_names(path):
    """Every imported module and name of a file, relative imports resolved inside the package."""
    package = path.relative_to(ROOT).with_suffix('').parts
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:-node.level]) + '.' if node.level else ''
            module = (base + (node.module or '')).rstrip('.')
            yield from (f'{module}.{alias.name}' for alias in node.names)


def test_no_private_name_of_timm():
    assert len(SOURCES) > 50
    for path in SOURCES:
        names = [name for name in imported_names(path) if name.split('.')[0] == 'timm']
        assert not [name for name in names if any(part.startswith('_') for part in name.split('.'))], path
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__'):
                assert not ast.unparse(node.value).startswith('timm'), (path, ast.unparse(node))


def modules(path):
    """The modules of the package that a file imports, its own name first."""
    def module(name):
        """Of a dotted name, which may end in a class or a function."""
        parts = name.split('.')
        for end in range(len(parts), 0, -1):
            file = ROOT.joinpath(*parts[:end])
            if file.with_suffix('.py').is_file() or (file / '__init__.py').is_file():
                return '.'.join(parts[:end])

    own = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    return own, {module(name) for name in imported_names(path) if name.startswith('noah_zoo')} - {own}


def test_every_room_has_a_storey():
    package = ROOT / 'noah_zoo'
    rooms = {path.stem for path in package.glob('*.py')} | {path.parent.name for path in package.glob('*/__init__.py')}
    assert sorted(room for storey in STOREYS for room in storey) == sorted(rooms - {'__init__'})


def test_imports_go_down_only():
    storeys = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
    for path in SOURCES:
        own, imported = modules(path)
        if own.split('.')[0] == 'noah_zoo' and own != 'noah_zoo':
            room = own.split('.')[1]
            rooms = {name.split('.')[1] for name in imported if name != 'noah_zoo'}
            above = {
                other for other in rooms - {room}
                if storeys[other] > storeys[room] or storeys[other] == storeys[room] and storeys[room] > 0}
            assert not above, (path, above)


def test_no_circle():
    """Not in a folder either."""
    graph = dict(modules(path) for path in SOURCES if path.is_relative_to(ROOT / 'noah_zoo'))
    del graph['noah_zoo']  # it registers the models, and nothing needs it
    while graph:
        leaves = {name for name, imported in graph.items() if not imported & graph.keys()}
        assert leaves, sorted(graph)
        graph = {name: imported for name, imported in graph.items() if name not in leaves}


def run(code):
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout


def test_names():
    assert set(timm.list_models('*_noah')) == set(CATALOG) and len(CATALOG) == 25
    assert timm.is_model('noah') and set(timm.list_pretrained('mobilenetv2_035_noah')) == {
        'mobilenetv2_035_noah.fashion_mnist', 'mobilenetv2_035_noah.osvai_in1k'}


@pytest.mark.process
@pytest.mark.slow  # it needs a quiet machine
def test_import_is_quick():
    code = 'import time, timm; start = time.perf_counter(); import noah_zoo; print(time.perf_counter() - start)'
    assert min(float(run(code)) for _ in range(2)) < 1


@pytest.mark.process
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


@pytest.mark.process
def test_names_that_an_import_adds():
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
