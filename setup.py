"""What pyproject.toml cannot say: the kernel for CPUs, left out where no compiler takes it; the README of the index."""
import os
import platform
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Elsewhere compilers have no OpenMP of their own, or no vectors. NOAH_ZOO_PURE, any value: a wheel for every system.
BUILT = platform.system() == 'Linux' and platform.machine() in ('x86_64', 'aarch64')
BUILT = BUILT and not os.environ.get('NOAH_ZOO_PURE')

# It is not linked with an OpenMP library: it takes the functions of the one that PyTorch has loaded.
KERNEL = Extension(
    'noah_zoo.layers._poca_cpu', ['noah_zoo/layers/poca_cpu.cpp'], language='c++', optional=True,
    depends=['noah_zoo/layers/poca_cpu.h'], extra_compile_args=['-std=c++17', '-O3', '-fopenmp'])


class BuildKernel(build_ext):
    """ctypes loads it, so its name says nothing of Python."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + '.so'


class Wheel(bdist_wheel):
    """For every Python 3, and for every system if the kernel was left out."""

    def get_tag(self):
        self.root_is_pure = not any(map(os.path.isfile, self.get_finalized_command('build_ext').get_outputs()))
        return ('py3', 'none', super().get_tag()[2])


def readme():
    """README.md with whole addresses, as an index has none of its files."""
    root = Path(__file__).parent
    url = re.search('^Repository = "(.*)"', (root / 'pyproject.toml').read_text(encoding='utf-8'), re.MULTILINE)[1]
    text = (root / 'README.md').read_text(encoding='utf-8')
    text = re.sub(r'(!\[[^]]*\]\()(?!https:)', rf'\1{url}/raw/main/', text)
    return re.sub(r'(\]\()(?!https:)', rf'\1{url}/blob/main/', text)


setup(
    ext_modules=[KERNEL] if BUILT else [], cmdclass={'build_ext': BuildKernel, 'bdist_wheel': Wheel},
    long_description=readme(), long_description_content_type='text/markdown')
