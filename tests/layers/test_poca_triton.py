"""The fused kernels against a float64 reference, in Triton's interpreter or on a GPU, and compiled for one.

Triton reads TRITON_INTERPRET when kernels are decorated. So this file is also a script that makes the checks in a
process of its own: `python -m tests.layers.test_poca_triton interpreter|cuda|compiler`.
"""
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import traceback
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from noah_zoo import NoahHead
from noah_zoo.layers import poca

pytest.importorskip('triton')

ROOT = Path(__file__).parents[2]
# images, positions, classes, key width, value width, groups, those of the embeddings, whether key and value share
# channels, layout
CASES = [
    (1, 49, 70, 7, 40, 4, 4, False, 'NCHW'),
    (1, 5, 3, 7, 7, 4, 1, True, 'NLC'),
    (1, 70, 10, 40, 40, 4, 4, True, 'tokens'),
    (2, 1, 3, 40, 7, 4, 2, False, 'NLC'),
    (1, 49, 10, 40, 40, 1, 1, True, 'NCHW'),
    (2, 70, 3, 7, 40, 2, 1, False, 'tokens'),
    (2, 5, 3, 7, 140, 1, 1, False, 'sliced'),
]


@pytest.mark.parametrize('mode', [
    pytest.param('interpreter', marks=(pytest.mark.exhaustive, pytest.mark.process)),
    pytest.param('compiler', marks=(pytest.mark.slow, pytest.mark.process)),
    pytest.param('cuda', marks=pytest.mark.gpu)])
