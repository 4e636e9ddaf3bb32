"""Models on disk: timm's layout, with a `config.json` that transformers reads, too."""
import json
from pathlib import Path
from typing import Any, Dict, Optional

from timm.models import save_for_hf
from torch import nn

from ..files import disk_errors, write
from .attach import START_ARGS

# Left out of the saved arguments of a model. transformers hands `num_classes` to timm by itself, and Python refuses an
# argument that comes twice; timm records it with the arguments since 1.0.31, and beside them, where both read it.
UNSAVED_ARGS = ('num_classes', *START_ARGS)


def save_model(
        model: nn.Module, folder: Path, model_args: Optional[Dict[str, Any]] = None, **model_config: Any) -> None:
    """Save a model with timm's `save_for_hf`, as `model.safetensors` and a `config.json` for timm and transformers.

    Args:
        model: A timm model.
        folder: Where to; is made.
        model_args: What to create the model with, beside the arguments that timm has recorded.
        **model_config: What else `config.json` says, `label_names` for one.

    Raises:
        OSError: If the weights cannot be written.
        ValueError: If an argument cannot be written as JSON, or is not that of the model.
    """
    with disk_errors(folder):
        save_for_hf(model, str(folder), safe_serialization=True, model_args=model_args, model_config=model_config)
    write(folder / 'config.json', saved_config(folder / 'config.json'))


def saved_config(file: Path) -> str:
    """A `config.json` of timm for timm and transformers.

    The number of classes is not repeated among the model's arguments. What training began with, which may be a path of
    this machine, is left out. Where an image may have several classes, transformers is told so (`problem_type`).

    Args:
        file: As timm wrote it, or this function.

    Returns:
        The text of the file.
    """
    config = json.loads(file.read_text(encoding='utf-8'))
    args = config.get('model_args') or {}
    config['model_args'] = {name: value for name, value in args.items() if name not in UNSAVED_ARGS}
    if 'multilabel' in (config['pretrained_cfg'].get('notes') or ()):
        config['problem_type'] = 'multi_label_classification'
    return json.dumps(config, indent=2) + '\n'
