"""Folders of images per class."""
import logging

import numpy as np
import pytest
from PIL import Image

from noah_zoo.data.factory import create_dataset, create_datasets

from .files import config, make_folder, photo


def test_folder(tmp_path):
    make_folder(tmp_path, {'class10': 2, 'class9': 3})
    images = create_dataset('folder', str(tmp_path), 'train')
    assert images.class_names == ('class9', 'class10') and len(images) == 5  # timm's natural order
    for i in range(5):
        image, label = images[i]
        assert images.class_names[label] in images.where(i)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(images.where(i))))
    images.transform = np.array
    assert images[0][0].shape == (24, 24, 3) and images.read(0)[0].mode == 'RGB'


@pytest.mark.parametrize('folder', ['val', 'validation'])
def test_folder_of_validation(folder, tmp_path):
    make_folder(tmp_path, {'a': 2, 'b': 1}, ['train', folder])
    train_set, val_set = create_datasets(config(tmp_path))
    assert (train_set.root.name, val_set.root.name) == ('train', folder)
    assert len(val_set) == 3


def test_folder_reads_more_than_timms_three_extensions(tmp_path):
    for kind in ('png', 'jpg', 'JPEG', 'webp', 'bmp', 'tif', 'pgm'):
        make_folder(tmp_path / 'train', {kind: 1}, [''], kind)
    (tmp_path / 'train/png/notes.txt').write_text('no image')
    assert len(create_dataset('folder', str(tmp_path), 'train')) == 7


def test_folder_without_the_split_is_refused(tmp_path):
    # timm takes the whole of it: training images would be evaluated
    make_folder(tmp_path, {'a': 2, 'b': 2}, ['train'])
    with pytest.raises(FileNotFoundError, match="has train/, but no folder for split 'validation'"):
        create_datasets(config(tmp_path))
    with pytest.raises(ValueError, match='choose a --val-fraction'):
        create_datasets(config(tmp_path / 'train'))
    train_set, val_set = create_datasets(config(tmp_path / 'train', val_fraction=0.5))
    assert (len(train_set), len(val_set)) == (2, 2)


def test_folders_that_mislead(tmp_path, caplog):
    make_folder(tmp_path, {'a': 1, 'empty': 0, 'z': 1}, ['train'])
    with caplog.at_level(logging.WARNING):
        assert create_dataset('folder', str(tmp_path), 'train').class_names == ('a', 'z')
    assert 'no images in empty,' in caplog.text
    photo().save(tmp_path / 'train' / 'stray.png')
    with pytest.raises(ValueError, match='stray.png is an image outside of class folders'):
        create_dataset('folder', str(tmp_path), 'train')
    (tmp_path / 'none').mkdir()
    with pytest.raises(ValueError, match='Found 0 images'):
        create_dataset('folder', str(tmp_path / 'none'), 'train')
    with pytest.raises(FileNotFoundError, match='nowhere is not a folder'):
        create_dataset('folder', str(tmp_path / 'nowhere'), 'train')
    with pytest.raises(ValueError, match='--data-dir'):
        create_dataset('folder', None, 'train')


def test_validation_classes_are_those_of_training(tmp_path):
    make_folder(tmp_path, {'b': 1, 'd': 1}, ['validation'])
    make_folder(tmp_path, {'a': 1, 'b': 1, 'c': 1, 'd': 1}, ['train'])
    train_set, val_set = create_datasets(config(tmp_path))
    assert train_set.class_names == val_set.class_names == ('a', 'b', 'c', 'd')
    assert [val_set.read(i)[1] for i in range(2)] == [1, 3]  # where timm's reader says 0, 1
    make_folder(tmp_path, {'new': 1}, ['validation'])
    with pytest.raises(ValueError, match="1 classes that the training split, of 4, lacks: 'new'"):
        create_datasets(config(tmp_path))
