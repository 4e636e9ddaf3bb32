"""Floor 4: two other heads that attend over positions, written from their papers, to measure NOAH against.

Tensor names say their shape: B batch, H heads, G queries, F classes of a query, D width, K classes, L positions,
C channels.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        x_BLC = x.flatten(2).transpose(1, 2) if self.input_fmt == 'NCHW' else x
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
