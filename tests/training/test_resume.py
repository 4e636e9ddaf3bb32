"""Runs that are killed, terminated, out of disk space, or have a loss that is not finite, and go on to the same end."""
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import noah_zoo  # noqa: F401
from noah_zoo.data.fashion_mnist import FashionMnist
from noah_zoo.training.trainer import Trainer

from ..client import SmallDisk
from ..commands import call, interrupt

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'scripts' / 'train.py'
SHARDED = Path(__file__).with_name('sharded.py')
# Accumulation with a last window of its own (48 images: 12 batches of 4 in windows of 5), mixup, EMA, workers.
EVERYTHING = {
    '--model': 'mobilenetv2_035_noah', '--img-size': 64, '--epochs': 6, '--batch-size': 20, '--device-batch-size': 4,
    '--lr': 0.02, '--opt': 'momentum', '--mixup': 0.2, '--smoothing': 0.1, '--aa': 'rand-m5-n2', '--reprob': 0.2,
    '--model-ema-decay': 0.9, '--clip-grad': 1, '--workers': 2, '--checkpoint-steps': 1}
PLAIN = {
    '--model': 'mixer_s16_050_224_noah', '--img-size': 32, '--epochs': 2, '--batch-size': 16, '--lr': 0.01,
    '--opt': 'momentum', '--workers': 0, '--recipe': 'none', '--model-kwargs': 'drop_rate=0.'}  # and no batch norm

SMALL = {  # the same on a model for tests of one process
    **EVERYTHING, '--model': 'noah', '--model-kwargs': 'backbone=test_resnet', '--img-size': 32, '--epochs': 3,
    '--workers': 0}
SMALL_PLAIN = {**PLAIN, '--model': 'noah', '--model-kwargs': 'backbone=test_vit'}


def start(idx_dir, output, settings, processes=1, *more, script=(str(SCRIPT),), launch=()):
    args = [str(word) for pair in settings.items() for word in pair]
    launch = launch or ([sys.executable] if processes == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)])
    return subprocess.Popen(
        [*launch, *script, '--cpu', '--data-dir', str(idx_dir), '--output', str(output), *args, *more],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True)


def run(*args, code=0, **kwargs):
    process = start(*args, **kwargs)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err[-3000:]
    return out + err


def run_here(idx_dir, output, settings, *more, code=0):
    args = [word for pair in settings.items() for word in pair]
    done = call('train', '--cpu', '--data-dir', idx_dir, '--output', output, *args, *more)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def checkpoints(output):
    return sorted(path.name for path in (output / 'checkpoints').glob('update-*'))


def left(output):
    """All that a run leaves, but for its times: hashes of weights and states, and the log."""
    newest = output / 'checkpoints' / checkpoints(output)[-1]
    files = [newest / 'model.safetensors', newest / 'optimizer.bin', newest / 'custom_checkpoint_2.pkl',
             output / 'best' / 'model.safetensors']
    lines = [json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()]
    return (
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        [{key: value for key, value in line.items() if 'seconds' not in key} for line in lines])


@pytest.fixture(scope='module')
def small(idx_dir, tmp_path_factory):
    """The folder of an uninterrupted run in this process."""
    output = tmp_path_factory.mktemp('small') / 'run'
    run_here(idx_dir, output, SMALL)
    return output


