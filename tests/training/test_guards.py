"""What a run refuses, records and never saves: trained images in validation, two owners, infinite weights."""
import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from noah_zoo.data.loader import EvalBatchSampler
from noah_zoo.data.split import EARLIER, TRAINING, VALIDATION, read_split
from noah_zoo.inference.predict import predict, reading_of
from noah_zoo.models.attach import value_range_of
from noah_zoo.tasks import find_task
from noah_zoo.training import configure, train
from noah_zoo.training import run_folder as module
from noah_zoo.training.checkpoint import Progress, checkpoints
from noah_zoo.training.run_folder import RunFolder
from noah_zoo.training.trainer import evaluate


def settings(photos, output, model='noah', **kwargs):
    if model == 'noah':
        kwargs.setdefault('model_kwargs', {'backbone': 'test_resnet'})
    return configure(model, str(output), 'none', **{**dict(
        data_dir=str(photos), val_fraction=0.25, img_size=32, epochs=1, batch_size=8, workers=0, cpu=True), **kwargs})


def names_of(folder, split):
    return {name for name, found in read_split(folder).items() if found == split}


def test_validation_images_stay_unseen_from_run_to_run(photos, tmp_path, trained_run):
    start = dict(model=f'local-dir:{trained_run / "best"}', pretrained=True, model_kwargs={})
    train_names, val_names = names_of(trained_run, TRAINING), names_of(trained_run, VALIDATION)
    assert len(val_names) >= 8 and not train_names & val_names
    with pytest.raises(ValueError, match=r'\d+ of \d+ validation images are images that .* was trained on: .*'
                                         rf'--split-from {trained_run} keeps its validation images'):
        train(settings(photos, tmp_path / 'other_seed', seed=1, **start))
    train(settings(photos, tmp_path / 'next', seed=1, split_from=str(trained_run), **start))
    assert names_of(tmp_path / 'next', VALIDATION) == val_names
    assert names_of(tmp_path / 'next', TRAINING) == train_names

    # The images that the first run was trained on count for the third, also if the second had no such images.
    fewer = tmp_path / 'fewer'
    shutil.copytree(photos, fewer)
    gone = sorted(train_names)[0]
    (fewer / gone).unlink()
    train(settings(fewer, tmp_path / 'third', seed=1, split_from=str(trained_run), **start))
    assert names_of(tmp_path / 'third', EARLIER) == {gone}
    with pytest.raises(ValueError, match='--val-fraction'):
        train(settings(photos, tmp_path / 'wrong', val_fraction=0., split_from=str(trained_run)))


def test_a_finished_run_with_other_images(photos, tmp_path, trained_run):
    data, run = tmp_path / 'photos', tmp_path / 'run'
    shutil.copytree(photos, data)
    config = settings(data, run)
    summary = train(config)
    again = settings(data, run, resume='auto')
    assert train(again) == json.loads((run / 'summary.json').read_text()) and summary['epoch'] == 1
    folder = next(path for path in sorted(data.iterdir()) if path.is_dir())
    shutil.copy(next(folder.iterdir()), folder / 'new.jpg')
    with pytest.raises(ValueError, match=r'is finished, and its images have changed since: \d+ are new, \d+ are gone'):
        train(again)


def test_a_run_folder_has_one_owner(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'LOCK_SECONDS', 0.1)
    config = settings(photos, tmp_path / 'run')
    (tmp_path / 'run').mkdir()
    with FileLock(tmp_path / 'run' / '.lock'):
        with pytest.raises(BlockingIOError, match=f'another process writes to {tmp_path / "run"}'):
            train(config)
    train(config)
    assert not (tmp_path / 'run' / '.lock').exists()


def test_a_file_system_without_locks(photos, tmp_path, monkeypatch, caplog):
    def acquire(self, timeout):
        raise NotImplementedError
    monkeypatch.setattr(module.FileLock, 'acquire', acquire)
    with RunFolder(tmp_path / 'run').locked(settings(photos, tmp_path / 'run')):
        pass
    assert 'the file system has no locks' in caplog.text and not (tmp_path / 'run').exists()


