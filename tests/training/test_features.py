"""Cached features of a frozen backbone: the same batches and accuracy as without, and a cache that is never wrong."""
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

from noah_zoo import add_noah_head
from noah_zoo.data import create_dataset
from noah_zoo.data.images import DamagedImageError
from noah_zoo.data.loader import EpochBatchSampler, create_loader
from noah_zoo.inference.predict import DEFAULT_MODEL
from noah_zoo.models.attach import eval_transform
from noah_zoo.training import configure, features, train
from noah_zoo.training.features import CachedFeatures, FeatureBatches, HeadOnly, cache_features, feature_key

Parts = namedtuple('Parts', 'model images transform')


@pytest.fixture
def parts(photos):
    model = timm.create_model(DEFAULT_MODEL, pretrained=True, num_classes=3).eval()
    return Parts(model, create_dataset('folder', str(photos), 'train'),
                 create_transform(**resolve_data_config(dict(img_size=32), model=model)))


def cached(parts, folder, **kwargs):
    return cache_features(*parts, folder, **{**dict(batch_size=8, workers=0), **kwargs})


def test_features_and_their_batches(parts, tmp_path):
    found = cached(parts, tmp_path)
    sampler = EpochBatchSampler(len(parts.images), 8, 1, 0, seed=3)
    sampler.epoch = 2
    batches = list(FeatureBatches(found, sampler))
    assert len(batches) == len(sampler) == 5
    loader = create_loader(parts.images, parts.transform, sampler, 0, 8)
    with torch.inference_mode():
        for (x, targets), (images, labels) in zip(batches, loader, strict=True):
            expected = parts.model.forward_features(images)
            assert x.dtype == torch.float32 and torch.equal(targets, labels)
            torch.testing.assert_close(x, expected, rtol=2 ** -8, atol=1e-6)  # bfloat16 has 8 bits


@pytest.mark.parametrize('name, kwargs', [
    ('test_vit', dict(img_size=32)),
    ('swin_tiny_patch4_window7_224', dict(img_size=56, window_size=7, embed_dim=16, depths=(1, 1), num_heads=(1, 2)))])
def test_tokens_and_maps_with_channels_last_lie_as_the_model_gives_them(name, kwargs, photos, tmp_path):
    model = add_noah_head(timm.create_model(name, num_classes=3, **kwargs)).eval()
    size = kwargs['img_size']
    images, transform = create_dataset('folder', str(photos), 'train').take([3, 40, 9, 30, 20]), create_transform(size)
    x, _ = cache_features(model, images, transform, tmp_path, 2, 0).batch([4, 0, 2])
    with torch.inference_mode():
        expected = model.forward_features(torch.stack([transform(images.read(i)[0]) for i in (4, 0, 2)]))
        logits = model.forward_head(expected)
    assert model.noah_features.fmt != 'NCHW' and x.stride() == expected.stride()
    torch.testing.assert_close(x, expected, rtol=2 ** -8, atol=1e-5)
    torch.testing.assert_close(HeadOnly(model)(x), logits, rtol=0.02, atol=0.02)  # of features that are rounded


def test_larger_than_memory(parts, tmp_path, monkeypatch):
    shape = (2 ** 27, 1280, 1, 1)  # 344 GB, of which the disk holds nothing
    path = tmp_path / f'{feature_key(*parts)}.bin'
    with path.open('wb') as file:
        file.truncate(2 * torch.Size(shape).numel())
    monkeypatch.setattr(features, '_recorded', lambda path: shape)
    x, _ = cached(parts, tmp_path).batch([7, 1])
    assert x.shape == (2, *shape[1:])


def test_it_is_computed_once(parts, tmp_path, monkeypatch):
    first = cached(parts, tmp_path)
    monkeypatch.setattr(parts.model, 'forward_features', None)  # cannot be called
    assert torch.equal(cached(parts, tmp_path).features, first.features)
    files = sorted(path.suffix for path in tmp_path.iterdir())
    assert files in (['.bin', '.json'], ['.bin', '.json', '.lock'])


@pytest.mark.parametrize('damage', ['byte', 'short', 'gone', 'record', '', '{}', '[1]', '{"shape": [4'])
def test_a_damaged_file_is_computed_again(damage, parts, tmp_path, caplog):
    first = cached(parts, tmp_path)
    expected = first.features.clone()
    path, = tmp_path.glob('*.bin')
    content = bytearray(path.read_bytes())
    if damage == 'byte':
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == 'short':
        path.write_bytes(content[:-2])
    elif damage == 'gone':
        path.unlink()
    elif damage == 'record':
        path.with_suffix('.json').unlink()
    else:
        path.with_suffix('.json').write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached(parts, tmp_path).features, expected)
    assert ('is not as it was written' in caplog.text) == (damage != 'record')


