"""Person re-identification on the layout of Market-1501 (paper, Table XV).

A model is trained to tell the identities of the training images apart; then its embeddings find the same identities by
other cameras. What the paper leaves open, and what is chosen: the embedding is a linear layer and nothing else; images
of 256 x 128 pixels, flipped at random; cross-entropy over identities; the last stage keeps its stride of 32; N and r of
the head are those of the paper's ResNet50.
"""
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.base import Images
from ..files import save_figure
from ..text import some
from .multiclass import Multiclass

if TYPE_CHECKING:
    from .ranking import Metrics


class Reid(Multiclass):
    """Re-identification: trained as one class per image, evaluated by ranking a gallery."""
    name = reads = 'reid'
    figures = {'mAP': 'mAP', 'rank1': 'rank-1'}
    on_card = {'mAP': ('mAP', 'mAP'), 'rank1': ('cmc', 'Rank-1')}
    title = 'Person Re-Identification'
    pipeline_tag = 'image-feature-extraction'
    draws = True

    def check(self, config: TrainConfig) -> None:
        if config.cache_features:
            raise ValueError('cache_features does not go with the task reid, whose embedding is to be trained')
        if config.val_fraction:
            raise ValueError('val_fraction does not go with the task reid, which is evaluated by queries and a gallery')

    def check_images(self, train_set: Images, val_set: Images) -> None:
        super().check_images(train_set, val_set)
        ids, cameras, queries = val_set.labels[val_set.rows].T
        query, gallery = ({*zip(ids[x].tolist(), cameras[x].tolist())} for x in (queries == 1, queries != 1))
        if not any(id == other and camera != by for id, camera in query for other, by in gallery):
            raise ValueError(
                f'none of the {int((queries == 1).sum()):,} queries has an image of the same identity by another '
                f'camera in the gallery; the cameras are {some(sorted({*cameras.tolist()}), 10)}')

    def eval_model(self, model: nn.Module) -> nn.Module:
        return Embedding(model)

    def create_metrics(self, num_classes: int, device: torch.device) -> 'Metrics':
        from .ranking import Metrics  # imports torchmetrics, which takes a second

        return Metrics(device)

    def match(self, name: str, model: nn.Module, images: Images) -> Images:
        """As they are: the identities are others than those of training.

        Raises:
            ValueError: If the model gives logits only.
        """
        if not hasattr(model, 'forward_head'):
            raise ValueError(f'{name} gives logits only, and the task reid compares features')
        return images

    def draw(self, metrics: 'Metrics', images: Images, path: str, count: int) -> None:
        """Some queries, evenly spaced, and the ten of the gallery that are nearest to each."""
        paths = [images.where(index) for index in range(len(images))]
        save_figure(metrics.draw(paths, count), Path(path), dpi=110)


class Embedding(nn.Module):
    """A model as what is matched: (B, C) before the classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)
