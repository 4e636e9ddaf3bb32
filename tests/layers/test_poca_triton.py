"""The fused kernels against a float64 reference, in Triton's interpreter or on a GPU, and compiled for one.

Triton reads TRITON_INTERPRET when kernels are decorated. So this file is also a script that makes the checks in a
process of its own: `python -m tests.layers.test_poca_triton interpreter|cuda|compiler`.
"""
import contextlib
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip('triton')

ROOT = Path(__file__).parents[2]
# images, positions, maps per group, key width, value width, groups, whether key and value share channels, layout
CASES = [
    (1, 49, 70, 7, 40, 4, False, 'NCHW'),
    (1, 5, 3, 7, 7, 1, True, 'NLC'),
    (1, 70, 10, 40, 40, 4, True, 'padded'),
    (2, 1, 3, 40, 7, 4, False, 'NLC'),
    (1, 49, 10, 40, 40, 1, True, 'NCHW'),
    (2, 70, 3, 7, 40, 1, False, 'padded'),
    (2, 5, 3, 7, 140, 1, False, 'sliced'),
]


@pytest.mark.parametrize('mode', [
    'interpreter', pytest.param('compiler', marks=pytest.mark.slow), pytest.param('cuda', marks=pytest.mark.gpu)])
def test_kernels(mode, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TRITON_CACHE_DIR': str(tmp_path), 'TRITON_INTERPRET': '0'}
    env['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    if mode == 'interpreter':
        env['TRITON_INTERPRET'] = '1'
    run = subprocess.run([sys.executable, __file__, mode], env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0 and 'all checks passed' in run.stdout, f'{run.stdout}\n{run.stderr}'
    print(run.stdout)


def make(batch, positions, maps, key_width, value_width, groups, overlap, layout, device, dtype=torch.float32):
    """Features, weights and bias of a case, and a gradient of the maps."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    channels = groups * (key_width if overlap else key_width + value_width)
    if layout == 'NLC':
        x_BLC = randn(batch, positions, channels)
    elif layout == 'sliced':
        x_BLC = randn(batch, positions, channels + 5)[..., 3:-2]
    elif layout == 'NCHW':
        x_BLC = randn(batch, channels, positions).transpose(1, 2)
    else:  # rows of a multiple of 16, which the kernels read without a copy
        x_BLC = randn(batch, channels, -(-positions // 16) * 16)[..., :positions].transpose(1, 2)
    key_weight, value_weight = (randn(groups * maps, w, scale=w ** -0.5) for w in (key_width, value_width))
    grad_BM = torch.randn(batch, groups * maps, generator=generator).to(device)
    return x_BLC, key_weight, value_weight, randn(groups * maps), grad_BM


def reference(x_BLC, key_weight, value_weight, value_bias, grad_BM, groups, scale_BLM=None):
    """Maps, log-sum-exp and the gradients of x, weights and bias, from the formula in float64.

    `scale_BLM` multiplies the values with their bias; None leaves out both.
    """
    leaves = [t.detach().double().requires_grad_() for t in (x_BLC, key_weight, value_weight, value_bias)]
    x_BLC, key_weight, value_weight, value_bias = leaves

    def embed(x_BLC, weight):
        per_group = x_BLC.unflatten(2, (groups, -1)), weight.unflatten(0, (groups, -1))
        return torch.einsum('blgc,gmc->blgm', *per_group).flatten(2)

    score_BLM = embed(x_BLC[..., :groups * key_weight.shape[1]], key_weight)
    value_BLM = embed(x_BLC[..., x_BLC.shape[2] - groups * value_weight.shape[1]:], value_weight)
    if scale_BLM is not None:
        value_BLM = (value_BLM + value_bias) * scale_BLM
    out_BM = (score_BLM.softmax(1) * value_BLM).sum(1)
    grads = torch.autograd.grad(out_BM, leaves, grad_BM.double(), allow_unused=True)
    return out_BM.detach(), score_BLM.logsumexp(1).detach(), *grads


def fused(kernels, x_BLC, key_weight, value_weight, value_bias, grad_BM, groups, drop_rate=0., seed=None):
    """The same from the kernels."""
    common = x_BLC, key_weight, value_weight, value_bias
    out_BM, lse_BM = kernels.forward(*common, groups, drop_rate, seed)
    grads = kernels.backward(grad_BM, *common, out_BM, lse_BM, groups, drop_rate, seed, True, True)
    assert out_BM.dtype == lse_BM.dtype == torch.float32 and grads[0].is_contiguous()
    for grad, tensor in zip(grads, common):
        assert grad is None or (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)
    return out_BM, lse_BM, *grads


def error(got, expected):
    """Largest difference relative to the largest number."""
    assert got.isfinite().all()
    difference = (got.double() - expected.double()).abs().max().item()
    return difference / (expected.double().abs().max().item() or 1.)


def compare(got, expected, forward_bound, gradient_bound=None):
    """Raise unless all outputs agree; the errors."""
    assert [t is None for t in got] == [t is None for t in expected]
    errors = [0. if g is None else error(g, e) for g, e in zip(got, expected)]
    assert max(errors[:2]) <= forward_bound and max(errors[2:]) <= (gradient_bound or forward_bound), errors
    return errors


def check_they_are_found_to_work(kernels, device):
    assert kernels.works(torch.device(device))


def check_float32(kernels, device):
    for case in CASES:
        tensors = make(*case, device)
        print('float32', case, ' '.join(f'{e:.1e}' for e in compare(
            fused(kernels, *tensors, case[5]), reference(*tensors, case[5]), 1e-5)))


def check_half_precision(kernels, device):
    for dtype, bound in ((torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)):
        for case in CASES[1:3] if dtype == torch.bfloat16 else CASES[-2:]:
            tensors = make(*case, device, dtype)
            # what is rounded are gradients only, between products and at the end
            print(dtype, case, ' '.join(f'{e:.1e}' for e in compare(
                fused(kernels, *tensors, case[5]), reference(*tensors, case[5]), 1e-5, bound)))


def check_weights_of_another_dtype(kernels, device):
    x_BLC, *others = make(*CASES[1], device)
    got = fused(kernels, x_BLC.bfloat16(), *others, 1)
    compare(got, reference(x_BLC.bfloat16(), *(t.bfloat16() for t in others[:3]), others[3], 1), 1e-5, 1.5e-2)


def check_large_scores(kernels, device):
    x_BLC, key_weight, *others = make(2, 70, 10, 7, 40, 1, False, 'NLC', device)
    key_weight = key_weight * 60
    expected = reference(x_BLC, key_weight, *others, 1)
    assert 180 < expected[1].abs().max() < 400
    print('large scores', compare(fused(kernels, x_BLC, key_weight, *others, 1), expected, 1e-4))


def kept(kernels, batch, positions, maps, drop_rate, seed):
    """The dropout mask (B, L, M) of the forward pass, read from the digits of sums of powers of two."""
    device, digits = seed.device, 12
    kept_BLM = torch.zeros(batch, positions, maps, dtype=torch.bool, device=device)
    zeros, ones = torch.zeros(maps, 1, device=device), torch.ones(maps, 1, device=device)
    for start in range(0, positions, digits):
        count = min(digits, positions - start)
        powers_L = 2. ** torch.arange(count, device=device)
        x_BLC = torch.zeros(batch, positions, 2, device=device)
        x_BLC[:, start:start + count, 1] = powers_L
        out_BM, _ = kernels.forward(x_BLC, zeros, ones, None, 1, drop_rate, seed)
        sums_BM = (out_BM * positions * (1 - drop_rate)).round().long()
        kept_BLM[:, start:start + count] = sums_BM[:, None] // powers_L[None, :, None].long() % 2 == 1
    return kept_BLM


def check_dropout(kernels, device):
    rate, case = 0.3, (2, 38, 20, 7, 40, 2, False, 'padded')
    seed, other = torch.tensor(2 ** 40 + 7, device=device), torch.tensor(7, device=device)
    x_BLC, key_weight, value_weight, value_bias, grad_BM = tensors = make(*case, device)
    kept_BLM = kept(kernels, 2, 38, 40, rate, seed)
    scale_BLM = kept_BLM.double() / (1 - rate)

    def check_share(events, probability):
        sigma = (probability * (1 - probability) / events.numel()) ** 0.5
        assert abs(events.double().mean().item() - probability) < 4 * sigma

    check_share(kept_BLM, 1 - rate)
    for dim in range(3):
        for shift in range(1, kept_BLM.shape[dim] // 2 + 1):
            size = kept_BLM.shape[dim] - shift
            same = kept_BLM.narrow(dim, 0, size) == kept_BLM.narrow(dim, shift, size)
            check_share(same, rate ** 2 + (1 - rate) ** 2)
    check_share(kept_BLM == kept(kernels, 2, 38, 40, rate, other), rate ** 2 + (1 - rate) ** 2)

    # the mask, read in the forward pass of one group, holds for both passes of two groups and for other tiles
    got = fused(kernels, *tensors, 2, rate, seed)
    print('dropout', ' '.join(f'{e:.1e}' for e in compare(got, reference(*tensors, 2, scale_BLM), 1e-5)))
    with tiles(kernels, 16, 16):
        assert torch.equal(kept(kernels, 2, 38, 40, rate, seed), kept_BLM)
        compare(fused(kernels, *tensors, 2, rate, seed), got, 5e-6)
    assert all(map(torch.equal, fused(kernels, *tensors, 2, rate, seed), got))
    assert error(fused(kernels, *tensors, 2, rate, other)[0], got[0]) > 0.1

    expected = reference(x_BLC, key_weight, value_weight, torch.zeros_like(value_bias), grad_BM, 2, scale_BLM)
    compare(
        fused(kernels, x_BLC, key_weight, value_weight, None, grad_BM, 2, rate, seed), (*expected[:5], None), 1e-5)


@contextlib.contextmanager
def tiles(kernels, block_l, block_m):
    original = kernels._tiles
    with mock.patch.object(
            kernels, '_tiles', lambda *args: {**original(*args), 'BLOCK_L': block_l, 'BLOCK_M': block_m}):
        yield


def check_tiles_do_not_matter(kernels, device):
    tensors = make(1, 49, 40, 7, 40, 1, False, 'NCHW', device)
    expected = fused(kernels, *tensors, 1)
    for block_l, block_m in ((16, 32), (64, 16)):
        with tiles(kernels, block_l, block_m):
            compare(fused(kernels, *tensors, 1), expected, 5e-6)


def check_splits_of_the_batch(kernels, device):
    seed = torch.tensor(3, device=device)
    tensors = make(5, 5, 3, 7, 7, 1, True, 'NLC', device)
    results = []
    for splits in (1, 2, 4, 5):  # 4 leaves the last one without images
        with mock.patch.object(kernels, '_num_splits', lambda *_, splits=splits: splits):
            results.append(fused(kernels, *tensors, 1, 0.2, seed))
    for other in results[1:]:
        compare(other, results[0], 1e-6)
    assert kernels._num_splits(256, 64, 10 ** 6) == 16
    assert kernels._num_splits(256, 64, 2 * 10 ** 6) == 8
    assert kernels._num_splits(3, 64, 10 ** 6) == 3
    assert kernels._num_splits(256, 64, 10 ** 8) == kernels._num_splits(0, 64, 10) == 1


def check_only_what_is_needed(kernels, device):
    tensors = make(2, 5, 3, 7, 5, 1, False, 'NLC', device)
    out_BM, lse_BM, *everything = fused(kernels, *tensors, 1)
    assert everything[3] is None
    for need_x, need_weights in ((False, True), (True, False), (False, False)):
        grads = kernels.backward(tensors[-1], *tensors[:-1], out_BM, lse_BM, 1, 0., None, need_x, need_weights)
        assert [g is not None for g in grads] == [need_x, need_weights, need_weights, False]
        assert all(g is None or torch.equal(g, e) for g, e in zip(grads, everything))
    expanded_BM = torch.ones(1, 1, device=device).expand(out_BM.shape)
    compare(fused(kernels, *tensors[:-1], expanded_BM, 1), reference(*tensors[:-1], expanded_BM, 1), 1e-5)


def check_unread_channels_and_empty_batch(kernels, device):
    x_BLC, *others = make(2, 5, 3, 7, 5, 1, False, 'NLC', device)
    wider = torch.cat([x_BLC[..., :7], x_BLC.new_ones(2, 5, 3), x_BLC[..., 7:]], 2)
    got, narrow = fused(kernels, wider, *others, 1), fused(kernels, x_BLC, *others, 1)
    assert torch.equal(got[0], narrow[0]) and not got[2][..., 7:10].any()
    out_BM, lse_BM, *grads = fused(kernels, x_BLC[:0], *others[:3], others[3][:0], 1)
    assert out_BM.shape == lse_BM.shape == (0, 3) and not any(g is not None and g.any() for g in grads)


def check_refusals(kernels, device):
    x_BLC, key_weight, value_weight, *_ = make(*CASES[0], device)
    for arguments, message in (
            ((x_BLC.double(), key_weight, value_weight, None, 4), 'float64'),
            ((x_BLC, key_weight, value_weight[:-1], None, 4), '280 and 279 maps'),
            ((x_BLC, key_weight, value_weight, None, 3), 'conv_groups=3'),
            ((x_BLC[..., :100], key_weight, value_weight, None, 4), '160 channels of 100')):
        with pytest.raises(ValueError, match=message):
            kernels.forward(*arguments, 0., None)


def check_precision_setting(kernels, device):
    matmul = torch.backends.cuda.matmul
    assert kernels._precision() == 'ieee'
    for name, on, off in (('allow_tf32', True, False), ('fp32_precision', 'tf32', 'ieee')):
        if hasattr(matmul, name):
            setattr(matmul, name, on)
            assert kernels._precision() == 'tf32'
            setattr(matmul, name, off)
            assert kernels._precision() == 'ieee'


def check_real_sizes(kernels, device):
    if device == 'cpu':
        return
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        for case in (
                (32, 49, 1000, 64, 448, 4, False, 'NCHW'), (32, 196, 1000, 96, 96, 4, False, 'NLC'),
                (2, 1024, 1000, 64, 64, 4, True, 'padded'), (4, 49, 21843, 40, 120, 1, False, 'NLC')):
            tensors = make(*case, device, dtype)
            got = fused(kernels, *tensors, case[5])
            print(dtype, case, compare(got, reference(*tensors, case[5]), 2e-5, bound))
            assert all(map(torch.equal, got[:5], fused(kernels, *tensors, case[5])[:5]))


def compile_all():
    """Compile what the two functions would launch for compute capability 9.0, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    from noah_zoo.layers import poca_triton

    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget('cuda', 90, 32)
    driver.get_current_device.return_value = driver.get_current_stream.return_value = 0
    triton.runtime.driver.set_active(driver)
    compiled = []

    def launch(kernel, programs, arguments, options):
        compiled.append(kernel.warmup(*arguments, grid=(programs,), **options))

    with mock.patch.object(poca_triton, '_launch', launch):
        for dtype, drop_rate, case in (
                (torch.bfloat16, 0., (2, 49, 1000, 40, 448, 4, False, 'NCHW')),
                (torch.bfloat16, 0.1, (2, 49, 1000, 40, 448, 4, False, 'NCHW')),
                (torch.float32, 0., (2, 16, 10, 16, 32, 4, False, 'padded')),
                (torch.float32, 0.1, (2, 64, 64, 16, 32, 4, False, 'padded'))):
            fused(poca_triton, *make(*case, 'cpu', dtype), 4, drop_rate, torch.tensor(0))
    for kernel in compiled:
        print(kernel.metadata.name, kernel.metadata.shared, len(kernel.asm['cubin']))
        assert kernel.metadata.shared < 227 * 1024 and len(kernel.asm['cubin']) > 1000
        assert not re.search(r'\b(atom|red)\.', kernel.asm['ptx'])  # sums in an order of their own
    assert len({kernel.hash for kernel in compiled}) == 4 * 5


def multiply_bfloat16_in_interpreter():
    """The interpreter keeps bfloat16 numbers as uint16 and would multiply those; let it widen them first."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(factor, tl.float32) for factor in (a, b))
        return dot(self, a, b, *others)

    InterpreterBuilder.create_dot = create_dot


def check_all(device):
    from noah_zoo.layers import poca_triton

    if device == 'cpu':
        multiply_bfloat16_in_interpreter()
    failed = []
    for name, check in globals().items():
        if name.startswith('check_') and name != 'check_all':
            try:
                check(poca_triton, device)
            except Exception:
                traceback.print_exc()
                failed.append(name)
    if failed:
        sys.exit(f'failed: {failed}')


if __name__ == '__main__':
    if sys.argv[1] == 'compiler':
        compile_all()
    else:
        check_all({'interpreter': 'cpu', 'cuda': 'cuda'}[sys.argv[1]])
    print('all checks passed')
