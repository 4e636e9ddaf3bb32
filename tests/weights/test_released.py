"""The released weights under timm's names: numbers, names, containers, and what is refused."""
import argparse
import re

import numpy as np
import pytest
import timm
import torch

from noah_zoo.catalog import CATALOG
from noah_zoo.weights import convert_released, read_released
from noah_zoo.weights import released as module
from tests.released import SHAPES, calibrate, cheap_state_dict, golden_logits, images, released_state_dict

ROWS = {name: row for row in CATALOG.values() for name in (row.name, row.vanilla)}
THIN = ('deit_tiny_075_patch16_224', 'deit_tiny_050_patch16_224')
SMALL = {
    'resnet': 'resnet18_noah', 'mobilenet': 'mobilenetv2_035', 'shufflenet': 'shufflenetv2_100_noah',
    'deit': 'deit_tiny_050_patch16_224_noah', 'pvt': 'pvt_tiny_050', 'mixer': 'mixer_s16_050_224_noah',
    'gmlp': 'gmlp_ti16_050_224'}
NAME = 'mobilenetv2_035_noah'
one_per_family = pytest.mark.parametrize('case', [
    case if case in SMALL.values() else pytest.param(case, marks=pytest.mark.exhaustive) for case in SHAPES])


@pytest.fixture
def few_models(monkeypatch):
    """The release is searched for the owner of weights that do not fit; of few models, that takes no time."""
    monkeypatch.setattr(module, 'released', lambda: list(SMALL.values()))


def create(name, case, **kwargs):
    pre_logits = {'pre_logits': True} if ROWS[name].vanilla in THIN and not case.endswith('.plain') else {}
    return timm.create_model(name, **pre_logits, **kwargs)


def refusal(state_dict, name=NAME, **kwargs):
    with pytest.raises(ValueError) as info:
        convert_released(state_dict, name, **kwargs)
    message = str(info.value)
    assert '\n' not in message and len(message) < 2000
    return message


# Numbers


@one_per_family
def test_logits_are_the_authors(case):
    name = case.replace('.plain', '')
    model = create(name, case)
    model.load_state_dict(convert_released(released_state_dict(case), name), strict=True)
    calibrate(model.double(), images(11))
    with torch.no_grad():
        logits = model(images(7)).numpy()
    golden = golden_logits(case)
    ours = logits if golden.shape[1] == 1000 else logits[:, ::50]
    assert np.abs(ours - golden).max() <= 1e-7 * np.abs(golden).max()


def test_goldens_are_full_for_every_family():
    full = {ROWS[case].family for case in SHAPES if golden_logits(case).shape == (2, 1000)}
    assert full == set(SMALL) and len(SHAPES) == 54


# Names


@one_per_family
def test_every_released_file_loads_strictly(case):
    name = case.replace('.plain', '')
    row = ROWS[name]
    converted = convert_released(cheap_state_dict(case), name)
    with torch.device('meta'):
        model = create(name, case)
    model.load_state_dict(converted, strict=True, assign=True)
    params = sum(p.numel() for p in model.parameters())
    if case.endswith('.plain'):
        paper = row.paper if name == row.name else row.vanilla_paper
        assert abs(params / 1e6 - paper.params_m) < 0.006  # printed with two decimals
    else:
        assert params == (row.params if name == row.name else row.vanilla_params)


def test_all_fifty_files_are_covered():
    assert {case for case in SHAPES if not case.endswith('.plain')} == set(ROWS) and len(ROWS) == 50


# Containers


def container(kind, weights, averaged):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    rest = dict(optimizer=optimizer.state_dict(), epoch=299)
    args = argparse.Namespace(lr=5e-4, opt_betas=None, input_size=[3, 224, 224], output_dir='out', device='cuda')
    if kind == 'bare':
        return weights
    if kind == 'parallel':
        wrapped = {f'module.{key}': value for key, value in weights.items()}
        return dict(rest, state_dict=wrapped, acc=torch.tensor(71.8), best_acc=torch.tensor(71.9))
    if kind == 'model':
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300).state_dict()
        return dict(
            rest, model=weights, model_ema=averaged, lr_scheduler=scheduler, scaler={'scale': 65536.}, args=args)
    return dict(
        rest, state_dict=weights, state_dict_ema=averaged, arch='noah', metric=75.1, version=2, args=args,
        amp_scaler={'scale': 65536., 'growth_factor': 2.})


@pytest.mark.parametrize('kind', ['bare', 'parallel', 'model', 'saver'])
@pytest.mark.parametrize('name', [
    name if family in ('mobilenet', 'deit') else pytest.param(name, marks=pytest.mark.exhaustive)
    for family, name in SMALL.items()])
def test_containers(name, kind, tmp_path):
    weights = cheap_state_dict(name)
    averaged = {key: 2 * value for key, value in weights.items()}
    expected = convert_released(weights, name)
    torch.save(container(kind, weights, averaged), tmp_path / 'file.pth')
    checkpoint = read_released(tmp_path / 'file.pth')
    converted = convert_released(checkpoint, name)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)
    if kind in ('model', 'saver'):
        converted = convert_released(checkpoint, name, ema=True)
        assert all(torch.equal(converted[key], 2 * expected[key]) for key in expected)
    else:
        assert 'no averaged weights' in refusal(checkpoint, name, ema=True)


