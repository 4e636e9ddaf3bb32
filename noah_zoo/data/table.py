"""A CSV file of image files and their labels: `train.csv`, `validation.csv`."""
import ast
import codecs
import csv
import io
import logging
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from ..text import some
from .base import Files, Multilabel, multi_hot, synonyms
from .folder import IMG_ENDINGS, find_image_files, natural

_logger = logging.getLogger(__name__)

SEPARATOR = ';'  # between the labels of an image
OTHER_SEPARATORS = ('|', ',')


class Row(NamedTuple):
    """A row of the file: the number of its last line, the image's name and the label cell."""
    line: int
    name: str
    label: str


class Csv(Files):
    """`train.csv` and `validation.csv` with a row per image: its file and its class, as on Kaggle.

    The file is found by its path from the folder or by its name in a folder inside, with or without extension. Labels
    are text: '007' and '7' are two classes.

    Args:
        data_dir: Folder of the CSV files and of the images, or of folders of images.
        split: 'train', 'validation' or the name of a file without `.csv`.
        input_key: Column of the files; 'file_name' if None, else the first of two columns.
        target_key: Column of the labels; 'label' if None, else the second of two columns.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a row cannot be read, with its line.
    """

    def __init__(
            self, data_dir: str, split: str, input_key: Optional[str] = None, target_key: Optional[str] = None) -> None:
        file = _find(data_dir, split)
        rows = _read_rows(file, input_key or 'file_name', target_key or 'label', not (input_key or target_key))
        _refuse(file, rows, 'have no label', [row.label == '' for row in rows])
        self.paths = _find_images(file, rows)
        names = sorted({row.label for row in rows}, key=natural)
        _warn_of_case(file, names)
        index = {name: i for i, name in enumerate(names)}
        super().__init__(names, [index[row.label] for row in rows])


class CsvLists(Files, Multilabel):
    """As `Csv`, with several classes per image in the column `labels`, or none: 'cat;dog', or "['cat', 'dog']".

    Args:
        data_dir: As of `Csv`.
        split: As of `Csv`.
        input_key: As of `Csv`.
        target_key: Column of the labels; 'labels' if None.
        separator: Text between labels. If None it is ';', and a label that seems to be several is an error.

    Raises:
        FileNotFoundError, ValueError: As `Csv`.
    """

    def __init__(
            self, data_dir: str, split: str, input_key: Optional[str] = None, target_key: Optional[str] = None,
            separator: Optional[str] = None) -> None:
        file = _find(data_dir, split)
        rows = _read_rows(file, input_key or 'file_name', target_key or 'labels', not (input_key or target_key))
        lists = [_labels(file, row, separator or SEPARATOR) for row in rows]
        if separator is None:
            _check_separator(file, rows, lists)
        self.paths = _find_images(file, rows)
        _warn_of_case(file, {label for labels in lists for label in labels})
        super().__init__(*multi_hot(lists))


def _find(data_dir: str, split: str) -> Path:
    candidates = [Path(data_dir) / f'{name}.csv' for name in synonyms(split)]
    file = next(filter(Path.is_file, candidates), None)
    if file is None:
        raise FileNotFoundError(f'csv: {data_dir} has none of {", ".join(path.name for path in candidates)}')
    return file


def _read_rows(file: Path, input_key: str, target_key: str, by_place: bool) -> List[Row]:
    """The rows; empty ones, which spreadsheets leave at the end, are skipped.

    Raises:
        ValueError: If the text is not UTF-8 or UTF-16, a column is missing, or a row has another number of cells.
    """
    text = _text(file)
    header = text.partition('\n')[0]
    delimiter = max(',;\t', key=header.count)
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
    rows = []
    try:
        columns = [name.strip() for name in next(reader, [])]
        if by_place and len(columns) == 2 and not {input_key, target_key} <= set(columns):
            input_key, target_key = columns
            _logger.info('%s: images are in the column %r, labels in %r', file, input_key, target_key)
        for name, flag in ((input_key, '--input-key'), (target_key, '--target-key')):
            if columns.count(name) != 1:
                raise ValueError(f'{file}: no column {name!r} ({flag}), only {some(columns, 10)}')
        places = columns.index(input_key), columns.index(target_key)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f'{file}, line {reader.line_num}: {len(cells)} cells, and the header has {len(columns)}; put cells '
                    f'that contain {delimiter!r} in quotes')
            rows.append(Row(reader.line_num, *(cells[place].strip() for place in places)))
    except csv.Error as error:
        raise ValueError(f'{file}, line {reader.line_num}: {error}') from None
    _refuse(file, rows, 'have no file name', [row.name == '' for row in rows])
    if not rows:
        raise ValueError(f'{file}: no rows below the header')
    counts = Counter(row.name for row in rows)
    _refuse(file, rows, 'repeat the file of another row', [counts[row.name] > 1 for row in rows])
    return rows


