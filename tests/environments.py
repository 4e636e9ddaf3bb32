"""Virtual environments of their own, for what must not touch the one that runs the tests."""
import os
import subprocess
import sys
from pathlib import Path


def run(*words, **kwargs):
    """What a command prints; where it fails, its last lines are the error."""
    done = subprocess.run(list(map(str, words)), check=False, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def make_environment(folder):
    """An empty environment; its Python."""
    run(sys.executable, '-m', 'venv', '--without-pip', folder)
    return Path(folder) / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')


def install(python, *words, **kwargs):
    """By the pip of the environment that runs the tests."""
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', *words, **kwargs)


def share_packages(python):
    """What is installed here is found there too, after its own; editable installs are not."""
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    (site / 'of_the_tests.pth').write_text('\n'.join(path for path in sys.path if path.endswith('-packages')))
