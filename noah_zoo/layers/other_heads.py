"""Four other heads that attend over positions, written from their papers, to measure NOAH against.

Tensor names say their shape: B batch, H heads, G queries, F classes of a query, D width, K classes, L positions,
C channels.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import Format, nchw_to
from torch import Tensor, nn


def to_tokens(x: Tensor, input_fmt: str) -> Tensor:
    """(B, L, C) of a map (B, C, H, W) or of tokens, 'NCHW' or 'NLC'."""
    return nchw_to(x, Format.NLC) if input_fmt == 'NCHW' else x


class MLDecoder(nn.Module):
    """ML-Decoder (Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", 2021; Section 2.3).

    A transformer decoder layer without its self-attention: queries, which are fixed and not learned, attend over the
    positions. With fewer queries than classes, each query gives the logits of ceil(K / G) classes by a linear layer of
    its own ("group fully-connected"). The defaults are the paper's for ImageNet: 100 queries, one layer of width 768
    with 8 attention heads and a feed-forward of width 2048, on features embedded by a linear layer and ReLU. Norms
    come after each residual sum. Left out: dropout.

    Shapes:
        Input: (B, C, H, W) or (B, L, C) as `input_fmt` says.
        Output: (B, num_classes).

    Args:
        in_features: C.
        num_classes: K.
        num_queries: G; K if that is less.
        width: D, of queries and embedded features.
        num_heads: Heads of the cross-attention.
        hidden_features: Width inside the feed-forward.
        input_fmt: 'NCHW' or 'NLC'.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_queries: int = 100,
            width: int = 768,
            num_heads: int = 8,
            hidden_features: int = 2048,
            input_fmt: str = 'NCHW',
    ) -> None:
        super().__init__()
        num_queries = min(num_queries, num_classes)
        per_query = -(-num_classes // num_queries)
        self.num_classes = num_classes
        self.input_fmt = input_fmt
        self.embed = nn.Linear(in_features, width)
        self.register_buffer('queries', torch.randn(num_queries, width))
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden_features), nn.ReLU(), nn.Linear(hidden_features, width))
        self.feed_forward_norm = nn.LayerNorm(width)
        self.weight_GDF = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_queries, width, per_query)))
        self.bias_K = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x_BLC = to_tokens(x, self.input_fmt)
        memory_BLD = F.relu(self.embed(x_BLC))
        h_BGD = self.queries.expand(x.shape[0], -1, -1)
        h_BGD = self.attention_norm(h_BGD + self.attention(h_BGD, memory_BLD, memory_BLD, need_weights=False)[0])
        h_BGD = self.feed_forward_norm(h_BGD + self.feed_forward(h_BGD))
        logits_BGF = torch.einsum('bgd,gdf->bgf', h_BGD, self.weight_GDF)
        return logits_BGF.flatten(1)[:, :self.num_classes] + self.bias_K


