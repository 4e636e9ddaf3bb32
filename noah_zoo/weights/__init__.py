"""Weights: where they come from, and the authors' release in timm's format."""
from ..models.builder import WeightsError, use_weights_finder
from .find import find_weights
from .released import convert_file, convert_released, read_released

__all__ = ['WeightsError', 'convert_file', 'convert_released', 'find_weights', 'read_released']

use_weights_finder(find_weights)
