"""The head against a plain loop, its layouts and dtypes, and what it refuses."""
import copy
import itertools

import pytest
import timm
import torch
import torch.nn.utils.prune

from noah_zoo import NoahHead
from noah_zoo.layers.noah_head import is_plain


def loop_reference(head, x_BCL):
    """The head written as loops over images, groups and classes, from the paper's formula."""
    B, C, L = x_BCL.shape
    N, K = head.num_groups, head.num_classes
    Ck = int(C * head.key_ratio) if head.split_kv else C
    x_key, x_value = (x_BCL[:, :Ck], x_BCL[:, Ck:]) if head.split_kv else (x_BCL, x_BCL)
    out = x_BCL.new_zeros(B, K)
    for b, n, k in itertools.product(range(B), range(N), range(K)):
        parts = []
        for x, conv in ((x_key, head.key), (x_value, head.value)):
            width = x.shape[1] // N if head.split_groups else x.shape[1]
            start = n * width if head.split_groups else 0
            weight, bias = conv.weight[n * K + k, :, 0, 0], conv.bias[n * K + k]
            parts.append(torch.stack([weight @ x[b, start:start + width, i] + bias for i in range(L)]))
        attention = torch.exp(parts[0]) / torch.exp(parts[0]).sum()
        out[b, k] += (attention * parts[1]).sum()
    return out


