"""Classify image files."""
import logging
import os
import re
import tempfile
from contextlib import nullcontext
from glob import glob
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..catalog import CATALOG, SHIPPED, TAG, TWINS
from ..data.folder import find_image_files, natural
from ..data.images import DamagedImageError, mode_of, read_image
from ..data.loader import on_device, outlive_sigterm
from ..models.attach import data_config_of, eval_transform, input_size_of, is_convolutional, value_range_of
from ..text import near, one_line
from ..weights import WeightsError
from ..weights.find import fetch_of_authors
from ..weights.released import write_folder

_logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parents[1] / 'samples'
DEFAULT_MODEL = 'mobilenetv2_035_noah.fashion_mnist'


def check_model(name: str) -> None:
    """Raise ValueError, with what may be meant, if timm knows no model of this name, or if it is the folder of a run;
    'hf-hub:' and such pass."""
    architecture, folder = name.split('.')[0], Path(name.removeprefix('local-dir:'))
    if timm.is_model(architecture):  # also where a folder is called so
        return
    if (folder / 'best' / 'config.json').is_file():
        raise ValueError(f"{folder} is the folder of a run; its model is 'local-dir:{folder / 'best'}'")
    if ':' in name:
        return
    if (folder / 'config.json').is_file():
        raise ValueError(f"{name} is a folder, not a name of timm; its model is 'local-dir:{name}'")
    close = near(architecture, timm.list_models())
    hint = '; of files, validate reads those that export has written' if folder.is_file() else ''
    raise ValueError(f'unknown model {name!r}' + (hint or (f'; did you mean {close}?' if close else '')))


def check_device(name: str) -> None:
    """Raise ValueError, with the devices of this machine, if a torch device cannot be used."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        kind = torch.accelerator.current_accelerator()
        found = [f'{kind.type}:{number}' for number in range(torch.accelerator.device_count())] if kind else []
        raise ValueError(f'device {name!r}: {one_line(error)}; this machine has {", ".join(["cpu", *found])}') from None


def load_model(name: str, device: str = 'cpu') -> nn.Module:
    """A pretrained model in eval mode; on a GPU, one of convolutions is channels-last.

    Args:
        name: A timm name, with or without tag, 'hf-hub:...' or 'local-dir:...'.
        device: A torch device.

    Raises:
        ValueError: If timm does not know the name, or torch not the device.
    """
    check_model(name)
    check_device(device)
    try:
        model = timm.create_model(name, pretrained=True)
        channels_last = torch.device(device).type == 'cuda' and is_convolutional(model)
        return model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format).eval()
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
        weights = load_file(fetch_of_authors(vanilla))
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


def find_images(paths: Sequence[str]) -> List[str]:
    """The image files among files, folders and patterns ('*.png', '**/*.png'), which Windows' shells do not expand.

    Folders are searched through, in natural order.

    Raises:
        FileNotFoundError: If a path does not exist, a pattern matches nothing or a folder has no image.
        ValueError: If a path is a URL.
    """
    images: List[str] = []
    for name in paths:
        path = Path(name)
        if re.match('[a-z]+://', name):
            raise ValueError(f'{name}: URLs are not read; download the file')
        if not path.exists() and any(mark in name for mark in '*?['):
            found = sorted(glob(name, recursive=True), key=natural)
            if not found:
                raise FileNotFoundError(f'{name}: no file matches')
            images += find_images(found)
        elif path.is_dir():
            found, left_out = find_image_files(path)
            if not found:
                raise FileNotFoundError(
                    f'{path}: no image in this folder{"; left out: " if left_out else ""}{left_out}')
            if left_out:
                _logger.warning('%s: left out %s', path, left_out)
            images += found
        elif path.exists() or path.is_symlink():
            images.append(str(path))
        else:
            raise FileNotFoundError(f'{path}: no such file or folder')
    return images


def probabilities(model: nn.Module, logits_BK: Tensor) -> Tensor:
    """Probabilities (B, K), which do not add up to 1 for a model that was trained for several classes per image."""
    multilabel = 'multilabel' in (model.pretrained_cfg.get('notes') or ())
    return logits_BK.float().sigmoid() if multilabel else logits_BK.float().softmax(dim=-1)


def reading_of(model: nn.Module) -> Dict[str, Any]:
    """`mode` and `value_range` of `read_image` for a model. Errors as `mode_of`."""
    return {'mode': mode_of(input_size_of(model)[0]), 'value_range': value_range_of(model)}


def read_for(model: nn.Module, *datasets: Any) -> None:
    """Have data sets read images as a model takes them. Errors as `mode_of`."""
    reading = reading_of(model)
    for images in datasets:
        images.input_img_mode, images.value_range = reading['mode'], reading['value_range']


def has_bf16(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16."""
    return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


