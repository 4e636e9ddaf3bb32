"""Heads on frozen features: what all heads have in common, features, splits, training, real runs, refusals."""
import dataclasses
import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from noah_zoo import NoahHead, add_noah_head
from noah_zoo.benchmark import probe as probe_module
from noah_zoo.benchmark.probe import (
    HEADS,
    Inputs,
    ProbeConfig,
    Rows,
    best_rate,
    create_images,
    equal_classes,
    evaluate_head,
    hold_out,
    search_rates,
    train_head,
    without_classifier,
)
from noah_zoo.benchmark.report import draw_probe, table_probe
from noah_zoo.benchmark.run import benchmark
from noah_zoo.benchmark.settings import Run
from noah_zoo.cli import benchmark as cli
from noah_zoo.data.base import Files
from noah_zoo.training.features import cache_features

from ..commands import call, interrupt
from ..pictures import make_fashion_mnist

# All heads

C, K, L = 96, 7, 9
INPUTS = Inputs(C, K, 10 ** 7, True)
PARAMS = {
    'linear': C * K + K,
    'noah': C * K + 2 * 4 * K,  # N = 4
    'csra': C * K,
    'simpool': 2 * C + 2 * C * C + C * K + K,
    'efficient_probing': 32 * C + C * C + C * K + K,
    'ml_decoder': (C * 768 + 768) + 4 * (768 * 768 + 768) + 2 * 2 * 768 + (2 * 768 * 2048 + 2048 + 768) + 768 * K + K,
    'latent': C + 4 * (C * C + C) + 2 * C + (2 * C * 4 * C + 4 * C + C) + C * K + K}


@pytest.mark.parametrize('name', HEADS)
def test_parameters_order_of_positions_and_gradients(name):
    assert PARAMS.keys() == HEADS.keys()
    torch.manual_seed(0)
    head = HEADS[name](INPUTS)
    assert sum(p.numel() for p in head.parameters()) == PARAMS[name]
    x = torch.randn(2, L, C, requires_grad=True)
    logits = head(x)
    assert logits.shape == (2, K)
    torch.testing.assert_close(head(x[:, torch.randperm(L)]), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(x[1:]), logits[1:], rtol=1e-4, atol=1e-4)  # an image by itself
    assert not torch.allclose(head(x.flip(2)), logits, atol=1e-2)  # channels do matter
    logits.logsumexp(dim=1).sum().backward()
    for place, tensor in [('x', x), *head.named_parameters()]:
        assert tensor.grad.isfinite().all(), place
        if (name, place) != ('noah', 'key.bias'):  # what is the same at all positions moves no softmax
            assert tensor.grad.any(), place


@pytest.mark.parametrize('width', [10, 192, 1001, 1280])
def test_heads_take_any_width(width):
    x = torch.randn(2, 4, width)
    for name, build in HEADS.items():
        assert build(Inputs(width, 3, 10 ** 6, False))(x).shape == (2, 3), name


def test_noah_is_what_add_noah_head_chooses():
    for name in ('mobilenetv2_100', 'resnet18', 'vit_tiny_patch16_224'):
        model = add_noah_head(timm.create_model(name), 5)
        head = model.get_classifier()
        backbone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in head.parameters())
        built = HEADS['noah'](Inputs(head.in_features, 5, backbone, True))
        assert type(built) is NoahHead
        assert (built.num_groups, built.key_ratio) == (head.num_groups, head.key_ratio)


# Features


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp('probe') / 'fashion_mnist'
    make_fashion_mnist(root, 5)
    return str(root)


@pytest.mark.parametrize('name', [
    'mobilenetv3_small_050', 'resnet18', 'test_vit', 'mobilenetv2_035_noah'])  # a 1x1 layer after pooling, none, tokens
def test_features_are_what_a_noah_head_is_given(name, data_dir, tmp_path):
    torch.manual_seed(0)
    images = create_images(ProbeConfig(data_dir=data_dir), quick=False)[1]
    size = 160 if name == 'test_vit' else 64
    transform = timm.data.create_transform((3, size, size), interpolation='bilinear')
    model = timm.create_model(name, num_classes=5)
    model = (model if name.endswith('_noah') else add_noah_head(model)).eval()
    given = []
    model.get_classifier().register_forward_pre_hook(lambda module, args: given.append(args[0]))
    x = torch.stack([transform(images.read(index)[0]) for index in (3, 1)])
    with torch.inference_mode():
        model(x)
    without_classifier(model, 5)
    rows = Rows(model, cache_features(model, images, transform, tmp_path, 4, 0), 'cpu')
    features, targets = rows.batch([3, 1])
    assert features.dtype == torch.float32 and features.ndim == 3 and not features.requires_grad
    assert targets.tolist() == images.labels[images.rows[[3, 1]]].tolist()
    # Kept as bfloat16, whose relative error is up to 2 ** -9, before the layer that comes after.
    torch.testing.assert_close(features, given[0].flatten(1, -2), rtol=0.02, atol=0.02 * given[0].abs().max().item())


