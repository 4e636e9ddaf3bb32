"""Weights: where they come from, and the authors' release in timm's format."""
from ..models.builder import WeightsError, use_weights_finder
from .find import find_weights
from .official import convert_file, convert_official, read_official

__all__ = ['WeightsError', 'convert_file', 'convert_official', 'find_weights', 'read_official']

use_weights_finder(find_weights)
