"""One class per image: its loss and its figures."""
from typing import Dict

import numpy as np
import torch
from timm.loss import create_classification_loss
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.base import Images
from ..text import some
from .base import Task


class Multiclass(Task):
    """One class per image."""
    name = 'multiclass'
    figures = {'top1': 'top-1', 'top5': 'top-5'}
    on_card = {'top1': ('accuracy', 'Top-1 accuracy'), 'top5': ('accuracy', 'Top-5 accuracy')}

    def check_images(self, train_set: Images, val_set: Images) -> None:
        if len(train_set.class_names) < 2:
            raise ValueError(
                f'the training images have {len(train_set.class_names)} class ({", ".join(train_set.class_names)}); '
                f'expected 2 or more')

    def create_criterion(self, config: TrainConfig, images: Images) -> nn.Module:
        """The loss of logits (B, K) and targets, (B,) class numbers or, after mixup, (B, K) probabilities.

        Raises:
            ValueError: If classes are to be weighted by their images, and nobody knows how many those are.
        """
        soft = bool(config.mixup or config.cutmix)  # timm's Mixup smooths the labels itself
        if config.class_weights:
            return nn.CrossEntropyLoss(class_weights(images), label_smoothing=0. if soft else config.smoothing)
        return create_classification_loss('ce', smoothing=config.smoothing, soft_targets=soft)

    def create_metrics(self, num_classes: int, device: torch.device) -> 'Metrics':
        return Metrics(num_classes, device)


def class_weights(images: Images) -> Tensor:
    """Weights (K,) that make all classes count alike: images / (classes x images of the class).

    Raises:
        ValueError: If the images are a stream, or a class has none.
    """
    if not isinstance(images, Images):
        raise ValueError('class_weights: a stream does not tell how many images its classes have; use hfds/ or folder')
    counts = np.bincount(images.labels[images.rows], minlength=len(images.class_names))
    empty = [name for name, count in zip(images.class_names, counts) if not count]
    if empty:
        raise ValueError(f'class_weights: no training images of {some(map(repr, empty), 10)}')
    return torch.from_numpy(counts.sum() / (len(counts) * counts)).float()


class Metrics:
    """Top-1 and, with more than five classes, top-5 accuracy in percent, and the mean cross-entropy `val_loss`.

    What is updated on any process counts when it is computed.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics import MeanMetric, MetricCollection  # takes a second to import
        from torchmetrics.classification import MulticlassAccuracy

        metrics = {'top1': MulticlassAccuracy(num_classes, average='micro')}
        if num_classes > 5:
            metrics['top5'] = MulticlassAccuracy(num_classes, top_k=5, average='micro')
        self.accuracy, self.loss = MetricCollection(metrics).to(device), MeanMetric().to(device)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (B, K) in float32 and class numbers (B,); B may be 0."""
        if not len(targets):
            return
        self.accuracy.update(logits, targets)
        self.loss.update(nn.functional.cross_entropy(logits, targets), weight=len(targets))

    def compute(self) -> Dict[str, float]:
        figures = {name: round(100 * value.item(), 4) for name, value in self.accuracy.compute().items()}
        return {**figures, 'val_loss': self.loss.compute().item()}
