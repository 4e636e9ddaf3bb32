"""Folders of images per class."""
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from noah_zoo.data.factory import check_data, create_dataset, create_datasets
from noah_zoo.data.folder import natural
from noah_zoo.inference.predict import find_images

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


def test_every_ending_is_read_and_the_rest_is_told(tmp_path, caplog):
    kinds = ('png', 'jpg', 'JPEG', 'jfif', 'webp', 'bmp', 'gif', 'tif', 'pgm', 'jp2', 'tga', 'ico', 'avif')
    for kind in kinds:
        make_folder(tmp_path / 'train', {kind: 1}, [''], kind)
    for name in ('notes.txt', 'more.txt', 'Thumbs.db', '.DS_Store'):
        (tmp_path / 'train/png' / name).write_text('no image')
    images = create_dataset('folder', str(tmp_path), 'train')
    assert len(images) == len(kinds) == len(find_images([str(tmp_path / 'train')]))
    assert all(images.read(i)[0].size == (24, 24) for i in range(len(images)))
    assert caplog.text.count('left out 3 files that are no images by their ending (1 .db, 2 .txt)') == 2


def test_what_systems_put_beside_images_is_no_class(tmp_path, caplog):
    make_folder(tmp_path, {'cat': 2, 'dog': 2}, ['train'])
    for path in ('.ipynb_checkpoints', '.thumbnails', '@eaDir', '__MACOSX'):
        make_folder(tmp_path / 'train', {path: 1}, [''])
        make_folder(tmp_path / 'train/cat', {path: 1}, [''])
    (tmp_path / 'train/dog/._0.png').write_bytes(b'no image')
    images = create_dataset('folder', str(tmp_path), 'train')
    assert (images.class_names, images.labels.tolist()) == (('cat', 'dog'), [0, 0, 1, 1])
    assert len(find_images([str(tmp_path / 'train')])) == 4
    assert 'left out hidden ._0.png, .ipynb_checkpoints, .thumbnails, @eaDir, __MACOSX' in caplog.text
    assert 'no images in' not in caplog.text


def test_a_class_is_the_outermost_folder_or_the_innermost(tmp_path, caplog):
    make_folder(tmp_path / 'train', {'2023': 1, '2024': 1}, ['cat', 'dog'])
    photo().save(tmp_path / 'train/dog/a.png')
    images = create_dataset('folder', str(tmp_path), 'train')
    assert (images.class_names, images.labels.tolist()) == (('cat', 'dog'), [0, 0, 1, 1, 1])
    assert 'cat/2023, cat/2024, dog/2023, dog/2024 are folders inside of class folders' in caplog.text
    caplog.clear()
    images = create_dataset('leaf_folder', str(tmp_path), 'train')
    assert images.class_names == ('2023', '2024', 'dog') and sorted(images.labels) == [0, 0, 1, 1, 2]
    assert 'unequal depths' in caplog.text
    assert '2023, 2024, which are several folders, are one class each' in caplog.text


ORDER = """
import sys
from noah_zoo.data.factory import create_dataset
for root in sys.argv[1:]:
    images = create_dataset('folder', root, 'train')
    print(images.class_names, [images.where(i)[len(root):] for i in range(len(images))])
"""


@pytest.fixture
def alike(tmp_path):
    """Folders of classes, and files in them, whose names are equal to timm's natural order."""
    roots = {tmp_path / names[0]: names for names in (
        ('Cat', 'cat', 'CAT'), ('lot01', 'lot1', 'lot001', 'lot2'), ('2²', '2', 'm²'))}
    for root, names in roots.items():
        for name in names:
            make_folder(root, {name: 0}, ['train'])
            for file in ('a1', 'A1', 'a01'):
                photo().save(root / 'train' / name / f'{file}.png')
    return roots


def test_names_that_are_alike_have_one_order(alike):
    for root, names in alike.items():
        images = create_dataset('folder', str(root), 'train')
        assert images.class_names == tuple(sorted(names, key=natural))
        assert [Path(images.where(i)).stem for i in range(3)] == ['A1', 'a01', 'a1']


@pytest.mark.process
def test_the_order_does_not_depend_on_the_hashes_of_a_process(alike):
    found = set()
    for seed in range(3):
        env = {**os.environ, 'PYTHONHASHSEED': str(seed), 'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, '-c', ORDER, *alike], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_the_test_images_are_not_those_of_validation(tmp_path):
    make_folder(tmp_path, {'cat': 2, 'dog': 2}, ['train', 'test'])
    with pytest.raises(FileNotFoundError, match="no folder for split 'validation'"):
        create_dataset('folder', str(tmp_path), 'validation')
    assert create_dataset('folder', str(tmp_path), 'test').root.name == 'test'
    (tmp_path / 'test').rename(tmp_path / 'val')
    with pytest.raises(FileNotFoundError, match="no folder for split 'test'"):
        create_dataset('folder', str(tmp_path), 'test')


def test_links_that_lead_back_and_previews(tmp_path, caplog):
    make_folder(tmp_path, {'cat': 2, 'dog': 2}, ['train'])
    (tmp_path / 'train/cat/again').symlink_to(tmp_path / 'train')
    (tmp_path / 'train/more').symlink_to(tmp_path / 'train/dog')  # a class elsewhere
    photo().save(tmp_path / 'train/folder.ico')
    images = create_dataset('folder', str(tmp_path), 'train')
    assert images.class_names == ('cat', 'dog', 'more') and images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert 'left out folder.ico, outside of class folders' in caplog.text and 'again' in caplog.text


def test_a_link_to_nothing_is_a_damaged_image(tmp_path):
    make_folder(tmp_path, {'cat': 2, 'dog': 2}, ['train', 'validation'])
    (tmp_path / 'train/cat/9.png').symlink_to(tmp_path / 'nowhere.png')
    with pytest.raises(ValueError, match='1 of 5 training images cannot be read; .*9.png: .* a link to nothing'):
        check_data(config(tmp_path))
    train_set, _ = create_datasets(config(tmp_path, skip_damaged=True))
    assert len(train_set) == 4 and 'a link to nothing' in str(train_set.damaged)


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
    with pytest.raises(ValueError, match='no images in .*; looked for .avif, .*'):
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
