"""What a run leaves in its folder."""
import json
import os
import shutil
from dataclasses import replace

import pytest
import timm
from safetensors.torch import save_file

from noah_zoo.training import configure, train
from noah_zoo.training.checkpoint import checkpoints
from noah_zoo.training.run_folder import RunFolder

from ..data.files import make_folder


def test_a_run_goes_on_with_its_classes_only(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.check_classes(['a', 'b'], 'auto')  # a new run
    folder.begin(configure('resnet18', str(tmp_path)), ['a', 'b', 'ç'], 0, {})
    folder.check_classes(('a', 'b', 'ç'), 'auto')
    other = RunFolder(str(tmp_path / 'other'))  # a branch of it
    (tmp_path / 'checkpoints/3').mkdir(parents=True)
    (tmp_path / 'checkpoints/3/custom_checkpoint_0.pkl').touch()
    for resume, goes_on in (('auto', folder), (str(tmp_path / 'checkpoints' / '3'), other)):
        for names, told in (
                (['a', 'b', 'c'], "other classes: without 'ç' and with 'c'$"),
                (['a', 'b'], "other classes: without 'ç'$"),
                (['a', 'b', 'c', 'ç'], "other classes: with 'c'$"), (['b', 'a', 'ç'], "their order was 'a', 'b', 'ç'")):
            with pytest.raises(ValueError, match=told):
                goes_on.check_classes(names, resume)
    (tmp_path / 'classes.json').unlink()  # of a run from before
    folder.check_classes(['x'], 'auto')
    (tmp_path / 'best').mkdir()
    (tmp_path / 'best/config.json').write_text('{"label_names": ["a", "b"]}')
    with pytest.raises(ValueError, match="without 'a', 'b' and with 'x'"):
        folder.check_classes(['x'], 'auto')


def test_names_of_any_bytes(tmp_path):
    names = [os.fsdecode(b'caf\xe9'), 'b']
    folder = RunFolder(str(tmp_path))
    folder.begin(configure('resnet18', str(tmp_path)), names, 0, {})
    folder.check_classes(names, 'auto')


def test_a_renamed_class_stops_a_run_that_goes_on(tmp_path):
    make_folder(tmp_path / 'data', {'cat': 8, 'dog': 8})
    config = configure(
        'mobilenetv2_035_noah', str(tmp_path / 'run'), 'none', dataset='folder', data_dir=str(tmp_path / 'data'),
        img_size=32, epochs=1, batch_size=8, workers=0, cpu=True, resume='auto')
    train(config)
    (tmp_path / 'run/summary.json').unlink()  # as if it had not come to its end
    for split in ('train', 'validation'):
        os.rename(tmp_path / 'data' / split / 'dog', tmp_path / 'data' / split / 'wolf')
    with pytest.raises(ValueError, match="run cannot go on with other classes: without 'dog' and with 'wolf'"):
        train(config)


def test_a_run_goes_on_with_its_images_only(tmp_path):
    make_folder(tmp_path / 'data', {'cat': 20, 'dog': 20}, ['train'])
    (tmp_path / 'data/train/cat/0.png').write_bytes(b'')  # damaged
    config = configure(
        'test_resnet', str(tmp_path / 'run'), 'none', dataset='folder', data_dir=str(tmp_path / 'data'), img_size=32,
        val_fraction=0.25, epochs=1, batch_size=8, workers=0, cpu=True, resume='auto', skip_damaged=True)
    train(config)
    os.rename(tmp_path / 'data', tmp_path / 'moved')
    moved = replace(config, data_dir=f'{tmp_path}/./moved', epochs=2)
    assert train(moved)['damaged'] == 1
    assert list(json.loads((tmp_path / 'run/damaged.json').read_text())) == [str(tmp_path / 'moved/train/cat/0.png')]
    shutil.copy(tmp_path / 'moved/train/cat/1.png', tmp_path / 'moved/train/cat/1b.png')
    with pytest.raises(ValueError, match=(
            r'run cannot go on with other images: it had (29|30) to train on and (10|9) to evaluate on, now there are '
            r'(30|31) and (10|9); '
            'another --output with --model local-dir:.*best --split-from .* starts from its weights')):
        train(replace(moved, epochs=3))
    os.remove(tmp_path / 'moved/train/cat/1.png')
    with pytest.raises(ValueError, match='there are (29 and 10|30 and 9) of other names or labels; another'):
        train(replace(moved, epochs=3))
    os.rename(tmp_path / 'moved/train/cat/1b.png', tmp_path / 'moved/train/cat/1.png')
    assert train(replace(moved, epochs=3))['epoch'] == 3


def test_no_path_of_the_machine_is_kept_with_the_weights(tmp_path):
    secret = tmp_path / 'secret' / 'weights.safetensors'
    secret.parent.mkdir()
    save_file(timm.create_model('mobilenetv2_035').state_dict(), secret)
    make_folder(tmp_path / 'data', {'cat': 8, 'dog': 8})
    for name, model, kwargs in (
            ('own', 'mobilenetv2_035_noah', {}), ('any', 'noah', dict(backbone='mobilenetv2_035', key_ratio=None))):
        config = configure(
            model, str(tmp_path / name), 'none', dataset='folder', data_dir=str(tmp_path / 'data'), img_size=32,
            epochs=1, batch_size=8, workers=0, cpu=True,
            model_kwargs=dict(pretrained_backbone=str(secret), init='random', **kwargs))
        train(config)
        best = tmp_path / name / 'best'
        assert (best / 'config.json').exists()
        for file in best.rglob('*'):
            assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file
        assert json.loads((best / 'config.json').read_text())['model_args']['key_ratio'] is not None
        assert timm.create_model(f'local-dir:{best}', pretrained=True).num_classes == 2


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The settings of a finished run of three epochs of three updates; all checkpoints are there."""
    folder = tmp_path_factory.mktemp('finished')
    make_folder(folder / 'data', {'cat': 12, 'dog': 12})
    config = configure(
        'mobilenetv2_035_noah', str(folder / 'run'), 'none', dataset='folder', data_dir=str(folder / 'data'),
        img_size=32, epochs=3, batch_size=8, lr=0.01, opt='adamw', min_lr=0., workers=0, cpu=True, checkpoint_hist=9)
    train(config)
    return config


def log_of(output):
    lines = [json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if 'seconds' not in key} for line in lines]


def weights_of(run):
    return (checkpoints(run.checkpoints)[-1] / 'model.safetensors').read_bytes()


def test_a_branch_with_the_same_settings_is_the_same_run(finished, tmp_path):
    run = RunFolder(finished.output)
    first, *_ = checkpoints(run.checkpoints)
    branch = replace(finished, output=str(tmp_path / 'branch'), resume=str(first))
    summary = train(branch)
    assert log_of(tmp_path / 'branch') == log_of(run.path) and summary['epoch'] == 3
    assert weights_of(RunFolder(branch.output)) == weights_of(run)
    with pytest.raises(FileExistsError, match='branch has a finished run'):
        train(branch)
    with pytest.raises(ValueError, match=r'is the end of 3 epochs, and epochs=3: none is left to train'):
        train(replace(branch, output=str(tmp_path / 'none'), resume=str(checkpoints(run.checkpoints)[-1])))
    assert not (tmp_path / 'none/args.yaml').exists()


def test_a_branch_has_its_own_settings_and_its_own_best(finished, tmp_path):
    run = RunFolder(finished.output)
    _, second, _ = checkpoints(run.checkpoints)
    alone = tmp_path / 'alone' / 'checkpoints' / second.name  # without the log of its run
    shutil.copytree(second, alone)
    for name, checkpoint, epochs in (('a', second, [1, 2, 3, 4]), ('b', alone, [3, 4])):
        summary = train(replace(
            finished, output=str(tmp_path / name), resume=str(checkpoint), lr=1e-3, epochs=4, weight_decay=0.5))
        log = log_of(tmp_path / name)
        assert [line['epoch'] for line in log] == epochs
        # cosine over 4 epochs: of 1e-3, while the first two epochs had their own
        assert [line['lr'] for line in log[-2:]] == pytest.approx([5e-4, 1.4645e-4], rel=1e-3)
        assert summary['best']['epoch'] in (3, 4) and summary['config']['lr'] == 1e-3
        assert summary['best']['epoch'] == max((3, 4), key=lambda n: log[n - 5]['top1'])
    for settings, told in (
            (dict(opt='momentum'), "does not go with other settings: opt was 'adamw', now 'momentum'"),
            (dict(model='resnet18_noah'), 'other settings: model was'),
            (dict(batch_size=4), 'an epoch had 3 updates, and has 6 now')):
        with pytest.raises(ValueError, match=told):
            train(replace(finished, output=str(tmp_path / 'c'), resume=str(second), **settings))


def test_going_back_drops_what_came_later(finished, tmp_path):
    shutil.copytree(finished.output, tmp_path / 'run')
    first, *_ = checkpoints(tmp_path / 'run/checkpoints')
    config = replace(finished, output=str(tmp_path / 'run'), resume=str(first), skip_damaged=False)
    with pytest.raises(KeyboardInterrupt):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('noah_zoo.training.trainer.Trainer.train_epoch', interrupt)
            train(config)
    assert checkpoints(tmp_path / 'run/checkpoints') == [first]
    assert len(log_of(tmp_path / 'run')) == 1
    assert train(replace(config, resume='auto'))['best']['epoch'] in (2, 3)
    assert log_of(tmp_path / 'run') == log_of(RunFolder(finished.output).path)


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_finished_run_is_trained_on(finished, tmp_path, caplog):
    caplog.set_level('INFO')
    shutil.copytree(finished.output, tmp_path / 'run')
    config = replace(finished, output=str(tmp_path / 'run'), resume='auto')
    summary = train(config)  # nothing to do
    assert summary['epoch'] == 3
    before = log_of(tmp_path / 'run')
    with pytest.raises(ValueError, match='cannot go on with other settings: epochs was 3, now 2'):
        train(replace(config, epochs=2))
    summary = train(replace(config, epochs=5))
    assert 'epoch 4 of 5, update 9, learning rate 3.45e-03, before 0.00e+00' in caplog.text
    log = log_of(tmp_path / 'run')
    assert log[:3] == before and [line['epoch'] for line in log] == [1, 2, 3, 4, 5] and summary['epoch'] == 5
    best = max(log, key=lambda line: line['top1'])
    assert summary['best']['epoch'] == best['epoch']
    shutil.rmtree(tmp_path / 'run/checkpoints')
    with pytest.raises(FileNotFoundError, match='a finished run of 5 epochs without checkpoints'):
        train(replace(config, epochs=6))
    assert train(replace(config, epochs=5))['epoch'] == 5  # as it is


@pytest.mark.parametrize('sched', ['onecycle', pytest.param('cosine', marks=pytest.mark.exhaustive)])
def test_schedules_by_updates_go_on_in_a_longer_run(sched, finished, tmp_path):
    config = replace(
        finished, output=str(tmp_path / 'run'), sched=sched, opt='momentum', sched_on_updates=True, epochs=1)
    train(config)
    train(replace(config, epochs=2, resume='auto'))
    train(replace(config, epochs=2, output=str(tmp_path / 'at_once')))
    (_, last), (_, at_once) = log_of(tmp_path / 'run'), log_of(tmp_path / 'at_once')
    assert last['lr'] == at_once['lr']
