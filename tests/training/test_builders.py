"""Models, parameter groups and layouts of a run."""
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

import noah_zoo  # noqa: F401
from noah_zoo.models.attach import heads_of, is_convolutional
from noah_zoo.training import TrainConfig
from noah_zoo.training.builders import (
    build_ema,
    build_model,
    build_scheduler,
    memory_format_of,
    param_groups,
    steps_on_updates,
)


def groups_of(model, **settings):
    config = TrainConfig(model='', output='', **settings)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, config)
    return {names[id(p)]: (group['lr_scale'], group['weight_decay']) for group in groups for p in group['params']}


def test_parameter_groups():
    model = timm.create_model('resnet18_noah', num_classes=5)
    groups = groups_of(model, weight_decay=0.1, head_lr_factor=10.)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert groups['fc.key.weight'] == (10, 0.1) and groups['fc.value.bias'] == (10, 0)
    assert groups['conv1.weight'] == (1, 0.1) and groups['bn1.weight'] == (1, 0)
    assert set(groups_of(model, weight_decay=0.1, decay_norms=True).values()) == {(1, 0.1)}
    layers = groups_of(model, weight_decay=0.1, layer_decay=0.5)
    assert layers['conv1.weight'][0] < layers['layer1.0.conv1.weight'][0] < layers['layer4.0.conv1.weight'][0] < 1
    assert layers['fc.key.weight'][0] == 1
    both = groups_of(model, layer_decay=0.5, head_lr_factor=10.)
    assert both['fc.key.weight'][0] == 10 and both['conv1.weight'][0] == layers['conv1.weight'][0]


@pytest.mark.parametrize('name, convolutional', [
    ('resnet18_noah', True), ('mobilenetv2_035', True), ('mobilenetv2_035_noah', True), ('shufflenetv2_100_noah', True),
    ('tf_efficientnet_lite0', True), ('deit_tiny_050_patch16_224_noah', False), ('pvt_tiny_050_noah', False),
    ('mixer_s16_050_224', False), ('gmlp_ti16_050_224_noah', False), ('deit_tiny_distilled_patch16_224', False)])
def test_channels_last_is_for_convolutions(name, convolutional):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=1000)
    assert is_convolutional(model) is convolutional


def test_new_classifiers_do_not_start_by_their_fan_out(tmp_path):
    torch.manual_seed(0)
    for name, place, kwargs, std in (  # the last as timm has it
            ('efficientnet_lite0', 'classifier', {}, (3 * 1280) ** -0.5), ('resnet18', 'fc', {}, (3 * 512) ** -0.5),
            ('dla34', 'fc', {}, (3 * 512) ** -0.5), ('test_convnext', 'head.fc', dict(head_init_scale=0.001), 2e-5)):
        folder = str(tmp_path / name)
        save_for_hf(timm.create_model(name, num_classes=3), folder, safe_serialization=True)
        config = TrainConfig(model=f'local-dir:{folder}', output='', pretrained=True, model_kwargs=kwargs)
        model = build_model(config, tuple('abcde'))
        assert model.get_submodule(place).weight.std().item() == pytest.approx(std, rel=0.2), name
        kept = build_model(config, tuple('abc')).get_submodule(place).weight  # the same classes: that of the file
        assert torch.equal(kept, load_file(f'{folder}/model.safetensors')[f'{place}.weight'])


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_035_noah'])
def test_as_many_but_other_classes_get_a_new_head(name, tmp_path, caplog):
    folder = str(tmp_path / 'best')
    trained = timm.create_model(name, num_classes=3)
    save_for_hf(trained, folder, safe_serialization=True, model_config=dict(label_names=list('abc')))
    config = TrainConfig(model=f'local-dir:{folder}', output='', pretrained=True)

    def head(names, config=config):
        caplog.clear()
        model = build_model(config, tuple(names))
        assert torch.equal(next(model.parameters()), next(trained.parameters()))  # the backbone's
        saved, own = trained.get_classifier().state_dict(), model.get_classifier().state_dict()
        return saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in saved)

    assert head('abc') and not caplog.text
    assert not head('abd')
    assert "other classes (now without 'c' and with 'd'), so it begins with a new head" in caplog.text
    assert not head('acb') and "their order was 'a', 'b', 'c'" in caplog.text
    assert head('abd', replace(config, keep_head=True)) and not caplog.text


