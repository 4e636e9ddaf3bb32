"""POCA, the pairwise object category attention operator (paper, Section III-B).

`poca_reference` is the formula. `poca` computes the same in blocks, so that neither pass ever holds the N * K * L maps,
and backward computes the blocks again: nothing is kept for it but inputs and weights. On CUDA a Triton kernel does it
(`poca_triton.py`), and keeps two numbers per map; on most CPUs `poca_cpu.cpp` does. What that rests on:

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
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import poca_cpu

_logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 128 * 2 ** 20  # of the gradients of scores and values that a block on CUDA has at a time
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

    TorchScript, tracing, ONNX, `torch.export` and `torch.func` see `poca_reference`. There is no second derivative.

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
        if not (torch.jit.is_tracing() or _is_exporting() or torch._C._are_functorch_transforms_active()):
            return _poca(
                x_BCHW, key_weight, key_bias, value_weight, value_bias, num_groups, conv_groups, drop_rate * training)
    return poca_reference(
        x_BCHW, key_weight, key_bias, value_weight, value_bias, num_groups, conv_groups, drop_rate, training)


def _is_exporting() -> bool:
    # with the older versions of PyTorch, 2.11 say, the former is true in torch.compile as well
    return torch.compiler.is_exporting() and getattr(torch.compiler, '_is_exporting_flag', True)


def _poca(
        x_BCHW: Tensor, key_weight: Tensor, key_bias: Optional[Tensor], value_weight: Tensor,
        value_bias: Optional[Tensor], num_groups: int, conv_groups: int, drop_rate: float) -> Tensor:
    device, dtype = x_BCHW.device.type, x_BCHW.dtype
    if device != 'meta' and torch.is_autocast_enabled(device):
        dtype = torch.float32
        if device != 'cpu':  # where it is computed in float32 in any case
            x_BCHW = x_BCHW.to(torch.get_autocast_dtype(device))
    elif not x_BCHW.dtype == key_weight.dtype == value_weight.dtype:
        raise RuntimeError(
            f'poca: features of {x_BCHW.dtype}, weights of {key_weight.dtype} and {value_weight.dtype}; expected one '
            f'type')
    maps, channels = key_weight.shape[0], x_BCHW.shape[1]
    if value_weight.shape[0] != maps or maps % num_groups or num_groups % conv_groups:
        raise ValueError(
            f'poca: weights of {maps} and {value_weight.shape[0]} maps; expected the same multiple of '
            f'num_groups={num_groups}, and that one of conv_groups={conv_groups}')
    for name, bias in (('key', key_bias), ('value', value_bias)):
        if bias is not None and bias.shape != (maps,):
            raise ValueError(f'poca: a {name} bias of the shape {list(bias.shape)}; expected [{maps}]')
    if not 0 <= drop_rate <= 1:
        raise ValueError(f'poca: drop_rate={drop_rate} is not between 0 and 1')
    read = [conv_groups * weight.shape[1] for weight in (key_weight, value_weight)]
    if max(read) > channels:
        raise ValueError(f'poca: key and value read {read[0]} and {read[1]} channels of {channels}')
    seed = torch.randint(2 ** 63 - 1, (), device=x_BCHW.device) if drop_rate else None
    args = x_BCHW, key_weight, key_bias, value_weight, value_bias, num_groups, conv_groups, drop_rate, seed
    # when nobody compiles, what the operator would come to, by a shorter way
    out_BK, *_ = poca_op(*args) if torch.compiler.is_compiling() else _Poca.call(*args)
    return out_BK.to(dtype)


# The operator and its gradient, by the lower level of torch.library: a `torch.library.custom_op` costs a small head
# more time than all that it computes


def _forward(
        x_BCHW: Tensor, key_weight: Tensor, key_bias: Optional[Tensor], value_weight: Tensor,
        value_bias: Optional[Tensor], num_groups: int, conv_groups: int, drop_rate: float, seed: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), in float32 or more. On CUDA also what backward needs of every map, (2, B, M)
    (`poca_triton.forward`), and the features as they were read, if that took a copy. `seed` gives the dropout mask;
    without it there is none."""
    out_BK, stats_2BM, rows_BCHW = _empty(x_BCHW, key_weight, key_bias, value_weight, value_bias, num_groups)
    x_BLC = x_BCHW.flatten(2).transpose(1, 2)
    kernels = _kernels(x_BLC)
    if rows_BCHW.numel():
        x_BLC = (kernels.copy if kernels else _copy)(x_BLC, rows_BCHW.flatten(2).transpose(1, 2))
    if kernels:
        kernels.forward(
            x_BLC, key_weight, value_weight, value_bias, num_groups, conv_groups, drop_rate, seed, out_BK, stats_2BM)
        return out_BK, stats_2BM, rows_BCHW
    embed = x_BLC, key_weight, value_weight, conv_groups
    if (poca_cpu.supports if seed is None else poca_cpu.supports_training)(*embed):
        out_BM = poca_cpu.forward(*embed, value_bias, drop_rate, seed)
    else:
        out_BM = out_BK.new_empty(len(out_BK), len(key_weight))
        out_GBM = _of_maps(out_BM, conv_groups)
        for block in _blocks(x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed):
            sums_GBM = block.exp_GBLM.mul_(block.value_GBLM).sum(dim=2)
            out_GBM[block.groups, block.images, block.maps] = sums_GBM.div_(block.total_GBM)
    torch.sum(out_BM.unflatten(1, (num_groups, -1)), dim=1, out=out_BK)
    if value_bias is not None and seed is None:
        out_BK += value_bias.view(num_groups, -1).sum(dim=0, dtype=out_BK.dtype)
    return out_BK, stats_2BM, rows_BCHW