@pytest.mark.parametrize('split_groups', [True, False])
@pytest.mark.parametrize('split_kv', [True, False])
@pytest.mark.parametrize('num_groups, key_ratio', [(1, 0.5), (4, 0.5), (2, 0.25)])
def test_formula(num_groups, key_ratio, split_kv, split_groups):
    torch.manual_seed(0)
    head = NoahHead(
        16, 3, num_groups, key_ratio, split_groups=split_groups, split_kv=split_kv, dtype=torch.float64)
    torch.nn.init.normal_(head.key.bias)
    torch.nn.init.normal_(head.value.bias)
    x = torch.randn(2, 16, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(head(x), loop_reference(head, x.flatten(2)), rtol=1e-12, atol=1e-12)


def test_input_formats_agree():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    head = NoahHead(16, 7, dtype=torch.float64)
    expected = head(x)
    for input_fmt, given in (('NHWC', x.permute(0, 2, 3, 1)), ('NLC', x.flatten(2).transpose(1, 2))):
        other = NoahHead(16, 7, input_fmt=input_fmt, dtype=torch.float64)
        other.load_state_dict(head.state_dict())
        torch.testing.assert_close(other(given), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other(given.contiguous()), expected, rtol=1e-12, atol=1e-12)
    channels_last = copy.deepcopy(head).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        channels_last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('size', [(1, 1), (7, 7), (3, 11)])
def test_any_spatial_size(size):
    assert NoahHead(16, 7)(torch.randn(2, 16, *size)).shape == (2, 7)


def test_one_position_is_a_linear_layer():
    # With a single position the attention is 1: only the value is left.
    torch.manual_seed(0)
    head = NoahHead(16, 5, num_groups=2)
    x = torch.randn(3, 16, 1, 1)
    weight = head.value.weight.view(2, 5, 4)
    expected = torch.einsum('bnc,nkc->bk', x.view(3, 16)[:, 8:].view(3, 2, 4), weight)
    torch.testing.assert_close(head(x), expected, rtol=1e-5, atol=1e-6)


def test_parameters():
    # C=512, N=4, r=1/2, K=1000: 4000 * 64 weights and 4000 biases, twice.
    assert sum(p.numel() for p in NoahHead(512, 1000).parameters()) == 2 * (4000 * 64 + 4000)
    assert sum(p.numel() for p in NoahHead(2048, 1000, split_kv=False, split_groups=False).parameters()) \
        == 2 * (4000 * 2048 + 4000)


def test_initialisation():
    torch.manual_seed(0)
    head = NoahHead(512, 1000)
    for conv in (head.key, head.value):
        assert not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx((2 / 4000) ** 0.5, rel=0.02)


def test_no_classes_is_average_pooling():
    x = torch.randn(2, 16, 3, 5)
    head = NoahHead(16, 0)
    assert not list(head.parameters())
    torch.testing.assert_close(head(x), x.mean((2, 3)))
    torch.testing.assert_close(torch.jit.script(head)(x), x.mean((2, 3)))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision(dtype, tolerance):
    torch.manual_seed(0)
    head = NoahHead(64, 10)
    x = torch.randn(4, 64, 7, 7)
    expected = head(x)
    half = copy.deepcopy(head).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert (half.float() - expected).abs().max() <= tolerance * expected.abs().max()
    with torch.autocast('cpu', dtype):
        cast = head(x)
    assert (cast.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_gradients():
    torch.manual_seed(0)
    head = NoahHead(8, 3, num_groups=2, dtype=torch.float64)
    x = torch.randn(2, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, x)
    head(x).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    assert head.key.bias.grad.abs().max() < 1e-12 * head.value.bias.grad.abs().max()  # it cancels in the softmax
    assert head.key.weight.grad.abs().max() > 1e-3


def test_dropout_is_on_the_values():
    torch.manual_seed(0)
    head = NoahHead(16, 5, drop_rate=0.5, dtype=torch.float64)
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    expected = head.eval()(x)
    assert torch.equal(head(x), expected)
    head.train()
    samples = torch.cat([head(x.expand(64, -1, -1, -1)) for _ in range(64)])
    assert samples.std(dim=0).min() > 1e-3
    error = (samples.mean(dim=0) - expected[0]).abs() / (samples.std(dim=0) / len(samples) ** 0.5)
    assert error.max() < 5  # standard errors


def test_compilers():
    torch.manual_seed(0)
    head = NoahHead(16, 5, input_fmt='NLC').eval()
    x = torch.randn(2, 9, 16)
    expected = head(x)
    for compiled in (
            torch.jit.script(head), torch.jit.trace(head, x), torch.fx.symbolic_trace(head),
            torch.compile(head, fullgraph=True, backend='eager'), torch.export.export(head, (x,)).module()):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)


def test_device_and_dtype():
    head = NoahHead(16, 5, device='meta', dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {('meta', torch.float16)}


@pytest.mark.parametrize('kwargs, message', [
    (dict(key_ratio=0.), 'key_ratio=0.0 is not a number strictly between 0 and 1'),
    (dict(key_ratio=1.), 'key_ratio=1.0 is not a number strictly between 0 and 1'),
    (dict(key_ratio=-0.5), 'key_ratio=-0.5 is not'),
    (dict(key_ratio=float('nan')), 'key_ratio=nan is not'),
    (dict(key_ratio=0.3), r'key_ratio=0.3 gives 614 key channels of 2048, not a positive multiple of num_groups=4; '
                          r'choose key_ratio=0.298828125 or 0.30078125'),
    (dict(key_ratio=0.0001), 'gives 0 key channels of 2048.*choose key_ratio=0.001953125'),
    (dict(num_groups=3), 'in_features=2048 is not a multiple of num_groups=3; choose num_groups from'),
    (dict(num_groups=3, split_kv=False), 'in_features=2048 is not a multiple of num_groups=3'),
    (dict(num_groups=2048), 'cannot give each of num_groups=2048 a key and a value channel'),
    (dict(num_groups=0), 'num_groups=0'),
    (dict(num_classes=-1), 'num_classes=-1'),
    (dict(drop_rate=1.), r'drop_rate=1.0 is not in \[0, 1\)'),
    (dict(drop_rate=-0.1), 'drop_rate=-0.1'),
    (dict(input_fmt='NCL'), "input_fmt='NCL' is not one of NCHW, NHWC, NLC"),
])
def test_refused_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NoahHead(**{'in_features': 2048, 'num_classes': 10, **kwargs})


@pytest.mark.parametrize('in_features, num_groups', [(49, 1), (96, 4), (98, 2), (1000, 8), (1280, 8), (2048, 4)])
def test_proposed_ratios_are_accepted(in_features, num_groups):
    proposed = 0
    for percent in range(1, 100):
        try:
            NoahHead(in_features, 2, num_groups, percent / 100, device='meta')
        except ValueError as error:
            for ratio in str(error).split('choose key_ratio=')[1].split(' or '):
                NoahHead(in_features, 2, num_groups, float(ratio), device='meta')
                proposed += 1
    assert proposed or num_groups == 1


def test_splits_lift_what_they_need():
    NoahHead(6, 2, num_groups=4, split_groups=False)  # dense embeddings: nothing to divide
    NoahHead(8, 2, num_groups=4, key_ratio=2., split_kv=False)  # the ratio is not used


@pytest.mark.parametrize('input_fmt, shape, words', [
    ('NCHW', (2, 16, 9), r'shape \[2, 16, 9\]; expected 4 dimensions in the order NCHW with 16 channels'),
    ('NCHW', (2, 8, 3, 3), r'shape \[2, 8, 3, 3\]'),
    ('NHWC', (2, 16, 3, 3), 'in the order NHWC'),
    ('NLC', (2, 16, 3, 3), 'expected 3 dimensions'),
    ('NLC', (2, 9, 15), 'with 16 channels'),
])
def test_refused_inputs(input_fmt, shape, words):
    head = NoahHead(16, 5, input_fmt=input_fmt)
    with pytest.raises(ValueError, match=words):
        head(torch.randn(shape))
    with pytest.raises(torch.jit.Error, match='expected'):
        torch.jit.script(head)(torch.randn(shape))


# What others put on the layers


def prune_all(layer):
    torch.nn.utils.prune.l1_unstructured(layer, 'weight', 0.5)


class LowRank(torch.nn.Module):
    """As adapters do it: the layer, frozen, and beside it a product of two small ones."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = torch.nn.Conv2d(layer.in_channels, 2, 1, bias=False)
        self.up = torch.nn.Conv2d(2, layer.out_channels, 1, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def with_something(name, head):
    """Put it on both layers; a name of a parameter of its own, which training has to move."""
    norms, parametrizations = torch.nn.utils, torch.nn.utils.parametrizations
    functions = {
        'prune': (prune_all, 'weight_orig'), 'weight_norm by hooks': (norms.weight_norm, 'weight_g'),
        'spectral_norm by hooks': (norms.spectral_norm, 'weight_orig'),
        'weight_norm': (parametrizations.weight_norm, 'parametrizations.weight.original0'),
        'spectral_norm': (parametrizations.spectral_norm, 'parametrizations.weight.original'),
        'adapter': (None, 'up.weight')}
    function, parameter = functions[name]
    for layer in ('key', 'value'):
        if function is None:
            setattr(head, layer, LowRank(getattr(head, layer)))
        else:
            function(getattr(head, layer))
    return parameter


@pytest.mark.parametrize('name', [
    'prune', 'weight_norm by hooks', 'spectral_norm by hooks', 'weight_norm', 'spectral_norm', 'adapter'])
@pytest.mark.filterwarnings('ignore:.*deprecated:FutureWarning')
def test_what_is_put_on_the_layers_has_effect_and_trains(name):
    torch.manual_seed(0)
    head = NoahHead(24, 5)
    parameter = with_something(name, head)
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    for _ in range(2):  # the second step fails where a graph of the first is held
        x = torch.randn(2, 24, 3, 3)
        head.eval()  # a call in training changes what spectral_norm does
        key, value = head.key(x[:, :12]), head.value(x[:, 12:])
        torch.testing.assert_close(
            head(x), (key.flatten(2).softmax(2) * value.flatten(2)).unflatten(1, (4, 5)).sum((1, 3)))
        head.train()
        optimizer.zero_grad()
        head(x).square().sum().backward()
        optimizer.step()
    after = dict(head.named_parameters())
    for layer in ('key', 'value'):
        assert not torch.equal(after[f'{layer}.{parameter}'], before[f'{layer}.{parameter}'])


def test_hooks_of_the_layers_are_called():
    head, seen = NoahHead(24, 5), []
    x = torch.randn(2, 24, 3, 3, requires_grad=True)
    expected = head(x)
    for name, layer in (('key', head.key), ('value', head.value)):
        for register in ('forward', 'forward_pre', 'full_backward', 'full_backward_pre'):
            handle = getattr(layer, f'register_{register}_hook')(lambda *args, name=name: seen.append(name))
            torch.testing.assert_close(head(x), expected)
            head(x).sum().backward()
            handle.remove()
    assert seen.count('key') == seen.count('value') >= 4
    assert is_plain(head.key) and is_plain(head.value)  # nothing is left behind


@pytest.mark.parametrize('layer', [
    torch.nn.Conv2d(12, 20, 3, padding=1, groups=4), torch.nn.Conv2d(12, 20, 1),
    torch.nn.Sequential(torch.nn.Conv2d(12, 20, 1, groups=4), torch.nn.Tanh())])
def test_another_layer_in_their_place(layer):
    head, x = NoahHead(24, 5), torch.randn(2, 24, 3, 3)
    head.key = layer
    torch.testing.assert_close(head(x), head.compose(x))


def test_heads_that_were_pickled_before_there_was_a_choice():
    head = NoahHead(24, 5)
    del head.__dict__['fused_attn']
    assert head(torch.randn(2, 24, 3, 3)).shape == (2, 5)


def test_offloaded_to_another_place():
    accelerate = pytest.importorskip('accelerate')
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 3), NoahHead(24, 5)).eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    accelerate.cpu_offload(model, torch.device('cpu'))
    assert model[1].key.weight.is_meta
    torch.testing.assert_close(model(x), expected)


def test_derivatives_of_any_order_without_the_fused_form():
    torch.manual_seed(0)
    head = NoahHead(24, 5).double()
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(head.parameters())
    for what in (x, parameters):  # a gradient penalty; a product with the Hessian
        gradients = torch.autograd.grad(head(x).square().sum(), what, create_graph=True)
        with pytest.raises(RuntimeError, match='head.fused_attn = False'):
            torch.autograd.grad(gradients, what, [torch.ones_like(g) for g in gradients])
    head.fused_attn = False
    assert torch.autograd.gradgradcheck(lambda x: head(x), x[:1, :, :2, :1])
    gradients = torch.autograd.grad(head(x).square().sum(), parameters, create_graph=True)
    product = torch.autograd.grad(gradients, parameters, [torch.ones_like(g) for g in gradients])
    assert all(p.isfinite().all() for p in product)


def test_functions_of_torch_func():
    torch.manual_seed(0)
    head = NoahHead(24, 5).double()
    parameters = {name: p.detach() for name, p in head.named_parameters()}
    x = torch.randn(3, 24, 3, 3, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(head, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        alone = torch.autograd.grad(head(x[i:i + 1]).square().sum(), [*head.parameters()])
        for name, expected in zip(parameters, alone):
            torch.testing.assert_close(each[name][i], expected)
    _, tangent = torch.func.jvp(head, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, (head(x + 1e-6) - head(x - 1e-6)) / 2e-6, rtol=1e-5, atol=1e-6)


def test_timm_says_how_the_fused_form_starts():
    timm.layers.set_fused_attn(False)
    try:
        assert not NoahHead(24, 5).fused_attn
    finally:
        timm.layers.set_fused_attn(True)
    assert NoahHead(24, 5).fused_attn