def test_what_the_key_depends_on(parts, photos, tmp_path):
    def key(**changed):
        return feature_key(*[changed.get(name, value) for name, value in zip(('model', 'images', 'transform'), (
            parts.model, parts.images, parts.transform))])

    first = key()
    parts.model.reset_classifier(5)
    assert key() == first  # the head is none of it
    others = [
        key(transform=create_transform(32)), key(images=parts.images.take(range(20))),
        key(model=timm.create_model(DEFAULT_MODEL, pretrained=True, output_stride=8).eval()),
        key(model=timm.create_model(DEFAULT_MODEL.split('.')[0]).eval())]
    parts.model.bn1.running_mean[0] += 1
    others.append(key())
    parts.model.bn1.running_mean[0] -= 1
    assert key() == first
    file = photos / 'red' / '0.jpg'
    os.utime(file, ns=(1, 2))
    others.append(key())
    assert len({first, *others}) == 7


@pytest.mark.process
def test_the_key_is_the_same_in_another_process(parts, photos):
    code = (
        'import sys, timm, noah_zoo; from noah_zoo.data import create_dataset; '
        'from noah_zoo.training.features import feature_key; '
        'from timm.data import create_transform, resolve_data_config; '
        f'm = timm.create_model({DEFAULT_MODEL!r}, pretrained=True, num_classes=9).eval(); '
        't = create_transform(**resolve_data_config(dict(img_size=32), model=m)); '
        f'print(feature_key(m, create_dataset("folder", {str(photos)!r}, "train"), t))')
    env = {**os.environ, 'PYTHONHASHSEED': '7'}
    assert subprocess.check_output([sys.executable, '-c', code], text=True, env=env).strip() == feature_key(*parts)


def test_the_key_depends_on_what_neither_weights_nor_layers_show(parts):
    def key(**kwargs):
        torch.manual_seed(0)
        model = timm.create_model('test_vit', img_size=32, num_classes=3, **kwargs).eval()
        return feature_key(model, parts.images, parts.transform)
    assert len({key(), key(), key(num_heads=4), key(dynamic_img_size=False)}) == 3


def test_no_room(parts, tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(features.shutil, 'disk_usage', lambda path: usage(10, 10, 12345))
    message = r'the features of 42 images cannot be kept at .* GB are needed, 0.00 GB are free'
    with pytest.raises(OSError, match=message):
        cached(parts, tmp_path)
    assert not list(tmp_path.glob('*.bin')) + list(tmp_path.glob('*.partial')) + list(tmp_path.glob('*.json'))


def test_full_while_it_computes(parts, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))  # a batch has 8 * 1280 * 2 bytes
    try:
        with pytest.raises(OSError, match='the features of 42 images cannot be kept at .*File too large'):
            cached(parts, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.suffix for path in tmp_path.iterdir()} <= {'.lock'}
    killed = tmp_path / f'.{feature_key(*parts)}.bin.12345678.partial'
    killed.write_bytes(b'of a process that was killed')
    assert len(cached(parts, tmp_path).features) == 42 and not killed.exists()


def test_an_image_that_is_gone_is_named(parts, photos, tmp_path):
    copy = tmp_path / 'photos'
    shutil.copytree(photos, copy)
    images = create_dataset('folder', str(copy), 'train')
    gone = images.where(30)
    Path(gone).unlink()
    with pytest.raises(DamagedImageError, match=f'{gone}: not a readable image: no such file'):
        cache_features(parts.model, images, parts.transform, tmp_path / 'cache', 8, 0)
    assert {path.suffix for path in (tmp_path / 'cache').iterdir()} <= {'.lock'}


@pytest.mark.process
def test_killed_while_it_computes(parts, photos, tmp_path):
    code = (
        'import time, timm, noah_zoo; from pathlib import Path; from noah_zoo.data import create_dataset; '
        'from noah_zoo.training.features import cache_features; '
        'from timm.data import create_transform, resolve_data_config; '
        f'm = timm.create_model({DEFAULT_MODEL!r}, pretrained=True, num_classes=3).eval(); '
        't = create_transform(**resolve_data_config(dict(img_size=32), model=m)); f = m.forward_features; '
        'm.forward_features = lambda x: (time.sleep(0.5), f(x))[1]; '
        f'cache_features(m, create_dataset("folder", {str(photos)!r}, "train"), t, Path({str(tmp_path)!r}), 4, 0)')
    process = subprocess.Popen([sys.executable, '-c', code])
    for _ in range(600):
        if list(tmp_path.glob('*.partial')):
            break
        time.sleep(0.1)
    time.sleep(0.7)
    process.kill()
    process.wait()
    assert list(tmp_path.glob('*.partial')) and not list(tmp_path.glob('*.bin'))
    found = cached(parts, tmp_path)
    assert isinstance(found, CachedFeatures) and not list(tmp_path.glob('*.partial'))


