"""Time and memory of a step, which is any function without arguments, and what the processor is called.

Linux only: memory is read from /proc.
"""
import ctypes
import multiprocessing
import platform
import random
import re
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import torch
from torch import Tensor

MIN_SECONDS = 0.02  # of a sample: the clock is nothing beside it


def time_in_turn(
        steps: Dict[str, Callable[[], Any]],
        repeats: int,
        device: str = 'cpu',
        min_seconds: float = MIN_SECONDS,
        tick: Callable[[], Any] = lambda: None,
) -> Dict[str, List[float]]:
    """Seconds a call, `repeats` samples of every step.

    The steps take turns, in another order at every repeat, so that the noise of the machine meets all of them alike.

    Args:
        steps: What to time, by name.
        repeats: Samples of each.
        device: 'cuda' is waited for at both ends of a sample.
        min_seconds: A sample makes as many calls as take this long.
        tick: Called after every repeat.
    """
    def sample(step, number):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(number):
            step()
        synchronize(device)
        return time.perf_counter() - start

    numbers, samples, order = dict.fromkeys(steps, 1), {name: [] for name in steps}, random.Random(0)
    for name, step in steps.items():
        step()  # compiles, reserves memory
        while min_seconds and sample(step, numbers[name]) < min_seconds:
            numbers[name] *= 2
    for _ in range(repeats):
        for name in order.sample(list(steps), len(steps)):
            samples[name].append(sample(steps[name], numbers[name]) / numbers[name])
        tick()
    return samples


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == 'cuda':
        torch.cuda.synchronize()


def summary(samples: Sequence[float]) -> Dict[str, float]:
    """Median, quartiles and number of samples."""
    q1, median, q3 = np.percentile(samples, (25, 50, 75)).tolist()
    return {'median': median, 'q1': q1, 'q3': q3, 'repeats': len(samples)}


def ratio(samples: Sequence[float], others: Sequence[float]) -> Dict[str, float]:
    """`summary` of sample by other, repeat by repeat: what slows down a whole repeat cancels."""
    return summary([a / b for a, b in zip(samples, others)])


def peak_memory(build: Callable[[], Callable[[], Any]], device: str = 'cpu', threads: int = 1) -> int:
    """Bytes that a step needs at its peak, above what is there before and after it: inputs, weights and gradients.

    A step that makes new gradients is to drop the old ones first, and may use their memory until then.
    On a GPU it is what PyTorch has allocated. On a CPU it is resident memory, so that memory counts whoever allocates
    it; the step runs in a process of its own, in which freed memory returns to the system at once. A first step, not
    counted, has the libraries loaded and their buffers made.

    Args:
        build: Makes inputs and weights and gives the step. It is pickled.
        device: 'cpu' or 'cuda'.
        threads: CPU threads.

    Raises:
        RuntimeError: If that process fails, for want of memory for instance.
    """
    if device == 'cuda':
        return _peak(build, device)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([getattr(build, 'func', build).__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_in_child, args=(sender, build, threads), daemon=True)
    process.start()
    sender.close()
    with receiver:
        try:
            return receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f'the process that measured peak memory ended with code {process.exitcode}; -9 or 255 is what remains '
                'of one that was killed, as the system does when memory runs out') from None


def _peak_in_child(sender, build: Callable, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is larger than 64 KiB is unmapped when freed
    torch.set_num_threads(threads)
    sender.send(_peak(build, 'cpu'))


def _peak(build: Callable, device: str) -> int:
    step = build()
    step()
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Not getrusage's ru_maxrss, which a process inherits from the one that starts it.
    before = kib('/proc/self/status', 'VmRSS')
    step()
    return (kib('/proc/self/status', 'VmHWM') - before) * 1024


def processor() -> str:
    """The name of the processor, or what Python knows of it where the system is not Linux."""
    file = Path('/proc/cpuinfo')
    name = re.search(r'^model name\s*: (.+)$', file.read_text(), re.MULTILINE) if file.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def kib(file: str, field: str) -> int:
    """A field of a file of /proc, in KiB."""
    return int(re.search(rf'^{field}:\s+(\d+) kB', Path(file).read_text(), re.MULTILINE)[1])


def saved_bytes(function: Callable[[], Any], given: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `function`, without those of `given` and its views.

    Storages are counted once and whole. What a custom function keeps otherwise than by `save_for_backward` is not seen.

    Args:
        function: A forward pass.
        given: Inputs and weights.
    """
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()  # noqa: F841  the graph lives while it is counted
    for tensor in given:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())
