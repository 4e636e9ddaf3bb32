"""What a run leaves in its folder: settings, log, the best weights, the summary. Every file is whole or absent."""
import csv
import io
import json
import logging
import os
import platform
import shutil
import subprocess
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import accelerate
import timm
import torch
import yaml
from accelerate import PartialState
from filelock import FileLock, Timeout
from torch import nn

from ..config import TrainConfig
from ..data.base import class_changes
from ..data.factory import create_datasets
from ..data.split import EARLIER, RECORD, TRAINING, VALIDATION, read_split
from ..files import clear_partial, disk_errors, write
from ..models.saving import save_model
from ..tasks import find_task
from ..text import finite
from .builders import model_kwargs
from .checkpoint import PREFIX, newest_checkpoint

_logger = logging.getLogger(__name__)

LOCK_SECONDS = 10  # workers of a killed run hold its lock until they notice, which takes up to 5 seconds
MAY_CHANGE = (  # settings that a run may go on with another value of: they do not change what it leaves
    'output', 'data_dir', 'resume', 'workers', 'log_with', 'checkpoint_hist', 'device_batch_size')
OF_CHECKPOINT = (  # settings that a branch has from its checkpoint: they say what is in there
    'model', 'model_kwargs', 'noah_variant', 'task', 'freeze', 'opt', 'amsgrad', 'layer_decay', 'head_lr_factor',
    'model_ema_decay', 'smoke')


