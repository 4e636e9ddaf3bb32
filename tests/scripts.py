"""The scripts, run in this process: to import PyTorch and timm takes seconds, and they are imported here."""
import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'


def call(script, *args, cwd='.'):
    """What `python scripts/SCRIPT ARGS` returns, prints and says. An exception that it does not catch is the test's."""
    argv, before, code = [str(SCRIPTS / script), *map(str, args)], Path.cwd(), 0
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # so that the script sets up its own, as in a new process
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, 'argv', argv), mock.patch.object(sys, 'path', [str(SCRIPTS), *sys.path]), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            err.write(code + '\n')
            code = 1
    finally:
        os.chdir(before)
        root.handlers[:] = handlers
        root.setLevel(level)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def interrupt(script, *args, after):
    """The exit status of `python scripts/SCRIPT ARGS`, and what it says; Ctrl-C is pressed once it has said `after`."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / script), *map(str, args)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # in the background it is ignored
    seen = b''
    while after not in seen:
        seen += process.stderr.read1(100)
        assert process.poll() is None, seen
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr
