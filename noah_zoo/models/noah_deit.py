"""DeiT with NOAH, and the thin vanilla twins. The backbone is timm's VisionTransformer."""
from collections import OrderedDict
from functools import partial
from typing import Optional

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from ..catalog import TWINS, family, weights_at
from .builder import build_model, build_noah


class ThinDeit(VisionTransformer):
    """timm's VisionTransformer, with the released code's representation layer before the head if asked for.

    Args:
        pre_logits: Put a linear layer to 192 channels and a tanh between pooling and head. The released code does so
            for widths below 192; the paper counts parameters without it (Table II).
        **kwargs: See timm.
    """

    def __init__(self, pre_logits: bool = False, num_classes: int = 1000, device=None, dtype=None, **kwargs) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_classes=num_classes, **kwargs, **dd)
        self.representation = nn.Identity()
        if pre_logits:
            self.head_hidden_size = 192
            self.representation = nn.Sequential(OrderedDict(
                fc=nn.Linear(self.embed_dim, self.head_hidden_size, **dd), act=nn.Tanh()))
            nn.init.trunc_normal_(self.representation.fc.weight, std=.02)
            nn.init.zeros_(self.representation.fc.bias)
            self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """timm's `reset_classifier`, for a classifier after the representation layer."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes and self.head_hidden_size != self.embed_dim:
            weight = self.head.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or what the classifier reads (B, C) with `pre_logits`."""
        x = self.head_drop(self.representation(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)


def _cfg(**kwargs):
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/OSVAI/NOAH',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    **{f'{row.vanilla}.osvai_in1k*': _cfg(**weights_at(row.vanilla))
       for row in family('deit') if row.vanilla in TWINS},
    **{f'{row.name}.osvai_in1k*': _cfg(classifier=('head.key', 'head.value'), **weights_at(row.name))
       for row in family('deit')},
})
_FEATURES = dict(feature_cls='getter', out_indices=3)


class Contiguous(nn.Identity):
    """Tokens in the order of their memory. A class token has that effect; without one, the tokens that the embedding
    transposed would stay so through all blocks, and every norm would copy them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


def _contiguous(*args, **kwargs) -> nn.Module:
    return Contiguous()


_create_noah = partial(
    build_noah, input_fmt='NLC', filter_fn=checkpoint_filter_fn, feature_cfg=_FEATURES,
    twin_args=dict(class_token=False, global_pool='avg', fc_norm=False, embed_norm_layer=_contiguous))


def _create_thin(variant: str, pretrained: bool, **kwargs) -> ThinDeit:
    return build_model(
        ThinDeit, variant, pretrained, filter_fn=checkpoint_filter_fn, feature_cfg=_FEATURES, **kwargs)


@register_model
def deit_tiny_075_patch16_224(pretrained: bool = False, **kwargs) -> ThinDeit:
    """DeiT-Tiny, 0.75 of the width. `pre_logits=True` gives the released code's layer before the head."""
    model_args = dict(patch_size=16, embed_dim=144, depth=12, num_heads=3)
    return _create_thin('deit_tiny_075_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_tiny_050_patch16_224(pretrained: bool = False, **kwargs) -> ThinDeit:
    """DeiT-Tiny, half the width. `pre_logits=True` gives the released code's layer before the head."""
    model_args = dict(patch_size=16, embed_dim=96, depth=12, num_heads=3)
    return _create_thin('deit_tiny_050_patch16_224', pretrained, **dict(model_args, **kwargs))


@register_model
def deit_tiny_patch16_224_noah(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """DeiT-Tiny without class token, with NOAH, N=4, r=1/2."""
    return _create_noah('deit_tiny_patch16_224_noah', pretrained, **kwargs)


@register_model
def deit_tiny_075_patch16_224_noah(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """DeiT-Tiny, 0.75 of the width, with NOAH, N=4, r=1/2. `pre_logits=True` as in its twin."""
    return _create_noah('deit_tiny_075_patch16_224_noah', pretrained, **kwargs)


@register_model
def deit_tiny_050_patch16_224_noah(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """DeiT-Tiny, half the width, with NOAH, N=4, r=1/2. `pre_logits=True` as in its twin."""
    return _create_noah('deit_tiny_050_patch16_224_noah', pretrained, **kwargs)


@register_model
def deit_small_patch16_224_noah(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """DeiT-Small without class token, with NOAH, N=4, r=1/2."""
    return _create_noah('deit_small_patch16_224_noah', pretrained, **kwargs)


@register_model
def deit_base_patch16_224_noah(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """DeiT-Base without class token, with NOAH, N=4, r=1/2."""
    return _create_noah('deit_base_patch16_224_noah', pretrained, **kwargs)
