"""Person re-identification: CMC and mAP against a plain loop, the dataset's layout, the model, a run, its picture."""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from noah_zoo import NoahHead
from noah_zoo.data import create_dataset
from noah_zoo.data.factory import create_datasets
from noah_zoo.tasks.ranking import Identified, cmc_map
from noah_zoo.training import TrainConfig, configure, train

from ..commands import call
from ..pictures import make_market, write_person


def plain_cmc_map(query, gallery, ranks=(1, 5, 10)):
    """The definition, image by image."""
    hits, precisions = [], []
    for feature, identity, camera in zip(*(x.tolist() for x in query)):
        similarity = [
            sum(a * b for a, b in zip(feature, other)) / (np.linalg.norm(feature) * np.linalg.norm(other))
            for other in gallery.features.tolist()]
        order = sorted(range(len(similarity)), key=lambda i: (-round(similarity[i], 9), i))
        kept = [i for i in order if gallery.ids[i] != -1 and not (
            gallery.ids[i] == identity and gallery.cameras[i] == camera)]
        places = [place for place, i in enumerate(kept, 1) if gallery.ids[i] == identity]
        if places:
            hits.append(places[0])
            precisions.append(np.mean([n / place for n, place in enumerate(places, 1)]))
    figures = {f'rank{rank}': 100 * np.mean([hit <= rank for hit in hits]) for rank in ranks}
    return {**figures, 'mAP': 100 * np.mean(precisions), 'queries': len(hits)}


def random_images(count, identities, seed, junk=False):
    rng = np.random.default_rng(seed)
    ids = rng.choice(([-1, 0] if junk else []) + list(range(1, identities + 1)), count)
    features = rng.integers(-2, 3, (count, 6)) + 0.5  # many equal ones
    cameras = torch.tensor(rng.integers(1, 4, count))
    return Identified(torch.tensor(features, dtype=torch.float32), torch.tensor(ids), cameras)


@pytest.mark.parametrize('seed', range(3))
def test_against_a_plain_loop(seed):
    query, gallery = random_images(40, 30, seed), random_images(90, 20, seed + 10, junk=True)
    gallery.features[5:20] = gallery.features[40:55]  # ties of several identities
    assert {-1, 0} <= set(gallery.ids.tolist())
    expected = plain_cmc_map(query, gallery)
    assert 0 < expected['queries'] < 40  # some have no match
    for block in (1, 7, 100):
        assert cmc_map(query, gallery, block=block) == pytest.approx(expected, abs=1e-9)


def test_by_hand():
    # Of identity 1: first a wrong one, then junk and the query's own camera, which do not count, then two matches.
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    gallery = Identified(features, torch.tensor([2, -1, 1, 1, 0, 1]), torch.tensor([2, 2, 1, 2, 3, 3]))
    query = Identified(torch.tensor([[1., 0.], [1., 0.]]), torch.tensor([1, 7]), torch.tensor([1, 1]))
    figures = cmc_map(query, gallery, ranks=(1, 2))
    assert figures == pytest.approx({'rank1': 0, 'rank2': 100, 'mAP': 100 * (1 / 2 + 2 / 4) / 2, 'queries': 1})
    with pytest.raises(ValueError, match='none of the 1 queries has an image of the same identity by another camera'):
        cmc_map(Identified(*(x[1:] for x in query)), gallery)
    with pytest.raises(ValueError, match='none of the 2 queries'):
        cmc_map(query, Identified(*(x[:0] for x in gallery)))


@pytest.mark.slow
def test_market_1501_takes_seconds():
    torch.manual_seed(0)
    query, gallery = (
        Identified(torch.randn(count, 512), torch.randint(-1, 751, (count,)), torch.randint(1, 7, (count,)))
        for count in (3368, 15913))
    start = time.perf_counter()
    cmc_map(query, gallery)
    assert time.perf_counter() - start < 60


@pytest.fixture(scope='module')
def market(tmp_path_factory):
    root = tmp_path_factory.mktemp('market1501')
    make_market(root)
    return root


def test_dataset(market):
    train_set, val_set = create_datasets(TrainConfig(
        model='', output='', task='reid', dataset='market1501', data_dir=str(market)))
    assert train_set.class_names == ('0002', '0007', '0011', '0012') and len(train_set) == 12
    assert train_set.read(3)[1] == 1 and train_set.where(3).endswith('0007_c1s1_000451_03.jpg')
    assert len(val_set) == 4 + 12 + 2
    image, label = val_set.read(0)
    assert image.size == (64, 128) and label.tolist() == [1, 1, 1]
    assert val_set.labels[4:6].tolist() == [[-1, 1, 0], [0, 1, 0]] and val_set.labels[:, 2].sum() == 4


