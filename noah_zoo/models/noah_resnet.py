"""ResNet with NOAH. The backbone is timm's."""
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import ResNet, generate_default_cfgs, register_model

from ..catalog import family, weights_at
from .builder import build_noah


def _cfg(**kwargs):
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': ('fc.key', 'fc.value'),
        'license': 'apache-2.0', 'origin_url': 'https://github.com/OSVAI/NOAH',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    f'{row.name}.osvai_in1k*': _cfg(**weights_at(row.name)) for row in family('resnet')})


@register_model
def resnet18_noah(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with NOAH, N=4, r=1/2."""
    return build_noah('resnet18_noah', pretrained, **kwargs)


@register_model
def resnet50_noah(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 with NOAH, N=4, r=1/8."""
    return build_noah('resnet50_noah', pretrained, **kwargs)


@register_model
def resnet101_noah(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-101 with NOAH, N=4, r=1/8."""
    return build_noah('resnet101_noah', pretrained, **kwargs)


@register_model
def resnet152_noah(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-152 with NOAH, N=4, r=1/8."""
    return build_noah('resnet152_noah', pretrained, **kwargs)
