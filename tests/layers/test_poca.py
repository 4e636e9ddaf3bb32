"""The operator in blocks against the formula as it is written: values, gradients, dropout, compilers, memory."""
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from noah_zoo import NoahHead
from noah_zoo.layers import poca as poca_module
from noah_zoo.layers import poca_cpu
from noah_zoo.layers.poca import poca, poca_backward_op, poca_op, poca_reference

from .operands import SPLITS, as_double, assert_close, make


def grads(function, x, args, weight):
    """Logits, and the gradients of features, key weight and bias, value weight and bias."""
    logits = function(x, *args)
    return [logits, *torch.autograd.grad(logits, [x, *args[:4]], weight.to(logits.dtype))]


@pytest.mark.parametrize('split_groups, split_kv', SPLITS)
@pytest.mark.parametrize('size', [(3, 3, 2), (1, 7, 7), (2, 1, 1)])
def test_values_and_gradients(split_groups, split_kv, size, monkeypatch):
    torch.manual_seed(0)
    args = make(split_groups=split_groups, split_kv=split_kv)
    x = torch.randn(size[0], 24, *size[1:], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(size[0], 5, dtype=torch.float64)
    expected = grads(poca_reference, x, args, weight)
    for block in ((1, 1, 1), (3, 1, 5), (1, 2, 2), (4, 3, 20)):  # groups, images and maps, within what there is
        monkeypatch.setattr(poca_module, '_block_size', lambda groups, batch, length, maps, device, block=block: (
            min(groups, block[0]), min(batch, block[1]), min(maps, block[2])))
        assert_close(grads(poca, x, args, weight), expected, 1e-12)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_close(grads(poca, last, args, weight), expected, 1e-12)


@pytest.mark.parametrize('channels, groups, ratio, side, scale', [
    (1280, 8, 1 / 4, 7, 1), (192, 4, 1 / 2, 14, 1), (192, 4, 1 / 2, 5, 30), (24, 1, 1 / 2, 7, 1000)])
@pytest.mark.parametrize('compiled', [True, False])
def test_single_precision(channels, groups, ratio, side, scale, compiled, monkeypatch):
    # Scores of hundreds, which overflow without a shift, are in it.
    if not compiled:
        monkeypatch.setattr(poca_cpu, 'compiled', lambda: None)
    torch.manual_seed(0)
    args = make(channels, 11, groups, ratio, dtype=torch.float32)
    x = torch.randn(3, channels, side, side)
    for at in (0, 2):
        with torch.no_grad():
            args[at].mul_((channels / groups) ** -0.5)
    x[1] *= scale  # one image of the batch
    x.requires_grad_()
    weight = torch.randn(3, 11)
    expected = grads(poca_reference, x.detach().double().requires_grad_(), as_double(args), weight)
    assert_close(grads(poca, x, args, weight), expected, 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_single(dtype):
    torch.manual_seed(0)
    args = make(192, 11, dtype=dtype)
    with torch.no_grad():
        args[0].mul_(0.1)
    x = torch.randn(4, 192, 14, 14, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 11, dtype=dtype)
    expected = grads(poca_reference, x.detach().double().requires_grad_(), as_double(args), weight)
    ours = grads(poca, x, args, weight)
    assert {t.dtype for t in ours} == {dtype}
    eps = torch.finfo(dtype).eps
    assert_close(ours, expected, eps)  # of the last rounding, not of the sums


def test_autocast():
    torch.manual_seed(0)
    args = make(192, 11, dtype=torch.float32)
    x = torch.randn(2, 192, 7, 7, requires_grad=True)
    weight = torch.randn(2, 11)
    expected = grads(poca, x, args, weight)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        ours = grads(poca, x, args, weight)
    assert {t.dtype for t in ours} == {torch.float32}
    assert all(map(torch.equal, ours, expected))  # on a CPU nothing is rounded


@pytest.mark.parametrize('split_groups, split_kv', [
    SPLITS[0], *(pytest.param(*splits, marks=pytest.mark.exhaustive) for splits in SPLITS[1:])])
def test_gradcheck_and_opcheck(split_groups, split_kv):
    torch.manual_seed(0)
    *params, num_groups, conv_groups = make(8, 3, 2, split_groups=split_groups, split_kv=split_kv)
    x = torch.randn(2, 8, 5, 1, dtype=torch.float64, requires_grad=True)
    for drop_rate, seed in ((0., None), (0.4, torch.tensor(7))):
        args = x, *params, num_groups, conv_groups, drop_rate, seed
        assert torch.autograd.gradcheck(lambda *tensors, rest=args[5:]: poca_op(*tensors, *rest)[0], args[:5])
        torch.library.opcheck(poca_op, args)


def test_second_derivatives_are_refused():
    args = make()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(poca(x, *args).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='poca: its gradient cannot be differentiated again; .*poca_reference'):
        gradient.sum().backward()


def test_only_what_is_asked_for_has_a_gradient(monkeypatch):
    torch.manual_seed(0)
    args = make()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(poca(x, *args).square().sum(), [x, args[0], args[2]])
    needed = []
    monkeypatch.setattr(poca_module, 'poca_backward_op', lambda *a: needed.append(a[-2:]) or poca_backward_op(*a))
    dkey, dvalue = torch.autograd.grad(poca(x.detach(), *args).square().sum(), [args[0], args[2]])
    frozen = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    dx, = torch.autograd.grad(poca(x, *frozen).square().sum(), x)
    assert needed == [(False, True), (True, False)]
    for ours, theirs in zip((dx, dkey, dvalue), expected):
        assert torch.equal(ours, theirs)


def test_the_bias_of_the_value_trains_alone():
    torch.manual_seed(0)
    key, key_bias, value, value_bias, *rest = make()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64)
    found = []
    for weights in ((key, value), (key.detach(), value.detach())):
        torch.manual_seed(1)  # the same mask
        logits = poca(x, weights[0], key_bias, weights[1], value_bias, *rest, drop_rate=0.5, training=True)
        found += torch.autograd.grad(logits.square().sum(), value_bias)
    assert found[0].any() and torch.equal(*found)


def test_without_biases():
    torch.manual_seed(0)
    key, _, value, _, *rest = make()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64)
    for training in (False, True):  # dropout too
        logits = poca(x, key, None, value, None, *rest, drop_rate=0.5 * training, training=training)
        assert training or torch.allclose(logits, poca_reference(x, key, None, value, None, *rest), atol=1e-12)
        logits.sum().backward()


