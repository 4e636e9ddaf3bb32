"""Fine-tuning: three commands from a folder of images to a model on the Hub; heads alone, batch norms, checks."""
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, create_transform, resolve_data_config, resolve_model_data_config
from timm.models import save_for_hf

from noah_zoo.data.factory import check_data
from noah_zoo.inference.predict import predict
from noah_zoo.training import configure, train
from noah_zoo.training.validate import validate

from ..commands import call
from ..hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = 'mobilenetv2_035_noah.fashion_mnist'


def settings(photos, output, **kwargs):
    return configure(
        SHIPPED.split('.')[0], str(output), 'none', **{**dict(
            dataset='folder', data_dir=str(photos), val_fraction=0.25, img_size=32, epochs=2,
            batch_size=8, workers=0, cpu=True, lr=0.01), **kwargs})


def readme_commands():
    """The README's commands from a folder to a model on the Hub, words of each; a smaller model and fewer steps."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8').replace('\\\n', '')
    block = text.partition('## Fine-tune')[2].split('```')[1]
    commands = [line.split() for line in block.splitlines() if line.startswith('python ')]
    assert [command[1] for command in commands] == [f'scripts/{name}.py' for name in ('finetune', 'publish', 'predict')]
    tune, *_ = commands
    tune[tune.index('--model') + 1] = SHIPPED  # no weights of ImageNet here
    tune += ['--cpu', '--workers', '0', '--epochs', '3', '-b', '6', '--lr', '0.001']
    return commands


def make_place(photos, tmp_path):
    (tmp_path / 'photos').symlink_to(photos)
    (tmp_path / 'new.jpg').write_bytes((photos / 'blue' / '0.jpg').read_bytes())


def test_from_a_folder_to_a_published_model(photos, hub, tmp_path, monkeypatch):
    make_place(photos, tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_you')
    for _, script, *words in readme_commands():
        words = [word.replace('you/photos', 'you/from-a-folder') for word in words]
        done = call(Path(script).stem, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert set(hub.files('you/from-a-folder')) >= {'README.md', 'config.json', 'model.safetensors'}
    assert 'red' in hub.files('you/from-a-folder')['README.md'].decode()
    assert done.stdout.split('blue')[0].count('\n') <= 2, done.stdout  # first of the three


@pytest.mark.docs
def test_the_readmes_commands_in_new_processes(photos, tmp_path):
    make_place(photos, tmp_path)
    with HubServer(users={'hf_you': 'you'}) as hub:
        env = hub.env(tmp_path / 'home', 'hf_you') | {'PYTHONPATH': str(ROOT)}
        for _, script, *words in readme_commands():
            done = subprocess.run(
                [sys.executable, ROOT / script, *words], cwd=tmp_path, env=env, capture_output=True, text=True,
                timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
        assert set(hub.files('you/photos')) >= {'README.md', 'config.json', 'model.safetensors'}
        assert 'red' in hub.files('you/photos')['README.md'].decode()
    assert done.stdout.split('blue')[0].count('\n') <= 2, done.stdout  # first of the three


def test_pretrained_unless_told_otherwise(photos, tmp_path):
    for name, words in (('with', ()), ('without', ['--no-pretrained'])):
        done = call(
            'finetune', '--model', SHIPPED, '--dataset', 'folder', '--data-dir', photos, '--val-fraction', 0.25,
            '--cpu', '--workers', 0, '--smoke', 1, '-b', 6, '--lr', 0, '--min-lr', 0, '--warmup-epochs', 0, '--output',
            tmp_path / name, *words)
        assert done.returncode == 0, done.stderr[-2000:]
        summary = json.loads((tmp_path / name / 'summary.json').read_text())
        assert summary['config']['opt'] == 'adamw' and summary['config']['pretrained'] == (name == 'with')
    shipped = timm.create_model(SHIPPED, pretrained=True).state_dict()
    for name in ('with', 'without'):
        weights = load_file(tmp_path / name / 'best' / 'model.safetensors')
        assert torch.equal(weights['conv_stem.weight'], shipped['conv_stem.weight']) == (name == 'with')


def test_a_saved_model_at_another_image_size(photos, tmp_path):
    model = timm.create_model(
        'deit_tiny_050_patch16_224_noah', num_classes=3, pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))
    save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=True)
    config = settings(photos, tmp_path / 'run', img_size=48, pretrained=True, smoke=1)
    train(dataclasses.replace(config, model=f'local-dir:{tmp_path / "saved"}'))
    model = timm.create_model(f'local-dir:{tmp_path / "run" / "best"}', pretrained=True)
    assert model.patch_embed.img_size == (48, 48) and tuple(model.pretrained_cfg['input_size']) == (3, 48, 48)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 3)


@pytest.mark.parametrize('more', [
    dict(model_ema_decay=0.5), dict(checkpoint_steps=1),
    *(pytest.param(more, marks=pytest.mark.exhaustive) for more in (
        dict(), dict(freeze_epochs=1), dict(freeze_bn=False)))])
def test_batch_norms_keep_the_statistics_they_have(more, photos, tmp_path):
    before = timm.create_model(SHIPPED, pretrained=True)
    new = before.blocks[0][0].bn1
    new.reset_running_stats()
    save_for_hf(before, str(tmp_path / 'saved'), safe_serialization=True)
    config = settings(
        photos, tmp_path / 'run', smoke=2, pretrained=True, checkpoint_hist=9, **{'freeze_bn': True, **more})
    config = dataclasses.replace(config, model=f'local-dir:{tmp_path / "saved"}')
    train(config)

    def last():
        return load_file(max((tmp_path / 'run' / 'checkpoints').glob('update-*')) / 'model.safetensors')

    after = last()
    if config.checkpoint_steps:  # on from the first update, when the new norm has statistics as well
        (tmp_path / 'run' / 'summary.json').unlink()
        for path in sorted((tmp_path / 'run' / 'checkpoints').glob('update-*'))[1:]:
            shutil.rmtree(path)
        train(dataclasses.replace(config, resume='auto'))
        again = last()
        assert all(again[name].equal(value) for name, value in after.items())
    if config.model_ema_decay:
        after = load_file(tmp_path / 'run' / 'best' / 'model.safetensors')
    assert after['bn1.running_mean'].equal(before.bn1.running_mean) == config.freeze_bn
    assert after['bn1.running_var'].equal(before.bn1.running_var) == config.freeze_bn
    assert not after['bn1.weight'].equal(before.bn1.weight)
    assert not after['blocks.0.0.bn1.running_mean'].equal(new.running_mean)  # has none yet, and learns them


def test_a_run_from_before_a_setting_goes_on_as_it_began(photos, tmp_path):
    config = settings(photos, tmp_path / 'run', smoke=1, epochs=2)
    train(config)
    args = tmp_path / 'run' / 'args.yaml'
    args.write_text(''.join(line for line in args.read_text().splitlines(True) if not line.startswith('freeze_bn')))
    assert train(dataclasses.replace(config, resume='auto'))['epoch'] == 2
    with pytest.raises(ValueError, match='cannot go on with other settings: freeze_bn was False, now True'):
        train(dataclasses.replace(config, resume='auto', freeze_bn=True))


def test_help_and_errors():
    done = call('finetune', '--help')
    assert done.returncode == 0
    assert done.stdout.startswith('usage: noah-zoo finetune --model NAME') and '--cache-features' in done.stdout
    done = call('finetune', '--model', 'resnet51_noah', '--output', 'no', '--dataset', 'folder', '--data-dir', '.')
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('noah-zoo finetune: error: ')


def test_the_backbone_waits_for_its_epochs(photos, tmp_path):
    summaries = [train(settings(photos, tmp_path / str(n), freeze_epochs=n, batch_size=16)) for n in (0, 1, 2)]
    assert [s['config']['freeze_epochs'] for s in summaries] == [0, 1, 2]
    torch.manual_seed(0)
    states = []
    for n in (0, 1, 2):
        first, last = (
            load_file(tmp_path / str(n) / 'checkpoints' / f'update-{update:09}' / 'model.safetensors')
            for update in (2, 4))
        states.append((first, last))
    stem = 'conv_stem.weight'
    (a1, a2), (b1, b2), (c1, c2) = states
    assert not a1[stem].equal(b1[stem]) and b1[stem].equal(c1[stem]) and c1[stem].equal(c2[stem])
    assert not b1[stem].equal(b2[stem])
    assert c1['bn1.running_mean'].equal(c2['bn1.running_mean'])
    assert not c1['classifier.value.weight'].equal(c2['classifier.value.weight'])


def test_the_crop_goes_with_the_model(photos, tmp_path):
    train(settings(photos, tmp_path, smoke=1, train_crop='squash', crop_mode='squash', crop_pct=1.))
    model = timm.create_model(f'local-dir:{tmp_path / "best"}', pretrained=True)
    config = resolve_data_config({}, model=model)
    assert config['crop_mode'] == 'squash' and config['crop_pct'] == 1


def test_a_run_with_one_cycle(photos, tmp_path):
    summary = train(settings(photos, tmp_path, sched='onecycle'))
    assert summary['lr'] < 0.01 / 100  # its end


def test_check_data(photos, tmp_path):
    words = ['--check-data', '--dataset', 'folder', '--val-fraction', '0.25', '--workers', '0']
    done = call('finetune', *words, '--data-dir', photos)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'folder: 32 training images and 10 validation images of 3 classes, all of them readable\n'
    bad = tmp_path / 'bad'
    for folder in photos.iterdir():
        (bad / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            (bad / folder.name / file.name).write_bytes(file.read_bytes())
    (bad / 'red' / '3.jpg').write_bytes((photos / 'red' / '3.jpg').read_bytes()[:500])
    done = call('train', *words, '--data-dir', bad)
    assert done.returncode == 2 and not done.stdout
    assert str(Path('red') / '3.jpg') in done.stderr and 'images cannot be read' in done.stderr
    assert not list(tmp_path.glob('*.yaml'))


@pytest.mark.parametrize('in_chans, more', [
    (1, dict(aa='rand-m9', reprob=0.5)), (4, dict(color_jitter=0.4, reprob=0.5)),
    (1, dict(cache_features='features')),
    pytest.param(1, dict(dataset='fashion_mnist', data_dir='idx', val_fraction=0.), marks=pytest.mark.exhaustive)])
def test_images_of_other_channels(in_chans, more, photos, idx_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'idx').symlink_to(idx_dir)
    config = settings(photos, tmp_path / 'run', smoke=1, model_kwargs=dict(in_chans=in_chans), **more)
    expected = train(config)
    saved = f'local-dir:{tmp_path / "run" / "best"}'
    model = timm.create_model(saved, pretrained=True).eval()
    assert model.conv_stem.weight.shape[1] == in_chans
    data_config = resolve_model_data_config(model)
    assert tuple(data_config['input_size']) == (in_chans, 32, 32)
    assert {len(data_config['mean']), len(data_config['std'])} <= {1, in_chans}
    assert data_config['mean'][0] == pytest.approx(sum(IMAGENET_DEFAULT_MEAN) / 3)
    # timm alone sees what was trained on
    path = photos / 'red' / '3.jpg'
    image = Image.open(path).convert({1: 'L', 4: 'RGBA'}[in_chans])
    x = create_transform(**data_config, is_training=False)(image)
    assert x.shape == (in_chans, 32, 32)
    with torch.inference_mode():
        probabilities = model(x[None])[0].softmax(0)
    found = {p['index']: p['probability'] for p in next(predict(model, [str(path)], 10))['predictions']}
    assert [found[i] for i in sorted(found)] == pytest.approx(probabilities.tolist(), abs=1e-5)
    if not config.val_fraction:
        found = validate(saved, 'fashion_mnist', data_dir=config.data_dir, workers=0, cpu=True)
        assert found['images'] == 12 and 0 <= found['top1'] <= 100 and expected['epoch'] == 2
    elif not config.cache_features:  # on from there, at another size, without saying the channels again
        again = dataclasses.replace(config, model=saved, output='again', pretrained=True, img_size=48, model_kwargs={})
        train(again)
        model = timm.create_model('local-dir:again/best', pretrained=True)
        assert tuple(resolve_model_data_config(model)['input_size']) == (in_chans, 48, 48)


@pytest.mark.parametrize('more, message', [
    (dict(model_kwargs=dict(in_chans=2)), 'in_chans=2.*accepted are 1'),
    (dict(model_kwargs=dict(in_chans=4), aa='rand-m9'), "aa='rand-m9' does not go with images of 4 channels")])
def test_channels_that_are_refused_before_training(more, message, photos, tmp_path):
    config = settings(photos, tmp_path / 'run', **more)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / 'run').exists()
    if config.model_kwargs['in_chans'] == 2:
        with pytest.raises(ValueError, match=message):
            check_data(config)
        save_for_hf(timm.create_model('test_resnet', in_chans=2, num_classes=3), str(tmp_path / 'two'))
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, model=f'local-dir:{tmp_path / "two"}', model_kwargs={}))
        assert not (tmp_path / 'run').exists()
