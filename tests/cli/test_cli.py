"""The command `noah-zoo`."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

import noah_zoo
from noah_zoo.cli import COMMANDS, as_command, main

from ..scripts import SCRIPTS, call

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch, capsys):
    """The exit status of `noah-zoo ARGS`, what it prints and what it says."""
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['noah-zoo', *map(str, args)])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        return (code or 0, *capsys.readouterr())
    return run


def test_a_module_and_a_script_of_every_command():
    assert sorted(COMMANDS) == sorted(path.stem for path in Path(noah_zoo.cli.__file__).parent.glob('[!_]*.py'))
    assert set(COMMANDS) - {'env'} == {path.stem for path in SCRIPTS.glob('*.py')} - {'cards'}


def test_what_there_is(command):
    code, out, err = command()
    assert (code, err) == (0, '') and command('--help') == (code, out, err)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith('  ') and '-' not in line[:5])
    assert tuple(lines) == COMMANDS and lines['predict'] == 'Classify images'
    assert all(len(line) <= 120 for line in out.splitlines())


def test_version(command):
    assert command('--version') == (0, f'noah-zoo {noah_zoo.__version__}\n', '')


@pytest.mark.parametrize('wrong, said', [
    ('trian', "noah-zoo: error: unknown command 'trian'; did you mean train?"),
    ('x', f"noah-zoo: error: unknown command 'x'; choose from {', '.join(COMMANDS)}")])
def test_a_wrong_command(command, wrong, said):
    assert command(wrong, '--model', 'resnet18') == (2, '', said + '\n')


def test_a_wrong_flag(command):
    code, out, err = command('--modle')
    assert code == 2 and not out and err.endswith('noah-zoo: error: unrecognized arguments: --modle\n')


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command(command, name):
    code, out, err = command(name, '--help')
    assert (code, err) == (0, '') and f'noah-zoo {name}' in out
    assert not re.search(r'scripts/|\b(?!FILE)\w+\.py\b', out)


@pytest.mark.parametrize('name', [name for name in COMMANDS if name != 'env'])
def test_help_of_a_script(command, name):
    """It is the command's, but speaks of scripts."""
    def below_usage(text):
        return ' '.join(text.partition('\n\n')[2].split())

    script = call(f'{name}.py', '--help').stdout
    assert f'scripts/{name}.py' in script and f'noah-zoo {name}' not in script
    assert below_usage(as_command(script)) == below_usage(command(name, '--help')[1])


def test_texts_that_name_scripts():
    assert as_command('accelerate launch scripts/train.py --x a.pyx b.png') == (
        'accelerate launch -m noah_zoo train --x a.pyx b.png')
    assert as_command('As train.py; `python scripts/reid.py train`, scripts/demo.py') == (
        'As noah-zoo train; `noah-zoo reid train`, noah-zoo demo')


def test_it_runs_the_command(command, tmp_path):
    """As the script does, but for its name."""
    code, out, err = command('report', tmp_path)
    done = call('report.py', tmp_path)
    assert code == done.returncode == 2 and not out + done.stdout
    assert err == done.stderr.replace('report.py', 'noah-zoo report') != done.stderr


def test_the_exit_status_is_the_command_s(command, tmp_path):
    (tmp_path / 'torn.png').write_bytes(b'\x89PNG')
    code, out, err = command('predict', tmp_path / 'torn.png')
    assert code == 1 and not out and 'torn.png' in err


@pytest.mark.parametrize('error, wanted', [
    (KeyboardInterrupt(), (130, '', '\nnoah-zoo report: interrupted\n')),
    (OSError('x: no runs'), (2, '', 'noah-zoo report: error: x: no runs\n'))])
def test_what_ends_a_command(command, monkeypatch, error, wanted):
    def report(folders):
        raise error
    monkeypatch.setattr('noah_zoo.training.report.report', report)
    assert command('report', 'x') == wanted


def test_nobody_reads_on(tmp_path):
    """As behind `| head`."""
    with subprocess.Popen(
            [sys.executable, '-m', 'noah_zoo', 'predict'], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(tmp_path)}) as process:
        process.stdout.close()
        assert (process.wait(timeout=300), process.stderr.read()) == (1, b'')


def test_reid_has_commands_of_its_own(command):
    code, out, _ = command('reid', 'evaluate', '--help')
    assert code == 0 and out.startswith('usage: noah-zoo reid evaluate ')
    code, _, err = command('reid', 'train')
    assert code == 2 and 'noah-zoo reid train: error: the following arguments are required: --model, --output' in err


def test_as_a_module(tmp_path):
    """From another folder."""
    done = subprocess.run(
        [sys.executable, '-m', 'noah_zoo', 'convert'], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(tmp_path)}, timeout=300)
    assert done.returncode == 2 and 'noah-zoo convert: error: the following arguments are required: FILE' in done.stderr
