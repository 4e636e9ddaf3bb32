"""Images on disk for the tests, in every layout that is read: the samples of the package, photographs of noise."""
import copy
import gzip
import json

import numpy as np
from PIL import Image

from noah_zoo.catalog import FASHION_MNIST_CLASSES
from noah_zoo.inference.predict import SAMPLES

CATEGORIES = [{'id': 9, 'name': 'zebra'}, {'id': 1, 'name': 'person'}, {'id': 5, 'name': 'boat'}]


def samples():
    """The sample images and their labels, which stand in the file names."""
    paths = sorted(SAMPLES.glob('*.png'))
    names = [name.lower().replace('/', ' ').replace(' ', '_') for name in FASHION_MNIST_CLASSES]
    images = [np.asarray(Image.open(path).convert('L')) for path in paths]
    return images, [names.index(path.stem.split('_', 1)[1]) for path in paths]


def write_idx(path, array):
    data = b'\x00\x00\x08' + bytes([array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)


def make_fashion_mnist(root, repeats=4):
    """48 images to train on, or another multiple of 12, and 12 to test."""
    root.mkdir(exist_ok=True)
    images, labels = samples()
    for prefix, times, suffix in (('train', repeats, '.gz'), ('t10k', 1, '')):
        write_idx(root / f'{prefix}-images-idx3-ubyte{suffix}', np.stack(images * times))
        write_idx(root / f'{prefix}-labels-idx1-ubyte{suffix}', np.array(labels * times, np.uint8))


def make_photos(root):
    """24 red, 12 blue and 6 green JPEG files of noise, a folder per class."""
    rng = np.random.default_rng(0)
    for name, channel, count in (('red', 0, 24), ('blue', 2, 12), ('green', 1, 6)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (40, 60, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(root / name / f'{i}.jpg')


def jpeg(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(path.name.encode())).integers(0, 60, (36, 48, 3))
    Image.fromarray((noise + color).clip(0, 255).astype(np.uint8)).save(path)


def make_coco(root, images=12, change=lambda content: None):
    """`images` JPEG files to train on, half as many to evaluate; a colour channel per category, none in every 4th."""
    for split, count in (('train2014', images), ('val2014', images // 2)):
        content = {'images': [], 'annotations': [], 'categories': copy.deepcopy(CATEGORIES)}
        for i in range(count):
            labels = [k for k in range(3) if i % 4 and (i >> k) & 1]
            name = f'COCO_{split}_{i:012}.jpg'
            jpeg(root / split / name, [190 * (k in labels) for k in range(3)])
            content['images'].append({'id': 1000 + i, 'file_name': name, 'width': 48, 'height': 36})
            for k in labels * 2:  # two boxes each
                content['annotations'].append({
                    'id': len(content['annotations']), 'image_id': 1000 + i, 'category_id': (1, 5, 9)[k],
                    'bbox': [1, 1, 5, 5], 'iscrowd': 0})
        change(content)
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def make_inaturalist(root, change=lambda content: None):
    for split in ('train', 'val'):
        content = {'images': [], 'annotations': [], 'categories': [
            {'id': 2, 'name': 'Parus major', 'supercategory': 'Aves'},
            {'id': 0, 'name': 'Iris', 'supercategory': 'Plantae'},
            {'id': 1, 'name': 'Iris', 'supercategory': 'Insecta'}]}
        for i in range(6):
            name = f'train_val_images/Aves/Parus major/{split}{i}.jpg'
            jpeg(root / name, [i, 100, 200])
            content['images'].append({'id': i, 'file_name': name})
            content['annotations'].append({'id': i, 'image_id': i, 'category_id': i % 3})
        change(content)
        (root / f'{split}2017.json').write_text(json.dumps(content))


def write_person(path, identity, camera):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([identity + 1, camera, len(path.name)])
    pixels = rng.integers(0, 40, (128, 64, 3)) + 20 * camera
    pixels[:64, :, identity % 3] += 120
    pixels[64:, :, identity // 3 % 3] += 120
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def make_market(root):
    for identity in (2, 7, 11, 12):
        for camera in (1, 2, 6):
            write_person(root / 'bounding_box_train' / f'{identity:04}_c{camera}s1_000451_03.jpg', identity, camera)
    for identity in (1, 3, 4, 5):
        write_person(root / 'query' / f'{identity:04}_c1s1_001051_00.jpg', identity, 1)
        for camera in (1, 3, 4):
            write_person(root / 'bounding_box_test' / f'{identity:04}_c{camera}s2_000151_01.jpg', identity, camera)
    for name, identity in (('-1_c1s1_000401_03.jpg', 3), ('0000_c1s1_000151_02.jpg', 4)):
        write_person(root / 'bounding_box_test' / name, identity, 5)
    (root / 'bounding_box_test' / 'Thumbs.db').write_text('not an image')