def test_no_image_at_all():
    args = make()
    x = torch.randn(0, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    logits = poca(x, *args)
    logits.sum().backward()
    assert logits.shape == (0, 5) and x.grad.shape == x.shape and not args[0].grad.any()


def test_types_must_agree():
    args = make(dtype=torch.float32)
    with pytest.raises(RuntimeError, match='poca: features of torch.float64, weights of torch.float32 and'):
        poca(torch.randn(2, 24, 3, 3, dtype=torch.float64), *args)


# Dropout


def test_dropout_has_its_distribution():
    # With one position the attention is 1, so a logit of one group is the value as dropout left it.
    torch.manual_seed(0)
    rate, count = 0.3, 40 * 500
    args = make(8, 500, 1, dtype=torch.float64)
    x = torch.randn(40, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    whole = poca(x, *args)
    dropped = poca(x, *args, drop_rate=rate, training=True)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - rate), rtol=1e-12, atol=1e-12)
    sigma = (rate * (1 - rate) / count) ** 0.5
    assert abs(kept.double().mean() - (1 - rate)) < 4 * sigma
    rows = kept.double() - (1 - rate)  # neighbours in either direction know nothing of each other
    for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
        assert abs((a * b).mean()) < 4 * rate * (1 - rate) / a.numel() ** 0.5
    bias_grad, = torch.autograd.grad(dropped.sum(), args[3])
    torch.testing.assert_close(bias_grad, kept.double().sum(0) / (1 - rate), rtol=1e-12, atol=1e-12)  # the same mask


