"""Several classes per image: figures against scikit-learn and by hand, losses, runs on annotated images."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from noah_zoo.data import create_dataset
from noah_zoo.data.images import read_image
from noah_zoo.inference.predict import DEFAULT_MODEL, predict
from noah_zoo.tasks.multilabel import Metrics, Multilabel, positive_weights
from noah_zoo.training import TrainConfig, configure, train
from noah_zoo.training.validate import validate

from ..pictures import make_coco

ROOT = Path(__file__).resolve().parents[2]


def figures(logits, targets, batch=7):
    metrics = Metrics(logits.shape[1], torch.device('cpu'))
    for start in range(0, len(logits), batch):
        metrics.update(logits[start:start + batch], targets[start:start + batch])
    return metrics


def test_against_scikit_learn():
    sklearn = pytest.importorskip('sklearn.metrics')
    rng = np.random.default_rng(0)
    for ties in (False, True):
        scores = rng.normal(size=(200, 9)).astype(np.float32)
        targets = (rng.random((200, 9)) < scores * 0.2 + 0.3).astype(np.int64)
        if ties:
            scores = scores.round()
            scores[:, 1] = 0.25
        found = figures(torch.from_numpy(scores), torch.from_numpy(targets)).compute()
        ap = [100 * sklearn.average_precision_score(targets[:, k], scores[:, k]) for k in range(9)]
        assert found['mAP'] == pytest.approx(np.mean(ap), abs=2e-4)
        top3 = np.zeros_like(targets)
        np.put_along_axis(top3, torch.from_numpy(scores).topk(3).indices.numpy(), 1, axis=1)
        for suffix, predicted in (('', scores > 0), ('_top3', (scores > 0) & (top3 > 0))):
            for letter, average in (('C', 'macro'), ('O', 'micro')):
                p, r = (
                    100 * score(targets, predicted, average=average, zero_division=0)
                    for score in (sklearn.precision_score, sklearn.recall_score))
                expected = {'P': p, 'R': r, 'F1': 2 * p * r / (p + r)}
                for name, value in expected.items():
                    assert found[f'{letter}{name}{suffix}'] == pytest.approx(value, abs=2e-4), (letter, name, suffix)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            torch.from_numpy(scores), torch.from_numpy(targets).float()).item()
        assert found['val_loss'] == pytest.approx(expected, rel=1e-5)


def test_by_hand():
    # Class a: right, right, missed. Class b: no positives, one false alarm. Class c: positives, never predicted.
    logits = torch.tensor([[2., -1., -3.], [1., 3., -2.], [-1., -2., -1.]])
    targets = torch.tensor([[1, 0, 0], [1, 0, 1], [1, 0, 1]])
    metrics = figures(logits, targets)
    found = metrics.compute()
    assert found['CP'] == pytest.approx(100 * (1 + 0) / 2)
    assert found['CR'] == pytest.approx(100 * (2 / 3 + 0) / 2, abs=1e-4)
    assert found['OP'] == pytest.approx(100 * 2 / 3, abs=1e-4) and found['OR'] == pytest.approx(100 * 2 / 5)
    assert found['mAP'] == 100  # of a and c, whose positives come first
    assert found['CF1'] == pytest.approx(100 * 2 * 0.5 / 3 / (0.5 + 1 / 3), abs=1e-4)
    rows = metrics.per_class(('a', 'b', 'c'))
    assert rows[1] == {'class': 'b', 'positives': 0, 'AP': None, 'precision': 0., 'recall': None}
    assert rows[2] == {'class': 'c', 'positives': 2, 'AP': 100., 'precision': None, 'recall': 0.}
    nothing = figures(torch.full((4, 3), -1.) + torch.rand(4, 3) / 2, torch.ones(4, 3, dtype=torch.int64)).compute()
    assert not any(nothing[name] for name in ('CP', 'CR', 'CF1', 'OP', 'OR', 'OF1'))
    assert all(math.isfinite(value) for value in nothing.values())


def test_losses():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 5), (torch.rand(6, 5) < 0.4).float()
    config = TrainConfig(model='', output='', task='multilabel')
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(Multilabel().create_criterion(config, None)(logits, targets), expected)
    config.loss = 'asl'
    p = logits.sigmoid()
    low = (1 - p + 0.05).clamp(max=1)  # the paper's formula: shifted probabilities, focusing of 1 and 4
    expected = -(targets * (1 - p) * p.log() + (1 - targets) * (1 - low) ** 4 * low.log()).sum(1).mean()
    torch.testing.assert_close(
        Multilabel().create_criterion(config, None)(logits, targets), expected, rtol=1e-5, atol=1e-6)
    config.loss = 'focal'
    with pytest.raises(ValueError, match="loss='focal' is not one of bce, asl"):
        Multilabel().check(config)
    config.loss, config.smoothing = 'bce', 0.2
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, 0.8 * targets + 0.1)
    torch.testing.assert_close(Multilabel().create_criterion(config, None)(logits, targets), expected)
    config.mixup = 0.1
    with pytest.raises(ValueError, match='mixup and cutmix are for one class per image'):
        Multilabel().check(config)


def test_weights_of_rare_classes(tmp_path):
    make_coco(tmp_path)
    images = create_dataset('coco', str(tmp_path), 'train')
    weights = positive_weights(images)
    positives = images.labels.sum(0)
    assert weights.tolist() == pytest.approx([(9 - n) / n for n in positives])
    config = TrainConfig(model='', output='', task='multilabel', class_weights=True)
    logits, targets = torch.randn(4, 3), torch.tensor([[1., 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    torch.testing.assert_close(Multilabel().create_criterion(config, images)(logits, targets), expected)
    with pytest.raises(ValueError, match="class_weights: no training images of 'zebra'"):
        positive_weights(images.take(np.flatnonzero(images.labels[:, 2] == 0)))


@pytest.mark.parametrize('recipe, loss', [
    ('coco_resnet101', 'bce'), pytest.param('coco_vit_large', 'asl', marks=pytest.mark.exhaustive)])
def test_a_run_on_coco(recipe, loss, tmp_path):
    make_coco(tmp_path / 'coco', images=48)
    summary = train(configure(
        DEFAULT_MODEL.split('.')[0], str(tmp_path / 'run'), recipe, dataset='coco', data_dir=str(tmp_path / 'coco'),
        task='multilabel', img_size=32, epochs=3, batch_size=8, workers=0, cpu=True))
    assert summary['config']['loss'] == loss
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    assert summary['best']['mAP'] == max(line['mAP'] for line in lines) > 0
    table = (tmp_path / 'run' / 'per_class.csv').read_text().splitlines()
    assert table[0] == 'class,positives,AP,precision,recall' and len(table) == 4
    name = f'local-dir:{tmp_path / "run" / "best"}'
    again = validate(name, 'coco', 'multilabel', str(tmp_path / 'coco'), cpu=True, workers=0)
    assert again['mAP'] == summary['best']['mAP'] and len(again['per_class']) == 3
    model = timm.create_model(name, pretrained=True).eval()
    image = next((tmp_path / 'coco' / 'val2014').glob('*.jpg'))
    predictions = next(predict(model, [image]))['predictions']
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        expected = model(transform(read_image(image)).unsqueeze(0))[0].sigmoid()
    assert {p['index']: p['probability'] for p in predictions} == pytest.approx(dict(enumerate(expected.tolist())))


def test_cached_features(tmp_path):
    make_coco(tmp_path / 'coco', images=24)
    lines = []
    for cache in (None, str(tmp_path / 'cache')):
        output = tmp_path / f'run {cache is None}'
        train(configure(
            'noah', str(output), 'none', dataset='coco', data_dir=str(tmp_path / 'coco'), task='multilabel', lr=0.01,
            loss='bce', model_kwargs=dict(backbone='test_resnet'), freeze=True, no_aug=True, cache_features=cache,
            img_size=64, epochs=2, batch_size=8, workers=0, cpu=True))
        lines.append([json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()])
    assert len(list((tmp_path / 'cache').glob('*.bin'))) == 2
    for plain, cached in zip(*lines, strict=True):  # features are bfloat16
        for key in ('train_loss', 'val_loss'):
            assert cached[key] == pytest.approx(plain[key], rel=0.01), key


@pytest.mark.process
def test_on_two_processes_with_one_cache(tmp_path):
    make_coco(tmp_path / 'coco', images=24)
    words = [
        str(ROOT / 'scripts' / 'finetune.py'), '--model', DEFAULT_MODEL, '--task', 'multilabel', '--dataset', 'coco',
        '--data-dir', str(tmp_path / 'coco'), '--cache-features', str(tmp_path / 'cache'), '--img-size', '32', '--cpu',
        '--epochs', '2', '-b', '8', '--workers', '0', '--model-kwargs', 'drop_rate=0']  # whose mask is a process's own
    lines = []
    for launcher, name in (
            ([], 'one'), (['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2'], 'two')):
        done = subprocess.run(
            [sys.executable, *launcher, *words, '--output', str(tmp_path / name)], capture_output=True, text=True,
            timeout=300, check=False, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stderr[-3000:]
        lines.append([json.loads(line) for line in (tmp_path / name / 'log.jsonl').read_text().splitlines()])
    assert len(list((tmp_path / 'cache').glob('*.bin'))) == 2
    for one, two in zip(*lines, strict=True):
        for key in ('train_loss', 'mAP', 'CP', 'OR', 'OF1_top3', 'val_loss'):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key


def test_tasks_are_not_mixed_up(tmp_path):
    make_coco(tmp_path, images=12)
    for task, expected in (('multiclass', 'coco is for --task multilabel, and the task is multiclass'),
                           ('multi', "task='multi' is not one of multiclass, multilabel")):
        with pytest.raises(ValueError, match=expected):
            train(configure(
                'mobilenetv2_035_noah', str(tmp_path / task), 'none', dataset='coco', data_dir=str(tmp_path), task=task,
                cpu=True, workers=0))
