"""Datasets, on real image files of every kind, whole and damaged."""
import gzip
import hashlib
import io
import json
import logging
import pickle
import struct
import subprocess
import sys
import tarfile
import traceback
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from noah_zoo.catalog import FASHION_MNIST_CLASSES
from noah_zoo.config import TrainConfig
from noah_zoo.data.base import VALIDATION
from noah_zoo.data.damage import find_damaged, leave_out_damaged
from noah_zoo.data.factory import create_dataset, create_datasets, split_images
from noah_zoo.data.fashion_mnist import FashionMnist, read_idx
from noah_zoo.data.images import DamagedImageError, read_image
from noah_zoo.training import train

from ..pictures import make_coco

GREYS = np.random.default_rng(0).integers(0, 65536, (9, 7)).astype(np.uint16)
COLOURS = np.random.default_rng(1).integers(0, 256, (9, 7, 4)).astype(np.uint8)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(seed=0, size=24):
    """A random image that no lossless format changes."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8))


def png(width, height, bits, colour, rows):
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    header = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def bomb(side=20000):
    return png(side, side, 1, 0, bytes((1 + side // 8) * side))


JPEG = encode(photo(), 'jpeg')
DAMAGED = {  # name: content, part of the reason
    'truncated.jpg': (JPEG[:len(JPEG) // 2], 'truncated'),
    'truncated.png': (encode(photo(), 'png')[:300], 'truncated'),
    'empty.jpg': (b'', 'the file is empty'),
    'text.jpg': (b'<html>404 Not Found</html>', 'not a format that Pillow knows'),
    'bomb.png': (bomb(), 'exceeds limit'),
}


def array(data):
    image = read_image(data)
    assert image.mode == 'RGB'
    return np.asarray(image)


def make_folder(root, classes, splits=('train', 'validation'), kind='png'):
    """`classes` is {name: number of images}, the same in each split."""
    for split in splits:
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                photo(zlib.crc32(f'{split} {name} {i}'.encode())).save(root / split / name / f'{i}.{kind}')
    return root


def load(images, **loader):
    try:
        return list(DataLoader(images, **loader))
    except ValueError as error:
        traceback.clear_frames(error.__traceback__)  # else the garbage collector ends the workers, in 5 s each
        raise


def config(root, **settings):
    return TrainConfig(model='resnet18_noah', output='unused', **{
        'dataset': 'folder', 'data_dir': str(root), 'workers': 0, **settings})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    # datasets sleeps 5 s at the end of a shuffled parquet stream
    monkeypatch.setattr('datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN', 0.1, raising=False)


# -- reading


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA'])
@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_modes_that_pillow_converts(mode, kind):
    image = Image.fromarray(COLOURS).convert(mode)
    data = encode(image, kind)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert np.array_equal(array(data), np.asarray(image.convert('RGB')))


def test_alpha_is_dropped_and_not_composited():
    assert np.array_equal(array(encode(Image.fromarray(COLOURS), 'png')), COLOURS[..., :3])


@pytest.mark.parametrize('transparency', [3, bytes(range(256))])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(COLOURS[..., :3]).quantize(16)
    data = encode(image, 'png', transparency=transparency)
    assert 'transparency' in Image.open(io.BytesIO(data)).info
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.array_equal(array(data), np.asarray(image.convert('RGB')))


@pytest.mark.parametrize('kind', ['jpeg', 'tiff'])
def test_cmyk(kind):
    colours = np.zeros((16, 16, 4), np.uint8)
    colours[:, :8] = (0, 255, 255, 0)  # red
    colours[:, 8:] = (0, 0, 0, 255)  # black
    data = encode(Image.fromarray(colours, 'CMYK'), kind)
    assert Image.open(io.BytesIO(data)).mode == 'CMYK'
    rgb = array(data).astype(int)
    assert np.abs(rgb[:, :8] - (255, 0, 0)).max() <= 3  # JPEG loses a little
    assert np.abs(rgb[:, 8:]).max() <= 3


def test_16_bit_grey_is_scaled():
    files = {
        'png': png(7, 9, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in GREYS)),
        'tiff': encode(Image.fromarray(GREYS), 'tiff'),
        'pgm': b'P5 7 9 65535\n' + GREYS.astype('>u2').tobytes(),
        'int32': encode(Image.fromarray(GREYS.astype(np.int32)), 'tiff')}
    for name, data in files.items():
        assert Image.open(io.BytesIO(data)).mode.startswith('I'), name
        rgb = array(data)
        assert all(np.array_equal(rgb[..., c], GREYS // 256) for c in range(3)), name
    assert {Image.open(io.BytesIO(data)).mode for data in files.values()} == {'I', 'I;16'}
    with pytest.raises(DamagedImageError, match='mode I with values from 0 to 65536, accepted are 0 to 65535'):
        read_image(encode(Image.fromarray(np.array([[0, 65536]], np.int32)), 'tiff'), 'x')


def test_floating_point():
    def tiff(values):
        return encode(Image.fromarray(np.asarray(values, np.float32)), 'tiff')
    assert array(tiff([[0, 0.5, 1]]))[0, :, 1].tolist() == [0, 128, 255]
    assert array(tiff([[0, 2.9, 100, 255]]))[0, :, 2].tolist() == [0, 2, 100, 255]
    for values in ([[-1, 0]], [[0, 256]], [[0, np.nan]]):
        with pytest.raises(DamagedImageError, match='mode F with values'):
            read_image(tiff(values), 'x')


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x112] = 6
    data = encode(photo().crop((0, 0, 24, 10)), 'png', exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x112] == 6
    assert read_image(data).size == (24, 10)


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_file(name, tmp_path):
    content, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedImageError) as error:
        read_image(tmp_path / name)
    where, _, told = str(error.value).partition(': not a readable image: ')
    assert where == str(tmp_path / name) and reason.lower() in told.lower() and '0x' not in told
    assert str(type(error.value)('as torch makes it')) == 'as torch makes it'


def test_an_image_between_pillows_two_limits_is_read():
    side = 9600  # Pillow warns from 89 million pixels and refuses from 179 million
    with pytest.warns(Image.DecompressionBombWarning):
        assert read_image(png(side, side, 1, 0, bytes((1 + side // 8) * side))).size == (side, side)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    make_folder(tmp_path, {'a': 2}, ['train'])
    images = create_dataset('folder', str(tmp_path), 'train')
    (tmp_path / 'train/a/1.png').unlink()
    with pytest.raises(FileNotFoundError, match='1.png'):
        images.read(1)
    with pytest.raises(FileNotFoundError, match='1.png'):
        find_damaged(images)


# -- folders


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


def test_unknown_datasets():
    for name in ('imagenet', 'torch/cifar10', 'tfds/mnist', 'hfds/', 'hfids', 'wds'):
        with pytest.raises(ValueError, match='accepted are fashion_mnist, folder, inaturalist, .*, hfds/NAME'):
            create_dataset(name, None, 'train')
    with pytest.raises(ValueError, match='--data-dir'):
        create_dataset('wds/', None, 'train')


# -- held out


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


# -- damage


@pytest.fixture
def damaged_folder(tmp_path):
    make_folder(tmp_path, {'a': 6, 'b': 6})
    for i, (name, (content, _)) in enumerate(DAMAGED.items()):
        (tmp_path / 'train' / 'ab'[i % 2] / name).write_bytes(content)
    (tmp_path / 'validation/a/0.png').write_bytes(b'')
    return tmp_path


def test_damage_stops_a_worker_with_the_path(damaged_folder):
    train_set, _ = create_datasets(config(damaged_folder))
    train_set.transform = np.array
    with pytest.raises(DamagedImageError, match='train/./[a-z]+.(jpg|png): not a readable image: '):
        load(train_set, batch_size=3, num_workers=2)


@pytest.mark.parametrize('workers', [0, 2])
def test_skip_damaged(workers, damaged_folder, caplog):
    whole, _ = create_datasets(config(damaged_folder))
    found = find_damaged(whole, workers)
    assert sorted(Path(whole.where(i)).name for i in found) == sorted(DAMAGED) and list(found) == sorted(found)
    for index, reason in found.items():
        assert DAMAGED[Path(whole.where(index)).name][1].lower() in reason.lower()
    with caplog.at_level(logging.WARNING):
        train_set, val_set = create_datasets(config(damaged_folder, skip_damaged=True, workers=workers))
    assert f'left out {len(DAMAGED)} of {12 + len(DAMAGED)} images' in caplog.text
    assert f'{damaged_folder}/validation/a/0.png: not a readable image: the file is empty' in caplog.text
    assert train_set.damaged == {whole.where(i): reason for i, reason in found.items()}
    assert val_set.damaged == {str(damaged_folder / 'validation/a/0.png'): 'the file is empty'}
    assert (len(train_set), len(val_set)) == (12, 11)
    assert find_damaged(train_set) == {} and train_set.read(0)[1] == 0 and train_set.read(11)[1] == 1


def test_known_damage_is_not_looked_for(damaged_folder, monkeypatch):
    first = create_datasets(config(damaged_folder, skip_damaged=True))
    monkeypatch.setattr('noah_zoo.data.damage.find_damaged', None)
    again = create_datasets(config(damaged_folder, skip_damaged=True), {**first[0].damaged, **first[1].damaged})
    for a, b in zip(first, again):
        assert a.rows.tolist() == b.rows.tolist() and a.damaged == b.damaged


def test_nothing_but_damage(tmp_path):
    make_folder(tmp_path, {'a': 2})
    for path in (tmp_path / 'train/a').iterdir():
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='all 2 images are damaged, as is .*0.png'):
        leave_out_damaged(create_dataset('folder', str(tmp_path), 'train'))


SHARES = """
import sys, torch
from noah_zoo.data.factory import create_dataset
from noah_zoo.data.base import VALIDATION
from noah_zoo.data.damage import find_damaged
rank, root, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group('gloo', init_method=f'file://{port}', rank=rank, world_size=2)
images = create_dataset('folder', root, 'train')
reads, read = [], images.read
images.read = lambda index: (reads.append(index), read(index))[1]
print(sorted(find_damaged(images)), len(reads))
"""


def test_processes_read_a_share_each_and_agree(damaged_folder, tmp_path_factory):
    images = create_dataset('folder', str(damaged_folder), 'train')
    port = tmp_path_factory.mktemp('store') / 'file'
    processes = [subprocess.Popen(
        [sys.executable, '-c', SHARES, str(rank), str(damaged_folder), str(port)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)]
    answers = [process.communicate(timeout=120)[0].strip().rsplit(' ', 1) for process in processes]
    assert [answer for answer, _ in answers] == [str(list(find_damaged(images)))] * 2
    assert sum(int(reads) for _, reads in answers) == len(images)


def test_datasets_go_to_spawned_workers(damaged_folder):
    images = create_dataset('folder', str(damaged_folder), 'validation')
    copy = pickle.loads(pickle.dumps(images))
    assert len(copy) == len(images) and copy.where(3) == images.where(3) and copy.read(3)[1] == images.read(3)[1]
    assert np.array_equal(np.asarray(copy.read(3)[0]), np.asarray(images.read(3)[0]))


# -- the Hub's layout


def make_hub(root, rows, names=('cat', 'dog'), labels=None, split='train'):
    """Parquet files and the card that tells the number of rows; `rows` are image files' contents."""
    labels = [i % 2 for i in range(len(rows))] if labels is None else labels
    feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value(
        'string' if isinstance(labels[0], str) else 'int64')
    features = datasets.Features(image=datasets.Image(), label=feature)
    data = {'image': [None if row is None else {'bytes': row, 'path': None} for row in rows], 'label': labels}
    (root / 'data').mkdir(parents=True, exist_ok=True)
    shards = 2 if len(rows) > 3 else 1
    dataset = datasets.Dataset.from_dict(data, features=features)
    for i in range(shards):
        dataset.shard(shards, i, contiguous=True).to_parquet(
            str(root / 'data' / f'{split}-{i:05}-of-{shards:05}.parquet'))
    if names:
        classes = '\n'.join(f"            '{i}': {name}" for i, name in enumerate(names))
        (root / 'README.md').write_text(f"""---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
{classes}
  splits:
  - name: {split}
    num_bytes: 1
    num_examples: {len(rows)}
configs:
- config_name: default
  data_files:
  - split: {split}
    path: data/{split}-*
---
""")
    return root


