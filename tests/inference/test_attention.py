"""The maps of a NOAH model, against its logits and against the formula written out."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from noah_zoo import NoahHead, add_noah_head, attention_maps
from noah_zoo.catalog import CATALOG

ATTACHED = {  # a norm and a 1x1 layer after pooling; NHWC; class token; class attention; an attention pool
    'convnext_atto': {}, 'mobilenetv3_small_050': {}, 'swin_s3_tiny_224': {}, 'vit_tiny_patch16_224': {},
    'cait_xxs24_224': {}, 'vit_base_patch16_siglip_224': dict(depth=1), 'efficientvit_b0': {}}
TINY = {  # of the same kinds; the image has 64 pixels where its size is free
    'test_convnext': {}, 'mobilenetv3_small_050': {}, 'test_mambaout': {}, 'test_vit': dict(img_size=64),
    'test_vit3': dict(img_size=64)}


def spread(model):
    """Random weights of the head, biases too."""
    torch.manual_seed(1)
    for parameter in find_head(model).parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def find_head(model):
    return next(module for module in model.modules() if isinstance(module, NoahHead))


def check(model, images, tolerance=1e-5):
    key = find_head(model).key
    scores = attention_maps(model, images).attention.log().flatten(3)
    key.weight.data.mul_(2 / scores.std(-1).mean())  # features of random backbones are all but even
    with torch.no_grad():
        logits = model(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = attention_maps(model, images)
    batch, classes, blocks = *logits.shape, maps.attention.shape[1]
    assert torch.equal(maps.logits, logits)
    size = tuple(maps.merged.shape[-2:])
    assert maps.attention.shape == maps.value.shape == maps.poca.shape == (batch, blocks, classes, *size)
    scale = logits.abs().max().clamp(min=1)
    torch.testing.assert_close(maps.merged.sum((2, 3)) / scale, logits / scale, rtol=0, atol=tolerance)
    torch.testing.assert_close(maps.attention.sum((3, 4)), torch.ones(batch, blocks, classes))
    peaks, positions = maps.attention.amax((3, 4)), size[0] * size[1]
    assert maps.attention.min() >= 0 and (peaks.min() if positions >= 49 else peaks.mean()) > 1.5 / positions
    torch.testing.assert_close(maps.poca, maps.attention * maps.value)

    some = attention_maps(model, images, [classes - 1, 0], block=blocks - 1)
    for part in ('attention', 'value', 'poca'):
        torch.testing.assert_close(
            getattr(some, part), getattr(maps, part)[:, [blocks - 1]][:, :, [classes - 1, 0]], rtol=1e-4, atol=1e-5)
    assert some.merged.shape == (batch, 2, *size)
    assert not any(m.requires_grad for m in maps)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return maps


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', CATALOG)
def test_their_sum_is_the_logits(name):
    model = spread(timm.create_model(name, num_classes=12))
    maps = check(model, torch.randn(2, 3, 224, 224))
    assert maps.attention.shape[1] == CATALOG[name].num_groups
    assert maps.merged.shape[-2:] == ((7, 7) if 'patch16' not in name and '16_' not in name else (14, 14))


@pytest.mark.parametrize('name, side', [
    ('resnet18_noah', 2), ('mobilenetv2_035_noah', 2), ('shufflenetv2_100_noah', 2),
    ('deit_tiny_050_patch16_224_noah', 4), ('pvt_tiny_050_noah', 2), ('mixer_s16_050_224_noah', 4),
    ('gmlp_ti16_050_224_noah', 4)])
def test_their_sum_is_the_logits_of_small_images(name, side):
    model = spread(timm.create_model(name, num_classes=12, **dict(img_size=64) if side == 4 else {}))
    maps = check(model, torch.randn(2, 3, 64, 64))
    assert maps.attention.shape[1] == CATALOG[name].num_groups and maps.merged.shape[-2:] == (side, side)


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ATTACHED)
def test_on_any_timm_model(name):
    model = spread(add_noah_head(timm.create_model(name, num_classes=12, **ATTACHED[name])))
    check(model, torch.randn(2, *model.default_cfg['input_size']))


@pytest.mark.parametrize('name', TINY)
def test_on_tiny_models_of_timm(name):
    model = spread(add_noah_head(timm.create_model(name, num_classes=12, **TINY[name])))
    check(model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize('split', [{}, dict(split_kv=False), dict(split_groups=False, split_kv=False)])
@pytest.mark.parametrize('fmt', ['NCHW', 'NHWC', 'NLC'])
def test_against_the_formula(fmt, split):
    torch.manual_seed(0)
    head = NoahHead(24, 5, num_groups=3, input_fmt=fmt, **split)
    body = {'NCHW': nn.Identity(), 'NHWC': Last(), 'NLC': nn.Sequential(Last(), nn.Flatten(1, 2))}[fmt]
    model = spread(nn.Sequential(body, head))
    images = torch.randn(2, 24, 6, 4)
    maps = attention_maps(model, images)
    key = F.conv2d(images[:, :head.key_features], head.key.weight, head.key.bias, groups=head.conv_groups)
    value = F.conv2d(images[:, -head.value_features:], head.value.weight, head.value.bias, groups=head.conv_groups)
    attention = key.flatten(2).softmax(-1).view(2, 3, 5, 6, 4)
    torch.testing.assert_close(maps.attention, attention)
    torch.testing.assert_close(maps.value, value.view(2, 3, 5, 6, 4))
    torch.testing.assert_close(maps.merged, (attention * value.view(2, 3, 5, 6, 4)).sum(1))
    check(model, images)


class Last(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def test_tokens_lie_as_the_image_does():
    model = spread(timm.create_model('deit_tiny_050_patch16_224_noah', img_size=(64, 160), num_classes=3))
    assert check(model, torch.randn(2, 3, 64, 160)).merged.shape == (2, 3, 4, 10)


def test_cost_grows_with_the_classes_asked_for():
    def flops(*args):
        with FlopCounterMode(display=False) as counter:
            attention_maps(model, images, *args)
        return counter.get_total_flops()

    model, images = nn.Sequential(nn.Identity(), NoahHead(64, 1000)).eval(), torch.randn(2, 64, 7, 7)
    few, more, all_of_them, one_block = flops([1]), flops([1, 2, 3]), flops(), flops([1], 0)
    assert (all_of_them - few) == 999 * (more - few) / 2 and few - one_block == 3 / 4 * (more - few) / 2


def test_of_layers_with_something_on_them():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 3), NoahHead(24, 5)).eval()
    for layer in (model[1].key, model[1].value):
        torch.nn.utils.parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(2)
    maps = attention_maps(model, torch.randn(2, 3, 6, 6), classes=[3, 1])
    torch.testing.assert_close(maps.merged.sum((2, 3)), maps.logits[:, [3, 1]], rtol=1e-4, atol=1e-4)


def test_a_model_in_training_stays_so_and_learns_nothing():
    model = timm.create_model('resnet18_noah', num_classes=4, drop_rate=0.5).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    images = torch.randn(2, 3, 64, 64)
    maps = attention_maps(model, images)
    assert [module.training for module in model.modules()] == modes
    assert model.bn1.num_batches_tracked == 0 and model.fc.key.weight.requires_grad
    torch.testing.assert_close(maps.merged.sum((2, 3)), model.eval()(images), rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind_after_an_error():
    model = timm.create_model('resnet18_noah').train()
    with pytest.raises(RuntimeError, match='channels'):
        attention_maps(model, torch.randn(1, 5, 64, 64))
    assert model.training and not model.fc._forward_pre_hooks


@pytest.mark.parametrize('make', [
    lambda: nn.Sequential(nn.Conv2d(3, 24, 3), NoahHead(24, 4)),
    pytest.param(lambda: timm.create_model('mobilenetv2_035_noah', num_classes=4), marks=pytest.mark.export)])
def test_a_compiled_model(make):
    model, images = spread(make()), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend='eager')
    compiled(images)
    torch.testing.assert_close(attention_maps(compiled, images, 1).merged, attention_maps(model, images, 1).merged)


def test_low_precision():
    model = spread(timm.create_model('mobilenetv2_035_noah', num_classes=4))
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        maps = attention_maps(model, images)
    assert maps.poca.dtype == torch.float32
    torch.testing.assert_close(maps.merged.sum((2, 3)), maps.logits, rtol=0.02, atol=0.02)
    maps = attention_maps(model.double(), images.double())
    assert maps.poca.dtype == torch.float64
    torch.testing.assert_close(maps.merged.sum((2, 3)), maps.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('make, args, error, message', [
    (lambda: timm.create_model('resnet18'), (), ValueError, 'ResNet has no NOAH head; .*add_noah_head'),
    (lambda: timm.create_model('resnet18_noah', num_classes=0), (), ValueError, 'has no NOAH head'),
    (lambda: nn.Sequential(NoahHead(8, 2), NoahHead(8, 2)), (), ValueError, 'Sequential has 2 NOAH heads'),
    (lambda: timm.create_model('resnet18_noah', noah_variant='c'), (), ValueError, 'SigmoidAttention, a head of the'),
    (lambda: nn.Sequential(NoahHead(3, 2, 1)), ([0, 2],), IndexError, r'classes=\[0, 2\] .* 0 to 1'),
    (lambda: nn.Sequential(NoahHead(3, 2, 1)), (-1,), IndexError, 'classes=-1 .* 0 to 1'),
    (lambda: nn.Sequential(NoahHead(3, 2, 1)), ([],), IndexError, r'classes=\[\]'),
    (lambda: nn.Sequential(NoahHead(3, 2, 1)), (0.5,), IndexError, 'classes=0.5'),
    (lambda: nn.Sequential(NoahHead(3, 2, 1)), (None, 1), IndexError, 'block=1 .* 0 to 0')])
def test_bad_arguments(make, args, error, message):
    with pytest.raises(error, match=message):
        attention_maps(make(), torch.randn(1, 3, 32, 32), *args)


def test_an_image_without_its_batch():
    with pytest.raises(ValueError, match=r'images have the shape \[3, 32, 32\]; expected \(B, C, H, W\)'):
        attention_maps(nn.Sequential(NoahHead(3, 2, 1)), torch.randn(3, 32, 32))
