"""Floor 4: datasets. Everything but Fashion-MNIST's IDX files is timm.data's."""
import gzip
from pathlib import Path
from typing import Callable, Optional, Tuple

import numpy as np
import timm.data
import torch
from PIL import Image

from ..catalog import FASHION_MNIST_CLASSES

FASHION_MNIST_DIR = Path('/usr/share/datasets/fashion-mnist')  # Debian's package dataset-fashion-mnist


class FashionMnist(torch.utils.data.Dataset):
    """Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist) from its four IDX files, plain or gzipped.

    Args:
        root: Folder of the files.
        split: 'train' (60,000 images) or 'test' (10,000).
        transform: Applied to the RGB image of 28 x 28 pixels.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `split` is unknown, or a file is damaged.
    """
    class_names = FASHION_MNIST_CLASSES

    def __init__(self, root: Path, split: str, transform: Optional[Callable] = None) -> None:
        prefixes = {'train': 'train', 'test': 't10k', 'validation': 't10k'}
        if split not in prefixes:
            raise ValueError(f"fashion_mnist: split={split!r} is not one of 'train', 'test'")
        self.images = read_idx(Path(root), f'{prefixes[split]}-images-idx3-ubyte')
        self.labels = read_idx(Path(root), f'{prefixes[split]}-labels-idx1-ubyte')
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[object, int]:
        image = Image.fromarray(self.images[index]).convert('RGB')
        return image if self.transform is None else self.transform(image), int(self.labels[index])


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


def create_dataset(name: str, data_dir: Optional[str], split: str) -> torch.utils.data.Dataset:
    """A dataset of (image, label) with the tuple `class_names`.

    Args:
        name: 'fashion_mnist', 'folder', or a name of `timm.data.create_dataset` ('hfds/NAME').
        data_dir: Folder of the images or files; for 'hfds/' the cache.
        split: 'train', or the name of the split to evaluate.

    Raises:
        FileNotFoundError: If `data_dir` is not there.
        ValueError: If a folder has to be named and is not.
    """
    if name == 'fashion_mnist':
        return FashionMnist(Path(data_dir) if data_dir else FASHION_MNIST_DIR, split)
    if name == 'folder':
        if not data_dir:
            raise ValueError('folder: name the folder that has train/ and validation/ with --data-dir')
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f'folder: {data_dir} is not a folder')
        name = ''
    dataset = timm.data.create_dataset(name, root=data_dir, split=split)
    class_to_idx = dataset.reader.class_to_idx
    dataset.class_names = tuple(sorted(class_to_idx, key=class_to_idx.get))
    return dataset
