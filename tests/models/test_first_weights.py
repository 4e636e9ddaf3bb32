"""First weights of a head: the authors' for 1,000 classes and more, of one scale below; or the classifier that was."""
import json
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

import noah_zoo
from noah_zoo import NoahHead
from noah_zoo.layers.ablations import VARIANTS, head_class
from noah_zoo.layers.noah_head import KEY_SCALE, VALUE_SCALE


def std(tensor):
    return tensor.square().mean().sqrt().item()


@pytest.mark.parametrize('num_classes', [1000, 5089])
def test_for_many_classes_they_are_those_of_the_release(num_classes):
    torch.manual_seed(0)
    head = NoahHead(512, num_classes)
    torch.manual_seed(0)
    expected = nn.Conv2d(256, 4 * num_classes, 1, groups=4), nn.Conv2d(256, 4 * num_classes, 1, groups=4)
    for conv in expected:
        nn.init.kaiming_normal_(conv.weight, mode='fan_out')
    for conv, other in zip((head.key, head.value), expected):
        assert torch.equal(conv.weight, other.weight) and not conv.bias.any()
        assert std(conv.weight) == pytest.approx(math.sqrt(2 / (4 * num_classes)), rel=0.01)


@pytest.mark.parametrize('num_classes, in_features, num_groups, key_ratio', [
    pytest.param(num_classes, *sizes, marks=pytest.mark.exhaustive if num_classes * sizes[0] > 2e5 else ())
    for num_classes in (2, 10, 999) for sizes in ((192, 4, 1 / 2), (1280, 8, 1 / 4), (2048, 1, 1 / 8))])
@pytest.mark.parametrize('splits', [{}, dict(split_kv=False), dict(split_kv=False, split_groups=False)])
def test_for_few_classes_scores_and_logits_have_one_scale(num_classes, in_features, num_groups, key_ratio, splits):
    torch.manual_seed(0)
    x = torch.randn(200, in_features, 1, 1)  # of one position, whose attention is 1
    heads = [NoahHead(in_features, num_classes, num_groups, key_ratio, **splits) for _ in range(8)]
    with torch.no_grad():
        scores = std(torch.stack([head.key(x[:, :head.key_features]) for head in heads]))
        logits = std(torch.stack([head(x) for head in heads]))
    assert scores == pytest.approx(KEY_SCALE, rel=0.1)
    assert logits == pytest.approx(VALUE_SCALE, rel=0.15)
    assert all(not layer.bias.any() for head in heads for layer in (head.key, head.value))
    NoahHead(8, 0).reset_parameters()  # there is nothing to reset


def scales(head):
    return {name: std(p) for name, p in head.named_parameters() if name.endswith('weight')}


@pytest.fixture(scope='module')
def resnet18(tmp_path_factory):
    """A folder with a model of three classes."""
    folder = tmp_path_factory.mktemp('resnet18')
    save_for_hf(timm.create_model('resnet18', num_classes=3), str(folder), safe_serialization=True)
    return f'local-dir:{folder}'


def test_for_many_classes_no_head_begins_as_pooling():
    torch.manual_seed(0)
    reset = timm.create_model('noah', backbone='test_resnet', num_classes=5)
    reset.reset_classifier(1000)
    for model in (
            reset, timm.create_model('noah', backbone='test_resnet'), timm.create_model('mobilenetv2_035_noah'),
            noah_zoo.add_noah_head(timm.create_model('test_resnet'))):
        head = model.get_classifier()
        drawn = scales(NoahHead(head.in_features, 1000, head.num_groups, head.key_ratio))
        assert scales(head) == pytest.approx(drawn, rel=0.05)


