"""What is compiled for CPUs against the formula in float64; what it leaves to the blocks."""
import contextlib
import ctypes
import itertools
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from noah_zoo.layers import poca_cpu
from noah_zoo.layers.poca import poca, poca_op, poca_reference

from .operands import SPLITS, as_double, assert_close, make

ROOT = Path(__file__).resolve().parents[2]
CAPABILITY = torch.backends.cpu.get_cpu_capability()
needs_kernel = pytest.mark.skipif(
    poca_cpu.kind() is None
    or not poca_cpu.LIBRARY.is_file() and (sys.platform == 'win32' or shutil.which('c++') is None),
    reason='needs AVX2 or NEON, and a compiler when the package was installed')


@contextlib.contextmanager
def nothing_but_nan():
    """A context in which new memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attended(x, args):
    """What the compiled function alone makes of it, in an output that had nothing but NaN; bias and sum by hand."""
    key, _, value, bias, num_groups, conv_groups = args
    x_BLC = x.flatten(2).transpose(1, 2)
    assert poca_cpu.supports(x_BLC, key, value, conv_groups)
    with nothing_but_nan():
        out = poca_cpu.forward(x_BLC, key, value, conv_groups)
    return out.unflatten(1, (num_groups, -1)).sum(1) + bias.unflatten(0, (num_groups, -1)).sum(0)


def check(x, args, tolerance=2e-6):
    with torch.no_grad():
        assert_close([attended(x, args)], [poca_reference(x.double(), *as_double(args))], tolerance)


def scaled(channels, classes, split_groups, split_kv):
    """Arguments of `poca` whose scores and values are of the order of 1."""
    args = make(channels, classes, 4, 1 / 2, split_groups, split_kv, dtype=torch.float32)
    for at in (0, 2):
        args[at].data.mul_(args[at].shape[1] ** -0.5)
    return args


def of_any_size(split_groups, split_kv):
    """Features and arguments of `poca`."""
    # Maps of a group: part of a panel, one, more. Channels: a multiple of 8 and not; more than a step of 128.
    torch.manual_seed(0)
    for classes, channels, side in itertools.product((1, 5, 16, 33), (8, 72, 600), ((1, 1), (2, 2), (1, 7), (7, 7))):
        yield torch.randn(3, channels, *side), scaled(channels, classes, split_groups, split_kv)


@needs_kernel
@pytest.mark.parametrize('split_groups, split_kv', SPLITS)
def test_values_of_any_size(split_groups, split_kv):
    for x, args in of_any_size(split_groups, split_kv):
        check(x, args)
    for length in range(1, 40):  # every division of the positions into rows
        check(torch.randn(2, 600, 1, length), args)


@needs_kernel
def test_features_of_any_strides():
    torch.manual_seed(0)
    args = make(48, 21, dtype=torch.float32)
    x = torch.randn(3, 48, 5, 6)
    expected = attended(x, args)
    for same in (
            x.contiguous(memory_format=torch.channels_last), x.flatten(2).mT.contiguous().mT.unsqueeze(3),
            torch.stack([x, x + 1], dim=-1)[..., 0], torch.cat([x, x], dim=1)[:, :48]):
        assert torch.equal(attended(same, args), expected)
    assert torch.equal(attended(x[:1].expand(4, -1, -1, -1), args), expected[:1].expand(4, -1))
    last = [w.contiguous(memory_format=torch.channels_last) if w is args[0] or w is args[2] else w for w in args]
    assert torch.equal(attended(x, last), expected)


@needs_kernel
def test_more_images_than_the_cache_holds():
    torch.manual_seed(0)
    args = make(192, 50, dtype=torch.float32)
    x = torch.randn(40, 192, 14, 14)
    args[0].data.mul_(0.1)
    check(x, args)


@needs_kernel
def test_scores_of_hundreds_and_what_is_no_number():
    torch.manual_seed(0)
    args = make(32, 20, dtype=torch.float32)
    x = torch.randn(4, 32, 5, 5)
    x[1] *= 100
    check(x, args)
    payload = torch.tensor(0x7fc12345, dtype=torch.int32).view(torch.float32)
    for bad in (torch.nan, torch.inf, payload):
        worse = x.clone()
        worse[2, 0, 3, 3] = bad
        logits, expected = attended(worse, args), poca_reference(worse, *args)
        assert torch.equal(logits.isnan(), expected.isnan()) and logits[2].isnan().any()
        assert torch.equal(logits[[0, 1, 3]], attended(x, args)[[0, 1, 3]])


@needs_kernel
def test_any_number_of_threads(monkeypatch):
    torch.manual_seed(0)
    args = make(48, 100, dtype=torch.float32)
    x = torch.randn(2, 48, 7, 7)
    monkeypatch.setattr(poca_cpu, 'FLOP_PER_THREAD', 1)
    results = []
    for threads in (1, 2, 3, 100):  # of 28 panels
        monkeypatch.setattr(torch, 'get_num_threads', lambda threads=threads: threads)
        results.append(attended(x, args))
    for other in results[1:]:
        assert torch.equal(other, results[0])


# Backward


def gradients(x, args, grad=None, **needs):
    """Of features and kernels by the compiled function alone, in memory that had nothing but NaN."""
    key, _, value, bias, num_groups, conv_groups = args
    grad_BK = torch.randn(len(x), len(key) // num_groups) if grad is None else grad
    x_BLC = x.flatten(2).transpose(1, 2)
    assert poca_cpu.supports_training(x_BLC, key, value, conv_groups)
    needs = {'channels_first': x.stride(1) != 1, 'need_x': True, 'need_weights': True, **needs}
    with nothing_but_nan():
        dx_BLC, *dweights = poca_cpu.backward(
            grad_BK.repeat(1, num_groups), x_BLC, key, value, conv_groups, bias, 0., None, **needs)
    return None if dx_BLC is None else dx_BLC.mT.unflatten(2, x.shape[2:]), *dweights


def check_gradients(x, args, tolerance=1e-5):
    grad = torch.randn(len(x), len(args[0]) // args[4])
    x_double, args_double = x.double().requires_grad_(), as_double(args)
    logits = poca_reference(x_double, *args_double)
    leaves = [leaf for leaf in (x_double, args_double[0], *args_double[2:4]) if leaf is not None]
    expected = torch.autograd.grad(logits, leaves, grad.double())
    found = [tensor for tensor in gradients(x.detach(), args, grad) if tensor is not None]
    assert found[0].stride() == x.contiguous().stride() or x.stride(1) == 1 and found[0].stride(1) == 1
    if x.shape[2:].numel() == 1:  # the attention is 1, whatever the key
        found, expected = [found[0], *found[2:]], [expected[0], *expected[2:]]
    assert_close(found, expected, tolerance)


@needs_kernel
@pytest.mark.parametrize('split_groups, split_kv', SPLITS)
def test_gradients_of_any_size(split_groups, split_kv):
    for x, args in of_any_size(split_groups, split_kv):
        check_gradients(x, args)
        check_gradients(x.contiguous(memory_format=torch.channels_last), args)
    for length in range(2, 40):  # every division of the positions into rows and columns
        x = torch.randn(2, 48, 1, length)
        args = make(48, 3, 4, 1 / 4, split_groups, split_kv, dtype=torch.float32)
        check_gradients(x, args)
        check_gradients(x.contiguous(memory_format=torch.channels_last), args)


@needs_kernel
def test_gradients_of_any_strides():
    torch.manual_seed(0)
    args, grad = make(48, 21, dtype=torch.float32), torch.randn(3, 21)
    x = torch.randn(3, 48, 5, 6)
    expected = gradients(x, args, grad)
    for same in (
            x.contiguous(memory_format=torch.channels_last), x.flatten(2).mT.contiguous().mT.unsqueeze(3).view_as(x),
            torch.stack([x, x + 1], dim=-1)[..., 0], torch.cat([x, x], dim=1)[:, :48]):
        assert_close(gradients(same, args, grad), expected, 1e-6)
    for needs, kept in ((dict(need_x=False), [1, 2, 3]), (dict(need_weights=False), [0])):
        for at, (found, whole) in enumerate(zip(gradients(x, args, grad, **needs), expected)):
            assert torch.equal(found, whole) if at in kept else found is None


@needs_kernel
def test_channels_that_one_or_both_read_or_nobody():
    torch.manual_seed(0)
    x = torch.randn(2, 40, 3, 3)
    for widths, groups in (((40, 40), 1), ((24, 32), 1), ((8, 16), 1), ((20, 20), 2), ((10, 10), 2), ((4, 8), 2)):
        key, value = (torch.randn(12, width, 1, 1) / 4 for width in widths)
        check_gradients(x, (key, None, value, None, 2, groups))
    key, value = torch.randn(12, 16, 1, 1), torch.randn(12, 12, 1, 1)  # a channel of two groups
    assert not poca_cpu.supports_training(x.flatten(2).mT, key, value, 2)
    args = key / 4, None, value / 4, None, 2, 2
    leaves = [x.requires_grad_(), args[0].requires_grad_(), args[2].requires_grad_()]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = poca_reference(doubles[0], doubles[1], None, doubles[2], None, 2, 2)
    assert_close(
        torch.autograd.grad(poca(*leaves[:2], None, leaves[2], None, 2, 2).sum(), leaves),
        torch.autograd.grad(logits.sum(), doubles), 1e-5)


@needs_kernel
def test_gradients_where_scores_are_hundreds_or_no_number():
    torch.manual_seed(0)
    args = make(32, 20, dtype=torch.float32)
    x, grad = torch.randn(4, 32, 5, 5), torch.randn(4, 20)
    x[1] *= 100
    check_gradients(x, args)
    good = gradients(x, args, grad)[0]
    for bad in (torch.nan, torch.inf):
        worse = x.clone()
        worse[2, 0, 3, 3] = bad
        dx, *dweights = gradients(worse, args, grad)
        assert torch.equal(dx[[0, 1, 3]], good[[0, 1, 3]]) and dx[2].isnan().any()
        leaves = [worse.requires_grad_(), args[0], args[2]]
        expected = torch.autograd.grad(poca_reference(leaves[0], *args), leaves, grad)
        for ours, theirs in zip((dx, *dweights), expected):  # but the bias's, which knows that the attention sums to 1
            assert torch.equal(ours.isfinite(), theirs.isfinite())


@needs_kernel
@pytest.mark.parametrize('copies', [2 ** 26, 1])
def test_gradients_on_any_number_of_threads(copies, monkeypatch):
    torch.manual_seed(0)
    args, grad = make(48, 100, dtype=torch.float32), torch.randn(30, 100)
    x = torch.randn(30, 48, 7, 7)
    monkeypatch.setattr(poca_cpu, 'FLOP_PER_THREAD', 1)
    monkeypatch.setattr(poca_cpu, 'COPIES_BYTES', copies)
    results = []
    for threads in (1, 2, 3, 30):  # of 16 tasks, or 4
        monkeypatch.setattr(torch, 'get_num_threads', lambda threads=threads: threads)
        results.append(gradients(x, args, grad))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    check_gradients(x, args)


@needs_kernel
@pytest.mark.parametrize('channels_last', [False, True])
def test_dropout_has_one_mask_in_both_passes(channels_last, monkeypatch):
    torch.manual_seed(0)
    key, _, value, bias, groups, conv_groups = make(16, 300, 1, dtype=torch.float32)
    x = torch.randn(7, 16, 5, 5)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x_BLC, rate = x.flatten(2).mT, 0.3
    embed = x_BLC, key, value, conv_groups

    def out(seed, value=value, bias=bias, rate=rate):
        return poca_cpu.forward(x_BLC, key, value, conv_groups, bias, rate, torch.tensor(seed))

    # Values of 1 at one position and of 0 elsewhere give the attention there, or nothing.
    seed = 2 ** 40 + 17
    attention = F.conv2d(x[:, :key.shape[1]], key).flatten(2).softmax(dim=2).double()
    masks = []
    for position in range(25):
        probe = torch.zeros(7, 25, 16)
        probe[:, :, :8] = x_BLC[:, :, :8]
        probe[:, position, 8:] = 1
        with_one = poca_cpu.forward(
            probe, key, torch.ones_like(value) / 8, conv_groups, None, rate, torch.tensor(seed)).double()
        masks.append(with_one / attention[:, :, position])
    mask_BML = torch.stack(masks, dim=2)
    kept = mask_BML > 0.5
    torch.testing.assert_close(mask_BML, kept.double() / (1 - rate), rtol=1e-4, atol=1e-6)
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=4 * (0.21 / kept.numel()) ** 0.5)
    for dim in range(3):  # no image, map or position is like the next one
        left, right = kept.narrow(dim, 0, kept.shape[dim] - 1), kept.narrow(dim, 1, kept.shape[dim] - 1)
        assert (left == right).double().mean().item() == pytest.approx(0.58, abs=0.02)

    def formula(x, key, value, bias):
        a_BML = F.conv2d(x[:, :key.shape[1]], key).flatten(2).softmax(dim=2)
        v_BML = F.conv2d(x[:, -value.shape[1]:], value, bias).flatten(2)
        return (a_BML * v_BML * kept / (1 - rate)).sum(dim=2)

    leaves = as_double((x, key, value, bias))
    assert_close([out(seed)], [formula(*leaves)], 2e-6)
    assert torch.equal(out(seed), out(seed)) and not torch.equal(out(seed), out(seed + 1))
    assert not torch.equal(out(seed), out(seed + 2 ** 32))
    grad = torch.randn(7, 300)
    expected = torch.autograd.grad(formula(*leaves), leaves, grad.double())
    monkeypatch.setattr(poca_cpu, 'FLOP_PER_THREAD', 1)
    dx_BLC, *dweights = poca_cpu.backward(grad, *embed, bias, rate, torch.tensor(seed), not channels_last, True, True)
    assert_close([dx_BLC.mT.unflatten(2, (5, 5)), *dweights], expected, 1e-5)


@needs_kernel
def test_it_is_what_poca_uses(monkeypatch):
    used, forward, backward = [], poca_cpu.forward, poca_cpu.backward
    monkeypatch.setattr(poca_cpu, 'forward', lambda *a: used.append(True) or forward(*a))
    monkeypatch.setattr(poca_cpu, 'backward', lambda *a: used.append('backward') or backward(*a))
    args = make(dtype=torch.float32)
    x = torch.randn(2, 24, 3, 3)
    with torch.no_grad():
        first = poca(x, *args)
        assert used == [True]
        poca(x, *args, drop_rate=0.5, training=True)
        assert used == [True, True]
        monkeypatch.setattr(poca_cpu, 'compiled', lambda: None)
        assert_close([poca(x, *args)], [first], 2e-6)
        assert used == [True, True]
    monkeypatch.undo()
    monkeypatch.setattr(poca_cpu, 'backward', lambda *a: used.append('backward') or backward(*a))
    poca(x, *args).sum().backward()
    assert used == [True, True, 'backward']


@needs_kernel
def test_what_it_leaves_to_the_blocks():
    key, _, value, *_, conv_groups = make(dtype=torch.float32)
    x = torch.randn(2, 9, 24)
    assert poca_cpu.supports(x, key, value, conv_groups)
    for given in (
            (x.double(), key.double(), value.double()), (x[:0],), (x[..., :8],), (x, key[:18], value[:18]),
            (x, key[:16])):
        tensors = *given, *(key, value)[len(given) - 1:]
        assert not poca_cpu.supports(*tensors, conv_groups)


@needs_kernel
@pytest.mark.parametrize('drop_rate', [0., 0.3])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, drop_rate):
    # As with numbers of that type that are float32; under autocast, only the features can be of it.
    torch.manual_seed(0)
    args = [a.detach().to(dtype) if torch.is_tensor(a) else a for a in make(24, 5, dtype=torch.float32)]
    x = torch.randn(3, 24, 4, 4).to(dtype)
    results = []
    for change, autocast in ((lambda t: t, False), (lambda t: t.float(), False), (lambda t: t.float(), True)):
        leaves = [change(t).detach().requires_grad_() for t in (x, *args[:4])]
        if autocast:
            leaves[0] = x.clone().requires_grad_()
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            logits = poca(*leaves, *args[4:], drop_rate, True)
        assert logits.dtype == (dtype if change(x).dtype == dtype and not autocast else torch.float32)
        logits.float().square().sum().backward()
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        results.append([logits.detach(), *(leaf.grad for leaf in leaves)])
    half, exact, mixed = results
    assert torch.equal(half[0], exact[0].to(dtype)) and torch.equal(mixed[0], exact[0])
    tolerance = 2 * torch.finfo(dtype).eps
    assert_close(half[1:], exact[1:], tolerance)
    assert_close(mixed[1:], exact[1:], tolerance)


LOWERED = {  # what needs AVX-512, by what needs AVX2
    'avx512f,avx512bw,avx512dq,avx512vl,fma': 'avx2,fma', 'LARGER _mm512_max_ps': 'LARGER(a, b) (a > b ? a : b)',
    'SMALLER _mm512_min_ps': 'SMALLER(a, b) (a < b ? a : b)'}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('kind, compiler, flags, emulator, changes', [
    ('neon', 'aarch64-linux-gnu-g++', ['-static', '-fopenmp'], ['qemu-aarch64'], {}),
    ('neon', 'clang++', ['--target=aarch64-linux-gnu', '-static', '-Wno-unknown-pragmas'], ['qemu-aarch64'], {}),
    ('avx2', 'python-zig c++', ['-target', 'x86_64-windows-gnu'], ['wine'], {}),
    ('avx512', 'python-zig c++', ['-target', 'x86_64-windows-gnu'], ['wine'], {}),
    ('avx2', 'g++', ['-fopenmp', '-fsanitize=address,alignment', '-fno-sanitize-recover'], [], {}),
    ('avx2', 'clang++', ['-fopenmp'], [], {}),
    ('avx2', 'clang++', ['-Wno-unknown-pragmas'], [], {}),
    ('avx512', 'g++', ['-fopenmp', '-fsanitize=address,alignment', '-fno-sanitize-recover'], [], LOWERED)])
def test_other_processors_and_compilers(kind, compiler, flags, emulator, changes, tmp_path):
    # NEON under an emulator; the code for AVX-512 with vectors as wide, but of two halves; Windows by Wine.
    missing = [name for name in (compiler.split()[0], *emulator) if shutil.which(name) is None]
    enough = ('AVX2', 'AVX512') if kind == 'avx2' or changes else ('AVX512',)
    if missing or 'avx' in kind and CAPABILITY not in enough:
        pytest.skip(f'needs {", ".join(missing) or kind}')
    for name in ('noah_zoo/layers/poca_cpu.cpp', 'noah_zoo/layers/poca_cpu.h', 'tests/layers/poca_alone.cpp'):
        text = (ROOT / name).read_text()
        for before, after in changes.items():
            assert name != 'noah_zoo/layers/poca_cpu.cpp' or before in text
            text = text.replace(before, after)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    program = tmp_path / 'alone'
    subprocess.run(
        [*compiler.split(), '-std=c++17', '-O3', *flags, f'-DRUN=poca_run_{kind}', '-o', program,
         tmp_path / 'tests/layers/poca_alone.cpp'], check=True, stderr=subprocess.DEVNULL)
    torch.manual_seed(0)
    for classes, channels, length in ((1, 8, 1), (5, 72, 4), (16, 72, 7), (33, 600, 49), (70, 40, 30)):
        for split_groups, split_kv in SPLITS:
            args = scaled(channels, classes, split_groups, split_kv)
            for channels_first in (False, True):
                _check_alone([*emulator, program], torch.randn(5, channels, length, 1), args, channels_first)


def _check_alone(command, x, args, channels_first, drop_rate=1e-30, seed=3):
    """Run it on this call, and compare with the formula; so small a rate drops nothing."""
    key, _, value, bias, num_groups, conv_groups = args
    (batch, channels, length, _), maps, threads, chunks = x.shape, len(key), 2, 3
    widths = [key.shape[1], value.shape[1]]
    numbers = struct.pack(
        '=11qQd', batch, length, channels, conv_groups, maps // conv_groups, *widths, threads, channels_first,
        channels - conv_groups * widths[1] < conv_groups * widths[0], chunks, seed, drop_rate)
    grad, x_BLC = torch.randn(batch, maps), x.flatten(2).mT
    stored = [x_BLC.mT if channels_first else x_BLC, key, value, bias, grad]
    folder = Path(command[-1]).parent
    (folder / 'in').write_bytes(numbers + b''.join(t.detach().contiguous().numpy().tobytes() for t in stored))
    subprocess.run([*command, folder / 'in', folder / 'out'], check=True)
    found = torch.frombuffer(bytearray((folder / 'out').read_bytes()), dtype=torch.float32)
    leaves = as_double((x_BLC, key, value, bias))
    out_BM = poca_reference(leaves[0].mT.unsqueeze(3), leaves[1], None, *leaves[2:], 1, conv_groups)
    expected = [out_BM, *torch.autograd.grad(out_BM, leaves, grad.double())]
    out, dx, *others = (
        part.view(e.shape) for part, e in zip(found.split([e.numel() for e in expected]), expected))
    dx = dx.reshape(batch, channels, length).mT if channels_first else dx
    if length == 1:  # the attention is 1, whatever the key
        others, expected = others[1:], [*expected[:2], *expected[3:]]
    assert_close([out, dx, *others], expected, 1e-5)


@needs_kernel
def test_opcheck():
    args = make(24, 3, 2, dtype=torch.float32)
    torch.library.opcheck(poca_op, (torch.randn(2, 24, 5, 1, requires_grad=True), *args, 0., None))


@pytest.fixture
def nothing_remembered():
    """What is known of the processor and of the library is found out again, before the test and after it."""
    def forget():
        for function in (poca_cpu.kind, poca_cpu.compiled):
            function.cache_clear()

    forget()
    yield forget
    forget()


def test_the_kind_of_processor(monkeypatch, nothing_remembered):
    for machine, capability, kind in (
            ('x86_64', 'AVX512', 'avx512'), ('AMD64', 'AVX2', 'avx2'), ('x86_64', 'DEFAULT', None),
            ('aarch64', 'DEFAULT', 'neon'), ('arm64', 'DEFAULT', 'neon')):
        nothing_remembered()
        monkeypatch.setattr(poca_cpu.platform, 'machine', lambda machine=machine: machine)
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda capability=capability: capability)
        assert poca_cpu.kind() == kind
        assert kind or poca_cpu.compiled() is None


@needs_kernel
def test_a_library_that_is_none_or_not_there(monkeypatch, nothing_remembered, tmp_path):
    (tmp_path / 'broken.so').write_text('no library')
    for name in ('broken.so', 'missing.so'):
        nothing_remembered()
        monkeypatch.setattr(poca_cpu, 'LIBRARY', tmp_path / name)
        assert poca_cpu.compiled() is None


@pytest.mark.process
def test_a_processor_without_avx2_has_none():
    code = 'from noah_zoo.layers.poca_cpu import compiled; print(compiled())'
    environment = {**os.environ, 'ATEN_CPU_CAPABILITY': 'default'}
    assert subprocess.check_output([sys.executable, '-c', code], text=True, env=environment).strip() == 'None'


@needs_kernel
def test_one_that_was_compiled_before_is_told(monkeypatch, nothing_remembered, caplog, tmp_path):
    size = ctypes.sizeof(poca_cpu._Call)
    for number, code in enumerate((
            'void other() {}', f'unsigned long poca_call_size = {size}; void poca_run() {{}}',
            'unsigned long poca_call_size = 8; void poca_run_avx2() {}')):
        (tmp_path / 'old.c').write_text(code)
        library = tmp_path / f'old{number}.so'
        subprocess.run(['gcc', '-shared', '-fPIC', tmp_path / 'old.c', '-o', library], check=True)
        monkeypatch.setattr(poca_cpu, 'LIBRARY', library)
        nothing_remembered()
        caplog.clear()
        assert poca_cpu.compiled() is None and f'{library} was compiled for another version' in caplog.text


@needs_kernel
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-6), (torch.bfloat16, 5e-3)])
def test_a_bias_of_another_type_or_shape(dtype, tolerance):
    torch.manual_seed(0)
    key, _, value, bias, groups, conv_groups = make(24, 5, dtype=torch.float32)
    x, other = torch.randn(4, 24, 3, 3), bias.detach().to(dtype).requires_grad_()
    logits = poca(x, key, None, value, other, groups, conv_groups)
    assert_close([logits], [poca(x, key, None, value, other.float(), groups, conv_groups)], tolerance)
    logits.sum().backward()
    assert other.grad.dtype == dtype and torch.equal(other.grad, torch.full_like(other, 4))
    torch.manual_seed(1)
    dropped = poca(x, key, None, value, other, groups, conv_groups, 0.5, True)
    torch.manual_seed(1)
    assert torch.equal(dropped, poca(x, key, None, value, other.float(), groups, conv_groups, 0.5, True))
    with pytest.raises(ValueError, match=r'a value bias of the shape \[3\]; expected \[20\]'):
        poca(x, key, None, value, bias[:3], groups, conv_groups, 0.5, True)
    with pytest.raises(ValueError, match='drop_rate=1.5 is not between 0 and 1'):
        poca(x, key, None, value, bias, groups, conv_groups, 1.5, True)
