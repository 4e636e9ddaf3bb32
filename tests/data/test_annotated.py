"""Datasets with annotation files: what is read, and what is refused before any training starts."""
import functools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from noah_zoo.benchmark.heads import Case, head_step
from noah_zoo.benchmark.measure import peak_memory
from noah_zoo.data import create_dataset
from noah_zoo.data.factory import create_datasets, split_images
from noah_zoo.training import TrainConfig

from ..commands import call
from ..pictures import jpeg, make_coco, make_inaturalist

NAMES = ('person', 'boat', 'zebra')


def test_coco(tmp_path):
    make_coco(tmp_path)
    images = create_dataset('coco', str(tmp_path), 'train')
    assert images.class_names == NAMES and len(images) == 9 and images.labels.shape == (9, 3)
    assert len(create_dataset('coco', str(tmp_path), 'train', without_labels=True)) == 12
    assert len(create_dataset('coco', str(tmp_path), 'validation')) == 4
    for index in range(len(images)):
        image, labels = images.read(index)
        assert labels.dtype == torch.float32 and image.size == (48, 36)
        assert [v > 100 for v in np.asarray(image).mean((0, 1))] == labels.bool().tolist()
        assert images.where(index) == str(tmp_path / 'train2014' / Path(images.where(index)).name)
    taken = images.take([2, 0])
    assert torch.equal(taken.read(0)[1], images.read(2)[1])


def test_classes_of_another_split(tmp_path):
    make_coco(tmp_path)
    images = create_dataset('coco', str(tmp_path), 'train')
    other = images.with_classes(('zebra', 'cat', 'boat', 'person'))
    assert other.labels.tolist() == [[z, 0, b, p] for p, b, z in images.labels.tolist()]
    with pytest.raises(ValueError, match="1 classes that the training split, of 2, lacks: 'boat'"):
        images.with_classes(('zebra', 'person'))


def test_a_share_is_held_out(tmp_path):
    make_coco(tmp_path)
    images = create_dataset('coco', str(tmp_path), 'train')
    first, second = split_images(images, 0.25, 0)
    assert (len(first), len(second)) == (7, 2) and not set(first.rows) & set(second.rows)


def test_inaturalist(tmp_path):
    make_inaturalist(tmp_path)
    images = create_dataset('inaturalist', str(tmp_path), 'train')
    assert images.class_names == ('Plantae/Iris', 'Insecta/Iris', 'Parus major')
    assert images.labels.tolist() == [0, 1, 2] * 2 and images.read(4)[1] == 1
    assert create_dataset('inaturalist', str(tmp_path), 'validation').where(0).endswith('val0.jpg')


@pytest.mark.parametrize('name, millions', [('resnet18_noah', 13.82), ('resnet50_noah', 33.97)])
def test_parameters_on_inaturalist(name, millions):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=5089)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions  # Table XIV


@pytest.mark.exhaustive
def test_a_batch_of_inaturalist_in_bounded_memory():
    case = Case(512, 4, 1 / 2, 49, num_classes=5089, batch_size=256, training=True)
    build = functools.partial(head_step, 'noah', case, 'cpu', torch.float32)
    assert peak_memory(build, threads=2) < 100 * 2**20  # a map alone, N x K x L, takes 1 GB


def test_csv(tmp_path):
    for i in range(4):
        jpeg(tmp_path / 'pictures' / f'{i}, a.jpg', [i, i, i])
    (tmp_path / 'train.csv').write_text(
        '\ufefffile_name,labels\n"pictures/0, a.jpg",dog;cat\n"pictures/1, a.jpg",\n"pictures/2, a.jpg", cat \n')
    (tmp_path / 'val.csv').write_text('file_name,labels\n"pictures/3, a.jpg",dog\n')
    images = create_dataset('csv', str(tmp_path), 'train', task='multilabel')
    assert images.class_names == ('cat', 'dog') and images.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    train_set, val_set = create_datasets(TrainConfig(
        model='', output='', dataset='csv', data_dir=str(tmp_path), task='multilabel'))
    assert val_set.class_names == ('cat', 'dog') and val_set.labels.tolist() == [[0, 1]]
    with pytest.raises(FileNotFoundError, match='has none of other.csv'):
        create_dataset('csv', str(tmp_path), 'other')


