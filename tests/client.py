"""A process with timm, noah_zoo and the Hub's client, for tests of how weights are loaded.

The Hub's client reads HF_* when it is imported, so it cannot live in the test's own process; and importing takes
seconds, so one child serves many tests:

    with Client(hub.env(home)) as client:
        answer = client.create('resnet50_noah', cache_dir=str(tmp_path))
        assert answer.error is None

Another version of the Hub's client is tested by `HUB_CLIENT=FOLDER pytest`, after `pip install --target FOLDER`.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CHILD = '''
import io, json, logging, os, signal, socket, sys, time, traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import timm, noah_zoo, torch
import huggingface_hub
from huggingface_hub import hf_hub_download
from tests.client import digest

lines = io.StringIO()
logging.basicConfig(stream=lines, level=logging.INFO)
answers, sys.stdout = sys.stdout, lines

def create(name, pretrained=True, **kwargs):
    return timm.create_model(name, pretrained=pretrained, **kwargs)

def create_without_names(name, **kwargs):
    """`create` where looking up the name of a host takes for ever, as without a network it may."""
    known = socket.getaddrinfo
    socket.getaddrinfo = lambda *args, **kwargs: time.sleep(20) or known(*args, **kwargs)
    try:
        return create(name, **kwargs)
    finally:
        socket.getaddrinfo = known

def digest_of(args):
    barrier.wait()
    return digest(create(args[0], **args[1]).state_dict())

def together(count, name, **kwargs):
    """What so many processes make of a call at the same time."""
    global barrier
    context = get_context('fork')
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        return list(pool.map(digest_of, [(name, kwargs)] * count))

def stopped(number, arrived, name, **kwargs):
    """Call in another process, send it a signal once enough bytes have arrived below cache_dir, wait for its end."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
        status = 0
        try:
            create(name, **kwargs)
        except KeyboardInterrupt:
            status = 3
        finally:
            os._exit(status)
    files = Path(kwargs['cache_dir'])
    while sum(file.stat().st_size for file in files.rglob('*') if file.is_file()) < arrived:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), list(files.rglob('*'))
        time.sleep(0.02)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for line in sys.stdin:
    given = json.loads(line)
    before = dict(os.environ)
    os.environ.update(given['env'])
    scope = dict(globals(), value=None, **given['names'])
    error, kinds = None, []
    try:
        exec(given['code'], scope)
    except Exception as raised:
        error, kinds = str(raised), [kind.__name__ for kind in type(raised).__mro__]
        scope['value'] = None
        traceback.print_exc(file=sys.stderr)
    os.environ.clear()
    os.environ.update(before)
    answer = dict(value=scope['value'], error=error, kinds=kinds, log=lines.getvalue())
    print(json.dumps(answer), file=answers, flush=True)
    lines.seek(0)
    lines.truncate()
'''


class Answer(NamedTuple):
    """What became of the code: the variable `value`, or an error and its classes; all that was printed."""
    value: Any
    error: Optional[str]
    kinds: List[str]
    log: str


def digest(state_dict: Dict[str, torch.Tensor]) -> str:
    """A hash of names and values."""
    content = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        content.update(name.encode())
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def bound() -> Sequence[str]:
    """A prefix for `Client` under which permissions bind, also where the tests run as root; or skip the test."""
    if os.geteuid():
        return ()
    capabilities = '-dac_override,-dac_read_search'
    prefix = ('setpriv', f'--bounding-set={capabilities}', f'--inh-caps={capabilities}')
    try:
        subprocess.run([*prefix, 'true'], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'root, whom permissions do not bind, and capabilities cannot be dropped: {error}')
    return prefix


class SmallDisk:
    """A file system of its own, as a context manager that gives its folder; or skip the test.

    Args:
        folder: Where to put it; is made.
        megabytes: Its size.
    """

    def __init__(self, folder: Path, megabytes: int):
        self.folder = folder
        self._command = ['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', str(folder)]

    def __enter__(self) -> Path:
        self.folder.mkdir()
        try:
            subprocess.run(self._command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f'no file system of its own: {error}')
        return self.folder

    def __exit__(self, *exc: object) -> None:
        subprocess.run(['umount', '-l', str(self.folder)], check=True)


class Client:
    """The child process, as a context manager.

    Args:
        env: Its whole environment, but for PYTHONPATH.
        published: What to record as published, in a copy of the package; None for the package itself.
        prefix: A command to start it with.
    """

    def __init__(
            self, env: Dict[str, str], published: Optional[Dict[str, Dict[str, str]]] = None,
            prefix: Sequence[str] = ()):
        self._folder = tempfile.TemporaryDirectory()
        self.package = ROOT / 'noah_zoo'
        if published is not None:
            self.package = Path(self._folder.name) / 'noah_zoo'
            shutil.copytree(ROOT / 'noah_zoo', self.package, ignore=shutil.ignore_patterns('__pycache__'))
            (self.package / 'published.json').write_text(json.dumps(published))
        path: List[str] = [os.environ.get('HUB_CLIENT', ''), str(self.package.parent), str(ROOT)]
        self._env = {**env, 'PYTHONPATH': os.pathsep.join(filter(None, path)), 'OMP_NUM_THREADS': '1'}
        self._command = [*prefix, sys.executable, '-c', CHILD]

    def __enter__(self) -> 'Client':
        self._errors = open(Path(self._folder.name) / 'stderr', 'w+')
        self._process = subprocess.Popen(
            self._command, cwd=self._folder.name, env=self._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True)
        try:
            found = self.run('value = noah_zoo.__file__, huggingface_hub.__file__').value
            assert Path(found[0]).parent == self.package
            assert found[1].startswith(os.environ.get('HUB_CLIENT', ''))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()

    def run(self, code: str, env: Optional[Dict[str, str]] = None, **names: Any) -> Answer:
        """Run code in which `names` are known, with variables added to the environment."""
        self._process.stdin.write(json.dumps(dict(code=code, env=env or {}, names=names)) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.errors()
        return Answer(**json.loads(line))

    def create(self, name: str, env: Optional[Dict[str, str]] = None, **kwargs: Any) -> Answer:
        """`timm.create_model`, pretrained unless told otherwise; the value is the `digest` of its state dict."""
        return self.run('value = digest(create(name, **kwargs).state_dict())', env, name=name, kwargs=kwargs)

    def errors(self) -> str:
        """All that was written to standard error so far."""
        self._errors.flush()
        self._errors.seek(0)
        return self._errors.read()
