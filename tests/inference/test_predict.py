"""`noah-zoo predict` as its users call it."""
import csv
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from noah_zoo.catalog import FASHION_MNIST_CLASSES
from noah_zoo.data.images import read_image
from noah_zoo.inference.output import PredictionFile
from noah_zoo.inference.predict import (
    DEFAULT_MODEL,
    SAMPLES,
    ImageFiles,
    check_model,
    default_workers,
    find_images,
    label_names,
    load_model,
    predict,
)
from noah_zoo.models.attach import eval_transform

from ..commands import call, interrupt

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    return call('predict', *args)


def check_main_job(result):
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.endswith('.png') for line in lines) == 12
    assert sum('%' in line for line in lines) == 12 * 3
    bag = next(number for number, line in enumerate(lines) if line.endswith('0018_bag.png'))
    assert re.fullmatch(r' +\d+\.\d\d%  Bag', lines[bag + 1])


def test_the_main_job():
    check_main_job(run())


@pytest.mark.process
def test_the_main_job_in_a_new_process(tmp_path):
    check_main_job(subprocess.run(
        [sys.executable, str(ROOT / 'scripts' / 'predict.py')], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, check=False))


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
    (['--device', 'gpu'], "device 'gpu': "),
    (['--model', 'local-dir:/nowhere'], '/nowhere'),
    (['--top-k', '0'], "'0' is not a positive number"),
])
def test_bad_input(args, message):
    result = run(*args)
    assert result.returncode == 2 and message in result.stderr
    assert 'Traceback' not in result.stderr and not result.stdout


def test_a_model_that_is_not_timms(tmp_path):
    config = '{"architectures": ["ViTForImageClassification"], "model_type": "vit"}'
    (tmp_path / 'config.json').write_text(config)
    result = run('--model', f'local-dir:{tmp_path}')
    assert result.returncode == 2 and result.stderr.endswith(
        "error: the config.json of the model has no 'architecture', as timm's have\n")


def test_empty_folder(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 2 and 'no image in this folder' in result.stderr


def test_label_names():
    assert label_names(timm.create_model('resnet18', num_classes=3)) == ['0', '1', '2']
    assert label_names(timm.create_model('resnet18'))[1].startswith('goldfish')


@pytest.fixture(scope='module')
def model():
    return load_model(DEFAULT_MODEL)


@pytest.fixture
def mixed(tmp_path):
    """Nine images, of which the third and the sixth are damaged, of several sizes and modes."""
    folder, samples = tmp_path / 'mixed', sorted(SAMPLES.glob('*.png'))
    folder.mkdir()
    for i, sample in enumerate(samples[:9]):
        image = Image.open(sample).convert(('L', 'RGB', 'RGBA')[i % 3])
        image.resize((40 + 9 * i, 70)).save(folder / f'{i}.png')
    for i in (2, 5):
        (folder / f'{i}.png').write_bytes((folder / f'{i}.png').read_bytes()[:90])
    return folder


@pytest.mark.parametrize('batch_size, workers', [
    (1, 0), (4, 0), (100, 0), *(pytest.param(*case, marks=pytest.mark.process) for case in ((4, 2), (9, 1)))])
def test_batches_are_what_single_images_are(batch_size, workers, model, mixed):
    paths, transform = find_images([str(mixed)]), eval_transform(model)
    results = list(predict(model, paths, 10, batch_size, workers))
    assert [result['path'] for result in results] == paths
    for i, (path, result) in enumerate(zip(paths, results)):
        if i in (2, 5):
            assert result['error'].startswith(f'{path}: not a readable image: ') and 'predictions' not in result
            continue
        with torch.inference_mode():
            expected = model(transform(read_image(path))[None])[0].softmax(0)
        assert [expected[p['index']].item() for p in result['predictions']] == pytest.approx(
            [p['probability'] for p in result['predictions']], abs=1e-5)
        assert result['predictions'][0]['index'] == expected.argmax()


def test_what_goes_to_workers_can_be_spawned(model, mixed):
    files = pickle.loads(pickle.dumps(ImageFiles(find_images([str(mixed)]), model)))
    assert files[0][0].dtype == torch.uint8 and files[0][1] is None and files[2][1]
    assert default_workers(999, torch.device('cuda')) == 0 < default_workers(1000, torch.device('cpu'))
    assert list(predict(model, [])) == []


@pytest.mark.parametrize('channels', [1, 4])
def test_a_model_of_other_channels(channels, mixed, tmp_path):
    grey = timm.create_model('test_resnet', num_classes=3, in_chans=channels)
    timm.models.save_for_hf(grey, str(tmp_path / 'saved'), safe_serialization=True)
    model = load_model(f'local-dir:{tmp_path / "saved"}')
    results = list(predict(model, find_images([str(mixed)]), 3, 4))
    assert ['error' in result for result in results] == [i in (2, 5) for i in range(9)]
    mode = {1: 'L', 4: 'RGBA'}[channels]
    x = eval_transform(model)(read_image(mixed / '4.png', mode=mode))
    with torch.inference_mode():
        expected = model(x[None])[0].softmax(0).topk(3)
    assert [p['probability'] for p in results[4]['predictions']] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_a_name_that_is_a_path(tmp_path, monkeypatch):
    (tmp_path / 'run' / 'best').mkdir(parents=True)
    (tmp_path / 'run' / 'best' / 'config.json').write_text('{}')
    (tmp_path / 'model.onnx').touch()
    run_dir, best = tmp_path / 'run', tmp_path / 'run' / 'best'
    for name, said in (
            (run_dir, f"{run_dir} is the folder of a run; its model is 'local-dir:{best}'"),
            (f'local-dir:{run_dir}', f"{run_dir} is the folder of a run; its model is 'local-dir:{best}'"),
            (best, f"{best} is a folder, not a name of timm; its model is 'local-dir:{best}'"),
            (tmp_path / 'model.onnx', 'validate reads those that export has written')):
        with pytest.raises(ValueError, match=re.escape(said)):
            check_model(str(name))
    run_dir.rename(tmp_path / 'resnet18_noah')
    monkeypatch.chdir(tmp_path)
    check_model('resnet18_noah')  # timm's, not the folder


def read_rows(path):
    """[(path, first label or None, error or None)] and the names of the models."""
    if path.suffix == '.jsonl':
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(r['path'], r['predictions'][0]['label'] if 'predictions' in r else None, r.get('error')) for r in rows]
    with path.open(newline='') as file:
        return [(r['path'], r['label_1'] or None, r['error'] or None) for r in csv.DictReader(file)]


