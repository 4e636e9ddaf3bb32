"""Floor 4: datasets of images with one class each. Everything but Fashion-MNIST's IDX files is found by timm.data."""
import copy
import gzip
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import timm.data
import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..catalog import FASHION_MNIST_CLASSES
from ..images import UNREADABLE, DamagedImageError, read_image
from .config import TrainConfig
from .streams import Stream

_logger = logging.getLogger(__name__)

FASHION_MNIST_DIR = Path('/usr/share/datasets/fashion-mnist')  # Debian's package dataset-fashion-mnist
DATASETS = 'fashion_mnist, folder, hfds/NAME, hfids/NAME, wds/, coco, inaturalist, csv, market1501'
SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')


class Images(Dataset):
    """Images that can be read in any order.

    Attributes:
        class_names: Names in the order of the labels.
        labels: Label of every row of the source, int64.
        rows: Rows of the source that are in this dataset, in order, int64.
        damaged: Where -> reason, of the images left out.
        transform: Applied to the image by `[]`, not by `read`; timm's loaders set it.
    """

    def __init__(self, class_names: Sequence[str], labels: Sequence[int]) -> None:
        self.class_names: Tuple[str, ...] = tuple(class_names)
        self.labels = np.asarray(labels, np.int64)
        self.rows = np.arange(len(self.labels))
        self.damaged: Dict[str, str] = {}
        self.transform: Optional[Callable] = None
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(wrong):
            raise ValueError(
                f'{self.where(wrong[0])}: the label is {self.labels[wrong[0]]}, accepted are 0 to '
                f'{len(self.class_names) - 1} ({len(wrong)} such images)')

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image, label = self.read(index)
        return image if self.transform is None else self.transform(image), label

    def read(self, index: int) -> Tuple[Image.Image, int]:
        """An RGB image and its label.

        Raises:
            DamagedImageError: If the image cannot be read.
            OSError: If its file cannot be.
        """
        row = int(self.rows[index])
        return self._image(row), int(self.labels[row])

    def where(self, index: int) -> str:
        """What a person finds the image by: the file's path, or 'NAME[split] row 17'."""
        return self._where(int(self.rows[index]))

    def state(self) -> str:
        """A hash that changes with the images and their order: of names, labels, and sizes and times of files."""
        digest = hashlib.sha256(self.labels[self.rows].tobytes())
        for index in range(len(self)):
            digest.update(self.where(index).encode())
            if os.path.exists(self.where(index)):
                stat = os.stat(self.where(index))
                digest.update(f' {stat.st_size} {stat.st_mtime_ns}'.encode())
        return digest.hexdigest()

    def take(self, indices: Sequence[int]) -> 'Images':
        """Some of the images, in the order given, from the same source."""
        images = copy.copy(self)
        images.rows = self.rows[np.asarray(indices, np.int64)]
        return images

    def with_classes(self, class_names: Sequence[str]) -> 'Images':
        """The same images, labelled in the order of another split's or a model's classes, some of which may lack.

        Raises:
            ValueError: If there are images of other classes.
        """
        if tuple(class_names) == self.class_names:
            return self
        index = {name: i for i, name in enumerate(class_names)}
        used = [self.class_names[i] for i in np.unique(self.labels[self.rows])]
        check_classes([name for name in used if name not in index], class_names)
        images = copy.copy(self)
        images.class_names = tuple(class_names)
        images.labels = np.array([index.get(name, -1) for name in self.class_names], np.int64)[self.labels]
        return images

    def _image(self, row: int) -> Image.Image:
        raise NotImplementedError

    def _where(self, row: int) -> str:
        raise NotImplementedError


class FashionMnist(Images):
    """Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist) from its four IDX files, plain or gzipped.

    Args:
        root: Folder of the files.
        split: 'train' (60,000 images) or 'test' (10,000).
        transform: Applied to the RGB image of 28 x 28 pixels.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `split` is unknown, or a file is damaged.
    """

    def __init__(self, root: Path, split: str, transform: Optional[Callable] = None) -> None:
        prefixes = {'train': 'train', 'test': 't10k', 'validation': 't10k'}
        if split not in prefixes:
            raise ValueError(f"fashion_mnist: split={split!r} is not one of 'train', 'test'")
        self.split = split
        self.images = read_idx(Path(root), f'{prefixes[split]}-images-idx3-ubyte')
        labels = read_idx(Path(root), f'{prefixes[split]}-labels-idx1-ubyte')
        if self.images.ndim != 3 or labels.shape != self.images.shape[:1]:
            raise ValueError(
                f'fashion_mnist: {root} has images of shape {self.images.shape} and labels of shape {labels.shape} for '
                f'split={split!r}')
        super().__init__(FASHION_MNIST_CLASSES, labels)
        self.transform = transform

    def _image(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row]).convert('RGB')

    def _where(self, row: int) -> str:
        return f'fashion_mnist[{self.split}] row {row}'

    def state(self) -> str:
        return f'{super().state()} {hashlib.sha256(self.images).hexdigest()}'