def test_a_refused_run_leaves_no_folder(photos, tmp_path):
    with pytest.raises(ValueError, match="sched='x'"):
        train(settings(photos, tmp_path / 'new' / 'run', sched='x'))
    assert not (tmp_path / 'new' / 'run').exists()


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(photos, tmp_path, monkeypatch):
    config = settings(photos, tmp_path / 'run')

    def interrupt(self, *args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('noah_zoo.training.trainer.Trainer.train_step', interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert (tmp_path / 'run' / 'args.yaml').exists()
    assert train(settings(photos, tmp_path / 'run', lr=0.02))['config']['lr'] == 0.02
    with pytest.raises(FileExistsError, match='has a finished run'):
        train(config)


@pytest.mark.parametrize('checkpoint_steps', [0, 1])
def test_nothing_that_is_not_finite_is_saved(photos, tmp_path, checkpoint_steps):
    config = settings(
        photos, tmp_path / 'run', lr=1e20, opt='sgd', epochs=3, batch_size=16, checkpoint_steps=checkpoint_steps)
    with pytest.raises(FloatingPointError, match=r'(the loss is \w+ in step \d+|the weights are not finite after step '
                                                 r'\d+) \(epoch \d\)\. (Start again|Resume from .*) with a lower --lr'):
        train(config)
    for path in checkpoints(tmp_path / 'run' / 'checkpoints'):
        weights = load_file(path / 'model.safetensors')
        assert all(tensor.isfinite().all() for tensor in weights.values()), path
    best = tmp_path / 'run' / 'best' / 'model.safetensors'
    assert not best.exists() or all(tensor.isfinite().all() for tensor in load_file(best).values())


def test_weights_that_are_not_finite_end_a_run(photos, tmp_path, monkeypatch):
    from noah_zoo.training.trainer import Trainer
    step = Trainer.train_step

    def poison(self, *args):
        step(self, *args)
        if self.progress.epoch == 1:
            next(self.model.parameters()).data[0] = math.inf
    monkeypatch.setattr(Trainer, 'train_step', poison)
    with pytest.raises(FloatingPointError, match=r'not finite after step \d+ \(epoch 2\)|the loss is nan'):
        train(settings(photos, tmp_path / 'run', epochs=3, batch_size=16))
    newest, = checkpoints(tmp_path / 'run' / 'checkpoints')
    assert all(tensor.isfinite().all() for tensor in load_file(newest / 'model.safetensors').values())


def test_equal_metrics_are_decided_by_the_loss():
    progress = Progress()
    assert progress.is_best(math.nan) and progress.is_best(0.)
    progress.best, progress.best_loss, progress.best_epoch = 90., 0.5, 3
    assert progress.is_best(90., 0.4) and progress.is_best(90.1, 0.9)
    assert not progress.is_best(90., 0.5) and not progress.is_best(90., 0.6) and not progress.is_best(89.9, 0.1)
    assert not progress.is_best(90.) and not progress.is_best(math.nan, 0.1) and not progress.is_best(90., math.nan)
    progress.best = math.nan
    assert progress.is_best(1.)


def test_a_full_disk_is_one_line_and_leaves_no_part(photos, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    monkeypatch.setattr('timm.models._hub.safetensors.torch.save_file', full, raising=False)
    with pytest.raises(OSError, match=r'cannot be written \(.*No space left on device.*; \d+ MB are free\)'):
        train(settings(photos, tmp_path / 'run'))
    assert not list((tmp_path / 'run').rglob('*.partial'))


@pytest.mark.parametrize('name', ['multiclass', 'multilabel', 'reid'])
def test_metrics_of_a_process_without_images(name):
    """It pads with the first image, of which nothing counts."""
    task = find_task(name)
    torch.manual_seed(0)
    logits = torch.randn(12, 3)
    targets = {
        'multiclass': torch.arange(12) % 3, 'multilabel': (torch.rand(12, 3) > 0.5).float(),
        'reid': torch.stack([torch.arange(12) % 3, torch.arange(12) % 2, (torch.arange(12) < 4).long()], dim=1)}[name]
    model = torch.nn.Identity()

    class Loader(list):
        batch_sampler = EvalBatchSampler(1, 8, 2, 1)
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    metrics = task.create_metrics(3, torch.device('cpu'))
    assert Loader.batch_sampler.is_padding and list(Loader.batch_sampler) == [[(0, 0, 0)]]
    metrics.update(logits, targets)
    alone = metrics.compute()
    metrics = task.create_metrics(3, torch.device('cpu'))
    metrics.update(logits, targets)
    assert evaluate(accelerator, model, Loader([(logits[:1], targets[:1])]), metrics) == alone


def test_a_tracker_that_is_not_installed(photos, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="log_with='tensorbord' is not one of .*tensorboard"):
        train(settings(photos, tmp_path / 'run', log_with='tensorbord'))
    with pytest.raises(ImportError, match="log_with='clearml': the package is not installed; pip install clearml"):
        train(settings(photos, tmp_path / 'run', log_with='clearml'))
    assert not (tmp_path / 'run').exists()


def test_the_value_range_is_saved_with_the_model_and_used_by_predict(tmp_path, caplog):
    """X-rays of 12 bits in 16-bit PNG: by the file type, they have five gray levels."""
    rng = np.random.default_rng(0)
    for kind in 'healthy', 'ill':
        (tmp_path / 'data' / kind).mkdir(parents=True)
        for i in range(12):
            values = rng.integers(1000, 1300, (32, 32)) + 500 * (kind == 'ill')
            Image.fromarray(values.astype(np.uint16)).save(tmp_path / 'data' / kind / f'{i}.png')
    run = tmp_path / 'run'
    train(settings(tmp_path / 'data', tmp_path / 'by_type'))
    assert 'use less than an eighth of the range 0 to 65535; give the range of the data set with --value-range' in (
        caplog.text)
    caplog.clear()
    train(settings(tmp_path / 'data', run, value_range=(0., 4095.)))
    assert 'eighth' not in caplog.text
    model = timm.create_model(f'local-dir:{run / "best"}', pretrained=True).eval()
    assert value_range_of(model) == (0., 4095.) and reading_of(model) == {'mode': 'RGB', 'value_range': (0., 4095.)}
    path = str(tmp_path / 'data' / 'ill' / '0.png')
    by_hand = tmp_path / 'by_hand.png'
    Image.fromarray((np.asarray(Image.open(path)) // 16).astype(np.uint8)).convert('RGB').save(by_hand)
    first, second = (result['predictions'] for result in predict(model, [path, str(by_hand)]))
    assert first == second
    train(settings(tmp_path / 'data', tmp_path / 'next', model=f'local-dir:{run / "best"}', pretrained=True))
    again = timm.create_model(f'local-dir:{tmp_path / "next" / "best"}', pretrained=True)
    assert value_range_of(again) == (0., 4095.)
