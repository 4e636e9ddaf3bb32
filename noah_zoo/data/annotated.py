"""Images with annotation files in JSON: COCO and iNaturalist.

What could stop a run is found here, before it starts: unknown and repeated ids, annotations of images that are not
listed, listed images that are not on disk, labels that do not parse. No image is opened for that.
"""
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import numpy as np

from ..text import some
from .base import VALIDATION, Files, Multilabel, synonyms


class Coco(Files, Multilabel):
    """MS-COCO as published: `annotations/instances_train2014.json` and `train2014/`, `..._val2014.json`, `val2014/`.

    The classes are the categories in the order of their ids; crowds count as well.

    Args:
        data_dir: Folder of `annotations` and the images' folders.
        split: 'train', or 'validation'.
        without_labels: Keep images without annotations; the paper's 82,081 training images are those with.

    Raises:
        FileNotFoundError: If annotations or images are missing.
        ValueError: If the annotations contradict themselves.
    """

    def __init__(self, data_dir: str, split: str, without_labels: bool = False) -> None:
        name = 'val' if split in VALIDATION else split
        folders = (sorted(Path(data_dir).glob(f'annotations/instances_{other}20??.json')) for other in synonyms(split))
        found = next(filter(None, folders), [])
        if len(found) != 1:
            raise FileNotFoundError(
                f'coco: {data_dir}/annotations has {", ".join(path.name for path in found) or "no file"} for split '
                f'{split!r}; expected one, instances_{name}2014.json say')
        file, folder = found[0], Path(data_dir) / found[0].stem.removeprefix('instances_')
        content = _read(file)
        names, categories = _categories(file, content)
        images = _unique(file, 'images', content['images'])
        rows = {id: row for row, id in enumerate(images)}
        labels = np.zeros((len(rows), len(names)), np.uint8)
        for annotation in content['annotations']:
            row, category = _refer(file, annotation, rows, categories)
            labels[row, category] = 1
        kept = np.arange(len(rows)) if without_labels else np.flatnonzero(labels.any(axis=1))
        files = [str(folder / image['file_name']) for image in images.values()]
        self.paths = [files[row] for row in kept]
        _on_disk(file, self.paths)
        super().__init__(names, labels[kept])


class INaturalist(Files):
    """iNaturalist 2017 as published: `train2017.json`, `val2017.json`, and the images where `file_name` says.

    The classes are the categories in the order of their ids; a name that comes twice has its supercategory in front.

    Args:
        data_dir: Folder of the JSON files and of `train_val_images`.
        split: 'train', or 'validation'.

    Raises:
        FileNotFoundError: If annotations or images are missing.
        ValueError: If the annotations contradict themselves, or an image has not exactly one.
    """

    def __init__(self, data_dir: str, split: str) -> None:
        files = [Path(data_dir) / f'{name}2017.json' for name in synonyms(split)]
        file = next(filter(Path.is_file, files), Path(data_dir) / f'{"val" if split in VALIDATION else split}2017.json')
        content = _read(file)
        names, categories = _categories(file, content)
        images = _unique(file, 'images', content['images'])
        rows = {id: row for row, id in enumerate(images)}
        labels = np.full(len(rows), -1)
        for annotation in content['annotations']:
            row, category = _refer(file, annotation, rows, categories)
            if labels[row] not in (-1, category):
                raise ValueError(f'{file}: image {annotation["image_id"]} has annotations of two categories, '
                                 f'{names[labels[row]]!r} and {names[category]!r}; expected one')
            labels[row] = category
        _refuse(file, 'images without an annotation', [i for i, label in zip(images, labels) if label < 0])
        self.paths = [str(Path(data_dir) / image['file_name']) for image in images.values()]
        _on_disk(file, self.paths)
        super().__init__(names, labels)


def _read(file: Path) -> Dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(f'{file}: no such file') from None
    except ValueError as error:
        raise ValueError(f'{file}: not JSON: {error}') from None
    keys = ('images', 'annotations', 'categories')
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f'{file}: has no {", ".join(missing)}; expected what COCO and iNaturalist publish')
    return content


def _unique(file: Path, what: str, items: Iterable[Dict[str, Any]]) -> Dict[Any, Dict[str, Any]]:
    """Items by id."""
    items = list(items)
    wrong = [item for item in items if 'id' not in item]
    _refuse(file, f'{what} without an id', wrong)
    counts = Counter(item['id'] for item in items)
    _refuse(file, f'ids of {what} that come twice', [id for id, count in counts.items() if count > 1])
    return {item['id']: item for item in items}


def _categories(file: Path, content: Dict[str, Any]) -> Tuple[List[str], Dict[Any, int]]:
    """Class names in the order of the ids, and from id to class."""
    categories = _unique(file, 'categories', content['categories'])
    ids = sorted(categories)
    counts = Counter(category['name'] for category in categories.values())
    names = [
        categories[id]['name'] if counts[categories[id]['name']] == 1 else
        f'{categories[id].get("supercategory", "")}/{categories[id]["name"]}' for id in ids]
    _refuse(file, 'names of categories that come twice', [name for name, count in Counter(names).items() if count > 1])
    return names, {id: i for i, id in enumerate(ids)}


def _refer(file: Path, annotation: Dict[str, Any], rows: Dict[Any, int], categories: Dict[Any, int]) -> Tuple[int, int]:
    """Row and class of an annotation."""
    for key, known, what in (('image_id', rows, 'images'), ('category_id', categories, 'categories')):
        if annotation.get(key) not in known:
            raise ValueError(f'{file}: annotation {annotation.get("id")} has {key} {annotation.get(key)!r}, which is '
                             f'not among the {len(known):,} {what}')
    return rows[annotation['image_id']], categories[annotation['category_id']]


def _on_disk(file: Path, paths: Sequence[str]) -> None:
    """Look for all files, a listing per folder."""
    if not paths:
        raise ValueError(f'{file}: no images that count')
    folders = defaultdict(set)
    for path in paths:
        folder = os.path.dirname(path)
        if folder not in folders and os.path.isdir(folder):
            folders[folder] = set(os.listdir(folder))
    missing = [path for path in paths if os.path.basename(path) not in folders[os.path.dirname(path)]]
    _refuse(file, 'images that are not on disk', missing, FileNotFoundError)


def _refuse(file: Path, what: str, items: Sequence[Any], error: type = ValueError) -> None:
    if items:
        raise error(f'{file}: {len(items):,} {what}: {some(items, 5)}')