def read_idx(root: Path, name: str) -> np.ndarray:
    """Read an IDX file of unsigned bytes, `name` or `name.gz` under `root`.

    Raises:
        FileNotFoundError: If neither exists.
        ValueError: If it is not such a file or is cut short.
    """
    path = next((path for path in (root / name, root / f'{name}.gz') if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f'fashion_mnist: neither {name} nor {name}.gz is in {root}. Install the Debian package '
            f'dataset-fashion-mnist, name the folder of the IDX files with --data-dir, or use '
            f'--dataset hfds/zalando-datasets/fashion_mnist')
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f'fashion_mnist: {path} is damaged: {error}') from None
    rank = data[3] if data[:3] == b'\x00\x00\x08' else 0
    shape = np.frombuffer(data, '>u4', rank, 4) if 0 < rank < 4 and len(data) >= 4 + 4 * rank else ()
    if not len(shape) or len(data) != 4 + 4 * rank + int(np.prod(shape)):
        raise ValueError(f'fashion_mnist: {path} is not a whole IDX file of unsigned bytes ({len(data)} bytes)')
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


class Folder(Images):
    """A folder per class, by timm's reader: a class is called by the innermost folder, in natural order.

    Args:
        data_dir: Folder of the splits' folders, or of one split.
        split: 'train', 'validation' or the name of a folder; timm takes `val` for 'validation' and so on.

    Raises:
        FileNotFoundError: If there is no such folder, or `data_dir` has other splits only.
        ValueError: If it has no images, or images outside of class folders.
    """

    def __init__(self, data_dir: str, split: str) -> None:
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f'folder: {data_dir} is not a folder')
        extensions = sorted({*timm.data.get_img_extensions(), *IMG_EXTENSIONS})  # timm's own are .png, .jpg and .jpeg
        try:
            dataset = timm.data.create_dataset('', root=data_dir, split=split, input_key=';'.join(extensions))
        except RuntimeError as error:  # timm's 'Found 0 images'
            raise ValueError(f'folder: {error}') from None
        self.reader = dataset.reader
        self.root = Path(self.reader.root)
        others = [name for name in SPLITS if (self.root / name).is_dir()]
        if self.root == Path(data_dir) and others:  # timm falls back on the whole of it
            raise FileNotFoundError(f'folder: {data_dir} has {"/, ".join(others)}/, but no folder for split {split!r}')
        idx_to_class = {index: name for name, index in self.reader.class_to_idx.items()}
        super().__init__(
            [idx_to_class[i] for i in range(len(idx_to_class))], [label for _, label in self.reader.samples])
        if '' in self.class_names:
            raise ValueError(f'folder: {self.where(list(self.labels).index(self.class_names.index("")))} is an image '
                             f'outside of class folders')
        start = len(str(self.root)) + 1
        filled = {path[start:].split(os.sep, 1)[0] for path, _ in self.reader.samples}
        empty = sorted(path.name for path in self.root.iterdir() if path.is_dir() and path.name not in filled)
        if empty:
            _logger.warning('%s: no images in %s, which are no classes therefore', self.root, ', '.join(empty))

    def _image(self, row: int) -> Image.Image:
        return read_image(self.reader.samples[row][0])

    def _where(self, row: int) -> str:
        return str(self.reader.samples[row][0])