class RunFolder:
    """The folder of a run.

    Attributes:
        path: The folder.
        checkpoints: Where its checkpoints are.
        log: A line of JSON per epoch.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints, self.log = self.path / 'checkpoints', self.path / 'log.jsonl'

    def finished(self, config: TrainConfig) -> Optional[Dict[str, Any]]:
        """The summary of a finished run that is to go on; None for a run to be made.

        Raises:
            FileExistsError: If there is a run, and `config.resume` does not say to go on with it.
            FileNotFoundError: If `config.resume` or the checkpoint of a run that is to be trained on is not there.
            ValueError: If it is to go on with other settings, but for more `epochs`; or a checkpoint of another run is
                of another model or optimizer.
        """
        args, summary, now = self.path / 'args.yaml', self.path / 'summary.json', _plain(config)
        source = run_of(config.resume)
        if source and (source / 'args.yaml').exists():
            _refuse_changes(f'{config.resume} does not go with', _settings(source / 'args.yaml', config), {
                name: now[name] for name in OF_CHECKPOINT})
        if not args.exists() or not (summary.exists() or newest_checkpoint(self.checkpoints)):
            return None  # a run that ended before its first checkpoint starts again
        if not config.resume or source and source.resolve() != self.path.resolve():
            state = 'a finished' if summary.exists() else 'an unfinished'
            raise FileExistsError(
                f'{self.path} has {state} run; go on with it by --resume auto, or name another --output')
        before = _settings(args, config)
        more = config.epochs > before['epochs'] and not config.smoke
        _refuse_changes(f'{self.path} cannot go on with', before, {
            name: value for name, value in now.items() if name not in MAY_CHANGE and not (more and name == 'epochs')})
        if not summary.exists() or source:
            return None
        if not more:
            return json.loads(summary.read_text(encoding='utf-8'))
        if not newest_checkpoint(self.checkpoints):
            raise FileNotFoundError(
                f'{self.path} is a finished run of {before["epochs"]} epochs without checkpoints, from which it could '
                f'go on to {config.epochs}')
        return None

    @contextmanager
    def locked(self, config: TrainConfig) -> Iterator[None]:
        """Hold the folder, which is made, against other processes. The lock ends with the process.

        Raises:
            BlockingIOError: If another process holds it.
            OSError: If the folder cannot be written.
        """
        if not PartialState(cpu=config.cpu).is_main_process:
            yield
            return
        if self.path.is_file():
            raise FileExistsError(f'{self.path} is a file; name a folder as --output')
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / '.lock')
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise BlockingIOError(
                f'another process writes to {self.path}; wait for it or name another --output') from None
        except NotImplementedError:  # a network file system without locks
            _logger.warning('%s: the file system has no locks; make sure that no other run writes there', self.path)
        try:
            yield
        finally:
            lock.release()
            with suppress(OSError):  # of a folder that a run has written to
                (self.path / '.lock').unlink(missing_ok=True)
                self.path.rmdir()

    def check_images(self, config: TrainConfig) -> None:
        """Raise ValueError if the images of a finished run are others now."""
        if not (self.path / RECORD).is_file():
            return
        record = {(name, split) for name, split in read_split(self.path).items() if split != EARLIER}
        sets = create_datasets(config, self.damaged(config), find_task(config.task).reads)
        now = {
            (name, split) for split, images in zip((TRAINING, VALIDATION), sets)
            for name in images.relative_names(config.data_dir)}
        if record != now:
            raise ValueError(
                f'{self.path} is finished, and its images have changed since: {len(now - record):,} are new, '
                f'{len(record - now):,} are gone; another --output with --model local-dir:{self.path / "best"} '
                f'--split-from {self.path} starts from its weights')

    def check_classes(self, class_names: Sequence[str], resume: Optional[str]) -> None:
        """Raise ValueError, with their names, if the run that `resume` goes on with had other classes, or in another
        order."""
        run = run_of(resume) or self.path
        kept, saved = run / 'classes.json', run / 'best' / 'config.json'  # the other was kept before the one was
        if not resume or not (run / 'args.yaml').exists() or not (kept.exists() or saved.exists()):
            return
        before = json.loads((kept if kept.exists() else saved).read_text(encoding='utf-8'))
        before = before if kept.exists() else before.get('label_names') or list(class_names)
        changes = class_changes(before, class_names)
        if changes:
            raise ValueError(f'{run} cannot go on with other classes: {changes}')

    def damaged(self, config: TrainConfig) -> Optional[Dict[str, str]]:
        """Where -> reason, of the images that a run left out; it has looked at every one. None if it has not, or the
        folder of the data is called otherwise now."""
        file, args = self.path / 'damaged.json', self.path / 'args.yaml'
        if not file.exists() or not args.exists() or _settings(args, config)['data_dir'] != config.data_dir:
            return None
        return json.loads(file.read_text(encoding='utf-8'))

    def mend(self) -> None:
        """Put the best weights in their place, where a run was stopped between two renamings."""
        best, old = self.path / 'best', self.path / '.best.old'
        if old.exists() and not best.exists():
            os.replace(old, best)

    def begin(
            self, config: TrainConfig, class_names: Sequence[str], epoch: int, damaged: Dict[str, str]) -> None:
        """Write down what the run is; drop what the log has of epochs after `epoch`, which are done again. The log of a
        run that begins with a checkpoint of another one begins with that one's."""
        self.path.mkdir(parents=True, exist_ok=True)
        clear_partial(self.path)
        (self.path / 'summary.json').unlink(missing_ok=True)  # of a finished run that is trained on
        if config.skip_damaged:  # before the settings, which say where these images are
            write(self.path / 'damaged.json', json.dumps(damaged, indent=2) + '\n')
        write(self.path / 'args.yaml', yaml.safe_dump(_plain(config), sort_keys=False))
        write(self.path / 'classes.json', json.dumps(list(class_names), indent=0) + '\n')
        log = (run_of(config.resume) or self.path) / self.log.name
        if log.exists():
            lines = log.read_text(encoding='utf-8').splitlines(keepends=True)
            write(self.log, ''.join(
                line for line in lines if line.endswith('\n') and json.loads(line)['epoch'] <= epoch))

    def add(self, record: Dict[str, Any]) -> None:
        """Add an epoch to the log."""
        with disk_errors(self.log), self.log.open('a', encoding='utf-8') as log:
            log.write(json.dumps(finite(record), allow_nan=False) + '\n')

    def records(self) -> Dict[int, Dict[str, Any]]:
        """The epochs of the log, by number."""
        records = map(json.loads, self.log.read_text(encoding='utf-8').splitlines())
        return {record['epoch']: record for record in records}

    def save_best(self, model: nn.Module, config: TrainConfig, class_names: Sequence[str]) -> None:
        """Save weights as they were evaluated, in timm's Hub layout, beside their place, and rename."""
        best, partial, old = (self.path / name for name in ('best', '.best.partial', '.best.old'))
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
        model = deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
        head = getattr(model, 'noah_cfg', {})
        head = {name: head[name] for name in ('num_groups', 'key_ratio') if name in head}
        try:
            save_model(model, partial, {**head, **model_kwargs(config)}, label_names=list(class_names))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if best.exists():
            os.replace(best, old)
        os.replace(partial, best)
        shutil.rmtree(old, ignore_errors=True)

    def save_rows(self, rows: Sequence[Dict[str, Any]]) -> None:
        """Write rows per class, if there are any, as `per_class.csv`."""
        if rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
            write(self.path / 'per_class.csv', text.getvalue())

    def end(self, summary: Dict[str, Any]) -> None:
        """Write the summary, by which the run is finished."""
        write(self.path / 'summary.json', json.dumps(finite(summary), indent=2, allow_nan=False) + '\n')


