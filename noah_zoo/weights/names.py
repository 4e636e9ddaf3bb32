"""The names of parameters in the authors' release, from timm's."""
import re
from typing import Dict, Iterable, List

from ..catalog import FAMILIES


def released_names(keys: Iterable[str], family: str) -> Dict[str, str]:
    """Map each key of a timm model's state dict to the released name.

    Args:
        keys: All keys, in the model's order.
        family: The family of the catalog.
    """
    keys = list(keys)
    layers = _mobilenet_layers(keys) if family == 'mobilenet' else {}
    names = {}
    for key in keys:
        layer, _, leaf = key.rpartition('.')
        name = f'{layers[layer]}.{leaf}' if layer in layers else key
        for pattern, replacement in FAMILIES[family].released_names:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    return names


def _mobilenet_layers(keys: List[str]) -> Dict[str, str]:
    """timm's layers of MobileNetV2 to torchvision's: one flat list of features, numbered inside by order."""
    blocks: Dict[str, List[str]] = {}
    for layer in dict.fromkeys(key.rpartition('.')[0] for key in keys if key.startswith('blocks.')):
        blocks.setdefault(layer.rpartition('.')[0], []).append(layer)
    last = f'features.{len(blocks) + 1}'
    names = {'conv_stem': 'features.0.0', 'bn1': 'features.0.1', 'conv_head': f'{last}.0', 'bn2': f'{last}.1'}
    for i, layers in enumerate(blocks.values(), start=1):
        places = ('0.0', '0.1', '1.0', '1.1', '2', '3') if len(layers) == 6 else ('0.0', '0.1', '1', '2')
        names.update({layer: f'features.{i}.conv.{place}' for layer, place in zip(layers, places)})
    return names