def test_dropout_is_reproducible_and_only_in_training():
    args = make()
    x = torch.randn(4, 24, 5, 5, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = (poca(x, *args, drop_rate=0.5, training=True) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(poca(x, *args, drop_rate=0.5, training=True), first)
    assert not torch.allclose(first, second)
    assert torch.equal(poca(x, *args, drop_rate=0.5), poca(x, *args))


def test_dropout_on_average_changes_nothing():
    torch.manual_seed(0)
    args = make(drop_rate=0.)
    x = torch.randn(1, 24, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        for function in (poca, poca_reference):
            samples = function(x.expand(4000, -1, -1, -1), *args, drop_rate=0.5, training=True)
            error = (samples.mean(0) - poca_reference(x, *args)[0]).abs()
            assert (error < 5 * samples.std(0) / 4000 ** 0.5).all()


# Compilers


@pytest.mark.export
@pytest.mark.parametrize('drop_rate', [0., 0.5])
def test_compiled_with_its_backward(drop_rate):
    torch.manual_seed(0)
    torch._dynamo.reset()
    head = NoahHead(24, 5, drop_rate=drop_rate)
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 24, 3, 3, requires_grad=True)
    for dtype in (None, torch.bfloat16):
        results = []
        for model in (head, compiled):
            torch.manual_seed(1)
            with torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                logits = model(x)
            results.append([logits, *torch.autograd.grad(logits.square().sum(), [x, *head.parameters()])])
        assert_close(results[1], results[0], 1e-5)


def test_exporters_see_the_formula():
    head = NoahHead(24, 5).eval()
    x = torch.randn(2, 24, 3, 3)
    exported = torch.export.export(head, (x,))
    graphs = {
        'export': str(exported.graph), 'trace': str(torch.jit.trace(head, x).inlined_graph),
        'script': str(torch.jit.script(head).inlined_graph)}
    for name, graph in graphs.items():
        assert 'softmax' in graph and 'conv' in graph, name
        assert 'noah_zoo.poca' not in graph and 'noah_zoo::poca' not in graph, name
    compiled = []
    torch._dynamo.reset()
    torch.compile(head, backend=lambda gm, _: compiled.append(str(gm.graph)) or gm.forward, fullgraph=True)(x)
    assert 'noah_zoo.poca.default' in compiled[0] and 'softmax' not in compiled[0]


@pytest.mark.export
@pytest.mark.parametrize('dynamo', [True, False])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning', 'ignore::torch.jit.TracerWarning')
def test_onnx_of_any_size(dynamo, tmp_path):
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    head, file = NoahHead(24, 5).eval(), tmp_path / 'head.onnx'
    kwargs = {'dynamic_axes': {'x': {0: 'batch', 2: 'height', 3: 'width'}, 'logits': {0: 'batch'}}}
    if dynamo:
        kwargs = {'dynamic_shapes': ({axis: torch.export.Dim.AUTO for axis in (0, 2, 3)},), 'verbose': False}
    torch.onnx.export(
        head, (torch.randn(2, 24, 3, 4),), file, dynamo=dynamo, input_names=['x'], output_names=['logits'], **kwargs)
    assert {node.domain for node in onnx.load(file).graph.node} == {''}  # operators of the standard only
    session = onnxruntime.InferenceSession(file)
    for shape in ((2, 24, 3, 4), (3, 24, 5, 2)):
        x = torch.randn(shape)
        logits, = session.run(['logits'], {'x': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), head(x), rtol=1e-5, atol=1e-5)


# Memory, and what else is told of it


def test_nothing_is_kept_for_backward():
    args = make(24, 50, drop_rate=0.1, dtype=torch.float32)
    x = torch.randn(4, 24, 7, 7, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, *args[:4])}
    for drop_rate in (0., 0.1):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            poca(x, *args, drop_rate=drop_rate, training=True)
        assert len(kept) >= 3
        assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in known) <= 1  # the seed


def test_flops_are_those_of_the_formula():
    args = make(dtype=torch.float32)
    counts = []
    for function in (poca, poca_reference):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function(torch.randn(2, 24, 7, 7), *args)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 49 * 20 * (3 + 3)


def test_kernels_that_do_not_work_are_told_of_once(monkeypatch, caplog):
    poca_triton = pytest.importorskip('noah_zoo.layers.poca_triton')
    device, one = torch.device('cpu'), torch.ones(1, 1)

    def fail(*args):
        raise OSError('no C\ncompiler')

    for forward, reason in (
            (fail, 'no C compiler'),
            (lambda *args: args[-2].fill_(2), 'they give 2.0 and 1.0 where 1 is right')):
        monkeypatch.setattr(poca_triton, 'forward', forward)
        monkeypatch.setattr(poca_triton, 'map_grads', lambda *args: (one, one))
        poca_triton.works.cache_clear()
        caplog.clear()
        assert not poca_triton.works(device) and not poca_triton.works(device)
        assert [(r.levelname, r.getMessage()) for r in caplog.records] == [(
            'WARNING', f'NOAH heads will be slow on cpu, as the Triton kernels cannot be used there: {reason}')]
    monkeypatch.setattr(poca_triton, 'forward', lambda *args: args[-2].fill_(1))
    poca_triton.works.cache_clear()
    assert poca_triton.works(device)
    poca_triton.works.cache_clear()


def test_an_error_of_a_kernel_is_the_callers(monkeypatch):
    def fail(*args):
        raise ValueError('what is wrong')

    monkeypatch.setattr(poca_module, 'poca_cpu', types.SimpleNamespace(supports=lambda *args: True, forward=fail))
    args = make()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # nothing remembers it
        with pytest.raises(ValueError, match='what is wrong'):
            poca(x, *args)
    monkeypatch.undo()
    torch.testing.assert_close(poca(x, *args), poca_reference(x, *args), rtol=1e-12, atol=1e-12)


def test_what_does_not_fit():
    key, key_bias, value, value_bias, *groups = make(dtype=torch.float32)
    x = torch.randn(2, 24, 3, 3)
    for given, message in (
            ((x[:, :8], key, key_bias, value, value_bias), 'key and value read 12 and 12 channels of 8'),
            ((x, key, key_bias, value[:-1], value_bias), 'weights of 20 and 19 maps; expected the same multiple of'),
            ((x, key[:18], key_bias, value[:18], value_bias), 'weights of 18 and 18 maps; .* num_groups=4')):
        with pytest.raises(ValueError, match=f'poca: {message}'):
            poca(*given, *groups)
