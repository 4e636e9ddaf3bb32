"""noah-zoo env."""
import logging
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn

from noah_zoo.cli import env
from noah_zoo.layers import poca_cpu


@pytest.fixture
def facts(capsys):
    def run():
        env.run(*env.parse_args([], 'noah-zoo env'))
        out, err = capsys.readouterr()
        assert not err
        return dict(line.strip(' -').split(': ', 1) for line in out.splitlines())
    return run


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that PyTorch says it has."""
    about = SimpleNamespace(name='Some GPU', total_memory=24 * 2 ** 30, major=8, minor=6)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('cuda'))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: about)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (about.major, about.minor))
    return about


def test_this_machine(facts):
    found = facts()
    assert found['python'] == platform.python_version() and found['timm'] == timm.__version__
    assert found['torch'] == torch.__version__
    assert found['fused_attn'] == 'on' and found['processor']
    assert found['accelerators'] == str(torch.accelerator.device_count())
    assert ('compiled (_poca_cpu.so)' in found['the head on the CPU']) == (poca_cpu.compiled() is not None)


def test_a_package_that_is_not_there(facts, monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)
    assert facts()['triton'].startswith('unknown, as ModuleNotFoundError says: ')


def test_fused_attn_is_off(facts):
    before = use_fused_attn()
    set_fused_attn(False)
    try:
        assert facts()['fused_attn'].startswith('off, so that heads are computed step by step')
    finally:
        set_fused_attn(bool(before))


def test_no_compiled_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(poca_cpu, 'LIBRARY', tmp_path / 'kernel.so')
    assert env.cpu_kernel() == 'in blocks, as kernel.so was not compiled when noah_zoo was installed'


def test_an_old_processor(monkeypatch):
    monkeypatch.setattr(poca_cpu, 'LIBRARY', Path(__file__))
    monkeypatch.setattr(poca_cpu, 'kind', lambda: None)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'DEFAULT')
    assert env.cpu_kernel() == 'in blocks, as the processor has no AVX2 (DEFAULT)'


def test_a_kernel_of_another_version(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(poca_cpu, 'kind', lambda: 'avx2')
    other = next((Path(torch.__file__).parent / 'lib').glob('*c10.*'))
    monkeypatch.setattr(poca_cpu, 'LIBRARY', other)
    poca_cpu.compiled.cache_clear()
    try:
        said = env.cpu_kernel()
    finally:
        poca_cpu.compiled.cache_clear()
    assert said.startswith(f'in blocks, as {other.name} cannot be used: ') and 'install the package again' in said
    assert 'install' not in capfd.readouterr().err


def test_no_accelerator(facts, monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 0)
    assert facts()['accelerators'] == '0' and not any(name.startswith('cuda') for name in facts())


def test_a_gpu(facts, gpu, monkeypatch):
    poca_triton = pytest.importorskip('noah_zoo.layers.poca_triton')
    monkeypatch.setattr(poca_triton, 'works', lambda device: device == torch.device('cuda:0'))
    assert facts()['cuda:0'] == (
        'Some GPU, 24 GiB, compute capability 8.6; the head Triton up to float32; in blocks in float64')


def test_a_gpu_on_which_the_kernels_fail(facts, gpu, monkeypatch):
    poca_triton = pytest.importorskip('noah_zoo.layers.poca_triton')

    def works(device):
        logging.getLogger(poca_triton.__name__).warning('slow on %s', device)
        return False
    monkeypatch.setattr(poca_triton, 'works', works)
    assert facts()['cuda:0'].endswith('in blocks, as the Triton kernels cannot be used: slow on cuda:0')


def test_an_old_gpu(facts, gpu):
    gpu.major, gpu.minor = 7, 5
    assert 'capability 7.5; the head in blocks, as the Triton kernels need' in facts()['cuda:0']


def test_triton_is_missing(facts, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, 'noah_zoo.layers.poca_triton', None)
    monkeypatch.delattr('noah_zoo.layers.poca_triton', raising=False)
    assert 'the head in blocks, as Triton is missing: ' in facts()['cuda:0']


def test_another_accelerator(facts, monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('mps'))
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 1)
    assert facts()['mps:0'] == 'found; the head in blocks, as the Triton kernels are for NVIDIA GPUs'


def test_it_never_fails(facts, monkeypatch):
    def broken():
        raise RuntimeError('no driver\n here')
    monkeypatch.setattr(torch.accelerator, 'device_count', broken)
    assert facts()['accelerators'] == 'unknown, as RuntimeError says: no driver here'