def pngs(count):
    return [encode(photo(i), 'png') for i in range(count)]


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


def pixels(stream, **loader):
    """{content: label} and the number of images of one pass."""
    stream.transform = np.array
    passed = [(image.numpy().tobytes(), int(label)) for image, label in load(stream, batch_size=None, **loader)]
    return dict(passed), [image for image, _ in passed]


EXPECTED = {np.asarray(photo(i)).tobytes(): i % 2 for i in range(8)}


def test_hfids(tmp_path, caplog):
    make_hub(tmp_path / 'hub', pngs(8))
    name, cache = f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache')
    stream = create_dataset(name, cache, 'train')
    assert stream.class_names == ('cat', 'dog') and len(stream) == 8
    for workers in (0, 2):
        assert pixels(stream, num_workers=workers)[0] == EXPECTED
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        training = create_dataset(name, cache, 'train', training=True, seed=seed)
        training.set_epoch(epoch)
        found, order = pixels(training)
        assert found == EXPECTED and len(order) == len(training) == 8
        orders.add(tuple(order))
    assert len(orders) == 3
    with pytest.raises(ValueError, match='no stream'):
        create_datasets(config(cache, dataset=name, val_fraction=0.5))
    train_set, val_set = create_datasets(config(cache, dataset=name, val_split='train'))
    assert train_set.training and not val_set.training


