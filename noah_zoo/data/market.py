"""Market-1501: images of persons, with identity and camera in their names."""
import re
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np
import torch
from PIL import Image

from .base import TRAINING, Files

NAME = re.compile(r'(-1|\d{4})_c(\d+)s\d+_\d+_\d+(\.jpg)+')  # identity and camera; a few names end in .jpg.jpg
FOLDERS = ('bounding_box_train', 'query', 'bounding_box_test')


class Market(Files):
    """Market-1501 as published: folders of images called 0002_c1s1_000451_03.jpg, identity 2 and camera 1.

    In training, the classes are the identities. In evaluation, labels are (rows, 3): identity, camera, 1 for a query.

    Args:
        data_dir: Folder of `bounding_box_train`, `query` and `bounding_box_test`.
        split: 'train', or another for evaluation.

    Raises:
        FileNotFoundError: If a folder is missing or has no images.
        ValueError: If a name does not parse, or an image of no identity is to be trained on.
    """
    task = 'reid'

    def __init__(self, data_dir: str, split: str) -> None:
        folders = FOLDERS[:1] if split in TRAINING else FOLDERS[1:]
        found = [
            (path, *parsed, folder == 'query') for folder in folders for path, parsed in _parse(data_dir, folder)]
        paths, ids, cameras, queries = zip(*found)
        self.paths = [str(path) for path in paths]
        if split in TRAINING:
            wrong = next((path for path, id in zip(paths, ids) if id < 1), None)
            if wrong:
                raise ValueError(f'{wrong}: identities -1 (junk) and 0 (distractors) are for the gallery only')
            identities = sorted(set(ids))
            super().__init__([f'{id:04}' for id in identities], [identities.index(id) for id in ids])
        else:
            super().__init__((), ())
            self.labels = torch.tensor([ids, cameras, queries]).T.numpy()
            self.rows = np.lexsort((ids, np.array(ids) < 1))  # a trial sees the first ones: queries and their matches

    def read(self, index: int) -> Tuple[Image.Image, Any]:
        """An image, and its class in training, else identity, camera and whether it is a query (3,)."""
        row = int(self.rows[index])
        return self._image(row), int(self.labels[row]) if self.labels.ndim == 1 else torch.from_numpy(self.labels[row])

    def with_classes(self, class_names) -> 'Market':
        """As it is: the identities of evaluation are others."""
        return self


def _parse(data_dir: str, folder: str) -> List[Tuple[Path, Tuple[int, int]]]:
    root = Path(data_dir) / folder
    paths = sorted(root.glob('*.jpg'))
    if not paths:
        raise FileNotFoundError(f'market1501: no .jpg files in {root}; expected {", ".join(FOLDERS)} in --data-dir')
    names = [(path, NAME.fullmatch(path.name)) for path in paths]
    wrong = next((path for path, match in names if not match), None)
    if wrong:
        raise ValueError(f'{wrong}: not a name like 0002_c1s1_000451_03.jpg')
    return [(path, (int(match[1]), int(match[2]))) for path, match in names]
