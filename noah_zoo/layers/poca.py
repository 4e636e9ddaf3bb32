"""POCA, the pairwise object category attention operator (paper, Section III-B).

`poca_reference` is the formula. `poca` computes the same in blocks, so that neither pass ever holds the N * K * L maps,
and backward computes the blocks again: nothing is kept for it but inputs and weights. On CUDA a Triton kernel does it
(`poca_triton.py`), and keeps a number per map. What that rests on:

- The attention sums to 1 over positions. So the bias of the value leaves the sum, and that of the key cancels.
- Per block, `out = sum_l exp(s) v / sum_l exp(s)`. The shift by the maximum is left out as long as the sums show that
  nothing came near the ends of the number range.
- As (positions, maps), both embeddings are plain matrix products, whatever the layout of the features.

Tensor names say their shape: B batch, N groups, K classes, M = N * K maps, L positions, H height, W width, C channels.
In blocks: G groups of the embeddings, R rows (images x positions), M maps of a group.
"""
import functools
import itertools
import logging
import math
from types import ModuleType
from typing import Callable, Iterator, NamedTuple, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import poca_cpu

_logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 64 * 2 ** 20  # of the gradients of scores and values that a block on CUDA has at a time
SAFE = 1e-20, 1e20  # sums of exponentials that show that no term over- or underflowed to any effect, in float32


def poca_reference(
        x_BCHW: Tensor,
        key_weight: Tensor,
        key_bias: Optional[Tensor],
        value_weight: Tensor,
        value_bias: Optional[Tensor],
        num_groups: int,
        conv_groups: int,
        drop_rate: float = 0.,
        training: bool = False,
) -> Tensor:
    """`poca` as the paper writes it: embed, attend and merge, by grouped 1x1 convolutions. Arguments as there."""
    first = x_BCHW.shape[1] - conv_groups * value_weight.shape[1]
    key_BML = F.conv2d(
        x_BCHW[:, :conv_groups * key_weight.shape[1]], key_weight, key_bias, groups=conv_groups).flatten(2)
    value_BML = F.conv2d(x_BCHW[:, first:], value_weight, value_bias, groups=conv_groups).flatten(2)
    poca_BML = key_BML.softmax(dim=-1) * F.dropout(value_BML, drop_rate, training)
    return poca_BML.unflatten(1, (num_groups, -1)).sum(dim=(1, 3))


