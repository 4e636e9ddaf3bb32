"""Images: the kinds of datasets, reading, loading and transforming."""
from .factory import create_dataset, create_datasets

__all__ = ['create_dataset', 'create_datasets']
