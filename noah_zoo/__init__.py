"""NOAH classification heads for timm. Importing this package registers the models."""
from . import models, weights
from .attach import add_noah_head
from .attention import attention_maps
from .head import NoahHead

__all__ = ['NoahHead', 'add_noah_head', 'attention_maps', 'models', 'weights']
__version__ = '0.1.0'
