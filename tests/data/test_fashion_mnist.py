"""The four IDX files of Fashion-MNIST."""
import gzip

import numpy as np
import pytest

from noah_zoo.catalog import FASHION_MNIST_CLASSES
from noah_zoo.data.factory import create_dataset, create_datasets
from noah_zoo.data.fashion_mnist import FashionMnist, read_idx

from .files import config


def write_idx(path, values):
    data = b'\x00\x00\x08' + bytes([values.ndim]) + np.array(values.shape, '>u4').tobytes() + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


@pytest.fixture
def idx_dir(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
    for prefix, count, suffix in (('train', 40, '.gz'), ('t10k', 10, '')):
        write_idx(tmp_path / f'{prefix}-images-idx3-ubyte{suffix}', images[:count])
        write_idx(tmp_path / f'{prefix}-labels-idx1-ubyte{suffix}', np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_fashion_mnist(idx_dir):
    images = create_dataset('fashion_mnist', str(idx_dir), 'train')
    assert len(images) == 40 and images.class_names == FASHION_MNIST_CLASSES
    image, label = images[13]
    assert (image.mode, image.size, label) == ('RGB', (28, 28), 3) and images.where(13) == 'fashion_mnist[train] row 13'
    assert np.array_equal(np.asarray(image), np.repeat(images.images[13][..., None], 3, 2))
    train_set, val_set = create_datasets(config(idx_dir, dataset='fashion_mnist', val_fraction=0.25))
    assert (len(train_set), len(val_set)) == (30, 10)
    train_set, val_set = create_datasets(config(idx_dir, dataset='fashion_mnist', skip_damaged=True))
    assert (len(train_set), len(val_set), train_set.damaged) == (40, 10, {})
    assert FashionMnist(idx_dir, 'test', np.asarray)[0][0].shape == (28, 28, 3)


def test_idx_damage(idx_dir, tmp_path):
    with pytest.raises(ValueError, match="split='dev' is not one of 'train', 'test'"):
        FashionMnist(idx_dir, 'dev')
    with pytest.raises(FileNotFoundError, match='hfds/zalando-datasets/fashion_mnist'):
        FashionMnist(idx_dir / 'nowhere', 'train')
    whole = gzip.decompress((idx_dir / 'train-labels-idx1-ubyte.gz').read_bytes())
    for damaged in (b'', b'\x00', whole[:6], whole[:-1], whole + b'\x00', b'<html>', b'\x00\x00\x0d' + whole[3:]):
        (tmp_path / 'labels').write_bytes(damaged)
        with pytest.raises(ValueError, match='labels is not a whole IDX file'):
            read_idx(tmp_path, 'labels')
    (tmp_path / 'cut.gz').write_bytes((idx_dir / 'train-labels-idx1-ubyte.gz').read_bytes()[:-10])
    with pytest.raises(ValueError, match='cut.gz is damaged'):
        read_idx(tmp_path, 'cut')
    write_idx(idx_dir / 't10k-labels-idx1-ubyte', np.zeros(9, np.uint8))
    with pytest.raises(ValueError, match=r"labels of shape \(9,\) for split='test'"):
        FashionMnist(idx_dir, 'test')
    write_idx(idx_dir / 't10k-labels-idx1-ubyte', np.full(10, 10, np.uint8))
    with pytest.raises(ValueError, match=r'row 0: the label is 10, accepted are 0 to 9 \(10 such images\)'):
        FashionMnist(idx_dir, 'test')