def test_older_file_format(tmp_path):
    weights = released_state_dict(NAME)
    args = argparse.Namespace(lr=0.1)
    torch.save(dict(model=weights, args=args), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    checkpoint = read_released(tmp_path / 'old.pth')
    assert checkpoint['args'] == args
    assert torch.equal(
        convert_released(checkpoint, NAME)['classifier.key.weight'], weights['head.query.weight'])


def test_averaged_weights_wrapped_again():
    weights = cheap_state_dict(NAME)
    wrapped = {f'module.{key}': value for key, value in weights.items()}
    converted = convert_released(dict(state_dict=weights, state_dict_ema=wrapped), NAME, ema=True)
    assert torch.equal(converted['conv_stem.weight'], weights['features.0.0.weight'])


@pytest.mark.parametrize('empty', [None, {}])
def test_container_that_holds_no_average(few_models, empty):
    message = refusal(dict(model=cheap_state_dict(NAME), model_ema=empty), ema=True)
    assert message.startswith(f'{NAME}: ') and ('no averaged weights' in message or 'missing' in message)


# Refusals


def test_unknown_model():
    for name, close in (
            ('resnet50_noha', 'resnet50_noah'), ('noah_resnet50', 'resnet50'), ('pvt_tiny_50', 'pvt_tiny_050'),
            ('resnet50_noah.osvai_in1k', 'resnet50_noah'), ('', ', '.join(ROWS)), ('convnext', ', '.join(ROWS))):
        message = refusal(cheap_state_dict(NAME), name)
        assert message.startswith(f'{name!r} is not a model of the release') and close in message


@pytest.mark.parametrize('given, name', [
    ('resnet18', 'resnet18_noah'),
    ('resnet18_noah', 'resnet18'),
    ('mobilenetv2_075_noah', 'mobilenetv2_050_noah'),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        ('resnet50_noah', 'resnet101_noah'),
        ('pvt_tiny_050', 'deit_tiny_patch16_224'),
        ('deit_tiny_050_patch16_224', 'deit_tiny_075_patch16_224'),
        ('deit_tiny_050_patch16_224.plain', 'deit_tiny_patch16_224_noah'),
        ('gmlp_ti16_224_noah', 'mixer_s16_224_noah'))),
])
def test_file_of_another_model(given, name):
    assert refusal(cheap_state_dict(given), name) == f'{name}: the weights are those of {given.replace(".plain", "")}'


def changed(**changes):
    weights = cheap_state_dict(NAME)
    for key, value in changes.items():
        key = key.replace('__', '.')
        weights.pop(key, None)
        if value is not None:
            weights[key] = value
    return weights


def unfit():
    """Weights that do not fit NAME, and what is said of them."""
    return (
        (changed(head__query__bias=None), r'missing keys \(1 of 316\): head\.query\.bias$'),
        ({}, r'missing keys \(316 of 316\): features\.0\.0\.weight, \S+, \S+ and 313 more$'),
        (dict(epoch=3, state_dict=None), r'missing .*; surplus keys \(2\): epoch, state_dict$'),
        (changed(fc__weight=torch.randn(2, 2)), r'surplus keys \(1\): fc\.weight$'),
        (changed(classifier__key__weight=torch.randn(2, 2)), r'surplus keys \(1\): classifier\.key\.weight$'),
        (changed(pre_logits__fc__weight=torch.randn(192, 96)), r'surplus keys \(1\): pre_logits\.fc\.weight$'),
        ({**changed(), 'a\nb': torch.randn(2)}, r'surplus keys \(1\): a b$'),
        ({**changed(), 3: torch.randn(2)}, r'surplus keys \(1\): 3$'),
        (changed(head__query__bias=torch.randn(10)), r'head\.query\.bias has shape \[10\], expected \[8000\]$'),
        (changed(head__query__bias=[0.5] * 8000), r'head\.query\.bias is a list, expected a dense tensor$'),
        (changed(head__query__bias=torch.randn(8000).to_sparse()), r'head\.query\.bias is a Tensor, expected a dense'),
        (changed(head__query__bias=torch.arange(8000)), r'type torch\.int64, expected torch\.float32$'),
        (changed(head__query__bias=torch.full((8000,), float('nan'))), r'head\.query\.bias .*NaN or infinite'),
        (changed(features__0__1__running_var=torch.tensor([1.] * 15 + [float('inf')])),
         r'0\.1\.running_var .*infinite'),
        ([torch.randn(3)], r'the file holds a list; expected a dict of tensors$'),
        ({**changed(), 'module.head.query.bias': torch.randn(8000)}, r'with and without the prefix "module\."'))


def check_messages(cases):
    for state_dict, wanted in cases:
        message = refusal(state_dict)
        assert message.startswith(f'{NAME}: ')
        assert re.search(wanted, message), message


def test_weights_that_do_not_fit(few_models):
    check_messages(unfit())


@pytest.mark.exhaustive
def test_weights_that_fit_none_of_the_release():
    check_messages(unfit())


def test_state_dict_is_left_as_it_was():
    weights = cheap_state_dict(NAME)
    before = dict(weights)
    convert_released(weights, NAME)
    assert weights.keys() == before.keys() and all(weights[key] is before[key] for key in before)


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'deit_small_patch16_224_noah'])
def test_layer_before_the_head_only_in_thin_deits(few_models, name):
    weights = cheap_state_dict(name)
    weights['pre_logits.fc.weight'] = torch.randn(192, 192)
    weights['pre_logits.fc.bias'] = torch.randn(192)
    assert 'surplus keys (2): pre_logits.fc.weight, pre_logits.fc.bias' in refusal(weights, name)