def _empty(
        x_BCHW: Tensor, key_weight: Tensor, key_bias: Optional[Tensor], value_weight: Tensor,
        value_bias: Optional[Tensor], num_groups: int, *args) -> Tuple[Tensor, Tensor, Tensor]:
    (batch, *_), maps = x_BCHW.shape, key_weight.shape[0]
    dtype = torch.promote_types(x_BCHW.dtype, torch.float32)
    stats_shape = (2, batch, maps) if x_BCHW.is_cuda else (0,)
    rows = _empty_rows(x_BCHW) if x_BCHW.is_cuda and x_BCHW.stride(1) != 1 else x_BCHW.new_empty(0)
    return x_BCHW.new_empty(batch, maps // num_groups, dtype=dtype), x_BCHW.new_empty(stats_shape, dtype=dtype), rows


def _empty_rows(x_BCHW: Tensor) -> Tensor:
    """Of the same shape, the channels of a position next to each other."""
    batch, channels, height, width = x_BCHW.shape
    return x_BCHW.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _backward(
        grad_BK: Tensor, x_BCHW: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor],
        stats_2BM: Tensor, num_groups: int, conv_groups: int, drop_rate: float, seed: Optional[Tensor],
        channels_first: bool, need_x: bool, need_weights: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x_BCHW`, `key_weight`, `value_weight` and `value_bias`; empty where not needed.

    That of the features has the channels of a position next to each other, or is contiguous if `channels_first`.
    """
    batch, channels, height, width = x_BCHW.shape
    x_BLC, dtype = x_BCHW.flatten(2).transpose(1, 2), grad_BK.dtype
    kernels = _kernels(x_BLC)
    if not kernels and poca_cpu.supports_training(x_BLC, key_weight, value_weight, conv_groups):
        dx_BLC, *dweights = poca_cpu.backward(
            _of_groups(grad_BK, num_groups), x_BLC, key_weight, value_weight, conv_groups, value_bias, drop_rate, seed,
            channels_first, need_x, need_weights)
        dx_BCHW = None if dx_BLC is None else dx_BLC.mT.unflatten(2, (height, width))
        return tuple(x_BLC.new_empty(0) if grad is None else grad for grad in (dx_BCHW, *dweights))
    if kernels:
        x_BLC = x_BLC.contiguous()
        blocks, one_write = _map_grads_on_cuda(
            kernels, grad_BK, x_BLC, key_weight, value_weight, value_bias, stats_2BM, num_groups, conv_groups,
            drop_rate, seed)
    else:
        blocks, one_write = _map_grads(
            _of_groups(grad_BK, num_groups), x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed,
        ), False
    parts = _parts(channels, key_weight, value_weight, conv_groups)
    one_write = one_write and parts[1][0] == conv_groups * parts[0][1]  # of every gradient of a feature
    empty = torch.empty if batch else torch.zeros
    dx_BLC, dweights, dvalue_bias = None, None, None
    if need_x:
        dx_dtype = x_BLC.dtype if one_write else dtype
        dx_BLC = (empty if one_write else torch.zeros)(x_BLC.shape, dtype=dx_dtype, device=x_BLC.device)
    if need_weights:
        dweights = [empty(weight.shape, dtype=dtype, device=x_BLC.device) for weight in (key_weight, value_weight)]
        if value_bias is not None:
            dvalue_bias = (empty if seed is None else torch.zeros)(value_bias.shape, dtype=dtype, device=x_BLC.device)
    _add_products(
        blocks, dx_BLC, dweights, None if seed is None else dvalue_bias, parts, conv_groups, height * width, one_write)
    if dvalue_bias is not None and seed is None:
        dvalue_bias.view(num_groups, -1).copy_(grad_BK.sum(dim=0))
    dx_BCHW = dkey_weight = dvalue_weight = none = x_BCHW.new_empty(0)
    if need_x:
        dx_BLC = dx_BLC.to(x_BCHW.dtype)
        if channels_first:
            to_BLC = torch.empty_like(dx_BLC.mT, memory_format=torch.contiguous_format).mT
            dx_BLC = (kernels.copy if kernels else _copy)(dx_BLC, to_BLC)
        dx_BCHW = dx_BLC.mT.unflatten(2, (height, width))
    if need_weights:
        dkey_weight, dvalue_weight = dweights[0].to(key_weight.dtype), dweights[1].to(value_weight.dtype)
    return dx_BCHW, dkey_weight, dvalue_weight, none if dvalue_bias is None else dvalue_bias.to(value_bias.dtype)


def _of_groups(grad_BK: Tensor, num_groups: int) -> Tensor:
    """The gradient of every map, (B, M)."""
    return torch.cat([grad_BK] * num_groups, dim=1)  # a fifth of the time of `repeat`


def _add_products(
        blocks: Iterator[tuple], dx_BLC: Optional[Tensor], dweights: Optional[List[Tensor]],
        dvalue_bias: Optional[Tensor], parts: Tuple[Tuple[int, int], ...], conv_groups: int, length: int,
        one_write: bool) -> None:
    """The second step: from gradients of scores and values to those of features and weights, which are written into.

    Args:
        blocks: As `_map_grads` gives them.
        parts: As `_parts` gives them.
        one_write: Whether every gradient of a feature is written once, else it is added to.
        Others: As in `_backward`.
    """
    for groups, images, maps, features, weights, dmaps in blocks:
        rows = slice(images.start * length, images.stop * length)
        for part, (first, width) in enumerate(parts):
            if dx_BLC is not None:
                dx_GRC = _of_features(dx_BLC, first, width, groups, rows)
                _put_product(dx_GRC, dmaps[part], weights[part], not one_write)
            if dweights is not None:
                dweight_GMC = _of_weight(dweights[part], conv_groups, groups, maps)
                _put_product(dweight_GMC, dmaps[part].mT, features[part], images.start > 0)
        if dvalue_bias is not None:
            dvalue_bias.view(conv_groups, -1)[groups, maps] += dmaps[1].sum(dim=1, dtype=dvalue_bias.dtype)


def _copy(x_BLC: Tensor, to_BLC: Tensor) -> Tensor:
    return to_BLC.copy_(x_BLC)


def _put_product(total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Write, or add, the product of matrices; it is summed in `total`'s type."""
    if total.dtype == left.dtype:
        torch.baddbmm(total, left, right, beta=int(add), out=total)
    else:
        torch.baddbmm(total, left, right, beta=int(add), out_dtype=total.dtype, out=total)


def _empty_grads(
        grad_BK, x_BCHW, key_weight, value_weight, value_bias, stats_2BM, num_groups, conv_groups, drop_rate, seed,
        channels_first, need_x, need_weights) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    none, dx_BCHW = x_BCHW.new_empty(0), None
    if need_x:
        dx_BCHW = x_BCHW.new_empty(x_BCHW.shape) if channels_first else _empty_rows(x_BCHW)
    tensors = (key_weight, value_weight, value_bias if need_weights else None)
    return none if dx_BCHW is None else dx_BCHW, *(
        none if tensor is None or not need_weights else tensor.new_empty(tensor.shape) for tensor in tensors)


class _Poca(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def call(*args):
        if torch.is_grad_enabled():
            return _Poca.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return poca_op(*args)

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out_BK, stats_2BM, rows_BCHW = poca_op(*args)
        x_BCHW, key_weight, key_bias, value_weight, value_bias, *ctx.numbers, seed = args
        ctx.key_bias = None if key_bias is None else (key_bias.shape, key_bias.dtype)
        ctx.channels_first = x_BCHW.stride(1) != 1
        x_BCHW = rows_BCHW if rows_BCHW.numel() else x_BCHW
        ctx.save_for_backward(x_BCHW, key_weight, value_weight, value_bias, stats_2BM, seed)
        ctx.mark_non_differentiable(stats_2BM, rows_BCHW)
        return out_BK, stats_2BM, rows_BCHW

    @staticmethod
    def backward(ctx, grad_BK, *_):
        x_BCHW, key_weight, value_weight, value_bias, stats_2BM, seed = ctx.saved_tensors
        need_x, need_key, _, need_value, need_bias, *_ = ctx.needs_input_grad
        need_weights = need_key or need_value or need_bias
        dx_BCHW, *dweights = _PocaBackward.call(
            grad_BK, x_BCHW, key_weight, value_weight, value_bias, stats_2BM, *ctx.numbers, seed, ctx.channels_first,
            need_x, need_weights)
        dkey_weight, dvalue_weight, dvalue_bias = dweights if need_weights else (None, None, None)
        dkey_bias = None
        if ctx.key_bias is not None:
            dkey_bias = grad_BK.new_zeros(ctx.key_bias[0], dtype=ctx.key_bias[1])
            if torch.is_grad_enabled():  # which has derivatives, though they are zero
                dkey_bias = dkey_bias + 0 * grad_BK.sum()
        return (
            dx_BCHW if need_x else None, dkey_weight, dkey_bias, dvalue_weight,
            None if value_bias is None else dvalue_bias, None, None, None, None)


class _PocaBackward(torch.autograd.Function):
    """The gradient, which has none."""

    @staticmethod
    def call(*args):
        if torch.is_grad_enabled():
            return _PocaBackward.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return poca_backward_op(*args)

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return poca_backward_op(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            'poca: its gradient cannot be differentiated again; a head with head.fused_attn = False has derivatives '
            'of any order, as has noah_zoo.layers.poca.poca_reference')


_library = torch.library.Library('noah_zoo', 'FRAGMENT')


def _define(schema: str, function: Callable, fake: Callable, differentiable: Type[torch.autograd.Function]):
    """Return an operator of torch.library. If the package is imported a second time, it is the operator that exists."""
    name = schema.split('(')[0]
    if not hasattr(torch.ops.noah_zoo, name):
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, function, 'CompositeExplicitAutograd')
        _library.impl(name, differentiable.call, 'Autograd')
        torch.library.register_fake(f'noah_zoo::{name}', fake, lib=_library)
    return getattr(torch.ops.noah_zoo, name).default


poca_op = _define(
    'poca(Tensor x_BCHW, Tensor key_weight, Tensor? key_bias, Tensor value_weight, Tensor? value_bias, int num_groups, '
    'int conv_groups, float drop_rate, Tensor? seed) -> (Tensor, Tensor, Tensor)', _forward, _empty, _Poca)
poca_backward_op = _define(
    'poca_backward(Tensor grad_BK, Tensor x_BCHW, Tensor key_weight, Tensor value_weight, Tensor? value_bias, '
    'Tensor stats_2BM, int num_groups, int conv_groups, float drop_rate, Tensor? seed, bool channels_first, '
    'bool need_x, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)', _backward, _empty_grads, _PocaBackward)


def _count(x_shape, key_shape, key_bias, value_shape, *args, out_shape=None, **kwargs) -> int:
    batch, _, height, width = x_shape
    return 2 * batch * height * width * key_shape[0] * (key_shape[1] + value_shape[1])


if torch.ops.noah_zoo.poca not in flop_registry:  # it is there if the package is imported a second time
    register_flop_formula(torch.ops.noah_zoo.poca)(_count)


# Blocks


class Block(NamedTuple):
    """Some maps of some images: where they are, what they are made of (key, value), and exponentials, values, sums.

    What it holds is overwritten by the next block, and may be before.
    """
    groups: slice
    images: slice
    maps: slice
    features: List[Tensor]
    weights: List[Tensor]
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


def _map_grads(
        grad_BM: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor],
        conv_groups: int, drop_rate: float, seed: Optional[Tensor]) -> Iterator[tuple]:
    """Of all blocks: groups, images, maps; features (G, R, C), weights (G, M, C) and gradients of the maps (G, R, M),
    each of keys or scores and of values."""
    grad_GBM = _of_maps(grad_BM, conv_groups)
    for block in _blocks(x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed):
        groups, images, maps, features, weights, exp_GBLM, value_GBLM, total_GBM, keep_GBLM = block
        out_GBM = (exp_GBLM * value_GBLM).sum(dim=2).div_(total_GBM)
        exp_GBLM.mul_(grad_GBM[groups, images, maps].div(total_GBM).unsqueeze(2))  # attention x gradient
        dscore_GBLM = value_GBLM.sub_(out_GBM.unsqueeze(2)).mul_(exp_GBLM)
        dvalue_GBLM = exp_GBLM if keep_GBLM is None else exp_GBLM.mul_(keep_GBLM)
        yield groups, images, maps, features, weights, (dscore_GBLM.flatten(1, 2), dvalue_GBLM.flatten(1, 2))


def _block_size_on_cuda(groups: int, batch: int, positions: int, maps: int, itemsize: int) -> Tuple[int, int]:
    """Images and maps of a block, of all groups; what is split is the larger side of the products."""
    fitting, images = WORKSPACE_BYTES // (2 * itemsize * groups * positions), batch
    if batch * positions >= maps:
        images = min(max(fitting // maps, 1), batch)
    return images, min(max(fitting // images, 1), maps)


def _map_grads_on_cuda(
        kernels: ModuleType, grad_BK: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor,
        value_bias: Optional[Tensor], stats_2BM: Tensor, num_groups: int, conv_groups: int, drop_rate: float,
        seed: Optional[Tensor]) -> Tuple[Iterator[tuple], bool]:
    """What `_map_grads` gives, from the kernels, and whether the blocks have all maps of their images.

    The gradients of the next block take the place of this one's.
    """
    (batch, length, channels), dtype = x_BLC.shape, x_BLC.dtype
    num_maps, parts = key_weight.shape[0] // conv_groups, _parts(channels, key_weight, value_weight, conv_groups)
    num_images, most = _block_size_on_cuda(conv_groups, batch, length, num_maps, dtype.itemsize)

    def blocks() -> Iterator[tuple]:
        groups, grad = slice(0, conv_groups), grad_BK.contiguous()
        workspace = kernels.workspace(conv_groups, num_images * length, most, x_BLC)
        for maps in _slices(num_maps, most):
            weights = [
                _of_weight(weight.contiguous(), conv_groups, groups, maps).to(dtype)
                for weight in (key_weight, value_weight)]
            for images in _slices(batch, num_images):
                rows = slice(images.start * length, images.stop * length)
                features = [_of_features(x_BLC, *part, groups, rows) for part in parts]
                dmaps = kernels.map_grads(
                    grad, x_BLC, *weights, value_bias, stats_2BM, num_groups, drop_rate, seed, images, maps, workspace)
                yield groups, images, maps, features, weights, dmaps

    return blocks(), most == num_maps


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _parts(
        channels: int, key_weight: Tensor, value_weight: Tensor, conv_groups: int) -> Tuple[Tuple[int, int], ...]:
    """First channel and channels of a group, of keys, which read the first ones, and of values, which read the last."""
    key_width, value_width = key_weight.shape[1], value_weight.shape[1]
    return (0, key_width), (channels - conv_groups * value_width, value_width)


def _of_features(x_BLC: Tensor, first: int, width: int, groups: slice, rows: slice) -> Tensor:
    """A view (G, R, C) of contiguous (B, L, C): groups of `width` channels, the first of which begins at `first`."""
    channels = x_BLC.shape[2]
    at = x_BLC.storage_offset() + rows.start * channels + first + groups.start * width
    return x_BLC.as_strided((groups.stop - groups.start, rows.stop - rows.start, width), (width, channels, 1), at)


def _of_weight(weight: Tensor, conv_groups: int, groups: slice, maps: slice) -> Tensor:
    """A view (G, M, C) of a contiguous kernel (maps, C, 1, 1)."""
    maps_of_group, width = weight.shape[0] // conv_groups, weight.shape[1]
    at = weight.storage_offset() + (groups.start * maps_of_group + maps.start) * width
    return weight.as_strided(
        (groups.stop - groups.start, maps.stop - maps.start, width), (maps_of_group * width, width, 1), at)


def _of_maps(x_BM: Tensor, conv_groups: int) -> Tensor:
    return x_BM.unflatten(1, (conv_groups, -1)).transpose(0, 1)


def _blocks(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor], conv_groups: int,
        drop_rate: float, seed: Optional[Tensor]) -> Iterator[Block]:
    """All blocks, in two buffers that are used again; the same for the same shapes, so the mask of dropout is too."""
    batch, length, channels = x_BLC.shape
    device, dtype = x_BLC.device, torch.promote_types(x_BLC.dtype, torch.float32)
    x_BLC, *weights = (tensor.to(dtype).contiguous() for tensor in (x_BLC, key_weight, value_weight))
    parts = _parts(channels, key_weight, value_weight, conv_groups)
    num_maps = len(key_weight) // conv_groups
    num_groups, num_images, most = _block_size(conv_groups, batch, length, num_maps, device.type)
    buffers = torch.empty(2, num_groups * num_images * length * most, device=device, dtype=dtype)
    generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))
    shift = device.type != 'cpu'  # elsewhere to look at the sums means to wait for them
    with torch.autocast(device.type, enabled=False):
        for groups, maps in itertools.product(_slices(conv_groups, num_groups), _slices(num_maps, most)):
            weights_GMC = [_of_weight(weight, conv_groups, groups, maps) for weight in weights]
            for images in _slices(batch, num_images):
                rows = slice(images.start * length, images.stop * length)
                features_GRC = [_of_features(x_BLC, *part, groups, rows) for part in parts]
                shape = len(weights_GMC[0]), rows.stop - rows.start, weights_GMC[0].shape[1]
                score_GRM, value_GRM = (buffer[:math.prod(shape)].view(shape) for buffer in buffers)
                exp_GBLM, value_GBLM = (x.unflatten(1, (-1, length)) for x in (score_GRM, value_GRM))
                torch.bmm(features_GRC[0], weights_GMC[0].mT, out=score_GRM)
                torch.bmm(features_GRC[1], weights_GMC[1].mT, out=value_GRM)
                if not shift:
                    total_GBM = exp_GBLM.exp_().sum(dim=2)
                    low, high = total_GBM.aminmax()
                    if not (low.item() > SAFE[0] and high.item() < SAFE[1]):
                        shift = True
                        torch.bmm(features_GRC[0], weights_GMC[0].mT, out=score_GRM)
                if shift:
                    total_GBM = exp_GBLM.sub_(exp_GBLM.amax(dim=2, keepdim=True)).exp_().sum(dim=2)
                keep_GBLM = None
                if generator is not None:
                    keep_GBLM = torch.empty_like(value_GBLM).bernoulli_(1 - drop_rate, generator=generator)
                    if value_bias is not None:
                        value_GBLM.add_(value_bias.unflatten(0, (conv_groups, 1, 1, -1))[groups, :, :, maps])
                    value_GBLM.mul_(keep_GBLM.div_(1 - drop_rate))
                yield Block(
                    groups, images, maps, features_GRC, weights_GMC, exp_GBLM, value_GBLM, total_GBM, keep_GBLM)


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
