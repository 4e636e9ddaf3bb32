"""Classify image files."""
import logging
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

from ..catalog import CATALOG, SHIPPED, TAG, TWINS
from ..data.folder import find_image_files
from ..data.images import DamagedImageError, read_image
from ..models.attach import eval_transform
from ..text import near
from ..weights import WeightsError
from ..weights.drive import fetch_released
from ..weights.released import write_folder

_logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parents[1] / 'samples'
DEFAULT_MODEL = 'mobilenetv2_035_noah.fashion_mnist'


def check_model(name: str) -> None:
    """Raise ValueError, with what comes near, if timm knows no model of this name; 'hf-hub:' and such pass."""
    architecture = name.split('.')[0]
    if ':' not in name and not timm.is_model(architecture):
        close = near(architecture, timm.list_models())
        raise ValueError(f'unknown model {name!r}' + (f'; did you mean {close}?' if close else ''))


def load_model(name: str, device: str = 'cpu') -> nn.Module:
    """A pretrained model in eval mode.

    Args:
        name: A timm name, with or without tag, 'hf-hub:...' or 'local-dir:...'.
        device: A torch device.

    Raises:
        ValueError: If timm does not know the name, or torch not the device.
    """
    check_model(name)
    try:
        return timm.create_model(name, pretrained=True).to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'{name} on {device}: {error}') from error


def load_twin(name: str, device: str = 'cpu') -> nn.Module:
    """The vanilla twin of a pretrained NOAH model in eval mode: the authors', trained as theirs, or the one shipped.

    Args:
        name: A NOAH model with weights of the authors, tag or not, or the one inside the package.
        device: A torch device.

    Raises:
        ValueError: If no such twin is known, or its weights cannot be had.
    """
    architecture, _, tag = name.partition('.')
    if name in SHIPPED:
        return load_model(f'local-dir:{SHIPPED[name].twin}', device)
    if architecture not in CATALOG or tag not in ('', TAG):
        raise ValueError(f'{name}: no vanilla twin with weights for the same classes is known')
    vanilla = CATALOG[architecture].vanilla
    if vanilla in TWINS:
        return load_model(f'{vanilla}.{TAG}', device)
    try:
        weights = load_file(fetch_released(vanilla))
    except WeightsError as error:
        raise ValueError(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        return load_model(f'local-dir:{write_folder(weights, vanilla, Path(folder) / vanilla)}', device)


def label_names(model: nn.Module) -> List[str]:
    """Class names in the order of the logits: the model's own, ImageNet's for 1,000 classes, else numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        return list(names)
    if model.num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(1000)]
    return [str(i) for i in range(model.num_classes)]


def short_names(model: nn.Module) -> List[str]:
    """`label_names` for pictures: of ImageNet's, which list synonyms, the first; a model's own as they are."""
    own = len(model.pretrained_cfg.get('label_names') or ()) == model.num_classes
    return [name if own else name.split(',')[0] for name in label_names(model)]


def find_images(paths: Sequence[str]) -> List[Path]:
    """The image files among files and folders; folders are searched through, in natural order.

    Raises:
        FileNotFoundError: If a path does not exist or a folder has no image.
    """
    images: List[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found, left_out = find_image_files(path)
            if not found:
                raise FileNotFoundError(
                    f'{path}: no image in this folder{"; left out: " if left_out else ""}{left_out}')
            if left_out:
                _logger.warning('%s: left out %s', path, left_out)
            images += map(Path, found)
        elif path.exists() or path.is_symlink():
            images.append(path)
        else:
            raise FileNotFoundError(f'{path}: no such file or folder')
    return images


def probabilities(model: nn.Module, logits_BK: Tensor) -> Tensor:
    """Probabilities (B, K), which do not add up to 1 for a model that was trained for several classes per image."""
    multilabel = 'multilabel' in (model.pretrained_cfg.get('notes') or ())
    return logits_BK.float().sigmoid() if multilabel else logits_BK.float().softmax(dim=-1)


@torch.inference_mode()
def predict(model: nn.Module, images: Sequence[Path], top_k: int = 5) -> Iterator[Dict[str, Any]]:
    """Classify images one by one.

    Args:
        model: A model of `load_model`.
        images: Image files.
        top_k: Number of classes to give, at most the model's.

    Yields:
        `{'path', 'predictions': [{'label', 'index', 'probability'}]}` per image, best class first, or
        `{'path', 'error'}` for a file that is no whole image.
    """
    transform = eval_transform(model)
    names = label_names(model)
    parameter = next(model.parameters())
    for path in images:
        try:
            x_BCHW = transform(read_image(path)).unsqueeze(0)
        except (OSError, DamagedImageError) as error:
            yield {'path': str(path), 'error': str(error)}
            continue
        logits = model(x_BCHW.to(parameter.device, parameter.dtype))
        values, indices = probabilities(model, logits)[0].topk(min(top_k, len(names)))
        yield {'path': str(path), 'predictions': [
            {'label': names[i], 'index': i, 'probability': p} for p, i in zip(values.tolist(), indices.tolist())]}
