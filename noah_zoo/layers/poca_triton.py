"""POCA in Triton kernels for CUDA, without an N x K x L map in memory.

Embedding, softmax over positions, dropout, and the sums over positions and groups are one kernel. The backward pass has
one of its own, which computes the maps of a block again, with their log-sum-exp from the forward pass, and writes the
gradients of scores and values; plain products (`poca.py`) make those of features and weights of them.

Tensor names say their shape: B batch, L positions, C channels, K classes, M maps (N groups x K classes), G groups of
the embeddings, R rows (images x positions). In the kernels `key_width` and `value_width` are the channels of such a
group, `x_left` is how many of x there are from the start of the tile on.
"""
import functools
import logging
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..text import one_line

_logger = logging.getLogger(__name__)

PROGRAMS = 128  # that a large GPU can run at once; tiles get smaller where they would be fewer
CAST_FROM = 2 ** 24  # weights that all images read together, from which on a copy in their type pays


@triton.jit
def _load(ptr, i_left, j_left, stride_i, stride_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile (ROWS, COLUMNS) of a matrix, 0 beyond the `i_left` rows and `j_left` columns that it has from `ptr` on."""
    i_idx, j_idx = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + i_idx * stride_i + j_idx * stride_j, mask=(i_idx < i_left) & (j_idx < j_left), other=0.)


@triton.jit
def _project(
        x_ptr, weight_ptr, l_left, m_left, stride_l, stride_c, width: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    acc_ML = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for c_start in range(0, width, BLOCK_C):
        c_left = width - c_start
        weight_MC = _load(weight_ptr + c_start, m_left, c_left, width, 1, BLOCK_M, BLOCK_C)
        x_CL = _load(x_ptr + c_start * stride_c, c_left, l_left, stride_c, stride_l, BLOCK_C, BLOCK_L)
        acc_ML = tl.dot(weight_MC.to(x_CL.dtype), x_CL, acc_ML, input_precision=PRECISION)
    return acc_ML


@triton.jit
def _dropout_scale(
        seed_ptr, drop_rate, b, l_start, first_map, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr):
    """0 or 1 / (1 - drop_rate), (M, L): a function of seed, image, map and position alone.

    Philox counts in (map, position // 4, image) and gives four numbers, one for each of four positions.
    """
    zero = tl.zeros((BLOCK_M, BLOCK_L // 4), tl.int32)
    map_idx = (first_map + tl.arange(0, BLOCK_M)[:, None]).to(tl.int32)
    quad_idx = l_start // 4 + tl.arange(0, BLOCK_L // 4)[None, :]
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), zero + map_idx, zero + quad_idx, (zero + b).to(tl.int32), zero)
    bits_ML = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK_M, BLOCK_L)
    return tl.where(tl.uint_to_uniform_float(bits_ML) >= drop_rate, 1. / (1. - drop_rate), 0.)


@triton.jit
def _maps(
        xk_ptr, xv_ptr, wk_ptr, wv_ptr, bias_ptr, seed_ptr, b, l_start, l_left, first_map, m_left, stride_l, stride_c,
        drop_rate, key_width: tl.constexpr, value_width: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Scores, -inf beyond the positions there are; values and what dropout multiplied them by; all (M, L).

    `xk_ptr` and `xv_ptr` are at the tile's first position, `wk_ptr`, `wv_ptr` and `bias_ptr` at its first map.
    """
    score_ML = _project(
        xk_ptr, wk_ptr, l_left, m_left, stride_l, stride_c, key_width, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
    score_ML = tl.where(tl.arange(0, BLOCK_L)[None, :] < l_left, score_ML, float('-inf'))
    value_ML = _project(
        xv_ptr, wv_ptr, l_left, m_left, stride_l, stride_c, value_width, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
    scale_ML = 1.
    if DROPOUT:
        if HAS_BIAS:
            m_idx = tl.arange(0, BLOCK_M)
            value_ML += tl.load(bias_ptr + m_idx, mask=m_idx < m_left, other=0.).to(tl.float32)[:, None]
        scale_ML = _dropout_scale(seed_ptr, drop_rate, b, l_start, first_map, BLOCK_L, BLOCK_M)
        value_ML *= scale_ML
    return score_ML, value_ML, scale_ML


@triton.jit(do_not_specialize=['batch'])
def _forward_kernel(
        x_ptr, wk_ptr, wv_ptr, bias_ptr, seed_ptr, out_ptr, stats_ptr, batch, positions, channels, classes, num_groups,
        conv_groups, stride_b, stride_l, stride_c, drop_rate, key_width: tl.constexpr, value_width: tl.constexpr,
        DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program per (tile of classes, image), images next to each other so that they share the weights' tile."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    k_start = tl.program_id(0) // batch * BLOCK_M
    k_left = classes - k_start
    k_idx = tl.arange(0, BLOCK_M)
    logit_K = tl.zeros((BLOCK_M,), tl.float32)
    all_maps = num_groups * classes
    for n in range(num_groups):
        group = n * conv_groups // num_groups
        first_map = tl.cast(n, tl.int64) * classes + k_start
        xk_ptr = x_ptr + b * stride_b + group * key_width * stride_c
        xv_ptr = x_ptr + b * stride_b + (channels - (conv_groups - group) * value_width) * stride_c
        highest_M = tl.full((BLOCK_M,), float('-inf'), tl.float32)
        total_M = tl.zeros((BLOCK_M,), tl.float32)
        out_M = tl.zeros((BLOCK_M,), tl.float32)
        for l_start in range(0, positions, BLOCK_L):
            x_start = tl.cast(l_start, tl.int64) * stride_l
            score_ML, value_ML, _ = _maps(
                xk_ptr + x_start, xv_ptr + x_start, wk_ptr + first_map * key_width, wv_ptr + first_map * value_width,
                bias_ptr + first_map if HAS_BIAS else bias_ptr, seed_ptr, b, l_start, positions - l_start, first_map,
                k_left, stride_l, stride_c, drop_rate, key_width, value_width, DROPOUT, HAS_BIAS, PRECISION,
                BLOCK_L, BLOCK_M, BLOCK_C)
            higher_M = tl.maximum(highest_M, tl.max(score_ML, 1))
            attn_ML = tl.exp(score_ML - higher_M[:, None])
            rescale_M = tl.exp(highest_M - higher_M)
            total_M = total_M * rescale_M + tl.sum(attn_ML, 1)
            out_M = out_M * rescale_M + tl.sum(attn_ML * value_ML, 1)
            highest_M = higher_M
        out_M /= total_M
        at = b * all_maps + first_map + k_idx
        tl.store(stats_ptr + at, out_M, mask=k_idx < k_left)
        tl.store(stats_ptr + batch * tl.cast(all_maps, tl.int64) + at, highest_M + tl.log(total_M), mask=k_idx < k_left)
        logit_K += out_M
        if HAS_BIAS and not DROPOUT:
            logit_K += tl.load(bias_ptr + first_map + k_idx, mask=k_idx < k_left, other=0.).to(tl.float32)
    tl.store(out_ptr + b * classes + k_start + k_idx, logit_K, mask=k_idx < k_left)


@triton.jit(do_not_specialize=['batch', 'first_image', 'images', 'first_map', 'maps'])
def _map_grads_kernel(
        x_ptr, wk_ptr, wv_ptr, bias_ptr, seed_ptr, grad_ptr, stats_ptr, dscore_ptr, dvalue_ptr, batch, positions,
        channels, classes, num_groups, groups, stride_b, stride_l, stride_c, wk_stride_g, wv_stride_g, to_stride_g,
        to_stride_r, drop_rate, first_image, images, first_map, maps,
        key_width: tl.constexpr, value_width: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program per (group, tile of maps, tile of positions, image); `first_map` counts within a group."""
    l_tiles, m_tiles = tl.cdiv(positions, BLOCK_L), tl.cdiv(maps, BLOCK_M)
    pid = tl.program_id(0)
    image = (pid % images).to(tl.int64)
    l_start = pid // images % l_tiles * BLOCK_L
    m_start = pid // images // l_tiles % m_tiles * BLOCK_M
    group = (pid // images // l_tiles // m_tiles).to(tl.int64)
    b, all_maps = first_image + image, num_groups * classes
    map_0 = group * (all_maps // groups) + first_map + m_start
    l_left, m_left = positions - l_start, maps - m_start
    x_ptr += b * stride_b + tl.cast(l_start, tl.int64) * stride_l
    score_ML, value_ML, scale_ML = _maps(
        x_ptr + group * key_width * stride_c, x_ptr + (channels - (groups - group) * value_width) * stride_c,
        wk_ptr + group * wk_stride_g + m_start * key_width, wv_ptr + group * wv_stride_g + m_start * value_width,
        bias_ptr + map_0 if HAS_BIAS else bias_ptr, seed_ptr, b, l_start, l_left, map_0, m_left, stride_l, stride_c,
        drop_rate, key_width, value_width, DROPOUT, HAS_BIAS, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
    l_idx, m_idx = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_M)
    at = b * all_maps + map_0 + m_idx
    out_M = tl.load(stats_ptr + at, mask=m_idx < m_left, other=0.)
    lse_M = tl.load(stats_ptr + batch * tl.cast(all_maps, tl.int64) + at, mask=m_idx < m_left, other=0.)
    grad_M = tl.load(grad_ptr + b * classes + (map_0 + m_idx) % classes, mask=m_idx < m_left, other=0.)
    dvalue_ML = grad_M[:, None] * tl.exp(score_ML - lse_M[:, None])
    dscore_ML = dvalue_ML * (value_ML - out_M[:, None])
    dvalue_ML *= scale_ML
    r_idx = image * positions + l_start + l_idx
    to = group * to_stride_g + r_idx[None, :] * to_stride_r + (m_start + m_idx[:, None])
    mask = (m_idx[:, None] < to_stride_r - m_start) & (l_idx[None, :] < l_left)  # whole vectors, though maps end before
    tl.store(dscore_ptr + to, dscore_ML.to(dscore_ptr.dtype.element_ty), mask=mask)
    tl.store(dvalue_ptr + to, dvalue_ML.to(dvalue_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy_kernel(
        from_ptr, to_ptr, rows, columns, from_b, from_i, from_j, to_b, to_i, to_j,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program per (matrix, tile)."""
    pid, tiles = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    tiles_of_matrix = tl.cdiv(rows, ROWS) * tiles
    b = (pid // tiles_of_matrix).to(tl.int64)
    i_start, j_start = pid % tiles_of_matrix // tiles * ROWS, pid % tiles * COLUMNS
    tile_IJ = _load(
        from_ptr + b * from_b + i_start * from_i + j_start * from_j, rows - i_start, columns - j_start, from_i, from_j,
        ROWS, COLUMNS)
    i_idx, j_idx = i_start + tl.arange(0, ROWS)[:, None], j_start + tl.arange(0, COLUMNS)[None, :]
    tl.store(to_ptr + b * to_b + i_idx * to_i + j_idx * to_j, tile_IJ, mask=(i_idx < rows) & (j_idx < columns))


def supports(x_BLC: Tensor) -> bool:
    """Whether the kernels do it: on an NVIDIA GPU from Ampere on, up to float32, where they are known to work."""
    return x_BLC.is_cuda and x_BLC.dtype != torch.float64 and x_BLC.numel() > 0 and works(x_BLC.device)


@functools.cache
def works(device: torch.device) -> bool:
    """Try the kernels on a tiny problem, once for a device; a warning says why they cannot be used."""
    x_BLC, grad_BK, weight = (
        torch.ones(shape, dtype=torch.float32, device=device) for shape in ((1, 2, 2), (1, 1), (1, 1)))
    if device.type == 'cuda' and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return False
    try:
        out_BK, stats_2BM = torch.empty_like(grad_BK), grad_BK.new_empty(2, 1, 1)
        forward(x_BLC, weight, weight, None, 1, 1, 0., None, out_BK, stats_2BM)
        _, dvalue_GRM = map_grads(
            grad_BK, x_BLC, weight[None], weight[None], None, stats_2BM, 1, 0., None, slice(0, 1), slice(0, 1),
            workspace(1, 2, 1, x_BLC))
        found = out_BK.item(), dvalue_GRM.sum().item()  # the average of ones, and how it follows them
        if max(abs(number - 1) for number in found) > 1e-3:
            raise RuntimeError(f'they give {found[0]} and {found[1]} where 1 is right')
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, say; a driver that is too old
        _logger.warning(
            'NOAH heads will be slow on %s, as the Triton kernels cannot be used there: %s', device, one_line(error))
        return False
    return True


def forward(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor], num_groups: int,
        conv_groups: int, drop_rate: float, seed: Optional[Tensor], out_BK: Tensor, stats_2BM: Tensor) -> None:
    """Per image and map, softmax of the embedded key over positions, times the embedded value; summed to logits.

    The bias of the key is left out because it cancels.

    Args:
        x_BLC: Features, (B, L, C), float32, bfloat16 or float16. The key reads the first channels, the value the last.
        key_weight: (M, Ck / conv_groups, 1, 1) or without the ones. Weights are read as numbers of `x_BLC`'s type.
        value_weight: (M, Cv / conv_groups, 1, 1).
        value_bias: (M,), or None.
        num_groups: N, groups of maps that are summed.
        conv_groups: G, groups of channels and of maps; divides `num_groups`.
        drop_rate: Dropout probability on the value map. Read only with a seed.
        seed: int64 scalar on the device; the dropout mask depends on it, image, position and map. None for no dropout.
        out_BK: Gets the logits, float32.
        stats_2BM: Gets what `map_grads` needs of all maps: the sum over positions, without bias unless there is
            dropout, and the log-sum-exp of the scores. float32.
    """
    (batch, positions, channels), all_maps = x_BLC.shape, key_weight.shape[0]
    classes, widths = all_maps // num_groups, (key_weight.shape[1], value_weight.shape[1])
    if batch * all_maps * sum(widths) >= CAST_FROM:
        key_weight, value_weight = key_weight.to(x_BLC.dtype), value_weight.to(x_BLC.dtype)
    value_bias = None if value_bias is None else value_bias.contiguous()
    tiles = _tiles(positions, classes, max(widths), batch)
    with torch.cuda.device_of(x_BLC):
        _forward_kernel[batch * _cdiv(classes, tiles['BLOCK_M']),](
            x_BLC, key_weight.contiguous(), value_weight.contiguous(), value_bias, seed, out_BK, stats_2BM, batch,
            positions, channels, classes, num_groups, conv_groups, *x_BLC.stride(), drop_rate, *widths,
            seed is not None, value_bias is not None, _precision(), **tiles)


def copy(x_BLC: Tensor, to_BLC: Tensor) -> Tensor:
    """Copy into another layout, a tile at a time: PyTorch's `copy_` takes some times as long where both differ."""
    batch, positions, channels = x_BLC.shape
    programs = batch * _cdiv(positions, 64) * _cdiv(channels, 64)
    with torch.cuda.device_of(x_BLC):
        _copy_kernel[programs,](x_BLC, to_BLC, positions, channels, *x_BLC.stride(), *to_BLC.stride(), 64, 64)
    return to_BLC


def workspace(groups: int, rows: int, maps: int, like: Tensor) -> Tensor:
    """Room for what `map_grads` gives, (2, G, R, M): rows begin on multiples of 16 numbers, for vectors of them."""
    return torch.empty((2, groups, rows, _cdiv(maps, 16) * 16), dtype=like.dtype, device=like.device)


def map_grads(
        grad_BK: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Optional[Tensor],
        stats_2BM: Tensor, num_groups: int, drop_rate: float, seed: Optional[Tensor], images: slice, maps: slice,
        room_2GRM: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Gradients of scores and of values of some images and some maps of every group of the embeddings.

    Args:
        grad_BK: Gradient of the logits, (B, K), contiguous float32.
        key_weight: (G, M, C), those of the maps alone.
        value_weight: Likewise.
        stats_2BM: From `forward`.
        images, maps: Which.
        room_2GRM: From `workspace`, for as many of them or more.
        Others: As in `forward`.

    Returns:
        Gradients of the scores, and of the values before dropout, each (G, R, M), views of `room_2GRM`.
    """
    (batch, positions, channels), (groups, num_maps, key_width) = x_BLC.shape, key_weight.shape
    num_images, value_width = images.stop - images.start, value_weight.shape[2]
    value_bias = None if value_bias is None else value_bias.contiguous()
    part_stride, *strides = room_2GRM.stride()
    dscore_GRM, dvalue_GRM = (
        room_2GRM.as_strided((groups, num_images * positions, num_maps), strides, at) for at in (0, part_stride))
    tiles = _tiles(positions, num_maps, max(key_width, value_width), groups * num_images)
    tiles_of_group = _cdiv(num_maps, tiles['BLOCK_M']) * _cdiv(positions, tiles['BLOCK_L'])
    with torch.cuda.device_of(x_BLC):
        _map_grads_kernel[groups * num_images * tiles_of_group,](
            x_BLC, key_weight, value_weight, value_bias, seed, grad_BK, stats_2BM, dscore_GRM, dvalue_GRM, batch,
            positions, channels, grad_BK.shape[1], num_groups, groups, *x_BLC.stride(), key_weight.stride(0),
            value_weight.stride(0), *strides[:2], drop_rate, images.start, num_images, maps.start, num_maps,
            key_width, value_width, seed is not None, value_bias is not None, _precision(), **tiles)
    return dscore_GRM, dvalue_GRM


@functools.cache
def _tiles(positions: int, maps: int, width: int, others: int) -> dict:
    """Sizes of tiles, powers of 2 of at least 16, and how a tile is computed: measured, `docs/numbers.md`.

    Args:
        positions: L.
        maps: That are tiled.
        width: Channels of a group, the larger of key and value.
        others: Programs per tile of maps, or fewer.
    """
    block_m = _tile(maps, 64 if width <= 32 else 128)
    while block_m > 16 and others * _cdiv(maps, block_m) < PROGRAMS:
        block_m //= 2
    return {
        'BLOCK_L': _tile(positions, 32 if width <= 32 else 64), 'BLOCK_M': block_m, 'BLOCK_C': _tile(width, 32),
        'num_warps': 4, 'num_stages': 3}


def _cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)  # triton.cdiv takes microseconds


def _tile(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


def _precision() -> str:
    """How float32 numbers are multiplied: as in the convolutions that the head would be without these kernels."""
    cudnn = torch.backends.cudnn
    tf32 = cudnn.conv.fp32_precision == 'tf32' if hasattr(cudnn, 'conv') else cudnn.allow_tf32
    return 'tf32' if tf32 else 'tf32x3'
