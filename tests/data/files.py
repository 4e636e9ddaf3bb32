"""Image files of every kind, whole and damaged; folders, datasets of the Hub's layout and shards of them."""
import io
import json
import struct
import tarfile
import traceback
import zlib

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from noah_zoo.config import TrainConfig

GREYS = np.random.default_rng(0).integers(0, 65536, (9, 7)).astype(np.uint16)


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
    'bomb.png': (bomb(), 'as a decompression bomb has'),
}


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


def pixels(stream, **loader):
    """{content: label} and the number of images of one pass."""
    stream.transform = np.array
    passed = [(image.numpy().tobytes(), int(label)) for image, label in load(stream, batch_size=None, **loader)]
    return dict(passed), [image for image, _ in passed]


EXPECTED = {np.asarray(photo(i)).tobytes(): i % 2 for i in range(8)}


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