@pytest.fixture(scope='module')
def whole(idx_dir, tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp('whole') / 'run'
    run(idx_dir, output, EVERYTHING)
    return output


@pytest.fixture(scope='module')
def whole_of_two(idx_dir, tmp_path_factory):
    """The folder of an uninterrupted run of two processes."""
    output = tmp_path_factory.mktemp('whole') / 'run'
    run(idx_dir, output, EVERYTHING, 2)
    assert json.loads((output / 'summary.json').read_text())['batch']['processes'] == 2
    return output


def wait_for(process, condition):
    end = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def before_step(number, do):
    """A `train_step` that calls `do()` first in an optimizer step."""
    step = Trainer.train_step

    def train_step(self, batches, window):
        if self.progress.update == number - 1:
            do()
        step(self, batches, window)
    return train_step


class Stopped(Exception):
    pass


def stop(*args, **kwargs):
    raise Stopped


@pytest.mark.parametrize('where', ['in an epoch', 'in evaluation', 'in a checkpoint'])
def test_a_stopped_run_ends_with_the_same_weights(where, small, idx_dir, tmp_path):
    output, chance = tmp_path / 'run', random.Random(where)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            done = len(checkpoints(output)) and int(checkpoints(output)[-1].split('-')[1])
            if where == 'in an epoch':
                patch.setattr(Trainer, 'train_step', before_step(done + chance.randint(2, 4), stop))
            elif where == 'in evaluation':
                patch.setattr(Trainer, 'evaluate', stop)
            else:
                patch.setattr(Trainer, 'train_step', before_step(done + 2, lambda: patch.setattr(
                    'noah_zoo.training.checkpoint.os.replace', stop)))
            run_here(idx_dir, output, SMALL, '--resume', 'auto')
        assert checkpoints(output) and not (output / 'summary.json').exists()
        assert any((output / 'checkpoints').glob('.*.partial')) == (where == 'in a checkpoint')
    run_here(idx_dir, output, SMALL, '--resume', 'auto')
    assert left(output) == left(small)


def test_sigterm_saves_and_ends_the_run(small, idx_dir, tmp_path, monkeypatch):
    output, settings, before = tmp_path / 'run', {**SMALL, '--checkpoint-steps': 0}, signal.getsignal(signal.SIGTERM)

    def terminate():
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'train_step', before_step(5, terminate))
        message = run_here(idx_dir, output, settings, code=143)
    assert signal.getsignal(signal.SIGTERM) is before
    assert f'SIGTERM: saved {output}/checkpoints/update-000000005; go on with --resume auto' in message
    assert not (output / 'summary.json').exists()
    assert 'other settings: checkpoint_steps was 0' in run_here(idx_dir, output, SMALL, '--resume', 'auto', code=2)
    message = run_here(idx_dir, output, settings, '--resume', 'auto')
    assert f'going on with {output}/checkpoints/update-000000005: epoch 2 of 3, update 5' in message
    assert left(output) == left(small)


@pytest.mark.process
def test_ctrl_c(idx_dir, tmp_path):
    settings = {**SMALL, '--epochs': 1000, '--checkpoint-steps': 0}
    words = [word for pair in settings.items() for word in pair]
    code, said = interrupt(
        'train', '--cpu', '--data-dir', idx_dir, '--output', tmp_path / 'run', *words, after=b'epoch 2: train loss')
    assert code == 130 and said.decode().endswith(
        f' interrupted; with --resume auto it goes on from the newest checkpoint in {tmp_path / "run"}\n')
    assert checkpoints(tmp_path / 'run')


@pytest.mark.process
@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_weights(processes, request, idx_dir, tmp_path):
    expected = left(request.getfixturevalue('whole' if processes == 1 else 'whole_of_two'))
    output, chance = tmp_path / 'run', random.Random(processes)
    kills = 0
    while kills < (3 if processes == 1 else 2):
        process = start(idx_dir, output, EVERYTHING, processes, '--resume', 'auto')
        before = checkpoints(output)
        wait_for(process, lambda: checkpoints(output) != before)  # noqa: B023
        time.sleep(chance.random() / 10)
        if process.poll() is not None:  # it was done before
            assert process.returncode == 0, process.communicate()[1][-3000:]
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills
    run(idx_dir, output, EVERYTHING, processes, '--resume', 'auto')
    assert left(output) == expected


@pytest.mark.process
def test_sigterm_saves_and_says_so_to_the_scheduler(whole, idx_dir, tmp_path):
    output = tmp_path / 'run'
    settings = {**EVERYTHING, '--checkpoint-steps': 0}
    process = start(idx_dir, output, settings)
    wait_for(process, lambda: (output / 'args.yaml').exists())
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)  # to the loader's workers, too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert 'SIGTERM: saved' in err and 'Traceback' not in err and checkpoints(output)
    assert not (output / 'summary.json').exists()
    assert 'other settings: checkpoint_steps was 0' in run(
        idx_dir, output, EVERYTHING, 1, '--resume', 'auto', code=2)
    run(idx_dir, output, settings, 1, '--resume', 'auto')
    assert left(output) == left(whole)


@pytest.mark.process
@pytest.mark.slow
def test_sigterm_to_the_launcher_of_two_processes(whole_of_two, idx_dir, tmp_path):
    output = tmp_path / 'run'
    process = start(idx_dir, output, EVERYTHING, 2)
    wait_for(process, lambda: checkpoints(output))
    process.send_signal(signal.SIGTERM)  # torchrun hands it on, and ends with a code of its own
    _, err = process.communicate(timeout=60)
    assert process.returncode and err.count('SIGTERM: saved') == 1, err
    assert not (output / 'summary.json').exists()
    run(idx_dir, output, EVERYTHING, 2, '--resume', 'auto')
    assert left(output) == left(whole_of_two)


