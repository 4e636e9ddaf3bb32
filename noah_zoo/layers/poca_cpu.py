"""`poca` and its gradients on processors with AVX-512, AVX2 or NEON, from poca_cpu.cpp, compiled at installation."""
import ctypes
import functools
import logging
import platform
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name('_poca_cpu.so')  # on every system; setup.py compiles it
FLOP_PER_THREAD = 3e7  # a fraction of a millisecond; less is not worth starting a thread for
TASKS = 16  # of backward, at least, if there are as many images
COPIES_BYTES = 2 ** 26  # of the gradients of kernels that backward holds: a chunk of the images has its own
LANES = {'avx512': 16, 'avx2': 8, 'neon': 4}  # maps that are computed at once
DTYPES = torch.float32, torch.bfloat16, torch.float16  # the latter two are converted when they are read


class _Call(ctypes.Structure):
    _fields_ = [
        ('x', ctypes.c_void_p),
        *((name, ctypes.c_ssize_t) for name in ('image_stride', 'position_stride', 'channel_stride')),
        *((name, ctypes.c_void_p) for name in ('key_weight', 'value_weight', 'out')),
        *((name, ctypes.c_ssize_t) for name in (
            'batch', 'length', 'channels', 'groups', 'maps', 'key_depth', 'value_depth', 'threads')),
        *((name, ctypes.c_void_p) for name in ('grad', 'dx', 'dkey_weight', 'dvalue_weight')),
        *((name, ctypes.c_ssize_t) for name in ('channels_first', 'value_adds', 'chunks')),
        ('value_bias', ctypes.c_void_p), ('dvalue_bias', ctypes.c_void_p), ('seed', ctypes.c_uint64),
        ('drop_rate', ctypes.c_float)]


@functools.cache
def kind() -> Optional[str]:
    """What of this processor is used, 'avx512', 'avx2' or 'neon', or None if it has none of them; as PyTorch finds it,
    so that the environment's ATEN_CPU_CAPABILITY chooses here, too."""
    if platform.machine().lower() in ('arm64', 'aarch64'):
        return 'neon'
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in ('avx512', 'avx2') else None


@functools.cache
def compiled() -> Optional[Callable]:
    """The compiled function, where it was built and this processor can run it."""
    if not LIBRARY.is_file() or kind() is None:
        return None
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if ctypes.c_size_t.in_dll(library, 'poca_call_size').value == ctypes.sizeof(_Call):
            return getattr(library, f'poca_run_{kind()}')
    except OSError:  # PyTorch has loaded no OpenMP library
        return None
    except (ValueError, AttributeError):  # has no such name
        pass
    _logger.warning('%s was compiled for another version, and is not used; install the package again', LIBRARY)
    return None


def supports(x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int) -> bool:
    """Whether `forward` does it, without dropout: of `DTYPES`, and fits, on a processor that it was compiled for."""
    tensors, maps = (x_BLC, key_weight, value_weight), len(key_weight)
    return (
        all(t.device.type == 'cpu' and t.dtype in DTYPES and t.numel() for t in tensors)
        and maps == len(value_weight) and maps % conv_groups == 0
        and conv_groups * max(key_weight.shape[1], value_weight.shape[1]) <= x_BLC.shape[2]
        and compiled() is not None)


def supports_training(x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int) -> bool:
    """Whether both passes do it, with dropout or not: no two groups read the same channel."""
    key_width, value_width = key_weight.shape[1], value_weight.shape[1]
    first_value = x_BLC.shape[2] - conv_groups * value_width
    return supports(x_BLC, key_weight, value_weight, conv_groups) and (
        conv_groups == 1 or first_value >= conv_groups * key_width or first_value == 0 and key_width == value_width)


def forward(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int,
        value_bias: Optional[Tensor] = None, drop_rate: float = 0., seed: Optional[Tensor] = None) -> Tensor:
    """Attended values of every map, float32 (B, M), where `supports` says so; without bias, but for that of dropped
    values.

    Raises:
        MemoryError: If there is no memory for the buffers of its threads.
    """
    x_BLC, weights = x_BLC.float(), _kernels(key_weight, value_weight)
    out_BM = x_BLC.new_empty(len(x_BLC), len(key_weight))
    value_bias = None if value_bias is None else value_bias.float().contiguous()
    _run(_call(x_BLC, *weights, conv_groups, drop_rate, seed), 1, out=out_BM, value_bias=value_bias)
    return out_BM


