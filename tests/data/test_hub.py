"""Datasets of the Hub's layout."""
import pickle

import numpy as np
import pytest

from noah_zoo.data.factory import create_dataset, create_datasets
from noah_zoo.data.images import DamagedImageError

from .files import config, load, make_hub, photo, pngs


def test_hfds(tmp_path):
    rows = pngs(6)
    rows[4] = rows[4][:100]
    name = f'hfds/{make_hub(tmp_path / "hub", rows)}'
    images = create_dataset(name, str(tmp_path / 'cache'), 'train')
    assert images.class_names == ('cat', 'dog') and len(images) == 6
    image, label = images.read(3)
    assert label == 1 and np.array_equal(np.asarray(image), np.asarray(photo(3)))
    where = f'{tmp_path / "hub"}[train] row 4'
    assert images.where(4) == where
    with pytest.raises(DamagedImageError) as error:
        images.read(4)
    assert str(error.value).startswith(f'{where}: not a readable image: ')
    images.transform = np.array
    with pytest.raises(DamagedImageError, match='row 4: not a readable image'):
        load(images, num_workers=2)
    train_set, val_set = create_datasets(config(
        tmp_path / 'cache', dataset=name, val_fraction=0.34, skip_damaged=True))
    assert {**train_set.damaged, **val_set.damaged}.keys() == {where}
    assert len(train_set) + len(val_set) == 5
    assert pickle.loads(pickle.dumps(images)).read(3)[1] == 1
    images.input_img_mode = 'L'
    assert np.array_equal(np.asarray(images.take([3]).read(0)[0]), np.asarray(photo(3).convert('L')))
    sliced = create_dataset(name, str(tmp_path / 'cache'), 'train[2:4]')
    assert sliced.where(1).endswith('[train[2:4]] row 1') and np.array_equal(
        np.asarray(sliced.read(1)[0]), np.asarray(photo(3)))


def test_hfds_without_class_names(tmp_path):
    strings = make_hub(tmp_path / 'a', pngs(3), names=None, labels=['owl', 'cat', 'owl'])
    images = create_dataset(f'hfds/{strings}', str(tmp_path / 'cache'), 'train')
    assert images.class_names == ('cat', 'owl') and [images.read(i)[1] for i in range(3)] == [1, 0, 1]
    numbers = make_hub(tmp_path / 'b', pngs(3), names=None, labels=[10, 9, 10])
    images = create_dataset(f'hfds/{numbers}', str(tmp_path / 'cache'), 'train')
    assert images.class_names == ('9', '10') and [images.read(i)[1] for i in range(3)] == [1, 0, 1]


def test_hfds_that_is_refused(tmp_path):
    name = f'hfds/{make_hub(tmp_path / "a", [*pngs(2), None], labels=[0, 1, 1])}'
    cache = str(tmp_path / 'cache')
    with pytest.raises(DamagedImageError, match='row 2: not a readable image: the row has no image'):
        create_dataset(name, cache, 'train').read(2)
    with pytest.raises(ValueError, match="split 'test'"):
        create_dataset(name, cache, 'test')
    with pytest.raises(ValueError, match="no column 'fine_label' for the labels, only image, label"):
        create_dataset(name, cache, 'train', target_key='fine_label')
    with pytest.raises(ValueError, match="no images in a column 'img'; the others are image, label"):
        create_dataset(name, cache, 'train', input_key='img')
    unlabelled = make_hub(tmp_path / 'b', pngs(3), labels=[0, -1, -1])
    with pytest.raises(ValueError, match=r'row 1: the label is -1, accepted are 0 to 1 \(2 such images\)'):
        create_dataset(f'hfds/{unlabelled}', cache, 'train')
    with pytest.raises(FileNotFoundError):
        create_dataset(f'hfds/{tmp_path}/nowhere', cache, 'train')