class HubRows(Images):
    """Rows of a dataset of the Hugging Face Hub, or of a local one of its layout, by timm's 'hfds/' reader."""

    def _open(
            self, name: str, data_dir: Optional[str], split: str, input_key: str, target_key: str,
    ) -> Tuple[List[str], List[Any]]:
        """Names of the label column's classes, none if it has no names, and its values.

        Raises:
            FileNotFoundError: If there is no such dataset.
            ValueError: If there is no such split or column.
        """
        self.name, self.split = name, split
        try:
            dataset = timm.data.create_dataset(
                f'hfds/{name}', root=data_dir, split=split, input_key=input_key, target_key=target_key)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f'hfds/{name}: {_one_line(error)} (split {split!r})') from error
        self.reader = dataset.reader
        columns = self.reader.dataset.column_names
        if self.reader.dataset.data.column(input_key).null_count == len(self.reader) > 0:  # timm adds a lacking one
            columns = ', '.join(name for name in columns if name != input_key)
            raise ValueError(f'hfds/{name}: no images in a column {input_key!r}; the others are {columns}')
        if target_key not in columns:
            raise ValueError(f'hfds/{name}: no column {target_key!r} for the labels, only {", ".join(columns)}')
        names = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get)
        return names, self.reader.dataset.select_columns(target_key)[target_key][:]

    def _image(self, row: int) -> Image.Image:
        where = self._where(row)
        try:
            file, *_ = self.reader[row]
        except (AssertionError, TypeError):  # the cell is null
            raise DamagedImageError(f'{where}{UNREADABLE}the row has no image') from None
        with file:
            return read_image(file.read(), where)

    def _where(self, row: int) -> str:
        return f'{self.name}[{self.split}] row {row}'

    def state(self) -> str:
        return f'{super().state()} {self.reader.dataset._fingerprint}'


class HubImages(HubRows):
    """`HubRows` with one class each: those of the label column; of one without names, they are called by its values.

    Args:
        name: What `datasets.load_dataset` takes.
        data_dir: Cache; the library's own if None.
        split: A split, or a slice of one: 'train[:1000]'.
        input_key: Column of the images; 'image' if None.
        target_key: Column of the labels; 'label' if None.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If there is no such split or column, or the labels are not one class per image.
    """

    def __init__(
            self, name: str, data_dir: Optional[str], split: str, input_key: Optional[str] = None,
            target_key: Optional[str] = None,
    ) -> None:
        names, labels = self._open(name, data_dir, split, input_key or 'image', target_key or 'label')
        wrong = next((i for i, label in enumerate(labels) if not isinstance(label, (int, str))), None)
        if wrong is not None:
            raise ValueError(f'{self._where(wrong)}: the label {labels[wrong]!r} is not one class')
        if not names:
            values = sorted(set(labels))
            index = {value: i for i, value in enumerate(values)}
            names, labels = [str(value) for value in values], [index[label] for label in labels]
        super().__init__(names, labels)