@pytest.mark.parametrize('num_classes', [10, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_whatever_makes_a_head_makes_it_so(num_classes, resnet18, tmp_path):
    torch.manual_seed(0)
    drawn = {ratio: scales(NoahHead(512, num_classes, key_ratio=ratio)) for ratio in (1 / 2, 1 / 8)}
    of_any = dict(backbone='resnet18', num_classes=num_classes)
    tokens = dict(num_classes=num_classes, img_size=32, patch_size=8)  # 96 channels, with random keys
    for name in 'deit_tiny_050_patch16_224_noah', 'noah':
        model = timm.create_model(
            name, **tokens, **(dict(backbone='deit_tiny_050_patch16_224') if name == 'noah' else {}))
        expected = scales(NoahHead(96, num_classes, key_ratio=model.noah_cfg['key_ratio']))
        assert scales(model.get_classifier()) == pytest.approx(expected, rel=0.15)
    asked_for = [
        timm.create_model('resnet18_noah', num_classes=num_classes, init='random'),
        timm.create_model('resnet18_noah', num_classes=num_classes, pretrained_backbone=resnet18, init='random'),
        noah_zoo.add_noah_head(timm.create_model('resnet18', num_classes=num_classes), init='random')]
    for model in asked_for:
        assert scales(model.get_classifier()) == pytest.approx(drawn[model.noah_cfg['key_ratio']], rel=0.15)
    save_for_hf(timm.create_model('resnet18_noah', num_classes=3), str(tmp_path), safe_serialization=True)
    reset = timm.create_model('resnet18_noah', num_classes=5)
    reset.reset_classifier(num_classes)
    on_weights = [
        reset, timm.create_model('resnet18_noah', num_classes=num_classes), timm.create_model('noah', **of_any),
        noah_zoo.add_noah_head(timm.create_model('resnet18', num_classes=num_classes)),
        timm.create_model('resnet18_noah', num_classes=num_classes, pretrained_backbone=resnet18),
        timm.create_model('noah', pretrained_backbone=resnet18, **of_any),
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=num_classes)]
    as_pooling = [
        timm.create_model('resnet18_noah', num_classes=num_classes, init='pooling'),
        timm.create_model('noah', init='pooling', **of_any),
        noah_zoo.add_noah_head(timm.create_model('resnet18', num_classes=num_classes), init='pooling')]
    if num_classes == 10:
        as_pooling += on_weights  # and convolutional models without
    else:
        for model in on_weights:
            assert scales(model.get_classifier()) == pytest.approx(drawn[model.noah_cfg['key_ratio']], rel=0.05)
    for model in as_pooling:
        expected = {**drawn[model.noah_cfg['key_ratio']], 'key.weight': 0.}
        assert scales(model.get_classifier()) == pytest.approx(expected, rel=0.15)
    assert timm.create_model('resnet18_noah', num_classes=0, init='pooling').num_classes == 0


def test_a_new_head_gives_an_eighth_of_the_channels_to_the_keys(resnet18, tmp_path):
    def add(**kwargs):
        return noah_zoo.add_noah_head(timm.create_model('test_resnet', num_classes=3), **kwargs)

    save_for_hf(timm.create_model('test_resnet', num_classes=3), str(tmp_path / 'twin'), safe_serialization=True)
    of_few = dict(backbone='test_resnet', num_classes=10)
    models = [
        add(), add(num_classes=1000), add(init='classifier'), add(init='random'),
        timm.create_model('noah', backbone='test_resnet'), timm.create_model('noah', **of_few),
        timm.create_model('noah', pretrained_backbone=f'local-dir:{tmp_path / "twin"}', **of_few),
        timm.create_model('noah', init='random', **of_few)]
    for model in models:
        assert (model.noah_cfg['num_groups'], model.noah_cfg['key_ratio']) == (4, 1 / 8)
    models[1].load_state_dict(models[4].state_dict())
    assert add(key_ratio=1 / 4).noah_cfg['key_ratio'] == 1 / 4
    registered = timm.create_model('resnet18_noah', num_classes=10, pretrained_backbone=resnet18)
    assert registered.noah_cfg['key_ratio'] == 1 / 2  # the paper's
    for number, model in enumerate((models[0], add(key_ratio=1 / 4))):
        save_for_hf(model, str(tmp_path / str(number)), safe_serialization=True)
        again = timm.create_model(f'local-dir:{tmp_path / str(number)}', pretrained=True)
        assert again.noah_cfg == model.noah_cfg and again.fc.value.weight.equal(model.fc.value.weight)


def test_weights_with_another_head_are_refused_with_what_to_give(tmp_path):
    model = timm.create_model('noah', num_classes=3, key_ratio=0.5)
    save_file(model.state_dict(), tmp_path / 'half.safetensors')
    overlay = dict(file=str(tmp_path / 'half.safetensors'), num_classes=3)
    create = dict(model_name='noah', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    shapes = r'noah: the weights have a head whose key and value are \[\[12, 64, 1, 1\], \[12, 64, 1, 1\]\], in the '
    with pytest.raises(RuntimeError, match=shapes + r'model they are .*\[12, 112, 1, 1\]\]; give key_ratio=0.5$'):
        timm.create_model(**create)
    again = timm.create_model(key_ratio=0.5, **create)
    assert again.fc.value.weight.equal(model.fc.value.weight)
    with pytest.raises(RuntimeError, match='resnet18_noah: .*; give key_ratio=0.5'):
        timm.create_model(**{**create, 'model_name': 'resnet18_noah'}, key_ratio=0.25)
    for other in (dict(split_kv=False), dict(split_groups=False), dict(num_groups=2)):  # no ratio would do
        with pytest.raises(RuntimeError, match='give the num_classes, num_groups, key_ratio, split_groups and'):
            timm.create_model(**create, **other)


def test_a_saved_model_says_nothing_of_what_it_began_with(resnet18, tmp_path):
    model = timm.create_model('noah', num_classes=3, pretrained_backbone=resnet18, init='classifier')
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    args = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert args.keys() >= {'backbone', 'key_ratio'} and not args.keys() & {'pretrained_backbone', 'init'}
    anew = timm.create_model(f'local-dir:{tmp_path}')  # without weights, as every model of timm
    assert not anew.conv1.weight.equal(model.conv1.weight)


def test_a_saved_init_was_for_the_first_head(tmp_path):
    args = dict(init='random')
    model = timm.create_model('resnet18_noah', num_classes=3, **args)
    save_for_hf(model, str(tmp_path), safe_serialization=True, model_args=args)
    create = dict(model_name=f'local-dir:{tmp_path}', pretrained=True)
    assert timm.create_model(**create).fc.key.weight.equal(model.fc.key.weight)
    assert not timm.create_model(num_classes=5, **create).fc.key.weight.any()
    model.reset_classifier(5)
    assert not model.fc.key.weight.any()
    model.draw_classifier(5)
    assert model.fc.key.weight.any()


def test_to_begin_as_pooling_takes_no_other_random_numbers():
    values = []
    for init in 'random', 'pooling':
        torch.manual_seed(0)
        model = noah_zoo.add_noah_head(timm.create_model('resnet18', num_classes=7), key_ratio=0.5, init=init)
        values.append((model.fc.value.weight, torch.rand(())))
    assert torch.equal(values[0][0], values[1][0]) and values[0][1] == values[1][1]


@pytest.mark.parametrize('variant', VARIANTS)
def test_no_variant_starts_with_large_logits(variant):
    torch.manual_seed(0)
    x = torch.randn(64, 512, 4, 4)
    with torch.no_grad():
        few, many = (
            std(head_class(variant)(512, k, num_groups=4, key_ratio=0.5).eval()(x)) for k in (10, 1000))
    assert 0 < few < 2 * max(many, 0.15)  # a softmax across 1,000 classes makes small logits


# 'max' takes a maximum, 'd' sees zeros around the map.
@pytest.mark.parametrize('variant', [None, *(name for name in VARIANTS if name not in ('max', 'd'))])
def test_a_head_that_begins_as_pooling_sees_the_average_only(variant):
    torch.manual_seed(0)
    x = torch.randn(8, 512, 4, 4)
    average = x.mean((2, 3), keepdim=True).expand_as(x)
    head = head_class(variant)(512, 10, num_groups=4, key_ratio=0.5).eval()
    with torch.no_grad():
        assert not torch.allclose(head(x), head(average), atol=1e-3)
        head.begin_as_pooling()
        torch.testing.assert_close(head(x), head(average))


# The classifier that is there


IMAGE = (2, 3, 64, 64)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_050', 'test_byobnet', 'pvt_tiny_050'])
@pytest.mark.parametrize('splits', [{}, dict(split_groups=False)])
def test_the_logits_begin_as_those_of_the_classifier(name, splits):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        own = model(x)
        assert noah_zoo.add_noah_head(model, split_kv=False, init='classifier', **splits) is model
        torch.testing.assert_close(model.eval()(x), own, rtol=0, atol=1e-5 * own.abs().max().item())
    weights = model.get_classifier().value.weight.unflatten(0, (-1, 7)).flatten(2)
    assert not torch.allclose(weights[0], weights[1])  # blocks that begin alike would stay alike


def test_with_a_key_they_are_those_of_the_value_channels():
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=7).eval()
    x, weight, bias = torch.randn(IMAGE), model.fc.weight, model.fc.bias
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        noah_zoo.add_noah_head(model, num_groups=4, key_ratio=1 / 4, init='classifier')
        torch.testing.assert_close(
            model.eval()(x), pooled[:, 128:] @ weight[:, 128:].T + bias, rtol=1e-5, atol=1e-6)
        assert not model.fc.key.weight.any()
    model.train()(x).square().sum().backward()
    assert model.fc.key.weight.grad.abs().max() > 0  # it learns from there


def test_a_convolution_is_a_classifier_too_and_a_bias_may_lack():
    torch.manual_seed(0)
    head = NoahHead(32, 5, split_kv=False)
    conv = nn.Conv2d(32, 5, 1, bias=False)
    head.begin_as_linear(conv.weight, conv.bias)
    x = torch.randn(3, 32, 4, 4)
    torch.testing.assert_close(head(x), conv(x).mean((2, 3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r'weights \[5, 31\] does not fit; expected \[5, 32\]'):
        head.begin_as_linear(torch.zeros(5, 31))


@pytest.mark.parametrize('name, create, kwargs, message', [
    ('test_resnet', {}, dict(num_classes=3), 'its classifier has 7 classes, the head is to have 3'),
    ('test_resnet', {}, dict(noah_variant='c'), 'SigmoidAttention is not the head of the paper'),
    ('test_resnet', dict(global_pool='max'), {}, 'does not read the average over positions'),
    ('test_resnet', dict(global_pool='catavgmax'), {}, 'does not read the average over positions'),
    ('test_vit', {}, {}, 'does not read the average over positions'),  # a class token
    ('test_vit', dict(global_pool='avg', pool_include_prefix=True), {}, 'does not read the average over positions'),
    ('test_resnet', {}, dict(init='linear'), "init='linear' is not one of pooling, random, classifier"),
])
def test_refused_and_unchanged(name, create, kwargs, message):
    model = timm.create_model(name, num_classes=7, **create)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        noah_zoo.add_noah_head(model, **{**dict(init='classifier'), **kwargs})
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert type(model).__module__.startswith('timm')


def test_no_linear_classifier():
    model = timm.create_model('resnet18', num_classes=7)
    model.fc = nn.Sequential(nn.Linear(512, 7))
    with pytest.raises(ValueError, match="resnet18: init='classifier': it has no linear classifier"):
        noah_zoo.add_noah_head(model, init='classifier')


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight), self.bias)


def with_statistics(model):
    """A model whose batch norms are as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 2)
    return model


@pytest.mark.parametrize('name', [
    'test_resnet', 'efficientvit_m0', pytest.param('efficientformerv2_s0', marks=pytest.mark.exhaustive)])  # two heads
def test_more_than_a_linear_layer(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    if name == 'test_resnet':
        model.fc = Cosine(96, 7)
    with pytest.raises(ValueError, match='its classifier is more than one linear layer'):
        noah_zoo.add_noah_head(with_statistics(model), init='classifier')
    assert type(model).__module__.startswith('timm')


@pytest.mark.parametrize('name', [
    'efficientvit_m0', *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ('levit_128s', 'repvit_m1'))])
def test_weights_of_more_than_a_linear_layer(name, tmp_path):
    torch.manual_seed(0)
    source = with_statistics(timm.create_model(name, num_classes=7))  # the layer is behind a norm in the classifier
    save_for_hf(source, str(tmp_path / 'model'), safe_serialization=True)
    torch.save(source.state_dict(), tmp_path / 'model.pth')
    for weights in (f'local-dir:{tmp_path / "model"}', str(tmp_path / 'model.pth')):
        with pytest.raises(ValueError, match='more than one linear layer|has no linear classifier'):
            timm.create_model('noah', backbone=name, num_classes=7, pretrained_backbone=weights, init='classifier')


def test_the_pooling_is_that_of_the_source(tmp_path):
    save_for_hf(
        timm.create_model('test_resnet', num_classes=7, global_pool='max'), str(tmp_path), safe_serialization=True)
    kwargs = dict(pretrained_backbone=f'local-dir:{tmp_path}', init='classifier')
    with pytest.raises(ValueError, match='its classifier does not read the average over positions'):
        timm.create_model('noah', backbone='test_resnet', num_classes=7, **kwargs)
    with pytest.raises(ValueError, match='a head of 0 classes starts from none'):
        timm.create_model('noah', backbone='test_resnet', num_classes=0, **kwargs)


def test_weights_of_another_backbone_are_called_that(tmp_path):
    save_for_hf(timm.create_model('test_resnet', num_classes=7), str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match="does not fit resnet18's backbone"):
        timm.create_model(
            'resnet18_noah', num_classes=7, pretrained_backbone=f'local-dir:{tmp_path}', init='classifier')


def test_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    twin, x = timm.create_model('resnet18', num_classes=7).eval(), torch.randn(IMAGE)
    torch.save(twin.state_dict(), tmp_path / 'twin.pth')
    model = timm.create_model(
        'resnet18_noah', num_classes=7, split_kv=False, pretrained_backbone=str(tmp_path / 'twin.pth'),
        init='classifier').eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)


def test_a_classifier_on_meta():
    with torch.device('meta'):
        model = timm.create_model('resnet18', num_classes=7)
    with pytest.raises(ValueError, match='its weights are on the meta device'):
        noah_zoo.add_noah_head(model, init='classifier')
    assert type(model).__module__.startswith('timm')


@pytest.mark.parametrize('name, twin', [
    ('deit_tiny_050_patch16_224_noah', 'deit_tiny_050_patch16_224'), ('pvt_tiny_050_noah', 'pvt_tiny_050')])
def test_a_classifier_of_a_class_token_is_refused_by_name(name, twin, tmp_path):
    save_for_hf(timm.create_model(twin, num_classes=7), str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match='its classifier reads a class token, not the average over positions'):
        timm.create_model(name, num_classes=7, pretrained_backbone=f'local-dir:{tmp_path}', init='classifier')


def test_the_pooling_is_tried_in_evaluation(tmp_path):
    twin = timm.create_model('mobilenetv4_conv_small_035', num_classes=7)  # a batch norm comes after pooling
    save_for_hf(twin, str(tmp_path), safe_serialization=True)
    model = timm.create_model(
        'noah', backbone='mobilenetv4_conv_small_035', num_classes=7, pretrained_backbone=f'local-dir:{tmp_path}',
        init='classifier')
    assert model.training and all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers()))
    assert torch.equal(model.get_classifier().value.weight.unflatten(0, (-1, 7)).transpose(0, 1).flatten(1),
                       twin.classifier.weight[:, -model.get_classifier().value_features:])


@pytest.mark.parametrize('name, twin, kwargs', [
    ('noah', 'test_resnet', dict(backbone='test_resnet')), ('resnet18_noah', 'resnet18', {})])
def test_by_name(name, twin, kwargs, tmp_path):
    torch.manual_seed(0)
    twin = timm.create_model(twin, num_classes=7).eval()
    save_for_hf(twin, str(tmp_path / 'twin'), safe_serialization=True)
    source = f'local-dir:{tmp_path / "twin"}'
    kwargs = dict(kwargs, pretrained_backbone=source, init='classifier')
    model = timm.create_model(name, num_classes=7, split_kv=False, **kwargs).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        own = twin(x)
        torch.testing.assert_close(model(x), own, rtol=0, atol=1e-5 * own.abs().max().item())
        nn.init.normal_(model.fc.key.weight)
        save_for_hf(model, str(tmp_path / 'noah'), safe_serialization=True)
        again = timm.create_model(f'local-dir:{tmp_path / "noah"}', pretrained=True).eval()
        assert torch.equal(again(x), model(x))  # and not the classifier once more
    for change, message in (
            (dict(num_classes=5), 'its classifier has 7 classes, the head is to have 5'),
            (dict(init='x'), "init='x' is not one of"),
            (dict(pretrained_backbone=None), 'needs pretrained_backbone='),
            (dict(noah_variant='c'), 'SigmoidAttention is not the head of the paper')):
        with pytest.raises(ValueError, match=message):
            timm.create_model(name, **{**dict(num_classes=7), **kwargs, **change})
    with pytest.raises(ValueError, match="pretrained=True and init='classifier' exclude each other"):
        timm.create_model(
            'mobilenetv2_035_noah.fashion_mnist', pretrained=True, init='classifier')
