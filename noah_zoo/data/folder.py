"""A folder of images per class."""
import logging
import os
from pathlib import Path

import timm.data
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from .base import TRAINING, VALIDATION, Images
from .images import read_image

_logger = logging.getLogger(__name__)


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
        others = [name for name in TRAINING + VALIDATION if (self.root / name).is_dir()]
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
