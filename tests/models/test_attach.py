"""The head on any timm model. `tests/sweep.py` has the contract, and the sweep over all of timm."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import NaFlexVit, NaFlexVitCfg, push_to_hf_hub, save_for_hf
from torch import nn

from noah_zoo import NoahHead, add_noah_head
from noah_zoo.catalog import CATALOG

from .. import sweep
from .test_contract import SMALL as ONE_OF_EACH_FAMILY

ROOT = Path(__file__).resolve().parents[2]
# Maps, a norm after pooling, an MLP after pooling of a channels-last map, 1x1 layers after pooling, a class token, an
# attention pool, class attention, two heads.
SMALL = {
    'test_resnet': {}, 'test_convnext': {}, 'test_mambaout': {}, 'mobilenetv3_small_050': {}, 'test_vit': {},
    'test_vit3': {}, 'xcit_nano_12_p8_224': dict(depth=2), 'levit_128s': {}}
REFUSED = {
    'crossvit_9_240': 'forward_features gives 2 feature maps; a NOAH head reads one',
    'pit_ti_224': r'no spatial features are left: forward_features gives \[1, 1, 256\]',
}


def rows():
    """The rows of the table in the docs."""
    lines = sweep.TABLE.read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line.startswith('| ') and '`' in line]


@pytest.mark.parametrize('name', SMALL)
def test_contract(name):
    sweep.check(name, **SMALL[name])


@pytest.mark.parametrize('name, only_pools', [
    ('test_resnet', True), ('test_vit', True), ('swin_s3_tiny_224', True), ('test_convnext', False),
    ('mobilenetv3_small_050', False),
    pytest.param('xcit_nano_12_p8_224', True, marks=pytest.mark.exhaustive)])
def test_evaluation_leaves_out_the_pooling_over_one_position(name, only_pools, monkeypatch):
    torch.manual_seed(0)
    model = add_noah_head(timm.create_model(name), 7).eval()
    assert model.noah_only_pools == only_pools
    with torch.no_grad():
        x = model.forward_features(torch.randn(2, *model.pretrained_cfg['input_size']))
        calls = []
        forward_head = model.timm_cls.forward_head
        monkeypatch.setattr(
            model.timm_cls, 'forward_head', lambda *args, **kwargs: calls.append(1) or forward_head(*args, **kwargs))
        logits = model.forward_head(x)
        assert len(calls) == (not only_pools)
        monkeypatch.setattr(model, 'noah_only_pools', False)
        torch.testing.assert_close(model.forward_head(x), logits)
        assert len(calls) == 1 + (not only_pools)
        monkeypatch.setattr(model, 'noah_only_pools', only_pools)
        model.train().forward_head(x)  # dropout
        assert len(calls) == 2 + (not only_pools)


@pytest.mark.parametrize('name', REFUSED)
def test_refused_and_unchanged(name):
    with pytest.raises(ValueError, match=f'^{name}: {REFUSED[name]}$'):
        sweep.check(name)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('line', rows(), ids=lambda line: line.split()[1])
def test_a_model_of_every_module(line):
    _, module, name, params, *_ = (cell.strip(' `') for cell in line.split('|'))
    assert name in timm.list_models(module=module)
    assert sweep.row(module, name, float(params) * 1e6, sweep.cells_of(name)) == line


def test_in_the_table_enough_take_the_head():
    assert sum('refused' not in line for line in rows()) >= 92
    assert {line.split()[1] for line in rows()} <= set(sweep.modules())


@pytest.mark.exhaustive
def test_the_table_has_every_module():
    assert [line.split()[1] for line in rows()] == sweep.modules()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('module', sweep.modules())
def test_every_name_on_meta(module):
    text = sweep.TABLE.read_text(encoding='utf-8').partition('## Every name')[2]
    for name in timm.list_models(module=module):
        _, reason = sweep.try_on_meta(name)
        assert (f'`{name}`' in text) == bool(reason), (name, reason)
        assert not reason or f'- {reason}: ' in text


def test_the_registered_models_are_made_by_the_same_code():
    torch.manual_seed(0)
    registered = timm.create_model('resnet18_noah').eval()
    twin = timm.create_model('resnet18')
    attached = add_noah_head(twin, num_groups=4, key_ratio=1 / 2).eval()
    assert attached is twin and type(attached) is type(registered)
    assert list(attached.state_dict()) == list(registered.state_dict())
    attached.load_state_dict(registered.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(attached(x), registered(x))
    for model in (attached, registered):
        model.train()
        torch.manual_seed(1)
        model.drop_rate = model.fc.drop_rate = 0.
        model(x).square().sum().backward()
    for ours, theirs in zip(attached.parameters(), registered.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize('name', [
    name if name in ONE_OF_EACH_FAMILY else pytest.param(name, marks=pytest.mark.exhaustive) for name in CATALOG])
def test_the_rule_of_thumb_gives_the_papers_n(name):
    with torch.device('meta'):
        head = add_noah_head(timm.create_model(CATALOG[name].vanilla)).get_classifier()
    assert head.num_groups == CATALOG[name].num_groups
    assert head.key_ratio == pytest.approx(1 / 8, abs=head.num_groups / head.in_features)  # what divides


def test_what_follows_pooling_is_done_per_position():
    torch.manual_seed(0)
    model = timm.create_model('test_convnext').eval()
    nn.init.normal_(model.head.norm.weight)
    add_noah_head(model, num_classes=7, num_groups=4, key_ratio=0.5)
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 160, 160))  # (B, C, H, W)
        normed = model.head.norm(features).flatten(2).transpose(1, 2)  # LayerNorm2d is per position by itself
        head = NoahHead(64, 7, 4, 0.5, input_fmt='NLC').eval()
        head.load_state_dict(model.get_classifier().state_dict())
        torch.testing.assert_close(model.forward_head(features), head(normed), rtol=1e-5, atol=1e-5)


def test_class_and_register_tokens_have_no_position():
    torch.manual_seed(0)
    model = add_noah_head(timm.create_model('test_vit', reg_tokens=3)).eval()
    assert model.num_prefix_tokens == 4
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 160, 160))
        logits = model.forward_head(features)
        features[:, :4] += 1
        assert torch.equal(model.forward_head(features), logits)
        features[:, 4:] += torch.randn(features[:, 4:].shape)
        assert not torch.allclose(model.forward_head(features), logits, atol=1e-2)


@pytest.mark.parametrize('name', [
    'test_resnet', *(pytest.param(name, marks=pytest.mark.export) for name in (
        'test_convnext', 'test_mambaout', 'test_vit'))])
def test_compilers(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = add_noah_head(timm.create_model(name), num_classes=10).eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        logits = model(x)
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        torch.testing.assert_close(compiled(x), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(model)(x), logits, rtol=1e-5, atol=1e-5)
        batch = torch.export.Dim('batch', min=1, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        for images in (x, x[:1], torch.randn(5, 3, 160, 160)):
            torch.testing.assert_close(exported(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_groups=5), r'test_resnet: in_features=96 is not a multiple of num_groups=5; choose num_groups from'),
    (dict(key_ratio=0.31), 'test_resnet: key_ratio=0.31 gives 29 key channels of 96'),
    (dict(drop_rate=1.), r'test_resnet: drop_rate=1.0 is not in \[0, 1\)'),
    (dict(noah_variant='g'), "test_resnet: noah_variant='g' is unknown; choose from no_split"),
    (dict(groups=4), "test_resnet: .*unexpected keyword argument 'groups'"),
    (dict(num_classes=0), 'test_resnet: num_classes=0 is not a whole number of at least 1'),
    (dict(num_classes='10'), "test_resnet: num_classes='10' is not a whole number of at least 1"),
    (dict(num_groups=0), 'test_resnet: num_groups=0 is not a whole number of at least 1'),
    (dict(num_groups=4.), 'test_resnet: num_groups=4.0 is not a whole number of at least 1'),
    (dict(key_ratio='1/8'), "test_resnet: key_ratio='1/8' is not a number strictly between 0 and 1, like 0.125"),
    (dict(key_ratio=math.nan), 'test_resnet: key_ratio=nan is not a number strictly between 0 and 1'),
])
def test_bad_arguments(kwargs, message):
    model = timm.create_model('test_resnet', num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        add_noah_head(model, **kwargs)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert type(model) is timm.models.ResNet


@pytest.mark.parametrize('make, message', [
    (lambda: nn.Linear(3, 4), 'Linear: the model has no forward_features'),
    (lambda: 'resnet18', "'resnet18' is not a model; expected what timm.create_model gives"),
    (lambda: timm.create_model('test_vit', num_classes=0), 'test_vit: the model has no classes of its own'),
    (lambda: timm.create_model('test_vit', features_only=True), 'test_vit: the model has no forward_features'),
    (lambda: timm.create_model('resnet18_noah'), 'resnet18_noah: the model has a NOAH head already'),
    (lambda: torch.compile(timm.create_model('resnet18')), 'the model is compiled; add the head to model._orig_mod'),
])
def test_not_a_model_for_it(make, message):
    with pytest.raises(ValueError, match=message):
        add_noah_head(make())


def test_masks_are_refused():
    torch.manual_seed(0)
    model = NaFlexVit(NaFlexVitCfg(embed_dim=32, depth=1, num_heads=2, patch_size=16), num_classes=5)
    add_noah_head(model).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    patches = dict(
        patches=torch.randn(2, 16, 768), patch_coord=grid.repeat(2, 1, 1),
        patch_valid=torch.rand(2, 16) > 0.5)
    with pytest.raises(ValueError, match='takes no mask of valid patches'):
        model(patches)


def test_grad_checkpointing_and_layer_groups():
    from timm.models import group_parameters
    model = add_noah_head(timm.create_model('test_vit'), num_classes=4)
    x = torch.randn(2, 3, 160, 160)
    logits = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), logits, rtol=1e-5, atol=1e-5)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(key for group in groups.values() for key in group) == sorted(dict(model.named_parameters()))
    _, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [info['num_chs'] for info in model.feature_info]


@pytest.mark.parametrize('name, kwargs', [
    pytest.param('test_convnext', {}, marks=pytest.mark.exhaustive),
    ('test_vit', dict(img_size=96)),
    ('test_mambaout', dict(in_chans=1)),
    pytest.param('mobilenetv3_small_050', dict(drop_path_rate=0.1), marks=pytest.mark.exhaustive),
    ('test_efficientnet.r160_in1k', {}),
])
def test_saved_it_comes_back(name, kwargs, tmp_path):
    torch.manual_seed(0)
    model = add_noah_head(timm.create_model(name, **kwargs), num_classes=7, num_groups=2, key_ratio=0.25).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(again) is type(model) and again.noah_cfg == model.noah_cfg
    for key in ('interpolation', 'crop_pct', 'classifier', 'first_conv'):
        assert json.dumps(again.pretrained_cfg[key]) == json.dumps(model.pretrained_cfg[key])
    x = torch.randn(2, kwargs.get('in_chans', 3), kwargs.get('img_size', 160), kwargs.get('img_size', 160))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        tuned = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3).eval()
        assert tuned(x).shape == (2, 3)
        assert torch.equal(tuned.forward_features(x), model.forward_features(x))
        assert (tuned.get_classifier().num_groups, tuned.get_classifier().key_ratio) == (2, 0.25)
        maps = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()(x)
        assert len(maps) >= 3
        pooled = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0).eval()
        assert torch.equal(pooled(x), model.forward_head(model.forward_features(x), pre_logits=True))
        pooled.reset_classifier(4)
        assert type(pooled.get_classifier()) is type(model.get_classifier()) and pooled(x).shape == (2, 4)


def publish(repo_id):
    """Put a model on the Hub of this process; its logits of an image of ones."""
    torch.manual_seed(0)
    model = add_noah_head(timm.create_model('test_convnext'), num_classes=3, num_groups=2).eval()
    push_to_hf_hub(model, repo_id, token='hf_you', model_config=dict(label_names=['a', 'b', 'c']))
    with torch.no_grad():
        return model(torch.ones(1, 3, 64, 64))


def test_published_it_comes_back_from_the_hub(hub):
    logits = publish('you/test_convnext-noah')
    source = 'hf-hub:you/test_convnext-noah'
    model = timm.create_model(source, pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 3, 64, 64)), logits)
    assert model.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    assert timm.create_model(source, pretrained=True, num_classes=9).num_classes == 9
    config = json.loads(hub.files('you/test_convnext-noah')['config.json'])
    assert config['architecture'] == 'noah'
    assert {'backbone': 'test_convnext', 'num_groups': 2}.items() <= config['model_args'].items()


@pytest.mark.process
def test_published_it_comes_back_in_a_new_process(hub, tmp_path):
    torch.save(publish('you/test_convnext-noah-2'), tmp_path / 'logits.pt')
    load = '''
import timm, torch, noah_zoo
model = timm.create_model('hf-hub:you/test_convnext-noah-2', pretrained=True).eval()
torch.testing.assert_close(model(torch.ones(1, 3, 64, 64)), torch.load('logits.pt'), rtol=1e-5, atol=1e-5)
assert model.pretrained_cfg['label_names'] == ['a', 'b', 'c'], model.pretrained_cfg
'''
    env = {**hub.env(tmp_path / 'home', 'hf_you'), 'PYTHONPATH': str(ROOT)}
    result = subprocess.run([sys.executable, '-c', load], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_without_pooling():
    torch.manual_seed(0)
    twin = timm.create_model('resnet18', num_classes=0, global_pool='').eval()
    model = timm.create_model('noah', num_classes=0, global_pool='').eval()
    model.load_state_dict(twin.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert model(x).shape == (2, 512, 2, 3) and torch.equal(model(x), twin(x))
        add_noah_head(twin, num_classes=5, init='random')
        assert torch.equal(twin(x), twin.fc(twin.forward_features(x).permute(0, 2, 3, 1)))


def test_by_name_with_the_backbones_weights(tmp_path, caplog):
    torch.manual_seed(0)
    twin = timm.create_model('test_vit')
    save_file(twin.state_dict(), tmp_path / 'twin.safetensors')
    model = timm.create_model('noah', backbone='test_vit', pretrained_backbone=str(tmp_path / 'twin.safetensors'))
    assert not caplog.records
    own = model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in twin.state_dict().items() if not key.startswith('head.'))
    with pytest.raises(ValueError, match="backbone='resnet51': timm knows no such model"):
        timm.create_model('noah', backbone='resnet51')
    with pytest.raises(ValueError, match='pit_ti_224: no spatial features are left'):
        timm.create_model('noah', backbone='pit_ti_224')
    with pytest.raises(RuntimeError, match="no weights with this head .*; pretrained_backbone='test_vit.r160_in1k'"):
        timm.create_model('noah', backbone='test_vit.r160_in1k', pretrained=True)