@pytest.mark.process
@pytest.mark.parametrize('launcher', ['torchrun', pytest.param('mpi', marks=pytest.mark.slow)])
def test_two_processes_give_the_curve_of_one(launcher, idx_dir, tmp_path, monkeypatch):
    launch = ()
    if launcher == 'mpi':
        if not shutil.which('mpirun'):
            pytest.skip('needs Open MPI')
        for name in ('OMPI_ALLOW_RUN_AS_ROOT', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM', 'OMPI_MCA_rmaps_base_oversubscribe'):
            monkeypatch.setenv(name, '1')
        hosts = tmp_path / 'hosts'
        hosts.write_text('localhost slots=2\n')
        launch = [
            sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', '--mpirun_hostfile',
            str(hosts)]
    curves = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        said = run(idx_dir, output, PLAIN, processes, launch=launch if processes == 2 else ())
        assert said.count(' after 2 epochs, ') == 1  # the main process speaks
        lines = [json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()]
        curves.append([line[key] for line in lines for key in ('train_loss', 'val_loss', 'top1')])
        assert json.loads((output / 'summary.json').read_text())['batch']['processes'] == processes
        correct = lines[-1]['top1'] * 12 / 100
        assert correct == pytest.approx(round(correct), abs=0.01)  # 12 images, each counted once
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize('strategy', [
    pytest.param(name, marks=pytest.mark.slow) for name in ('fsdp', 'zero0', 'zero1', 'zero2')])
def test_sharded_training_gives_the_same_curve(strategy, idx_dir, tmp_path):
    if strategy != 'fsdp':
        pytest.importorskip('deepspeed')
    settings, sharded = {**PLAIN, '--device-batch-size': 4, '--clip-grad': 1}, [str(SHARDED), strategy]
    curves, weights = [], []
    for name, script in (('whole', [str(SCRIPT)]), ('sharded', sharded)):
        run(idx_dir, tmp_path / name, settings, 2, script=script)
        lines = [json.loads(line) for line in (tmp_path / name / 'log.jsonl').read_text().splitlines()]
        curves.append([line[key] for line in lines for key in ('train_loss', 'val_loss', 'top1')])
        weights.append(load_file(tmp_path / name / 'best' / 'model.safetensors'))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert weights[0].keys() == weights[1].keys()
    for key in weights[0]:
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=1e-4, atol=1e-6)
    output, log = tmp_path / 'sharded', (tmp_path / 'sharded' / 'log.jsonl').read_text().splitlines()
    shutil.rmtree(output / 'checkpoints' / checkpoints(output)[-1])  # as if killed in the second epoch
    (output / 'summary.json').unlink()
    run(idx_dir, output, settings, 2, '--resume', 'auto', script=sharded)
    again = (output / 'log.jsonl').read_text().splitlines()
    assert again[0] == log[0] and len(again) == 2
    assert json.loads(again[1])['val_loss'] == json.loads(log[1])['val_loss']


@pytest.mark.process
@pytest.mark.slow
def test_what_deepspeed_cannot_do(idx_dir, tmp_path):
    pytest.importorskip('deepspeed')
    for strategy, more, message in (
            ('zero3', {}, 'ZeRO stage 3 is not supported'),
            ('zero1', {'--skip-nonfinite': 1}, 'skip_nonfinite does not go'),
            ('zero1', {'--model-ema-decay': 0.9}, 'model_ema_decay does not go with DEEPSPEED')):
        assert message in run(
            idx_dir, tmp_path / 'run', {**PLAIN, **more}, 2, script=[str(SHARDED), strategy], code=1)


def test_accumulation(idx_dir, tmp_path):
    def losses(batch, device, lr, epochs=1):
        output = tmp_path / f'{batch}-{device}-{lr}'
        run_here(idx_dir, output, {
            **SMALL_PLAIN, '--batch-size': batch, '--device-batch-size': device, '--lr': lr, '--epochs': epochs})
        return [json.loads(line)['train_loss'] for line in (output / 'log.jsonl').read_text().splitlines()]

    assert losses(16, 4, 0.01, 2) == pytest.approx(losses(16, 16, 0.01, 2), rel=1e-5)
    # 48 images at a learning rate of nothing, in windows of 8; of 40 and 8; of 20, 20 and 8.
    all_8, last_8, twenty = (losses(batch, device, 1e-12)[0] for batch, device in ((8, 8), (40, 8), (20, 4)))
    first_40 = (6 * all_8 - 2 * last_8) / 4
    rest = 2 * last_8 - first_40
    assert abs(first_40 - rest) > 1e-3  # so it matters how they are weighted
    assert rest == pytest.approx(first_40, rel=0.3)  # each is a mean, also that of fewer images
    assert twenty == pytest.approx((2 * first_40 + rest) / 3, rel=1e-5)


