"""From a model's name, a recipe and what the user gave to the settings of a run and its batches."""
import logging
from dataclasses import asdict
from typing import Any, Dict, NamedTuple

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType

from ..config import TrainConfig
from ..data.images import mode_of
from ..data.transforms import check_crop
from ..inference.predict import check_model
from ..recipes import RECIPES, learning_rate, recipe_of
from ..tasks import find_task
from .run_folder import epoch_updates_of

__all__ = ['BatchPlan', 'check_settings', 'configure', 'learning_rate', 'plan_batch']
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'constant', 'wsd', 'rsqrt', 'onecycle')
_logger = logging.getLogger(__name__)


def configure(model: str, output: str, recipe: str = 'auto', **overrides: Any) -> TrainConfig:
    """The settings of a run.

    Args:
        model: A timm name.
        output: Folder of the run.
        recipe: 'auto' is the recipe of the model's family, of NOAH models and vanilla twins alike, if the catalog has
            the model; a name of `noah_zoo.recipes.RECIPES`; or 'none', the defaults of `TrainConfig`.
        **overrides: Other fields of `TrainConfig`, which come before the recipe; None and False switch off.
            `model_kwargs` come before the recipe's key by key. `lr_base` and `lr_base_size` also displace its `lr`,
            and `epochs` its `epoch_updates`, but for a run that is to `resume`, which keeps its own.

    Raises:
        TypeError: If `TrainConfig` has no such field.
        ValueError: If there is no such recipe.
    """
    if recipe not in ('auto', 'none', *RECIPES):
        raise ValueError(f"recipe {recipe!r} is unknown; choose from auto, none, {', '.join(RECIPES)}")
    name = recipe_of(model) if recipe == 'auto' else recipe
    settings = asdict(RECIPES[name]) if name in RECIPES else {}
    if recipe == 'auto' and name is None:
        _logger.info('%s has no recipe; the defaults of TrainConfig are taken', model)
    elif settings:
        _logger.info('recipe of %s: %s', model, name)
    if 'lr' not in overrides and {'lr_base', 'lr_base_size'} & set(overrides):
        settings.pop('lr', None)
    if 'epochs' in overrides and 'epoch_updates' not in overrides:
        kept = epoch_updates_of(output) if overrides.get('resume') else None
        if kept is not None:
            settings['epoch_updates'] = kept
        elif settings.pop('epoch_updates', 0):
            _logger.info(
                'epochs=%s: each is one pass over the images; --epoch-updates gives it more', overrides['epochs'])
    if overrides.get('model_kwargs'):
        overrides = overrides | dict(model_kwargs={**settings.get('model_kwargs', {}), **overrides['model_kwargs']})
    elif 'model_kwargs' in overrides:
        overrides = overrides | dict(model_kwargs={})
    settings.update((k, tuple(v) if isinstance(v, list) else v) for k, v in overrides.items())
    return TrainConfig(model=model, output=output, **settings)


def tracked(config: TrainConfig) -> Dict[str, Any]:
    """The settings for a tracker: numbers, booleans and text, of which tensorboard takes no other."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in asdict(config).items()}


def check_tracker(name: str) -> None:
    """Raise ValueError if Accelerate has no tracker of this name, ImportError if its package is not installed."""
    known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
    if name not in known:
        raise ValueError(f'log_with={name!r} is not one of {", ".join(known)}')
    if name not in map(str, get_available_trackers()):
        raise ImportError(f'log_with={name!r}: the package is not installed; pip install {name}')


def check_settings(config: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError if settings contradict each other, the task or the machine; no data have been read yet."""
    check_model(config.model)
    find_task(config.task).check(config)
    mode_of(config.model_kwargs.get('in_chans', 3))
    kind = accelerator.distributed_type
    check_crop(config)
    for name in ('epoch_updates', 'workers'):
        if getattr(config, name) < 0:
            raise ValueError(f'{name}={getattr(config, name)}; expected 0 or more')
    if config.sched not in SCHEDULES:
        raise ValueError(f'sched={config.sched!r} is not one of {", ".join(SCHEDULES)}')
    if config.cache_features and (config.mixup or config.cutmix):
        raise ValueError(
            'mixup and cutmix do not go with cache_features, which has no images to mix; give --mixup 0 --cutmix 0')
    if config.cache_features and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f'cache_features does not go with {kind.value}')
    if config.model_ema_decay and kind not in (
            DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(f'model_ema_decay does not go with {kind.value}')
    if config.sync_bn and accelerator.device.type == 'cpu':
        raise ValueError('sync_bn needs a GPU: PyTorch has no synchronised batch statistics on the CPU')
    if kind == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError('DeepSpeed with ZeRO stage 3 is not supported; accepted are stages 0 to 2, and FSDP')
        if config.skip_nonfinite:
            raise ValueError('skip_nonfinite does not go with DeepSpeed, which steps before the loss is looked at')
        if config.freeze_epochs:
            raise ValueError('freeze_epochs does not go with DeepSpeed, which steps in its backward pass')


class BatchPlan(NamedTuple):
    """How the images of an update are spread: `total` is `per_device` x `accumulation` x `processes`."""
    per_device: int
    accumulation: int
    processes: int
    total: int

    def __str__(self) -> str:
        return f'{self.total} = {self.per_device} x {self.accumulation} accumulated x {self.processes} processes'


def plan_batch(config: TrainConfig, processes: int) -> BatchPlan:
    """Spread `config.batch_size` exactly, in the largest batches that `config.device_batch_size` allows.

    Mixup and CutMix mix the images of a batch in pairs, so these batches are even.

    Raises:
        ValueError: If a size is below 1, or there is no such batch.
    """
    for name in ('batch_size', 'device_batch_size'):
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ValueError(f'{name}={size}; expected 1 or more')
    even = 2 if config.mixup or config.cutmix else 1
    times, rest = divmod(config.batch_size, processes * even)
    if rest:
        nearest = [str(n * processes * even) for n in (times, times + 1) if n]
        raise ValueError(
            f'batch_size={config.batch_size} is for all processes together and does not divide by {processes} processes'
            f'{" x 2, as mixup and CutMix need" * (even - 1)}; the nearest that do: {" and ".join(nearest)}')
    share = config.batch_size // processes
    limit = min(config.device_batch_size or share, share)
    if limit < even:
        raise ValueError(f'device_batch_size={limit}; mixup and CutMix need 2 or more')
    per_device = next(size for size in range(limit - limit % even, 0, -even) if share % size == 0)
    return BatchPlan(per_device, share // per_device, processes, config.batch_size)
