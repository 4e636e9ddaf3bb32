"""Checkpoints that are whole or absent, and the newest of them."""
import math
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..files import disk_errors

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
        best: The task's first metric in the best epoch so far.
        best_loss: The validation loss in that epoch, which decides between equal metrics; infinite if there is none.
        best_epoch: That epoch; 0 before the first.
        skipped: Updates left out, as their loss was not finite.
        seconds: Time that the run took.
    """

    def __init__(self) -> None:
        self.epoch = self.update = self.batch = self.best_epoch = self.skipped = self.updates_in_epoch = 0
        self.updates = 0
        self.images: Optional[List[Tuple[int, str]]] = None
        self.loss = self.seconds = 0.
        self.best, self.best_loss = -1., math.inf

    def is_best(self, metric: float, val_loss: float = math.inf) -> bool:
        """Whether an epoch is better than all before it. The first epoch is, even if its metric is not a number."""
        if not self.best_epoch or math.isnan(self.best):
            return True
        return metric > self.best or metric == self.best and val_loss < self.best_loss

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
        with disk_errors(path, RuntimeError):
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = newest_checkpoint(folder)
        kept = f'the newest checkpoint is {newest}' if newest else 'there is no checkpoint'
        raise OSError(f'{error}; {kept}') from None
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        others = checkpoints(folder)
        place = others.index(path)
        for other in (*others[place + 1:], *others[:max(place + 1 - keep, 0)]):
            shutil.rmtree(other)
    accelerator.wait_for_everyone()
    return path


def all_finite(accelerator: Accelerator, *states: Any) -> bool:
    """Whether all floating-point tensors of state dicts, nested or not, are finite on all processes."""
    tensors = [tensor for state in states for tensor in _tensors(state) if tensor.is_floating_point()]
    local = [tensor.to_local() if hasattr(tensor, 'to_local') else tensor for tensor in tensors]  # a shard's part
    bad = torch.stack([~tensor.isfinite().all().to(accelerator.device) for tensor in local]).sum()
    return not accelerator.reduce(bad, 'sum').item()


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for item in state.values() if isinstance(state, dict) else state:
            yield from _tensors(item)


def checkpoints(folder: Path) -> List[Path]:
    """All checkpoints, oldest first. A folder under a temporary name is none."""
    return sorted(folder.glob(f'{PREFIX}*')) if folder.is_dir() else []


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The newest checkpoint, or None."""
    return next(reversed(checkpoints(folder)), None)