# Splits


def images_of(counts):
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    images = Files.__new__(Files)
    images.paths = [f'{row}.png' for row in range(len(labels))]
    Files.__init__(images, [f'class {i}' for i in range(len(counts))], labels)
    return images


def test_hold_out_is_stratified_and_disjoint():
    images = images_of([50, 100, 25, 5]).take(range(3, 180))
    labels = images.labels[images.rows]
    for seed in (0, 1):
        fit, held_out = hold_out(images, seed)
        assert sorted([*fit, *held_out]) == list(range(177)) and len(held_out) == 35
        share = np.bincount(labels[held_out], minlength=4) / np.bincount(labels, minlength=4)
        assert np.abs(np.bincount(labels[held_out]) - 0.2 * np.bincount(labels)).max() < 1, share
    assert (hold_out(images, 0)[1] != hold_out(images, 1)[1]).any()


def test_equal_classes():
    images = images_of([50, 100, 25, 30])
    some = equal_classes(images, 80)
    assert np.bincount(some.labels[some.rows]).tolist() == [20] * 4 and (np.diff(some.rows) > 0).all()
    assert (some.rows == equal_classes(images, 80).rows).all()
    assert (some.rows != equal_classes(images, 80, seed=1).rows).any()
    with pytest.raises(ValueError, match="26 of each class, and 'class 2' has 25; accepted is up to 100"):
        equal_classes(images, 104)
    with pytest.raises(ValueError, match='train_images=81 is not a multiple of the 4 classes'):
        equal_classes(images, 81)


# Training


class MadeUp:
    """Features (N, L, C) in the place of a model's."""
    device = 'cpu'

    def __init__(self, count, seed, positions=4, width=12, classes=3):
        rng = np.random.RandomState(seed)
        centres = np.random.RandomState(9).randn(classes, width)
        self.targets = torch.from_numpy(rng.randint(classes, size=count))
        features = centres[self.targets][:, None] + 1.5 * rng.randn(count, positions, width)
        self.features, self.seen = torch.from_numpy(features).float(), []

    def batch(self, indices):
        self.seen.append(list(indices))
        return self.features[indices], self.targets[indices]


def test_linear_reaches_logistic_regression():
    fit, tested = MadeUp(400, seed=0), MadeUp(1000, seed=1)
    regression = LogisticRegression(max_iter=1000).fit(fit.features.mean(dim=1).numpy(), fit.targets.numpy())
    expected = 100 * regression.score(tested.features.mean(dim=1).numpy(), tested.targets.numpy())
    build = functools.partial(HEADS['linear'], Inputs(12, 3, 10 ** 6, True))
    head, seconds = train_head(build, fit, np.arange(400), lr=0.02, updates=200, seed=0)
    found = evaluate_head(head, tested, np.arange(1000), 3)['top1']
    assert expected > 90 and found > expected - 1.5 and seconds > 0


@pytest.mark.parametrize('left_out', [
    'ml_decoder', pytest.param(None, marks=pytest.mark.exhaustive)])  # it has ten million parameters
def test_every_head_learns_and_sees_the_same_batches(left_out):
    seen = {}
    for name, build in HEADS.items():
        if name == left_out:
            continue
        fit, tested = MadeUp(200, seed=0), MadeUp(300, seed=1)
        lr = 3e-4 if name == 'ml_decoder' else 0.05
        head, _ = train_head(
            functools.partial(build, Inputs(12, 3, 10 ** 6, True)), fit, np.arange(200), lr, updates=40, seed=3)
        seen[name] = fit.seen
        assert len(fit.seen) == 40 and {len(batch) for batch in fit.seen} == {64}
        assert evaluate_head(head, tested, np.arange(300), 3)['top1'] > 60, name  # a third by chance
    assert len({str(batches) for batches in seen.values()}) == 1
    other = MadeUp(200, seed=0)
    train_head(functools.partial(HEADS['linear'], Inputs(12, 3, 10 ** 6, True)), other, np.arange(200), 1e-3, 40, 4)
    assert other.seen != seen['linear']


def test_training_is_on_the_given_images_and_repeats():
    fit, indices = MadeUp(200, seed=0), np.arange(20, 60)
    build = functools.partial(HEADS['noah'], Inputs(12, 3, 10 ** 6, True))
    heads = [train_head(build, fit, indices, 1e-3, 7, seed)[0].state_dict() for seed in (0, 0, 1)]
    assert {index for batch in fit.seen for index in batch} == {*indices.tolist()}
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not torch.equal(heads[0]['value.weight'], heads[2]['value.weight'])


