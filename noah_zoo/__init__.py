"""NOAH classification heads for timm. Importing this package registers the models."""
from . import models, weights
from .inference.attention import attention_maps
from .layers.noah_head import NoahHead
from .models.attach import add_noah_head

__all__ = ['NoahHead', 'add_noah_head', 'attention_maps', 'models', 'weights']
__version__ = '0.1.0'
