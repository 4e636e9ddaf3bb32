"""POCA in Triton kernels for CUDA, forward and backward, without an N x K x L map in memory.

Embedding, softmax over positions, dropout and reduction are one kernel. The backward pass computes the maps again, with
their log-sum-exp from the forward pass, in a kernel for the features and one for the weights, each once for the key and
once for the value. A program there holds its sum in registers and is alone with it, so that results are deterministic.

Tensor names say their shape: B batch, L positions, C channels, M maps (N groups x K classes), D the channels of a sum.
In the kernels `maps`, `key_width` and `value_width` are those of one convolution group, `x_left` is how many of x there
are from the start of the tile on.
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

WANTED_PROGRAMS = 1024  # of the kernel for the weights: a few for each multiprocessor of a large GPU
WORKSPACE_BYTES = 64 * 2 ** 20  # that splits of the batch may take for sums of their own


@triton.jit
def _load(ptr, i_left, j_left, stride_i, stride_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile (ROWS, COLUMNS) of a matrix, 0 beyond the `i_left` rows and `j_left` columns that it has from `ptr` on."""
    i_idx, j_idx = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + i_idx * stride_i + j_idx * stride_j, mask=(i_idx < i_left) & (j_idx < j_left), other=0.)


@triton.jit
def _store(ptr, tile_IJ, i_left, j_left, stride_i, stride_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i_idx, j_idx = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = ptr + i_idx * stride_i + j_idx * stride_j
    tl.store(at, tile_IJ.to(ptr.dtype.element_ty), mask=(i_idx < i_left) & (j_idx < j_left))


@triton.jit
def _project(
        x_ptr, weight_ptr, l_left, m_left, width: tl.constexpr, stride_l, stride_c,
        PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    acc_ML = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for c_start in range(0, width, BLOCK_C):
        c_left = width - c_start
        weight_MC = _load(weight_ptr + c_start, m_left, c_left, width, 1, BLOCK_M, BLOCK_C)
        x_CL = _load(
            x_ptr + tl.cast(c_start, tl.int64) * stride_c, c_left, l_left, stride_c, stride_l, BLOCK_C, BLOCK_L)
        acc_ML = tl.dot(weight_MC, x_CL, acc_ML, input_precision=PRECISION)
    return acc_ML


@triton.jit
def _values(
        x_ptr, weight_ptr, bias_ptr, scale_ML, l_left, m_left, width: tl.constexpr, stride_l, stride_c,
        HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    value_ML = _project(
        x_ptr, weight_ptr, l_left, m_left, width, stride_l, stride_c, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
    if HAS_BIAS:
        m_idx = tl.arange(0, BLOCK_M)
        value_ML += tl.load(bias_ptr + m_idx, mask=m_idx < m_left, other=0.).to(tl.float32)[:, None]
    return value_ML * scale_ML


@triton.jit
def _dropout_scale(
        seed_ptr, drop_rate, b, l_start, first_map,
        DROPOUT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr):
    """0 or 1 / (1 - drop_rate), (M, L): a function of seed, image, map and position alone.

    Philox counts in (map, position // 4, image) and gives four numbers, one for each of four positions.
    """
    scale_ML = tl.full((BLOCK_M, BLOCK_L), 1., tl.float32)
    if DROPOUT:
        zero = tl.zeros((BLOCK_M, BLOCK_L // 4), tl.int32)
        map_idx = (first_map + tl.arange(0, BLOCK_M)[:, None]).to(tl.int32)
        quad_idx = l_start // 4 + tl.arange(0, BLOCK_L // 4)[None, :]
        r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), zero + map_idx, zero + quad_idx, (zero + b).to(tl.int32), zero)
        bits_ML = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK_M, BLOCK_L)
        scale_ML = tl.where(tl.uint_to_uniform_float(bits_ML) >= drop_rate, 1. / (1. - drop_rate), 0.)
    return scale_ML


@triton.jit
def _map_grad(
        xk_ptr, xv_ptr, wk_ptr, wv_ptr, bias_ptr, seed_ptr, grad_ptr, out_ptr, lse_ptr, b, l_start, l_left, first_map,
        m_left, key_width: tl.constexpr, value_width: tl.constexpr, stride_l, stride_c, drop_rate, KEY: tl.constexpr,
        DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gradient of the scores if `KEY`, of the values if not, (M, L), 0 beyond the maps and positions there are."""
    m_idx = tl.arange(0, BLOCK_M)
    grad_M = tl.load(grad_ptr + m_idx, mask=m_idx < m_left, other=0.).to(tl.float32)
    lse_M = tl.load(lse_ptr + m_idx, mask=m_idx < m_left, other=0.)
    score_ML = _project(
        xk_ptr, wk_ptr, l_left, m_left, key_width, stride_l, stride_c, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
    score_ML = tl.where(tl.arange(0, BLOCK_L)[None, :] < l_left, score_ML, float('-inf'))
    scale_ML = _dropout_scale(seed_ptr, drop_rate, b, l_start, first_map, DROPOUT, BLOCK_L, BLOCK_M)
    grad_ML = grad_M[:, None] * tl.exp(score_ML - lse_M[:, None])
    if KEY:
        value_ML = _values(
            xv_ptr, wv_ptr, bias_ptr, scale_ML, l_left, m_left, value_width, stride_l, stride_c,
            HAS_BIAS, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
        grad_ML *= value_ML - tl.load(out_ptr + m_idx, mask=m_idx < m_left, other=0.)[:, None]
    else:
        grad_ML *= scale_ML
    return grad_ML


@triton.jit
def _forward_kernel(
        xk_ptr, xv_ptr, wk_ptr, wv_ptr, bias_ptr, seed_ptr, batch, positions, all_maps, maps,
        key_width: tl.constexpr, value_width: tl.constexpr, stride_b, stride_l, stride_c, drop_rate, out_ptr, lse_ptr,
        DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program per (group, tile of maps, image), images next to each other so that they share the weights' tile."""
    tiles = tl.cdiv(maps, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid % batch).to(tl.int64)
    m_start = pid // batch % tiles * BLOCK_M
    group = (pid // batch // tiles).to(tl.int64)
    first_map, m_left = group * maps + m_start, maps - m_start
    xk_ptr += b * stride_b + group * key_width * stride_c
    xv_ptr += b * stride_b + group * value_width * stride_c
    wk_ptr += first_map * key_width
    wv_ptr += first_map * value_width
    if HAS_BIAS:
        bias_ptr += first_map
    highest_M = tl.full((BLOCK_M,), float('-inf'), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    out_M = tl.zeros((BLOCK_M,), tl.float32)
    for l_start in range(0, positions, BLOCK_L):
        l_left = positions - l_start
        x_start = tl.cast(l_start, tl.int64) * stride_l
        score_ML = _project(
            xk_ptr + x_start, wk_ptr, l_left, m_left, key_width, stride_l, stride_c,
            PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
        score_ML = tl.where(tl.arange(0, BLOCK_L)[None, :] < l_left, score_ML, float('-inf'))
        scale_ML = _dropout_scale(seed_ptr, drop_rate, b, l_start, first_map, DROPOUT, BLOCK_L, BLOCK_M)
        value_ML = _values(
            xv_ptr + x_start, wv_ptr, bias_ptr, scale_ML, l_left, m_left, value_width, stride_l, stride_c,
            HAS_BIAS, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
        higher_M = tl.maximum(highest_M, tl.max(score_ML, 1))
        attn_ML = tl.exp(score_ML - higher_M[:, None])
        rescale_M = tl.exp(highest_M - higher_M)
        total_M = total_M * rescale_M + tl.sum(attn_ML, 1)
        out_M = out_M * rescale_M + tl.sum(attn_ML * value_ML, 1)
        highest_M = higher_M
    m_idx = tl.arange(0, BLOCK_M)
    at = b * all_maps + first_map + m_idx
    tl.store(out_ptr + at, out_M / total_M, mask=m_idx < m_left)
    tl.store(lse_ptr + at, highest_M + tl.log(total_M), mask=m_idx < m_left)


@triton.jit
def _x_grad_kernel(
        xk_ptr, xv_ptr, wk_ptr, wv_ptr, bias_ptr, seed_ptr, batch, positions, all_maps, maps,
        key_width: tl.constexpr, value_width: tl.constexpr, stride_b, stride_l, stride_c, drop_rate,
        grad_ptr, out_ptr, lse_ptr, dx_ptr, channels, KEY: tl.constexpr, BLOCK_D: tl.constexpr,
        DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program per (chunk of a group's key or value channels, group, tile of positions, image): sums over the maps."""
    width: tl.constexpr = key_width if KEY else value_width
    tiles = tl.cdiv(positions, BLOCK_L)
    groups = all_maps // maps
    pid = tl.program_id(0)
    b = (pid % batch).to(tl.int64)
    l_start = pid // batch % tiles * BLOCK_L
    group = (pid // batch // tiles % groups).to(tl.int64)
    d_start = pid // batch // tiles // groups * BLOCK_D
    l_left, d_left = positions - l_start, width - d_start
    x_start = b * stride_b + tl.cast(l_start, tl.int64) * stride_l
    xk_ptr += x_start + group * key_width * stride_c
    xv_ptr += x_start + group * value_width * stride_c
    dx_DL = tl.zeros((BLOCK_D, BLOCK_L), tl.float32)
    for m_start in range(0, maps, BLOCK_M):
        first_map, m_left = group * maps + m_start, maps - m_start
        at = b * all_maps + first_map
        grad_ML = _map_grad(
            xk_ptr, xv_ptr, wk_ptr + first_map * key_width, wv_ptr + first_map * value_width,
            bias_ptr + first_map if HAS_BIAS else bias_ptr, seed_ptr, grad_ptr + at, out_ptr + at, lse_ptr + at,
            b, l_start, l_left, first_map, m_left, key_width, value_width, stride_l, stride_c, drop_rate,
            KEY, DROPOUT, HAS_BIAS, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
        weight_DM = _load(
            (wk_ptr if KEY else wv_ptr) + first_map * width + d_start, d_left, m_left, 1, width, BLOCK_D, BLOCK_M)
        dx_DL = tl.dot(weight_DM, grad_ML.to(weight_DM.dtype), dx_DL, input_precision=PRECISION)
    _store(
        dx_ptr + (b * positions + l_start) * channels + group * width + d_start, dx_DL, d_left, l_left, 1, channels,
        BLOCK_D, BLOCK_L)


@triton.jit
def _weight_grad_kernel(
        xk_ptr, xv_ptr, wk_ptr, wv_ptr, bias_ptr, seed_ptr, batch, positions, all_maps, maps,
        key_width: tl.constexpr, value_width: tl.constexpr, stride_b, stride_l, stride_c, drop_rate,
        grad_ptr, out_ptr, lse_ptr, dweight_ptr, dbias_ptr, split_images, KEY: tl.constexpr, BLOCK_D: tl.constexpr,
        DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program per (split of the batch, chunk of key or value channels, group, tile of maps): sums over positions."""
    width: tl.constexpr = key_width if KEY else value_width
    tiles = tl.cdiv(maps, BLOCK_M)
    groups = all_maps // maps
    chunks: tl.constexpr = (width + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    m_start = pid % tiles * BLOCK_M
    group = (pid // tiles % groups).to(tl.int64)
    d_start = pid // tiles // groups % chunks * BLOCK_D
    split = (pid // tiles // groups // chunks).to(tl.int64)
    first_map, m_left, d_left = group * maps + m_start, maps - m_start, width - d_start
    xk_ptr += group * key_width * stride_c
    xv_ptr += group * value_width * stride_c
    wk_ptr += first_map * key_width
    wv_ptr += first_map * value_width
    if HAS_BIAS:
        bias_ptr += first_map
    x_ptr = (xk_ptr if KEY else xv_ptr) + tl.cast(d_start, tl.int64) * stride_c
    dweight_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dbias_M = tl.zeros((BLOCK_M,), tl.float32)
    for b in range(split * split_images, tl.minimum((split + 1) * split_images, batch)):
        at = b * all_maps + first_map
        for l_start in range(0, positions, BLOCK_L):
            l_left = positions - l_start
            x_start = b * stride_b + tl.cast(l_start, tl.int64) * stride_l
            grad_ML = _map_grad(
                xk_ptr + x_start, xv_ptr + x_start, wk_ptr, wv_ptr, bias_ptr, seed_ptr,
                grad_ptr + at, out_ptr + at, lse_ptr + at, b, l_start, l_left, first_map, m_left,
                key_width, value_width, stride_l, stride_c, drop_rate,
                KEY, DROPOUT, HAS_BIAS, PRECISION, BLOCK_L, BLOCK_M, BLOCK_C)
            x_LD = _load(x_ptr + x_start, l_left, d_left, stride_l, stride_c, BLOCK_L, BLOCK_D)
            dweight_MD = tl.dot(grad_ML.to(x_LD.dtype), x_LD, dweight_MD, input_precision=PRECISION)
            dbias_M += tl.sum(grad_ML, 1)
    row = split * all_maps + first_map
    _store(dweight_ptr + row * width + d_start, dweight_MD, m_left, d_left, width, 1, BLOCK_M, BLOCK_D)
    if HAS_BIAS:
        if not KEY:
            m_idx = tl.arange(0, BLOCK_M)
            tl.store(dbias_ptr + row + m_idx, dbias_M, mask=(m_idx < m_left) & (d_start == 0))


def supports(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int, seed: Optional[Tensor]) -> bool:
    """Whether `forward` and `backward` do it: on an NVIDIA GPU from Ampere on, up to float32, where they are known to
    work."""
    return (
        x_BLC.is_cuda and not torch.version.hip and x_BLC.dtype != torch.float64 and x_BLC.numel() > 0
        and torch.cuda.get_device_capability(x_BLC.device) >= (8, 0) and works(x_BLC.device))


@functools.cache
def works(device: torch.device) -> bool:
    """Try the kernels on a tiny problem, once for a device; a warning says why they cannot be used."""
    x_BLC, grad_BM = torch.ones(1, 2, 2, device=device), torch.ones(1, 1, device=device)
    weight = torch.ones(1, 1, device=device)
    common = x_BLC, weight, weight, None
    try:
        out_BM, lse_BM = forward(*common, 1, 0., None)
        dx_BLC, *_ = backward(grad_BM, *common, out_BM, lse_BM, 1, 0., None, True, True)
        found = out_BM.item(), dx_BLC.sum().item()  # the average of ones, and how it follows them
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
        x_BLC: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        value_bias: Optional[Tensor],
        conv_groups: int,
        drop_rate: float,
        seed: Optional[Tensor],
) -> Tuple[Tensor, Tensor]:
    """Per image and map, softmax of the embedded key over positions, times the embedded value, summed.

    The bias of the key is left out because it cancels, that of the value without dropout because it only adds.

    Args:
        x_BLC: Features, (B, L, C), float32, bfloat16 or float16, of any strides. The key reads the first channels, the
            value the last.
        key_weight: (M, Ck / conv_groups). Weights are taken in the dtype of `x_BLC`.
        value_weight: (M, Cv / conv_groups).
        value_bias: (M,), contiguous. Read only with dropout.
        conv_groups: Groups of channels and of maps.
        drop_rate: Dropout probability on the value map, 0 for no dropout.
        seed: int64 scalar on the device; the dropout mask depends on it, image, position and map. Read only with
            dropout.

    Returns:
        Maps (B, M), and the log-sum-exp of their scores (B, M); float32.

    Raises:
        ValueError: If the dtype is another or weights do not fit.
    """
    arguments, options = _arguments(x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed)
    shape = x_BLC.shape[0], key_weight.shape[0]
    out_BM, lse_BM = (torch.empty(shape, dtype=torch.float32, device=x_BLC.device) for _ in range(2))
    programs = shape[0] * conv_groups * triton.cdiv(shape[1] // conv_groups, options['BLOCK_M'])
    _launch(_forward_kernel, programs, (*arguments, out_BM, lse_BM), options)
    return out_BM, lse_BM


def backward(
        grad_BM: Tensor,
        x_BLC: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        value_bias: Optional[Tensor],
        out_BM: Tensor,
        lse_BM: Tensor,
        conv_groups: int,
        drop_rate: float,
        seed: Optional[Tensor],
        need_x: bool,
        need_weights: bool,
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of `forward`.

    Args:
        grad_BM: Gradient of the maps, (B, M).
        out_BM: Maps from `forward`, (B, M).
        lse_BM: Log-sum-exp from `forward`, (B, M).
        need_x: Whether the gradient of the features is wanted.
        need_weights: Whether those of weights and bias are.
        Others: As in `forward`.

    Returns:
        Gradients of x_BLC (contiguous), key_weight, value_weight and value_bias, in the dtypes of those. None for what
        is not wanted, and for the bias if it was not read.

    Raises:
        ValueError: As in `forward`.
    """
    arguments, options = _arguments(x_BLC, key_weight, value_weight, value_bias, conv_groups, drop_rate, seed)
    arguments += grad_BM.contiguous(), out_BM.contiguous(), lse_BM.contiguous()
    batch, positions, channels = x_BLC.shape
    all_maps = key_weight.shape[0]
    widths = key_weight.shape[1], value_weight.shape[1]
    dx_BLC, dweights, dvalue_bias = None, [None, None], None
    if need_x:  # separate sums for key and value if they share channels
        overlap = conv_groups * sum(widths) > channels
        dx_BLC = torch.zeros(
            (1 + overlap, *x_BLC.shape), dtype=torch.float32 if overlap else x_BLC.dtype, device=x_BLC.device)
        dx_parts = _parts(dx_BLC[0], *widths, conv_groups)[0], _parts(dx_BLC[-1], *widths, conv_groups)[1]
    for i, weight in enumerate((key_weight, value_weight)):
        part = {'KEY': i == 0, 'BLOCK_D': _tile(widths[i], 128 if x_BLC.element_size() == 2 else 64), **options}
        chunks = conv_groups * triton.cdiv(widths[i], part['BLOCK_D'])
        if need_x:
            programs = batch * triton.cdiv(positions, options['BLOCK_L']) * chunks
            _launch(_x_grad_kernel, programs, (*arguments, dx_parts[i], channels), part)
        if need_weights:
            programs = triton.cdiv(all_maps // conv_groups, options['BLOCK_M']) * chunks
            splits = _num_splits(batch, programs, weight.numel())
            sums = torch.empty((splits, *weight.shape), dtype=torch.float32, device=x_BLC.device)
            with_bias = part['HAS_BIAS'] and not part['KEY']
            bias_sums = sums.new_empty(splits, all_maps) if with_bias else None
            _launch(
                _weight_grad_kernel, programs * splits, (*arguments, sums, bias_sums, triton.cdiv(batch, splits)), part)
            dweights[i] = sums.sum(0).to(weight.dtype)
            if with_bias:
                dvalue_bias = bias_sums.sum(0).to(value_bias.dtype)
    if need_x:
        dx_BLC = dx_BLC.sum(0).to(x_BLC.dtype) if overlap else dx_BLC[0]
    return dx_BLC, *dweights, dvalue_bias


def _launch(kernel, programs: int, arguments: tuple, options: dict) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **options)


def _arguments(
        x_BLC: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        value_bias: Optional[Tensor],
        conv_groups: int,
        drop_rate: float,
        seed: Optional[Tensor],
) -> Tuple[tuple, dict]:
    """What all kernels begin with, and their compile-time options."""
    batch, positions, channels = x_BLC.shape
    all_maps, key_width = key_weight.shape
    value_width = value_weight.shape[1]
    if x_BLC.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f'x_BLC is {x_BLC.dtype}; expected float32, bfloat16 or float16')
    if value_weight.shape[0] != all_maps or all_maps % conv_groups:
        raise ValueError(
            f'weights for {all_maps} and {value_weight.shape[0]} maps; expected the same multiple of '
            f'conv_groups={conv_groups}')
    if conv_groups * max(key_width, value_width) > channels:
        raise ValueError(
            f'key and value read {conv_groups * key_width} and {conv_groups * value_width} channels of {channels}')
    if x_BLC.stride(2) != 1 and x_BLC.stride(2) % 16:  # loads could not be vectors: far slower than a copy
        x_BLC = x_BLC.contiguous()
    dropout = drop_rate > 0
    arguments = (
        *_parts(x_BLC, key_width, value_width, conv_groups),
        key_weight.to(x_BLC.dtype).contiguous(),
        value_weight.to(x_BLC.dtype).contiguous(),
        value_bias if dropout else None,
        seed if dropout else None,
        batch, positions, all_maps, all_maps // conv_groups, key_width, value_width, *x_BLC.stride(), float(drop_rate))
    options = {
        'DROPOUT': dropout,
        'HAS_BIAS': dropout and value_bias is not None,
        'PRECISION': _precision(),
        **_tiles(positions, all_maps // conv_groups, max(key_width, value_width), x_BLC.element_size()),
    }
    return arguments, options


def _parts(x_BLC: Tensor, key_width: int, value_width: int, conv_groups: int) -> Tuple[Tensor, Tensor]:
    """The channels of the key and those of the value."""
    return x_BLC[..., :conv_groups * key_width], x_BLC[..., x_BLC.shape[2] - conv_groups * value_width:]


def _precision() -> str:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # where it is there, reading the older setting can raise
        return 'tf32' if matmul.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if matmul.allow_tf32 else 'ieee'


def _tile(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


def _tiles(positions: int, maps: int, channels: int, element_size: int) -> dict:
    """Sizes of tiles, powers of 2 of at least 16, and how a tile is computed."""
    half = element_size == 2
    return {
        'BLOCK_L': _tile(positions, 64 if half else 32),
        'BLOCK_M': _tile(maps, 64),
        'BLOCK_C': _tile(channels, 64 if half else 32),
        'num_warps': 4,
        'num_stages': 3 if half else 2,
    }


def _num_splits(batch: int, programs: int, weight_numel: int) -> int:
    """Parts of the batch whose weight gradients are summed apart, to keep the GPU busy."""
    fitting = WORKSPACE_BYTES // (4 * weight_numel)
    return max(1, min(batch, triton.cdiv(WANTED_PROGRAMS, programs), fitting))
