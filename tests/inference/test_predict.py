"""predict.py as its users call it."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

from noah_zoo.catalog import FASHION_MNIST_CLASSES
from noah_zoo.inference.predict import DEFAULT_MODEL, SAMPLES, find_images, label_names, load_model, predict

from ..scripts import call

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    return call('predict.py', *args)


def test_the_main_job(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / 'scripts' / 'predict.py')], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.endswith('.png') for line in lines) == 12
    assert sum('%' in line for line in lines) == 12 * 3


def test_samples_are_recognised():
    results = list(predict(load_model(DEFAULT_MODEL), find_images([str(SAMPLES)])))
    truth = [Path(r['path']).stem.split('_', 1)[1] for r in results]
    guesses = [r['predictions'][0]['label'].lower().replace('/', '_').replace(' ', '_') for r in results]
    assert len(results) == 12 and len(set(truth)) == 10
    assert sum(t == g for t, g in zip(truth, guesses)) >= 10
    for result in results:
        probabilities = [p['probability'] for p in result['predictions']]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
        assert all(FASHION_MNIST_CLASSES[p['index']] == p['label'] for p in result['predictions'])


def test_json_files_and_folders(tmp_path):
    sample = sorted(SAMPLES.glob('*.png'))[0]
    (tmp_path / 'deep er' / 'x').mkdir(parents=True)
    shutil.copy(sample, tmp_path / 'deep er' / 'x' / 'a.png')
    Image.open(sample).convert('RGB').save(tmp_path / 'deep er' / 'b.JPG', 'JPEG')
    (tmp_path / 'deep er' / 'notes.txt').write_text('no image')
    result = run(tmp_path / 'deep er', sample, '--json', '--top-k', 20)
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert [Path(r['path']).name for r in shown] == ['b.JPG', 'a.png', sample.name]
    assert all(len(r['predictions']) == 10 for r in shown)
    assert shown[1]['predictions'] == shown[2]['predictions']
    assert sum(p['probability'] for p in shown[0]['predictions']) == pytest.approx(1, abs=1e-5)


def test_a_damaged_image_does_not_stop_the_others(tmp_path):
    sample = sorted(SAMPLES.glob('*.png'))[0]
    (tmp_path / 'a.png').write_bytes(sample.read_bytes()[:100])
    (tmp_path / 'b.png').write_bytes(b'')
    shutil.copy(sample, tmp_path / 'c.png')
    result = run(tmp_path)
    assert result.returncode == 1
    assert 'c.png' in result.stdout and 'a.png' not in result.stdout
    assert all(f'{name}.png: not a readable image' in result.stderr for name in 'ab')
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('args, message', [
    (['nowhere.jpg'], 'nowhere.jpg: no such file or folder'),
    (['--model', 'resnet18_noha'], "unknown model 'resnet18_noha'; did you mean resnet18_noah"),
    (['--model', 'resnet50_noah.nobody'], 'Invalid pretrained tag (nobody)'),
    (['--device', 'gpu'], 'on gpu'),
    (['--model', 'local-dir:/nowhere'], '/nowhere'),
    (['--top-k', '0'], "'0' is not a positive number"),
])
def test_bad_input(args, message):
    result = run(*args)
    assert result.returncode == 2 and message in result.stderr
    assert 'Traceback' not in result.stderr and not result.stdout


def test_empty_folder(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2 and 'no image in this folder' in result.stderr


def test_label_names():
    assert label_names(timm.create_model('resnet18', num_classes=3)) == ['0', '1', '2']
    assert label_names(timm.create_model('resnet18'))[1].startswith('goldfish')