@pytest.mark.parametrize('names', [True, False])
def test_lists_of_the_hub(names, tmp_path):
    import datasets
    files = []
    for i in range(3):
        files.append(str(tmp_path / 'files' / f'{i}.jpg'))
        jpeg(Path(files[-1]), [i, 50, 90])
    label = datasets.ClassLabel(names=['cat', 'dog', 'emu']) if names else datasets.Value('string')
    lists = [[0, 2], [], [2]] if names else [['cat', 'emu'], [], ['emu']]
    features = datasets.Features({'image': datasets.Image(), 'labels': datasets.Sequence(label)})
    datasets.DatasetDict({'train': datasets.Dataset.from_dict({'image': files, 'labels': lists}, features)})[
        'train'].to_parquet(str(tmp_path / 'data' / 'train.parquet'))
    images = create_dataset(f'hfds/{tmp_path / "data"}', str(tmp_path / 'cache'), 'train', task='multilabel')
    assert images.class_names == (('cat', 'dog', 'emu') if names else ('cat', 'emu'))
    assert images.labels.tolist() == ([[1, 0, 1], [0, 0, 0], [0, 0, 1]] if names else [[1, 1], [0, 0], [0, 1]])
    assert images.read(2)[0].size == (48, 36)
    with pytest.raises(ValueError, match='is not one class'):
        create_dataset(f'hfds/{tmp_path / "data"}', str(tmp_path / 'cache'), 'train', target_key='labels')


def drop_image(content):
    content['images'].pop(3)


def unknown_category(content):
    content['annotations'][1]['category_id'] = 77


def same_id(content):
    content['images'][2]['id'] = content['images'][4]['id']


def same_category(content):
    content['categories'][1]['id'] = content['categories'][0]['id']


def not_on_disk(content):
    content['images'][5]['file_name'] = 'gone.jpg'


@pytest.mark.parametrize('make, name', [(make_coco, 'coco'), (make_inaturalist, 'inaturalist')])
@pytest.mark.parametrize('change, message', [
    (drop_image, r'annotation \d+ has image_id (1003|3), which is not among the \d+ images'),
    (unknown_category, 'annotation 1 has category_id 77, which is not among the 3 categories'),
    (same_id, r'1 ids of images that come twice: (1004|4)'),
    (same_category, '1 ids of categories that come twice: '),
    (not_on_disk, r'1 images that are not on disk: .*gone\.jpg'),
    (lambda content: content.pop('categories'), 'has no categories; expected'),
])
def test_annotations_that_contradict_themselves(make, name, change, message, tmp_path):
    make(tmp_path, change=lambda content: change(content))
    with pytest.raises((ValueError, FileNotFoundError), match=rf'train(2014|2017)\.json: .*{message}'):
        create_dataset(name, str(tmp_path), 'train')


def test_inaturalist_has_one_class_each(tmp_path):
    make_inaturalist(tmp_path, lambda content: content['annotations'].append(
        {'id': 9, 'image_id': 0, 'category_id': 2}))
    with pytest.raises(ValueError, match="image 0 has annotations of two categories, 'Plantae/Iris' and 'Parus major'"):
        create_dataset('inaturalist', str(tmp_path), 'train')
    make_inaturalist(tmp_path, lambda content: content['annotations'].pop())
    with pytest.raises(ValueError, match='1 images without an annotation: 5'):
        create_dataset('inaturalist', str(tmp_path), 'train')


def test_files_that_are_not_there_or_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file for split 'train'; expected one, instances_train2014.json"):
        create_dataset('coco', str(tmp_path), 'train')
    with pytest.raises(FileNotFoundError, match='train2017.json: no such file'):
        create_dataset('inaturalist', str(tmp_path), 'train')
    (tmp_path / 'train2017.json').write_text('{"images": [')
    with pytest.raises(ValueError, match='train2017.json: not JSON'):
        create_dataset('inaturalist', str(tmp_path), 'train')
    with pytest.raises(ValueError, match='coco: name the folder of the data with --data-dir'):
        create_dataset('coco', None, 'train')


def test_check_data_says_it_before_anything_else(tmp_path):
    make_coco(tmp_path)
    words = ('finetune', '--check-data', '--dataset', 'coco', '--task', 'multilabel', '--workers', '0', '--data-dir',
             tmp_path)
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'coco: 9 training images and 4 validation images of 3 classes, all of them readable\n'
    make_coco(tmp_path, change=unknown_category)
    done = call(*words)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith('noah-zoo finetune: error: ') and 'category_id 77' in done.stderr
