"""The head on any timm model, as one name of timm: this is how a saved model with an added head comes back."""
from timm.models import register_model
from torch import nn

from .builder import build_any


@register_model
def noah(pretrained: bool = False, backbone: str = 'resnet18', **kwargs) -> nn.Module:
    """`backbone`, a timm name, with a NOAH head; N and r by the paper's rule of thumb unless given. See `build_any`."""
    return build_any(backbone, pretrained, **kwargs)
