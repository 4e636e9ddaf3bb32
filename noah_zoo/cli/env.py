"""Print versions, devices and kernels for a bug report.

    noah-zoo env

It prints Markdown, which can be pasted as it is.
"""
import importlib
import logging
import platform
from contextlib import contextmanager
from typing import Callable, Iterator, List

from . import Parser

PACKAGES = 'torch', 'torchvision', 'timm', 'accelerate', 'huggingface_hub', 'triton'


def version(package: str) -> str:
    """Of a package, with what it was built for."""
    return importlib.import_module(package).__version__


def cpu_kernel() -> str:
    """Which code computes the head on the CPU, and why."""
    import torch

    from noah_zoo.layers import poca_cpu

    if not poca_cpu.LIBRARY.is_file():
        return f'in blocks, as {poca_cpu.LIBRARY.name} was not compiled when noah_zoo was installed'
    if poca_cpu.kind() is None:
        return f'in blocks, as the processor has no AVX2 ({torch.backends.cpu.get_cpu_capability()})'
    with warnings_of('noah_zoo.layers.poca_cpu') as warnings:
        if poca_cpu.compiled():
            return f'compiled ({poca_cpu.LIBRARY.name}) up to float32, for {poca_cpu.kind()}; in blocks in float64'
    return f'in blocks, as {poca_cpu.LIBRARY.name} cannot be used: {" ".join(warnings) or "no OpenMP library"}'


def gpu_kernel(device: str) -> str:
    """Which code computes the head on a GPU, and why."""
    import torch

    if not device.startswith('cuda'):
        return 'in blocks, as the Triton kernels are for NVIDIA GPUs'
    if torch.version.hip:
        return 'in blocks, as the Triton kernels are for NVIDIA GPUs, not for ROCm'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return 'in blocks, as the Triton kernels need compute capability 8.0 or more'
    try:
        from noah_zoo.layers import poca_triton
    except ImportError as error:
        return f'in blocks, as Triton is missing: {error}'
    with warnings_of('noah_zoo.layers.poca_triton') as warnings:
        if poca_triton.works(torch.device(device)):
            return 'Triton up to float32; in blocks in float64'
    return f'in blocks, as the Triton kernels cannot be used: {" ".join(warnings)}'


@contextmanager
def warnings_of(logger: str) -> Iterator[List[str]]:
    """A list of what a logger says meanwhile, which is not printed."""
    said, source = [], logging.getLogger(logger)

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    source.addFilter(keep)
    try:
        yield said
    finally:
        source.removeFilter(keep)


def accelerators() -> str:
    """How many accelerators PyTorch finds, and a line for each."""
    import torch

    text = str(torch.accelerator.device_count())
    for number in range(torch.accelerator.device_count()):
        name = f'{torch.accelerator.current_accelerator().type}:{number}'
        text += f'\n  - {name}: {tell(describe, name)}; the head {tell(gpu_kernel, name)}'
    return text


def describe(device: str) -> str:
    """What an accelerator is."""
    import torch

    if not device.startswith('cuda'):
        return 'found'
    properties = torch.cuda.get_device_properties(device)
    return (
        f'{properties.name}, {properties.total_memory / 2 ** 30:.0f} GiB, compute capability '
        f'{properties.major}.{properties.minor}')


def fused_attn() -> str:
    """How timm's switch stands."""
    from timm.layers import use_fused_attn

    return 'on' if use_fused_attn() else 'off, so that heads are computed step by step (timm.layers.set_fused_attn)'


def tell(find: Callable[..., str], *args: str) -> str:
    """A fact; what went wrong, where it cannot be found out: this is for machines on which something does."""
    try:
        return find(*args)
    except Exception as error:
        return f'unknown, as {type(error).__name__} says: {" ".join(str(error).split())}'


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    return parser, parser.parse_args(argv)


def run(parser, args):
    from noah_zoo import __version__
    from noah_zoo.benchmark.measure import processor

    lines = [f'noah_zoo: {__version__}', f'python: {platform.python_version()}']
    lines += [f'{package}: {tell(version, package)}' for package in PACKAGES]
    for name, find in (
            ('platform', platform.platform), ('processor', processor), ('accelerators', accelerators),
            ('fused_attn', fused_attn), ('the head on the CPU', cpu_kernel)):
        lines.append(f'{name}: {tell(find)}')
    print('\n'.join(f'- {line}' for line in lines))
