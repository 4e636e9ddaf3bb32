"""The head on any timm model, as one name of timm: this is how a saved model with an added head comes back."""
from dataclasses import replace

from timm.models import generate_default_cfgs, register_model
from torch import nn

from .builder import build_any, cfg_without_weights

# of the backbone that it has unless told otherwise; a model has the cfg of its own backbone
default_cfgs = generate_default_cfgs({
    'noah': replace(cfg_without_weights('resnet18'), classifier=('fc.key', 'fc.value'))})


@register_model
def noah(pretrained: bool = False, backbone: str = 'resnet18', **kwargs) -> nn.Module:
    """`backbone`, a timm name, with a NOAH head; N and r as by `add_noah_head` unless given. See `build_any`."""
    return build_any(backbone, pretrained, **kwargs)
