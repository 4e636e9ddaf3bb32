"""Pictures of where a model looked (paper, Section IV-D, Figure 2)."""
import difflib
import functools
import importlib.util
from typing import List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ..data.images import convert, mode_of
from ..models.attach import data_config_of, eval_transform, name_of, value_range_of
from .attention import attention_maps, token_grid
from .predict import label_names, load_model, load_twin, probabilities, short_names

COLOURS = 'viridis'  # told apart by eyes that see fewer colours, and in grey


class Seen(NamedTuple):
    """An image as a model takes it, (1, C, H, W), and as a picture of the same pixels."""
    x_1CHW: Tensor
    picture: Image.Image


def as_model_sees(model: nn.Module, image: Image.Image) -> Seen:
    """Convert, resize, crop and normalise an image by the model's pretrained cfg; it is moved to the model's device and
    type."""
    config = data_config_of(model)
    x_CHW = eval_transform(model)(convert(image, mode_of(config['input_size'][0]), value_range_of(model)))
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    pixels = (x_CHW * std + mean).clamp(0, 1).mul(255).round().byte()
    parameter = next(model.parameters())
    return Seen(x_CHW.unsqueeze(0).to(parameter), convert(to_pil_image(pixels), 'RGB'))


def load_pair(
        name: str, twin: Optional[str] = None, device: str = 'cpu',
) -> Tuple[nn.Module, Optional[nn.Module], Optional[str]]:
    """A model and its vanilla twin for `draw`.

    Args:
        name: See `load_model`.
        twin: The twin's name, or 'none'. None stands for the twin of `load_twin`, if that can be had and shown.
        device: A torch device.

    Returns:
        The model, the twin or None, and the reason why there is no twin although nobody said 'none'.

    Raises:
        ImportError: If a twin was named and the package grad-cam is not installed.
        ValueError: See `load_model`.
    """
    model = load_model(name, device)
    if twin == 'none':
        return model, None, None
    try:
        if importlib.util.find_spec('pytorch_grad_cam') is None:
            raise ImportError("the package grad-cam is missing: pip install 'noah-zoo[visualize]'")
        return model, load_twin(name, device) if twin is None else load_model(twin, device), None
    except (ImportError, ValueError) as error:
        if twin:
            raise
        return model, None, str(error)


