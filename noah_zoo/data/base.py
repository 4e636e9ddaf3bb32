"""Images that can be read in any order: what a dataset is."""
import copy
import hashlib
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..text import some
from .images import read_image

TRAINING, VALIDATION = ('train', 'training'), ('validation', 'valid', 'val', 'eval', 'evaluation')


def synonyms(split: str) -> Tuple[str, ...]:
    """The name of a split, and the names that stand for it if there is no split of that name, as in timm.

    Unlike in timm, 'test' does not stand for 'validation': the best epoch would be chosen on the test images.
    """
    return tuple(dict.fromkeys((split, *next((names for names in (TRAINING, VALIDATION) if split in names), ()))))


class Images(Dataset):
    """Images that can be read in any order.

    Attributes:
        task: The built-in task that reads its labels.
        class_names: Names in the order of the labels.
        labels: Label of every row of the source, int64.
        rows: Rows of the source that are in this dataset, in order, int64.
        damaged: Where -> reason, of the images left out.
        transform: Applied to the image by `[]`, not by `read`; timm's loaders set it.
        input_img_mode: The mode in which images are read, 'L', 'RGB' or 'RGBA': the model's, see `mode_of`.
        value_range: The range of 16-bit and floating-point images, as of `convert`: the model's.
    """

    task = 'multiclass'
    input_img_mode = 'RGB'
    value_range: Optional[Tuple[float, float]] = None

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
        """An image of `input_img_mode` and its label.

        Raises:
            DamagedImageError: If the image cannot be read.
            OSError: If its file cannot be.
        """
        row = int(self.rows[index])
        return self._image(row), int(self.labels[row])

    def targets(self) -> Tensor:
        """The labels of all images, as `read` gives them: (images,) class numbers."""
        return torch.from_numpy(self.labels[self.rows])

    def class_counts(self) -> np.ndarray:
        """Number of images of every class, (K,)."""
        return np.bincount(self.labels[self.rows], minlength=len(self.class_names))

    def where(self, index: int) -> str:
        """What a person finds the image by: the file's path, or 'NAME[split] row 17'."""
        return self._where(int(self.rows[index]))

    def state(self) -> str:
        """A hash that changes with the images and their order: of names, labels, and sizes and times of files."""
        digest = hashlib.sha256(self.labels[self.rows].tobytes())
        digest.update(f'{self.value_range}'.encode())
        for index in range(len(self)):
            digest.update(os.fsencode(self.where(index)))
            if os.path.exists(self.where(index)):
                stat = os.stat(self.where(index))
                digest.update(f' {stat.st_size} {stat.st_mtime_ns}'.encode())
        return digest.hexdigest()

    def names(self, data_dir: Optional[str] = None) -> str:
        """A hash of the labels and names, in their order, without the folder that the names may begin with."""
        digest = hashlib.sha256(self.labels[self.rows].tobytes())
        for name in self.relative_names(data_dir):
            digest.update(os.fsencode(name) + b'\0')
        return digest.hexdigest()

    def relative_names(self, data_dir: Optional[str] = None) -> List[str]:
        """What `where` says of every image, relative to a folder, with / between folders on every system."""
        root = os.path.join(str(Path(data_dir)), '') if data_dir else ''
        names = (self.where(index).removeprefix(root) for index in range(len(self)))
        return [name.replace(os.sep, '/') for name in names]

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


class Files(Images):
    """Images in files, `paths`, one per row."""
    paths: Sequence[str]

    def _image(self, row: int) -> Image.Image:
        return read_image(self.paths[row], mode=self.input_img_mode, value_range=self.value_range)

    def _where(self, row: int) -> str:
        return self.paths[row]


class Multilabel(Images):
    """Images with several classes each, or none.

    Attributes:
        labels: (rows, K), 0 or 1, uint8.
    """
    task = 'multilabel'

    def __init__(self, class_names: Sequence[str], labels: np.ndarray) -> None:
        super().__init__(class_names, ())
        self.labels, self.rows = labels, np.arange(len(labels))

    def read(self, index: int) -> Tuple[Image.Image, Tensor]:
        """An image and its classes (K,), 0. or 1. Errors as `Images.read`."""
        row = int(self.rows[index])
        return self._image(row), torch.from_numpy(self.labels[row]).float()

    def targets(self) -> Tensor:
        """(images, K), 0. or 1."""
        return super().targets().float()

    def class_counts(self) -> np.ndarray:
        """Number of images of every class, (K,)."""
        return self.labels[self.rows].sum(axis=0, dtype=np.int64)

    def with_classes(self, class_names: Sequence[str]) -> 'Multilabel':
        """The same images, with columns in the order of another split's or a model's classes.

        Raises:
            ValueError: If there are images of other classes.
        """
        used = self.labels[self.rows].any(axis=0)
        check_classes([n for n, u in zip(self.class_names, used) if u and n not in class_names], class_names)
        index = {name: i for i, name in enumerate(self.class_names)}
        images = self.take(range(len(self)))
        images.class_names = tuple(class_names)
        images.labels = np.stack([
            self.labels[:, index[name]] if name in index else np.zeros(len(self.labels), np.uint8)
            for name in class_names], axis=1)
        return images


def multi_hot(
        lists: Sequence[Sequence[Any]], class_names: Optional[Sequence[str]] = None) -> Tuple[List[str], np.ndarray]:
    """Class names, those found if None, and labels (rows, K) of lists of class names."""
    names = list(class_names or sorted({name for labels in lists for name in labels}))
    index = {name: i for i, name in enumerate(names)}
    hot = np.zeros((len(lists), len(names)), np.uint8)
    for row, labels in enumerate(lists):
        hot[row, [index[name] for name in labels]] = 1
    return [str(name) for name in names], hot


def check_classes(unknown: Sequence[str], known: Sequence[str]) -> None:
    if unknown:
        raise ValueError(
            f'the validation split has {len(unknown)} classes that the training split, of {len(known)}, lacks: '
            f'{some(map(repr, unknown), 10)}')


def class_changes(before: Sequence[str], now: Sequence[str]) -> str:
    """What became of class names, in words; empty if nothing."""
    if list(before) == list(now):
        return ''
    gone, new = ([name for name in names if name not in others] for names, others in (
        (before, set(now)), (now, set(before))))
    changes = [f'{what} {some(map(repr, names), 10)}' for what, names in (('without', gone), ('with', new)) if names]
    return ' and '.join(changes) or f'their order was {some(map(repr, before), 10)}'