def test_bad_folders(market, tmp_path):
    with pytest.raises(FileNotFoundError, match='no .jpg files in .*bounding_box_train; expected bounding_box_train'):
        create_dataset('market1501', str(tmp_path), 'train')
    folder = tmp_path / 'bounding_box_train'
    write_person(folder / 'person 7.jpg', 7, 1)
    with pytest.raises(ValueError, match=r'person 7\.jpg: not a name like 0002_c1s1_000451_03\.jpg'):
        create_dataset('market1501', str(tmp_path), 'train')
    (folder / 'person 7.jpg').rename(folder / '0000_c1s1_000001_00.jpg')
    with pytest.raises(ValueError, match='identities -1 .junk. and 0 .distractors. are for the gallery only'):
        create_dataset('market1501', str(tmp_path), 'train')
    (tmp_path / 'query').mkdir()
    done = call('reid', 'evaluate', '--model', 'reid_resnet50', '--data-dir', tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith('noah-zoo reid evaluate: error: market1501: no .jpg files in ')
    assert done.stderr.count('\n') == 1


def test_model():
    torch.manual_seed(0)
    twin = timm.create_model('reid_resnet50', num_classes=751).eval()
    noah = timm.create_model('noah', backbone='reid_resnet50', num_classes=751).eval()
    head = noah.get_classifier()
    assert isinstance(head, NoahHead) and head.in_features == 512 and twin.fc.in_features == 512
    x = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        features = noah.forward_features(x)
        per_position = features.flatten(2).mT @ noah.embedding.weight.T + noah.embedding.bias
        torch.testing.assert_close(
            noah(x), head(per_position.unflatten(1, features.shape[2:])), rtol=1e-4, atol=1e-5)
        pooled = noah.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, per_position.mean(1), rtol=1e-4, atol=1e-5)
        assert twin(x).shape == (2, 751) and twin.forward_head(features, pre_logits=True).shape == (2, 512)
        scripted = torch.jit.script(twin)
        torch.testing.assert_close(scripted(x), twin(x), rtol=0, atol=1e-5)
        twin.reset_classifier(0, '')
        torch.testing.assert_close(
            twin(x), twin.embedding(twin.forward_features(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), rtol=1e-4,
            atol=1e-5)
        twin.reset_classifier(751, 'avg')
    counts = [sum(p.numel() for p in m.parameters()) for m in (twin, timm.create_model('resnet50', num_classes=0))]
    assert counts[0] - counts[1] == 512 * 2049 + 751 * 513


def test_backbone_from_resnet50s_weights(tmp_path):
    torch.manual_seed(0)
    resnet = timm.create_model('resnet50', num_classes=10)
    torch.save(resnet.state_dict(), tmp_path / 'resnet50.pth')
    noah = timm.create_model(
        'noah', backbone='reid_resnet50', num_classes=5, pretrained_backbone=str(tmp_path / 'resnet50.pth'))
    twin = timm.create_model(
        'reid_resnet50', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'resnet50.pth')))
    for model in (noah, twin):
        assert torch.equal(model.layer4[2].conv3.weight, resnet.layer4[2].conv3.weight)
        assert model.embedding.weight.std() > 0
    assert twin.fc.weight.shape == (1000, 512)


def test_trains_and_finds(market, tmp_path):
    done = call(
        'reid', 'train', '--data-dir', market, '--model', 'noah', '--model-kwargs', 'backbone=reid_resnet50',
        '--img-size', 64, '--epochs', 1, '-b', 4, '--lr', 0.01, '--workers', 0, '--cpu', '--output', tmp_path / 'run')
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['config']['sched'] == 'multistep' and summary['queries'] == 4 and 0 < summary['best']['mAP'] <= 100
    picture = tmp_path / 'ranking.png'
    done = call(
        'reid', 'evaluate', '--model', f'local-dir:{tmp_path / "run" / "best"}', '--data-dir', market, '--cpu',
        '--workers', 0, '--picture', picture, '--queries', 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'mAP {summary["best"]["mAP"]:.2f} % of 4 queries' in done.stdout
    with Image.open(picture) as image:
        assert image.size[0] > 1000


def test_a_trial_sees_queries_and_their_matches_first(market):
    rows = create_dataset('market1501', str(market), 'validation').rows.tolist()
    assert sorted(rows) == list(range(18)) and rows[:5] == [0, 6, 7, 8, 1]  # junk and distractors come last


@pytest.mark.exhaustive
def test_a_trial(market, tmp_path):
    done = call(
        'reid', 'train', '--data-dir', market, '--model', 'reid_resnet50', '--img-size', 64, '-b', 4, '--workers', 0,
        '--cpu', '--smoke', '--output', tmp_path / 'run')
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['queries'] == 3


def test_recipes():
    scratch, tuned = (configure('reid_resnet50', 'out', name) for name in ('reid', 'reid_finetune'))
    assert [(c.epochs, c.batch_size, c.lr, c.weight_decay) for c in (scratch, tuned)] == [
        (350, 64, 0.065, 1e-4), (150, 64, 3e-4, 1e-4)]
    assert (scratch.sched, scratch.decay_milestones) == ('multistep', (150, 225, 300))
    assert (tuned.opt, tuned.amsgrad, tuned.sched, tuned.decay_epochs) == ('adam', True, 'step', 60)


def test_its_embedding_is_not_frozen(market, tmp_path):
    with pytest.raises(ValueError, match='cache_features does not go with the task reid'):
        train(configure(
            'reid_resnet50', str(tmp_path), 'reid', task='reid', dataset='market1501', data_dir=str(market), cpu=True,
            workers=0, batch_size=4, cache_features=str(tmp_path)))


def in_a_new_process(*words):
    return subprocess.run(
        [sys.executable, '-m', 'noah_zoo', *words], capture_output=True, text=True, check=False,
        cwd=Path(__file__).resolve().parents[2])


@pytest.mark.parametrize('run', [call, pytest.param(in_a_new_process, marks=pytest.mark.process)])
def test_words_of_the_command(run):
    for word, code, text in (
            ('--help', 0, 'noah-zoo reid evaluate --model'), ('trian', 2, "invalid choice: 'trian' (choose from")):
        done = run('reid', word)
        assert done.returncode == code and text in done.stdout + done.stderr