def overlay(picture: Image.Image, map_HW: Tensor, opacity: float = 0.6) -> Image.Image:
    """A picture in grey under a map (H, W) of any size, from its lowest value in dark blue to its highest in yellow."""
    low, high = map_HW.aminmax()
    scaled = ((map_HW - low) / (high - low).clamp(min=torch.finfo(map_HW.dtype).tiny)).float().cpu().numpy()
    large = Image.fromarray(scaled, mode='F').resize(picture.size, Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps[COLOURS](np.asarray(large), bytes=True)[..., :3]
    grey = picture.convert('L').convert('RGB')  # so that a colour has one meaning
    return Image.blend(grey, Image.fromarray(np.ascontiguousarray(colours)), opacity)


def find_classes(model: nn.Module, names: Sequence[str]) -> List[int]:
    """Indices of classes given by name (or the name up to its first comma) or by index.

    Raises:
        ValueError: If a class is unknown.
    """
    labels = label_names(model)
    known = {}
    for texts in (map(str, range(len(labels))), (label.split(',')[0] for label in labels), labels):  # the last counts
        known.update({text.casefold(): index for index, text in reversed(list(enumerate(texts)))})
    for name in names:
        if name.casefold() not in known:
            close = difflib.get_close_matches(name.casefold(), known, n=3)
            hint = f'; did you mean {" or ".join(repr(labels[known[c]]) for c in close)}?' if close else ''
            raise ValueError(f'no class {name!r} among {len(labels)}, 0 to {len(labels) - 1}{hint}')
    return [known[name.casefold()] for name in names]


def grad_cam(model: nn.Module, x_BCHW: Tensor, classes: Sequence[int]) -> Tensor:
    """Grad-CAM++ of a model that pools, by the package grad-cam: (B, K, H, W) at the size of the images.

    It reads the features that are pooled. Where a class token is classified these get no gradient, and the patches that
    the last layer of attention reads are taken.

    Args:
        model: A timm model in the mode of evaluation.
        x_BCHW: Images, as the model takes them.
        classes: Indices of classes.

    Raises:
        ImportError: If grad-cam is not installed.
    """
    from pytorch_grad_cam import GradCAMPlusPlus
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    has_class_token = any(name.endswith('cls_token') for name, _ in model.named_parameters())
    if has_class_token:
        wrapped = model
        target = [module for name, module in model.named_modules() if name.endswith('norm1')][-1]
    else:
        wrapped = _Apart(model)
        target = wrapped.features
    reshape = functools.partial(_as_map, channels=model.num_features, prefix=has_class_token, size=x_BCHW.shape[-2:])
    with GradCAMPlusPlus(wrapped, [target], reshape_transform=reshape) as cam:
        maps = [cam(x_BCHW, [ClassifierOutputTarget(index)] * len(x_BCHW)) for index in classes]
    return torch.from_numpy(np.stack(maps, axis=1))


class _Apart(nn.Module):
    """A timm model with a place between its two halves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.features(self.model.forward_features(x)))


def _as_map(x: Tensor, channels: int, prefix: int, size: Tuple[int, int]) -> Tensor:
    """Features (B, C, H, W), (B, H, W, C) or (B, prefix + L, C) as (B, C, H, W)."""
    if x.ndim == 4:
        return x if x.shape[1] == channels else x.permute(0, 3, 1, 2)
    x_BLC = x[:, prefix:]
    return x_BLC.transpose(1, 2).unflatten(2, token_grid(x_BLC.shape[1], *size))


def draw(
        model: nn.Module,
        image: Image.Image,
        classes: Optional[Sequence[int]] = None,
        block: int = 0,
        twin: Optional[nn.Module] = None,
) -> Figure:
    """Figure 2 of the paper for one image.

    The first panel has the attention, the value and the local POCA map of every POCA block for one class, and the sum
    of the local POCA maps. The second has the attention of one block for several classes and, below, Grad-CAM++ of the
    vanilla twin for the same. Every map is scaled by itself, from its lowest value to its highest.

    Args:
        model: A NOAH model in the mode of evaluation.
        image: An image of any mode.
        classes: Indices of classes, the first of which is that of the first panel; if None, the four that the model
            finds likeliest.
        block: Index of the POCA block of the second panel.
        twin: A model with the same classes that pools.

    Raises:
        ImportError: If there is a twin and grad-cam is not installed.
        IndexError: If there is no such class.
        ValueError: If the model has no NOAH head, there is no such block, or the twin has other classes.
    """
    x, picture = as_model_sees(model, image)
    if classes is None:
        with torch.no_grad():
            logits = model(x)[0]
        classes = logits.topk(min(4, len(logits))).indices.tolist()
    if twin is not None and twin.num_classes != model.num_classes:
        raise ValueError(f'the twin has {twin.num_classes} classes, the model {model.num_classes}')
    maps = attention_maps(model, x, classes)
    num_blocks, labels = maps.attention.shape[1], short_names(model)
    if not 0 <= block < num_blocks:
        raise ValueError(f'no POCA block {block + 1}; {name_of(model)} has blocks 1 to {num_blocks}')
    columns = max(1 + num_blocks, len(classes))
    figure = Figure(figsize=(max(1.5 * columns, 7), 1.7 * (4 if twin is None else 5) + 1.2), layout='constrained')
    above, below, scale = figure.subfigures(3, 1, height_ratios=(3.2, 1.45 if twin is None else 2.6, 0.25))

    chances = probabilities(model, maps.logits)[0]
    above.suptitle(f'{labels[classes[0]]}, {chances[classes[0]]:.1%}: every POCA block of {name_of(model)}')
    grid = _grid_of(above, 3, columns)
    _show(grid[0, 0], picture, title='image')
    _show(grid[2, 0], overlay(picture, maps.merged[0, 0]), title='sum over blocks')
    for row, (name, part) in enumerate((('attention', maps.attention), ('value', maps.value), ('product', maps.poca))):
        for n in range(num_blocks):
            title = f'block {n + 1}' if row == 0 else None
            _show(grid[row, 1 + n], overlay(picture, part[0, n, 0]), title, None if n else name)

    below.suptitle(
        f'Block {block + 1} for several classes' + (f'; below, the vanilla {name_of(twin)}' if twin else ''))
    grid = _grid_of(below, 1 if twin is None else 2, columns)
    for column, index in enumerate(classes):
        attention = overlay(picture, maps.attention[0, block, column])
        _show(grid[0, column], attention, f'{labels[index]}\n{chances[index]:.1%}', None if column else 'attention')
    if twin is not None:
        x, picture = as_model_sees(twin, image)
        with torch.no_grad():
            chances = probabilities(twin, twin(x))[0]
        for column, cam_HW in enumerate(grad_cam(twin, x, classes)[0]):
            title = f'{chances[classes[column]]:.1%}'
            _show(grid[1, column], overlay(picture, cam_HW), title, None if column else 'Grad-CAM++')
    place = scale.add_axes((0.35, 0.6, 0.3, 0.3))
    bar = scale.colorbar(ScalarMappable(cmap=COLOURS), cax=place, orientation='horizontal')
    bar.set_ticks((0, 1), labels=('lowest of a map', 'highest'))
    return figure


def _grid_of(figure: SubFigure, rows: int, columns: int) -> np.ndarray:
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return grid


def _show(axes: Axes, picture: Image.Image, title: Optional[str] = None, row: Optional[str] = None) -> None:
    axes.imshow(picture)
    axes.set_axis_on()
    axes.set(xticks=(), yticks=())
    axes.set_title(title, fontsize='small')
    axes.set_ylabel(row)
