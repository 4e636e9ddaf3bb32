"""Images that cannot be read: found before a run, named, and left out if wanted."""
import logging
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from huggingface_hub.utils import tqdm
from torch.utils.data import DataLoader, Dataset

from .base import Images
from .images import UNREADABLE, DamagedImageError

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
        found = find_damaged(images, workers)
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


def find_damaged(images: Images, workers: int = 0) -> Dict[int, str]:
    """Read every image once, with a progress bar, and say why some cannot be: index -> reason, in order.

    The processes of an initialised `torch.distributed` read a share each, and all get the whole answer.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    indices = range(rank, len(images), world)
    loader = DataLoader(_Reasons(images, indices), batch_size=16, num_workers=workers, collate_fn=list)
    found: Dict[int, str] = {}
    with tqdm(total=len(indices), desc='reading images', unit='image', disable=rank > 0, leave=False) as progress:
        for reasons in loader:
            found.update((index, reason) for index, reason in reasons if reason is not None)
            progress.update(len(reasons))
    if world > 1:
        parts: List[Dict[int, str]] = [{}] * world
        torch.distributed.all_gather_object(parts, found)
        found = {index: reason for part in parts for index, reason in part.items()}
    return dict(sorted(found.items()))


class _Reasons(Dataset):
    """(index, why the image cannot be read or None)."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Tuple[int, Optional[str]]:
        index = self.indices[item]
        try:
            self.images.read(index)
        except DamagedImageError as error:
            return index, str(error).removeprefix(f'{self.images.where(index)}{UNREADABLE}')
        return index, None
