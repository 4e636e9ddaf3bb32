"""What images go through."""
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from noah_zoo.data.loader import EpochBatchSampler, create_loader, on_device, seed_everything
from noah_zoo.data.transforms import TRAIN_CROPS, create_erasing, create_transforms
from noah_zoo.training import TrainConfig


def test_crops():
    config = TrainConfig(model='', output='', train_crop='squash', hflip=0)
    data_config = dict(
        input_size=(3, 32, 32), interpolation='bilinear', mean=(0.,) * 3, std=(1.,) * 3, crop_pct=1.,
        crop_mode='squash')
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, :8] = 255  # a white edge on the left
    image = Image.fromarray(image)
    for transform in create_transforms(config, data_config):
        x = transform(image)
        assert x.shape == (3, 32, 32) and x.dtype == torch.uint8
        assert x[:, :, 0].min() > 0.9 * 255 and x[:, :, 4:].max() < 0.1 * 255
    config.train_crop, data_config['crop_mode'], data_config['crop_pct'] = 'random', 'center', 0.5
    train_transform, val_transform = create_transforms(config, data_config)
    torch.manual_seed(0)
    white = [train_transform(image)[0, 0].float().mean().item() / 255 for _ in range(60)]
    assert max(white) > 0.1 and min(white) == 0  # crops of 32 x 32 of 64 x 128, some at the edge
    assert val_transform(image).max() == 0
    config.train_crop = 'whole'
    with pytest.raises(ValueError, match="train_crop='whole' is not one of rrc, random, squash"):
        create_transforms(config, data_config)
    config.no_aug = config.train_crop = 'rrc'
    same = create_transforms(config, data_config)
    assert same[0] is same[1]


@pytest.mark.parametrize('mode, mean, std', [
    ('RGB', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ('RGB', (0.5,), (0.5,)), ('L', (0.1307,), (0.3081,))])
@pytest.mark.parametrize('crop', TRAIN_CROPS)
def test_images_are_normalised_on_the_device_as_in_a_worker(crop, mode, mean, std):
    rng = np.random.default_rng(0)
    images = [
        (Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)).convert(mode), i % 3) for i in range(12)]
    data_config = dict(
        input_size=(len(mean), 32, 32), interpolation='bicubic', mean=mean, std=std, crop_pct=0.875,
        crop_mode='center')
    workers = 2 if mode == 'L' and crop == 'rrc' else 0
    for transform in create_transforms(TrainConfig(model='', output='', train_crop=crop), data_config):
        whole = transforms.Compose([
            *transform.transforms[:-1], transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), std)])
        small, expected = (
            create_loader(images, each, EpochBatchSampler(12, 4, 1, 0, seed=1), workers, 4, 7)
            for each in (transform, whole))
        batches = list(on_device(small, data_config, torch.device('cpu')))
        assert len(batches) == 3
        for (raw, _), (x, labels), (wanted, of_wanted) in zip(small, batches, expected, strict=True):
            assert raw.dtype == torch.uint8 and raw.shape == x.shape and torch.equal(labels, of_wanted)
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-6)


def test_erasing():
    device, config = torch.device('cpu'), TrainConfig(model='', output='', reprob=1.)
    before = torch.randn(8, 3, 32, 32)
    x = create_erasing(config, device)(before.clone())
    share = (x != before).all(dim=1).float().mean(dim=(1, 2))
    assert share.min() > 0.01 and share.max() < 0.4 and torch.equal((x != before).all(dim=1), (x != before).any(dim=1))
    for without in (dict(reprob=0.), dict(no_aug=True), dict(cache_features='c')):
        assert create_erasing(TrainConfig(model='', output='', **{'reprob': 1., **without}), device) is None


@pytest.mark.parametrize('mode, channels', [('L', 1), ('RGBA', 4)])
def test_augmentation_of_other_channels(mode, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 4)).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    data_config = dict(
        input_size=(channels, 32, 32), interpolation='bilinear', mean=(0.5,), std=(0.5,), crop_pct=1.,
        crop_mode='center')
    policies = [None] if channels == 4 else ['rand-m9-mstd0.5-inc1', 'augmix-m5-w4', 'original', 'v0']
    for aa in policies:
        config = TrainConfig(model='', output='', aa=aa, color_jitter=0.4, reprob=1., train_interpolation='random')
        train_transform, val_transform = create_transforms(config, data_config)
        assert val_transform(image).shape == (channels, 32, 32)
        seed_everything(0)
        seen = {train_transform(image).numpy().tobytes() for _ in range(40)}  # every change of a policy, more or less
        assert len(seen) > 30  # some end in black
    x = torch.randn(2, channels, 32, 32)
    assert (create_erasing(config, torch.device('cpu'))(x.clone()) != x).any(dim=(2, 3)).all()
    if channels == 4:
        config.aa = 'rand-m9'
        with pytest.raises(ValueError, match="aa='rand-m9' does not go with images of 4 channels .RGBA.*--aa none"):
            create_transforms(config, data_config)
