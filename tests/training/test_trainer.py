"""Options of a run: freezing, precision, trackers, averages, recipes for a few steps."""
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import noah_zoo  # noqa: F401
from noah_zoo.recipes import RECIPES
from noah_zoo.training import TrainConfig, configure
from noah_zoo.training import train as train_here
from noah_zoo.training.trainer import Trainer, precision, with_precision

from ..commands import call


@pytest.fixture
def another_state():
    """Lets a test choose device and precision, which Accelerate keeps for all of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(idx_dir, output, *args):
    result = call('train', '--cpu', '--workers', 0, '--data-dir', idx_dir, '--output', output, *args)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def test_freeze_trains_the_head_only(idx_dir, tmp_path):
    weights = []
    for lr in (0.01, 0.1):
        train(idx_dir, tmp_path / str(lr), '--model', 'mobilenetv2_035_noah', '--recipe', 'none', '--img-size', 32,
              '--model-kwargs', 'output_stride=16', '--epochs', 1, '-b', 16, '--lr', lr, '--freeze')  # 2 x 2 positions
        weights.append(load_file(tmp_path / str(lr) / 'best' / 'model.safetensors'))
    different = {key for key in weights[0] if not weights[0][key].equal(weights[1][key])}
    assert different == {'classifier.key.weight', 'classifier.value.weight', 'classifier.value.bias'}


@pytest.mark.usefixtures('another_state')
def test_everything_at_once(idx_dir, tmp_path):
    train(idx_dir, tmp_path / 'run', '--model', 'mobilenetv2_035_noah', '--recipe', 'none', '--img-size', 32,
          '--epochs', 2, '-b', 16, '--lr', 0.01, '--layer-decay', 0.8, '--head-lr-factor', 2, '--clip-grad', 1,
          '--grad-checkpointing', '--mixed-precision', 'bf16', '--channels-last', '--cutmix', 1, '--drop-path', 0.1,
          '--aug-repeats', 2, '--log-with', 'tensorboard', '--val-fraction', 0.25)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events, hparams = sorted((tmp_path / 'run').rglob('events.out.tfevents.*'), key=lambda path: len(path.parts))
    assert b'mobilenetv2_035_noah' in hparams.read_bytes()  # the settings
    scalars = EventAccumulator(str(events.parent)).Reload()
    logged = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    for key in ('train_loss', 'top1', 'top5', 'val_loss', 'lr'):
        values = [event.value for event in scalars.Scalars(key)]
        assert values == pytest.approx([line[key] for line in logged], rel=1e-5)
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['config']['val_fraction'] == 0.25 and summary['torch']


def test_an_update_that_is_left_out_leaves_nothing(idx_dir, tmp_path, caplog):
    run = Trainer(TrainConfig(
        model='mobilenetv2_035_noah', output=str(tmp_path / 'run'), data_dir=str(idx_dir), img_size=32, epochs=1,
        batch_size=4, lr=0.01, workers=0, cpu=True, skip_nonfinite=1))
    caplog.set_level('INFO')
    run.resume()
    batches, states, model = iter(run.epoch_batches()), [], run.model.train()
    for spoiled in (False, True, False):
        if spoiled:
            hook = model.bn2.register_forward_pre_hook(lambda module, inputs: (inputs[0] * torch.inf,))
        run.train_step(batches, 1)
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        if spoiled:
            hook.remove()
    assert 'update 2: the loss is nan; left out' in caplog.text and run.progress.skipped == 1
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[1]['bn2.running_mean'], states[2]['bn2.running_mean'])
    assert all(value.isfinite().all() for value in states[2].values())


def small_run(idx_dir, output, read_every=1, **settings):
    """A run of an epoch of 12 updates."""
    run = Trainer(TrainConfig(**{**dict(
        model='mobilenetv2_035_noah', output=str(output), data_dir=str(idx_dir), img_size=32, epochs=1, batch_size=4,
        lr=0.01, workers=0, cpu=True, resume='auto'), **settings}))
    run.read_every = read_every
    return run


def at_update(run, number, do):
    """Have `do(inputs)` called by the forward pass of an update, which goes on with what it gives."""
    run.model.bn2.register_forward_pre_hook(
        lambda module, inputs: do(inputs[0]) if module.training and run.progress.update == number - 1 else None)


def test_losses_read_now_and_then_are_those_of_a_run_that_reads_each(idx_dir, tmp_path):
    small_run(idx_dir, tmp_path / '1', epochs=2).train()
    run = small_run(idx_dir, tmp_path / '5', 5, epochs=2)
    at_update(run, 7, lambda x: setattr(run, 'terminated', True))
    with pytest.raises(SystemExit, match='143'):  # two losses are pending
        run.train()
    assert [path.name for path in (tmp_path / '5' / 'checkpoints').iterdir()] == ['update-000000007']
    small_run(idx_dir, tmp_path / '5', 5, epochs=2).train()
    logs = [
        [{key: value for key, value in json.loads(line).items() if 'seconds' not in key}
         for line in (tmp_path / name / 'log.jsonl').read_text().splitlines()] for name in '15']
    assert len(logs[0]) == 2 and logs[1] == logs[0]
    first, second = (
        load_file(tmp_path / name / 'checkpoints' / 'update-000000024' / 'model.safetensors') for name in '15')
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize('checkpoint_steps, newest, good, seen', [
    (0, None, None, 8), (1, 5, 4, 6), (2, 4, 4, 6), (5, 5, None, 8)])
def test_a_loss_that_is_read_late_is_told_of_and_not_saved(checkpoint_steps, newest, good, seen, idx_dir, tmp_path):
    """A checkpoint of step 5 leads to the same loss in step 6."""
    run = small_run(idx_dir, tmp_path, 4, checkpoint_steps=checkpoint_steps, checkpoint_hist=99)
    at_update(run, 6, lambda x: x * torch.inf)
    newest, good = (n and f'{tmp_path}/checkpoints/update-{n:09}' for n in (newest, good))
    start = f'Resume from {good} into another --output' if good else 'Start again'
    with pytest.raises(FloatingPointError, match=rf'is nan in step 6 \(epoch 1\)\. {start} with a lower --lr, or skip'):
        run.train()
    assert run.progress.update == seen
    assert max((tmp_path / 'checkpoints').glob('*'), default=None) == (newest and Path(newest))
    assert not (tmp_path / 'best').exists()


def test_random_erasing_depends_on_the_step_alone(idx_dir, tmp_path):
    def inputs(reprob, first):
        run, seen = small_run(idx_dir, tmp_path, reprob=reprob), []
        run.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        run.progress.batch = first
        batches = iter(run.epoch_batches())
        while run.progress.batch < 4:
            run.train_step(batches, 1)
            run.progress.batch += 1
        return torch.stack(seen)

    plain, erased, last = inputs(0., 0), inputs(1., 0), inputs(1., 2)
    share = (erased != plain).float().mean(dim=(2, 3, 4))
    assert share.min() > 0.01 and share.max() < 0.4
    assert torch.equal(last, erased[2:])


def test_what_the_environment_says_of_accumulation_is_not_followed(idx_dir, tmp_path, monkeypatch, caplog):
    weights = []
    for steps in (None, '4'):
        if steps:
            monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', steps)
        run = small_run(idx_dir, tmp_path, opt='sgd')
        run.resume()
        run.prepared.train()
        run.train_step(iter(run.epoch_batches()), 1)
        weights.append(run.model.get_classifier().value.weight.detach().clone())
    assert torch.equal(*weights)
    assert 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is not followed' in caplog.text


@pytest.mark.gpu
@pytest.mark.usefixtures('another_state')
def test_nothing_in_a_step_waits_for_the_device(idx_dir, tmp_path):
    run = small_run(
        idx_dir, tmp_path, cpu=False, workers=2, batch_size=8, device_batch_size=4, epoch_updates=24, opt='adamw',
        clip_grad=1., model_ema_decay=0.9, mixup=0.2, cutmix=1., reprob=0.5, drop_path=0.1, mixed_precision='bf16')
    assert run.accelerator.device.type == 'cuda' and run.batches == 48
    run.resume()
    run.prepared.train()
    batches = iter(run.epoch_batches())
    try:
        for update in range(24):
            if update == 4:  # kernels are compiled, the optimizer has its state
                torch.cuda.set_sync_debug_mode('error')
            run.train_step(batches, 2)
            run.progress.batch += 2
        with pytest.raises(RuntimeError, match='synchronizing'):
            run.read_losses()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    losses = torch.stack(run.pending)
    assert len(losses) == 24 and losses.isfinite().all() and losses.unique().numel() > 1


def test_averages_over_too_few_updates_are_told_of(idx_dir, tmp_path):
    settings = ('--model', 'test_resnet', '--recipe', 'none', '--img-size', 32, '--epochs', 1, '-b', 16)
    log = train(idx_dir, tmp_path / 'long', *settings, '--model-ema-decay', 0.99)
    assert 'model_ema_decay=0.99 is long for 3 updates: at the end, the averaged weights are 97 % the initial' in log
    assert 'is long' not in train(idx_dir, tmp_path / 'short', *settings, '--model-ema-decay', 0.1)


@pytest.mark.parametrize('name', [
    'shufflenetv2_100_noah', 'deit_tiny_050_patch16_224_noah',
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in (
        'resnet18_noah', 'pvt_tiny_050_noah', 'mixer_s16_050_224_noah', 'gmlp_ti16_050_224'))])
def test_the_recipe_of_every_family_runs(idx_dir, tmp_path, name):
    log = train(idx_dir, tmp_path / 'run', '--model', name, '--img-size', 64, '--batch-size', 8, '--smoke', 2)
    assert f'recipe of {name}' in log and 'learning rate: ' in log
    assert len((tmp_path / 'run' / 'log.jsonl').read_text().splitlines()) == 2


def test_epoch_updates_of_a_recipe_and_of_a_run(idx_dir, tmp_path):
    assert configure('resnet18', 'x', 'finetune').epoch_updates == 20
    assert configure('resnet18', 'x', 'finetune', epochs=3).epoch_updates == 0  # 3 passes, as asked for
    assert configure('resnet18', 'x', 'finetune', epochs=3, epoch_updates=5).epoch_updates == 5
    assert all(not recipe.epoch_updates for name, recipe in RECIPES.items() if name != 'finetune')
    said = train(
        idx_dir, tmp_path, '--model', 'test_resnet', '--recipe', 'none', '--img-size', 32, '-b', 32, '--epochs', 2,
        '--epoch-updates', 5, '--device-batch-size', 16)
    assert 'an epoch passes 4 times over the 48 training images: 6 updates' in said
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 2
    checkpoints = sorted(path.name for path in (tmp_path / 'checkpoints').iterdir())
    assert checkpoints == ['update-000000006', 'update-000000012']


@pytest.mark.parametrize('given, kept', [(None, True), (False, False), (True, True)])
def test_memory_layout_of_a_run(given, kept, idx_dir):
    run = Trainer(configure(
        'mobilenetv2_035_noah', 'x', 'none', channels_last=given, data_dir=str(idx_dir), img_size=32, batch_size=16,
        workers=0, cpu=True))
    assert (run.memory_format is torch.channels_last) is kept
    assert run.model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last) is kept


@pytest.mark.parametrize('environment, device, bf16, expected', [
    (None, 'cuda', True, 'bf16'), (None, 'cuda', False, None), (None, 'cpu', True, None), ('no', 'cuda', True, 'bf16'),
    ('fp16', 'cuda', True, None)])
def test_bf16_where_the_gpu_has_it(environment, device, bf16, expected, monkeypatch, caplog):
    monkeypatch.delenv('ACCELERATE_MIXED_PRECISION', raising=False)
    if environment:
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', environment)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: bf16)
    with caplog.at_level('INFO'):
        assert precision(torch.device(device)) == expected
    assert ('bf16, which this GPU has; --mixed-precision no' in caplog.text) is (expected == 'bf16')


def test_precision_is_of_the_recipe_and_recorded(idx_dir):
    assert configure('resnet18', 'x', 'finetune').mixed_precision == 'auto'
    assert configure('resnet18', 'x', 'finetune', mixed_precision=None).mixed_precision is None
    assert {recipe.mixed_precision for name, recipe in RECIPES.items() if name != 'finetune'} == {None}
    settings = dict(data_dir=str(idx_dir), img_size=32, batch_size=16, workers=0, cpu=True)
    run = Trainer(with_precision(configure('mobilenetv2_035_noah', 'x', 'finetune', **settings)))
    assert run.config.mixed_precision is None  # as it is written down, and compared when it goes on


@pytest.mark.parametrize('settings, message', [
    (dict(model='resnet18_noha'), "unknown model 'resnet18_noha'; did you mean "),
    (dict(task='foo'), "task='foo' is not one of multiclass, multilabel, reid"),
    (dict(task='multilabel', mixup=0.2), 'mixup and cutmix are for one class per image'),
    (dict(task='multilabel', loss='focal'), "loss='focal' is not one of bce, asl"),
    (dict(task='reid', cache_features='c'), 'cache_features does not go with the task reid'),
    (dict(cache_features='c', cutmix=1.), 'mixup and cutmix do not go with cache_features'),
    (dict(train_crop='centre'), "train_crop='centre' is not one of rrc, random, squash"),
    (dict(sync_bn=True), 'sync_bn needs a GPU'),
    (dict(device_batch_size=0), 'device_batch_size=0; expected 1 or more')])
def test_contradictions_are_refused_before_data_are_read(settings, message, tmp_path):
    given = dict(model='resnet18_noah', output=str(tmp_path / 'run'), data_dir='/nowhere', cpu=True)
    with pytest.raises(ValueError, match=message):
        train_here(TrainConfig(**{**given, **settings}))
    assert not (tmp_path / 'run').exists()
    with pytest.raises(FileNotFoundError, match='/nowhere'):
        train_here(TrainConfig(**given))
