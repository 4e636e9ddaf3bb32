"""Several classes per image, or none: losses and figures (paper, Table V).

Over images, a class has TP hits, P predictions and T positives. Then OP = sum TP / sum P and OR = sum TP / sum T over
classes, CP and CR are the means over classes of TP / P and TP / T, and F1 is 2 * precision * recall / (precision +
recall) of either pair. AP is not interpolated. A class without positives is left out of mAP, CR and CP, and the
precision of one without predictions counts as 0.
"""
from functools import partial
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from timm.loss import create_classification_loss
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.base import Images
from ..text import some
from .base import Task

LOSSES = ('bce', 'asl')  # binary cross-entropy, averaged over images and classes; asymmetric, summed over classes


class Multilabel(Task):
    """Several classes per image, or none."""
    name = reads = 'multilabel'
    figures = {'mAP': 'mAP', 'CF1': 'CF1', 'OF1': 'OF1'}
    on_card = {'mAP': ('mAP', 'mAP')}
    title = 'Multi-label Image Classification'
    notes = ('multilabel',)

    def check(self, config: TrainConfig) -> None:
        if config.loss not in LOSSES:
            raise ValueError(f'loss={config.loss!r} is not one of {", ".join(LOSSES)}')
        if config.mixup or config.cutmix:
            raise ValueError('mixup and cutmix are for one class per image; give --mixup 0 --cutmix 0')

    def check_images(self, train_set: Images, val_set: Images) -> None:
        for name, images in (('training', train_set), ('validation', val_set)):
            if isinstance(images, Images) and not images.labels[images.rows].any():
                raise ValueError(f'none of the {len(images):,} {name} images has a class: there is nothing to find')

    def create_criterion(self, config: TrainConfig, images: Images) -> nn.Module:
        """timm's loss of logits and targets (B, K), by `config.loss`; smoothing moves targets towards 1/2."""
        return create_classification_loss(
            config.loss, multi_label=True, smoothing=config.smoothing,
            pos_weight=positive_weights(images) if config.class_weights else None)

    def create_metrics(self, num_classes: int, device: torch.device) -> 'Metrics':
        return Metrics(num_classes, device)

    def rows(self, metrics: 'Metrics', class_names: Sequence[str]) -> List[Dict[str, Any]]:
        return metrics.per_class(class_names)


def positive_weights(images: Images) -> Tensor:
    """Weights (K,) of the positive terms that make up for their number: negatives / positives.

    Raises:
        ValueError: If a class has no positives.
    """
    labels = images.labels[images.rows]
    positives = labels.sum(axis=0, dtype=np.int64)
    empty = [name for name, count in zip(images.class_names, positives) if not count]
    if empty:
        raise ValueError(f'class_weights: no training images of {some(map(repr, empty), 10)}')
    return torch.from_numpy((len(labels) - positives) / positives).float()


class Metrics:
    """mAP, CP, CR, CF1, OP, OR, OF1 in percent at the threshold 0.5; those at '_top3' count only predictions among an
    image's three highest scores, as is usual on COCO; and the mean binary cross-entropy `val_loss`.

    What is updated on any process counts when it is computed.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics import MeanMetric  # takes a second to import
        from torchmetrics.classification import (
            BinaryAveragePrecision,
            BinaryStatScores,
            MultilabelAveragePrecision,
            MultilabelStatScores,
        )

        several = dict(num_labels=num_classes, average='none')
        ap, counts = (  # torchmetrics calls one class binary
            (partial(MultilabelAveragePrecision, **several), partial(MultilabelStatScores, **several))
            if num_classes > 1 else (BinaryAveragePrecision, BinaryStatScores))
        self.ap = ap().to(device)
        self.counts = {suffix: counts().to(device) for suffix in ('', '_top3')}
        self.loss = MeanMetric().to(device)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (B, K) in float32 and targets (B, K), 0 or 1; B may be 0."""
        labels, positive = targets.int(), (logits > 0).int()
        if not len(targets):
            self.ap.update(logits.sigmoid(), labels)  # a list, which has to have a tensor on every process
            return
        top3 = torch.zeros_like(positive).scatter(1, logits.topk(min(3, logits.shape[1])).indices, 1)
        self.ap.update(logits.sigmoid(), labels)
        self.counts[''].update(positive, labels)
        self.counts['_top3'].update(positive * top3, labels)
        self.loss.update(nn.functional.binary_cross_entropy_with_logits(logits, targets.float()), weight=len(targets))

    def compute(self) -> Dict[str, float]:
        ap, counts = self._per_class()
        figures = {'mAP': ap.nanmean()}
        for suffix, (hits, predicted, positives) in counts.items():
            known = positives > 0
            precision = (hits / predicted.clamp(min=1))[known].mean()
            recall = (hits / positives.clamp(min=1))[known].mean()
            overall = hits.sum() / predicted.sum().clamp(min=1), hits.sum() / positives.sum().clamp(min=1)
            for letter, (p, r) in (('C', (precision, recall)), ('O', overall)):
                f1 = 2 * p * r / (p + r) if p + r else torch.zeros(())
                figures.update({f'{letter}{name}{suffix}': x for name, x in (('P', p), ('R', r), ('F1', f1))})
        figures = {name: round(100 * float(x), 4) for name, x in figures.items()}
        return {**figures, 'val_loss': self.loss.compute().item()}

    def per_class(self, class_names: Sequence[str]) -> List[Dict[str, Any]]:
        """A row per class: 'class', 'positives', and 'AP', 'precision', 'recall' in percent, None where undefined."""
        ap, counts = self._per_class()
        rows = []
        for name, score, hits, predicted, positives in zip(class_names, ap, *counts['']):
            shares = {
                'AP': score if positives else None, 'precision': hits / predicted if predicted else None,
                'recall': hits / positives if positives else None}
            rows.append({'class': name, 'positives': int(positives), **{
                key: None if share is None else round(100 * share.item(), 2) for key, share in shares.items()}})
        return rows

    def _per_class(self):
        """AP (K,), NaN without positives; suffix -> hits, predictions and positives (K,), as float64."""
        counts = {}
        for suffix, metric in self.counts.items():
            hits, wrong, _, missed, positives = metric.compute().double().cpu().view(-1, 5).unbind(1)
            counts[suffix] = hits, hits + wrong, positives
        ap = torch.where(positives > 0, self.ap.compute().double().cpu().view(-1), torch.nan)
        return ap, counts
