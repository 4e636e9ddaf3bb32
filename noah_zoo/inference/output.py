"""Predictions as a file that grows image by image, and goes on where it was left."""
import csv
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Sequence

from ..files import check_writable

SUFFIXES = '.csv', '.jsonl'
FIELDS = 'label', 'index', 'probability'


def check_output(path: Path) -> None:
    """Raise ValueError if the suffix is not one of `SUFFIXES`, OSError as `check_writable`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f'{path}: predictions are written to a file that ends with {" or ".join(SUFFIXES)}')
    check_writable(path)


class PredictionFile:
    """A row per image, in the order of the images: 'path', 'model', the classes, and 'error' for one that could not be
    read. In '.csv' the classes are columns, 'label_1', 'index_1', 'probability_1' and so on, in '.jsonl' a list
    'predictions' as `predict` gives it.

    A file that is there goes on after its last whole row; what is torn behind that is cut off.

    Args:
        path: The file.
        model: The model's name.
        top_k: Classes of an image.
        images: All images that the file is for, in order.

    Attributes:
        done (int): How many rows there are.
        failed (int): How many of them are of images that could not be read.

    Raises:
        FileNotFoundError: If there is no such folder.
        OSError: If the file cannot be read or written.
        ValueError: If it is of another model, another number of classes or other images, or something else.
    """

    def __init__(self, path: Path, model: str, top_k: int, images: Sequence[str]) -> None:
        check_output(path)
        self.path, self.model, self.top_k = path, model, top_k
        self.is_csv = path.suffix == '.csv'
        self.done = self.failed = end = 0
        if path.exists():
            with path.open('rb') as file:
                lines = _Lines(file)
                try:
                    for row in _rows_of_csv(lines) if self.is_csv else _rows_of_json(lines):
                        end = lines.end
                        self._check(row, images)
                        self.done += row.path is not None
                        self.failed += row.failed
                except (csv.Error, LookupError, TypeError, UnicodeError, json.JSONDecodeError):
                    raise ValueError(
                        f'{path}: not a file of predictions, from byte {end:,} on; name another --output') from None
                begins = (','.join(_columns(top_k)) + '\r\n' if self.is_csv else '{"path": ').encode()
                file.seek(0)
                torn = b'' if end else file.read(len(begins))
                if not begins.startswith(torn):  # what is torn is not of this
                    raise ValueError(f'{path}: not a file of predictions; name another --output')
            os.truncate(path, end)
        # rows end as csv has it, so that it quotes names with either character in them
        self.file = path.open('a', encoding='utf-8', errors='surrogateescape', newline='', buffering=1)
        self.writer = csv.writer(self.file)
        if self.is_csv and not end:
            self.writer.writerow(_columns(top_k))

    def __enter__(self) -> 'PredictionFile':
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def add(self, result: Dict[str, Any]) -> None:
        """Add what `predict` gives for the next image; it is in the file at once."""
        path, error, predictions = result['path'], result.get('error'), result.get('predictions')
        if self.is_csv:
            cells = [p[f] for p in predictions for f in FIELDS] if error is None else [''] * len(FIELDS) * self.top_k
            self.writer.writerow([path, self.model, *cells, error])
        else:
            self.file.write(json.dumps({'path': path, 'model': self.model, **result}, allow_nan=False) + '\n')
        self.done += 1
        self.failed += error is not None

    def _check(self, row: '_Row', images: Sequence[str]) -> None:
        if row.top_k not in (None, self.top_k):
            problem = f'has {row.top_k} classes per image, not {self.top_k}'
        elif row.path is None:
            return
        elif row.model != self.model:
            problem = f'is of the model {row.model}, not of {self.model}'
        elif self.done == len(images):
            problem = f'has more rows than the {len(images):,} images that were given'
        elif row.path != images[self.done]:
            problem = f'has {row.path} in row {self.done + 1:,}, not {images[self.done]} as the images that were given'
        else:
            return
        raise ValueError(f'{self.path} {problem}; name another --output')


class _Row(NamedTuple):
    """What a row says; that of the columns has no path, that of an image that could not be read no classes."""
    path: Optional[str]
    model: Optional[str]
    top_k: Optional[int]
    failed: bool


class _Lines:
    """The whole lines of a file, and where the latest one ends."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.end, self.is_over = file, 0, False

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            if line.endswith(b'\n'):
                self.end += len(line)
                yield line.decode('utf-8', 'surrogateescape')
        self.is_over = True


def _columns(top_k: int) -> List[str]:
    return ['path', 'model', *(f'{field}_{n}' for n in range(1, top_k + 1) for field in FIELDS), 'error']


def _rows_of_csv(lines: _Lines) -> Iterator[_Row]:
    columns: List[str] = []
    try:
        for cells in csv.reader(lines, strict=True):
            if not columns:
                columns, top_k = cells, len(cells) // len(FIELDS) - 1
                if columns != _columns(top_k):
                    raise LookupError
                yield _Row(None, None, top_k, False)
            else:
                if len(cells) != len(columns):
                    raise LookupError
                yield _Row(cells[0], cells[1], None, cells[-1] != '')
    except csv.Error:
        if not lines.is_over:
            raise  # else the last row ends within quotes: it is torn


def _rows_of_json(lines: _Lines) -> Iterator[_Row]:
    for line in lines:
        row = json.loads(line)
        failed = 'error' in row
        yield _Row(row['path'], row['model'], None if failed else len(row['predictions']), failed)
