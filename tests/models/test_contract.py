"""What timm asks of a model, for every name of the catalog, and what NOAH adds to it."""
import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.models.resnet import Bottleneck

from noah_zoo import NoahHead
from noah_zoo.catalog import CATALOG
from noah_zoo.models.attach import data_config_of
from noah_zoo.models.builder import _preprocessing_of
from noah_zoo.models.reid_resnet import ReidResNet, checkpoint_filter_fn

NEW_TWINS = (
    'shufflenetv2_100', 'deit_tiny_075_patch16_224', 'deit_tiny_050_patch16_224', 'pvt_tiny', 'pvt_tiny_075',
    'pvt_tiny_050', 'mixer_s16_075_224', 'mixer_s16_050_224', 'gmlp_ti16_075_224', 'gmlp_ti16_050_224')
NAMES = (*CATALOG, *NEW_TWINS)
SMALL = (
    'resnet18_noah', 'mobilenetv2_035_noah', 'shufflenetv2_100_noah', 'deit_tiny_050_patch16_224_noah',
    'pvt_tiny_050_noah', 'mixer_s16_050_224_noah', 'gmlp_ti16_050_224_noah')
SMALL_TWINS = 'shufflenetv2_100', 'deit_tiny_050_patch16_224', 'pvt_tiny_050'  # of classes that timm has not
ALL_NAMES = [
    name if name in SMALL + SMALL_TWINS else pytest.param(name, marks=pytest.mark.exhaustive) for name in NAMES]
DEFAULT_COUNTS = json.loads((Path(__file__).parent / 'thin_deit_params.json').read_text())


def create(name, **kwargs):
    """The model for 64 x 64 images, where it takes a size."""
    if name.startswith(('deit', 'mixer', 'gmlp')):
        kwargs.setdefault('img_size', 64)
    return timm.create_model(name, **kwargs)


def image(batch=2, in_chans=3):
    return torch.randn(batch, in_chans, 64, 64)


@pytest.mark.parametrize('name', ALL_NAMES)
def test_parameter_counts(name):
    row = next(row for row in CATALOG.values() if name in (row.name, row.vanilla))
    released = row.params if name == row.name else row.vanilla_params
    printed = (row.paper if name == row.name else row.vanilla_paper).params_m
    with torch.device('meta'):
        count = sum(p.numel() for p in timm.create_model(name).parameters())
        if name in DEFAULT_COUNTS:
            assert sum(p.numel() for p in timm.create_model(name, pre_logits=True).parameters()) == released
            assert count == DEFAULT_COUNTS[name]
            assert round(count / 1e6, 2) == printed  # Table II counts without the layer
        else:
            assert count == released


@pytest.mark.parametrize('name', ALL_NAMES)
def test_contract(name):
    torch.manual_seed(0)
    noah = name in CATALOG
    model = create(name, num_classes=37, in_chans=1, drop_path_rate=0.1) if not name.startswith('shuffle') \
        else create(name, num_classes=37, in_chans=1)
    x = image(in_chans=1)

    model.train()
    model(x).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []

    model.eval()
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert logits.shape == (2, 37)
        torch.testing.assert_close(model.forward_head(features), logits, rtol=1e-5, atol=1e-5)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features, rtol=1e-5, atol=1e-5)
        assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(clone) is type(model) and torch.equal(clone(x), logits)

        classifier = model.get_classifier()
        assert list(classifier.parameters())
        assert isinstance(classifier, NoahHead) == noah
        names = model.default_cfg['classifier']
        for part in (names,) if isinstance(names, str) else names:
            assert f'{part}.weight' in model.state_dict()
        assert f'{model.default_cfg["first_conv"]}.weight' in model.state_dict()

        model.set_grad_checkpointing()
        torch.testing.assert_close(model(x), logits, rtol=1e-5, atol=1e-5)
        model.set_grad_checkpointing(False)

        model.reset_classifier(0)
        assert model.num_classes == 0
        torch.testing.assert_close(model(x), pooled, rtol=1e-5, atol=1e-5)
        model.reset_classifier(10)
        assert model(x).shape == (2, 10)
        assert isinstance(model.get_classifier(), NoahHead) == noah

    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) >= 4
    skipped = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else set()
    assert set(skipped) <= {n for n, _ in model.named_parameters()} | {'cls_token', 'dist_token', 'reg_token'}


