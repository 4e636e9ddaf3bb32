"""The command `noah-zoo`, `python -m noah_zoo` and the scripts."""
import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import noah_zoo
import noah_zoo_cli
from noah_zoo.cli import COMMANDS, Parser, readable_errors
from noah_zoo.inference.predict import SAMPLES

from ..commands import call

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / 'scripts'


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))


def test_a_module_and_a_script_of_every_command():
    modules = {path.stem: path for path in Path(noah_zoo.cli.__file__).parent.glob('[!_]*.py')}
    assert modules.keys() == COMMANDS.keys()
    for name, path in modules.items():
        assert docstring(path).splitlines()[0] == f'{COMMANDS[name]}.'
    scripts = {path.stem: path for path in SCRIPTS.glob('*.py') if path.stem != 'cards'}
    assert scripts.keys() == COMMANDS.keys() - {'env'}
    for name, path in scripts.items():
        assert f"sys.exit(main(['{name}', *sys.argv[1:]]))" in path.read_text()


def test_list_of_commands():
    done = call()
    assert (done.returncode, done.stderr) == (0, '') and call('--help').stdout == done.stdout
    lines = dict(re.findall(r'^  (\w+) +(.*)$', done.stdout, re.MULTILINE))
    assert lines == COMMANDS
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


def test_version():
    done = call('--version')
    assert (done.returncode, done.stdout, done.stderr) == (0, f'noah-zoo {noah_zoo.__version__}\n', '')


@pytest.mark.parametrize('words, message', [
    (['trian', '--model', 'resnet18'], "noah-zoo: error: unknown command 'trian'; did you mean train?"),
    (['x'], f"noah-zoo: error: unknown command 'x'; choose from {', '.join(COMMANDS)}"),
    (['--modle'], 'noah-zoo: error: unknown flag --modle; noah-zoo --help lists all flags'),
    (['predict', '--modle', 'x'], 'noah-zoo predict: error: unknown flag --modle; did you mean --model?'),
    (['predict', '--batchsize=3'], 'noah-zoo predict: error: unknown flag --batchsize; did you mean --batch-size?'),
    (['finetune', '--learning-rate', '3'],
     'noah-zoo finetune: error: unknown flag --learning-rate; did you mean --lr?'),
    (['validate', '--xyz'], 'noah-zoo validate: error: unknown flag --xyz; noah-zoo validate --help lists all flags'),
    (['reid', 'evaluate', '--picutre', 'x'],
     'noah-zoo reid evaluate: error: unknown flag --picutre; did you mean --picture?'),
    (['reid', 'train'], 'noah-zoo reid train: error: the following arguments are required: --model, --output'),
    (['predict', '-z'], 'noah-zoo predict: error: unrecognized arguments: -z')])
def test_wrong_words(words, message):
    done = call(*words)
    assert done.returncode == 2 and not done.stdout and done.stderr.splitlines()[-1] == message


def test_what_follows_two_dashes_is_no_flag(monkeypatch):
    parser = Parser()
    parser.add_argument('path')
    assert parser.parse_args(['--', '--photo.jpg']).path == '--photo.jpg' and parser.words == ['--', '--photo.jpg']
    monkeypatch.setattr(sys, 'argv', ['x', 'photo.jpg'])
    assert parser.parse_args().path == 'photo.jpg' and parser.words == ['photo.jpg']


def test_help_of_every_command():
    for words in (*([name] for name in COMMANDS), ['reid', 'evaluate'], ['reid', 'train']):
        done, name = call(*words, '--help'), ' '.join(words)
        assert (done.returncode, done.stderr) == (0, ''), name
        assert done.stdout.startswith(f'usage: noah-zoo {name} '), name
        assert not re.search(r'scripts/|\b(?!FILE)\w+\.py\b', done.stdout), name
        for line in done.stdout.splitlines():
            if re.match(r' +(noah-zoo|accelerate launch -m noah_zoo) ', line):  # an example
                assert re.search(r'noah.zoo (\w+)', line)[1] in (words[0], 'reid'), line