def test_damage_in_hfids(tmp_path, caplog):
    rows = pngs(8)
    rows[5] = rows[5][:100]
    make_hub(tmp_path / 'hub', rows)
    name, cache = f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache')
    with pytest.raises(DamagedImageError, match=r'hub\[train\] sample 1 of worker 1: not a readable image'):
        pixels(create_dataset(name, cache, 'train'), num_workers=2)
    stream = create_dataset(name, cache, 'train', skip_damaged=True)
    with caplog.at_level(logging.WARNING):
        assert len(pixels(stream)[0]) == 7
    assert stream.skipped == 1 and 'sample 5 of worker 0: not a readable image' in caplog.text
    assert len(pixels(stream, num_workers=2)[0]) == 7 and stream.skipped == 2


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_of_a_damaged_stream_is_whole(workers, tmp_path):
    rows = pngs(8)
    rows[5] = rows[5][:100]
    make_hub(tmp_path / 'hub', rows)
    stream = create_dataset(
        f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train', training=True, skip_damaged=True)
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        found, order = pixels(stream, num_workers=workers)
        assert len(order) == len(stream) == 8 and len(found) == 7 and stream.skipped == epoch + 1
    make_hub(tmp_path / 'broken', [b'no image'] * 4)
    stream = create_dataset(
        f'hfids/{tmp_path / "broken"}', str(tmp_path / 'cache'), 'train', training=True, skip_damaged=True)
    with pytest.raises(ValueError, match='all images that this process reads are damaged'):
        pixels(stream)


def test_16_bit_in_hfids_and_no_class_names(tmp_path):
    data = png(7, 9, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in GREYS))
    make_hub(tmp_path / 'hub', [data])
    image, _ = next(iter(create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train')))
    assert np.array_equal(np.asarray(image)[..., 0], GREYS // 256)
    make_hub(tmp_path / 'hub', [data], labels=[-1])
    with pytest.raises(ValueError, match='the label is -1'):
        next(iter(create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache2'), 'train')))
    with pytest.raises(ValueError, match="no column 'img'"):
        create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train', input_key='img')
    with pytest.raises(ValueError, match="column 'fine' has no class names"):
        create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train', target_key='fine')


# -- webdataset


def make_shards(root, shards, names='cat\ndog\n'):
    """`shards` is a list of lists of (key, image file, label)."""
    root.mkdir(parents=True, exist_ok=True)
    for i, samples in enumerate(shards):
        with tarfile.open(root / f'train-{i}.tar', 'w') as tar:
            for key, data, label in samples:
                for suffix, content in (('png', data), ('cls', str(label).encode())):
                    info = tarfile.TarInfo(f'{key}.{suffix}')
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    lengths = [len(samples) for samples in shards]
    (root / '_info.json').write_text(json.dumps({'splits': {'train': {
        'name': 'train', 'num_samples': sum(lengths), 'shard_lengths': lengths,
        'filenames': [f'train-{i}.tar' for i in range(len(shards))]}}}))
    if names is not None:
        (root / 'classnames.txt').write_text(names)
    return str(root)


def samples(first, last):
    return [(f'image{i}', encode(photo(i), 'png'), i % 2) for i in range(first, last)]


@pytest.fixture
def webdataset():
    return pytest.importorskip('webdataset')


def test_wds(tmp_path, webdataset):
    root = make_shards(tmp_path, [samples(0, 5), samples(5, 8)])
    stream = create_dataset('wds/', root, 'train')
    assert stream.class_names == ('cat', 'dog') and len(stream) == 8
    for workers in (0, 1, 2, 3):  # a third worker has no shard
        found, order = pixels(stream, num_workers=workers)
        assert found == EXPECTED and len(order) == 8
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        stream = create_dataset('wds/', root, 'train', training=True, seed=seed)
        stream.set_epoch(epoch)
        found, order = pixels(stream)
        assert found == EXPECTED and len(order) == 8
        assert orders.setdefault((seed, epoch), order) == order
    assert len(set(map(tuple, orders.values()))) == 3
    stream.set_loader_cfg(2, batch_size=3)
    found, order = pixels(stream, num_workers=2)  # 6 each, of shards of 5 and 3
    assert found == EXPECTED and len(order) == len(stream) == 12
    with pytest.raises(ValueError, match='2 shards are too few for 1 processes of 3 workers'):
        pixels(stream, num_workers=3)


def test_wds_epoch_reaches_workers_that_stay(tmp_path, webdataset):
    stream = create_dataset('wds/', make_shards(tmp_path, [samples(0, 4), samples(4, 8)]), 'train', training=True)
    stream.transform = np.array
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([image.numpy().tobytes() for image, _ in loader])
    assert orders[0] == orders[2] != orders[1]


def test_damage_in_wds(tmp_path, webdataset, caplog):
    shards = [samples(0, 4), samples(4, 8)]
    shards[1][2] = ('broken', b'', 0)
    root = make_shards(tmp_path, shards)
    with pytest.raises(DamagedImageError, match=r'wds/\[train\] train-1.tar broken: not a readable image: the file is'):
        pixels(create_dataset('wds/', root, 'train'), num_workers=2)
    stream = create_dataset('wds/', root, 'train', skip_damaged=True)
    with caplog.at_level(logging.WARNING):
        assert len(pixels(stream)[0]) == 7
    assert stream.skipped == 1 and 'train-1.tar broken: not a readable image' in caplog.text
    shards[1][2] = ('label', encode(photo(), 'png'), 'dog')
    with pytest.raises(ValueError, match='train-1.tar label: no label'):
        pixels(create_dataset('wds/', make_shards(tmp_path, shards), 'train'))
    shards[1][2] = ('label', encode(photo(), 'png'), 2)
    with pytest.raises(ValueError, match='train-1.tar label: the label is 2, accepted are 0 to 1'):
        pixels(create_dataset('wds/', make_shards(tmp_path, shards), 'train'))
    whole = (tmp_path / 'train-0.tar').read_bytes()
    for cut in (5000, 700):
        (tmp_path / 'train-0.tar').write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='train-0.tar'):
            pixels(create_dataset('wds/', root, 'train', skip_damaged=True))


def test_a_run_says_what_its_stream_left_out(tmp_path, webdataset):
    shards = [samples(0, 4), samples(4, 8)]
    shards[1][2] = ('broken', b'', 0)
    root = make_shards(tmp_path, shards)
    summary = train(TrainConfig(
        model='mobilenetv2_035_noah', output=str(tmp_path / 'run'), dataset='wds/', data_dir=root, val_split='train',
        img_size=32, epochs=2, batch_size=2, lr=1e-5, workers=0, cpu=True, skip_damaged=True))
    records = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').open()]
    assert [record['damaged'] for record in records] == [2, 2]  # one, in training and in evaluation
    assert summary['damaged'] == 2


@pytest.mark.parametrize('name', ['train', 'training'])
def test_splits_have_one_vocabulary(name, idx_dir, tmp_path):
    assert len(create_dataset('fashion_mnist', str(idx_dir), name)) == 40
    make_coco(tmp_path)
    (tmp_path / 'validation.csv').write_text('file_name,labels\nval2014/COCO_val2014_000000000000.jpg,a\n')
    for other in VALIDATION:
        assert len(create_dataset('fashion_mnist', str(idx_dir), other)) == 10
        assert len(create_dataset('coco', str(tmp_path), other)) == 4
        assert len(create_dataset('csv', str(tmp_path), other)) == 1


def test_wds_that_is_refused(tmp_path, webdataset):
    root = make_shards(tmp_path, [samples(0, 2)], names=None)
    with pytest.raises(ValueError, match='no readable classnames.txt'):
        create_dataset('wds/', root, 'train')
    with pytest.raises(ValueError, match='split validation not found'):
        create_dataset('wds/', root, 'validation')


# -- both, in a run of two processes


STREAM = """
import hashlib, json, sys, numpy as np, torch
from torch.utils.data import DataLoader
from noah_zoo.data.factory import create_dataset
rank, port, name, root = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group('gloo', init_method=f'file://{port}', rank=rank, world_size=2)
for training in (False, True):
    stream = create_dataset(name, root, 'train', training=training)
    stream.set_loader_cfg(2, 1)
    stream.transform = np.array
    images = [hashlib.sha256(image.numpy().tobytes()).hexdigest()
              for image, _ in DataLoader(stream, batch_size=None, num_workers=2)]
    print(json.dumps([len(stream), images]))
"""


@pytest.mark.parametrize('kind', ['hfids', 'wds'])
def test_processes_read_a_share_of_a_stream(kind, tmp_path):
    if kind == 'wds':
        pytest.importorskip('webdataset')
        name, root = 'wds/', make_shards(tmp_path / 'shards', [samples(i, i + 2) for i in range(0, 8, 2)])
    else:
        make_hub(tmp_path / 'hub', pngs(8))
        name, root = f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache')
        create_dataset(name, root, 'train')  # its cache is there before two write it at once
    processes = [subprocess.Popen(
        [sys.executable, '-c', STREAM, str(rank), str(tmp_path / 'store'), name, root], stdout=subprocess.PIPE,
        text=True) for rank in range(2)]
    answers = [[json.loads(line) for line in process.communicate(timeout=120)[0].splitlines()] for process in processes]
    every = sorted(hashlib.sha256(image).hexdigest() for image in EXPECTED)
    for shares in zip(*answers):  # each image once; the epochs of both are as long as they say
        assert sorted(shares[0][1] + shares[1][1]) == every
        assert [len(images) for _, images in shares] == [length for length, _ in shares] == [4, 4]


# -- Fashion-MNIST


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