@pytest.mark.parametrize('name', SMALL)
def test_reset_remembers(name):
    model = create(
        name, num_groups=2, key_ratio=0.25, drop_rate=0.3, split_kv=True, dtype=torch.float64).eval()
    model.reset_classifier(0)
    assert model(image().double()).shape == (2, model.num_features)
    model.reset_classifier(10)
    head = model.get_classifier()
    assert (head.num_groups, head.key_ratio, head.drop_rate, head.num_classes) == (2, 0.25, 0.3, 10)
    assert head.key.weight.dtype == torch.float64 and not head.training
    assert model(image().double()).shape == (2, 10)
    for refused in ('7', -1, 2.5):
        with pytest.raises(ValueError, match=f'num_classes={refused!r} is not a whole number of at least 0'):
            model.reset_classifier(refused)
        assert model.get_classifier() is head and model.num_classes == 10
    model.to('meta').reset_classifier(5)
    assert model.get_classifier().key.weight.is_meta


@pytest.mark.parametrize('name', [*SMALL, pytest.param('resnet50_noah', marks=pytest.mark.exhaustive)])
def test_backbone_is_the_twins(name):
    # Same weights: same features, and the NOAH model's pooled features are the twin's.
    torch.manual_seed(0)
    row = CATALOG[name]
    kwargs = dict(class_token=False) if row.family in ('deit', 'pvt') else {}
    if row.family == 'deit':
        kwargs.update(global_pool='avg', fc_norm=False)
    twin, model = create(row.vanilla, **kwargs).eval(), create(name).eval()
    result = model.load_state_dict(twin.state_dict(), strict=False)
    place = model.noah_place
    assert result.missing_keys == [f'{place}.{p}' for p in ('key.weight', 'key.bias', 'value.weight', 'value.bias')]
    assert result.unexpected_keys == [f'{place}.weight', f'{place}.bias']
    assert isinstance(model, type(twin))
    x = image()
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(features, twin.forward_features(x))
        expected = twin.forward_head(features, pre_logits=True)
        assert torch.equal(model.forward_head(features, pre_logits=True), expected)
        positions = features.permute(0, 2, 3, 1) if features.ndim == 4 else features
        expected_logits = model.get_classifier()(positions)
        assert torch.equal(model(x), expected_logits)
        model.reset_classifier(0)
        twin.reset_classifier(0)
        assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize('name', ALL_NAMES)
def test_features_only(name):
    model = create(name, features_only=True).eval()
    with torch.no_grad():
        maps = model(image())
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[-1] for m in maps] == model.feature_info.reduction()
    if name.startswith(('pvt', 'shufflenet')):
        assert model.feature_info.reduction() == [4, 8, 16, 32]
        with torch.no_grad():
            picked = create(name, features_only=True, out_indices=(1, -2)).eval()(image())
        assert [64 // m.shape[-1] for m in picked] == [8, 16]


@pytest.mark.export
@pytest.mark.parametrize('name', SMALL)
def test_compilers(name):
    torch.manual_seed(0)
    model = create(name, num_classes=10).eval()
    x = image()
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend='eager')(x), logits, rtol=1e-5, atol=1e-5)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(x), logits, rtol=1e-5, atol=1e-5)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(x), logits, rtol=1e-5, atol=1e-5)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.export
@pytest.mark.parametrize('name', SMALL)
def test_symbolic_trace(name):
    try:
        torch.fx.symbolic_trace(create(CATALOG[name].vanilla))
    except TypeError as error:  # timm's attention, with PyTorch 2.8
        pytest.skip(f'its twin cannot be traced: {error}')
    torch.manual_seed(0)
    model, x = create(name, num_classes=10).eval(), image()
    with torch.no_grad():
        logits, traced = model(x), torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(traced)(x), logits, rtol=1e-5, atol=1e-5)