def create_dataset(
        name: str, data_dir: Optional[str], split: str, *, task: str = 'multiclass', training: bool = False,
        seed: int = 0, skip_damaged: bool = False, input_key: Optional[str] = None, target_key: Optional[str] = None,
        without_labels: bool = False,
) -> Union[Images, Stream]:
    """One split of a dataset.

    Args:
        name: 'fashion_mnist', 'folder', 'hfds/NAME', 'hfids/NAME' (streaming), 'wds/', 'inaturalist'; with several
            classes per image 'coco', 'csv', or 'hfds/NAME'.
        data_dir: Folder of the images, IDX files, shards or annotations; for 'hfds/' and 'hfids/' the cache.
        split: 'train', or the name of the split to evaluate.
        task: 'multiclass' or 'multilabel', which 'hfds/' asks for.
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
    from .annotated import ANNOTATED, HubLists  # which are made of what is here
    from .reid import Market

    prefix, slash, rest = name.partition('/')
    if name in (*ANNOTATED, 'market1501'):
        if not data_dir:
            raise ValueError(f'{name}: name the folder of the annotations with --data-dir')
        if name == 'coco':
            return ANNOTATED[name](data_dir, split, without_labels)
        return ANNOTATED.get(name, Market)(data_dir, split)
    if name == 'fashion_mnist':
        return FashionMnist(Path(data_dir) if data_dir else FASHION_MNIST_DIR, split)
    if name == 'folder':
        if not data_dir:
            raise ValueError('folder: name the folder that has train/ and validation/ with --data-dir')
        return Folder(data_dir, split)
    if prefix.lower() == 'hfds' and rest:
        return (HubLists if task == 'multilabel' else HubImages)(rest, data_dir, split, input_key, target_key)
    if prefix.lower() == 'hfids' and rest or prefix.lower() == 'wds' and slash:
        return Stream(name, data_dir, split, training, seed, skip_damaged, input_key, target_key)
    raise ValueError(f'no dataset {name!r}; accepted are {DATASETS}')


def create_datasets(
        config: TrainConfig, damaged: Optional[Dict[str, str]] = None,
) -> Tuple[Union[Images, Stream], Union[Images, Stream]]:
    """The images to train on and to evaluate on.

    With `config.skip_damaged` all images are read once, each process of an initialised `torch.distributed` reading its
    share, and the damaged ones are left out of `Images` and listed in `damaged`. So the order of an epoch depends on
    the seed alone. A `Stream` leaves them out as it meets them.

    Args:
        config: The settings.
        damaged: Where -> reason, as found by an earlier run; then no image is read.

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If the validation split has other classes, is the training split, or a split is empty.
    """
    def create(split: str, training: bool) -> Union[Images, Stream]:
        return create_dataset(
            config.dataset, config.data_dir, split, task=config.task, training=training, seed=config.seed,
            skip_damaged=config.skip_damaged, input_key=config.input_key, target_key=config.target_key,
            without_labels=config.without_labels)

    train_set = create(config.train_split, True)
    found = 'reid' if config.dataset == 'market1501' else (
        'multilabel' if isinstance(train_set, Images) and train_set.labels.ndim == 2 else 'multiclass')
    if found != config.task:
        raise ValueError(f'{config.dataset} is for --task {found}, and the task is {config.task}')
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


def check_data(config: TrainConfig) -> str:
    """Look at everything of the training and the validation split that could stop a run, and read every image once.

    Returns:
        A line on what is there.

    Raises:
        FileNotFoundError, ValueError: As `create_datasets`; or with the images that cannot be read.
    """
    parts = []
    for split, images in zip(('training', 'validation'), create_datasets(config)):
        if isinstance(images, Stream):
            raise ValueError(f'{config.dataset}: a stream cannot be checked but by training on it')
        damaged = find_damaged(images, config.workers)
        if damaged:
            lines = [f'{images.where(i)}{UNREADABLE}{reason}' for i, reason in list(damaged.items())[:10]]
            more = f' and {len(damaged) - 10} more' if len(damaged) > 10 else ''
            raise ValueError(
                f'{len(damaged)} of {len(images):,} {split} images cannot be read; mend them or give --skip-damaged: '
                f'{"; ".join(lines)}{more}')
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
    labels = images.labels[images.rows]
    if labels.ndim == 2:  # several classes each: as they come
        labels = np.zeros(len(labels), np.int64)
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


def leave_out_damaged(images: Images, workers: int = 0, damaged: Optional[Dict[str, str]] = None) -> Images:
    """Images without those that cannot be read, which `damaged` of the result lists.

    Args:
        images: Images.
        workers: Processes that read them.
        damaged: Where -> reason, if known; then none is read.

    Raises:
        ValueError: If none is left.
    """
    if damaged is None:
        found = find_damaged(images, workers)
    else:
        places = ((i, images.where(i)) for i in range(len(images) if damaged else 0))
        found = {i: damaged[where] for i, where in places if where in damaged}
    for index, reason in found.items():
        _logger.warning('left out: %s%s%s', images.where(index), UNREADABLE, reason)
    if found:
        _logger.warning('left out %d of %d images', len(found), len(images))
    result = images.take([i for i in range(len(images)) if i not in found])
    result.damaged = {images.where(index): reason for index, reason in found.items()}
    if not len(result):
        raise ValueError(f'all {len(images)} images are damaged, as is {images.where(0)}' if found else 'no images')
    return result


def find_damaged(images: Images, workers: int = 0) -> Dict[int, str]:
    """Read every image once, with a progress bar, and say why some cannot be: index -> reason, in order.

    The processes of an initialised `torch.distributed` read a share each, and all get the whole answer.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    indices = range(rank, len(images), world)
    loader = DataLoader(_Reasons(images, indices), batch_size=16, num_workers=workers, collate_fn=list)
    found: Dict[int, str] = {}
    with tqdm(total=len(indices), desc='reading images', unit='image', disable=rank > 0, leave=False) as progress:
        for reasons in loader:
            found.update((index, reason) for index, reason in reasons if reason is not None)
            progress.update(len(reasons))
    if world > 1:
        parts: List[Dict[int, str]] = [{}] * world
        torch.distributed.all_gather_object(parts, found)
        found = {index: reason for part in parts for index, reason in part.items()}
    return dict(sorted(found.items()))


class _Reasons(Dataset):
    """(index, why the image cannot be read or None)."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Tuple[int, Optional[str]]:
        index = self.indices[item]
        try:
            self.images.read(index)
        except DamagedImageError as error:
            return index, str(error).removeprefix(f'{self.images.where(index)}{UNREADABLE}')
        return index, None


def check_classes(unknown: Sequence[str], known: Sequence[str]) -> None:
    if unknown:
        more = f' and {len(unknown) - 10} more' if len(unknown) > 10 else ''
        raise ValueError(
            f'the validation split has {len(unknown)} classes that the training split, of {len(known)}, lacks: '
            f'{", ".join(map(repr, unknown[:10]))}{more}')


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
