"""Which images are held out for validation: drawn by their names, recorded by a run, compared with earlier runs."""
import csv
import hashlib
import io
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np

from ..files import write
from ..text import some
from .base import Images, Multilabel

RECORD = 'split.csv'
TRAINING, EARLIER, VALIDATION = 'training', 'earlier training', 'validation'


def split_images(
        images: Images, fraction: float, seed: int, data_dir: Optional[str] = None,
        record: Optional[Dict[str, str]] = None) -> Tuple[Images, Images]:
    """Hold out a fraction of the images, and nearly the same fraction of each class.

    Which images of a class are held out depends on a hash of seed and name. New files therefore move few of the others.
    A class keeps at least one training image. Images of several classes are stratified iteratively
    (https://doi.org/10.1007/978-3-642-23808-6_10).

    Args:
        images: All images.
        fraction: Share of the validation images, between 0 and 1.
        seed: Random seed.
        data_dir: Folder that names are relative to.
        record: What `read_split` gives: images in it stay where they are, and the fraction is of the others.

    Returns:
        Training and validation images.

    Raises:
        ValueError: If the fraction is out of range or holds out no image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f'val_fraction={fraction} is not between 0 and 1')
    names = images.relative_names(data_dir)
    hashes = [hashlib.blake2b(f'{seed} {name}'.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
              for name in names]
    record = record or {}
    order = np.array([i for i in sorted(range(len(names)), key=hashes.__getitem__) if names[i] not in record], np.int64)
    labels = images.labels[images.rows]
    draw = _stratify if isinstance(images, Multilabel) else _quota
    is_validation = np.array([record.get(name) == VALIDATION for name in names], bool)
    is_validation[order[draw(labels[order], fraction)]] = True
    if not is_validation.any():
        raise ValueError(
            f'val_fraction={fraction} of {len(names)} images in {len(images.class_names)} classes holds out none')
    return images.take(np.flatnonzero(~is_validation)), images.take(np.flatnonzero(is_validation))


def _quota(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Positions to hold out of labels (images,): the first of each class, by the largest remainders."""
    counts = np.bincount(labels, minlength=1)
    shares = np.minimum(fraction * counts, np.maximum(counts - 1, 0))
    held_out = np.floor(shares).astype(np.int64)
    missing = min(round(fraction * len(labels)), int(np.ceil(shares).sum())) - held_out.sum()
    largest_remainders = np.argsort(held_out - shares, kind='stable')
    held_out[largest_remainders[:missing]] += 1
    return np.concatenate([np.flatnonzero(labels == label)[:count] for label, count in enumerate(held_out)])


def _stratify(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Positions to hold out of labels (images, K), 0 or 1, by iterative stratification.

    The class with the fewest open images comes first. Each of its images goes to the side that lacks more of the class,
    else to the side that lacks more images.
    """
    shares = np.array([1 - fraction, fraction])
    lacks, lacks_images = shares[:, None] * labels.sum(axis=0, dtype=np.int64), shares * len(labels)
    side = np.full(len(labels), -1)

    def assign(image: int, wanted: Sequence[float]) -> None:
        chosen = side[image] = int(wanted[1] > wanted[0])
        lacks[chosen] -= labels[image]
        lacks_images[chosen] -= 1

    open_counts = labels.sum(axis=0, dtype=np.int64)
    while open_counts.any():
        rarest = int(np.where(open_counts > 0, open_counts, len(labels) + 1).argmin())
        for image in np.flatnonzero((side < 0) & (labels[:, rarest] > 0)):
            wanted = lacks[:, rarest]
            assign(image, lacks_images if np.isclose(*wanted) else wanted)
            open_counts -= labels[image]
    for image in np.flatnonzero(side < 0):
        assign(image, lacks_images)
    return np.flatnonzero(side == 1)


def missing_classes(train_set: Images, val_set: Images) -> str:
    """The classes that one side has no image of, as text; empty if there are none.

    Streams do not know their classes' images, and persons to identify again differ from those of training.
    """
    if not isinstance(train_set, Images) or train_set.task == 'reid':
        return ''
    parts = []
    for name, images in (('training', train_set), ('validation', val_set)):
        missing = [repr(label) for label, count in zip(images.class_names, images.class_counts()) if not count]
        if missing:
            parts.append(f'no {name} image of {len(missing)} of {len(images.class_names)} classes: {some(missing, 5)}')
    return '; '.join(parts)


def write_split(
        folder: Path, train_set: Images, val_set: Images, data_dir: Optional[str], earlier: Set[str]) -> None:
    """Record which images a run trains and validates on, and which ones the run that it starts from had trained on."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(('split', 'image'))
    names = {TRAINING: train_set.relative_names(data_dir), VALIDATION: val_set.relative_names(data_dir)}
    names[EARLIER] = sorted(earlier.difference(*names.values()))
    writer.writerows((split, name) for split, images in names.items() for name in images)
    write(folder / RECORD, text.getvalue().encode('utf-8', 'surrogateescape'))


def read_split(folder: Path) -> Dict[str, str]:
    """The record of a run: 'training', 'validation' or 'earlier training' by the image's name.

    Raises:
        FileNotFoundError: If the folder has no record.
    """
    file = folder / RECORD
    if not file.is_file():
        raise FileNotFoundError(f'{folder} has no {RECORD}: not the folder of a run')
    with file.open(encoding='utf-8', errors='surrogateescape', newline='') as lines:
        return {row['image']: row['split'] for row in csv.DictReader(lines)}


def check_overlap(
        val_set: Images, data_dir: Optional[str], run: Path, run_data_dir: Optional[str], hint: str) -> Set[str]:
    """Return the names of the images that an earlier run was trained on, if no validation image is one of them.

    Args:
        val_set: The validation images.
        data_dir: Folder that their names are relative to.
        run: Folder of the earlier run.
        run_data_dir: Its `data_dir`. Files of the same name in another folder are the same if they have the same size.
        hint: What to do about an overlap.

    Raises:
        ValueError: If validation images are among them.
    """
    trained = {name for name, split in read_split(run).items() if split != VALIDATION}
    found = [name for name in val_set.relative_names(data_dir) if name in trained]
    if data_dir and run_data_dir and os.path.realpath(data_dir) != os.path.realpath(run_data_dir):
        found = [name for name in found if _size(run_data_dir, name) in (None, _size(data_dir, name))]
    if found:
        raise ValueError(
            f'{len(found):,} of {len(val_set):,} validation images are images that {run} was trained on: '
            f'{some(found)}. {hint}')
    return trained


def _size(folder: str, name: str) -> Any:
    try:
        return os.stat(os.path.join(folder, name)).st_size
    except OSError:
        return None


def source_runs(*places: Optional[str]) -> List[Path]:
    """The folders of runs, with a record, among the places that a model's weights come from ('local-dir:RUN/best')."""
    paths = (Path(place.removeprefix('local-dir:')).expanduser() for place in places if place)
    runs = dict.fromkeys(path.parent for path in paths if path.name == 'best')
    return [run for run in runs if (run / RECORD).is_file()]