def test_what_was_evaluated_is_what_is_saved(small, idx_dir):
    output = small
    best = load_file(output / 'best' / 'model.safetensors')
    newest = output / 'checkpoints' / checkpoints(output)[-1]
    assert not torch.equal(best['fc.value.weight'], load_file(newest / 'model.safetensors')['fc.value.weight'])
    model = timm.create_model(f'local-dir:{output / "best"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        correct = sum(
            model(transform(image)[None]).argmax().item() == label for image, label in FashionMnist(idx_dir, 'test'))
    summary = json.loads((output / 'summary.json').read_text())
    assert summary['best']['top1'] == pytest.approx(100 * correct / 12, abs=1e-3)


@pytest.mark.parametrize('size', [0.3, 1])  # the weights cannot be written; the state of the optimizer cannot
def test_a_full_disk(size, small, idx_dir, tmp_path, monkeypatch):
    before, output = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / 'run'
    newest = output / 'checkpoints' / 'update-000000004'

    def fill():
        most = int(size * (newest / 'model.safetensors').stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, 'train_step', before_step(5, fill))
            message = run_here(idx_dir, output, SMALL, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(output)[-1] == newest.name and not list((output / 'checkpoints').glob('.*'))
    assert 'update-000000005 cannot be written' in message
    assert f'the newest checkpoint is {newest}' in message
    run_here(idx_dir, output, SMALL, '--resume', 'auto')
    assert left(output) == left(small)


@pytest.mark.process
def test_a_full_file_system(idx_dir, tmp_path):
    settings = {**EVERYTHING, '--epochs': 100, '--checkpoint-hist': 1000, '--workers': 0}
    with SmallDisk(tmp_path / 'disk', 60) as disk:
        message = run(idx_dir, disk / 'run', settings, code=2)
        newest = disk / 'run' / 'checkpoints' / checkpoints(disk / 'run')[-1]
        assert 'cannot be written' in message and f'the newest checkpoint is {newest}' in message
        assert 'Traceback' not in message
        load_file(newest / 'model.safetensors')
        for name in checkpoints(disk / 'run')[:-1]:
            for path in (disk / 'run' / 'checkpoints' / name).iterdir():
                path.unlink()
            (disk / 'run' / 'checkpoints' / name).rmdir()
        process = start(idx_dir, disk / 'run', settings, 1, '--resume', 'auto')
        wait_for(process, lambda: len(checkpoints(disk / 'run')) > 1)
        process.kill()
        assert f'going on with {newest}' in process.communicate()[1]


def test_a_loss_that_is_not_finite(idx_dir, tmp_path):
    settings = {**SMALL_PLAIN, '--lr': 1e20, '--checkpoint-steps': 1}
    message = run_here(idx_dir, tmp_path / 'run', settings, code=2)
    assert 'the loss is' in message and 'in step 2' in message and 'Start again with a lower --lr' in message
    assert checkpoints(tmp_path / 'run') == ['update-000000001']
    message = run_here(idx_dir, tmp_path / 'other', {**settings, '--skip-nonfinite': 2}, code=2)
    assert message.count('left out') == 2


def test_a_run_is_not_overwritten(idx_dir, tmp_path):
    output = tmp_path / 'run'
    run_here(idx_dir, output, SMALL_PLAIN)
    before = left_files(output)
    assert 'has a finished run' in run_here(idx_dir, output, SMALL_PLAIN, code=2)
    run_here(idx_dir, output, SMALL_PLAIN, '--resume', 'auto')  # nothing to do
    assert left_files(output) == before
    (output / 'summary.json').unlink()
    assert 'has an unfinished run; go on with it by --resume auto' in run_here(idx_dir, output, SMALL_PLAIN, code=2)
    assert "no checkpoint; accepted are 'auto' and a folder RUN/checkpoints/update-N" in run_here(
        idx_dir, output, SMALL_PLAIN, '--resume', 'nowhere', code=2)


def left_files(output):
    return {path: path.stat().st_mtime_ns for path in output.rglob('*') if path.is_file()}
