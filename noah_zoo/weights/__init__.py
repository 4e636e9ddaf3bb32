"""Floor 3: weights: where they come from, the authors' release in timm's format, publishing on the Hub."""
from ..models import build
from ..models.build import WeightsError
from .find import find_weights
from .official import convert_file, convert_official, read_official

__all__ = ['WeightsError', 'convert_file', 'convert_official', 'find_weights', 'read_official']

build.find_weights = find_weights
