"""`poca` and its gradients on x86 processors, compiled from poca_cpu.cpp when the package is installed."""
import ctypes
import functools
import importlib.util
import logging
from typing import Callable, List, Optional, Tuple

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

FLOP_PER_THREAD = 2e7  # a fraction of a millisecond; less is not worth starting a thread for
TASKS = 16  # of backward, at least, if there are as many images
COPIES_BYTES = 2 ** 26  # of the gradients of kernels that backward holds: a chunk of the images has its own
LANES = 8  # maps that are computed at once


class _Call(ctypes.Structure):
    _fields_ = [
        ('x', ctypes.c_void_p),
        *((name, ctypes.c_ssize_t) for name in ('image_stride', 'position_stride', 'channel_stride')),
        *((name, ctypes.c_void_p) for name in ('key_weight', 'value_weight', 'out')),
        *((name, ctypes.c_ssize_t) for name in (
            'batch', 'length', 'channels', 'groups', 'maps', 'key_depth', 'value_depth', 'threads')),
        *((name, ctypes.c_void_p) for name in ('grad', 'dx', 'dkey_weight', 'dvalue_weight')),
        *((name, ctypes.c_ssize_t) for name in ('channels_first', 'value_adds', 'chunks'))]


@functools.cache
def compiled() -> Optional[Callable]:
    """The compiled function, where it was built and this processor can run it."""
    spec = importlib.util.find_spec('noah_zoo.layers._poca_cpu')
    if spec is None or torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        return None
    try:
        return ctypes.CDLL(spec.origin).poca_run
    except OSError:  # no OpenMP library
        return None
    except AttributeError:
        _logger.warning('%s was compiled for an earlier version and is not used; install the package again', spec.origin)
        return None


def supports(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int, seed: Optional[Tensor]) -> bool:
    """Whether `forward` does it: float32 that fits, on a processor that has what it was compiled for; no dropout."""
    tensors, maps = (x_BLC, key_weight, value_weight), len(key_weight)
    return (
        seed is None and all(t.device.type == 'cpu' and t.dtype == torch.float32 and t.numel() for t in tensors)
        and maps == len(value_weight) and maps % conv_groups == 0
        and conv_groups * max(key_weight.shape[1], value_weight.shape[1]) <= x_BLC.shape[2]
        and compiled() is not None)


def supports_backward(x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int) -> bool:
    """Whether `backward` does what `forward` does: no two groups read the same channel."""
    key_width, value_width = key_weight.shape[1], value_weight.shape[1]
    first_value = x_BLC.shape[2] - conv_groups * value_width
    return conv_groups == 1 or first_value >= conv_groups * key_width or (first_value == 0 and key_width == value_width)


def forward(x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int) -> Tensor:
    """Attended values of every map, (B, M), without bias, where `supports` says so.

    Raises:
        MemoryError: If there is no memory for the buffers of its threads.
    """
    out_BM, weights = x_BLC.new_empty(len(x_BLC), len(key_weight)), _kernels(key_weight, value_weight)
    _run(_call(x_BLC, *weights, conv_groups, 1), out=out_BM)
    return out_BM


def backward(
        grad_BM: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int,
        channels_first: bool, need_x: bool, need_weights: bool,
) -> Tuple[Optional[Tensor], Optional[List[Tensor]]]:
    """Gradients of the features, (B, L, C), in memory (B, C, L) if `channels_first`, and of the kernels, from those of
    what `forward` gives, where `supports` and `supports_backward` say so.

    Raises:
        MemoryError: If there is no memory for the buffers of its threads.
    """
    weights = _kernels(key_weight, value_weight)
    (batch, length, channels), (maps, key_width), value_width = x_BLC.shape, weights[0].shape, weights[1].shape[1]
    first_value, last_key = channels - conv_groups * value_width, conv_groups * key_width
    dx_BLC = dweights = None
    if need_x:
        # keys and values write every channel, or values add to those of the keys
        new = x_BLC.new_empty if first_value in (last_key, last_key - channels) else x_BLC.new_zeros
        dx_BLC = new(batch, channels, length).mT if channels_first else new(batch, length, channels)
    if need_weights:
        dweights = [torch.empty_like(weight) for weight in weights]
    padded = -(-maps // conv_groups // LANES) * LANES * conv_groups
    chunks = min(-(-TASKS // conv_groups), batch, max(COPIES_BYTES // (4 * padded * (key_width + value_width)), 1))
    call = _call(x_BLC, *weights, conv_groups, 1 + need_x + need_weights)
    call.channels_first, call.value_adds, call.chunks = channels_first, first_value < last_key, chunks
    _run(call, grad=grad_BM.contiguous(), dx=dx_BLC, **dict(zip(('dkey_weight', 'dvalue_weight'), dweights or ())))
    return dx_BLC, dweights and [
        dweight.view(weight.shape) for dweight, weight in zip(dweights, (key_weight, value_weight))]


def _kernels(*weights: Tensor) -> List[Tensor]:
    return [weight.flatten(1).contiguous() for weight in weights]


def _call(x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int, products: int) -> _Call:
    """What both passes are told; `products` is how many times the work of the embeddings they do."""
    batch, length, channels = x_BLC.shape
    (maps, key_width), (_, value_width) = key_weight.shape, value_weight.shape
    padded = -(-maps // conv_groups // LANES) * LANES * conv_groups
    flop = 2 * batch * length * padded * (key_width + value_width) * products
    return _Call(
        x_BLC.data_ptr(), *x_BLC.stride(), key_weight.data_ptr(), value_weight.data_ptr(), None, batch, length,
        channels, conv_groups, maps // conv_groups, key_width, value_width,
        min(torch.get_num_threads(), max(int(flop / FLOP_PER_THREAD), 1)))


def _run(call: _Call, **tensors: Optional[Tensor]) -> None:
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    if compiled()(ctypes.byref(call)):
        raise MemoryError('poca: no memory for the buffers of its threads')