def test_best_rate():
    def result(top1, val_loss):
        return {'top1': top1, 'val_loss': val_loss}

    assert best_rate({1e-3: result(80., 1.), 1e-2: result(81., 9.), 1e-1: result(10., math.nan)}) == 1e-2
    assert best_rate({1e-3: result(81., 1.), 1e-2: result(81., 0.9)}) == 1e-2


@pytest.mark.parametrize('best, more, tried', [
    (1e-2, 2, [1e-3, 1e-2, 1e-1]), (1., 2, [1e-3, 1e-2, 1e-1, 1., 10.]), (10., 2, [1e-3, 1e-2, 1e-1, 1., 10.]),
    (1e-4, 1, [1e-4, 1e-3, 1e-2, 1e-1]), (1., 0, [1e-3, 1e-2, 1e-1])])
def test_search_goes_beyond_an_end(best, more, tried):
    calls = []

    def figures_of(lr):
        calls.append(lr)
        return {'top1': -abs(math.log(lr / best)), 'val_loss': 1.}

    found = search_rates(figures_of, [1e-3, 1e-2, 1e-1], more)
    assert sorted(found) == pytest.approx(tried) and len(calls) == len(tried) and calls[:3] == [1e-3, 1e-2, 1e-1]
    assert search_rates(figures_of, [1e-3], 2).keys() == {1e-3}


# Tables and pictures


def row(name, params, each, lr=1e-3, edge=False):
    case = dict(
        model='m', dataset='d', train_images=300, test_images=1000, positions=16, in_features=1280, num_classes=10,
        updates=1000, batch_size=64, lrs=[1e-4, 1e-3])
    top1 = dict(mean=statistics.mean(each), std=statistics.stdev(each) if len(each) > 1 else None, each=each)
    return dict(head=name, params=params, top1=top1, lr=lr, lr_at_edge=edge, seconds=[2., 4.], case=case)


def test_table_and_picture():
    rows = [row('linear', 12810, [80., 82.]), row('noah', 12960, [83.], 1e-4, True)]
    text = table_probe(rows)
    assert '| pooling + linear | 12,810 | 81.00 ± 1.41 | 80.00, 82.00 | 0.001 | 3 |' in text
    assert '| NOAH | 12,960 | 83.00 | 83.00 | 0.0001 (edge) | 3 |' in text
    assert 'm on d: 300 training and 1,000 test images, L=16, C=1280, K=10; 1,000 updates of 64 images' in text
    assert '(edge): ' in text.splitlines()[-1] and '(edge)' not in table_probe(rows[:1])
    axes, = draw_probe(rows).axes
    assert axes.get_xscale() == 'log' and not axes.get_legend()
    places = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert [container.get_label().split('\n')[0] for container in axes.containers] == ['NOAH', 'pooling + linear']
    assert places == pytest.approx([12960, 12810 * 1.1]) and len(places) == 2


# Real runs

QUICK = ('probe', '--quick', '--model', 'test_resnet', '--workers', '0')


def test_quick_run(data_dir, tmp_path):
    output, cache = tmp_path / 'new' / 'folder', tmp_path / 'cache'
    args = (*QUICK, '--data-dir', data_dir, '--output', output, '--cache-features', cache)
    done = call('benchmark', *args)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == ['probe-cpu-float32.json', 'probe-cpu-float32.png']
    result = json.loads((output / 'probe-cpu-float32.json').read_text())
    assert result['what'] == 'probe' and result['quick'] and result['versions']['torch'] == torch.__version__
    assert [row['head'] for row in result['rows']] == list(HEADS)
    for found in result['rows']:
        case = found['case']
        assert (case['train_images'], case['test_images'], case['positions']) == (60, 12, 4), case
        assert case['updates'] == 4 and case['model'] == 'test_resnet' and case['data_dir'] == data_dir
        assert case['dataset'] == 'fashion_mnist'
        assert len(found['top1']['each']) == len(found['seconds']) == 2 == len(found['held_out_top1'])
        assert found['top1']['mean'] == statistics.mean(found['top1']['each']) and found['lr_at_edge']
    assert Image.open(output / 'probe-cpu-float32.png').width > 500
    assert 'smoke run' in done.stdout and '| NOAH | ' in done.stdout and 'images, L=4, ' in done.stdout
    assert len(list(cache.glob('*.bin'))) == 2
    again = call('benchmark', *args, '--heads', 'noah', 'linear')
    assert again.returncode == 0 and len(list(cache.glob('*.bin'))) == 2  # the same features
    rows = json.loads((output / 'probe-cpu-float32.json').read_text())['rows']
    assert [row['head'] for row in rows] == ['noah', 'linear']
    assert rows[0]['top1'] == result['rows'][1]['top1']


