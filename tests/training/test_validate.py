"""`noah-zoo validate`, on real images."""
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import timm
from PIL import Image
from timm.models import ResNet, VisionTransformer, save_for_hf

import noah_zoo  # noqa: F401
from noah_zoo.catalog import CATALOG
from noah_zoo.models.saving import save_model
from noah_zoo.training.validate import validate

from ..commands import call
from ..data.files import make_shards, samples

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ['--model', 'mobilenetv2_035_noah.fashion_mnist', '--cpu', '--workers', '0']


@pytest.mark.process
def test_on_any_number_of_processes(idx_dir):
    results = []
    for launch in ((), ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')):
        result = subprocess.run(
            [sys.executable, *launch, str(ROOT / 'scripts' / 'validate.py'), *SHIPPED, '--data-dir', str(idx_dir),
             '-b', '5', '--json'], capture_output=True, text=True, timeout=200, check=False)
        assert result.returncode == 0, result.stderr
        results.append(json.loads(result.stdout))
    assert results[0]['images'] == 12 and 'paper' not in results[0]
    assert results[0]['top1'] > 80 and results[0]['top5'] == 100
    assert results[1] == pytest.approx(results[0])


def test_printed(idx_dir):
    done = call('validate', *SHIPPED, '--data-dir', idx_dir, '-b', 5, '--json')
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result['images'] == 12 and 'paper' not in result
    assert result['top1'] > 80 and result['top5'] == 100 and 0 < result['val_loss'] < 1
    lines = call('validate', *SHIPPED, '--data-dir', idx_dir).stdout.splitlines()
    assert lines[0] == 'mobilenetv2_035_noah.fashion_mnist on fashion_mnist [validation]'
    assert lines[1].startswith('top-1: ') and lines[1].endswith(' %')


@pytest.mark.parametrize('name, twin', [
    ('resnet18_noah', ResNet), ('deit_tiny_050_patch16_224_noah', VisionTransformer)])
def test_another_image_size(name, twin, idx_dir, tmp_path, monkeypatch):
    model = timm.create_model(name, num_classes=10, pretrained_cfg_overlay=dict(input_size=(3, 32, 32), pool_size=None))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    sizes, forward = [], twin.forward_features
    monkeypatch.setattr(
        twin, 'forward_features', lambda self, x, **kwargs: sizes.append(x.shape[-1]) or forward(self, x, **kwargs))
    for img_size in (None, 48):
        validate(
            f'local-dir:{tmp_path}', 'fashion_mnist', data_dir=str(idx_dir), img_size=img_size, workers=0, cpu=True)
    assert sizes == [32, 48]


def test_an_image_size_that_cannot_be(idx_dir, tmp_path):
    save_for_hf(timm.create_model('mixer_s16_050_224_noah', num_classes=10), str(tmp_path), safe_serialization=True)
    with pytest.raises(ValueError, match='is made for images of 224 x 224 pixels; got img_size=48'):
        validate(f'local-dir:{tmp_path}', 'fashion_mnist', data_dir=str(idx_dir), img_size=48, workers=0, cpu=True)


def test_beside_the_papers_figure(tmp_path, monkeypatch):
    # The authors' weights are told by their tag; 1,000 classes, an image each.
    model = timm.create_model(
        'mobilenetv2_035_noah', pretrained_cfg_overlay=dict(input_size=(3, 32, 32), pool_size=None))
    save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True)
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert config['pretrained_cfg']['tag'] == 'osvai_in1k'
    for label in range(1000):
        folder = tmp_path / 'data' / 'validation' / f'n{label:04}'
        folder.mkdir(parents=True)
        Image.new('RGB', (8, 8), (label % 256, label // 4, 0)).save(folder / '1.png')
    args = ['--model', f'local-dir:{tmp_path / "model"}', '--dataset', 'folder', '--data-dir', tmp_path / 'data',
            '--cpu', '--workers', 0]
    paper = CATALOG['mobilenetv2_035_noah'].paper
    result = json.loads(call('validate', *args, '--json').stdout)
    assert result['images'] == 1000 and result['paper'] == {'top1': paper.top1, 'top5': paper.top5}
    monkeypatch.setattr('noah_zoo.training.validate.validate', lambda *args, **kwargs: result)
    lines = call('validate', *args).stdout.splitlines()
    assert lines[1].endswith('paper, on ImageNet-1k: 63.40 %') and lines[2].endswith('ImageNet-1k: 83.91 %')


def test_a_folder_without_splits_is_called_all_images(tmp_path, caplog):
    save_for_hf(timm.create_model('resnet18_noah', num_classes=2), str(tmp_path / 'model'), safe_serialization=True)
    for name in ('cat', 'dog'):
        for split in ('whole', 'split/validation'):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(tmp_path / split / name / '1.png')
    for folder, split in (('split', 'validation'), ('whole', 'all images')):
        result = validate(
            f'local-dir:{tmp_path}/model', 'folder', data_dir=str(tmp_path / folder), img_size=32, workers=0, cpu=True)
        assert result['split'] == split and result['images'] == 2
        assert ("has no folder for split 'validation'" in caplog.text) == (folder == 'whole')


def test_a_stream_in_another_order_of_classes(tmp_path):
    pytest.importorskip('webdataset')
    save_model(timm.create_model('test_resnet', num_classes=2), tmp_path / 'model', {}, label_names=['cat', 'dog'])
    args = dict(dataset='wds/', img_size=32, split='train', workers=0, cpu=True)
    for names in ('cat\ndog\n', 'dog\ncat\n'):
        root = make_shards(tmp_path / names[:3], [samples(0, 5)], names)
        if names.startswith('cat'):
            validate(f'local-dir:{tmp_path}/model', data_dir=root, **args)
        else:
            with pytest.raises(ValueError, match="other classes than the stream has: their order was 'cat', 'dog'"):
                validate(f'local-dir:{tmp_path}/model', data_dir=root, **args)


def test_other_columns(tmp_path):
    table = datasets.Dataset.from_dict(
        {'img': [Image.new('RGB', (8, 8))] * 2, 'fine': [0, 1]},
        features=datasets.Features({'img': datasets.Image(), 'fine': datasets.ClassLabel(names=['cat', 'dog'])}))
    (tmp_path / 'data').mkdir()
    table.to_parquet(tmp_path / 'data' / 'validation.parquet')
    save_model(timm.create_model('test_resnet', num_classes=2), tmp_path / 'model', {}, label_names=['cat', 'dog'])
    args = ['--model', f'local-dir:{tmp_path}/model', '--dataset', 'hfds/parquet', '--data-dir', tmp_path / 'data',
            '--cpu', '-j', 0]
    result = call('validate', *args)
    assert result.returncode == 2 and "no images in a column 'image' (--input-key)" in result.stderr
    assert call('validate', *args, '--input-key', 'img', '--target-key', 'fine').returncode == 0


@pytest.mark.parametrize('args, message', [
    (['--model', 'mobilenetv2_035_noah.fashion_mnist', '--data-dir', '/nowhere'], '/nowhere is not a folder'),
    (['--model', 'mobilenetv2_035_noah.fashion_mnist', '--data-dir', '/nowhere', '--dataset', 'fashion_mnist'],
     'neither t10k-images-idx3-ubyte nor'),
    (['--model', 'mobilenetv2_035_noah.fashion_mnist', '--dataset', 'folder', '--data-dir', '{folder}'],
     'tells 10 classes apart, the images have 2 (cat, dog)'),
    (['--model', 'resnet18_noha'], 'resnet18_noha'),
])
def test_bad_input(args, message, tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path / 'validation' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'validation' / name / '1.png')
    result = call('validate', *[arg.format(folder=tmp_path) for arg in args], '--cpu')
    assert result.returncode == 2 and message in result.stderr and 'Traceback' not in result.stderr
