"""Datasets of the Hub's layout."""
import pickle

import datasets
import numpy as np
import pytest

from noah_zoo.data.factory import create_dataset, create_datasets
from noah_zoo.data.hub import source_of
from noah_zoo.data.images import DamagedImageError

from .files import config, load, make_folder, make_hub, photo, pngs


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
    with pytest.raises(ValueError, match=r"no column 'fine_label' for the labels \(--target-key\), only image, label"):
        create_dataset(name, cache, 'train', target_key='fine_label')
    with pytest.raises(ValueError, match=r"no images in a column 'img' \(--input-key\); the others are image, label"):
        create_dataset(name, cache, 'train', input_key='img')
    unlabelled = make_hub(tmp_path / 'b', pngs(3), labels=[0, -1, -1])
    with pytest.raises(ValueError, match=r'row 1: the label is -1, accepted are 0 to 1 \(2 such images\)'):
        create_dataset(f'hfds/{unlabelled}', cache, 'train')
    with pytest.raises(FileNotFoundError):
        create_dataset(f'hfds/{tmp_path}/nowhere', cache, 'train')


def test_a_configuration_is_chosen(tmp_path):
    hub, cache = tmp_path / 'Hub', str(tmp_path / 'cache')
    for name, labels in (('small', ['owl']), ('large', ['cat', 'dog', 'elk'])):
        make_hub(hub / name, pngs(len(labels)), names=None, labels=labels)
    files = ''.join(
        f'- config_name: {name}\n  data_files: [{{split: train, path: {name}/data/*.parquet}}]\n'
        for name in ('small', 'large'))
    (hub / 'README.md').write_text(f'---\nconfigs:\n{files}---\n')
    assert create_dataset(f'hfds/{hub}:large', cache, 'train').class_names == ('cat', 'dog', 'elk')
    assert create_dataset(f'hfds/{hub}:small', cache, 'train').class_names == ('owl',)
    with pytest.raises(ValueError, match=r"'small', 'large'.*; choose one as hfds/NAME:CONFIG"):
        create_dataset(f'hfds/{hub}', cache, 'train')
    with pytest.raises(ValueError, match="BuilderConfig 'huge' not found"):
        create_dataset(f'hfds/{hub}:huge', cache, 'train')
    with pytest.raises(ValueError, match='a stream has no choice of configurations or formats; hfds/ has'):
        create_dataset(f'hfids/{hub}:large', cache, 'train')


@pytest.mark.parametrize('name, path, chosen', [
    ('food101', 'food101', None), ('cifar100:fine', 'cifar100', 'fine'), ('me/pets:v1.0', 'me/pets', 'v1.0'),
    (r'C:\photos', r'C:\photos', None), (r'C:\photos:big', r'C:\photos', 'big'), ('C:/a:b/c', 'C:/a:b/c', None)])
def test_what_a_name_says(name, path, chosen):
    assert source_of(name, 'cache') == dict(path=path, name=chosen, data_dir=None, cache_dir='cache')


def test_a_format_reads_the_folder_that_is_named(tmp_path, monkeypatch):
    for name, classes in (('Photos', {'cat': 2, 'dog': 2}), ('elsewhere', {'car': 2, 'bus': 2})):
        make_folder(tmp_path / name, classes)
    monkeypatch.chdir(tmp_path / 'elsewhere')
    before = sorted((tmp_path / 'Photos').rglob('*'))
    for name, data_dir in (('imagefolder', str(tmp_path / 'Photos')), (str(tmp_path / 'Photos'), None)):
        images = create_dataset(f'hfds/{name}', data_dir, 'train')
        assert images.class_names == ('cat', 'dog') and images.read(0)[0].mode == 'RGB'
    assert sorted((tmp_path / 'Photos').rglob('*')) == before
    for name, data_dir in (('imagefolder', None), ('imagefolder:x', str(tmp_path / 'Photos'))):
        with pytest.raises(ValueError, match='imagefolder is a format without configurations: name the folder of its'):
            create_dataset(f'hfds/{name}', data_dir, 'train')
    (tmp_path / 'Photos/train/odd.csv').write_text('a,b\n1,2,3,4\n"')
    with pytest.raises(ValueError, match='hfds/csv: '):
        create_dataset('hfds/csv', str(tmp_path / 'Photos'), 'train')
    hub = make_hub(tmp_path / 'Hub', pngs(4))
    assert len(create_dataset('hfds/parquet', f'{hub}/data', 'train')) == 4


def test_a_column_of_something_else_than_images(tmp_path):
    content = {'bytes': pngs(1)[0], 'path': None}
    for kind, cell, told in (
            (datasets.Sequence(datasets.Image()), [content, content], 'a list of images in a row; expected one image'),
            (datasets.Value('float32'), 0.5, r"Value\(.*'float32'.*\) in a row; expected one image")):
        features = datasets.Features(image=kind, label=datasets.ClassLabel(names=['cat']))
        folder = tmp_path / str(len(told))
        folder.mkdir()
        datasets.Dataset.from_dict({'image': [cell], 'label': [0]}, features=features).to_parquet(
            str(folder / 'train.parquet'))
        with pytest.raises(ValueError, match=told):
            create_dataset(f'hfds/{folder}', str(tmp_path / 'cache'), 'train')


@pytest.mark.parametrize('kind', ['string', 'large_string', 'string_view', 'binary', 'large_binary', 'binary_view'])
def test_paths_and_files_of_every_arrow_type(kind, tmp_path):
    """pandas 3 and polars write large_string."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    (tmp_path / 'data').mkdir()
    cells = pngs(4)
    if 'string' in kind:
        for i, content in enumerate(cells):
            (tmp_path / f'{i}.png').write_bytes(content)
        cells = [str(tmp_path / f'{i}.png') for i in range(4)]
    table = pa.table({'image': pa.array(cells, getattr(pa, kind)()), 'label': [0., 1., 2., 1.]})
    pq.write_table(table, tmp_path / 'data' / 'train.parquet')
    images = create_dataset('hfds/parquet', str(tmp_path / 'data'), 'train')
    assert images.class_names == ('0', '1', '2') and images.labels.tolist() == [0, 1, 2, 1]
    assert [images.read(i)[0].tobytes() for i in range(4)] == [photo(i).tobytes() for i in range(4)]


def test_the_cause_of_an_unreadable_table_is_named(tmp_path):
    (tmp_path / 'train.csv').write_text('image,label\na.png,0\nb.png,1,2,3\n')
    with pytest.raises(ValueError, match='hfds/csv: .*Expected 2 fields in line 3, saw 4'):
        create_dataset('hfds/csv', str(tmp_path), 'train')
