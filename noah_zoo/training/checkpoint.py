"""Checkpoints that are whole or absent, and the newest of them."""
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from accelerate import Accelerator

from ..text import one_line

PREFIX = 'update-'


class Progress:
    """Where a run is: kept in its checkpoints.

    Attributes:
        epoch: Epochs done.
        update: Updates done, in all epochs.
        updates: Updates of an epoch; 0 in checkpoints from before it was kept.
        images: Number and `Images.names` of those to train on and of those of evaluation; None if they are streams, or
            in checkpoints from before it was kept.
        batch: Batches of a process done in the epoch under way.
        updates_in_epoch: Updates done in it.
        loss: Sum of the losses of the epoch's updates so far.
        best: The best of the task's first figure so far.
        best_epoch: Its epoch.
        skipped: Updates left out, as their loss was not finite.
        seconds: Time that the run took.
    """

    def __init__(self) -> None:
        self.epoch = self.update = self.batch = self.best_epoch = self.skipped = self.updates_in_epoch = 0
        self.updates = 0
        self.images: Optional[List[Tuple[int, str]]] = None
        self.loss = self.seconds = 0.
        self.best = -1.

    def state_dict(self) -> Dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        vars(self).update(state)


def save_checkpoint(accelerator: Accelerator, folder: Path, update: int, keep: int) -> Path:
    """Write a checkpoint beside its place, rename it, and remove all but the newest, and those of later updates, from
    which the run went back.

    Args:
        accelerator: What it prepared and registered is saved.
        folder: Where the checkpoints are.
        update: Updates done.
        keep: Checkpoints to keep.

    Returns:
        The checkpoint.

    Raises:
        OSError: If it cannot be written. The checkpoints that are there stay as they are.
    """
    path = folder / f'{PREFIX}{update:09}'
    partial = folder / f'.{path.name}.partial'
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        newest = newest_checkpoint(folder)
        kept = f'the last good one is {newest}' if newest else 'there is none yet'
        raise OSError(f'{path}: the checkpoint cannot be written ({_reason(error, folder)}); {kept}') from error
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        others = checkpoints(folder)
        place = others.index(path)
        for other in (*others[place + 1:], *others[:max(place + 1 - keep, 0)]):
            shutil.rmtree(other)
    accelerator.wait_for_everyone()
    return path


def _reason(error: Exception, folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    return f'{one_line(error)}; {free / 1e6:.0f} MB are free'


def checkpoints(folder: Path) -> List[Path]:
    """All checkpoints, oldest first. A folder under a temporary name is none."""
    return sorted(folder.glob(f'{PREFIX}*')) if folder.is_dir() else []


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)
