"""From a name to the images of a run."""
import logging
from typing import Callable, Dict, Optional, Tuple, Union

import numpy as np

from ..config import TrainConfig
from ..text import some
from .annotated import Coco, Csv, INaturalist
from .base import Images, check_classes
from .damage import find_damaged, leave_out_damaged
from .fashion_mnist import FASHION_MNIST_DIR, FashionMnist
from .folder import Folder, LeafFolder
from .hub import HubImages, HubLists
from .images import UNREADABLE, mode_of
from .market import Market
from .streams import Stream

_logger = logging.getLogger(__name__)

FOLDERS: Dict[str, Callable[..., Images]] = {  # what is read from a folder, of folder and split
    'fashion_mnist': FashionMnist, 'folder': Folder, 'leaf_folder': LeafFolder, 'inaturalist': INaturalist,
    'coco': Coco, 'csv': Csv,
    'market1501': Market}
DATASETS = ', '.join((*FOLDERS, 'hfds/NAME', 'hfids/NAME', 'wds/'))


def create_dataset(
        name: str, data_dir: Optional[str], split: str, *, task: str = 'multiclass', training: bool = False,
        seed: int = 0, skip_damaged: bool = False, input_key: Optional[str] = None, target_key: Optional[str] = None,
        without_labels: bool = False,
) -> Union[Images, Stream]:
    """One split of a dataset.

    Args:
        name: 'fashion_mnist', 'folder', 'leaf_folder', 'hfds/NAME', 'hfids/NAME' (streaming), 'wds/', 'inaturalist';
            with several classes per image 'coco', 'csv', or 'hfds/NAME'.
        data_dir: Folder of the images, IDX files, shards or annotations; for 'hfds/' and 'hfids/' the cache.
        split: 'train', or the name of the split to evaluate.
        task: The built-in task whose labels are wanted: 'hfds/' may have those of 'multiclass' or 'multilabel'.
        training: Shuffle a stream.
        seed: Random seed of that.
        skip_damaged: Leave damaged images out of a stream.
        input_key: Column of the images, of 'hfds/' and 'hfids/'; their file extensions for 'wds/'.
        target_key: Column of the labels; key in the JSON files for 'wds/'.
        without_labels: Keep images of 'coco' that have no annotation.

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If the name, split or labels are not as described, or a folder has to be named and is not.
    """
    prefix, slash, rest = name.partition('/')
    if name in FOLDERS:
        data_dir = data_dir or (str(FASHION_MNIST_DIR) if name == 'fashion_mnist' else None)
        if not data_dir:
            raise ValueError(f'{name}: name the folder of the data with --data-dir')
        options = dict(without_labels=without_labels) if name == 'coco' else {}
        return FOLDERS[name](data_dir, split, **options)
    if prefix.lower() == 'hfds' and rest:
        return (HubLists if task == 'multilabel' else HubImages)(rest, data_dir, split, input_key, target_key)
    if prefix.lower() == 'hfids' and rest or prefix.lower() == 'wds' and slash:
        return Stream(name, data_dir, split, training, seed, skip_damaged, input_key, target_key)
    raise ValueError(f'no dataset {name!r}; accepted are {DATASETS}')


