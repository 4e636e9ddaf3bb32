"""Reference weights, images and logits of the authors' release (goldens/README.md), the same on every machine.

Every array is drawn by PCG64, seeded by the CRC-32 of the parameter's released name.
"""
import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Dict, Tuple

import numpy as np
import torch
from torch import Tensor, nn

GOLDENS = Path(__file__).parent / 'goldens'
SHAPES: Dict[str, Dict[str, Tuple[int, ...]]] = json.loads(
    gzip.decompress((GOLDENS / 'released_shapes.json.gz').read_bytes()))


def released_state_dict(name: str) -> Dict[str, Tensor]:
    """The float32 state dict of a model under the released names; `NAME.plain`: a thin DeiT without `pre_logits`."""
    return {key: _values(key, tuple(shape)) for key, shape in SHAPES[name].items()}


def cheap_state_dict(name: str) -> Dict[str, Tensor]:
    """As `released_state_dict`, but every tensor is one random number seen at every place: no memory, a small file."""
    numbers = torch.randn(len(SHAPES[name]), generator=torch.Generator().manual_seed(len(name))).exp()
    return {
        key: (number.long() if key.endswith('num_batches_tracked') else number).clone().expand(shape)
        for number, (key, shape) in zip(numbers, SHAPES[name].items())}


def golden_logits(name: str) -> np.ndarray:
    """The authors' float64 logits of images(7) after calibrate(images(11)): (2, 1000), or (2, 20), every 50th class."""
    with np.load(GOLDENS / 'released_logits.npz') as logits:
        return logits[name]


def images(seed: int) -> Tensor:
    """Two images (2, 3, 224, 224), float64: patches of one colour each, and noise."""
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = rng.standard_normal((2, 3, 14, 14), dtype=np.float32)
    noise = rng.standard_normal((2, 3, 224, 224), dtype=np.float32)
    return torch.from_numpy(np.kron(coarse, np.ones((16, 16), np.float32)) + 0.5 * noise).double()


@torch.no_grad()
def calibrate(model: nn.Module, batch: Tensor) -> nn.Module:
    """Make the running statistics of every BatchNorm those of the batch; the model is left in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.
    model.train()(batch)
    return model.eval()


def _values(key: str, shape: Tuple[int, ...]) -> Tensor:
    leaf = key.rpartition('.')[2]
    if leaf == 'num_batches_tracked':
        return torch.zeros(shape, dtype=torch.int64)
    normal = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    if leaf == 'running_var':
        values = 1 + 0.2 * np.abs(normal)
    elif leaf.startswith(('pos_embed', 'cls_token')):
        values = 0.2 * normal
    elif len(shape) <= 1:
        values = 0.1 * normal + (leaf == 'weight')
    else:
        gain = 4. if key.startswith('head.query') else 1.
        values = normal * (gain / math.prod(shape[1:]) ** 0.5)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
