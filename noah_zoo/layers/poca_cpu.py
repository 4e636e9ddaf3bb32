"""The forward pass of `poca` on x86 processors, compiled from poca_cpu.cpp when the package is installed."""
import ctypes
import functools
import importlib.util
from typing import Callable, Optional

import torch
from torch import Tensor

FLOP_PER_THREAD = 2e7  # a fraction of a millisecond; less is not worth starting a thread for


class _Call(ctypes.Structure):
    _fields_ = [
        ('x', ctypes.c_void_p),
        *((name, ctypes.c_ssize_t) for name in ('image_stride', 'position_stride', 'channel_stride')),
        *((name, ctypes.c_void_p) for name in ('key_weight', 'value_weight', 'out')),
        *((name, ctypes.c_ssize_t) for name in (
            'batch', 'length', 'channels', 'groups', 'maps', 'key_depth', 'value_depth', 'threads'))]


@functools.cache
def compiled() -> Optional[Callable]:
    """The compiled function, where it was built and this processor can run it."""
    spec = importlib.util.find_spec('noah_zoo.layers._poca_cpu')
    if spec is None or torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        return None
    try:
        return ctypes.CDLL(spec.origin).poca_forward
    except OSError:  # no OpenMP library
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


def forward(x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int) -> Tensor:
    """Attended values of every map, (B, M), without bias, where `supports` says so.

    Raises:
        MemoryError: If there is no memory for the buffers of its threads.
    """
    key_weight, value_weight = key_weight.flatten(1).contiguous(), value_weight.flatten(1).contiguous()
    batch, length, channels = x_BLC.shape
    (maps, key_depth), (_, value_depth) = key_weight.shape, value_weight.shape
    out_BM = x_BLC.new_empty(batch, maps)
    flop = 2 * batch * length * maps * (key_depth + value_depth)
    threads = min(torch.get_num_threads(), max(int(flop / FLOP_PER_THREAD), 1))
    call = _Call(
        x_BLC.data_ptr(), *x_BLC.stride(), key_weight.data_ptr(), value_weight.data_ptr(), out_BM.data_ptr(), batch,
        length, channels, conv_groups, maps // conv_groups, key_depth, value_depth, threads)
    if compiled()(ctypes.byref(call)):
        raise MemoryError('poca: no memory for the buffers of its threads')
    return out_BM