def create_datasets(
        config: TrainConfig, damaged: Optional[Dict[str, str]] = None, reads: Optional[str] = None,
) -> Tuple[Union[Images, Stream], Union[Images, Stream]]:
    """The images to train on and to evaluate on.

    With `config.skip_damaged` all images are read once, each process of an initialised `torch.distributed` reading its
    share, and the damaged ones are left out of `Images` and listed in `damaged`. So the order of an epoch depends on
    the seed alone. A `Stream` leaves them out as it meets them.

    Args:
        config: The settings.
        damaged: Where -> reason, as found by an earlier run; then no image is read.
        reads: The built-in task whose labels are wanted, `Task.reads`; `config.task` itself if None.

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If the validation split has other classes, is the training split, or a split is empty.
    """
    reads = reads or config.task

    def create(split: str, training: bool) -> Union[Images, Stream]:
        return create_dataset(
            config.dataset, config.data_dir, split, task=reads, training=training, seed=config.seed,
            skip_damaged=config.skip_damaged, input_key=config.input_key, target_key=config.target_key,
            without_labels=config.without_labels)

    train_set = create(config.train_split, True)
    if train_set.task != reads:
        raise ValueError(f'{config.dataset} is for --task {train_set.task}, and the task is {config.task}')
    if config.val_fraction:
        if isinstance(train_set, Stream):
            raise ValueError(f'{config.dataset}: val_fraction={config.val_fraction} needs a dataset that is no stream')
        train_set, val_set = split_images(train_set, config.val_fraction, config.seed)
    else:
        val_set = create(config.val_split, False)
        if isinstance(train_set, Folder) and config.train_split != config.val_split and train_set.root == val_set.root:
            raise ValueError(
                f'folder: {train_set.root} has no folder for split {config.val_split!r}; choose a --val-fraction')
        if isinstance(val_set, Images):
            val_set = val_set.with_classes(train_set.class_names)
        elif val_set.class_names != train_set.class_names:
            check_classes(
                [name for name in val_set.class_names if name not in train_set.class_names], train_set.class_names)
            raise ValueError(f'{config.dataset}: the classes of {config.val_split!r} are not those of '
                             f'{config.train_split!r} in the same order')
    if config.skip_damaged and isinstance(train_set, Images):
        train_set, val_set = (leave_out_damaged(images, config.workers, damaged) for images in (train_set, val_set))
    _logger.info(
        '%s: %s training images, %s validation images, %d classes', config.dataset, f'{len(train_set):,}',
        f'{len(val_set):,}', len(train_set.class_names))
    return train_set, val_set


def check_data(
        config: TrainConfig, reads: Optional[str] = None, check: Callable[[Images, Images], None] = lambda *_: None,
) -> str:
    """Look at everything of the training and the validation split that could stop a run, and read every image once.

    Args:
        config: The settings.
        reads: As of `create_datasets`.
        check: Raises ValueError if a task cannot do with the images of training and validation.

    Returns:
        A line on what is there.

    Raises:
        FileNotFoundError, ValueError: As `create_datasets`; or with the images that cannot be read.
    """
    mode_of(config.model_kwargs.get('in_chans', 3))
    parts, splits = [], create_datasets(config, reads=reads)
    check(*splits)
    for split, images in zip(('training', 'validation'), splits):
        if isinstance(images, Stream):
            raise ValueError(f'{config.dataset}: a stream cannot be checked but by training on it')
        damaged = find_damaged(images, config.workers)
        if damaged:
            lines = (f'{images.where(index)}{UNREADABLE}{reason}' for index, reason in damaged.items())
            raise ValueError(
                f'{len(damaged)} of {len(images):,} {split} images cannot be read; mend them or give --skip-damaged: '
                f'{some(lines, 10, "; ")}')
        parts.append(f'{len(images):,} {split} images')
    return f'{config.dataset}: {" and ".join(parts)} of {len(images.class_names)} classes, all of them readable'


def split_images(images: Images, fraction: float, seed: int) -> Tuple[Images, Images]:
    """Hold out a fraction of the images, and nearly the same one of each class where an image has one. A class keeps at
    least one image.

    Raises:
        ValueError: If the fraction is not between 0 and 1, or so small that it holds out none.
    """
    if not 0 < fraction < 1:
        raise ValueError(f'val_fraction={fraction} is not between 0 and 1')
    labels = images.strata()
    counts = np.bincount(labels, minlength=labels.max(initial=0) + 1)
    shares = np.minimum(fraction * counts, np.maximum(counts - 1, 0))
    held_out = np.floor(shares).astype(np.int64)
    missing = min(round(fraction * len(labels)), int(np.ceil(shares).sum())) - held_out.sum()
    largest_remainders = np.argsort(held_out - shares, kind='stable')
    held_out[largest_remainders[:missing]] += 1
    if not held_out.sum():
        raise ValueError(f'val_fraction={fraction} of {len(labels)} images in {len(counts)} classes holds out none')
    rng = np.random.RandomState(seed)  # the one generator of NumPy that never changes
    val = np.zeros(len(labels), bool)
    for label, count in enumerate(held_out):
        val[rng.permutation(np.flatnonzero(labels == label))[:count]] = True
    return images.take(np.flatnonzero(~val)), images.take(np.flatnonzero(val))