def with_random_head(name):
    torch.manual_seed(0)
    model = create(name, num_classes=10).eval()
    for parameter in model.get_classifier().parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize('name', [
    name if name in SMALL else pytest.param(name, marks=pytest.mark.exhaustive) for name in CATALOG])
def test_channels_last_and_bfloat16(name):
    model, x = with_random_head(name), image()
    with torch.no_grad():
        logits = model(x)
        largest = logits.abs().max().item()
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-5 * largest)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            given = model(x)
    assert given.dtype == torch.float32  # the head sums in it
    torch.testing.assert_close(given, logits, rtol=0, atol=0.05 * largest)


@pytest.mark.export
@pytest.mark.parametrize('name', CATALOG)
def test_compiled_channels_last(name):
    torch._dynamo.reset()
    model, x = with_random_head(name), image()
    with torch.no_grad():
        logits = model(x)
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        torch.testing.assert_close(compiled(x), logits, rtol=0, atol=1e-5 * logits.abs().max().item())


@pytest.mark.export
def test_inductor_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model = create('mobilenetv2_035_noah', num_classes=10).eval()
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['pvt_tiny_050', 'pvt_tiny_050_noah', 'shufflenetv2_100', 'shufflenetv2_100_noah'])
def test_own_backbones(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for height, width in ((64, 96), (160, 32)):  # any multiple of 32
            assert model.forward_features(torch.randn(1, 3, height, width)).shape[-2:] == (height // 32, width // 32)
        last = model.forward_intermediates(image(), indices=1, intermediates_only=True)
        assert len(last) == 1 and last[0].shape[-1] == 2
        assert len(model.forward_intermediates(image(), indices=[0], stop_early=True, intermediates_only=True)) == 1
    with pytest.raises(ValueError, match='expected stages from -4 to 3'):
        model.forward_intermediates(image(), indices=[4])
    with pytest.raises(ValueError, match='expected 1 to 4 stages'):
        model.forward_intermediates(image(), indices=5)
    with pytest.raises(ValueError, match="expected 'NCHW'"):
        model.forward_intermediates(image(), output_fmt='NLC')


def test_pvt_map_averages_to_the_class_token():
    torch.manual_seed(0)
    model = timm.create_model('pvt_tiny_050').double().eval()
    x = image().double()
    with torch.no_grad():
        tokens = x
        for stage in model.stages:
            tokens, height, width = stage(tokens)
            if stage is not model.stages[-1]:
                tokens = tokens.transpose(1, 2).reshape(2, -1, height, width)
        class_token = model.norm(tokens)[:, 0]
        torch.testing.assert_close(model.forward_features(x).mean((2, 3)), class_token, rtol=1e-12, atol=1e-12)
        patches = model.norm(tokens)[:, 1:].transpose(1, 2).reshape(2, -1, height, width)
        shift = model.forward_features(x) - patches  # the same at every position
        assert (shift - shift.mean((2, 3), keepdim=True)).abs().max() < 1e-12
        assert shift.abs().max() > 1e-3


@pytest.mark.parametrize('name', SMALL)
def test_saved_by_timm_it_comes_back(name, tmp_path):
    torch.manual_seed(0)
    model = create(name, num_classes=7, in_chans=1, num_groups=2, key_ratio=0.25).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = image(in_chans=1)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        features = model.forward_features(x)
        pooled = again.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        assert torch.equal(pooled, model.forward_head(features, pre_logits=True))
        backbone = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0).eval()
        assert torch.equal(backbone(x), pooled)


@pytest.mark.parametrize('name, kwargs, message', [
    ('resnet50_noah', dict(key_ratio=0.3), 'resnet50_noah: key_ratio=0.3 gives 614 key channels of 2048'),
    ('resnet18_noah', dict(num_groups=3), 'resnet18_noah: in_features=512 is not a multiple of num_groups=3'),
    ('deit_tiny_patch16_224_noah', dict(class_token=True), 'deit_tiny_patch16_224_noah: the model has a class token'),
    ('pvt_tiny_noah', dict(class_token=True), 'pvt_tiny_noah: the model has a class token'),
    ('resnet18_noah', dict(pretrained=True, pretrained_backbone='resnet18.a1_in1k'), 'exclude each other'),
])
def test_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **kwargs)


