"""NOAH classification heads for timm. Importing this package registers the models."""
import sys

from .version import __version__

if sys.argv[:1] == ['-m'] and sys.orig_argv[-len(sys.argv)].removeprefix('-m') == 'noah_zoo':
    # `python -m noah_zoo ...`: help and wrong arguments end the command here, before PyTorch is imported.
    from .cli import parse_args
    parse_args(sys.argv[1:])

from . import models, weights
from .inference.attention import attention_maps
from .layers.noah_head import NoahHead
from .models.attach import add_noah_head

__all__ = ['NoahHead', '__version__', 'add_noah_head', 'attention_maps', 'models', 'weights']
