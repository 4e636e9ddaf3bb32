"""NOAH classification heads for timm. Importing this package registers the models."""
from . import models
from .head import NoahHead

__all__ = ['NoahHead', 'models']
__version__ = '0.1.0'
