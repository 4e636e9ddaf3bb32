"""From a name to datasets, and what is held out."""
import logging

import numpy as np
import pytest
import timm.data
import torch

from noah_zoo.data.base import VALIDATION
from noah_zoo.data.factory import create_dataset, create_datasets, split_images
from noah_zoo.data.fashion_mnist import FashionMnist

from ..pictures import make_coco
from .files import config, make_folder


def test_unknown_datasets():
    for name in ('imagenet', 'torch/cifar10', 'tfds/mnist', 'hfds/', 'hfids', 'wds'):
        with pytest.raises(ValueError, match='accepted are fashion_mnist, folder, leaf_folder, .*, hfds/NAME'):
            create_dataset(name, None, 'train')
    with pytest.raises(ValueError, match='--data-dir'):
        create_dataset('wds/', None, 'train')


def test_val_fraction(tmp_path, caplog):
    make_folder(tmp_path, {'a': 40, 'b': 20, 'c': 10, 'd': 1}, ['train'])
    with caplog.at_level(logging.INFO):
        train_set, val_set = create_datasets(config(tmp_path, val_fraction=0.2))
    assert 'folder: 57 training images, 14 validation images, 4 classes' in caplog.text

    def places(images):
        return [images.where(i) for i in range(len(images))]

    def labels(images):
        return np.bincount([images.read(i)[1] for i in range(len(images))], minlength=4).tolist()
    assert (labels(train_set), labels(val_set)) == ([32, 16, 8, 1], [8, 4, 2, 0])
    assert not set(places(train_set)) & set(places(val_set))
    assert len(set(places(train_set) + places(val_set))) == 71
    again = create_datasets(config(tmp_path, val_fraction=0.2))
    assert [places(images) for images in again] == [places(train_set), places(val_set)]
    other = create_datasets(config(tmp_path, val_fraction=0.2, seed=1))[1]
    assert places(other) != places(val_set) and labels(other) == labels(val_set)


@pytest.mark.parametrize('fraction', [0.01, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_val_fraction_is_near_in_every_class(fraction, tmp_path):
    labels = np.random.default_rng(2).integers(0, 5, 997) ** 2
    images = FashionMnist.__new__(FashionMnist)
    images.split = 'train'
    super(FashionMnist, images).__init__([str(i) for i in range(20)], labels)
    train_set, val_set = split_images(images, fraction, 3)
    counts = np.bincount(labels, minlength=20)
    held_out = np.bincount(labels[val_set.rows], minlength=20)
    assert np.abs(held_out - np.minimum(fraction * counts, np.maximum(counts - 1, 0))).max() <= 1
    assert abs(len(val_set) - fraction * 997) <= 5 and len(train_set) + len(val_set) == 997
    assert np.all(np.bincount(labels[train_set.rows], minlength=20)[counts > 0] >= 1)
    for wrong in (-0.1, 1, 1.5, 1e-9):
        with pytest.raises(ValueError, match='val_fraction='):
            split_images(images, wrong, 0)


@pytest.mark.parametrize('name', ['train', 'training'])
def test_splits_have_one_vocabulary(name, idx_dir, tmp_path):
    assert len(create_dataset('fashion_mnist', str(idx_dir), name)) == 48
    make_coco(tmp_path)
    row = 'file_name,labels\nval2014/COCO_val2014_000000000000.jpg,'
    (tmp_path / 'validation.csv').write_text(f'{row}a\n')
    (tmp_path / 'train.csv').write_text(f'{row}c\n')
    assert len(create_dataset('coco', str(tmp_path), name)) == 9
    assert create_dataset('csv', str(tmp_path), name).class_names == ('c',)
    for other in VALIDATION:
        assert len(create_dataset('fashion_mnist', str(idx_dir), other)) == 12
        assert len(create_dataset('coco', str(tmp_path), other)) == 4
        assert create_dataset('csv', str(tmp_path), other).class_names == ('a',)
    (tmp_path / 'test.csv').write_text(f'{row}b\n')  # what is there by its own name comes first
    assert create_dataset('csv', str(tmp_path), 'test').class_names == ('b',)
    assert create_dataset('csv', str(tmp_path), 'val').class_names == ('a',)


def test_timms_loader_takes_a_dataset(idx_dir):
    images = create_dataset('fashion_mnist', str(idx_dir), 'test')
    loader = timm.data.create_loader(
        images, (3, 32, 32), 5, use_prefetcher=False, num_workers=0, device=torch.device('cpu'))
    batches = [(x.shape, labels.tolist()) for x, labels in loader]
    assert batches[0][0] == (5, 3, 32, 32) and sum((labels for _, labels in batches), []) == images.labels.tolist()
