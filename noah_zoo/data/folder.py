"""A folder of images per class."""
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import List, Tuple

import timm.data
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..text import some
from .base import TRAINING, VALIDATION, Files, synonyms

_logger = logging.getLogger(__name__)

IMG_ENDINGS = (
    '.avif', '.bmp', '.dib', '.gif', '.ico', '.j2k', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.jpx', '.mpo', '.pbm',
    '.pcx', '.pgm', '.png', '.pnm', '.ppm', '.tga', '.tif', '.tiff', '.webp')
NOT_FOLDERS = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information')  # copies that systems make


def natural(text: str) -> Tuple[list, str]:
    """What to sort by, as timm does, 2 before 10; names that are alike for it (a, A; 1, 01) have an order, too."""
    return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', text.lower())], text


def find_image_files(root: Path) -> Tuple[List[str], str]:
    """The image files of a folder and of those in it, in natural order; and what was left out, as text.

    Left out are hidden files and folders, and what systems put beside images, and files of other endings than
    `IMG_ENDINGS`.
    """
    paths, hidden, others = [], [], Counter()
    endings = {*IMG_ENDINGS, *timm.data.get_img_extensions()}
    for folder, folders, files in os.walk(root, followlinks=True):
        kept = [
            name for name in folders
            if not _is_hidden(name) and not _leads_back(os.path.join(folder, name))]
        hidden += [name for name in folders if name not in kept]
        folders[:] = kept
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith('.'):
                hidden += [name] if ending in endings else []
            elif ending in endings:
                paths.append(os.path.join(folder, name))
            else:
                others[ending or name] += 1
    left_out = []
    if others:
        counts = (f'{count} {ending}' for ending, count in sorted(others.items()))
        left_out.append(f'{others.total():,} files that are no images by their ending ({some(counts, 10)})')
    if hidden:
        left_out.append(f'hidden {some(sorted(set(hidden)), 10)}')
    return sorted(paths, key=natural), ' and '.join(left_out)


def _is_hidden(folder: str) -> bool:
    return folder in NOT_FOLDERS or folder.startswith('.')


def _leads_back(folder: str) -> bool:
    """Whether it is a link to a folder that it is in, which has no end."""
    if not os.path.islink(folder):
        return False
    target, place = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
    return os.path.commonpath([target, place]) == target


class Folder(Files):
    """A folder per class, in natural order; folders inside of it are parts of the class.

    Args:
        data_dir: Folder of the splits' folders, or of one split.
        split: 'train', 'validation' or the name of a folder; `val` and so on stand for 'validation', but not `test`.

    Raises:
        FileNotFoundError: If there is no such folder, or `data_dir` has other splits only.
        ValueError: If it has no images, or images outside of class folders.
    """

    def __init__(self, data_dir: str, split: str) -> None:
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(f'folder: {data_dir} is not a folder')
        splits = (Path(data_dir, name) for name in synonyms(split))
        self.root = root = next((folder for folder in splits if folder.is_dir()), Path(data_dir))
        others = [name for name in (*TRAINING, *VALIDATION, 'test') if (root / name).is_dir()]
        if root == Path(data_dir) and others:  # not the whole of it, which timm takes
            raise FileNotFoundError(f'folder: {data_dir} has {"/, ".join(others)}/, but no folder for split {split!r}')
        self.paths, left_out = find_image_files(root)
        if not self.paths:
            raise ValueError(
                f'folder: no images in {root}; looked for {", ".join(IMG_ENDINGS)}'
                f'{"; left out: " if left_out else ""}{left_out}')
        start = len(os.path.join(root, ''))
        folders = [path[start:].split(os.sep)[:-1] for path in self.paths]
        outside = [path for path, parts in zip(self.paths, folders) if not parts]
        if any(path.lower().endswith(IMG_EXTENSIONS) for path in outside):
            raise ValueError(f'folder: {outside[0]} is an image outside of class folders')
        if outside:  # a preview, an icon
            _logger.warning('%s: left out %s, outside of class folders', root, some(map(os.path.basename, outside), 5))
            self.paths = [path for path, parts in zip(self.paths, folders) if parts]
            folders = [parts for parts in folders if parts]
        names = [self._name(parts) for parts in folders]
        class_names = sorted(set(names), key=natural)
        index = {name: i for i, name in enumerate(class_names)}
        super().__init__(class_names, [index[name] for name in names])
        if left_out:
            _logger.warning('%s: left out %s', root, left_out)
        filled = {parts[0] for parts in folders}
        empty = sorted(
            path.name for path in root.iterdir()
            if path.is_dir() and path.name not in filled and not _is_hidden(path.name))
        if empty:
            _logger.warning('%s: no images in %s, which are no classes therefore', root, ', '.join(empty))
        self._tell_of_depth(folders)

    def _name(self, folders: List[str]) -> str:
        """The class of an image in these folders, the outermost first."""
        return folders[0]

    def _tell_of_depth(self, folders: List[List[str]]) -> None:
        inner = sorted({'/'.join(parts) for parts in folders if len(parts) > 1}, key=natural)
        if inner:
            _logger.warning(
                '%s: %s are folders inside of class folders; their images are of the class of the outermost folder '
                '(leaf_folder instead of folder takes the innermost)', self.root, some(inner, 5))


class LeafFolder(Folder):
    """As `Folder`, but a class is called by the innermost folder, as timm has it; of the same name, they are one class.
    """

    def _name(self, folders: List[str]) -> str:
        return folders[-1]

    def _tell_of_depth(self, folders: List[List[str]]) -> None:
        depths = {len(parts): '/'.join(parts) for parts in folders}
        if len(depths) > 1:
            _logger.warning('%s: images lie at unequal depths: %s', self.root, some(depths.values(), 5))
        places = {}
        for parts in folders:
            places.setdefault(parts[-1], set()).add('/'.join(parts))
        several = sorted((name for name, found in places.items() if len(found) > 1), key=natural)
        if several:
            _logger.warning('%s: %s, which are several folders, are one class each', self.root, some(several, 5))
