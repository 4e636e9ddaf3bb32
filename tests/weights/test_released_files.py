"""Released files on disk: read without executing them, converted whole or not at all, loaded by timm."""
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from noah_zoo.catalog import CATALOG
from noah_zoo.weights import convert_file, convert_released, read_released
from noah_zoo.weights import released as module

from ..commands import call
from ..released import cheap_state_dict, images, released_state_dict

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'scripts' / 'convert.py'
NAME = 'mobilenetv2_035_noah'


def save(path, name, **kwargs):
    weights = {f'module.{key}': value for key, value in released_state_dict(name).items()}
    torch.save(dict(state_dict=weights, epoch=99), path, **kwargs)
    return path


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in folder.rglob('*'))


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    return save(tmp_path_factory.mktemp('released') / 'model_best.pth.tar', NAME)


# Reading


class Touch:
    """Unpickling it runs a shell command that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch "{self.marker}"',)


def refused(path):
    with pytest.raises(ValueError) as info:
        read_released(path)
    message = str(info.value)
    assert message.startswith(f'{path}: ') and '\n' not in message
    return message


@pytest.mark.parametrize('new_format', [True, False])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, new_format):
    weights = dict(released_state_dict(NAME), extra=Touch(tmp_path / 'marker'))
    path = tmp_path / 'file.pth'
    torch.save(dict(model=weights), path, _use_new_zipfile_serialization=new_format)
    before = listing(tmp_path)
    message = refused(path)
    assert re.search(r'(posix|nt)\.system', message) and 'nothing in it was executed' in message
    assert listing(tmp_path) == before
    torch.load(path, weights_only=False)
    assert (tmp_path / 'marker').exists()  # the file does run its code when it is let


def test_plain_pickle_is_not_executed(tmp_path):
    path = tmp_path / 'file.pth'
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Touch(tmp_path / 'marker'), protocol=protocol))
        message = refused(path)
        assert re.search(r'(posix|nt)\.system' if protocol in (2, 3) else 'not a checkpoint', message), protocol
        assert [p.name for p in tmp_path.iterdir()] == ['file.pth']


def test_foreign_class_is_named(tmp_path):
    torch.save(dict(model=released_state_dict(NAME), args=Path('x')), tmp_path / 'file.pth')
    assert re.search(r'names pathlib\S*Path', refused(tmp_path / 'file.pth'))


@pytest.mark.parametrize('new_format', [True, False])
def test_truncated(tmp_path, new_format):
    path = save(tmp_path / 'file.pth', NAME, _use_new_zipfile_serialization=new_format)
    size = path.stat().st_size
    for share in (0.9999999, 0.999, 0.9, 0.5, 0.1, 0.01, 0.0001, 0.000005, 0.0000005):
        os.truncate(path, int(size * share))
        assert re.search('truncated|not a checkpoint', refused(path)), share


def test_no_checkpoint(tmp_path):
    for content, wanted in (
            (b'', 'the file is empty'),
            (b'epoch,top1\n1,71.8\n', 'not a checkpoint'),
            (b'\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>', 'web page'),
            (safetensors.torch.save({'fc.key.weight': torch.ones(3)}), 'safetensors format'),
            (b'\x80\x02garbage', 'truncated, damaged or not a checkpoint'),
            (b'PK\x03\x04garbage', 'truncated, damaged or not a checkpoint'),
            (b'\x00' * 4096, 'not a checkpoint')):
        for suffix in ('pth', 'safetensors'):
            path = tmp_path / f'file.{suffix}'
            path.write_bytes(content)
            assert wanted in refused(path), (content, suffix)


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / 'drive-download.zip', 'w') as archive:
        archive.writestr('resnet18.pth.tar', b'...')
    assert 'not a checkpoint' in refused(tmp_path / 'drive-download.zip')


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        read_released(tmp_path / 'absent.pth')
    with pytest.raises(IsADirectoryError, match='is a folder'):
        read_released(tmp_path)


def test_reading_allows_no_other_global_afterwards(released):
    read_released(released)
    buffer = io.BytesIO()
    torch.save(module.argparse.Namespace(lr=0.1), buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match='Namespace'):
        torch.load(buffer, weights_only=True)


# Converting


@pytest.mark.parametrize('case', [
    'mobilenetv2_035_noah', 'deit_tiny_050_patch16_224_noah', 'deit_tiny_050_patch16_224.plain',
    *(pytest.param(case, marks=pytest.mark.exhaustive) for case in (
        'resnet18_noah', 'resnet18', 'shufflenetv2_100_noah', 'deit_tiny_050_patch16_224_noah.plain',
        'deit_tiny_050_patch16_224', 'deit_tiny_patch16_224', 'pvt_tiny_050_noah', 'pvt_tiny_050',
        'mixer_s16_050_224_noah', 'gmlp_ti16_050_224'))])
def test_folder_rebuilds_the_model(tmp_path, case):
    name = case.replace('.plain', '')
    row = next(row for row in CATALOG.values() if name in (row.name, row.vanilla))
    thin = 'deit_tiny_050' in name
    weights = released_state_dict(case)
    torch.save(dict(model=weights), tmp_path / 'file.pth')
    folder = convert_file(tmp_path / 'file.pth', name, tmp_path / 'new' / 'parents' / name)
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert [p.name for p in folder.parent.iterdir()] == [name]

    expected = timm.create_model(name, **({'pre_logits': not case.endswith('.plain')} if thin else {})).eval()
    expected.load_state_dict(convert_released(weights, name))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert type(model) is type(expected)
    batch = images(7).float()
    with torch.no_grad():
        assert torch.equal(model(batch), expected(batch))
        features = model.forward_features(batch)
        assert torch.equal(
            model.forward_head(features, pre_logits=True), expected.forward_head(features, pre_logits=True))
        other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=37, in_chans=1).eval()
        assert other(batch[:, :1]).shape == (2, 37)
        pooled = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=0).eval()
        assert pooled(batch).shape == (2, model.head_hidden_size)

    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    assert config['architecture'] == name and config.get('model_args', {}).get('pre_logits', False) == (
        thin and not case.endswith('.plain'))
    for classifier in (model.get_classifier(), other.get_classifier()):
        if name == row.name:
            assert (classifier.num_groups, classifier.key_ratio, classifier.drop_rate) == (
                row.num_groups, row.key_ratio, row.drop_rate)
            assert config['model_args']['num_groups'] == row.num_groups
            assert config['model_args']['key_ratio'] == row.key_ratio
        else:
            assert isinstance(classifier, torch.nn.Linear)
    backbone = model.state_dict()
    place = next(n for n, module in model.named_modules() if module is model.get_classifier())
    for key, value in other.state_dict().items():
        if not key.startswith(place) and value.shape == backbone[key].shape:
            assert torch.equal(value, backbone[key])


@pytest.mark.parametrize('name, wanted', [
    ('mobilenetv2_035', (0.875, 'bilinear', 0.485, 0.229)),
    ('gmlp_ti16_050_224_noah', (0.9, 'bicubic', 0.5, 0.5)),
    *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
        ('mobilenetv2_035_noah', (0.875, 'bilinear', 0.485, 0.229)),
        ('resnet18', (0.875, 'bilinear', 0.485, 0.229)), ('shufflenetv2_100', (0.875, 'bilinear', 0.485, 0.229)),
        ('deit_tiny_patch16_224', (0.875, 'bicubic', 0.485, 0.229)),
        ('deit_tiny_050_patch16_224', (0.875, 'bicubic', 0.485, 0.229)),
        ('pvt_tiny_050', (0.875, 'bicubic', 0.485, 0.229)), ('mixer_s16_050_224', (0.9, 'bicubic', 0.5, 0.5)),
        ('gmlp_ti16_050_224', (0.9, 'bicubic', 0.5, 0.5))))])
def test_preprocessing_of_the_release(tmp_path, name, wanted):
    torch.save(cheap_state_dict(name), tmp_path / 'file.pth')
    folder = convert_file(tmp_path / 'file.pth', name, tmp_path / name)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    data = timm.data.resolve_model_data_config(model, use_test_size=True)
    assert (data['crop_pct'], data['interpolation'], data['mean'][0], data['std'][0]) == wanted
    assert tuple(data['input_size']) == (3, 224, 224)
    assert model.pretrained_cfg['tag'] == 'osvai_in1k'
    classifiers = model.pretrained_cfg['classifier']
    for classifier in [classifiers] if isinstance(classifiers, str) else classifiers:
        assert f'{classifier}.weight' in model.state_dict()


def test_averaged_weights(tmp_path):
    weights = cheap_state_dict(NAME)
    torch.save(dict(model=weights, model_ema={k: 2 * v for k, v in weights.items()}), tmp_path / 'file.pth')
    convert_file(tmp_path / 'file.pth', NAME, tmp_path / 'ema', ema=True)
    saved = safetensors.torch.load_file(tmp_path / 'ema' / 'model.safetensors')
    assert torch.equal(saved['conv_stem.weight'], 2 * weights['features.0.0.weight'])


def test_output_that_exists(tmp_path, released):
    (tmp_path / 'empty').mkdir()
    assert (convert_file(released, NAME, tmp_path / 'empty') / 'config.json').exists()
    (tmp_path / 'file').write_text('mine')
    before = listing(tmp_path)
    for name in ('empty', 'file'):
        with pytest.raises(FileExistsError, match=f'{name}: exists'):
            convert_file(released, NAME, tmp_path / name)
    assert listing(tmp_path) == before


@pytest.mark.parametrize('failure', [OSError('no space left on device'), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(tmp_path, released, monkeypatch, failure):
    def save_half(model, folder, model_args):
        folder.mkdir()
        (folder / 'model.safetensors').write_bytes(b'half')
        raise failure

    monkeypatch.setattr(module, 'save_model', save_half)
    (tmp_path / 'empty').mkdir()
    for output in ('absent', 'empty'):
        with pytest.raises(type(failure)):
            convert_file(released, NAME, tmp_path / output)
        assert [p.name for p in tmp_path.rglob('*')] == ['empty']


# The script


def environment():
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')


def run(*args, **kwargs):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, env=environment(), **kwargs)


def convert_in_process(*args, cwd):
    return call('convert', *args, cwd=cwd)


@pytest.mark.parametrize('run', [convert_in_process, pytest.param(run, marks=pytest.mark.process)])
def test_script(tmp_path, released, run):
    result = run(released, '--model', NAME, '--output', 'deep/out', cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, '')
    folder = tmp_path.resolve() / 'deep' / 'out'
    assert str(folder) in result.stdout
    scope = {}
    exec(result.stdout.strip().splitlines()[-1], scope)
    assert torch.equal(
        scope['model'].get_classifier().key.weight, released_state_dict(NAME)['head.query.weight'])


def test_script_refuses_in_one_line(tmp_path, released):
    torch.save(dict(model=Touch(tmp_path / 'marker')), tmp_path / 'evil.pth')
    (tmp_path / 'cut.pth').write_bytes(released.read_bytes()[:100_000])
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine').write_text('mine')
    before = listing(tmp_path)
    for args, wanted in [
        ((released, '--model', NAME, '--output', 'out', '--ema'), 'no averaged weights'),
        ((released, '--model', NAME, '--output', 'full'), 'exists and is not an empty folder'),
        (('evil.pth', '--model', NAME, '--output', 'out'), 'system'),
        (('cut.pth', '--model', NAME, '--output', 'new/out'), 'truncated'),
    ]:
        result = call('convert', *args, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, '')
        assert result.stderr.startswith('noah-zoo convert: error: ') and result.stderr.count('\n') == 1
        assert wanted in result.stderr
        assert listing(tmp_path) == before


def test_disk_that_is_full(tmp_path, released, monkeypatch):
    def save_half(model, folder, model_args):
        folder.mkdir()
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(module, 'save_model', save_half)
    before = listing(tmp_path)
    result = call('convert', released, '--model', NAME, '--output', tmp_path / 'out')
    assert (result.returncode, result.stderr.count('\n')) == (2, 1) and 'No space left on device' in result.stderr
    assert result.stderr.startswith('noah-zoo convert: error: ') and listing(tmp_path) == before


@pytest.mark.process
@pytest.mark.skipif(os.name == 'nt', reason='POSIX limits')
def test_full_disk(tmp_path, released):
    before = listing(tmp_path)
    script = f'ulimit -f 1000; exec "{sys.executable}" "{SCRIPT}" "{released}" --model {NAME} --output out'
    result = subprocess.run(
        ['bash', '-c', script], cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert result.returncode == 2
    assert result.stderr.startswith('noah-zoo convert: error: ') and result.stderr.count('\n') == 1
    assert listing(tmp_path) == before


@pytest.mark.process
def test_script_help_imports_nothing_heavy():
    result = subprocess.run(
        [sys.executable, '-X', 'importtime', str(SCRIPT), '--help'], capture_output=True, text=True, env=environment())
    assert result.returncode == 0 and '--output DIR' in result.stdout
    assert 'argparse' in result.stderr and 'torch' not in result.stderr


@pytest.mark.process
@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT] if os.name != 'nt' else [])
def test_stopped_while_writing(tmp_path, number):
    name = 'mixer_b16_224_noah'  # 240 MB, long enough to be stopped in the middle of
    torch.save(cheap_state_dict(name), tmp_path / 'file.pth')
    command = [sys.executable, str(SCRIPT), 'file.pth', '--model', name, '--output', 'out']
    for _ in range(3):  # on a busy machine the whole file may be written between two looks
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # in the background it is ignored
        while process.poll() is None and not list(tmp_path.glob('.out.*.partial')):
            time.sleep(0.001)
        process.send_signal(number)
        if process.wait():
            break
        shutil.rmtree(tmp_path / 'out')
    assert process.returncode
    assert not (tmp_path / 'out').exists()
    leftovers = list(tmp_path.glob('.out.*'))
    assert len(leftovers) == (1 if number == signal.SIGKILL else 0)

    convert_file(tmp_path / 'file.pth', name, tmp_path / 'out')
    assert timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).num_classes == 1000
    assert list(tmp_path.glob('.out.*')) == leftovers
