"""Images that cannot be read: found before a run, named, and left out if wanted."""
import functools
import logging
import operator
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from huggingface_hub.utils import tqdm
from torch.utils.data import DataLoader, Dataset

from .base import Images
from .images import UNREADABLE, DamagedImageError, Values

_logger = logging.getLogger(__name__)


def leave_out_damaged(images: Images, workers: int = 0, damaged: Optional[Dict[str, str]] = None) -> Images:
    """Images without those that cannot be read, which `damaged` of the result lists.

    Args:
        images: Images.
        workers: Processes that read them.
        damaged: Where -> reason, if known; then none is read.

    Raises:
        ValueError: If none is left.
    """
    if damaged is None:
        found = scan(images, workers).damaged
    else:
        places = ((i, images.where(i)) for i in range(len(images) if damaged else 0))
        found = {i: damaged[where] for i, where in places if where in damaged}
    for index, reason in found.items():
        _logger.warning('left out: %s%s%s', images.where(index), UNREADABLE, reason)
    if found:
        _logger.warning('left out %d of %d images', len(found), len(images))
    result = images.take([i for i in range(len(images)) if i not in found])
    result.damaged = {images.where(index): reason for index, reason in found.items()}
    if not len(result):
        raise ValueError(f'all {len(images)} images are damaged, as is {images.where(0)}' if found else 'no images')
    return result


class Scan(NamedTuple):
    """What reading every image has found.

    Attributes:
        damaged: Why images cannot be read, by index, in order.
        values: The values of 16-bit and floating-point images; None if there are none.
    """
    damaged: Dict[int, str]
    values: Optional[Values]


def scan(images: Images, workers: int = 0) -> Scan:
    """Read every image once, with a progress bar.

    The processes of an initialized `torch.distributed` read a share each, and all get the whole result.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    indices = range(rank, len(images), world)
    loader = DataLoader(_Reasons(images, indices), batch_size=16, num_workers=workers, collate_fn=list)
    found: Dict[int, str] = {}
    values: List[Values] = []
    with tqdm(total=len(indices), desc='reading images', unit='image', disable=rank > 0, leave=False) as progress:
        for batch in loader:
            found.update((index, reason) for index, reason, _ in batch if reason is not None)
            values = merge([*values, *(seen for _, _, seen in batch if seen is not None)])
            progress.update(len(batch))
    if world > 1:
        parts: List[Any] = [None] * world
        torch.distributed.all_gather_object(parts, (found, values))
        found = {index: reason for part, _ in parts for index, reason in part.items()}
        values = merge([seen for _, part in parts for seen in part])
    return Scan(dict(sorted(found.items())), *(values or [None]))


def merge(values: List[Values]) -> List[Values]:
    """The values of all images as a list of one; empty if there are none."""
    return [functools.reduce(operator.or_, values)] if values else []


def sample_values(images: Images, count: int = 16) -> Optional[Values]:
    """The values of a few 16-bit or floating-point images; None if there are none. Unreadable images are skipped."""
    items = _Reasons(images, range(0, len(images), max(len(images) // count, 1)))
    return next(iter(merge([seen for _, _, seen in map(items.__getitem__, range(len(items))) if seen])), None)


class _Reasons(Dataset):
    """(index, why the image cannot be read or None, its `Values` or None)."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Tuple[int, Optional[str], Optional[Values]]:
        index = self.indices[item]
        try:
            image, _ = self.images.read(index)
        except DamagedImageError as error:
            return index, str(error).removeprefix(f'{self.images.where(index)}{UNREADABLE}'), None
        return index, None, image.info.get('values')
