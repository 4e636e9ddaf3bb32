"""Floor 1: POCA, the pairwise object category attention operator (paper, Section III-B).

Tensor names say their shape: B batch, N groups, K classes, L positions, H height, W width, C channels.
"""
from typing import Optional

import torch.nn.functional as F
from torch import Tensor


def poca(
        key_BCHW: Tensor,
        value_BCHW: Tensor,
        key_weight: Tensor,
        key_bias: Optional[Tensor],
        value_weight: Tensor,
        value_bias: Optional[Tensor],
        num_groups: int,
        conv_groups: int,
        drop_rate: float = 0.,
        training: bool = False,
) -> Tensor:
    """Embed, attend and merge: per class and per group a softmax over positions weights the value map; sum it all.

    Args:
        key_BCHW: The channels that the key embedding reads, (B, Ck, H, W).
        value_BCHW: The channels that the value embedding reads, (B, Cv, H, W).
        key_weight: 1x1 kernel, (N * K, Ck / conv_groups, 1, 1).
        key_bias: (N * K,). It cancels in the softmax; checkpoints have it.
        value_weight: 1x1 kernel, (N * K, Cv / conv_groups, 1, 1).
        value_bias: (N * K,).
        num_groups: N, the number of POCA blocks.
        conv_groups: Groups of the two convolutions, N with the first-level feature split and 1 without.
        drop_rate: Dropout probability on the value map.
        training: Whether dropout is on.

    Returns:
        Logits, (B, K).
    """
    attn_BNKL = F.conv2d(key_BCHW, key_weight, key_bias, groups=conv_groups).flatten(2).unflatten(1, (num_groups, -1))
    value_BNKL = F.conv2d(value_BCHW, value_weight, value_bias, groups=conv_groups).flatten(2)
    value_BNKL = F.dropout(value_BNKL, drop_rate, training).unflatten(1, (num_groups, -1))
    return (attn_BNKL.softmax(dim=-1) * value_BNKL).sum(dim=(1, 3))
