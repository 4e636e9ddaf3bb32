"""Images for training runs: the sample images of the package, as the four IDX files of Fashion-MNIST."""
import gzip

import numpy as np
import pytest
from PIL import Image

from noah_zoo.catalog import FASHION_MNIST_CLASSES
from noah_zoo.inference.predict import SAMPLES


def samples():
    """The sample images and their labels, which stand in the file names."""
    paths = sorted(SAMPLES.glob('*.png'))
    names = [name.lower().replace('/', ' ').replace(' ', '_') for name in FASHION_MNIST_CLASSES]
    images = [np.asarray(Image.open(path).convert('L')) for path in paths]
    return images, [names.index(path.stem.split('_', 1)[1]) for path in paths]


def write_idx(path, array):
    data = b'\x00\x00\x08' + bytes([array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def make_fashion_mnist(root, repeats=4):
    """48 images to train on, or another multiple of 12, and 12 to test."""
    root.mkdir(exist_ok=True)
    images, labels = samples()
    for prefix, times, suffix in (('train', repeats, '.gz'), ('t10k', 1, '')):
        write_idx(root / f'{prefix}-images-idx3-ubyte{suffix}', np.stack(images * times))
        write_idx(root / f'{prefix}-labels-idx1-ubyte{suffix}', np.array(labels * times, np.uint8))


@pytest.fixture(scope='session')
def idx_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp('idx')
    make_fashion_mnist(root)
    return root