@pytest.mark.process
def test_ctrl_c_leaves_nothing(data_dir, tmp_path, monkeypatch):
    monkeypatch.delenv('HF_HUB_DISABLE_PROGRESS_BARS')
    output = tmp_path / 'output'
    status, stderr = interrupt(
        'benchmark', 'probe', '--model', 'test_resnet', '--no-pretrained', '--img-size', 64, '--updates', 1000000,
        '--data-dir', data_dir, '--workers', 0, '--output', output, '--cache-features', tmp_path / 'cache',
        after=b'update/s')
    assert status == 130, stderr
    assert stderr.decode().splitlines()[-1].startswith('noah-zoo benchmark: interrupted') and b'Traceback' not in stderr
    assert not list(output.iterdir()) and not list((tmp_path / 'cache').glob('*.partial'))


# Refusals


@pytest.mark.parametrize('flags, message', [
    (['--heads', 'noah', 'nope'], "heads: 'nope' is not one of linear, noah, csra, simpool, efficient_probing, "),
    (['--model', 'nope'], "unknown model 'nope'"),
    (['--model', 'local-dir:nope'], 'nope'),
    (['--data-dir', 'nope'], 'folder: nope is not a folder'),
    (['--train-images', '6000'], 'train_images=6000 is 600 of each class, and '),
    (['--train-images', '0'], 'train_images=0: expected 1 or more'), (['--seeds', '0'], 'seeds=0: expected 1 or more'),
    (['--workers', '-1'], 'workers=-1: expected 0 or more'), (['--lrs', '0'], 'rates above 0'),
    (['--dtype', 'bfloat16'], "dtype='bfloat16': probe trains heads in float32"),
    (['--dataset', 'coco'], 'coco: '), (['--img-size', '8', '--model', 'resnet18', '--no-pretrained'], 'resnet18')])
def test_refusals_are_a_line(flags, message, data_dir, tmp_path):
    flags = [*(() if '--data-dir' in flags else ('--data-dir', data_dir)), *flags]
    done = call(
        'benchmark', 'probe', '--model', 'test_resnet', '--no-pretrained', '--workers', '0', '--output', tmp_path,
        '--cache-features', tmp_path / 'cache', *flags, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.glob('*.*')), done.stdout
    assert done.stderr.startswith('noah-zoo benchmark: error: ') and done.stderr.count('\n') == 1
    assert message in done.stderr


def test_a_stream_is_refused(monkeypatch):
    monkeypatch.setattr('noah_zoo.benchmark.probe.create_datasets', lambda config: (object(), object()))
    with pytest.raises(ValueError, match='wds/: a stream has no fixed images to probe on'):
        create_images(ProbeConfig(dataset='wds/'), quick=False)


def test_flags_of_probe_are_refused_with_other_measures(tmp_path):
    done = call('benchmark', 'head', '--seeds', '2', '--model', 'resnet18', '--output', tmp_path)
    assert done.returncode == 2 and done.stderr == 'noah-zoo benchmark: error: model, seeds: of probe only; got head\n'
    with pytest.raises(ValueError, match='of probe only'):
        next(benchmark(['head', 'pairs'], updates=3))
    with pytest.raises(ValueError, match='models, repeats: not of probe, which has its own settings'):
        next(benchmark(['probe'], models=['resnet18_noah'], repeats=3))
    assert Run(['head', 'probe'], probe=ProbeConfig(updates=3)).probe.updates == 3
    assert 'probe:\n  refused unless probe is among' in call('benchmark', '--help').stdout


def test_flags_are_the_settings():
    text = Path(cli.__file__).read_text(encoding='utf-8')
    group = text[text.index("add_argument_group('probe'"):]
    for field in dataclasses.fields(ProbeConfig):
        assert f"'--{field.name.replace('_', '-')}'" in group
    for name in HEADS:
        assert name in group


def test_learning_rate_warms_up_and_falls(monkeypatch):
    """For 5 % of the steps it rises from a tenth, then it falls to zero."""
    create, made, rates = probe_module.create_optimizer_v2, [], []
    monkeypatch.setattr(
        probe_module, 'create_optimizer_v2', lambda *args, **kwargs: made.append(create(*args, **kwargs)) or made[-1])
    train_head(
        functools.partial(HEADS['linear'], Inputs(12, 3, 10 ** 6, True)), MadeUp(200, seed=0), np.arange(200), 0.01,
        updates=100, seed=0, tick=lambda: rates.append(made[0].param_groups[0]['lr']))
    assert rates[0] == pytest.approx(0.0028) and np.argmax(rates) == 4 and max(rates) == pytest.approx(0.01, rel=0.01)
    assert (np.diff(rates[5:]) < 0).all() and rates[-1] < 1e-4
