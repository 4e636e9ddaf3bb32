"""Floor 4: person re-identification on the layout of Market-1501 (paper, Table XV).

A model is trained to tell the identities of the training images apart; then its embeddings find the same identities by
other cameras. What the paper leaves open, and what is chosen: the embedding is a linear layer and nothing else; images
of 256 x 128 pixels, flipped at random; cross-entropy over identities; the last stage keeps its stride of 32; N and r of
the head by the rule of thumb.
"""
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchmetrics import Metric

from .annotated import Files
from .loader import EvalBatches, create_loader
from .multiclass import create_criterion
from .ranking import Identified, cmc_map, draw_rankings

__all__ = ['METRIC', 'Market', 'Metrics', 'create_criterion', 'evaluate_reid']
METRIC = 'mAP'  # the figure by which the best epoch is chosen
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

    def __init__(self, data_dir: str, split: str) -> None:
        folders = FOLDERS[:1] if split == 'train' else FOLDERS[1:]
        found = [
            (path, *parsed, folder == 'query') for folder in folders for path, parsed in _parse(data_dir, folder)]
        paths, ids, cameras, queries = zip(*found)
        self.paths = [str(path) for path in paths]
        if split == 'train':
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
        """An RGB image, and its class in training, else identity, camera and whether it is a query (3,)."""
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


class Embedding(nn.Module):
    """A model as what is matched: (B, C) before the classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)


evaluated = Embedding  # what of the model the engine evaluates


class Metrics(Metric):
    """CMC and mAP of `cmc_map`, over what all processes were given."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        super().__init__()
        self.add_state('features', [], dist_reduce_fx='cat')
        self.add_state('labels', [], dist_reduce_fx='cat')
        self.to(device)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features (B, D) and labels (B, 3) of `Market`."""
        self.features.append(features)
        self.labels.append(labels)

    def compute(self) -> Dict[str, float]:
        figures = cmc_map(*split_gallery(*(torch.cat(x) if isinstance(x, list) else x for x in (
            self.features, self.labels))))
        return {name: round(value, 4) for name, value in figures.items()}


def split_gallery(features: Tensor, labels: Tensor) -> Tuple[Identified, Identified]:
    """Query and gallery."""
    queries = labels[:, 2] == 1
    return tuple(Identified(features[x].cpu(), labels[x, 0].cpu(), labels[x, 1].cpu()) for x in (queries, ~queries))


@torch.inference_mode()
def evaluate_reid(
        model: str, data_dir: str, picture: Optional[str] = None, queries: int = 6, batch_size: int = 64,
        workers: int = 2, cpu: bool = False) -> Dict[str, float]:
    """Match the queries of a dataset with its gallery.

    Args:
        model: A timm name with weights, 'local-dir:RUN/best' say.
        data_dir: See `Market`.
        picture: A PNG to draw some rankings into.
        queries: How many, evenly spaced.
        batch_size: Images at a time.
        workers: Loading processes.
        cpu: Do not use an accelerator.

    Returns:
        'rank1', 'rank5', 'rank10' and 'mAP' in percent, and 'queries', the number of those with a match.

    Raises:
        FileNotFoundError, ValueError: As `Market` and `cmc_map`.
        RuntimeError: If the weights cannot be had.
    """
    device = Accelerator(cpu=cpu).device
    images = Market(data_dir, 'test')
    net = timm.create_model(model, pretrained=True).to(device).eval()
    transform = create_transform(**resolve_data_config({}, model=net))
    loader = create_loader(images, transform, EvalBatches(len(images), batch_size, 1, 0), workers, batch_size)
    embedding = Embedding(net)
    parts = [(embedding(x.to(device)).float(), labels) for x, labels in loader]
    features, labels = (torch.cat(part).cpu() for part in zip(*parts))
    query, gallery = split_gallery(features, labels)
    figures = cmc_map(query, gallery)
    if picture:
        paths, is_query = np.array(images.paths)[images.rows], labels[:, 2].numpy() == 1
        count = len(query.ids)
        chosen = torch.linspace(0, count - 1, min(queries, count)).long()
        draw_rankings(
            Identified(*(tensor[chosen] for tensor in query)), gallery, paths[is_query][chosen],
            paths[~is_query]).savefig(picture, dpi=110)
    return figures