def backward(
        grad_BM: Tensor, x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int,
        value_bias: Optional[Tensor], drop_rate: float, seed: Optional[Tensor], channels_first: bool, need_x: bool,
        need_weights: bool,
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of the features, (B, L, C), in memory (B, C, L) if `channels_first`, of the kernels and of the bias,
    from those of what `forward` gives, where `supports_training` says so; None where not needed.

    Raises:
        MemoryError: If there is no memory for the buffers of its threads.
    """
    dtype, x_BLC, weights = x_BLC.dtype, x_BLC.float(), _kernels(key_weight, value_weight)
    bias = None if value_bias is None else value_bias.float().contiguous()
    call = _call(x_BLC, *weights, conv_groups, drop_rate, seed)
    (batch, length, channels), maps, widths = x_BLC.shape, len(key_weight), [weight.shape[1] for weight in weights]
    last_key, first_value = conv_groups * widths[0], channels - conv_groups * widths[1]
    dx_BLC = dkey_weight = dvalue_weight = dvalue_bias = None
    if need_x:
        # keys and values write every channel, or values add to those of the keys
        new = x_BLC.new_empty if first_value in (last_key, last_key - channels) else x_BLC.new_zeros
        dx_BLC = new(batch, channels, length).mT if channels_first else new(batch, length, channels)
    if need_weights:
        dkey_weight, dvalue_weight = map(torch.empty_like, weights)
        dvalue_bias = None if bias is None else torch.empty_like(bias)
    copy = 4 * _padded(maps, conv_groups) * (sum(widths) + 1)
    parts = 1 if x_BLC.stride(2) == 1 else conv_groups  # tasks of a chunk, as poca_cpu.h divides it
    call.chunks = min(-(-TASKS // parts), batch, max(COPIES_BYTES // copy, 1))
    call.channels_first, call.value_adds = channels_first, first_value < last_key
    _run(
        call, 1 + need_x + need_weights, grad=grad_BM.float().contiguous(), dx=dx_BLC, dkey_weight=dkey_weight,
        dvalue_weight=dvalue_weight, value_bias=bias, dvalue_bias=dvalue_bias)
    if need_weights:
        dkey_weight, dvalue_weight = (
            grad.view(weight.shape).to(weight.dtype)
            for grad, weight in ((dkey_weight, key_weight), (dvalue_weight, value_weight)))
    return (
        None if dx_BLC is None else dx_BLC.to(dtype), dkey_weight, dvalue_weight,
        None if dvalue_bias is None else dvalue_bias.to(value_bias.dtype))


def _kernels(*weights: Tensor) -> List[Tensor]:
    return [weight.flatten(1).float().contiguous() for weight in weights]


def _padded(maps: int, conv_groups: int) -> int:
    """Maps as they are computed: groups are padded to whole vectors."""
    lanes = LANES[kind()]
    return -(-maps // conv_groups // lanes) * lanes * conv_groups


def _call(
        x_BLC: Tensor, key_weight: Tensor, value_weight: Tensor, conv_groups: int, drop_rate: float,
        seed: Optional[Tensor]) -> _Call:
    batch, length, channels = x_BLC.shape
    (maps, key_width), (_, value_width) = key_weight.shape, value_weight.shape
    call = _Call(
        x_BLC.data_ptr(), *x_BLC.stride(), key_weight.data_ptr(), value_weight.data_ptr(), None, batch, length,
        channels, conv_groups, maps // conv_groups, key_width, value_width)
    if seed is not None:
        call.seed, call.drop_rate = int(seed), max(drop_rate, 1e-30)  # there is dropout, however little
    return call


def _run(call: _Call, products: int, **tensors: Optional[Tensor]) -> None:
    """Call it, with as many threads as pay; `products` is how many times the work of the embeddings it does."""
    maps = _padded(call.groups * call.maps, call.groups)
    flop = 2 * call.batch * call.length * maps * (call.key_depth + call.value_depth) * products
    call.threads = min(torch.get_num_threads(), max(int(flop / FLOP_PER_THREAD), 1))
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    if compiled()(ctypes.byref(call)):
        raise MemoryError('poca: no memory for the buffers of its threads')
