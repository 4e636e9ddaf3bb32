"""MobileNetV2 with NOAH. The backbone is timm's."""
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import EfficientNet, generate_default_cfgs, register_model

from ..catalog import SHIPPED, family, weights_at
from .builder import build_noah


def _cfg(**kwargs):
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem', 'classifier': ('classifier.key', 'classifier.value'),
        'license': 'apache-2.0', 'origin_url': 'https://github.com/OSVAI/NOAH',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    **{name: _cfg(
        file=str(shipped.file), num_classes=len(shipped.label_names), input_size=shipped.input_size,
        pool_size=shipped.pool_size, crop_pct=shipped.crop_pct, label_names=shipped.label_names,
        origin_url='https://github.com/zalandoresearch/fashion-mnist') for name, shipped in SHIPPED.items()},
    **{f'{row.name}.osvai_in1k*': _cfg(**weights_at(row.name)) for row in family('mobilenet')},
})


def _create(variant: str, pretrained: bool, **kwargs) -> EfficientNet:
    return build_noah(variant, pretrained, feature_cfg=dict(feature_cls='getter'), **kwargs)


@register_model
def mobilenetv2_100_noah(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 1.0 with NOAH, N=8, r=1/4."""
    return _create('mobilenetv2_100_noah', pretrained, **kwargs)


@register_model
def mobilenetv2_075_noah(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 0.75 with NOAH, N=8, r=1/4."""
    return _create('mobilenetv2_075_noah', pretrained, **kwargs)


@register_model
def mobilenetv2_050_noah(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 0.5 with NOAH, N=8, r=1/4."""
    return _create('mobilenetv2_050_noah', pretrained, **kwargs)


@register_model
def mobilenetv2_035_noah(pretrained: bool = False, **kwargs) -> EfficientNet:
    """MobileNetV2 0.35 with NOAH, N=8, r=1/4."""
    return _create('mobilenetv2_035_noah', pretrained, **kwargs)
