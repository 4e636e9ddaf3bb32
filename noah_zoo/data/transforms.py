"""What an image goes through in training and in evaluation, by timm.data."""
import math
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from ..config import TrainConfig

TRAIN_CROPS = ('rrc', 'random', 'squash')


def check_crop(config: TrainConfig) -> None:
    """Raise ValueError if `config.train_crop` is unknown."""
    if config.train_crop not in TRAIN_CROPS:
        raise ValueError(f'train_crop={config.train_crop!r} is not one of {", ".join(TRAIN_CROPS)}')


def create_transforms(config: TrainConfig, data_config: Dict[str, Any]) -> Tuple[Callable, Callable]:
    """The transforms of a run, from an image to uint8 (C, H, W): in training, and in evaluation. The loader
    normalises on the device.

    Args:
        config: The settings.
        data_config: The model's, as `data_config_of` gives it.

    Raises:
        ValueError: If `config.train_crop` is unknown, or `config.aa` does not go with the model's channels.
    """
    check_crop(config)
    channels = data_config['input_size'][0]
    val_transform = create_transform(**data_config, normalize=False)
    if config.no_aug or config.cache_features:
        return val_transform, val_transform
    if config.aa and channels == 4:
        raise ValueError(
            f'aa={config.aa!r} does not go with images of 4 channels (RGBA), which AutoAugment and RandAugment cannot '
            f'change; give --aa none')
    interpolation = config.train_interpolation or data_config['interpolation']
    train_transform = create_transform(
        is_training=True, interpolation=interpolation, scale=config.scale, ratio=config.ratio, hflip=config.hflip,
        color_jitter=config.color_jitter, auto_augment=config.aa, normalize=False,
        **{name: data_config[name] for name in ('input_size', 'mean', 'std')})
    size = data_config['input_size'][1:]
    mode = str_to_interp_mode('bilinear' if interpolation == 'random' else interpolation)
    if config.train_crop == 'squash':
        train_transform.transforms[0] = transforms.Resize(size, mode)
    elif config.train_crop == 'random':
        train_transform.transforms[0] = transforms.Compose([
            transforms.Resize(math.floor(min(size) / data_config['crop_pct']), mode),
            transforms.RandomCrop(size, pad_if_needed=True)])
    return train_transform, val_transform


def create_erasing(config: TrainConfig, device: torch.device) -> Optional[RandomErasing]:
    """Random erasing of normalised images (B, C, H, W) of a device, in place; None if the run has none."""
    if not config.reprob or config.no_aug or config.cache_features:
        return None
    return RandomErasing(config.reprob, mode='pixel', device=device)
