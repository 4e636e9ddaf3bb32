"""From a name to the images of a run."""
import logging
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple, Union

from ..config import TrainConfig
from ..text import some
from .annotated import Coco, INaturalist
from .base import Images, check_classes
from .damage import leave_out_damaged, scan
from .fashion_mnist import FASHION_MNIST_DIR, FashionMnist
from .folder import Folder, LeafFolder
from .hub import HubImages, HubLists
from .images import UNREADABLE, mode_of
from .market import Market
from .split import missing_classes, read_split, split_images
from .streams import Stream
from .table import Csv, CsvLists

_logger = logging.getLogger(__name__)

FOLDERS: Dict[str, Callable[..., Images]] = {  # what is read from a folder, of folder and split
    'fashion_mnist': FashionMnist, 'folder': Folder, 'leaf_folder': LeafFolder, 'inaturalist': INaturalist,
    'coco': Coco, 'csv': Csv, 'market1501': Market}
DATASETS = ', '.join((*FOLDERS, 'hfds/NAME', 'hfids/NAME', 'wds/'))


def create_dataset(
        name: str, data_dir: Optional[str], split: str, *, task: str = 'multiclass', training: bool = False,
        seed: int = 0, skip_damaged: bool = False, input_key: Optional[str] = None, target_key: Optional[str] = None,
        without_labels: bool = False, label_separator: Optional[str] = None,
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
        input_key: Column of the images, of 'hfds/', 'hfids/' and 'csv'; their file extensions for 'wds/'.
        target_key: Column of the labels; key in the JSON files for 'wds/'.
        without_labels: Keep images of 'coco' that have no annotation.
        label_separator: As of `CsvLists`.

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If the name, split or labels are not as described, or a folder has to be named and is not.
    """
    prefix, slash, rest = name.partition('/')
    if data_dir and Path(data_dir).is_file():
        raise NotADirectoryError(f'{data_dir} is a file, and --data-dir takes a folder; unpack it if it is an archive')
    if name in FOLDERS:
        data_dir = data_dir or (str(FASHION_MNIST_DIR) if name == 'fashion_mnist' else None)
        if not data_dir:
            raise ValueError(f'{name}: name the folder of the data with --data-dir')
        if name == 'csv' and task == 'multilabel':
            return CsvLists(data_dir, split, input_key, target_key, label_separator)
        options = {
            'coco': dict(without_labels=without_labels), 'csv': dict(input_key=input_key, target_key=target_key)}
        return FOLDERS[name](data_dir, split, **options.get(name, {}))
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
            without_labels=config.without_labels, label_separator=config.label_separator)

    if config.split_from and not config.val_fraction:
        raise ValueError('split_from is for data without a validation split; give --val-fraction for the new images')
    train_set = create(config.train_split, True)
    if train_set.task != reads:
        raise ValueError(f'{config.dataset} is for --task {train_set.task}, and the task is {config.task}')
    if config.val_fraction:
        if isinstance(train_set, Stream):
            raise ValueError(f'{config.dataset}: val_fraction={config.val_fraction} needs a dataset that is no stream')
        record = read_split(Path(config.split_from)) if config.split_from else None
        train_set, val_set = split_images(train_set, config.val_fraction, config.seed, config.data_dir, record)
    else:
        try:
            val_set = create(config.val_split, False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'{error}; choose --val-split, or hold out training images with --val-fraction') from None
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
    train_set.value_range = val_set.value_range = config.value_range
    if config.skip_damaged and isinstance(train_set, Images):
        train_set, val_set = (leave_out_damaged(images, config.workers, damaged) for images in (train_set, val_set))
    missing = missing_classes(train_set, val_set)
    if missing:
        _logger.warning('%s: %s', config.dataset, missing)
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
    parts, values, splits = [], None, create_datasets(config, reads=reads)
    check(*splits)
    for split, images in zip(('training', 'validation'), splits):
        if isinstance(images, Stream):
            raise ValueError(f'{config.dataset}: a stream cannot be checked but by training on it')
        found = scan(images, config.workers)
        if found.damaged:
            lines = (f'{images.where(index)}{UNREADABLE}{reason}' for index, reason in found.damaged.items())
            raise ValueError(
                f'{len(found.damaged)} of {len(images):,} {split} images cannot be read; mend them or give '
                f'--skip-damaged: {some(lines, 10, "; ")}')
        parts.append(f'{len(images):,} {split} images')
        values = values | found.values if values else found.values
    remarks = [missing_classes(*splits), values.remark() if values else '']
    return '; '.join((
        f'{config.dataset}: {" and ".join(parts)} of {len(images.class_names)} classes, all of them readable',
        *filter(None, remarks)))
