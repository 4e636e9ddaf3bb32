"""How well features find the same identity again: CMC and mAP, and a picture of rankings."""
from typing import Dict, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from ..data.images import read_image

JUNK = -1  # identity of images that are not counted; 0 is that of distractors, which stay and match nothing


class Identified(NamedTuple):
    """Images: features (R, D), and identity and camera (R,)."""
    features: Tensor
    ids: Tensor
    cameras: Tensor


def rank_gallery(query: Identified, gallery: Identified) -> Dict[str, Tensor]:
    """The gallery in order of cosine similarity to each query, and which of it counts.

    Similarities that agree to nine decimals are equal, and equals keep the gallery's order, on every machine. Images of
    the query's identity by the query's camera and junk do not count.

    Returns:
        'order', rows of the gallery, 'counts' and 'matches', all (queries, gallery) in that order.
    """
    similarity = F.normalize(query.features.double()) @ F.normalize(gallery.features.double()).T
    order = similarity.mul_(1e9).round_().argsort(dim=1, descending=True, stable=True)
    ids, cameras = gallery.ids[order], gallery.cameras[order]
    same = ids == query.ids[:, None]
    counts = (ids != JUNK) & ~(same & (cameras == query.cameras[:, None]))
    return {'order': order, 'counts': counts, 'matches': same & counts}


def cmc_map(
        query: Identified, gallery: Identified, ranks: Sequence[int] = (1, 5, 10), block: int = 128,
) -> Dict[str, float]:
    """CMC and mAP in percent, single query (Zheng et al., "Scalable Person Re-identification", 2015).

    A query without a match is left out. AP is the mean, over the matches, of the precision at their rank.

    Args:
        query: Images to find.
        gallery: Images to find them in.
        ranks: 'rank5' is the share of queries that have a match among the first 5 that count.
        block: Queries at a time: memory is some 60 bytes times block times gallery.

    Returns:
        'rank1', ..., 'mAP', and 'queries', the number of those that count.

    Raises:
        ValueError: If no query has a match.
    """
    first, precision = [], []
    for start in range(0, len(query.ids), block):
        found = rank_gallery(Identified(*(tensor[start:start + block] for tensor in query)), gallery)
        has_match = found['matches'].any(dim=1)
        if not has_match.any():
            continue
        matches, place = found['matches'][has_match], found['counts'][has_match].cumsum(dim=1)
        first.append(torch.where(matches, place, place.shape[1]).amin(dim=1))
        shares = torch.where(matches, matches.cumsum(dim=1).double() / place.clamp(min=1), 0.)
        precision.append(shares.sum(dim=1) / matches.sum(dim=1))
    if not first:
        raise ValueError(f'none of the {len(query.ids)} queries has an image of the same identity by another camera')
    first, precision = torch.cat(first), torch.cat(precision)
    figures = {f'rank{rank}': 100 * (first <= rank).double().mean().item() for rank in ranks}
    return {**figures, 'mAP': 100 * precision.mean().item(), 'queries': len(first)}


class Metrics(Metric):
    """CMC and mAP of `cmc_map`, over the images of all processes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.add_state('features', [], dist_reduce_fx='cat')
        self.add_state('labels', [], dist_reduce_fx='cat')
        self.to(device)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features (B, D) and labels (B, 3) of `Market`."""
        self.features.append(features)
        self.labels.append(labels)

    def _gathered(self) -> Tuple[Tensor, Tensor]:
        """Features (images, D) and labels (images, 3)."""
        return tuple(torch.cat(x) if isinstance(x, list) else x for x in (self.features, self.labels))

    def compute(self) -> Dict[str, float]:
        figures = cmc_map(*_split_gallery(*self._gathered()))
        return {name: round(value, 4) for name, value in figures.items()}

    def draw(self, paths: Sequence[str], count: int) -> Figure:
        """Draw `count` queries, evenly spaced, each with the ten images of the gallery that are nearest to it.

        Args:
            paths: A file per image, in the order of the updates.
        """
        features, labels = self._gathered()
        (query, gallery), is_query = _split_gallery(features, labels), labels[:, 2].cpu().numpy() == 1
        chosen = torch.linspace(0, len(query.ids) - 1, min(count, len(query.ids))).long().tolist()
        paths = np.array(paths)
        return draw_rankings(
            Identified(*(tensor[chosen] for tensor in query)), gallery, paths[is_query][chosen], paths[~is_query])


def _split_gallery(features: Tensor, labels: Tensor) -> Tuple[Identified, Identified]:
    """Query and gallery."""
    queries = labels[:, 2] == 1
    return tuple(Identified(features[x].cpu(), labels[x, 0].cpu(), labels[x, 1].cpu()) for x in (queries, ~queries))


def draw_rankings(
        query: Identified, gallery: Identified, query_paths: Sequence[str], gallery_paths: Sequence[str]) -> Figure:
    """Each query, in a row, and the ten of the gallery that count and are nearest: right in green, wrong in red."""
    found = rank_gallery(query, gallery)
    figure = Figure(figsize=(11, 2.2 * len(query_paths)), layout='constrained')
    for row, axes in enumerate(figure.subplots(len(query_paths), 11, squeeze=False)):
        nearest = found['counts'][row].nonzero().flatten()[:10]
        shown = [(query_paths[row], 'query', 'black')]
        for place, i in enumerate(nearest.tolist(), 1):
            right = found['matches'][row, i].item()
            path = gallery_paths[found['order'][row, i]]
            shown.append((path, f'{place} {"right" if right else "wrong"}', '#009E73' if right else '#D55E00'))
        for ax in axes:
            ax.axis('off')
        for ax, (path, title, color) in zip(axes, shown):
            ax.axis('on')
            ax.imshow(read_image(path))
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=9, color=color)
            for spine in ax.spines.values():
                spine.set(color=color, linewidth=3)
    return figure
