"""Person re-identification on the layout of Market-1501 (paper, Table XV).

A model is trained to tell the identities of the training images apart; then its embeddings find the same identities by
other cameras. What the paper leaves open, and what is chosen: the embedding is a linear layer and nothing else; images
of 256 x 128 pixels, flipped at random; cross-entropy over identities; the last stage keeps its stride of 32; N and r of
the head by the rule of thumb.
"""
from typing import Dict, Optional, Tuple

import numpy as np
import timm
import torch
from accelerate import Accelerator
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchmetrics import Metric

from ..data.loader import EvalBatches, create_loader
from ..data.market import Market
from .multiclass import create_criterion
from .ranking import Identified, cmc_map, draw_rankings

__all__ = ['METRIC', 'Market', 'Metrics', 'create_criterion', 'evaluate_reid']
METRIC = 'mAP'  # the figure by which the best epoch is chosen


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
