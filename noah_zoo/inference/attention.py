"""The maps behind the logits of a NOAH model (paper, Section IV-D, Figure 2)."""
import math
from typing import NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ..layers.noah_head import NoahHead, is_plain


class AttentionMaps(NamedTuple):
    """Maps of B images, N POCA blocks and K classes, those asked for, at H x W positions; see `attention_maps`.

    Attributes:
        attention: A, (B, N, K, H, W). It is positive and sums to 1 over positions.
        value: V, (B, N, K, H, W), with its bias.
        poca: The local POCA maps A * V, (B, N, K, H, W).
        merged: The sum of `poca` over blocks, (B, K, H, W). With all blocks, its sum over positions is the logits.
        logits: What the model gave, (B, all its classes).
    """
    attention: Tensor
    value: Tensor
    poca: Tensor
    merged: Tensor
    logits: Tensor


@torch.no_grad()
def attention_maps(
        model: nn.Module,
        images: Tensor,
        classes: Union[int, Sequence[int], None] = None,
        block: Optional[int] = None,
) -> AttentionMaps:
    """Where a NOAH model looks, and what it sees there: the maps that the forward pass sums up (Section IV-D).

    The model runs once, in the mode of evaluation, and is left as it was. The maps are computed from what its head was
    given, for the classes asked for only. Memory is 3 * B * N * K * H * W numbers.

    Args:
        model: Any module with one `NoahHead`: a registered model, one of `add_noah_head`, or your own.
        images: What the model takes, (B, C, H, W).
        classes: Indices of classes; all if None.
        block: Index of the one POCA block to show; all if None.

    Returns:
        The maps, in float32 or more. H x W are the positions of the features. Tokens lie row by row in the grid of
        their number whose shape is nearest to that of the images.

    Raises:
        IndexError: If there is no such class or block.
        ValueError: If the model has no `NoahHead` or several, or images have not four dimensions.
    """
    head = _find_head(model)
    blocks = _indices('block', block, head.num_groups)
    classes = _indices('classes', classes, head.num_classes)
    if images.ndim != 4:
        raise ValueError(f'images have the shape {list(images.shape)}; expected (B, C, H, W)')
    given = []
    training = {module: module.training for module in model.modules()}
    hook = head.register_forward_pre_hook(lambda head, args: given.append(args[0]))
    try:
        with torch.compiler.set_stance('force_eager'):  # a compiled model would not call the hook
            logits = model.eval()(images)
    finally:
        hook.remove()
        for module, mode in training.items():
            module.training = mode
    if head.input_fmt == 'NLC':
        x_BCL, grid = given[0].transpose(1, 2), token_grid(given[0].shape[1], *images.shape[-2:])
    else:
        x_BCHW = given[0] if head.input_fmt == 'NCHW' else given[0].permute(0, 3, 1, 2)
        x_BCL, grid = x_BCHW.flatten(2), x_BCHW.shape[2:]
    with torch.autocast(x_BCL.device.type, enabled=False):
        attention_BNKL = _embed(head, head.key, x_BCL[:, :head.key_features], blocks, classes).softmax(dim=-1)
        value_BNKL = _embed(head, head.value, x_BCL[:, -head.value_features:], blocks, classes)
    attention, value = attention_BNKL.unflatten(-1, grid), value_BNKL.unflatten(-1, grid)
    poca = attention * value
    return AttentionMaps(attention, value, poca, poca.sum(dim=1), logits)


def _find_head(model: nn.Module) -> NoahHead:
    heads = [module for module in model.modules() if isinstance(module, NoahHead) and module.num_classes]
    if len(heads) != 1:
        raise ValueError(
            f'{type(model).__name__} has {len(heads) or "no"} NOAH head{"s" * (len(heads) > 1)}; attention maps are of '
            f'one. noah_zoo.add_noah_head gives a timm model a head, NAME_noah are models with one')
    if type(heads[0]) is not NoahHead:
        raise ValueError(f'{type(heads[0]).__name__}, a head of the ablations, has other maps than a NOAH head')
    return heads[0]


def _indices(name: str, asked: Union[int, Sequence[int], None], size: int) -> Tensor:
    if asked is None:
        return torch.arange(size)
    indices = torch.as_tensor(asked).reshape(-1)
    if indices.is_floating_point() or not indices.numel() or indices.min() < 0 or indices.max() >= size:
        raise IndexError(f'{name}={asked} of a head with indices 0 to {size - 1}')
    return indices


def token_grid(length: int, height: int, width: int) -> Tuple[int, int]:
    """Rows and columns of the grid of `length` tokens whose shape is nearest to that of an image, height x width."""
    rows = [rows for rows in range(1, length + 1) if length % rows == 0]
    return min(((h, length // h) for h in rows), key=lambda grid: abs(math.log(grid[0] / grid[1] * width / height)))


def _embed(head: NoahHead, conv: nn.Module, x_BCL: Tensor, blocks: Tensor, classes: Tensor) -> Tensor:
    """Maps (B, N, K, L) of some blocks and classes: of a plain convolution only those, of another layer from all."""
    if not is_plain(conv):
        maps_BNKL = conv(x_BCL.unsqueeze(3)).flatten(2).unflatten(1, (head.num_groups, -1))
        return maps_BNKL[:, blocks][:, :, classes]
    dtype = torch.promote_types(x_BCL.dtype, torch.float32)
    x_BNCL = x_BCL.to(dtype).unflatten(1, (head.conv_groups, -1)).expand(-1, head.num_groups, -1, -1)
    weight_NKC = conv.weight.flatten(1).unflatten(0, (head.num_groups, -1))[blocks][:, classes].to(dtype)
    bias_NK = conv.bias.unflatten(0, (head.num_groups, -1))[blocks][:, classes].to(dtype)
    return torch.einsum('bncl,nkc->bnkl', x_BNCL[:, blocks], weight_NKC) + bias_NK.unsqueeze(-1)