@pytest.mark.parametrize('suffix', ['.csv', '.jsonl'])
def test_a_file_that_goes_on(suffix, mixed, tmp_path):
    output = tmp_path / f'rows{suffix}'
    whole = run(mixed, '--output', output, '--batch-size', 4)
    assert whole.returncode == 1 and whole.stdout == f'{output}: 9 images, 2 of which cannot be classified\n'
    assert whole.stderr.count('not a readable image') == 2
    rows, data = read_rows(output), output.read_bytes()
    shown = json.loads(run(mixed, '--json').stdout)
    assert [(r['path'], r['predictions'][0]['label'] if 'predictions' in r else None, r.get('error'))
            for r in shown] == rows
    lines = data.splitlines(keepends=True)
    # nothing, a torn first line, torn in the middle of the fifth row and at its very end, whole rows, all of it
    four, five = len(b''.join(lines[:4])), len(b''.join(lines[:5]))
    for size in (0, 3, five + 20, five - 1, four, len(data)):
        output.write_bytes(data[:size])
        again = run(mixed, '--output', output)
        assert again.returncode == 1, again.stderr
        already = data[:size].count(b'\n') - (suffix == '.csv')
        told = f'; {already} were there already' if already > 0 else ''
        assert again.stdout == whole.stdout.rstrip() + told + '\n'
        assert read_rows(output) == rows
    before = output.read_bytes()
    for args, message in (
            (['--top-k', 2], 'has 3 classes per image, not 2'),
            ([mixed / '1.png'], 'where'), (['--model', 'local-dir:other'], 'is of the model mobilenetv2_035_noah')):
        if '--model' in args:
            timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=9), str(tmp_path / 'other'))
            args = ['--model', f'local-dir:{tmp_path / "other"}']
        refused = run(*([] if args[0] == mixed / '1.png' else [mixed]), *args, '--output', output)
        assert refused.returncode == 2 and str(output) in refused.stderr and 'name another --output' in refused.stderr
        assert message in refused.stderr or message == 'where' and ', not ' in refused.stderr
        assert output.read_bytes() == before
    output.write_bytes(b'a list of mine\nand more\n')
    assert f'{output}: not a file of predictions' in run(mixed, '--output', output).stderr
    assert output.read_bytes() == b'a list of mine\nand more\n'


