"""The heads that the paper compares NOAH with (Section IV-C, Tables VII to XI), by name.

    timm.create_model('resnet18_noah', noah_variant='d')
    noah-zoo train --model resnet18_noah --noah-variant d --output runs/variant_d

Table VI needs no name: it varies `num_groups` and `key_ratio`. Counts are of ResNet18 with N=4, r=1/2 and 1,000
classes, where the standard head has 520,000 parameters.
"""
from functools import partial
from typing import Callable, Dict, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from .noah_head import VALUE_SCALE, NoahHead


class PocaVariant(NoahHead):
    """`NoahHead`, step by step, with a step or a layer that a variant replaces. Arguments as there."""

    def classify(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes) of a map (B, C, H, W)."""
        return self.compose(x_BCHW)

    def embedding(self, in_features: int, num_maps: int, like: Tensor, kernel_size: int = 1) -> nn.Conv2d:
        """A convolution, grouped as the head is, to `num_maps` maps per POCA block, on the device of `like`."""
        return nn.Conv2d(
            in_features, self.num_groups * num_maps, kernel_size, padding=kernel_size // 2, groups=self.conv_groups,
            device=like.device, dtype=like.dtype)


class ChannelSoftmax(PocaVariant):
    """Table VIII: softmax across channels, the classes, instead of across positions."""

    def attend(self, key_BNKL: Tensor) -> Tensor:
        return key_BNKL.softmax(dim=2)


class MaxMerge(PocaVariant):
    """Table IX: maximum over positions instead of the sum; POCA blocks are still summed."""

    def merge(self, poca_BNKL: Tensor) -> Tensor:
        return poca_BNKL.amax(dim=-1).sum(dim=1)


class AvgMerge(PocaVariant):
    """Table IX: average over positions instead of the sum; POCA blocks are still summed."""

    def merge(self, poca_BNKL: Tensor) -> Tensor:
        return poca_BNKL.mean(dim=-1).sum(dim=1)


class ProjectedSum(PocaVariant):
    """Table X (a): C maps per block instead of K; a linear layer takes their sum to the classes (779,240)."""

    def __init__(self, in_features: int, num_classes: int, *args, **kwargs) -> None:
        super().__init__(in_features, num_classes, *args, **kwargs)
        if num_classes:
            like = self.key.weight
            self.key = self.embedding(self.key_features, in_features, like)
            self.value = self.embedding(self.value_features, in_features, like)
            self.fc = nn.Linear(in_features, num_classes, device=like.device, dtype=like.dtype)
            self.reset_parameters()

    def deviations_for_few_classes(self) -> Dict[nn.Module, float]:
        if not hasattr(self, 'fc'):  # NoahHead comes first, with layers of its own
            return {}
        return {self.fc: VALUE_SCALE * self.fc.in_features ** -0.5}  # the others have no output for a class

    def merge(self, poca_BNKL: Tensor) -> Tensor:
        return self.fc(poca_BNKL.sum(dim=(1, 3)))


class ProjectedConcat(PocaVariant):
    """Table X (b): C / N maps per block; a linear layer takes the N sums, concatenated, to the classes (579,560)."""

    def __init__(self, in_features: int, num_classes: int, *args, **kwargs) -> None:
        super().__init__(in_features, num_classes, *args, **kwargs)
        if num_classes:
            like = self.key.weight
            num_maps = in_features // self.num_groups
            self.key = self.embedding(self.key_features, num_maps, like)
            self.value = self.embedding(self.value_features, num_maps, like)
            self.fc = nn.Linear(self.num_groups * num_maps, num_classes, device=like.device, dtype=like.dtype)
            self.reset_parameters()

    deviations_for_few_classes = ProjectedSum.deviations_for_few_classes

    def merge(self, poca_BNKL: Tensor) -> Tensor:
        return self.fc(poca_BNKL.sum(dim=3).flatten(1))


class SigmoidAttention(PocaVariant):
    """Table X (c): sigmoid instead of softmax (520,000)."""

    def attend(self, key_BNKL: Tensor) -> Tensor:
        return key_BNKL.sigmoid()


class WideKernels(PocaVariant):
    """Table X (d): 3x3 kernels instead of 1x1, zero-padded (4,616,000). For maps, not for tokens."""

    def __init__(self, in_features: int, num_classes: int, *args, **kwargs) -> None:
        super().__init__(in_features, num_classes, *args, **kwargs)
        if self.input_fmt == 'NLC':
            raise ValueError("noah_variant='d': its 3x3 kernels need a map of features; this model gives tokens")
        if num_classes:
            like = self.key.weight
            self.key = self.embedding(self.key_features, num_classes, like, kernel_size=3)
            self.value = self.embedding(self.value_features, num_classes, like, kernel_size=3)
            self.reset_parameters()


class SharedAttention(PocaVariant):
    """Table X (e): one attention map per block for all classes, no second-level feature split (516,516)."""

    def __init__(self, in_features: int, num_classes: int, *args, **kwargs) -> None:
        super().__init__(in_features, num_classes, *args, **dict(kwargs, split_kv=False))
        if num_classes:
            self.key = self.embedding(self.key_features, 1, self.key.weight)
            self.reset_parameters()


class DeeperEmbeddings(PocaVariant):
    """Table X (f): a 1x1 layer of the same width, per block, before key and before value (520,000 + 33,280)."""

    def __init__(self, in_features: int, num_classes: int, *args, **kwargs) -> None:
        super().__init__(in_features, num_classes, *args, **kwargs)
        if num_classes:
            like = self.key.weight
            widths = self.key_features // self.num_groups, self.value_features // self.num_groups
            self.key = nn.Sequential(self.embedding(self.key_features, widths[0], like), self.key)
            self.value = nn.Sequential(self.embedding(self.value_features, widths[1], like), self.value)
            self.reset_parameters()


class SelfAttentionHead(NoahHead):
    """Table XI: a self-attention layer over positions, global average pooling, a linear layer.

    The paper gives the linear layer, 512 -> K, so the values have 512 channels. It leaves open the width of query and
    key, and whether there are biases. With biases a width of 480 gives ResNet50 the table's 27.04M parameters, and is
    the only multiple of 16 that does. There is no output projection, as the paper names no other layer, and there are
    8 heads, on which the count does not depend. `num_groups` and `key_ratio` mean nothing here.
    """
    widths = dict(query=480, key=480, value=512)

    def __init__(self, in_features: int, num_classes: int, *args, **kwargs) -> None:
        super().__init__(in_features, num_classes, *args, **kwargs)
        self.num_heads = 8
        if num_classes:
            dd = dict(device=self.key.weight.device, dtype=self.key.weight.dtype)
            for name, width in self.widths.items():
                setattr(self, name, nn.Linear(in_features, width, **dd))
            self.fc = nn.Linear(self.widths['value'], num_classes, **dd)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's defaults for linear layers."""
        for layer in self.children():
            layer.reset_parameters()

    def classify(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes) of a map (B, C, H, W)."""
        x_BLC = x_BCHW.flatten(2).transpose(1, 2)
        query = self.query(x_BLC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key = self.key(x_BLC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        value = F.dropout(self.value(x_BLC), self.drop_rate, self.training)
        value = value.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.fc(F.scaled_dot_product_attention(query, key, value).mean(dim=2).flatten(1))


VARIANTS: Dict[str, Callable[..., NoahHead]] = {
    'no_split': partial(NoahHead, split_groups=False, split_kv=False),  # Table VII
    'no_split_kv': partial(NoahHead, split_kv=False),
    'channel_softmax': ChannelSoftmax,  # Table VIII
    'max': MaxMerge,  # Table IX
    'avg': AvgMerge,
    'a': ProjectedSum,  # Table X
    'b': ProjectedConcat,
    'c': SigmoidAttention,
    'd': WideKernels,
    'e': SharedAttention,
    'f': DeeperEmbeddings,
    'self_attention': SelfAttentionHead,  # Table XI
}


def head_class(noah_variant: Optional[str] = None) -> Callable[..., NoahHead]:
    """What makes the head: `NoahHead`, or that of a name in `VARIANTS`; arguments are those of `NoahHead`.

    Raises:
        ValueError: If there is no such variant.
    """
    if noah_variant is None:
        return NoahHead
    if noah_variant not in VARIANTS:
        raise ValueError(f'noah_variant={noah_variant!r} is unknown; choose from {", ".join(VARIANTS)}')
    return VARIANTS[noah_variant]
