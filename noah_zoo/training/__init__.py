"""Training and evaluation on Accelerate and timm."""
from ..config import TrainConfig
from .settings import configure
from .trainer import evaluate, train

__all__ = ['TrainConfig', 'configure', 'evaluate', 'train']
