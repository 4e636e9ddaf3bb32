"""Datasets of the Hugging Face Hub, or of a local folder of its layout."""
from typing import Any, List, Optional, Tuple

import timm.data
from PIL import Image

from ..text import one_line
from .base import Images, Multilabel, multi_hot
from .images import UNREADABLE, DamagedImageError, read_image


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
                f'hfds/{name}: {one_line(error)} (split {split!r})') from error
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
            return read_image(file.read(), where, self.input_img_mode)

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


class HubLists(HubRows, Multilabel):
    """`HubRows` with a list of classes each, in column 'labels' if None; of one without names, they are its values.

    Raises:
        FileNotFoundError, ValueError: As `HubImages`; or if a cell is no list of classes.
    """

    def __init__(
            self, name: str, data_dir: Optional[str], split: str, input_key: Optional[str] = None,
            target_key: Optional[str] = None) -> None:
        names, lists = self._open(name, data_dir, split, input_key or 'image', target_key or 'labels')
        for row, labels in enumerate(lists):
            unknown = [label for label in labels if names and label not in range(len(names))] if isinstance(
                labels, list) else [labels]
            if unknown:
                raise ValueError(f'{self._where(row)}: the labels {labels!r} are no list of classes')
        super().__init__(*multi_hot([[names[i] for i in x] if names else x for x in lists], names))
