"""Floor 4: the training loop, on Accelerate, timm.optim and timm.scheduler."""
import json
import logging
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import accelerate
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from timm.data import create_loader, resolve_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .data import create_dataset

_logger = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """One run. Names and meanings are those of timm's train.py; `batch_size` is per process."""
    model: str
    output: str
    dataset: str = 'fashion_mnist'
    data_dir: Optional[str] = None
    train_split: str = 'train'
    val_split: str = 'validation'
    model_kwargs: Dict[str, Any] = field(default_factory=dict)
    img_size: Optional[int] = None
    crop_pct: Optional[float] = None
    scale: Tuple[float, float] = (0.08, 1.0)
    ratio: Tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    epochs: int = 100
    batch_size: int = 128
    opt: str = 'sgd'
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    sched: str = 'cosine'
    warmup_epochs: int = 0
    warmup_lr: float = 0.
    min_lr: float = 0.
    smoothing: float = 0.
    seed: int = 0
    workers: int = 2
    channels_last: bool = False
    torchcompile: bool = False
    cpu: bool = False


def train(config: TrainConfig) -> Dict[str, Any]:
    """Train a model and leave it, in timm's Hub layout, with its log under `config.output`.

    Written there: `model.safetensors` and `config.json` (`timm.create_model('local-dir:OUTPUT', pretrained=True)`),
    `log.jsonl` with a line per epoch, and `summary.json` with the settings, versions and the last epoch's figures.

    Returns:
        The summary.

    Raises:
        FileExistsError: If `config.output` has a finished run already.
        FileNotFoundError: If the data are not there.
        FloatingPointError: If the loss is not finite.
        ValueError: If timm does not know the model, or the training set does not fill a batch.
    """
    output = Path(config.output)
    if (output / 'summary.json').exists():
        raise FileExistsError(f'{output} has a finished run; name another --output')
    accelerator = Accelerator(cpu=config.cpu)
    set_seed(config.seed)
    train_set = create_dataset(config.dataset, config.data_dir, config.train_split)
    val_set = create_dataset(config.dataset, config.data_dir, config.val_split)
    model = _create_model(config, train_set.class_names)
    train_loader, val_loader = _create_loaders(config, resolve_data_config({}, model=model), train_set, val_set)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum)
    # Accelerate steps no scheduler here: timm's is stepped by hand, once per update.
    trained, optimizer, train_loader, val_loader = accelerator.prepare(
        torch.compile(model) if config.torchcompile else model, optimizer, train_loader, val_loader)
    if not len(train_loader):
        raise ValueError(
            f'the training set has {len(train_set)} images, fewer than a batch of {config.batch_size} for each of '
            f'{accelerator.num_processes} processes')
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr, min_lr=config.min_lr, step_on_epochs=False, updates_per_epoch=len(train_loader))
    criterion = nn.CrossEntropyLoss(label_smoothing=config.smoothing)

    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / 'log.jsonl').unlink(missing_ok=True)
    started, updates, record = time.time(), 0, {}
    scheduler.step_update(0)
    for epoch in range(config.epochs):
        trained.train()
        total_loss, epoch_started = 0., time.time()
        progress = tqdm(train_loader, desc=f'epoch {epoch + 1}/{config.epochs}', unit='batch', leave=False)
        for images, targets in progress:
            with accelerator.autocast():
                loss = criterion(trained(images.to(memory_format=memory_format)), targets)
            if not torch.isfinite(loss):
                raise FloatingPointError(f'the loss is {loss.item()} in update {updates} (epoch {epoch + 1})')
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            scheduler.step_update(updates)
            total_loss += loss.item()
            progress.set_postfix(loss=f'{loss.item():.3f}', lr=f'{optimizer.param_groups[0]["lr"]:.4f}')
        train_seconds = time.time() - epoch_started
        record = {
            'epoch': epoch + 1, 'train_loss': total_loss / len(train_loader),
            **evaluate(accelerator, model, val_loader),
            'train_seconds': round(train_seconds, 1), 'seconds': round(time.time() - started, 1)}
        if accelerator.is_main_process:
            with (output / 'log.jsonl').open('a') as log:
                log.write(json.dumps(record) + '\n')
            _logger.info(
                'epoch %d: train loss %.4f, top-1 %.2f, %.0f s', epoch + 1, record['train_loss'], record['top1'],
                record['seconds'])
    settings = {k: v for k, v in asdict(config).items() if k != 'output'}
    summary = {'config': settings, 'params': sum(p.numel() for p in model.parameters()), **record, **versions()}
    if accelerator.is_main_process:
        model.to(memory_format=torch.contiguous_format)
        head = getattr(model, 'noah_cfg', {})
        head = {name: head[name] for name in ('num_groups', 'key_ratio') if name in head}
        save_for_hf(
            model, str(output), safe_serialization=True, model_args={**head, **config.model_kwargs},
            model_config=dict(label_names=list(train_set.class_names)))
        (output / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    return summary


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> Dict[str, float]:
    """Top-1 accuracy in percent and mean cross-entropy over a prepared loader, each sample counted once."""
    model.eval()
    correct, loss, count = 0, 0., 0
    for images, targets in loader:
        with accelerator.autocast():
            logits = model(images)
        logits, targets = accelerator.gather_for_metrics((logits.float(), targets))
        correct += (logits.argmax(dim=1) == targets).sum().item()
        loss += nn.functional.cross_entropy(logits, targets, reduction='sum').item()
        count += len(targets)
    return {'top1': round(100 * correct / count, 4), 'val_loss': loss / count}


def versions() -> Dict[str, str]:
    """What a figure depends on: Python, torch, timm, accelerate, the processor and its threads."""
    return {
        'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
        'accelerate': accelerate.__version__, 'machine': platform.machine(), 'threads': torch.get_num_threads()}


def _create_model(config: TrainConfig, class_names: Tuple[str, ...]) -> nn.Module:
    """The model, its pretrained cfg that of this run: timm reads preprocessing from there and saves it."""
    cfg = timm.get_pretrained_cfg(config.model)
    if cfg is None:
        raise ValueError(f'timm knows no model {config.model!r}')
    overlay = dict(num_classes=len(class_names), tag=None, license=None, origin_url=None)
    if config.img_size:
        overlay.update(input_size=(3, config.img_size, config.img_size), pool_size=None)
    if config.crop_pct:
        overlay.update(crop_pct=config.crop_pct)
    return timm.create_model(config.model, pretrained_cfg_overlay=overlay, **config.model_kwargs)


def _create_loaders(
        config: TrainConfig, data_config: Dict[str, Any], train_set: Dataset, val_set: Dataset,
) -> Tuple[DataLoader, DataLoader]:
    shared = dict(
        input_size=data_config['input_size'], interpolation=data_config['interpolation'], mean=data_config['mean'],
        std=data_config['std'], batch_size=config.batch_size, num_workers=config.workers, use_prefetcher=False,
        persistent_workers=config.workers > 0)
    train_loader = create_loader(
        train_set, is_training=True, scale=config.scale, ratio=config.ratio, hflip=config.hflip, color_jitter=0.,
        **shared)
    return train_loader, create_loader(val_set, crop_pct=data_config['crop_pct'], **shared)


