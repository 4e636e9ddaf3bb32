"""NOAH classification heads for timm. Importing this package registers the models."""
from . import models, weights
from .head import NoahHead

__all__ = ['NoahHead', 'models', 'weights']
__version__ = '0.1.0'