def test_backbone_from_a_checkpoint(tmp_path):
    from safetensors.torch import save_file
    for name, twin_args in (('resnet18_noah', {}), ('deit_tiny_050_patch16_224_noah', {}), ('pvt_tiny_050_noah', {})):
        torch.manual_seed(1)
        twin = create(CATALOG[name].vanilla, num_classes=7, **twin_args)
        paths = [tmp_path / f'{name}.safetensors', tmp_path / f'{name}.pth']
        save_file(twin.state_dict(), paths[0])
        torch.save({'state_dict': twin.state_dict()}, paths[1])
        for path in paths:
            model = create(name, num_classes=5, pretrained_backbone=str(path))
            own, source = model.state_dict(), twin.state_dict()
            for key in own:
                if key.startswith(model.noah_place + '.'):
                    continue
                expected = source[key][:, 1:] if own[key].shape != source[key].shape else source[key]
                assert torch.equal(own[key], expected), key
        features = create(name, features_only=True, pretrained_backbone=str(paths[0]))
        first_conv = twin.get_submodule(twin.default_cfg['first_conv']).weight
        assert any(torch.equal(p, first_conv) for p in features.parameters())


@pytest.mark.parametrize('name', ['resnet18_noah', 'deit_tiny_050_patch16_224_noah'])
def test_the_twins_weights_warn_of_nothing_but_the_head(name, tmp_path, caplog, recwarn):
    twin = tmp_path / 'twin.pth'
    torch.save(timm.create_model(CATALOG[name].vanilla).state_dict(), twin)
    timm.create_model(name, pretrained_backbone=str(twin))
    assert not recwarn.list and not [r for r in caplog.records if r.levelname != 'INFO']
    with pytest.raises(RuntimeError, match=f'{name}: the weights are not those .* no NOAH head: pretrained_backbone='):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(twin)))


