"""What pyproject.toml cannot say: the kernel for CPUs, left out where no compiler takes it; the README of the index.

NOAH_ZOO_PURE, any value, leaves the kernel out: a wheel for every system. NOAH_ZOO_WINDOWS, any value, makes the wheel
for Windows on any system, with the compiler of the package ziglang, as Windows' own has no vectors.
"""
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

WINDOWS = bool(os.environ.get('NOAH_ZOO_WINDOWS'))
BY_CLANG = ['-Xclang', '-fopenmp']  # the drivers take no -fopenmp, or want a library for it; what they drive does
FLAGS = BY_CLANG if WINDOWS else {  # of systems and processors
    ('Linux', 'x86_64'): ['-fopenmp'], ('Linux', 'aarch64'): ['-fopenmp'], ('Darwin', 'arm64'): [*BY_CLANG],
}.get((platform.system(), platform.machine()))
BUILT = FLAGS and not os.environ.get('NOAH_ZOO_PURE')

# It is not linked with an OpenMP library: it takes the functions of the one that PyTorch has loaded. For Windows they
# have to be named, with the library.
KERNEL = Extension(
    'noah_zoo.layers._poca_cpu', ['noah_zoo/layers/poca_cpu.cpp'], language='c++', optional=not WINDOWS,
    depends=['noah_zoo/layers/poca_cpu.h'], extra_compile_args=['-std=c++17', '-O3', *(FLAGS or [])])
OPENMP_OF_WINDOWS = '''LIBRARY libiomp5md.dll
EXPORTS
__kmpc_barrier
__kmpc_dispatch_deinit
__kmpc_dispatch_init_8
__kmpc_dispatch_next_8
__kmpc_fork_call
__kmpc_global_thread_num
__kmpc_push_num_threads
omp_get_thread_num
'''


class BuildKernel(build_ext):
    """ctypes loads it, so its name says nothing of Python."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + '.so'

    def build_extension(self, ext):
        if not WINDOWS:
            return super().build_extension(ext)
        folder, zig = Path(self.build_temp), [sys.executable, '-m', 'ziglang']
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'openmp.def').write_text(OPENMP_OF_WINDOWS)
        openmp = ['-m', 'i386:x86-64', '-d', folder / 'openmp.def', '-l', folder / 'openmp.lib']
        subprocess.run([*zig, 'dlltool', *openmp], check=True)
        subprocess.run(
            [*zig, 'c++', '-target', 'x86_64-windows-gnu', *ext.extra_compile_args, '-shared', '-s', *ext.sources,
             folder / 'openmp.lib', '-o', folder / 'kernel.dll'], check=True)
        self.copy_file(folder / 'kernel.dll', self.get_ext_fullpath(ext.name))


class Wheel(bdist_wheel):
    """For every Python 3, and for every system if the kernel was left out."""

    def get_tag(self):
        self.root_is_pure = not any(map(os.path.isfile, self.get_finalized_command('build_ext').get_outputs()))
        return ('py3', 'none', 'win_amd64' if WINDOWS and not self.root_is_pure else super().get_tag()[2])


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
