"""What images go through."""
import numpy as np
import pytest
import torch
from PIL import Image

from noah_zoo.data.transforms import create_transforms
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
        assert x.shape == (3, 32, 32) and x[:, :, 0].min() > 0.9 and x[:, :, 4:].max() < 0.1
    config.train_crop, data_config['crop_mode'], data_config['crop_pct'] = 'random', 'center', 0.5
    train_transform, val_transform = create_transforms(config, data_config)
    torch.manual_seed(0)
    white = [train_transform(image)[0, 0].mean().item() for _ in range(60)]
    assert max(white) > 0.1 and min(white) == 0  # crops of 32 x 32 of 64 x 128, some at the edge
    assert val_transform(image).max() == 0
    config.train_crop = 'whole'
    with pytest.raises(ValueError, match="train_crop='whole' is not one of rrc, random, squash"):
        create_transforms(config, data_config)
    config.no_aug = config.train_crop = 'rrc'
    same = create_transforms(config, data_config)
    assert same[0] is same[1]
