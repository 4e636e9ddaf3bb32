"""Files that are there whole or not at all."""
import os
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Union


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


def clear_partial(folder: Path, name: str = '*') -> None:
    """Remove what killed processes have left in a folder of files that were being written, of one name or of all."""
    for partial in folder.glob(f'.{name}.*.partial'):
        partial.unlink(missing_ok=True)


def write(path: Path, content: Union[str, bytes]) -> None:
    """Write a file, text as UTF-8 with the line ends it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as partial:
        partial.write_bytes(content.encode('utf-8') if isinstance(content, str) else content)
