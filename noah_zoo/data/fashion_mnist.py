"""Fashion-MNIST's IDX files."""
import gzip
import hashlib
from pathlib import Path
from typing import Callable, Optional

import numpy as np
from PIL import Image

from ..catalog import FASHION_MNIST_CLASSES
from .base import TRAINING, VALIDATION, Images

FASHION_MNIST_DIR = Path('/usr/share/datasets/fashion-mnist')  # Debian's package dataset-fashion-mnist


class FashionMnist(Images):
    """Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist) from its four IDX files, plain or gzipped.

    Args:
        root: Folder of the files.
        split: 'train' (60,000 images), or 'test' (10,000) and what else is said for it.
        transform: Applied to the image of 28 x 28 pixels.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `split` is unknown, or a file is damaged.
    """

    def __init__(self, root: Path, split: str, transform: Optional[Callable] = None) -> None:
        prefixes = {**dict.fromkeys(TRAINING, 'train'), **dict.fromkeys((*VALIDATION, 'test'), 't10k')}
        if split not in prefixes:
            raise ValueError(f"fashion_mnist: split={split!r} is not one of 'train', 'test'")
        self.split = split
        self.images = read_idx(Path(root), f'{prefixes[split]}-images-idx3-ubyte')
        labels = read_idx(Path(root), f'{prefixes[split]}-labels-idx1-ubyte')
        if self.images.ndim != 3 or labels.shape != self.images.shape[:1]:
            raise ValueError(
                f'fashion_mnist: {root} has images of shape {self.images.shape} and labels of shape {labels.shape} for '
                f'split={split!r}')
        super().__init__(FASHION_MNIST_CLASSES, labels)
        self.transform = transform

    def _image(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row]).convert(self.input_img_mode)

    def _where(self, row: int) -> str:
        return f'fashion_mnist[{self.split}] row {row}'

    def state(self) -> str:
        return f'{super().state()} {hashlib.sha256(self.images).hexdigest()}'


def read_idx(root: Path, name: str) -> np.ndarray:
    """Read an IDX file of unsigned bytes, `name` or `name.gz` under `root`.

    Raises:
        FileNotFoundError: If neither exists.
        ValueError: If it is not such a file or is cut short.
    """
    path = next((path for path in (root / name, root / f'{name}.gz') if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f'fashion_mnist: neither {name} nor {name}.gz is in {root}. Install the Debian package '
            f'dataset-fashion-mnist, name the folder of the IDX files with --data-dir, or use '
            f'--dataset hfds/zalando-datasets/fashion_mnist')
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f'fashion_mnist: {path} is damaged: {error}') from None
    rank = data[3] if data[:3] == b'\x00\x00\x08' else 0
    shape = np.frombuffer(data, '>u4', rank, 4) if 0 < rank < 4 and len(data) >= 4 + 4 * rank else ()
    if not len(shape) or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise ValueError(f'fashion_mnist: {path} is not a whole IDX file of unsigned bytes ({len(data)} bytes)')
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
