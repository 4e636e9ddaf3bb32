"""What a run is made of, each by a function of its settings: model, optimizer, scheduler, averaged weights."""
import logging
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from ..config import TrainConfig
from ..data.base import class_changes
from ..data.images import mode_of
from ..inference.predict import check_model
from ..models.attach import VALUE_RANGE, data_config_of, heads_of, is_convolutional, set_image_size
from ..models.builder import args_of
from ..tasks import TASKS, find_task
from .schedule import OneCycle

_logger = logging.getLogger(__name__)


def build_model(config: TrainConfig, class_names: Tuple[str, ...]) -> nn.Module:
    """The model, its pretrained cfg that of this run: timm reads preprocessing from there and saves it.

    Raises:
        ValueError: If timm does not know the model, it does not take the arguments or the image size, or it takes
            images of other channels than there are.
    """
    check_model(config.model)
    overlay: Dict[str, Any] = {}
    if config.img_size:
        saved = resolve_model_input_args(config.model)['pretrained_cfg'] if ':' in config.model else {}
        channels, *_ = saved.get('input_size', (3,))  # of the weights
        overlay.update(input_size=(channels, config.img_size, config.img_size), pool_size=None)
    overlay.update({
        name: getattr(config, name) for name in ('crop_pct', 'crop_mode', 'interpolation') if getattr(config, name)})
    if not config.pretrained:
        overlay.update(num_classes=len(class_names), tag=None, license=None, origin_url=None)
    _check_classes(config, class_names)
    try:
        model = timm.create_model(
            config.model, pretrained=config.pretrained, num_classes=len(class_names), pretrained_cfg_overlay=overlay,
            **model_kwargs(config))
    except TypeError as error:
        raise ValueError(f'{config.model} does not take these arguments: {error}') from None
    if config.img_size:
        set_image_size(model, config.img_size)  # a saved model is built at the size that was saved with it
    data_config, (channels, *size) = data_config_of(model), model.pretrained_cfg['input_size']
    mode_of(data_config['input_size'][0])
    if data_config['input_size'][0] != channels:  # the weights were for others, and so were mean and std
        model.pretrained_cfg.update(
            input_size=(data_config['input_size'][0], *size), mean=data_config['mean'], std=data_config['std'])
    others = {note for task in TASKS.values() for note in task.notes}  # of what the weights may have been trained for
    before = tuple(model.pretrained_cfg.get('notes') or ())
    notes = (*(note for note in before if note not in others), *find_task(config.task).notes)
    if config.value_range:
        low, high = config.value_range
        notes = (*(note for note in notes if not note.startswith(f'{VALUE_RANGE} ')), f'{VALUE_RANGE} {low:g} {high:g}')
    if notes != before:
        model.pretrained_cfg.update(notes=notes)
    classifier = model.get_classifier()
    is_new = config.pretrained and model.num_classes != model.pretrained_cfg['num_classes']
    trained_for = model.pretrained_cfg.get('label_names') or class_names
    if config.pretrained and not is_new and not config.keep_head and class_changes(trained_for, class_names):
        _logger.warning(
            '%s was trained for other classes (now %s), so it begins with a new head; --keep-head keeps its own',
            config.model, class_changes(trained_for, class_names))
        model.reset_classifier(len(class_names))
        classifier, is_new = model.get_classifier(), True
    # Some families of timm start it by its fan-out, EfficientNet 11 times as large for 10 classes as PyTorch would; few
    # images do not unlearn that.
    if is_new and type(classifier) in (nn.Linear, nn.Conv2d) and (
            classifier.weight.std() > 2 * (3 * classifier.weight[0].numel()) ** -0.5):
        classifier.reset_parameters()
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.freeze:
        model.requires_grad_(False)
        heads_of(model).requires_grad_(True)
    return model


