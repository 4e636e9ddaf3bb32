"""What pyproject.toml cannot say: the kernel for CPUs, left out where no compiler takes it."""
import platform

from setuptools import Extension, setup

KERNEL = Extension(
    'noah_zoo.layers._poca_cpu', ['noah_zoo/layers/poca_cpu.cpp'], language='c++', optional=True,
    depends=['noah_zoo/layers/poca_cpu.h'],
    extra_compile_args=['-std=c++17', '-O3', '-fopenmp'], extra_link_args=['-fopenmp'])

setup(ext_modules=[KERNEL] if platform.machine() in ('x86_64', 'AMD64', 'aarch64', 'arm64') else [])