def _text(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        ValueError: If it has another encoding, with the line.
    """
    data = file.read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode('utf-16' if is_utf16 else 'utf-8-sig')
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b'\n') + 1
        raise ValueError(
            f'{file}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save it as "CSV UTF-8"') from None
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _labels(file: Path, row: Row, separator: str) -> List[str]:
    """The labels of a cell: separated, or written as a Python list."""
    if row.label.startswith('[') and row.label.endswith(']'):
        try:
            labels = [str(label).strip() for label in ast.literal_eval(row.label)]
        except (ValueError, SyntaxError):
            raise ValueError(f'{file}, line {row.line}: {row.label} is not a list of labels') from None
    else:
        labels = [label.strip() for label in row.label.split(separator)] if row.label else []
    if '' in labels:
        raise ValueError(f'{file}, line {row.line}: an empty name among the labels {row.label!r}')
    return labels


def _check_separator(file: Path, rows: Sequence[Row], lists: Sequence[Sequence[str]]) -> None:
    """Raise ValueError if a label seems to be several labels with another separator between them."""
    names = {label for labels in lists for label in labels}
    for row, labels in zip(rows, lists):
        for label in labels:
            found = next((mark for mark in OTHER_SEPARATORS if mark in label), None)
            if found is None and ' ' in label and names.issuperset(label.split()):
                found = ' '
            if found:
                raise ValueError(
                    f'{file}, line {row.line}: {label!r} seems to be several labels; give --label-separator {found!r}, '
                    f'or --label-separator {SEPARATOR!r} if it is one label')


def _warn_of_case(file: Path, names: Sequence[str]) -> None:
    spellings = defaultdict(list)
    for name in names:
        spellings[name.casefold()].append(repr(name))
    several = [' and '.join(sorted(same)) for same in spellings.values() if len(same) > 1]
    if several:
        _logger.warning('%s: %s differ in case only and are different classes', file, some(several))


def _find_images(file: Path, rows: Sequence[Row]) -> List[str]:
    """The image file of every row.

    Raises:
        FileNotFoundError: If there is none, with lines and names.
        ValueError: If there are several.
    """
    folder = file.parent
    paths: List[Optional[str]] = [_exact(folder, row.name) for row in rows]
    if None in paths:
        by_name: Dict[str, List[str]] = defaultdict(list)
        for path in find_image_files(folder)[0]:
            name = Path(path).relative_to(folder).as_posix()
            for key in {name, os.path.basename(name)}:
                by_name[key].append(path)
                by_name[os.path.splitext(key)[0]].append(path)
        found = [[path] if path else by_name.get(row.name, []) for row, path in zip(rows, paths)]
        _refuse(file, rows, 'name several images', [len(matches) > 1 for matches in found])
        backslash = any('\\' in row.name for row, matches in zip(rows, found) if not matches)
        _refuse(
            file, rows, 'name no image', [not matches for matches in found], FileNotFoundError,
            '; write / instead of \\ between folders' if backslash else '')
        paths = [path for path, in found]
    return paths


def _exact(folder: Path, name: str) -> Optional[str]:
    path = os.path.join(folder, name)
    is_image = os.path.splitext(name)[1].lower() in IMG_ENDINGS
    return path if is_image and os.path.isfile(path) else None


def _refuse(
        file: Path, rows: Sequence[Row], what: str, wrong: Sequence[bool], error: type = ValueError,
        hint: str = '') -> None:
    found = [f'line {row.line} ({row.name or "no name"})' for row, is_wrong in zip(rows, wrong) if is_wrong]
    if found:
        raise error(f'{file}: {len(found):,} rows {what}: {some(found, 5)}{hint}')
