"""Floor 4: training and evaluation on Accelerate and timm."""
from .config import TrainConfig
from .data import create_dataset
from .engine import evaluate, train
from .recipes import configure

__all__ = ['TrainConfig', 'configure', 'create_dataset', 'evaluate', 'train']
