"""Which images are held out for validation, and that no run validates on images that its weights were trained on."""
import numpy as np
import pytest

from noah_zoo.data.base import Files
from noah_zoo.data.base import Multilabel as MultilabelImages
from noah_zoo.data.split import (
    EARLIER,
    TRAINING,
    VALIDATION,
    check_overlap,
    missing_classes,
    read_split,
    source_runs,
    split_images,
    write_split,
)


class Listed(Files):
    """Images of which only names and labels are asked for."""

    def __init__(self, paths, labels, classes=3):
        self.paths = paths
        super().__init__([f'class {k}' for k in range(classes)], labels)


class ListedMultilabel(Files, MultilabelImages):
    def __init__(self, labels):
        self.paths = [f'{i}.png' for i in range(len(labels))]
        super().__init__([f'class {k}' for k in range(labels.shape[1])], labels)


def names(images):
    return set(images.relative_names())


def photos(count=120, classes=3):
    return Listed([f'{i % classes}/{i}.png' for i in range(count)], [i % classes for i in range(count)], classes)


def test_new_files_leave_the_others_where_they_are():
    images = photos()
    train, val = split_images(images, 0.25, 0)
    for seed in range(20):  # the new files come first in the order of the folder
        more = Listed([f'0/new{seed}.png', *images.paths], [0, *images.labels.tolist()])
        more_train, more_val = split_images(more, 0.25, 0)
        moved = len(names(more_val) & names(train))
        assert moved <= 1 and len(names(more_train) & names(val)) <= 1
    reversed_images = Listed(images.paths[::-1], images.labels[::-1])
    assert names(split_images(reversed_images, 0.25, 0)[1]) == names(val)
    assert names(split_images(images, 0.25, 1)[1]) != names(val)


def test_names_are_relative_to_the_folder(tmp_path):
    sides = []
    for folder in (tmp_path / 'here', tmp_path / 'there'):
        images = Listed([str(folder / path) for path in photos().paths], photos().labels)
        sides.append(set(split_images(images, 0.25, 0, str(folder))[1].relative_names(str(folder))))
    assert sides[0] == sides[1] and all(not name.startswith('/') for name in sides[0])


@pytest.mark.parametrize('fraction', [0.1, 1 / 3, 0.5])
def test_several_classes_per_image_are_stratified(fraction):
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).astype(np.uint8)
    train, val = split_images(ListedMultilabel(labels), fraction, 0)
    assert len(train) + len(val) == 400 and not names(train) & names(val)
    assert abs(len(val) - 400 * fraction) <= 8
    assert (abs(val.class_counts() - fraction * labels.sum(axis=0)) <= 2).all()


def test_rare_classes_are_on_both_sides_for_every_seed():
    """With a random draw, 6 of 20 seeds left a class without training images."""
    rng = np.random.default_rng(1)
    labels = np.concatenate([np.eye(11, dtype=np.uint8), np.eye(11, dtype=np.uint8),
                             (rng.random((40, 11)) < 0.1).astype(np.uint8)])
    for seed in range(20):
        train, val = split_images(ListedMultilabel(labels), 0.3, seed)
        assert train.class_counts().all(), seed
        assert (val.class_counts() > 0).sum() >= 10, (seed, val.class_counts())


def test_classes_without_images_are_named():
    images = Listed(['a.png', 'b.png', 'c.png', 'd.png'], [0, 0, 0, 1])
    train, val = split_images(images, 0.25, 0)
    assert missing_classes(train, val) == (
        "no training image of 1 of 3 classes: 'class 2'; no validation image of 2 of 3 classes: 'class 1', 'class 2'")
    assert missing_classes(photos(), photos()) == ''


def test_record(tmp_path):
    train, val = split_images(photos(), 0.25, 0)
    write_split(tmp_path, train, val, None, {'old, "quoted".png', train.relative_names()[0]})
    record = read_split(tmp_path)
    assert {name for name, split in record.items() if split == TRAINING} == names(train)
    assert {name for name, split in record.items() if split == VALIDATION} == names(val)
    assert [name for name, split in record.items() if split == EARLIER] == ['old, "quoted".png']
    with pytest.raises(FileNotFoundError, match='not the folder of a run'):
        read_split(tmp_path / 'nowhere')


def test_split_of_an_earlier_run_is_kept(tmp_path):
    train, val = split_images(photos(), 0.25, 0)
    write_split(tmp_path, train, val, None, set())
    more = Listed([f'{i % 3}/{i}.png' for i in range(200)], [i % 3 for i in range(200)])
    more_train, more_val = split_images(more, 0.25, 7, record=read_split(tmp_path))
    assert names(val) <= names(more_val) and names(train) <= names(more_train)
    assert len(more_val) == len(val) + 20  # a quarter of the 80 new ones


def test_validation_on_trained_images_is_an_error(tmp_path):
    train, val = split_images(photos(), 0.25, 0)
    write_split(tmp_path, train, val, None, {'earlier.png'})
    assert check_overlap(val, None, tmp_path, None, '') == names(train) | {'earlier.png'}
    other = split_images(photos(), 0.25, 1)[1]
    count = len(names(other) & names(train))
    assert count > 10
    message = f'^{count} of 30 validation images are images that .* was trained on: .* HINT$'
    with pytest.raises(ValueError, match=message):
        check_overlap(other, None, tmp_path, None, 'HINT')
    with pytest.raises(ValueError, match='^1 of 1 validation images'):
        check_overlap(Listed(['earlier.png'], [0]), None, tmp_path, None, '')


def test_files_of_the_same_name_in_another_folder(tmp_path):
    """They are the same images if they have the same size, or if the first folder is gone."""
    run = tmp_path / 'run'
    for name, content in (('one', b'123'), ('two', b'12345')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.png').write_bytes(content)
    images = {name: Listed([str(tmp_path / name / 'a.png')], [0]) for name in ('one', 'two')}
    write_split(run, images['one'], images['two'].take([]), str(tmp_path / 'one'), set())
    check_overlap(images['two'], str(tmp_path / 'two'), run, str(tmp_path / 'one'), '')
    (tmp_path / 'two' / 'a.png').write_bytes(b'123')
    for before in ('one', 'gone'):
        with pytest.raises(ValueError, match='1 of 1 validation images'):
            check_overlap(images['two'], str(tmp_path / 'two'), run, str(tmp_path / before), '')


def test_runs_that_weights_come_from(tmp_path):
    (tmp_path / 'run').mkdir()
    best = f'local-dir:{tmp_path / "run" / "best"}'
    assert source_runs(best, None, 'resnet18') == []  # without a record
    (tmp_path / 'run' / 'split.csv').write_text('split,image\n')
    assert source_runs(best, best, 'hf-hub:you/best') == [tmp_path / 'run']