@torch.inference_mode()
def logits_of(
        model: nn.Module, batches: Iterable[Tuple[Tensor, Any]],
        autocast: Optional[Callable[[], ContextManager]] = None) -> Iterator[Tuple[Tensor, Any]]:
    """What a model says of one batch after another; validation, prediction and the page all ask here.

    Args:
        model: A model on its device.
        batches: Images (B, C, H, W) as the model takes them, there, and what belongs to them.
        autocast: Makes the context in which the model runs; if None, float32 images are computed in bfloat16 on a GPU
            that has it.

    Yields:
        Logits (B, K) in float32, and what belongs to the images.
    """
    model.eval()
    for x_BCHW, belongings in batches:
        if autocast is not None:
            context = autocast()
        elif x_BCHW.dtype == torch.float32 and has_bf16(x_BCHW.device):
            context = torch.autocast(x_BCHW.device.type, torch.bfloat16)
        else:
            context = nullcontext()
        with context:
            logits = model(x_BCHW)
        yield logits.float(), belongings


class ImageFiles(Dataset):
    """Image files as a model takes them in evaluation, in uint8.

    An item is (C, H, W) and None; of a file that is no whole image, zeros and the reason.
    """

    def __init__(self, paths: Sequence[str], model: nn.Module) -> None:
        self.size, self.reading = input_size_of(model), reading_of(model)
        self.paths, self.transform = paths, eval_transform(model, normalize=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Tensor, Optional[str]]:
        try:
            return self.transform(read_image(self.paths[index], **self.reading)), None
        except (OSError, DamagedImageError) as error:
            return torch.zeros(self.size, dtype=torch.uint8), str(error)


class Reasons(list):
    """Of the images of a batch: why one cannot be read, or None. timm's loader moves what belongs to images as well."""

    def to(self, *args: Any, **kwargs: Any) -> 'Reasons':
        return self


def stack(items: Sequence[Tuple[Tensor, Optional[str]]]) -> Tuple[Tensor, Reasons]:
    """A batch of `ImageFiles`."""
    images, reasons = zip(*items)
    return torch.stack(images), Reasons(reasons)


def default_workers(count: int, device: torch.device) -> int:
    """Processes that read so many images: none for few, which are read before a process has started; beside a GPU one
    per processor, 8 at most; else one per four processors, as the model needs the others."""
    processors = os.cpu_count() or 1
    if count < 1000:
        return 0
    return min(processors, 8) if device.type == 'cuda' else max(processors // 4, 1)


def predict(
        model: nn.Module, images: Sequence[str], top_k: int = 5, batch_size: int = 64, workers: int = 0,
) -> Iterator[Dict[str, Any]]:
    """Classify images, batch by batch, in their order.

    Args:
        model: A model of `load_model`.
        images: Image files.
        top_k: Number of classes to give, at most the model's.
        batch_size: Images at a time.
        workers: Processes that read images; with 0 this one does.

    Returns:
        A dictionary per image, of 'path' and 'predictions', a list of 'label', 'index' and 'probability' with the best
        class first, or of 'path' and 'error' for a file that is not a readable image or whose logits are not finite.

    Raises:
        ValueError: If the model takes images of other channels than 1, 3 or 4.
    """
    files, parameter = ImageFiles(images, model), next(model.parameters())
    loader = DataLoader(
        files, batch_size, num_workers=workers, collate_fn=stack, pin_memory=parameter.is_cuda,
        worker_init_fn=outlive_sigterm)
    batches = on_device(loader, data_config_of(model), parameter.device, parameter.dtype)
    return _predictions(model, images, batches, top_k) if len(files) else iter(())


def _predictions(model: nn.Module, images: Sequence[str], batches: Iterable, top_k: int) -> Iterator[Dict[str, Any]]:
    names, paths = label_names(model), iter(images)
    for logits_BK, reasons in logits_of(model, batches):
        values, indices = probabilities(model, logits_BK).topk(min(top_k, len(names)))
        are_finite = logits_BK.isfinite().all(dim=1)
        for reason, is_finite, row, classes in zip(reasons, are_finite.tolist(), values.tolist(), indices.tolist()):
            path = str(next(paths))
            if reason is None and not is_finite:
                reason = f'{path}: the logits of the model are not finite'
            yield {'path': path, 'error': reason} if reason is not None else {'path': path, 'predictions': [
                {'label': names[i], 'index': i, 'probability': p} for p, i in zip(row, classes)]}
