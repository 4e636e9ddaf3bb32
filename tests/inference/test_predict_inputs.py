"""What `noah-zoo predict` is given and what it prints: patterns, lists, URLs, other encodings, logits of NaN."""
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from noah_zoo.cli.predict import ERRORS_SHOWN
from noah_zoo.data.images import DamagedImageError, read_image
from noah_zoo.inference.predict import SAMPLES, find_images

from ..commands import ROOT, call
from ..data.files import photo

BAG = SAMPLES / '0018_bag.png'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'sub').mkdir()
    for name in 'a.png', 'b10.png', 'b2.png', 'sub/c.png':
        photo().save(tmp_path / name)
    (tmp_path / 'note.txt').write_text('no image')
    return tmp_path


@pytest.fixture(scope='module')
def broken_model(tmp_path_factory):
    model = timm.create_model('mobilenetv2_035_noah', num_classes=3)
    with torch.no_grad():
        model.classifier.value.weight[0] = float('nan')
    place = tmp_path_factory.mktemp('broken')
    save_for_hf(model, str(place), safe_serialization=True)
    return f'local-dir:{place}'


def strict(text):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')
    return json.loads(text, parse_constant=refuse)


def test_patterns(folder):
    found = [Path(path).relative_to(folder).as_posix() for path in find_images([f'{folder}/*.png'])]
    assert found == ['a.png', 'b2.png', 'b10.png']
    assert len(find_images([f'{folder}/**/*.png'])) == 4
    photo().save(folder / '[x].png')  # a name that looks like a pattern
    assert find_images([f'{folder}/[x].png']) == [f'{folder}/[x].png']
    with pytest.raises(FileNotFoundError, match=r'\*.gif: no file matches'):
        find_images([f'{folder}/*.gif'])
    with pytest.raises(ValueError, match='https://x/y.png: URLs are not read; download the file'):
        find_images(['https://x/y.png'])


def test_a_list_on_standard_input(folder, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(f'{folder}/b2.png\n\n{folder}/a.png\n'))
    done = call('predict', '-', '--json')
    assert [Path(row['path']).name for row in json.loads(done.stdout)] == ['b2.png', 'a.png']
    monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
    done = call('predict', '-')
    assert done.returncode == 2 and 'the list on standard input is empty' in done.stderr


def test_logits_that_are_not_finite_are_errors(broken_model, tmp_path):
    for suffix in 'csv', 'jsonl':
        done = call('predict', BAG, '--model', broken_model, '--output', tmp_path / f'rows.{suffix}')
        assert done.returncode == 1 and 'the logits of the model are not finite' in done.stderr
    row, = map(strict, (tmp_path / 'rows.jsonl').read_text().splitlines())
    assert 'predictions' not in row and row['error'].endswith('the logits of the model are not finite')
    assert 'nan' not in (tmp_path / 'rows.csv').read_text()
    done = call('predict', BAG, '--model', broken_model, '--json')
    assert done.returncode == 1 and strict(done.stdout) == [{'path': str(BAG), 'error': row['error']}]
    done = call('predict', BAG, '--model', broken_model)
    assert done.returncode == 1 and not done.stdout


def test_metrics_that_are_not_finite_are_null(broken_model, photos):
    done = call(
        'validate', '--model', broken_model, '--data-dir', photos, '--json', '--workers', 0, '--img-size', 32, '--cpu')
    assert done.returncode == 0, done.stderr
    assert strict(done.stdout)['val_loss'] is None


def test_many_errors_are_counted(tmp_path):
    for i in range(ERRORS_SHOWN + 5):
        (tmp_path / f'{i}.png').write_bytes(b'\x89PNG')
    done = call('predict', tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == ERRORS_SHOWN + 1
    assert lines[-1] == f'{ERRORS_SHOWN + 5} images cannot be classified; the first {ERRORS_SHOWN} are above'


@pytest.mark.process
def test_names_outside_of_the_encoding_of_the_output(folder):
    photo().save(folder / '\u7167\u7247.png')
    done = subprocess.run(
        [sys.executable, '-m', 'noah_zoo', 'predict', folder], capture_output=True, cwd=ROOT, timeout=300, check=False,
        env={'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'cp1252', 'HOME': str(folder), 'PATH': ''})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b'.png') == 5 and b'\\u7167\\u7247.png' in done.stdout


def test_a_scan_of_many_pixels(tmp_path, monkeypatch):
    path = tmp_path / 'scan.png'
    Image.new('1', (300, 300)).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40_000)
    with pytest.raises(DamagedImageError, match='more than 80,000 pixels, as a decompression bomb has; if the file is '
                                                'sound, set the environment variable NOAH_ZOO_MAX_PIXELS'):
        read_image(path)


def test_outputs_that_cannot_be_written_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    def load(*args):
        raise AssertionError('loaded')
    monkeypatch.setattr('noah_zoo.inference.predict.load_model', load)
    monkeypatch.setattr('os.access', lambda path, mode: False)
    for words in (['predict', BAG, '--output', tmp_path / 'x.csv'], ['export', '--output', tmp_path / 'x.onnx']):
        done = call(*words)
        assert done.returncode == 2 and 'cannot be written; choose another --output' in done.stderr, done.stderr


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    photo().save(tmp_path / 'a.png')
    done = call('predict', '~/a.png', '--output=~/rows.csv')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'rows.csv').read_text().splitlines()[1].startswith(str(tmp_path / 'a.png'))


def test_a_device_that_is_not_there():
    for words in (['predict', '--device', 'cuda:7'], ['validate', '--model', 'resnet18', '--device', 'cuda:7'],
                  ['train', '--model', 'resnet18', '--output', 'x', '--device', 'cuda:7']):
        done = call(*words)
        assert done.returncode == 2 and "device 'cuda:7': " in done.stderr and '; this machine has cpu' in done.stderr
        assert done.stderr.count('\n') == 1, done.stderr


def test_an_archive_instead_of_a_folder(tmp_path):
    (tmp_path / 'photos.zip').write_bytes(b'PK')
    done = call('validate', '--model', 'mobilenetv2_035_noah.fashion_mnist', '--data-dir', tmp_path / 'photos.zip')
    assert done.returncode == 2 and 'photos.zip is a file, and --data-dir takes a folder; unpack it' in done.stderr
