"""MLP-Mixer and gMLP with NOAH, and the thin vanilla twins. The backbone is timm's MlpMixer."""
from functools import partial

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import GatedMlp
from timm.models import MlpMixer, generate_default_cfgs, register_model
from timm.models.mlp_mixer import SpatialGatingBlock, checkpoint_filter_fn

from ..catalog import TWINS, family, weights_at
from .builder import build_model, build_noah


def _cfg(**kwargs):
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None,
        'crop_pct': 0.9, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_INCEPTION_MEAN, 'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'stem.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/OSVAI/NOAH',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    **{f'{row.vanilla}.osvai_in1k*': _cfg(**weights_at(row.vanilla))
       for row in family('mixer', 'gmlp') if row.vanilla in TWINS},
    **{f'{row.name}.osvai_in1k*': _cfg(classifier=('head.key', 'head.value'), **weights_at(row.name))
       for row in family('mixer', 'gmlp')},
})
_FEATURES = dict(feature_cls='getter', out_indices=3)
_create_noah = partial(build_noah, input_fmt='NLC', filter_fn=checkpoint_filter_fn, feature_cfg=_FEATURES)


def _create_thin(variant: str, pretrained: bool, **kwargs) -> MlpMixer:
    return build_model(
        MlpMixer, variant, pretrained, filter_fn=checkpoint_filter_fn, feature_cfg=_FEATURES, **kwargs)


def _create_thin_gmlp(variant: str, pretrained: bool, **kwargs) -> MlpMixer:
    model_args = dict(
        patch_size=16, num_blocks=30, mlp_ratio=6, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)
    return _create_thin(variant, pretrained, **dict(model_args, **kwargs))


@register_model
def mixer_s16_075_224(pretrained: bool = False, **kwargs) -> MlpMixer:
    """Mixer-S/16, 0.75 of the width."""
    model_args = dict(patch_size=16, num_blocks=8, embed_dim=384)
    return _create_thin('mixer_s16_075_224', pretrained, **dict(model_args, **kwargs))


@register_model
def mixer_s16_050_224(pretrained: bool = False, **kwargs) -> MlpMixer:
    """Mixer-S/16, half the width."""
    model_args = dict(patch_size=16, num_blocks=8, embed_dim=256)
    return _create_thin('mixer_s16_050_224', pretrained, **dict(model_args, **kwargs))


@register_model
def gmlp_ti16_075_224(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP-Ti/16, 0.75 of the width."""
    return _create_thin_gmlp('gmlp_ti16_075_224', pretrained, **dict(dict(embed_dim=96), **kwargs))


@register_model
def gmlp_ti16_050_224(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP-Ti/16, half the width."""
    return _create_thin_gmlp('gmlp_ti16_050_224', pretrained, **dict(dict(embed_dim=64), **kwargs))


@register_model
def mixer_s16_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """Mixer-S/16 with NOAH, N=4, r=1/2."""
    return _create_noah('mixer_s16_224_noah', pretrained, **kwargs)


@register_model
def mixer_s16_075_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """Mixer-S/16, 0.75 of the width, with NOAH, N=4, r=1/2."""
    return _create_noah('mixer_s16_075_224_noah', pretrained, **kwargs)


@register_model
def mixer_s16_050_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """Mixer-S/16, half the width, with NOAH, N=4, r=1/2."""
    return _create_noah('mixer_s16_050_224_noah', pretrained, **kwargs)


@register_model
def mixer_b16_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """Mixer-B/16 with NOAH, N=4, r=1/2."""
    return _create_noah('mixer_b16_224_noah', pretrained, **kwargs)


@register_model
def gmlp_ti16_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP-Ti/16 with NOAH, N=4, r=1/2."""
    return _create_noah('gmlp_ti16_224_noah', pretrained, **kwargs)


@register_model
def gmlp_ti16_075_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP-Ti/16, 0.75 of the width, with NOAH, N=4, r=1/2."""
    return _create_noah('gmlp_ti16_075_224_noah', pretrained, **kwargs)


@register_model
def gmlp_ti16_050_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP-Ti/16, half the width, with NOAH, N=4, r=1/2."""
    return _create_noah('gmlp_ti16_050_224_noah', pretrained, **kwargs)


@register_model
def gmlp_s16_224_noah(pretrained: bool = False, **kwargs) -> MlpMixer:
    """gMLP-S/16 with NOAH, N=4, r=1/2."""
    return _create_noah('gmlp_s16_224_noah', pretrained, **kwargs)