class CSRA(nn.Module):
    """Class-specific residual attention (Zhu and Wu, "Residual Attention: A Simple but Effective Method for
    Multi-Label Recognition", ICCV 2021; Section 3).

    A 1x1 convolution without bias scores every class at every position. A class's logit is the average of its scores,
    plus `lam` times their average weighted by their own softmax over positions at temperature T. With several heads,
    each with its classifier, T is 1, 2, ..., H - 1 and infinity, which is the maximum; their logits are summed. The
    defaults are the paper's for ResNet: one head, T = 1.

    Shapes:
        Input: (B, C, H, W) or (B, L, C) as `input_fmt` says.
        Output: (B, num_classes).

    Args:
        in_features: C.
        num_classes: K.
        num_heads: H.
        lam: Weight of the attended part, lambda.
        input_fmt: 'NCHW' or 'NLC'.
    """

    def __init__(
            self, in_features: int, num_classes: int, num_heads: int = 1, lam: float = 0.1, input_fmt: str = 'NCHW',
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.lam = lam
        self.input_fmt = input_fmt
        self.classifier = nn.Conv2d(in_features, num_heads * num_classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x_BCHW = x.transpose(1, 2).unsqueeze(-1) if self.input_fmt == 'NLC' else x
        scores_BHKL = self.classifier(x_BCHW).flatten(2).unflatten(1, (self.num_heads, -1))
        logits_BK = scores_BHKL.mean(dim=-1).sum(dim=1)
        for head, scores_BKL in enumerate(scores_BHKL.unbind(1)):
            if 0 < head == self.num_heads - 1:
                attended_BK = scores_BKL.amax(dim=-1)
            else:
                attn_BKL = (scores_BKL if head == 0 else (head + 1) * scores_BKL).softmax(dim=-1)
                attended_BK = (attn_BKL * scores_BKL).sum(dim=-1)
            logits_BK = logits_BK + self.lam * attended_BK
        return logits_BK


class SimPool(nn.Module):
    """SimPool and a linear layer (Psomas et al., "Keep It SimPool: Who Said Supervised Transformers Suffer from
    Attention Deficit?", ICCV 2023; Section 3.3).

    One attention over the positions: its query is the average of the features, embedded linearly, its keys are the
    embedded features, and their products are divided by the root of C before the softmax. Values are the features
    themselves, above the least of an image. They are pooled by a weighted power mean: raised to the power `gamma`,
    averaged by the attention, and the root taken. As in the authors' release, keys and values come from features after
    a layer norm, the query from features before, and a small constant keeps the root's slope finite at the minimum.
    Left out: more than one attention head, the learned offset that the release offers with `gamma`.

    Shapes:
        Input: (B, C, H, W) or (B, L, C) as `input_fmt` says.
        Output: (B, num_classes).

    Args:
        in_features: C.
        num_classes: K.
        gamma: The exponent; the paper's are 2 for convolutional networks and 1.25 for transformers, 1 is the plain
            weighted average.
        input_fmt: 'NCHW' or 'NLC'.
    """
    eps = 1e-6

    def __init__(self, in_features: int, num_classes: int, gamma: float = 2., input_fmt: str = 'NCHW') -> None:
        super().__init__()
        self.gamma = gamma
        self.input_fmt = input_fmt
        self.norm = nn.LayerNorm(in_features, eps=self.eps)
        self.query = nn.Linear(in_features, in_features, bias=False)
        self.key = nn.Linear(in_features, in_features, bias=False)
        self.classifier = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x_BLC = to_tokens(x, self.input_fmt)
        normed_BLC = self.norm(x_BLC)
        q_BC = self.query(x_BLC.mean(dim=1))
        scores_BL = torch.einsum('bc,blc->bl', q_BC, self.key(normed_BLC)) / x_BLC.shape[-1] ** 0.5
        v_BLC = normed_BLC - normed_BLC.amin(dim=(1, 2), keepdim=True) + self.eps
        pooled_BC = torch.einsum('bl,blc->bc', scores_BL.softmax(dim=-1), v_BLC ** self.gamma) ** (1 / self.gamma)
        return self.classifier(pooled_BC)


class EfficientProbing(nn.Module):
    """Efficient probing and a linear layer (Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the
    Lens of Efficiency", ICLR 2026, arXiv 2506.10178; the method it calls EP).

    Learned queries attend over the features as they are: neither is projected first. The features are projected to
    values, whose channels are split into as many parts as there are queries. Each query's attention averages its own
    part, and the parts side by side are classified. The default is the authors': 32 queries, values as wide as the
    features. Left out: the batch norm without weights that they put before the classifier of every probe.

    Shapes:
        Input: (B, C, H, W) or (B, L, C) as `input_fmt` says.
        Output: (B, num_classes).

    Args:
        in_features: C.
        num_classes: K.
        num_queries: G.
        width: D, of the values, a multiple of G; C if None.
        input_fmt: 'NCHW' or 'NLC'.

    Raises:
        ValueError: If the queries do not divide the width.
    """

    def __init__(
            self, in_features: int, num_classes: int, num_queries: int = 32, width: Optional[int] = None,
            input_fmt: str = 'NCHW',
    ) -> None:
        super().__init__()
        width = in_features if width is None else width
        if width % num_queries:
            raise ValueError(f'EfficientProbing: width={width} is not a multiple of num_queries={num_queries}')
        self.num_queries = num_queries
        self.input_fmt = input_fmt
        self.queries_GC = nn.Parameter(0.02 * torch.randn(num_queries, in_features))
        self.value = nn.Linear(in_features, width, bias=False)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x_BLC = to_tokens(x, self.input_fmt)
        scores_BGL = self.queries_GC @ x_BLC.transpose(1, 2) / x_BLC.shape[-1] ** 0.5
        v_BLGD = self.value(x_BLC).unflatten(-1, (self.num_queries, -1))
        pooled_BGD = torch.einsum('bgl,blgd->bgd', scores_BGL.softmax(dim=-1), v_BLGD)
        return self.classifier(pooled_BGD.flatten(1))