def test_kernels(mode, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TRITON_CACHE_DIR': str(tmp_path), 'TRITON_INTERPRET': '0'}
    env['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    if mode == 'interpreter':
        env['TRITON_INTERPRET'] = '1'
    run = subprocess.run([sys.executable, __file__, mode], env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0 and 'all checks passed' in run.stdout, f'{run.stdout}\n{run.stderr}'
    print(run.stdout)


@pytest.fixture
def interpreted(monkeypatch):
    """The module of the kernels once more, for Triton's interpreter, in a process that has imported Triton without."""
    import triton.language.extra.libdevice  # noqa: F401  as it is without the interpreter
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from noah_zoo.layers import poca_triton

    modules = [module for name, module in sys.modules.items() if name.startswith('triton.language')]
    places = [*modules, tl.tensor, tl.core.tensor_descriptor_base]  # where the interpreter leaves its own
    before = [dict(vars(place)) for place in places]
    made = {}
    for module in modules:
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                setattr(module, name, made.setdefault(id(function), InterpretedFunction(function.fn)))
    spec = importlib.util.spec_from_file_location(f'{poca_triton.__name__}_interpreted', poca_triton.__file__)
    kernels = importlib.util.module_from_spec(spec)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    spec.loader.exec_module(kernels)
    assert isinstance(kernels._forward_kernel, InterpretedFunction)
    yield kernels
    for place, names in zip(places, before):
        for name in vars(place).keys() - names.keys():
            if not isinstance(vars(place)[name], types.ModuleType):  # imported meanwhile
                delattr(place, name)
        for name, value in names.items():
            if vars(place)[name] is not value:
                setattr(place, name, value)


def test_kernels_of_few_maps(interpreted, monkeypatch):
    """Forward and backward in the interpreter: tiles of positions and of channels, groups, blocks of maps, dropout."""
    check_they_are_found_to_work(interpreted, 'cpu')
    monkeypatch.setattr(interpreted, 'CAST_FROM', 0)
    for case in ((1, 35, 3, 7, 7, 4, 1, True, 'tokens'), (2, 5, 3, 40, 7, 2, 2, False, 'NCHW')):
        tensors = make(*case, 'cpu')
        compare(fused(interpreted, *tensors, *case[5:7]), reference(*tensors, *case[5:7]), 1e-5)
    rate, seed = 0.3, torch.tensor(2 ** 40 + 7)
    kept_BLM = kept(interpreted, 2, 5, 6, rate, seed)
    assert 0 < kept_BLM.sum() < kept_BLM.numel()
    expected = reference(*tensors, 2, 2, kept_BLM.double() / (1 - rate))
    with mock.patch.object(poca, 'WORKSPACE_BYTES', 2 * 4 * 5 * 2):
        compare(fused(interpreted, *tensors, 2, 2, rate, seed), expected, 1e-5)
    compare(fused(interpreted, *tensors, 2, 2, rate, seed, need_x=False)[2:], expected[2:], 1e-5)
    x_BLC = tensors[0]
    assert torch.equal(interpreted.copy(x_BLC, torch.full(x_BLC.shape, torch.nan)), x_BLC)


def test_the_precision_is_that_of_convolutions(monkeypatch):
    from noah_zoo.layers import poca_triton
    for cudnn, precision in (
            (dict(conv=types.SimpleNamespace(fp32_precision='tf32'), allow_tf32=False), 'tf32'),
            (dict(conv=types.SimpleNamespace(fp32_precision='ieee'), allow_tf32=True), 'tf32x3'),
            (dict(allow_tf32=True), 'tf32'), (dict(allow_tf32=False), 'tf32x3')):  # older versions of PyTorch
        monkeypatch.setattr(torch.backends, 'cudnn', types.SimpleNamespace(**cudnn))
        assert poca_triton._precision() == precision, cudnn


def make(
        batch, positions, classes, key_width, value_width, num_groups, conv_groups, overlap, layout, device,
        dtype=torch.float32):
    """Features, weights and bias of a case, and a gradient of the logits."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    channels = conv_groups * (key_width if overlap else key_width + value_width)
    if layout == 'NLC':
        x_BLC = randn(batch, positions, channels)
    elif layout == 'sliced':
        x_BLC = randn(batch, positions, channels + 5)[..., 3:-2]
    elif layout == 'NCHW':
        x_BLC = randn(batch, channels, positions).transpose(1, 2)
    else:
        x_BLC = randn(batch, positions + 3, channels)[:, 3:]
    key_weight, value_weight = (randn(num_groups * classes, w, scale=w ** -0.5) for w in (key_width, value_width))
    grad_BK = torch.randn(batch, classes, generator=generator).to(device)
    return x_BLC, key_weight, value_weight, randn(num_groups * classes), grad_BK


def reference(x_BLC, key_weight, value_weight, value_bias, grad_BK, num_groups, conv_groups, scale_BLM=None):
    """Logits and the gradients of x, weights and bias, from the formula in float64.

    `scale_BLM` is what dropout multiplies the values with. A bias of None is left out.
    """
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (
        x_BLC, key_weight, value_weight, value_bias)]
    x_BLC, key_weight, value_weight, value_bias = leaves

    def embed(x_BLC, weight):
        per_group = x_BLC.unflatten(2, (conv_groups, -1)), weight.unflatten(0, (conv_groups, -1))
        return torch.einsum('blgc,gmc->blgm', *per_group).flatten(2)

    score_BLM = embed(x_BLC[..., :conv_groups * key_weight.shape[1]], key_weight)
    value_BLM = embed(x_BLC[..., x_BLC.shape[2] - conv_groups * value_weight.shape[1]:], value_weight)
    if value_bias is not None:
        value_BLM = value_BLM + value_bias
    if scale_BLM is not None:
        value_BLM = value_BLM * scale_BLM
    out_BK = (score_BLM.softmax(1) * value_BLM).sum(1).unflatten(1, (num_groups, -1)).sum(1)
    grads = iter(torch.autograd.grad(out_BK, [leaf for leaf in leaves if leaf is not None], grad_BK.double()))
    return out_BK.detach(), *(None if leaf is None else next(grads) for leaf in leaves)


def fused(kernels, x_BLC, key_weight, value_weight, value_bias, grad_BK, num_groups, conv_groups, drop_rate=0.,
          seed=None, need_x=True, need_weights=True):
    """The same from the kernels."""
    x_BCHW = x_BLC.transpose(1, 2).unsqueeze(3)
    out_BK = torch.full(grad_BK.shape, torch.nan, device=x_BLC.device)
    stats_2BM = torch.full((2, len(x_BLC), len(key_weight)), torch.nan, device=x_BLC.device)
    with mock.patch.object(poca, '_kernels', lambda _: kernels):
        kernels.forward(
            x_BLC, key_weight, value_weight, value_bias, num_groups, conv_groups, drop_rate, seed, out_BK, stats_2BM)
        grads = poca._backward(
            grad_BK, x_BCHW, key_weight, value_weight, value_bias, stats_2BM, num_groups, conv_groups, drop_rate, seed,
            False, need_x, need_weights)
    grads = (grads[0].flatten(2).transpose(1, 2) if need_x else grads[0], *grads[1:])
    assert grads[0].is_contiguous()
    found = []
    for grad, tensor, needed in zip(
            grads, (x_BLC, key_weight, value_weight, value_bias), (need_x, *[need_weights] * 3)):
        needed = needed and tensor is not None
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape) if needed else not grad.numel()
        found.append(grad if needed else None)
    return out_BK, *found


def error(got, expected):
    """Largest difference relative to the largest number."""
    assert got.isfinite().all()
    difference = (got.double() - expected.double()).abs().max().item()
    return difference / (expected.double().abs().max().item() or 1.)


def compare(got, expected, forward_bound, gradient_bound=None):
    """Raise unless all outputs agree; the errors."""
    assert [t is None for t in got] == [t is None for t in expected]
    errors = [0. if g is None else error(g, e) for g, e in zip(got, expected)]
    assert errors[0] <= forward_bound and max(errors[1:]) <= (gradient_bound or forward_bound), errors
    return errors


def check_they_are_found_to_work(kernels, device):
    assert kernels.works(torch.device(device))


def check_float32(kernels, device):
    for case in CASES:
        tensors = make(*case, device)
        print('float32', case, ' '.join(f'{e:.1e}' for e in compare(
            fused(kernels, *tensors, *case[5:7]), reference(*tensors, *case[5:7]), 1e-5)))


def check_half_precision(kernels, device):
    for dtype, bound in ((torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)):
        for case in CASES[1:3] if dtype == torch.bfloat16 else CASES[-2:]:
            tensors = make(*case, device, dtype)
            # what is rounded are gradients only, between products and at the end
            print(dtype, case, ' '.join(f'{e:.1e}' for e in compare(
                fused(kernels, *tensors, *case[5:7]), reference(*tensors, *case[5:7]), 1e-5, bound)))


def check_weights_of_another_dtype(kernels, device):
    x_BLC, *others = make(*CASES[1], device)
    expected = reference(x_BLC.bfloat16(), *(t.bfloat16() for t in others[:2]), *others[2:], *CASES[1][5:7])
    # a copy of the weights is made, or a tile is rounded when it is read; the interpreter cuts off there
    for cast_from, bound in ((0, 1e-5), (2 ** 24, 5e-3 if device == 'cpu' else 1e-5)):
        with mock.patch.object(kernels, 'CAST_FROM', cast_from):
            compare(fused(kernels, x_BLC.bfloat16(), *others, *CASES[1][5:7]), expected, bound, 1.5e-2)


def check_large_scores(kernels, device):
    x_BLC, key_weight, *others = make(2, 70, 10, 7, 40, 1, 1, False, 'NLC', device)
    key_weight = key_weight * 60
    assert 180 < (x_BLC[..., :7] @ key_weight.T).abs().max() < 400
    print('large scores', compare(
        fused(kernels, x_BLC, key_weight, *others, 1, 1), reference(x_BLC, key_weight, *others, 1, 1), 1e-4))


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
        out_BM, stats_2BM = torch.empty(batch, maps, device=device), torch.empty(2, batch, maps, device=device)
        kernels.forward(x_BLC, zeros, ones, None, 1, 1, drop_rate, seed, out_BM, stats_2BM)
        sums_BM = (out_BM * positions * (1 - drop_rate)).round().long()
        kept_BLM[:, start:start + count] = sums_BM[:, None] // powers_L[None, :, None].long() % 2 == 1
    return kept_BLM


def check_dropout(kernels, device):
    rate, case = 0.3, (2, 38, 20, 7, 40, 2, 2, False, 'tokens')
    seed, other = torch.tensor(2 ** 40 + 7, device=device), torch.tensor(7, device=device)
    x_BLC, key_weight, value_weight, value_bias, grad_BK = tensors = make(*case, device)
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

    # the mask, read in the forward pass of one group, holds for both passes of two groups, of other tiles and blocks
    got = fused(kernels, *tensors, 2, 2, rate, seed)
    print('dropout', ' '.join(f'{e:.1e}' for e in compare(got, reference(*tensors, 2, 2, scale_BLM), 1e-5)))
    with tiles(kernels, 16, 16):
        assert torch.equal(kept(kernels, 2, 38, 40, rate, seed), kept_BLM)
        compare(fused(kernels, *tensors, 2, 2, rate, seed), got, 5e-6)
    with mock.patch.object(poca, 'WORKSPACE_BYTES', 2 * 4 * 38 * 7):
        compare(fused(kernels, *tensors, 2, 2, rate, seed), got, 5e-6)
    assert all(map(torch.equal, fused(kernels, *tensors, 2, 2, rate, seed), got))
    assert error(fused(kernels, *tensors, 2, 2, rate, other)[0], got[0]) > 0.1

    tensors = x_BLC, key_weight, value_weight, None, grad_BK
    compare(fused(kernels, *tensors, 2, 2, rate, seed), reference(*tensors, 2, 2, scale_BLM), 1e-5)


@contextlib.contextmanager
def tiles(kernels, block_l, block_m):
    original = kernels._tiles
    with mock.patch.object(
            kernels, '_tiles', lambda *args: {**original(*args), 'BLOCK_L': block_l, 'BLOCK_M': block_m}):
        yield


def check_tiles_do_not_matter(kernels, device):
    tensors = make(1, 49, 40, 7, 40, 1, 1, False, 'NCHW', device)
    expected = fused(kernels, *tensors, 1, 1)
    for block_l, block_m in ((16, 32), (64, 16)):
        with tiles(kernels, block_l, block_m):
            compare(fused(kernels, *tensors, 1, 1), expected, 5e-6)


def check_blocks_do_not_matter(kernels, device):
    for case in ((5, 6, 20, 7, 9, 4, 4, False, 'NLC'), (5, 6, 20, 9, 9, 4, 1, True, 'NLC')):
        tensors = make(*case, device)
        expected = fused(kernels, *tensors, *case[5:7])
        for maps in (7, 40, 200):  # some of a group, some groups of one image, or some images
            with mock.patch.object(poca, 'WORKSPACE_BYTES', 2 * 4 * 6 * maps):
                compare(fused(kernels, *tensors, *case[5:7]), expected, 1e-6)


def check_only_what_is_needed(kernels, device):
    tensors = make(2, 5, 3, 7, 5, 1, 1, False, 'NLC', device)
    out_BK, *everything = fused(kernels, *tensors, 1, 1)
    for need_x, need_weights in ((False, True), (True, False), (False, False)):
        _, *grads = fused(kernels, *tensors, 1, 1, need_x=need_x, need_weights=need_weights)
        assert [g is not None for g in grads] == [need_x, *[need_weights] * 3]
        assert all(g is None or torch.equal(g, e) for g, e in zip(grads, everything))
    expanded_BK = torch.ones(1, 1, device=device).expand(out_BK.shape)
    compare(fused(kernels, *tensors[:-1], expanded_BK, 1, 1), reference(*tensors[:-1], expanded_BK, 1, 1), 1e-5)


def check_unread_channels(kernels, device):
    x_BLC, *others = make(2, 5, 3, 7, 5, 1, 1, False, 'NLC', device)
    wider = torch.cat([x_BLC[..., :7], x_BLC.new_ones(2, 5, 3), x_BLC[..., 7:]], 2)
    got, narrow = fused(kernels, wider, *others, 1, 1), fused(kernels, x_BLC, *others, 1, 1)
    assert torch.equal(got[0], narrow[0]) and not got[1][..., 7:10].any()


def check_copies(kernels, device):
    for shape in ((2, 49, 70), (1, 1, 3), (3, 200, 5)):
        x_BLC = torch.randn(shape, device=device)
        for to_BLC in (torch.full_like(x_BLC, torch.nan), torch.full_like(x_BLC.mT.contiguous(), torch.nan).mT):
            for from_BLC in (x_BLC, x_BLC.mT.contiguous().mT):
                assert torch.equal(kernels.copy(from_BLC, to_BLC), x_BLC)


def check_layouts_with_autograd(kernels, device):
    """Through the operator: the gradient has the layout of the features, and what is kept is what the kernels read."""
    if device == 'cpu':
        return
    head = NoahHead(64, 10, 4, drop_rate=0.).to(device)
    for x in (torch.randn(2, 64, 7, 7, device=device), torch.randn(2, 64, 7, 7, device=device).to(
            memory_format=torch.channels_last), torch.randn(2, 52, 64, device=device)[:, 3:].mT.unflatten(2, (7, 7))):
        leaf = x.detach().requires_grad_()
        gradient, = torch.autograd.grad(head(leaf).square().sum(), leaf)
        double, = torch.autograd.grad(head.double()(leaf.double()).square().sum(), leaf)
        head.float()
        assert gradient.is_contiguous() == x.is_contiguous()
        assert error(gradient, double) < 1e-5


def check_compiled_and_captured(kernels, device):
    """With torch.compile and its CUDA graphs, and in a graph of one's own: values and gradients of new features."""
    if device == 'cpu':
        return
    for drop_rate in (0., 0.3):
        head = NoahHead(64, 10, 4, drop_rate=drop_rate).to(device)
        compiled = torch.compile(head, mode='reduce-overhead', fullgraph=True)
        for number in range(4):  # it is recorded in the second call, and replayed
            x = torch.randn(8, 64, 7, 7, device=device, requires_grad=True)
            results = []
            for model in (head, compiled):
                if model is compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                logits = model(x)
                results.append([logits, *torch.autograd.grad(logits.square().sum(), [x, *head.parameters()])])
            if drop_rate:  # another mask every time
                assert not torch.equal(results[0][0], results[1][0])
            else:
                errors = [error(ours, eager) for eager, ours in zip(*results)]
                assert max(errors) < 1e-4, (number, errors)
    head, x = NoahHead(64, 10, 4).to(device), torch.randn(8, 64, 7, 7, device=device)
    captured = torch.cuda.make_graphed_callables(NoahHead(64, 10, 4).to(device), (x.clone().requires_grad_(),))
    head.load_state_dict(captured.state_dict())
    for _ in range(2):
        x = torch.randn(8, 64, 7, 7, device=device, requires_grad=True)
        both = [torch.autograd.grad(model(x).square().sum(), x)[0].clone() for model in (head, captured)]
        assert error(both[1], both[0]) < 1e-5


def check_precision_setting(kernels, device):
    cudnn = torch.backends.cudnn
    assert kernels._precision() == 'tf32x3'  # set by `check_all`
    cudnn.allow_tf32 = True
    assert kernels._precision() == 'tf32'
    cudnn.allow_tf32 = False
    if hasattr(cudnn, 'conv'):
        cudnn.conv.fp32_precision = 'tf32'
        assert kernels._precision() == 'tf32'
        cudnn.conv.fp32_precision = 'ieee'
    assert kernels._precision() == 'tf32x3'


def check_real_sizes(kernels, device):
    if device == 'cpu':
        return
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        for case in (
                (32, 49, 1000, 64, 448, 4, 4, False, 'NCHW'), (32, 196, 1000, 96, 96, 4, 4, False, 'NLC'),
                (2, 1024, 1000, 64, 64, 4, 4, True, 'tokens'), (4, 49, 21843, 40, 120, 1, 1, False, 'NLC'),
                (200, 49, 10, 64, 448, 4, 4, False, 'NLC'), (1, 196, 1000, 24, 24, 4, 1, False, 'NLC')):
            tensors = make(*case, device, dtype)
            got = fused(kernels, *tensors, *case[5:7])
            print(dtype, case, compare(got, reference(*tensors, *case[5:7]), 2e-5, bound))
            assert all(map(torch.equal, got, fused(kernels, *tensors, *case[5:7])))


def compile_all():
    """Compile what the operator would launch for GPUs of these compute capabilities, without one."""
    import triton
    from triton.backends.compiler import GPUTarget

    from noah_zoo.layers import poca_triton

    driver = mock.Mock()
    driver.get_current_device.return_value = driver.get_current_stream.return_value = 0
    triton.runtime.driver.set_active(driver)
    compiled = []

    def grid(kernel):
        return lambda grid: lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    for capability in (80, 90, 100):
        driver.get_current_target.return_value = GPUTarget('cuda', capability, 32)
        for kernel in (poca_triton._forward_kernel, poca_triton._map_grads_kernel):
            kernel.device_caches.clear()
        with mock.patch('triton.JITFunction.__getitem__', lambda kernel, g: grid(kernel)(g)):
            for dtype, drop_rate, precision, case in (
                    (torch.bfloat16, 0., None, (32, 49, 1000, 40, 448, 4, 4, False, 'NLC')),
                    (torch.bfloat16, 0.1, None, (32, 49, 1000, 40, 448, 4, 4, False, 'NLC')),
                    (torch.float32, 0., 'tf32', (2, 16, 10, 16, 32, 4, 4, False, 'NLC')),
                    (torch.float32, 0., 'tf32x3', (200, 64, 64, 96, 32, 4, 4, False, 'NLC'))):
                seed = torch.tensor(0) if drop_rate else None
                with mock.patch.object(poca_triton, '_precision', lambda precision=precision: precision or 'tf32'):
                    fused(poca_triton, *make(*case, 'cpu', dtype), 4, 4, drop_rate, seed)
    for kernel in compiled:
        print(kernel.metadata.target.arch, kernel.metadata.name, kernel.metadata.shared, len(kernel.asm['cubin']))
        assert kernel.metadata.shared < 163 * 1024 and len(kernel.asm['cubin']) > 1000
        assert not re.search(r'\b(atom|red)\.', kernel.asm['ptx'])  # sums in an order of their own
    assert len({kernel.hash for kernel in compiled}) == 3 * 4 * 2


def multiply_on_cpu():
    """The gradients of the maps times features and weights, where float32 sums of other numbers are CUDA's alone."""
    poca._put_product = lambda total, left, right, add: (total if add else total.zero_()).add_(
        left.to(total.dtype) @ right.to(total.dtype))


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

    torch.backends.cudnn.allow_tf32 = False
    if device == 'cpu':
        multiply_bfloat16_in_interpreter()
        multiply_on_cpu()
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
        multiply_on_cpu()
        compile_all()
    else:
        check_all({'interpreter': 'cpu', 'cuda': 'cuda'}[sys.argv[1]])
    print('all checks passed')
