"""Files that are there whole or not at all."""
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Type, Union

from safetensors import SafetensorError

from .text import one_line


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path beside a file's place to write it at; renamed when the context ends, removed if it fails.

    Only a killed process leaves `.NAME.*.partial` behind, which may be deleted.
    """
    partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.partial')
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(path: Path, *errors: Type[Exception]) -> Iterator[None]:
    """Raise OSError, with the free space, where writing fails: safetensors has an error of its own for a full disk.

    Args:
        path: What is written.
        errors: What else the writer raises then; torch.save raises RuntimeError.
    """
    try:
        yield
    except (OSError, SafetensorError, *errors) as error:
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
        free = shutil.disk_usage(folder).free
        raise OSError(f'{path} cannot be written ({one_line(error)}; {free / 1e6:.0f} MB are free)') from error


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure of matplotlib, in the format of the path's suffix."""
    with disk_errors(path), beside(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], **options)


def clear_partial(folder: Path, name: str = '*') -> None:
    """Remove what killed processes have left in a folder of files that were being written, of one name or of all."""
    for partial in folder.glob(f'.{name}.*.partial'):
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError if a file cannot be written: its folder does not exist, or is read-only."""
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder for {path.name}')
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; name a file')
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f'{path}: cannot be written; choose another --output')


def write(path: Path, content: Union[str, bytes]) -> None:
    """Write a file, text as UTF-8 with the line ends it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), beside(path) as partial:
        partial.write_bytes(content.encode('utf-8') if isinstance(content, str) else content)
