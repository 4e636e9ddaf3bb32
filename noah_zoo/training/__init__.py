"""Floor 4: training and evaluation on Accelerate and timm.data."""
from .data import create_dataset
from .engine import TrainConfig, evaluate, train

__all__ = ['TrainConfig', 'create_dataset', 'evaluate', 'train']