def test_a_run_has_the_same_accuracy_with_and_without(idx_dir, tmp_path):
    curves = []
    for cache in (None, str(tmp_path / 'cache')):
        output = tmp_path / f'run {cache is None}'
        config = configure(
            DEFAULT_MODEL, str(output), 'none', data_dir=str(idx_dir), pretrained=True, freeze=True, no_aug=True,
            cache_features=cache, img_size=64, epochs=4, batch_size=8, workers=0, cpu=True, lr=1e-3)
        summary = train(config)
        curves.append([json.loads(line) for line in (output / 'log.jsonl').read_text().splitlines()])
        assert (output / 'best' / 'model.safetensors').exists() and summary['config']['freeze']
    for without, with_cache in zip(*curves, strict=True):
        assert with_cache['train_loss'] == pytest.approx(without['train_loss'], rel=0.02, abs=2e-3)
        assert abs(with_cache['top1'] - without['top1']) < 0.1
    assert len(list((tmp_path / 'cache').glob('*.bin'))) == 2
    model = timm.create_model(f'local-dir:{output / "best"}', pretrained=True)
    assert model.num_classes == 10


def test_goes_on_after_a_stop(idx_dir, tmp_path):
    shared = dict(
        data_dir=str(idx_dir), pretrained=True, cache_features=str(tmp_path / 'cache'), img_size=32, epochs=3,
        batch_size=8, workers=0, cpu=True, lr=1e-3)
    whole = train(configure(DEFAULT_MODEL, str(tmp_path / 'a'), 'none', **shared))
    train(configure(DEFAULT_MODEL, str(tmp_path / 'b'), 'none', **shared))
    Path(tmp_path / 'b' / 'summary.json').unlink()
    for checkpoint in sorted((tmp_path / 'b' / 'checkpoints').iterdir())[1:]:
        for file in checkpoint.rglob('*'):
            file.unlink() if file.is_file() else None
        checkpoint.rmdir()
    again = train(configure(DEFAULT_MODEL, str(tmp_path / 'b'), 'none', resume='auto', **shared))
    assert (again['train_loss'], again['top1']) == (whole['train_loss'], whole['top1'])


def test_a_run_goes_on_with_its_own_backbone(idx_dir, tmp_path):
    source, output = tmp_path / 'source', tmp_path / 'run'
    shared = dict(
        data_dir=str(idx_dir), cache_features=str(tmp_path / 'cache'), img_size=32, batch_size=8, workers=0, cpu=True,
        lr=1e-3, model_kwargs=dict(backbone='test_resnet', pretrained_backbone=f'local-dir:{source}'))
    for seed, settings in ((0, dict(epochs=1)), (1, dict(epochs=2, resume='auto'))):  # trained again under one name
        torch.manual_seed(seed)
        save_for_hf(timm.create_model('test_resnet', num_classes=4), str(source), safe_serialization=True)
        summary = train(configure('noah', str(output), 'none', **settings, **shared))
    assert len(list((tmp_path / 'cache').glob('*.bin'))) == 2
    model = timm.create_model(f'local-dir:{output / "best"}', pretrained=True).eval()
    images = create_dataset('fashion_mnist', str(idx_dir), 'validation')
    right = sum(
        model(eval_transform(model)(image).unsqueeze(0)).argmax().item() == target for image, target in images)
    assert 100 * right / len(images) == pytest.approx(summary['top1'], abs=100 / len(images))  # features are bfloat16


def test_a_branch_without_features_leaves_nothing(idx_dir, tmp_path):
    shared = dict(
        data_dir=str(idx_dir), pretrained=True, img_size=32, epochs=1, batch_size=8, workers=0, cpu=True, lr=1e-3)
    train(configure(DEFAULT_MODEL, str(tmp_path / 'run'), 'none', cache_features=str(tmp_path / 'cache'), **shared))
    checkpoint, = (tmp_path / 'run' / 'checkpoints').iterdir()
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='file'):
        train(configure(DEFAULT_MODEL, str(tmp_path / 'branch'), 'none', cache_features=str(tmp_path / 'file'),
                        resume=str(checkpoint), **{**shared, 'epochs': 2}))
    assert not (tmp_path / 'branch').exists()


@pytest.mark.slow
def test_thousands_of_images_a_second():
    images, threads = 2048, torch.get_num_threads()
    maps = torch.randn(images, 7, 7, 512).to(torch.bfloat16).permute(0, 3, 1, 2)
    labels = torch.randint(10, (images,)).numpy()
    cached = CachedFeatures(maps, SimpleNamespace(targets=lambda: torch.from_numpy(labels)))
    model = timm.create_model('resnet18_noah', num_classes=10).eval().requires_grad_(False)
    head = model.get_classifier().train().requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), 1e-3)
    torch.set_num_threads(2)
    try:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            for x, targets in FeatureBatches(cached, EpochBatchSampler(images, 256, 1, 0, seed=0)):
                torch.nn.functional.cross_entropy(HeadOnly(model)(x), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert images / min(seconds) > 2000


def test_what_does_not_go_with_it(idx_dir, tmp_path):
    with pytest.raises(ValueError, match='mixup and cutmix do not go with cache_features'):
        train(configure(DEFAULT_MODEL, str(tmp_path), 'none', data_dir=str(idx_dir), cache_features=str(tmp_path / 'c'),
                        mixup=0.2, cpu=True, workers=0, batch_size=8, img_size=32))
