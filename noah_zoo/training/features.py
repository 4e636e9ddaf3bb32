"""Floor 4: the features of a frozen backbone, computed once and kept on disk, so that a head trains on them alone."""
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
from filelock import FileLock
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import Sampler

from ..weights.hub import sha256_of
from .data import Images
from .loader import EvalBatches, create_loader

_logger = logging.getLogger(__name__)


class CachedFeatures:
    """What a model's `forward_features` gives for every image of a dataset, memory-mapped bfloat16.

    Attributes:
        features: (images, ...), a row as the model gives it for one image. Of maps, the channels of a position are side
            by side in memory, as the head reads them.
        images: The dataset.
    """

    def __init__(self, features: Tensor, images: Images) -> None:
        self.features, self.images = features, images
        self.targets = torch.from_numpy(images.labels[images.rows])
        if self.targets.ndim == 2:
            self.targets = self.targets.float()

    def batch(self, indices: Sequence[int]) -> Tuple[Tensor, Tensor]:
        """Features (B, ...) in float32 and targets of some images."""
        indices = torch.tensor(indices)
        if self.features.ndim == 4:  # indexing would make the strides those of maps
            return self.features.permute(0, 2, 3, 1)[indices].float().permute(0, 3, 1, 2), self.targets[indices]
        return self.features[indices].float(), self.targets[indices]


class FeatureBatches:
    """The batches of a sampler of `noah_zoo.training.loader`, of features instead of images."""

    def __init__(self, cached: CachedFeatures, sampler: Sampler) -> None:
        self.cached, self.sampler = cached, sampler

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for keys in self.sampler:
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

    A file is called by a hash of what its content depends on: the backbone's modules and weights, the transform, the
    images. It is used if its sha256 is as recorded, and computed again if not. Processes that want the same wait for
    the one that computes.

    Args:
        model: A timm model in the mode of evaluation, on its device.
        images: A dataset.
        transform: From an image to the model's input, without anything random.
        folder: Where the features are kept.
        batch_size: Images at a time.
        workers: Loading processes.

    Raises:
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
    features = torch.from_file(str(path), size=torch.Size(shape).numel(), dtype=torch.bfloat16)
    if len(shape) == 4:
        rows, channels, height, width = shape
        return CachedFeatures(features.view(rows, height, width, channels).permute(0, 3, 1, 2), images)
    return CachedFeatures(features.view(shape), images)


def feature_key(model: nn.Module, images: Images, transform: Callable) -> str:
    """A hash of all that the features depend on: not of the head, its classes or their names."""
    digest = hashlib.sha256(b'1')
    head = {id(module) for module in model.get_classifier().modules()}
    for name, module in model.named_modules():
        if id(module) in head:
            continue
        digest.update(f'{name} {type(module).__name__} {module.extra_repr()}\n'.encode())
        for kind in (module.named_parameters, module.named_buffers):
            for own, tensor in kind(recurse=False):
                digest.update(f'{own} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(f'{transform}\n{images.state()}\n'.encode())
    return digest.hexdigest()[:32]


def _record(path: Path) -> Path:
    return path.with_suffix('.json')


def _recorded(path: Path) -> Optional[Tuple[int, ...]]:
    """The shape of features that are there and whole."""
    if not _record(path).exists():
        return None
    record = json.loads(_record(path).read_text(encoding='utf-8'))
    if path.exists() and path.stat().st_size == record['bytes'] and sha256_of(path) == record['sha256']:
        return tuple(record['shape'])
    _logger.warning('%s is not as it was written; its features are computed again', path)
    return None


@torch.inference_mode()
def _compute(
        model: nn.Module, images: Images, transform: Callable, path: Path, batch_size: int, workers: int,
) -> Tuple[int, ...]:
    loader = create_loader(images, transform, EvalBatches(len(images), batch_size, 1, 0), workers, batch_size)
    device, digest, shape = next(model.parameters()).device, hashlib.sha256(), None
    partial = path.with_suffix('.partial')
    _record(path).unlink(missing_ok=True)
    try:
        with partial.open('wb') as file, tqdm(total=len(images), desc='features', unit='img', leave=False) as bar:
            for x, _ in loader:
                rows = model.forward_features(x.to(device)).to(torch.bfloat16).cpu()
                if shape is None:
                    shape = (len(images), *rows.shape[1:])
                    _check_room(path, 2 * torch.Size(shape).numel())
                rows = rows.permute(0, 2, 3, 1) if rows.ndim == 4 else rows
                data = rows.contiguous().view(torch.int16).numpy()
                file.write(data)
                digest.update(data)
                bar.update(len(rows))
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f'the features of {len(images):,} images cannot be kept at {path}: {error}') from error
    finally:
        partial.unlink(missing_ok=True)
    record: Dict[str, Any] = {'shape': shape, 'dtype': 'bfloat16', 'bytes': path.stat().st_size}
    text = json.dumps({**record, 'sha256': digest.hexdigest()}, indent=2) + '\n'
    partial.write_text(text, encoding='utf-8')
    os.replace(partial, _record(path))
    return shape


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f'{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free')