def test_common_flags_come_first():
    for name in 'train', 'finetune':
        text = call(name, '--help').stdout
        common, others = text.partition('common flags:\n')[2].split('other flags:\n')
        for flag in '--model', '--output', '--data-dir', '--epochs', '--batch-size', '--lr', '--mixup', '--resume':
            assert re.search(rf'^  (-\w \w, )?{flag} ', common, re.MULTILINE), flag
        assert len(common.splitlines()) < 50 < len(others.splitlines())
    assert re.search(r'--epochs N +Epochs. \(15\)', text)  # of the recipe of finetune


def test_exit_status_is_that_of_the_command(tmp_path):
    (tmp_path / 'torn.png').write_bytes(b'\x89PNG')
    done = call('predict', tmp_path / 'torn.png')
    assert done.returncode == 1 and not done.stdout and 'torn.png' in done.stderr


def imported_first(module, seen):
    """The modules that importing a module of the project imports, without `noah_zoo/__init__.py`."""
    if module in seen or not module.startswith('noah_zoo'):
        return seen | {module}
    seen = seen | {module}
    path = ROOT.joinpath(*module.split('.'))
    path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    if module == 'noah_zoo' or not path.is_file():  # the package itself, or a name in a module
        return seen
    package = module if path.name == '__init__.py' else module.rpartition('.')[0]
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name('.' * node.level + (node.module or ''), package)
            names = [base, *(f'{base}.{alias.name}' for alias in node.names)] if base.startswith('noah_zoo') else [base]
        for name in names:
            seen = imported_first(name, seen)
    return seen


def test_what_is_imported_before_the_arguments_are_parsed():
    seen = set()
    for module in ('noah_zoo_cli', *(f'noah_zoo.cli.{name}' for name in COMMANDS)):
        seen = imported_first(module, seen)
    assert {'argparse', 'noah_zoo.text', 'noah_zoo.config', 'noah_zoo.recipes'} <= seen
    others = {name.split('.')[0] for name in seen} - {'noah_zoo', 'noah_zoo_cli'}
    assert others <= sys.stdlib_module_names


def test_the_entry_point_runs_a_command(capsys):
    assert noah_zoo_cli.main(['predict', '--json', str(SAMPLES / '0018_bag.png')]) == 0
    found, = json.loads(capsys.readouterr().out)
    assert found['predictions'][0]['label'] == 'Bag'
    with pytest.raises(SystemExit, match='2'):
        noah_zoo_cli.main(['convert'])


def test_an_error_while_the_package_is_imported(monkeypatch, capsys):
    """In place of the package, which is imported already: one whose import fails, as where PyTorch is missing."""
    def broken(module):
        raise ImportError("No module named 'torch'")

    spec = importlib.util.find_spec('noah_zoo')
    monkeypatch.setattr(spec.loader, 'exec_module', broken)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
    monkeypatch.delitem(sys.modules, 'noah_zoo')
    with pytest.raises(SystemExit, match='2'):
        noah_zoo_cli.main(['report', 'x'])
    assert capsys.readouterr().err == "noah-zoo report: error: No module named 'torch'\n"


def test_a_closed_output(monkeypatch, capsys):
    """As with `| head`; the descriptor that is replaced is the null device's."""
    with open(os.devnull, 'w') as closed:
        parser = Parser(prog='noah-zoo predict')
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match='1'):
            patch.setattr(sys, 'stdout', closed)
            with readable_errors(parser):
                raise BrokenPipeError
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('error, code, message', [
    (KeyboardInterrupt(), 130, '\nnoah-zoo report: interrupted\n'),
    (OSError('x: no runs'), 2, 'noah-zoo report: error: x: no runs\n'),
    (KeyError('architecture'), 2, "noah-zoo report: error: the config.json of the model has no 'architecture', as "
                                  "timm's have\n")])
def test_what_ends_a_command(monkeypatch, error, code, message):
    def report(folders):
        raise error
    monkeypatch.setattr('noah_zoo.training.report.report', report)
    done = call('report', 'x')
    assert (done.returncode, done.stdout, done.stderr) == (code, '', message)


WAYS = {
    'noah-zoo': ['-c', 'import sys; from noah_zoo_cli import main; sys.exit(main())'],  # as the entry point does
    'module': ['-m', 'noah_zoo'],
    'script': None,
}