def _check_classes(config: TrainConfig, class_names: List[str]) -> None:
    """Raise ValueError if the head is to start from a classifier that says to be of other classes."""
    source = config.model_kwargs.get('pretrained_backbone')
    if config.model_kwargs.get('init') != 'classifier':
        return
    trained_for = args_of(source).get('pretrained_cfg', {}).get('label_names')
    if trained_for and class_changes(trained_for, class_names):
        raise ValueError(
            f"init='classifier': the classifier of {source} is of other classes, now "
            f'{class_changes(trained_for, class_names)}; without init= the head starts anew')


def model_kwargs(config: TrainConfig) -> Dict[str, Any]:
    """Arguments of the model."""
    args = {'drop_path_rate': config.drop_path, 'noah_variant': config.noah_variant, **config.model_kwargs}
    return {name: value for name, value in args.items() if value is not None}  # timm leaves them out, too


def memory_format_of(model: nn.Module, config: TrainConfig) -> torch.memory_format:
    """The memory format of a run: channels-last for convolutions, unless the settings say otherwise."""
    if config.cache_features:  # they are in the order that the head reads
        return torch.preserve_format
    channels_last = is_convolutional(model) if config.channels_last is None else config.channels_last
    return torch.channels_last if channels_last else torch.contiguous_format


def frozen_norms_of(model: nn.Module, config: TrainConfig) -> List[nn.Module]:
    """Batch norms that keep their statistics: with `freeze_bn`, those that have some."""
    return [
        module for module in model.modules()
        if config.freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None and module.running_mean.any()]


def param_groups(model: nn.Module, config: TrainConfig) -> List[Dict[str, Any]]:
    """timm's groups, with the layer decay, and those of the head with a factor of their own."""
    shared = dict(
        weight_decay=config.weight_decay, weight_decay_exclude_1d=not config.decay_norms,
        no_weight_decay_list=model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ())
    if config.layer_decay:
        groups = param_groups_layer_decay(model, layer_decay=config.layer_decay, **shared)
    else:
        groups = param_groups_weight_decay(model, **shared)
    head = {id(p) for p in heads_of(model).parameters()} if config.head_lr_factor != 1 else set()
    split = []
    for group in groups:
        for mine, factor in ((False, 1.), (True, config.head_lr_factor)):
            params = [p for p in group['params'] if (id(p) in head) is mine]
            if params:
                split.append({**group, 'params': params, 'lr_scale': group.get('lr_scale', 1.) * factor})
    return split


def build_optimizer(model: nn.Module, config: TrainConfig, lr: float) -> Optimizer:
    """timm's optimizer over `param_groups`; `lr` is what its scheduler starts from."""
    options: Dict[str, Any] = {} if config.opt_eps is None else dict(eps=config.opt_eps)
    if config.amsgrad:
        options.update(amsgrad=True)
    return create_optimizer_v2(
        model, opt=config.opt, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum,
        param_group_fn=lambda model: param_groups(model, config), **options)


def build_scheduler(optimizer: Optimizer, config: TrainConfig, updates: int) -> Any:
    """timm's scheduler, or `OneCycle`; `steps_on_updates` says when it is stepped.

    Args:
        optimizer: The optimizer.
        config: The settings.
        updates: Updates of an epoch.
    """
    if config.sched == 'onecycle':
        return OneCycle(optimizer, updates * config.epochs)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=config.epochs, decay_epochs=config.decay_epochs,
        decay_rate=config.decay_rate, decay_milestones=config.decay_milestones, warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr, min_lr=config.min_lr, step_on_epochs=not steps_on_updates(config),
        updates_per_epoch=updates)
    return scheduler


def steps_on_updates(config: TrainConfig) -> bool:
    """Whether the scheduler is stepped with every update, not with every epoch."""
    return config.sched_on_updates or config.sched == 'onecycle'


def build_ema(model: nn.Module, config: TrainConfig) -> Optional[ModelEmaV3]:
    """Averaged weights, if wanted."""
    return ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema_decay else None