def test_saved_it_comes_back_without_what_it_was_begun_from(tmp_path):
    twin = tmp_path / 'twin.pth'
    torch.save(timm.create_model('resnet18').state_dict(), twin)
    model = timm.create_model('resnet18_noah', num_classes=3, pretrained_backbone=str(twin)).eval()
    save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True)
    twin.unlink()
    again = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    x = image()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_backbone_adapts_channels_and_size(tmp_path):
    torch.manual_seed(1)
    twin = timm.create_model('deit_tiny_050_patch16_224')
    torch.save(twin.state_dict(), tmp_path / 'twin.pth')
    model = timm.create_model(
        'deit_tiny_050_patch16_224_noah', in_chans=1, img_size=96, pretrained_backbone=str(tmp_path / 'twin.pth'))
    weight = model.patch_embed.proj.weight
    torch.testing.assert_close(weight, twin.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    assert model.pos_embed.shape == (1, 36, 96) and model.pos_embed.std() > 0.005


@pytest.mark.parametrize('name, twin, kwargs', [
    ('noah', 'test_resnet', dict(backbone='test_resnet')), ('resnet18_noah', 'resnet18', {})])
def test_images_are_prepared_as_for_the_weights_of_the_backbone(name, twin, kwargs, tmp_path):
    own = dict(input_size=(3, 64, 48), mean=(0.2, 0.3, 0.4), std=(0.1,) * 3, crop_pct=0.5, interpolation='bilinear')
    model = timm.create_model(twin, num_classes=5, pretrained_cfg_overlay=own)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    kwargs.update(pretrained_backbone=f'local-dir:{tmp_path}')
    built = timm.create_model(name, **kwargs)
    assert data_config_of(built) == data_config_of(model) and data_config_of(model).items() >= own.items()
    assert built.pretrained_cfg.get('num_classes') == 1000
    overlaid = data_config_of(timm.create_model(name, pretrained_cfg_overlay=dict(crop_pct=1.), **kwargs))
    assert overlaid == dict(data_config_of(model), crop_pct=1.)
    torch.save(model.state_dict(), tmp_path / 'weights.pt')  # which says nothing of images
    kwargs.update(pretrained_backbone=str(tmp_path / 'weights.pt'))
    assert data_config_of(timm.create_model(name, **kwargs))['mean'] != own['mean']


def test_what_weights_say_of_images(tmp_path):
    own = dict(mean=(0.2,) * 3, std=(0.1,) * 3, crop_pct=0.5)
    save_for_hf(timm.create_model('test_resnet', pretrained_cfg_overlay=own), str(tmp_path), safe_serialization=True)
    found = _preprocessing_of(f'local-dir:{tmp_path}', ('test_resnet',))
    assert json.loads(json.dumps({name: found[name] for name in own})) == json.loads(json.dumps(own))
    assert 'interpolation' in found
    of_another = _preprocessing_of(f'local-dir:{tmp_path}', ('resnet18', 'resnet18_noah'))
    assert {name: list(value) for name, value in of_another.items()} == dict(mean=[0.2] * 3, std=[0.1] * 3)
    assert _preprocessing_of('weights.pt', ('test_resnet',)) == _preprocessing_of(None, ('test_resnet',)) == {}


def test_the_embedding_of_reid_models():
    torch.manual_seed(0)
    model = ReidResNet(Bottleneck, (1, 1, 1, 1), embedding_size=6, num_classes=3).eval()
    x = torch.randn(2, 2048, 2, 3)
    with torch.no_grad():
        expected = model.embedding(x.mean((2, 3)))
        torch.testing.assert_close(model.forward_head(x, pre_logits=True), expected)
        torch.testing.assert_close(model.forward_head(x), model.fc(expected))
    own = model.state_dict()
    given = {name: torch.zeros_like(value) for name, value in own.items() if not name.startswith('embedding.')}
    filtered = checkpoint_filter_fn(given, model)
    assert filtered.keys() == own.keys()
    for name, value in filtered.items():
        assert torch.equal(value, own[name] if name.startswith(('embedding.', 'fc.')) else given[name])
    assert checkpoint_filter_fn(own, model) is own
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(torch.randn(2, 3, 64, 32)).shape == (2, 6)
    model.reset_classifier(5)
    assert model(torch.randn(2, 3, 64, 32)).shape == (2, 5)


@pytest.mark.exhaustive
def test_those_of_another_architecture_say_how_values_are_scaled(tmp_path):
    model = timm.create_model('resnet50', pretrained_cfg_overlay=dict(mean=(0.2,) * 3, std=(0.1,) * 3, crop_pct=0.5))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    plain, built = (data_config_of(timm.create_model('noah', backbone='reid_resnet50', num_classes=3, **source))
                    for source in ({}, dict(pretrained_backbone=f'local-dir:{tmp_path}')))
    assert built == dict(plain, mean=(0.2,) * 3, std=(0.1,) * 3) and built['input_size'] == (3, 256, 128)


def test_backbone_that_does_not_fit(tmp_path):
    twin = timm.create_model('resnet18')
    torch.save({**twin.state_dict(), 'layer5.weight': torch.zeros(1)}, tmp_path / 'more.pth')
    with pytest.raises(ValueError, match=r"resnet18_noah: pretrained_backbone=.* does not fit resnet18's backbone: .*"
                                         r'surplus'):
        timm.create_model('resnet18_noah', pretrained_backbone=str(tmp_path / 'more.pth'))
    save_for_hf(twin, str(tmp_path / 'dir'), safe_serialization=True)
    timm.create_model('resnet18_noah', pretrained_backbone=f'local-dir:{tmp_path / "dir"}')
    with pytest.raises(FileNotFoundError, match='gone.pth'):
        timm.create_model('resnet18_noah', pretrained_backbone=str(tmp_path / 'gone.pth'))
