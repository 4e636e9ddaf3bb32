"""Datasets of the Hugging Face Hub, or of a local folder of its layout."""
import os
import re
from typing import Any, Dict, List, Optional, Tuple

from PIL import Image

from ..text import one_line
from .base import Images, Multilabel, multi_hot
from .images import UNREADABLE, DamagedImageError, read_image

FORMATS = (  # which `datasets` takes for names of files' formats, not of datasets
    'arrow', 'csv', 'hdf5', 'imagefolder', 'json', 'lance', 'pandas', 'parquet', 'text', 'webdataset', 'xml')


def source_of(name: str, data_dir: Optional[str]) -> Dict[str, Optional[str]]:
    """What `datasets.load_dataset` and `load_dataset_builder` are given: path, name of the configuration, data_dir,
    cache_dir.

    Args:
        name: 'NAME' or 'USER/NAME' of the Hub, or a folder, with ':CONFIG' or not; or one of `FORMATS`.
        data_dir: The cache; of a format the folder of the files.

    Raises:
        ValueError: If a format comes without its folder, or with a configuration.
    """
    if name.partition(':')[0] in FORMATS:
        if not data_dir or ':' in name:
            raise ValueError(
                f'{name}: {name.partition(":")[0]} is a format without configurations: name the folder of its files '
                f'with --data-dir')
        return dict(path=name, name=None, data_dir=data_dir, cache_dir=None)
    path, _, config = name.rpartition(':')
    if len(path) < 2 or re.search(r'[\\/]', config) or os.path.exists(name):  # C: is no dataset
        path, config = name, ''
    return dict(path=path, name=config or None, data_dir=None, cache_dir=data_dir)


class HubRows(Images):
    """Rows of a dataset of the Hugging Face Hub, or of a local one of its layout."""

    def _open(
            self, name: str, data_dir: Optional[str], split: str, input_key: str, target_key: str,
    ) -> Tuple[List[str], List[Any]]:
        """Names of the label column's classes, none if it has no names, and its values.

        Raises:
            FileNotFoundError: If there is no such dataset.
            ValueError: If there is no such split, configuration or column, or it has no images.
        """
        import datasets
        self.name, self.split = name, split
        try:
            dataset = datasets.load_dataset(**source_of(name, data_dir), split=split)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            hint = '; choose one as hfds/NAME:CONFIG' if 'onfig' in str(error) and ':' not in name else ''
            reasons = []  # the cause of "An error occurred while generating the dataset"
            while error is not None:
                reasons.append(one_line(error))
                error = error.__cause__
            raise ValueError(f'hfds/{name}: {": ".join(reasons)} (split {split!r}){hint}') from None
        columns = {column: kind for column, kind in dataset.features.items() if column != input_key}
        images = dataset.features.get(input_key)
        if images is None:
            raise ValueError(
                f'hfds/{name}: no images in a column {input_key!r} (--input-key); the others are {", ".join(columns)}')
        if not isinstance(images, datasets.Image) and not _is_path_or_bytes(images):
            kind = 'a list of images' if _inner(images) is not images else f'{images}'
            raise ValueError(f'hfds/{name}: column {input_key!r} has {kind} in a row; expected one image')
        if target_key not in columns:
            raise ValueError(
                f'hfds/{name}: no column {target_key!r} for the labels (--target-key), only '
                f'{", ".join(dataset.column_names)}')
        self.input_key = input_key
        if not isinstance(images, datasets.Image):  # which are cast from small strings and bytes only
            dataset = dataset.cast_column(input_key, datasets.Value('binary' if _is_bytes(images) else 'string'))
        self.dataset = dataset.cast_column(input_key, datasets.Image(decode=False))
        names = getattr(_inner(columns[target_key]), 'names', None) or []
        return names, dataset.select_columns(target_key)[target_key][:]

    def _image(self, row: int) -> Image.Image:
        where, cell = self._where(row), self.dataset[row][self.input_key]
        if cell is None:
            raise DamagedImageError(f'{where}{UNREADABLE}the row has no image')
        return read_image(cell['bytes'] or cell['path'], where, self.input_img_mode, self.value_range)

    def _where(self, row: int) -> str:
        return f'{self.name}[{self.split}] row {row}'

    def state(self) -> str:
        return f'{super().state()} {self.dataset._fingerprint}'


def _is_bytes(kind: Any) -> bool:
    """Whether a column has binary data, of whatever size of offsets."""
    import pyarrow.types as types
    return types.is_binary(kind.pa_type) or types.is_large_binary(kind.pa_type) or types.is_binary_view(kind.pa_type)


def _is_path_or_bytes(kind: Any) -> bool:
    import pyarrow.types as types
    text = types.is_string, types.is_large_string, types.is_string_view
    if getattr(kind, 'pa_type', None) is None:
        return False
    return _is_bytes(kind) or any(is_text(kind.pa_type) for is_text in text)


def _inner(kind: Any) -> Any:
    """The kind of a list's items; of what is no list, itself."""
    return kind[0] if isinstance(kind, list) else getattr(kind, 'feature', kind)


class HubImages(HubRows):
    """`HubRows` with one class each: those of the label column; of one without names, they are called by its values.

    Args:
        name: 'NAME', 'NAME:CONFIG', a folder or a format; see `source_of`.
        data_dir: The cache, the library's own if None; of a format the folder of the files.
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
        labels = [int(label) if isinstance(label, float) and label.is_integer() else label for label in labels]
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