def run_of(resume: Optional[str]) -> Optional[Path]:
    """The folder of the run whose checkpoint `resume` is; None if it names none.

    Raises:
        FileNotFoundError: If what it names is no checkpoint.
    """
    if resume in (None, 'auto'):
        return None
    path = Path(resume).resolve()
    if not (path / 'custom_checkpoint_0.pkl').is_file():
        raise FileNotFoundError(
            f"--resume {resume}: no checkpoint; accepted are 'auto' and a folder RUN/checkpoints/{PREFIX}N")
    return path.parent.parent


def _settings(args: Path, config: TrainConfig) -> Dict[str, Any]:
    """What an `args.yaml` has, and the defaults of settings that came later."""
    defaults = _plain(TrainConfig(model=config.model, output=config.output))
    return {**defaults, **yaml.safe_load(args.read_text(encoding='utf-8'))}


def data_dir_of(run: Path) -> Optional[str]:
    """The `data_dir` of a run."""
    return yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8')).get('data_dir')


def epoch_updates_of(output: str) -> Optional[int]:
    """What a run that is there has as `epoch_updates`; None if there is none."""
    args = Path(output) / 'args.yaml'
    return yaml.safe_load(args.read_text(encoding='utf-8')).get('epoch_updates', 0) if args.is_file() else None


def _refuse_changes(what: str, before: Dict[str, Any], now: Dict[str, Any]) -> None:
    different = [f'{name} was {before[name]!r}, now {value!r}' for name, value in now.items() if before[name] != value]
    if different:
        raise ValueError(f'{what} other settings: {"; ".join(different)}')


def settings_of(config: TrainConfig) -> Dict[str, Any]:
    """The settings that a summary has."""
    return {name: value for name, value in _plain(config).items() if name not in ('output', 'resume')}


def versions() -> Dict[str, Any]:
    """What a figure depends on: the code's revision, the packages, the processor and its threads."""
    git = subprocess.run(
        ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD'], capture_output=True, text=True, check=False)
    return {
        'revision': git.stdout.strip() or None, 'python': platform.python_version(), 'torch': torch.__version__,
        'timm': timm.__version__, 'accelerate': accelerate.__version__, 'machine': platform.machine(),
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
        'threads': torch.get_num_threads()}


def _plain(config: TrainConfig) -> Dict[str, Any]:
    """Settings as JSON and YAML have them."""
    return json.loads(json.dumps(asdict(config)))
