"""The features of a frozen backbone, computed once and kept on disk, so that a head trains on them alone."""
import errno
import hashlib
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import Sampler

from ..data.base import Images
from ..data.loader import EvalBatchSampler, create_loader
from ..files import beside, clear_partial, write
from ..models.attach import heads_of
from ..weights.hub import sha256_of

_logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OTHER_SETTINGS = ('training', 'num_classes', 'grad_checkpointing')  # of a module, that leave its features as they are


class CachedFeatures:
    """What a model's `forward_features` gives for every image of a dataset, memory-mapped bfloat16.

    Attributes:
        features: (images, ...), a row as the model gives it for one image. Of maps, the channels of a position are side
            by side in memory, as the head reads them.
        images: The dataset.
    """

    def __init__(self, features: Tensor, images: Images) -> None:
        self.features, self.images = features, images
        self.targets = images.targets()

    def batch(self, indices: Sequence[int]) -> Tuple[Tensor, Tensor]:
        """Features (B, ...) in float32 and targets of some images."""
        indices = torch.tensor(indices)
        if not self.features.is_contiguous():  # indexing would make it so
            return self.features.permute(0, 2, 3, 1)[indices].float().permute(0, 3, 1, 2), self.targets[indices]
        return self.features[indices].float(), self.targets[indices]


class FeatureBatches:
    """The batches of a sampler of `noah_zoo.data.loader`, of features instead of images."""

    def __init__(self, cached: CachedFeatures, sampler: Sampler) -> None:
        self.cached, self.batch_sampler = cached, sampler

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for keys in self.batch_sampler:
            yield self.cached.batch([index for _, _, index in keys])


class HeadOnly(nn.Module):
    """A model on its own features: `forward` is its `forward_head`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(x)


def cache_features(
        model: nn.Module, images: Images, transform: Callable, folder: Path, batch_size: int, workers: int,
) -> CachedFeatures:
    """The features of all images, from `folder` if they are there, else computed and left there.

    A file is called by a hash of what its content depends on: the backbone's modules, their settings and weights, the
    transform, the images. It is used if its sha256 is as recorded, and computed again if not. Processes that want the
    same wait for the one that computes.

    Args:
        model: A timm model in the mode of evaluation, on its device.
        images: A dataset.
        transform: From an image to the model's input, without anything random.
        folder: Where the features are kept.
        batch_size: Images at a time.
        workers: Loading processes.

    Raises:
        DamagedImageError: If an image cannot be read.
        OSError: If the disk has no room; nothing half-written stays.
        ValueError: If the images are a stream.
    """
    if not isinstance(images, Images):
        raise ValueError('cache_features: a stream has no fixed images to cache; use hfds/ or folder')
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    key = feature_key(model, images, transform)
    path = folder / f'{key}.bin'
    with FileLock(folder / f'{key}.lock'):
        shape = _recorded(path)
        if shape is None:
            shape = _compute(model, images, transform, path, batch_size, workers)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # nobody writes to it; a writable map could not be larger than memory
        features = torch.from_numpy(np.memmap(path, np.int16, 'r')).view(torch.bfloat16)
    if _is_nchw(model, shape):
        rows, channels, height, width = shape
        return CachedFeatures(features.view(rows, height, width, channels).permute(0, 3, 1, 2), images)
    return CachedFeatures(features.view(shape), images)


def feature_key(model: nn.Module, images: Images, transform: Callable) -> str:
    """A hash of all that the features depend on: not of the head, its classes or their names."""
    digest = hashlib.sha256(b'3')
    head = {id(module) for module in heads_of(model).modules()}
    for name, module in model.named_modules():
        if id(module) in head:
            continue
        settings = {k: v for k, v in sorted(vars(module).items()) if _is_plain(v) and k not in OTHER_SETTINGS}
        digest.update(f'{name} {type(module).__name__} {settings}\n'.encode())
        for kind in (module.named_parameters, module.named_buffers):
            for own, tensor in kind(recurse=False):
                digest.update(f'{own} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(f'{transform}\n{images.state()}\n'.encode())
    return digest.hexdigest()[:32]


def _is_plain(value: Any) -> bool:
    """Whether the text of a value says all about it, in any process."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def _is_nchw(model: nn.Module, shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[1] == model.num_features


def _recorded(path: Path) -> Optional[Tuple[int, ...]]:
    """The shape of features that are there and whole."""
    record = path.with_suffix('.json')
    if not record.exists():
        return None
    try:
        content = json.loads(record.read_text(encoding='utf-8'))
        shape = torch.Size(content['shape'])
        if path.stat().st_size == 2 * shape.numel() and sha256_of(path, 'checking features') == content['sha256']:
            return shape
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        pass
    _logger.warning('%s is not as it was written; its features are computed again', path)
    return None


@torch.inference_mode()
def _compute(
        model: nn.Module, images: Images, transform: Callable, path: Path, batch_size: int, workers: int,
) -> Tuple[int, ...]:
    loader = create_loader(images, transform, EvalBatchSampler(len(images), batch_size, 1, 0), workers, batch_size)
    device, digest, shape = next(model.parameters()).device, hashlib.sha256(), None
    record = path.with_suffix('.json')
    record.unlink(missing_ok=True)
    clear_partial(path.parent, path.name)
    bar = tqdm(total=len(images), desc='features', unit='img', leave=False)
    try:
        with bar, beside(path) as partial, partial.open('wb') as file:
            for x, _ in loader:
                rows = model.forward_features(x.to(device)).to(torch.bfloat16).cpu()
                if shape is None:
                    shape = (len(images), *rows.shape[1:])
                    _check_room(path, 2 * torch.Size(shape).numel())
                rows = rows.permute(0, 2, 3, 1) if _is_nchw(model, shape) else rows
                data = rows.contiguous().view(torch.int16).numpy()
                file.write(data)
                digest.update(data)
                bar.update(len(rows))
        write(record, json.dumps({
            'shape': shape, 'dtype': 'bfloat16', 'sha256': digest.hexdigest(), 'model': type(model).__name__,
            'transform': str(transform), 'first_image': images.where(0)}, indent=2) + '\n')
    except OSError as error:
        if error.errno not in FULL:  # an image's file, say
            raise
        reason = error.strerror
        raise OSError(f'the features of {len(images):,} images cannot be kept at {path}: {reason}') from error
    return shape


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f'{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free')
