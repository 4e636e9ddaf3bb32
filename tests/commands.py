"""Commands run in this process, which has imported PyTorch and timm already."""
import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from noah_zoo.cli import main

ROOT = Path(__file__).resolve().parents[1]


def call(*argv, main=main, cwd='.'):
    """The exit status of `noah-zoo ARGV`, its output and its messages. The test gets any other exception."""
    argv, before, code = list(map(str, argv)), Path.cwd(), 0
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # so that the command sets up its own, as in a new process
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv) or 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(before)
        root.handlers[:] = handlers
        root.setLevel(level)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def interrupt(command, *args, after):
    """The exit status and the messages of `noah-zoo COMMAND ARGS` if Ctrl-C is pressed once it has written `after`."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'noah_zoo', command, *map(str, args)], stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, start_new_session=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # in the background it is ignored
    seen = b''
    while after not in seen:
        seen += process.stderr.read1(100)
        assert process.poll() is None, seen
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr
