"""Arguments of the operator, and how results are compared."""
import torch

from noah_zoo import NoahHead

SPLITS = [(True, True), (True, False), (False, True), (False, False)]


def make(channels=24, classes=5, groups=4, ratio=0.5, split_groups=True, split_kv=True, dtype=torch.float64, **kwargs):
    """Arguments of `poca` but for the features: weights of a head, all of them random."""
    head = NoahHead(
        channels, classes, groups, ratio, split_groups=split_groups, split_kv=split_kv, dtype=dtype, **kwargs)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    return (head.key.weight, head.key.bias, head.value.weight, head.value.bias, groups, head.conv_groups)


def as_double(args):
    return [a.detach().double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]


def assert_close(actual, expected, tolerance):
    """Largest difference over largest entry; an expectation of zero (the key bias, but for rounding) is met by zero."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        scale = theirs.abs().max()
        error = (ours.double() - theirs.double()).abs().max()
        assert error <= tolerance * scale or (scale < 1e-9 and error < 1e-9), (error / scale, ours.shape)
