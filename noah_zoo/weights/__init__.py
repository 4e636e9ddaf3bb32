"""Floor 3: weights, from the authors' release to timm's format."""
from .official import convert_file, convert_official, read_official

__all__ = ['convert_file', 'convert_official', 'read_official']
