"""A clone of this project that publishes on a Hub on loopback."""
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .released import released_state_dict

ROOT = Path(__file__).resolve().parents[1]
TOKEN = 'hf_owner'
FILES = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'test/reference.safetensors'}


def release(folder, *names):
    """Write the authors' files of models."""
    for name in names:
        torch.save(
            {'state_dict': {f'module.{key}': value for key, value in released_state_dict(name).items()}},
            folder / f'{name}.pth.tar')


def writes(hub):
    """Method and path of the requests that may change something."""
    return [request[:2] for request in hub.requests if request.method not in ('GET', 'HEAD')]


class Project:
    """A clone of this project, a folder with two released files, and a Hub."""

    def __init__(self, folder, hub):
        self.folder, self.hub = folder, hub
        for name in ('noah_zoo', 'scripts'):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(ROOT / 'noah_zoo_cli.py', folder)
        self.record = folder / 'noah_zoo' / 'published.json'
        self.record.write_text('{}\n')
        self.weights = folder / 'weights'
        self.weights.mkdir()

    def start(self, *args, token=TOKEN, **env):
        return subprocess.Popen(
            [sys.executable, *map(str, args)], cwd=self.folder, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.hub.env(self.folder / 'home', token), 'PYTHONPATH': str(self.folder), **env})

    def run(self, *args, code=0, **kwargs):
        process = self.start(*args, **kwargs)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        assert TOKEN not in out + err
        return out + err

    def publish(self, *args, **kwargs):
        return self.run('scripts/publish.py', *args, '--from', 'weights', **kwargs)
