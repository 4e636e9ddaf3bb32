"""Datasets and the training loop, by the command, on real images."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import noah_zoo  # noqa: F401  registers the models
from noah_zoo.catalog import FASHION_MNIST_CLASSES, SHIPPED
from noah_zoo.data import create_dataset
from noah_zoo.data.fashion_mnist import FASHION_MNIST_DIR, FashionMnist

from ..commands import call
from ..pictures import samples

ROOT = Path(__file__).resolve().parents[2]
FAST = ['--model', 'mobilenetv2_035_noah', '--img-size', '32', '--epochs', '2', '-b', '16', '--workers', '0', '--cpu',
        '--recipe', 'none', '--sched-on-updates']


def train(*args):
    return call('train', *FAST, *args)


@pytest.fixture(scope='module')
def run_dir(idx_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp('run') / 'a run'
    result = train('--data-dir', idx_dir, '--output', output, '--model-kwargs', 'output_stride=16', 'num_groups=4')
    assert result.returncode == 0, result.stderr
    assert 'val top-1' in result.stdout
    return output


def test_run_leaves_a_loadable_model(run_dir):
    model = timm.create_model(f'local-dir:{run_dir / "best"}', pretrained=True)
    assert model.get_classifier().num_groups == 4
    args = json.loads((run_dir / 'best' / 'config.json').read_text())['model_args']
    assert (args['num_groups'], args['key_ratio'], args['output_stride']) == (4, 0.25, 16)
    assert model.pretrained_cfg['label_names'] == list(FASHION_MNIST_CLASSES)
    assert tuple(model.pretrained_cfg['input_size']) == (3, 32, 32)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[-1] == 2  # output_stride=16
    lines = [json.loads(line) for line in (run_dir / 'log.jsonl').read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [1, 2]
    summary = json.loads((run_dir / 'summary.json').read_text())
    assert summary['top1'] == lines[-1]['top1'] and summary['torch'] == torch.__version__
    assert summary['config']['model_kwargs'] == {'output_stride': 16, 'num_groups': 4}


def test_any_backbone_and_the_heads_of_the_ablations(idx_dir, tmp_path):
    result = train(
        '--model', 'noah', '--data-dir', idx_dir, '--output', tmp_path, '--noah-variant', 'b', '--smoke', '1',
        '--model-kwargs', 'backbone=test_resnet', 'num_groups=2')
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / 'best' / 'config.json').read_text())
    wanted = dict(backbone='test_resnet', num_groups=2, key_ratio=0.125, noah_variant='b')
    assert config['architecture'] == 'noah' and wanted.items() <= config['model_args'].items()
    model = timm.create_model(f'local-dir:{tmp_path / "best"}', pretrained=True)
    assert type(model.get_classifier()).__name__ == 'ProjectedConcat' and model.num_classes == 10
    result = train('--data-dir', idx_dir, '--output', tmp_path / 'x', '--noah-variant', 'z')
    assert result.returncode == 2 and "noah_variant='z' is unknown; choose from no_split" in result.stderr
    result = train('--model', 'resnet18', '--data-dir', idx_dir, '--output', tmp_path / 'x', '--noah-variant', 'a')
    assert result.returncode == 2 and 'resnet18 does not take these arguments' in result.stderr


def test_evaluation_is_that_of_the_saved_model(run_dir, idx_dir):
    model = timm.create_model(f'local-dir:{run_dir / "best"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    dataset = FashionMnist(idx_dir, 'test', transform)
    with torch.no_grad():
        correct = sum((model(x[None]).argmax().item() == y) for x, y in dataset)
    assert json.loads((run_dir / 'summary.json').read_text())['best']['top1'] == pytest.approx(
        100 * correct / len(dataset), abs=1e-3)


def test_same_seed_same_run_other_seed_other_run(run_dir, idx_dir, tmp_path):
    figures = []
    for seed in (0, 1):
        result = train('--data-dir', idx_dir, '--output', tmp_path / str(seed), '--seed', seed,
                       '--model-kwargs', 'output_stride=16', 'num_groups=4')
        assert result.returncode == 0, result.stderr
        figures.append(json.loads((tmp_path / str(seed) / 'summary.json').read_text())['train_loss'])
    first = json.loads((run_dir / 'summary.json').read_text())['train_loss']
    assert figures[0] == pytest.approx(first, rel=1e-6)
    assert figures[1] != pytest.approx(first, rel=1e-6)


def test_training_learns(idx_dir, tmp_path, curves):
    result = train(
        '--model', 'noah', '--model-kwargs', 'backbone=test_resnet', '--data-dir', idx_dir, '--output',
        tmp_path / 'run', '--epochs', 12, '--lr', 0.05, '--scale', 1, 1)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    assert 2 < lines[0]['train_loss'] < 3 and lines[-1]['train_loss'] < 1  # at first that of chance, 2.3
    assert lines[0]['top1'] < 40 and lines[-1]['top1'] > 50
    assert (tmp_path / 'run' / 'curve.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.exhaustive
def test_vanilla_twin_trains_by_the_same_command(idx_dir, tmp_path):
    result = train('--data-dir', idx_dir, '--output', tmp_path / 'run', '--model', 'mobilenetv2_035')
    assert result.returncode == 0, result.stderr
    assert timm.create_model(f'local-dir:{tmp_path / "run" / "best"}', pretrained=True).num_classes == 10


def test_hub_dataset(tmp_path):
    # The layout of zalando-datasets/fashion_mnist: parquet files with the columns image and label.
    import datasets
    images, labels = samples()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(FASHION_MNIST_CLASSES)))
    for split in ('train', 'test'):
        data = {'image': [Image.fromarray(i) for i in images], 'label': labels}
        datasets.Dataset.from_dict(data, features=features).to_parquet(str(tmp_path / 'data' / f'{split}.parquet'))
    name = f'hfds/{tmp_path / "data"}'
    dataset = create_dataset(name, str(tmp_path / 'cache'), 'test')
    assert len(dataset) == len(images) and dataset.class_names == FASHION_MNIST_CLASSES
    image, label = dataset[3]
    assert label == labels[3] and image.mode == 'RGB' and np.array_equal(np.asarray(image)[..., 0], images[3])
    cache, run = tmp_path / 'cache', tmp_path / 'run'
    result = train(
        '--dataset', name, '--data-dir', cache, '--val-split', 'test', '-b', 4, '--lr', 0.001, '--output', run)
    assert result.returncode == 0, result.stderr


def test_folder_dataset(tmp_path):
    images, labels = samples()
    for split in ('train', 'validation'):
        for i, (image, label) in enumerate(zip(images * 2, labels * 2)):
            folder = tmp_path / split / FASHION_MNIST_CLASSES[label].replace('/', ' ')
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f'{i}.png')
    dataset = create_dataset('folder', str(tmp_path), 'train')
    assert dataset.class_names == tuple(sorted(name.replace('/', ' ') for name in FASHION_MNIST_CLASSES))
    result = train('--dataset', 'folder', '--data-dir', tmp_path, '--output', tmp_path / 'run')
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('args, message', [
    (['--data-dir', '/nowhere', '--dataset', 'fashion_mnist'], 'neither train-images-idx3-ubyte nor'),
    (['--dataset', 'folder', '--data-dir', ''], 'name the folder'),
    (['-b', '64'], 'the training set has 48 images, fewer than a batch of 64'),
    (['--dataset', 'folder', '--data-dir', '/nowhere'], '/nowhere is not a folder'),
    (['--model', 'resnet18_noha'], 'resnet18_noha'),
    (['--opt', 'sdg'], 'sdg'),
])
def test_bad_input(args, message, idx_dir, tmp_path):
    result = train('--data-dir', idx_dir, '--output', tmp_path / 'run', *args)
    assert result.returncode == 2 and message in result.stderr and 'Traceback' not in result.stderr
    assert not (tmp_path / 'run').exists()


def test_a_finished_run_from_before_there_were_tasks(run_dir, idx_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / 'run')
    summary = json.loads((run_dir / 'summary.json').read_text())
    assert summary['config'].pop('task') == 'multiclass'
    (tmp_path / 'run' / 'summary.json').write_text(json.dumps(summary))
    done = train('--data-dir', idx_dir, '--output', tmp_path / 'run', '--resume', 'auto', '--model-kwargs',
                 'output_stride=16', 'num_groups=4')
    assert done.returncode == 0 and f'val top-1 {summary["top1"]:.2f}' in done.stdout, done.stderr


def test_a_finished_run_is_not_overwritten(run_dir, idx_dir):
    before = {p.name: p.read_bytes() for p in run_dir.iterdir() if p.is_file()}
    result = train('--data-dir', idx_dir, '--output', run_dir)
    assert result.returncode == 2 and 'has a finished run' in result.stderr
    assert {p.name: p.read_bytes() for p in run_dir.iterdir() if p.is_file()} == before


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST_DIR.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_shipped_weights_on_the_whole_test_set():
    (name, shipped), = SHIPPED.items()
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    loader = torch.utils.data.DataLoader(FashionMnist(FASHION_MNIST_DIR, 'test', transform), batch_size=250)
    with torch.inference_mode():
        correct = sum((model(x).argmax(dim=1) == y).sum().item() for x, y in loader)
    assert correct / 100 == pytest.approx(shipped.top1, abs=0.02)
    assert correct / 100 >= 89