def start(way, command, *args, folder, **kwargs):
    """Run a command in a new process that lists its imports on standard error."""
    words = [SCRIPTS / f'{command}.py'] if way == 'script' else [*WAYS[way], command]
    return subprocess.run(
        [sys.executable, '-X', 'importtime', *words, *args], cwd=folder, capture_output=True, text=True, check=False,
        env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(folder)}, timeout=300, **kwargs)


@pytest.mark.process
@pytest.mark.parametrize('way', WAYS)
def test_arguments_are_parsed_before_pytorch_is_imported(way, tmp_path):
    for words, code in ((('train', '--help'), 0), (('train', '--nope'), 2), (('convert',), 2)):
        done = start(way, *words, folder=tmp_path)
        assert done.returncode == code and f'noah-zoo {words[0]}' in done.stdout + done.stderr
        imported = re.findall(r'\| +(\S+)$', done.stderr, re.MULTILINE)
        assert 'argparse' in imported and not {'torch', 'numpy', 'timm', 'PIL'} & set(imported)


@pytest.mark.process
@pytest.mark.parametrize('way', WAYS)
def test_a_command_in_a_new_process(way, tmp_path):
    done = start(way, 'predict', '--json', folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('[\n  {\n    "path": ')
    (tmp_path / 'torn.png').write_bytes(b'\x89PNG')
    assert start(way, 'predict', 'torn.png', folder=tmp_path).returncode == 1
    assert start(way, 'predict', 'none.png', folder=tmp_path).returncode == 2


@pytest.mark.process
def test_output_that_nobody_reads(tmp_path):
    """As with `| head`."""
    with subprocess.Popen(
            [sys.executable, '-m', 'noah_zoo', 'predict'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(tmp_path)}) as process:
        process.stdout.close()
        assert (process.wait(timeout=300), process.stderr.read()) == (1, b'')


WRONG = {  # arguments that are right by their form
    'train': ['--model', 'resnet51', '--output', 'run'], 'finetune': ['--model', 'resnet51', '--output', 'run'],
    'validate': ['--model', 'resnet51'], 'predict': ['none.png'], 'visualize': ['none.png'],
    'demo': ['--samples', 'none.png'], 'export': ['--model', 'resnet51'],
    'convert': ['none.pth', '--model', 'resnet50_noah', '--output', 'out'], 'publish': ['resnet51', '--from', 'none'],
    'reid': ['evaluate', '--model', 'resnet51', '--data-dir', 'none'], 'benchmark': ['speed'], 'report': ['none'],
    'env': []}


@pytest.mark.process
@pytest.mark.parametrize('name', COMMANDS)
def test_entry_point_and_exit_code_of_every_command(name, tmp_path):
    code = 'import sys; from noah_zoo_cli import main; sys.exit(main())'
    done = subprocess.run(
        [sys.executable, '-c', code, name, *WRONG[name]], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(tmp_path)}, timeout=300)
    if name == 'env':
        assert done.returncode == 0 and done.stdout.startswith('- noah_zoo: '), done.stderr
        return
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert re.search(rf'noah-zoo {name}[\w ]*: error: ', done.stderr.splitlines()[-1]), done.stderr
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith('.')]


@pytest.mark.process
@pytest.mark.skipif(sys.platform == 'win32', reason='SIGINT of a process group')
@pytest.mark.parametrize('name', COMMANDS)
def test_ctrl_c_while_a_command_starts(name, tmp_path):
    """Pressed once PyTorch is imported, it ends the command in a line."""
    code = 'import sys; from noah_zoo_cli import main; sys.exit(main())'
    with subprocess.Popen(
            [sys.executable, '-X', 'importtime', '-c', code, name, *WRONG[name]], cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(tmp_path)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        for line in process.stderr:
            if re.search(r'\| +torch$', line):
                break
        process.send_signal(signal.SIGINT)
        messages = process.stderr.read()
    assert process.returncode == 130 and 'Traceback' not in messages, messages[-2000:]
    assert re.search(rf'noah-zoo {name}[\w ]*: interrupted', messages.splitlines()[-1])