def poca(
        x_BCHW: Tensor,
        key_weight: Tensor,
        key_bias: Optional[Tensor],
        value_weight: Tensor,
        value_bias: Optional[Tensor],
        num_groups: int,
        conv_groups: int,
        drop_rate: float = 0.,
        training: bool = False,
) -> Tensor:
    """Embed, attend and merge: per class and per group a softmax over positions weights the value map; sum it all.

    TorchScript, tracing, ONNX and `torch.export` see `poca_reference`. There is no second derivative.

    Args:
        x_BCHW: Features, (B, C, H, W), of any strides. The key embedding reads the first channels, the value embedding
            the last, as many as their kernels say.
        key_weight: 1x1 kernel, (N * K, Ck / conv_groups, 1, 1).
        key_bias: (N * K,). It cancels in the softmax, and its gradient is zero; checkpoints have it.
        value_weight: 1x1 kernel, (N * K, Cv / conv_groups, 1, 1).
        value_bias: (N * K,).
        num_groups: N, the number of POCA blocks.
        conv_groups: Groups of the two embeddings, N with the first-level feature split and 1 without.
        drop_rate: Dropout probability on the value map.
        training: Whether dropout is on.

    Returns:
        Logits, (B, K), summed in float32 if the features have less; float32 under autocast, else of the features' type.

    Raises:
        RuntimeError: If features and weights differ in type, or a gradient is differentiated again.
        ValueError: If features and weights do not fit.
    """
    if not torch.jit.is_scripting():
        if not (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            return _poca(
                x_BCHW, key_weight, key_bias, value_weight, value_bias, num_groups, conv_groups, drop_rate * training)
    return poca_reference(
        x_BCHW, key_weight, key_bias, value_weight, value_bias, num_groups, conv_groups, drop_rate, training)


def _poca(
        x_BCHW: Tensor, key_weight: Tensor, key_bias: Optional[Tensor], value_weight: Tensor,
        value_bias: Optional[Tensor], num_groups: int, conv_groups: int, drop_rate: float) -> Tensor:
    device, dtype = x_BCHW.device.type, x_BCHW.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x_BCHW, dtype = x_BCHW.to(torch.get_autocast_dtype(device)), torch.float32
    elif not x_BCHW.dtype == key_weight.dtype == value_weight.dtype:
        raise RuntimeError(
            f'poca: features of {x_BCHW.dtype}, weights of {key_weight.dtype} and {value_weight.dtype}; expected one '
            f'type')
    maps, channels = key_weight.shape[0], x_BCHW.shape[1]
    if value_weight.shape[0] != maps or maps % num_groups or num_groups % conv_groups:
        raise ValueError(
            f'poca: weights of {maps} and {value_weight.shape[0]} maps; expected the same multiple of '
            f'num_groups={num_groups}, and that one of conv_groups={conv_groups}')
    read = [conv_groups * weight.shape[1] for weight in (key_weight, value_weight)]
    if max(read) > channels:
        raise ValueError(f'poca: key and value read {read[0]} and {read[1]} channels of {channels}')
    seed = torch.randint(2 ** 63 - 1, (), device=x_BCHW.device) if drop_rate else None
    out_BK, _ = poca_op(
        x_BCHW.flatten(2).transpose(1, 2), key_weight, key_bias, value_weight, value_bias, num_groups, conv_groups,
        drop_rate, seed)
    return out_BK.to(dtype)


# The operator: two of torch.library, by its lower level, as the calls of `torch.library.custom_op` cost a small head
# more than all it computes


def _forward(
        x_BLC: Tensor, key_weight: Tensor, key_bias: Optional[Tensor], value_weight: Tensor,
        value_bias: Optional[Tensor], num_groups: int, conv_groups: int, drop_rate: float, seed: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """Logits (B, K), in float32 or more; on CUDA also what backward needs of every map (`poca_triton.forward`), (2, B,
    M). `seed` gives the dropout mask; without it there is none."""
    kernels = _kernels(x_BLC)
    if kernels:
        return kernels.forward(
            x_BLC, key_weight, value_weight, value_bias, num_groups, conv_groups, drop_rate, seed)
    out_BK, stats_2BM = _empty(x_BLC, key_weight, key_bias, value_weight, value_bias, num_groups)
    if poca_cpu.supports(x_BLC, key_weight, value_weight, conv_groups, seed):
        out_BM = poca_cpu.forward(x_BLC, key_weight, value_weight, conv_groups)
    else:
        out_BM = out_BK.new_empty(len(out_BK), len(key_weight))
        out_GBM = _of_maps(out_BM, conv_groups)
        for block in _blocks(x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed):
            sums_GBM = block.exp_GBLM.mul_(block.value_GBLM).sum(dim=2)
            out_GBM[block.groups, block.images, block.maps] = sums_GBM.div_(block.total_GBM)
    torch.sum(out_BM.unflatten(1, (num_groups, -1)), dim=1, out=out_BK)
    if value_bias is not None and seed is None:
        out_BK += value_bias.view(num_groups, -1).sum(dim=0)
    return out_BK, stats_2BM


def _empty(
        x_BLC: Tensor, key_weight: Tensor, key_bias: Optional[Tensor], value_weight: Tensor,
        value_bias: Optional[Tensor], num_groups: int, *args) -> Tuple[Tensor, Tensor]:
    (batch, *_), maps = x_BLC.shape, key_weight.shape[0]
    dtype = torch.promote_types(x_BLC.dtype, torch.float32)
    stats_shape = (2, batch, maps) if x_BLC.is_cuda else (0,)
    return x_BLC.new_empty(batch, maps // num_groups, dtype=dtype), x_BLC.new_empty(stats_shape, dtype=dtype)


def _backward(
        grad_BK: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor],
        stats_2BM: Tensor, num_groups: int, conv_groups: int, drop_rate: float, seed: Optional[Tensor],
        need_x: bool, need_weights: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x_BLC`, `key_weight`, `value_weight` and `value_bias`; empty where not needed."""
    grads = _empty_grads(grad_BK, x_BLC, key_weight, value_weight, value_bias, need_x=need_x, need_weights=need_weights)
    x_BLC = x_BLC.contiguous()
    kernels = _kernels(x_BLC)
    if kernels:
        blocks = _blocks_on_cuda(
            kernels, grad_BK, x_BLC, key_weight, value_weight, value_bias, stats_2BM, num_groups, conv_groups,
            drop_rate, seed)
        dtypes = x_BLC.dtype, grad_BK.dtype, grad_BK.dtype, grad_BK.dtype
    else:
        blocks = _differentiated(
            grad_BK.repeat(1, num_groups), x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed)
        dtypes = (grad_BK.dtype,) * 4
    dx_BLC, dkey_weight, dvalue_weight, dvalue_bias = totals = [
        torch.zeros_like(grad, dtype=dtype) for grad, dtype in zip(grads, dtypes)]
    dx = _of_features(dx_BLC, key_weight, value_weight, conv_groups) if need_x else None
    dweights = [_of_weights(grad, conv_groups) for grad in (dkey_weight, dvalue_weight)] if need_weights else None
    dbias_GM = dvalue_bias.view(conv_groups, -1)
    for groups, rows, maps, features, weights, dmaps in blocks:
        for part, dmap_GRM in enumerate(dmaps):
            if need_x:
                dx[part][groups, rows].baddbmm_(dmap_GRM, weights[part])
            if need_weights:
                _add_product(dweights[part][groups, maps], dmap_GRM.mT, features[part])
        if seed is not None and dvalue_bias.numel():
            dbias_GM[groups, maps] += dmaps[1].sum(dim=1, dtype=dbias_GM.dtype)
    if seed is None and dvalue_bias.numel():
        dvalue_bias.view(num_groups, -1).copy_(grad_BK.sum(dim=0))
    return tuple(total.to(grad.dtype) for total, grad in zip(totals, grads))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        torch.baddbmm(total, left, right, out_dtype=total.dtype, out=total)


def _empty_grads(
        grad_BK, x_BLC, key_weight, value_weight, value_bias, stats_2BM=None, num_groups=1, conv_groups=1,
        drop_rate=0., seed=None, need_x=True, need_weights=True) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Optional[Tensor], needed: bool) -> Tensor:
        tensor = x_BLC[:0, 0, 0] if tensor is None else tensor
        return tensor.new_empty(tensor.shape if needed else (0,) * tensor.ndim)

    return (
        like(x_BLC, need_x), like(key_weight, need_weights), like(value_weight, need_weights),
        like(value_bias, need_weights))


class _Poca(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out_BK, stats_2BM = poca_op(*args)
        x_BLC, key_weight, key_bias, value_weight, value_bias, *ctx.numbers, seed = args
        ctx.key_bias = None if key_bias is None else (key_bias.shape, key_bias.dtype)
        ctx.save_for_backward(x_BLC, key_weight, value_weight, value_bias, stats_2BM, seed)
        ctx.mark_non_differentiable(stats_2BM)
        return out_BK, stats_2BM

    @staticmethod
    def backward(ctx, grad_BK, _):
        x_BLC, key_weight, value_weight, value_bias, stats_2BM, seed = ctx.saved_tensors
        need_x, need_key, _, need_value, need_bias, *_ = ctx.needs_input_grad
        need_weights = need_key or need_value or need_bias
        dx_BLC, *dweights = poca_backward_op(
            grad_BK, x_BLC, key_weight, value_weight, value_bias, stats_2BM, *ctx.numbers, seed, need_x, need_weights)
        dkey_weight, dvalue_weight, dvalue_bias = dweights if need_weights else (None, None, None)
        dkey_bias = None
        if ctx.key_bias is not None:
            dkey_bias = grad_BK.new_zeros(ctx.key_bias[0], dtype=ctx.key_bias[1])
        return (
            dx_BLC if need_x else None, dkey_weight, dkey_bias, dvalue_weight,
            None if value_bias is None else dvalue_bias, None, None, None, None)


class _PocaBackward(torch.autograd.Function):
    """The gradient, which has none."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return poca_backward_op(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            'poca: its gradient cannot be differentiated again; noah_zoo.layers.poca.poca_reference has second '
            'derivatives')


_library = torch.library.Library('noah_zoo', 'FRAGMENT')


def _define(schema: str, function: Callable, fake: Callable, differentiable: Type[torch.autograd.Function]):
    """An operator of torch.library."""
    name = schema.split('(')[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(torch.ops.noah_zoo, name).default

    def with_autograd(*args):
        if torch.is_grad_enabled():
            return differentiable.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    _library.impl(name, function, 'CompositeExplicitAutograd')
    _library.impl(name, with_autograd, 'Autograd')
    torch.library.register_fake(f'noah_zoo::{name}', fake, lib=_library)
    return operator


poca_op = _define(
    'poca(Tensor x_BLC, Tensor key_weight, Tensor? key_bias, Tensor value_weight, Tensor? value_bias, int num_groups, '
    'int conv_groups, float drop_rate, Tensor? seed) -> (Tensor, Tensor)', _forward, _empty, _Poca)
poca_backward_op = _define(
    'poca_backward(Tensor grad_BK, Tensor x_BLC, Tensor key_weight, Tensor value_weight, Tensor? value_bias, '
    'Tensor stats_2BM, int num_groups, int conv_groups, float drop_rate, Tensor? seed, bool need_x, bool need_weights)'
    ' -> (Tensor, Tensor, Tensor, Tensor)', _backward, _empty_grads, _PocaBackward)


@register_flop_formula(torch.ops.noah_zoo.poca)
def _count(x_shape, key_shape, key_bias, value_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * key_shape[0] * (key_shape[1] + value_shape[1])


# Blocks


class Block(NamedTuple):
    """Some maps of some images: where they are, what they are made of (key, value), and exponentials, values, sums.

    What it holds is overwritten by the next block, and may be before.
    """
    groups: slice
    images: slice
    rows: slice
    maps: slice
    features: Tuple[Tensor, Tensor]
    weights: Tuple[Tensor, Tensor]
    exp_GBLM: Tensor
    value_GBLM: Tensor
    total_GBM: Tensor
    keep_GBLM: Optional[Tensor]


def _block_size(groups: int, batch: int, positions: int, maps: int, device: str) -> Tuple[int, int, int]:
    """Groups, images and maps of a block: what the caches of a CPU hold, or some tens of megabytes elsewhere."""
    budget = 400_000 if device == 'cpu' else 2 ** 23
    maps = min(maps, 1024, max(budget // positions, 16))
    images = max(min(batch, budget // (positions * maps)), 1)
    return min(groups, max(budget // (positions * maps * images), 1)), images, maps


def _differentiated(
        grad_BM: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor],
        conv_groups: int, drop_rate: float, seed: Optional[Tensor]) -> Iterator[tuple]:
    """Of all blocks: groups, rows, maps, features, weights, and the gradients of scores and values, (G, R, M)."""
    grad_GBM = _of_maps(grad_BM, conv_groups)
    for block in _blocks(x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed):
        groups, images, rows, maps, features, weights, exp_GBLM, value_GBLM, total_GBM, keep_GBLM = block
        out_GBM = (exp_GBLM * value_GBLM).sum(dim=2).div_(total_GBM)
        exp_GBLM.mul_(grad_GBM[groups, images, maps].div(total_GBM).unsqueeze(2))  # attention x gradient
        dscore_GBLM = value_GBLM.sub_(out_GBM.unsqueeze(2)).mul_(exp_GBLM)
        dvalue_GBLM = exp_GBLM if keep_GBLM is None else exp_GBLM.mul_(keep_GBLM)
        yield groups, rows, maps, features, weights, (dscore_GBLM.flatten(1, 2), dvalue_GBLM.flatten(1, 2))


def _blocks_on_cuda(
        kernels: ModuleType, grad_BK: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor,
        value_bias: Optional[Tensor], stats_2BM: Tensor, num_groups: int, conv_groups: int, drop_rate: float,
        seed: Optional[Tensor]) -> Iterator[tuple]:
    """What `_differentiated` gives, from the kernels."""
    (batch, length, _), dtype = x_BLC.shape, x_BLC.dtype
    key_weight, value_weight = key_weight.to(dtype), value_weight.to(dtype)
    all_features = _of_features(x_BLC, key_weight, value_weight, conv_groups)
    all_weights = [_of_weights(weight, conv_groups) for weight in (key_weight, value_weight)]
    num_maps = len(key_weight) // conv_groups
    fitting = max(WORKSPACE_BYTES // (2 * dtype.itemsize * length), 1)  # maps of an image
    most = min(num_maps, fitting)
    num_slices = min(conv_groups, max(fitting // most, 1))
    num_images = min(batch, max(fitting // (most * num_slices), 1))
    for groups, maps, images in itertools.product(
            _slices(conv_groups, num_slices), _slices(num_maps, most), _slices(batch, num_images)):
        rows = slice(images.start * length, images.stop * length)
        dmaps = kernels.map_grads(
            grad_BK, x_BLC, key_weight, value_weight, value_bias, stats_2BM, num_groups, conv_groups, drop_rate, seed,
            groups, images, maps)
        yield (
            groups, rows, maps, tuple(x_GRC[groups, rows] for x_GRC in all_features),
            tuple(weight[groups, maps] for weight in all_weights), dmaps)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _of_features(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int) -> Tuple[Tensor, Tensor]:
    """What keys and values read of contiguous (B, L, C): views (G, R, C)."""
    x_RC = x_BLC.view(-1, x_BLC.shape[2])
    first = x_RC.shape[1] - conv_groups * value_weight.shape[1]
    parts = x_RC[:, :conv_groups * key_weight.shape[1]], x_RC[:, first:]
    return tuple(part.unflatten(1, (conv_groups, -1)).transpose(0, 1) for part in parts)


def _of_weights(weight: Tensor, conv_groups: int) -> Tensor:
    return weight.flatten(1).unflatten(0, (conv_groups, -1))


def _of_maps(x_BM: Tensor, conv_groups: int) -> Tensor:
    return x_BM.unflatten(1, (conv_groups, -1)).transpose(0, 1)


def _blocks(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor], conv_groups: int,
        drop_rate: float, seed: Optional[Tensor]) -> Iterator[Block]:
    """All blocks, in two buffers that are used again; the same for the same shapes, so the mask of dropout is too."""
    batch, length, _ = x_BLC.shape
    device, dtype = x_BLC.device, torch.promote_types(x_BLC.dtype, torch.float32)
    all_features = _of_features(x_BLC.to(dtype).contiguous(), key_weight, value_weight, conv_groups)
    all_weights = [_of_weights(weight, conv_groups) for weight in (key_weight, value_weight)]
    num_maps = all_weights[0].shape[1]
    num_groups, num_images, most = _block_size(conv_groups, batch, length, num_maps, device.type)
    buffers = torch.empty(2, num_groups * num_images * length * most, device=device, dtype=dtype)
    generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))
    shift = device.type != 'cpu'  # elsewhere to look at the sums means to wait for them
    with torch.autocast(device.type, enabled=False):
        for groups, maps in itertools.product(_slices(conv_groups, num_groups), _slices(num_maps, most)):
            weights = tuple(weight[groups, maps].to(dtype) for weight in all_weights)
            for images in _slices(batch, num_images):
                rows = slice(images.start * length, images.stop * length)
                features = tuple(x_GRC[groups, rows] for x_GRC in all_features)
                shape = weights[0].shape[0], rows.stop - rows.start, weights[0].shape[1]
                score_GRM, value_GRM = (buffer[:math.prod(shape)].view(shape) for buffer in buffers)
                exp_GBLM, value_GBLM = (x.unflatten(1, (-1, length)) for x in (score_GRM, value_GRM))
                torch.bmm(features[0], weights[0].mT, out=score_GRM)
                torch.bmm(features[1], weights[1].mT, out=value_GRM)
                if not shift:
                    total_GBM = exp_GBLM.exp_().sum(dim=2)
                    low, high = total_GBM.aminmax()
                    if not (low.item() > SAFE[0] and high.item() < SAFE[1]):
                        shift = True
                        torch.bmm(features[0], weights[0].mT, out=score_GRM)
                if shift:
                    total_GBM = exp_GBLM.sub_(exp_GBLM.amax(dim=2, keepdim=True)).exp_().sum(dim=2)
                keep_GBLM = None
                if generator is not None:
                    keep_GBLM = torch.empty_like(value_GBLM).bernoulli_(1 - drop_rate, generator=generator)
                    if value_bias is not None:
                        value_GBLM.add_(value_bias.unflatten(0, (conv_groups, 1, 1, -1))[groups, :, :, maps])
                    value_GBLM.mul_(keep_GBLM.div_(1 - drop_rate))
                yield Block(
                    groups, images, rows, maps, features, weights, exp_GBLM, value_GBLM, total_GBM, keep_GBLM)


# Kernels


def _kernels(x_BLC: Tensor) -> Optional[ModuleType]:
    """The kernels for CUDA, where these features are theirs."""
    kernels = _triton() if x_BLC.is_cuda else None
    return kernels if kernels and kernels.supports(x_BLC) else None


@functools.cache
def _triton() -> Optional[ModuleType]:
    """They, where Triton is there."""
    try:
        from . import poca_triton
    except ImportError as error:
        _logger.warning('NOAH heads will be slow on a GPU, as Triton is missing: %s', error)
        return None
    return poca_triton