def test_averaged_weights_and_memory_format():
    model = torch.nn.Linear(2, 2)
    config = TrainConfig(model='', output='', model_ema_decay=0.9)
    ema, before = build_ema(model, config), model.weight.detach().clone()
    model.weight.data.add_(1)
    ema.update(model)
    torch.testing.assert_close(ema.module.weight, before + 0.1)
    assert build_ema(model, TrainConfig(model='', output='')) is None
    cnn = timm.create_model('mobilenetv2_035_noah', num_classes=3)
    for settings, expected in (
            ({}, torch.channels_last), (dict(channels_last=False), torch.contiguous_format),
            (dict(cache_features='c'), torch.preserve_format)):
        assert memory_format_of(cnn, TrainConfig(model='', output='', **settings)) is expected


def test_schedulers_are_stepped_as_the_settings_say():
    for settings, on_updates in (({}, False), (dict(sched_on_updates=True), True), (dict(sched='onecycle'), True)):
        config = TrainConfig(model='', output='', epochs=2, lr=1., **settings)
        assert steps_on_updates(config) is on_updates
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.randn(2))], 1.)
        scheduler, rates = build_scheduler(optimizer, config, updates=4), []
        for update in range(8):
            if on_updates:
                scheduler.step_update(update)
            elif update % 4 == 0:
                scheduler.step(update // 4)
            rates.append(optimizer.param_groups[0]['lr'])
        assert len(set(rates)) == (8 if on_updates else 2) and rates[-1] < 1


def test_weights_of_another_task(tmp_path):
    # What logits are goes by the run's task, not by that of the weights it starts from.
    model = timm.create_model('test_resnet', num_classes=3, pretrained_cfg_overlay=dict(notes=('mine', 'multilabel')))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    for task, notes in (('multiclass', ['mine']), ('multilabel', ['mine', 'multilabel'])):
        config = TrainConfig(model=f'local-dir:{tmp_path}', output='', pretrained=True, task=task)
        assert list(build_model(config, ('a', 'b', 'c')).pretrained_cfg['notes']) == notes
    config = TrainConfig(model='test_resnet', output='', task='multilabel')
    assert build_model(config, ('a', 'b', 'c')).pretrained_cfg['notes'] == ('multilabel',)


def test_both_heads_of_a_distilled_model():
    config = TrainConfig(model='deit_tiny_distilled_patch16_224', output='', freeze=True, head_lr_factor=10)
    model = build_model(config, ('a', 'b', 'c'))
    heads = {f'{name}.{kind}' for name in ('head', 'head_dist') for kind in ('weight', 'bias')}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == heads
    assert {scale for scale, _ in groups_of(model, head_lr_factor=10).values()} == {10}
    assert len(heads_of(timm.create_model('test_resnet'))) == 1


def test_a_classifier_of_other_classes_is_no_start(tmp_path):
    folder = str(tmp_path / 'best')
    save_for_hf(timm.create_model('test_resnet', num_classes=3), folder, safe_serialization=True,
                model_config=dict(label_names=list('abc')))
    config = TrainConfig(model='noah', output='', pretrained=False, model_kwargs=dict(
        backbone='test_resnet', pretrained_backbone=f'local-dir:{folder}', init='classifier'))
    assert build_model(config, tuple('abc')).num_classes == 3
    for names, changes in (
            ('xyz', "without 'a', 'b', 'c' and with 'x', 'y', 'z'"), ('bca', "their order was 'a', 'b'")):
        with pytest.raises(ValueError, match=f'the classifier of local-dir:.*is of other classes, now {changes}'):
            build_model(config, tuple(names))