@pytest.mark.parametrize('args, message', [
    (['--output', 'rows.txt'], 'rows.txt: predictions are written to a file that ends with .csv or .jsonl'),
    (['--output', 'nowhere/rows.csv'], 'nowhere: no such folder for rows.csv'),
    (['--output', 'rows.csv', '--json'], 'not allowed with'), (['--workers', '-1'], 'num_workers'),
    (['--batch-size', '0'], "'0' is not a positive number")])
def test_options_that_are_refused(args, message, tmp_path):
    result = call('predict', *args, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', ['.csv', '.jsonl'])
def test_names_with_every_character(suffix, tmp_path):
    names = ['a,"b".png', 'line\nbreak.png', 'car\rriage.png', 'ünïcode ✓.png', os.fsdecode(b'\xe9.png'), 'last.png']
    results = [{'path': n, 'error': f'{n}: no'} if i % 2 else {'path': n, 'predictions': [
        {'label': f'{n};x', 'index': 1, 'probability': 0.5}]} for i, n in enumerate(names)]
    path = tmp_path / f'rows{suffix}'
    with PredictionFile(path, 'm,1', 1, names) as output:
        for result in results:
            output.add(result)
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with PredictionFile(path, 'm,1', 1, names) as output:
            for result in results[output.done:]:
                output.add(result)
        assert path.read_bytes() == data and (output.done, output.failed) == (6, 3)


@pytest.mark.parametrize('output', ['rows.csv', None])
def test_an_interrupt(output, mixed, tmp_path, monkeypatch):
    def two_images(*args):
        yield from itertools.islice(predict(*args), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr('noah_zoo.inference.predict.predict', two_images)
    path = tmp_path / 'rows.csv'
    done = run(mixed, *(['--output', path] if output else []))
    kept = f'; {path} has 2 of 9 images, and the same command goes on with it' if output else ''
    assert (done.returncode, done.stderr) == (130, f'\nnoah-zoo predict: interrupted{kept}\n')
    if output:
        assert [Path(row[0]).name for row in read_rows(path)] == ['0.png', '1.png']


@pytest.mark.process
def test_ctrl_c_and_on(tmp_path):
    folder, output = tmp_path / 'many', tmp_path / 'rows.csv'
    folder.mkdir()
    for i in range(1500):
        (folder / f'{i}.png').write_bytes(b'' if i == 0 else sorted(SAMPLES.glob('*.png'))[i % 12].read_bytes())
    args = ['predict', folder, '--output', output, '--workers', 2, '--batch-size', 8]
    code, said = interrupt(*args, after=b'0.png: not a readable image')  # it has begun
    assert code == 130 and b'Traceback' not in said, said
    done = len(read_rows(output))
    assert 0 < done < 1500
    assert any(  # the interrupt may come between a row and its count
        f'interrupted; {output} has {count:,} of 1,500 images, and the same command goes on'.encode() in said
        for count in (done - 1, done))
    result = call('predict', folder, '--output', output)
    assert result.stdout == f'{output}: 1,500 images, 1 of which cannot be classified; {done:,} were there already\n'
    assert [path for path, _, _ in read_rows(output)] == find_images([str(folder)])


@pytest.mark.process
def test_a_progress_bar_at_a_terminal_only(mixed, tmp_path, monkeypatch):
    monkeypatch.delenv('HF_HUB_DISABLE_PROGRESS_BARS')
    pty, fcntl, termios = (pytest.importorskip(name) for name in ('pty', 'fcntl', 'termios'))
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack('4H', 40, 100, 0, 0))  # rows, columns
    command = [sys.executable, str(ROOT / 'scripts' / 'predict.py'), str(mixed), '--output', str(tmp_path / 'rows.csv')]
    result = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, timeout=300, check=False)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert result.returncode == 1 and result.stdout.strip().endswith(b'9 images, 2 of which cannot be classified')
    assert '0/9' in seen and 'img/s' in seen and seen.count('not a readable image') == 2
    plain = subprocess.run(command, capture_output=True, timeout=300, check=False)  # all of it is there already
    assert plain.returncode == 1 and plain.stderr == b''
    assert plain.stdout == result.stdout.rstrip() + b'; 9 were there already' + os.linesep.encode()


@pytest.mark.parametrize('name, content', [
    ('notes.csv', b'hello no newline'), ('mac.csv', b'a,b\r1,2\r'), ('quote.csv', b'"precious\nnotes 1\nnotes 2\n'),
    ('one.jsonl', b'{"a": 1}'), ('notes.jsonl', b'precious')])
def test_what_is_no_file_of_predictions_stays_as_it_is(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match='not a file of predictions'):
        PredictionFile(tmp_path / name, 'model', 3, ['a.png'])
    assert (tmp_path / name).read_bytes() == content
