"""The training loop, on Accelerate and timm."""
import csv
import io
import json
import logging
import math
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import accelerate
import timm
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, tqdm
from timm.data import Mixup, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, IterableDataset

from ..config import TrainConfig
from ..data.factory import create_datasets
from ..data.loader import EpochBatches, EvalBatches, create_loader, seed_everything
from ..data.transforms import create_transforms
from ..inference.predict import check_model
from ..models.attach import set_image_size
from ..tasks import find_task
from .checkpoint import Progress, newest_checkpoint, save_checkpoint
from .curve import draw_curve
from .features import FeatureBatches, HeadOnly, cache_features
from .schedule import OneCycle
from .settings import learning_rate, plan_batch

_logger = logging.getLogger(__name__)

TERMINATED = 143  # exit code after SIGTERM: 128 + 15
PLACE = ('output', 'data_dir', 'resume', 'workers', 'log_with', 'checkpoint_hist', 'device_batch_size')


def train(config: TrainConfig) -> Dict[str, Any]:
    """Train a model. The order of the data and everything random depend on the seed and the step alone, so a run that
    was stopped anywhere, and goes on with `resume='auto'`, ends with the same weights.

    Written under `config.output`: `best/` in timm's Hub layout, the weights of the best epoch as they were evaluated;
    `checkpoints/`; `log.jsonl` with a line per epoch; `args.yaml`; for several classes per image `per_class.csv`, of
    the best epoch; at the end `summary.json` with settings, versions and figures, and `curve.png`.

    Returns:
        The summary.

    Raises:
        FileExistsError: If `config.output` has a run already, and `resume` does not say to go on with it.
        FileNotFoundError: If the data are not there.
        FloatingPointError: If the loss is not finite.
        OSError: If the disk is full; the checkpoints before are good.
        SystemExit: With 143, after a checkpoint, if the process is sent SIGTERM.
        ValueError: If timm does not know the model, or settings contradict each other or the run that goes on.
    """
    return _Run(config).train()


class _Run:
    """A run of `train`: what it is made of, and its loop."""

    def __init__(self, config: TrainConfig) -> None:
        self.task = find_task(config.task)
        self.task.check(config)
        if config.mixed_precision == 'auto':
            config = replace(config, mixed_precision=precision(PartialState(cpu=config.cpu).device))
        self.config, self.output = config, Path(config.output)
        self.finished = _check_output(config, self.output)
        if self.finished:
            return
        self.accelerator = Accelerator(
            cpu=config.cpu, mixed_precision=config.mixed_precision, log_with=config.log_with, project_dir=config.output)
        self.plan = plan_batch(config, self.accelerator.num_processes)
        seed_everything(config.seed)
        known = self.output / 'damaged.json'  # of a run that goes on: it has looked at every image
        train_set, val_set = create_datasets(
            config, json.loads(known.read_text()) if known.exists() else None, self.task.reads)
        self.class_names = train_set.class_names
        self.damaged = {**getattr(train_set, 'damaged', {}), **getattr(val_set, 'damaged', {})}
        model = build_model(config, self.class_names)
        self._make_loaders(train_set, val_set, resolve_data_config({}, model=model))
        self._make_model(model)
        self.mixup = Mixup(
            config.mixup, config.cutmix, switch_prob=config.mixup_switch_prob, label_smoothing=config.smoothing,
            num_classes=len(self.class_names)) if config.mixup or config.cutmix else None
        self.criterion = self.task.create_criterion(config, train_set).to(self.accelerator.device)
        if config.cache_features:
            if self.mixup:
                raise ValueError(
                    'mixup and cutmix do not go with cache_features, which has no images to mix; give --mixup 0 '
                    '--cutmix 0')
            self._cache_features(train_set, val_set)
        self.terminated = False

    def _make_loaders(self, train_set: Any, val_set: Any, data_config: Dict[str, Any]) -> None:
        config, plan, rank = self.config, self.plan, self.accelerator.process_index
        train_transform, self.val_transform = create_transforms(config, data_config)
        self.sampler, val_sampler = None, None
        if not isinstance(train_set, IterableDataset):
            self.sampler = EpochBatches(
                len(train_set), plan.per_device, plan.processes, rank, config.seed, config.aug_repeats,
                config.epoch_updates * plan.accumulation)
        if not isinstance(val_set, IterableDataset):
            val_sampler = EvalBatches(len(val_set), plan.per_device, plan.processes, rank)
        self.train_loader = create_loader(
            train_set, train_transform, self.sampler, config.workers, plan.per_device, config.seed, rank)
        self.val_loader = create_loader(val_set, self.val_transform, val_sampler, config.workers, plan.per_device)
        self.batches = len(self.sampler) if self.sampler else len(train_set) // plan.per_device
        if config.smoke:
            self.batches = min(self.batches, config.smoke * plan.accumulation)
        if not self.batches:
            raise ValueError(
                f'the training set has {len(train_set)} images, fewer than a batch of {plan.per_device} for each of '
                f'{plan.processes} processes')
        self.updates = -(-self.batches // plan.accumulation)  # in an epoch
        if self.sampler and self.sampler.passes > 1:
            _logger.info(
                'an epoch passes %d times over the %s training images: %d updates', self.sampler.passes,
                f'{len(train_set):,}', self.updates)

    def _make_model(self, model: nn.Module) -> None:
        config, accelerator = self.config, self.accelerator
        if config.sync_bn:
            if accelerator.device.type == 'cpu':
                raise ValueError('sync_bn needs a GPU: PyTorch has no synchronised batch statistics on the CPU')
            model = convert_sync_batchnorm(model)
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
        if config.freeze:
            model.requires_grad_(False)
            model.get_classifier().requires_grad_(True)
        if config.cache_features:  # they are in the order that the head reads
            self.memory_format = torch.preserve_format
        elif is_convolutional(model) if config.channels_last is None else config.channels_last:
            self.memory_format = torch.channels_last
        else:
            self.memory_format = torch.contiguous_format
        self.model = model.to(accelerator.device, memory_format=self.memory_format)
        # Found before a checkpoint is loaded: a norm that learns its statistics goes on doing so.
        self.frozen_norms = [
            module for module in self.model.modules()
            if config.freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.running_mean is not None and module.running_mean.any()]
        lr, reason = learning_rate(config)
        _logger.info('learning rate: %s; batch: %s', reason, self.plan)
        optimizer = create_optimizer_v2(
            self.model, opt=config.opt, lr=lr, weight_decay=config.weight_decay, momentum=config.momentum,
            param_group_fn=self._parameter_groups, **({} if config.opt_eps is None else dict(eps=config.opt_eps)),
            **(dict(amsgrad=True) if config.amsgrad else {}))
        sharded = accelerator.distributed_type == DistributedType.FSDP
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._configure_deepspeed()
        self.whole = deepcopy(self.model) if sharded else None
        # timm's scheduler is stepped by hand, so Accelerate is not told of it.
        if config.cache_features and (sharded or accelerator.distributed_type == DistributedType.DEEPSPEED):
            raise ValueError(f'cache_features does not go with {accelerator.distributed_type.value}')
        trained = HeadOnly(self.model) if config.cache_features else self.model
        self.trained, self.optimizer = accelerator.prepare(
            torch.compile(trained) if config.torchcompile else trained, optimizer)
        self.on_updates = config.sched_on_updates or config.sched == 'onecycle'
        if config.sched == 'onecycle':
            self.scheduler = OneCycle(optimizer, self.updates * config.epochs)
        else:
            self.scheduler, _ = create_scheduler_v2(
                optimizer, sched=config.sched, num_epochs=config.epochs, decay_epochs=config.decay_epochs,
                decay_rate=config.decay_rate, decay_milestones=config.decay_milestones,
                warmup_epochs=config.warmup_epochs, warmup_lr=config.warmup_lr,
                min_lr=config.min_lr, step_on_epochs=not self.on_updates, updates_per_epoch=self.updates)
        self.ema = None
        if config.model_ema_decay:
            kept = config.model_ema_decay ** (self.updates * config.epochs)
            if kept > 0.01 and accelerator.is_main_process:
                _logger.warning(
                    'model_ema_decay=%s is long for %d updates: at the end, the averaged weights are %.0f %% the '
                    'initial ones; --model-ema-decay none evaluates the plain weights',
                    config.model_ema_decay, self.updates * config.epochs, 100 * kept)
            if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU,
                                                    DistributedType.MULTI_GPU):
                raise ValueError(f'model_ema_decay does not go with {accelerator.distributed_type.value}')
            self.ema = ModelEmaV3(self.model, decay=config.model_ema_decay)
        self.progress = Progress()
        accelerator.register_for_checkpointing(*filter(None, (self.progress, self.scheduler, self.ema)))

    def _cache_features(self, train_set: Any, val_set: Any) -> None:
        """From here on, the loaders give features instead of images."""
        self.model.eval()
        self.train_loader, self.val_loader = (
            FeatureBatches(
                cache_features(
                    self.model, images, self.val_transform, Path(self.config.cache_features), self.plan.per_device,
                    self.config.workers),
                loader.batch_sampler)
            for images, loader in ((train_set, self.train_loader), (val_set, self.val_loader)))

    def _configure_deepspeed(self) -> None:
        """Tell DeepSpeed what it cannot learn from a data loader: it clips and steps inside of `backward`."""
        config, plugin = self.config, self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise ValueError('DeepSpeed with ZeRO stage 3 is not supported; accepted are stages 0 to 2, and FSDP')
        if config.skip_nonfinite:
            raise ValueError('skip_nonfinite does not go with DeepSpeed, which steps before the loss is looked at')
        if config.freeze_epochs:
            raise ValueError('freeze_epochs does not go with DeepSpeed, which steps in its backward pass')
        plugin.deepspeed_config.update(  # windows of accumulation are counted, and averaged over, in `_update`
            train_micro_batch_size_per_gpu=self.plan.per_device, gradient_accumulation_steps=1,
            train_batch_size=self.plan.per_device * self.plan.processes, gradient_clipping=config.clip_grad or 0.,
            zero_allow_untested_optimizer=True)

    def _parameter_groups(self, model: nn.Module) -> List[Dict[str, Any]]:
        """timm's groups, with the layer decay, and those of the head with a factor of their own."""
        config = self.config
        shared = dict(
            weight_decay=config.weight_decay, weight_decay_exclude_1d=not config.decay_norms,
            no_weight_decay_list=model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ())
        if config.layer_decay:
            groups = param_groups_layer_decay(model, layer_decay=config.layer_decay, **shared)
        else:
            groups = param_groups_weight_decay(model, **shared)
        head = {id(p) for p in model.get_classifier().parameters()} if config.head_lr_factor != 1 else set()
        split = []
        for group in groups:
            for mine, factor in ((False, 1.), (True, config.head_lr_factor)):
                params = [p for p in group['params'] if (id(p) in head) is mine]
                if params:
                    split.append({**group, 'params': params, 'lr_scale': group.get('lr_scale', 1.) * factor})
        return split

    def train(self) -> Dict[str, Any]:
        if self.finished:
            return self.finished
        accelerator, progress, config = self.accelerator, self.progress, self.config
        self._resume()
        accelerator.wait_for_everyone()  # a late process must look at `output` before anything is written there
        if accelerator.is_main_process:
            self._begin()
        if config.log_with:
            accelerator.init_trackers('noah_zoo')
        with self._sigterm():
            while progress.epoch < (min(config.epochs, 2) if config.smoke else config.epochs):
                self._epoch()
        summary = self._end()
        accelerator.end_training()
        return summary

    def _epoch(self) -> None:
        config, progress, accelerator = self.config, self.progress, self.accelerator
        began, done = time.perf_counter(), progress.seconds
        self._train_epoch(lambda: done + time.perf_counter() - began)
        evaluated = self._evaluated()
        if accelerator.num_processes > 1:
            distribute_bn(evaluated, accelerator.num_processes)  # the first process's, as DistributedDataParallel does
        train_seconds = time.perf_counter() - began
        metrics = self.task.create_metrics(len(self.class_names), accelerator.device)
        runs = HeadOnly(evaluated) if config.cache_features else evaluated
        figures = evaluate(accelerator, self.task.evaluated(runs), self.val_loader, metrics, config.smoke or None)
        progress.epoch += 1
        progress.seconds = done + time.perf_counter() - began
        record = {
            'epoch': progress.epoch, 'train_loss': progress.loss / max(progress.updates_in_epoch, 1),
            'lr': self.optimizer.param_groups[0]['lr'], **figures, 'train_seconds': round(train_seconds, 1),
            'seconds': round(progress.seconds, 1)}
        if not self.on_updates:
            self.scheduler.step(progress.epoch)
        if figures[self.task.metric] > progress.best:
            progress.best, progress.best_epoch = figures[self.task.metric], progress.epoch
            self._save_best(evaluated)
            rows = self.task.rows(metrics, self.class_names)
            if rows and accelerator.is_main_process:
                _write(self.output / 'per_class.csv', _to_csv(rows))
        if accelerator.is_main_process:
            with (self.output / 'log.jsonl').open('a', encoding='utf-8') as log:
                log.write(json.dumps(record) + '\n')
            _logger.info(
                'epoch %d: train loss %.4f, %s %.2f, %.0f s', record['epoch'], record['train_loss'],
                self.task.figures[self.task.metric], record[self.task.metric], record['seconds'])
        if config.log_with:
            accelerator.log({k: v for k, v in record.items() if k != 'epoch'}, step=progress.epoch)
        progress.batch = progress.updates_in_epoch = 0
        progress.loss = 0.
        self._save()

    def _evaluated(self) -> nn.Module:
        """The model to evaluate and to keep, with all of its weights on every process."""
        if self.whole is not None:
            options = StateDictOptions(full_state_dict=True)
            self.whole.load_state_dict(get_model_state_dict(self.trained, options=options))
            return self.whole
        return self.ema.module if self.ema else self.model

    def _train_epoch(self, elapsed: Callable[[], float]) -> None:
        """What is left of the epoch under way."""
        config, plan, progress = self.config, self.plan, self.progress
        self.trained.train()
        if config.freeze or progress.epoch < config.freeze_epochs:
            self.model.eval()
            self.model.get_classifier().train()
        for norm in self.frozen_norms:
            norm.eval()
        batches = iter(self._batches())
        size = plan.per_device * plan.processes
        bar = tqdm(
            total=self.batches * size, initial=progress.batch * size, unit='img', unit_scale=True, leave=False,
            desc=f'epoch {progress.epoch + 1}/{config.epochs}')
        with bar:
            while progress.batch < self.batches:
                window = min(plan.accumulation, self.batches - progress.batch)
                loss = self._update(batches, window)
                progress.batch += window
                bar.update(window * size)
                bar.set_postfix(loss=f'{loss:.3f}', lr=f'{self.optimizer.param_groups[0]["lr"]:.2e}', refresh=False)
                progress.seconds = elapsed()
                stop = self._stop_requested()
                if stop or config.checkpoint_steps and progress.update % config.checkpoint_steps == 0:
                    path = self._save()
                if stop:
                    _logger.info('SIGTERM: saved %s; go on with --resume auto', path)
                    self.accelerator.end_training()
                    raise SystemExit(TERMINATED)

    def _batches(self) -> DataLoader:
        """The loader, from where the epoch stands."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = self.progress.epoch, self.progress.batch
            return self.train_loader
        self.train_loader.dataset.epoch = self.progress.epoch
        batches = iter(self.train_loader)
        for _ in range(self.progress.batch):
            next(batches)
        return batches

    def _update(self, batches: Any, window: int) -> float:
        """One step of the optimizer over `window` batches; gives the mean loss over all processes."""
        config, accelerator, progress = self.config, self.accelerator, self.progress
        if self.on_updates:
            self.scheduler.step_update(progress.update)
        total = torch.zeros((), device=accelerator.device)
        before = [buffer.clone() for buffer in self.model.buffers()] if config.skip_nonfinite else []
        for micro in range(window):
            images, targets = next(batches)
            images = images.to(accelerator.device, non_blocking=True, memory_format=self.memory_format)
            targets = targets.to(accelerator.device, non_blocking=True)
            seed_everything(config.seed, 1, progress.epoch, progress.batch + micro, accelerator.process_index)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            accelerator.sync_gradients = last = micro == window - 1
            with nullcontext() if last else accelerator.no_sync(self.trained):
                with accelerator.autocast():
                    loss = self.criterion(self.trained(images), targets) / window
                accelerator.backward(loss)
            total += loss.detach()
        value = accelerator.reduce(total, 'mean').item()
        progress.update += 1
        if not math.isfinite(value):  # on any process
            progress.skipped += 1
            self.optimizer.zero_grad()
            if progress.skipped > config.skip_nonfinite:
                newest = newest_checkpoint(self.output / 'checkpoints')
                raise FloatingPointError(
                    f'the loss is {value} in update {progress.update} (epoch {progress.epoch + 1}); the last good '
                    f'checkpoint is {newest}. A lower learning rate may help, or --skip-nonfinite N')
            for buffer, kept in zip(self.model.buffers(), before):  # batch norm's statistics are not finite either
                buffer.copy_(kept)
            _logger.info('update %d: the loss is %s; left out', progress.update, value)
            return value
        if progress.epoch < config.freeze_epochs:  # frozen, yet in the graph, which DDP and compiled models hold on to
            head = set(self.model.get_classifier().parameters())
            for parameter in self.model.parameters():
                if parameter not in head:
                    parameter.grad = None
        if config.clip_grad:
            accelerator.clip_grad_norm_(self.trained.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        progress.loss += value
        progress.updates_in_epoch += 1
        return value

    def _save(self) -> Path:
        return save_checkpoint(
            self.accelerator, self.output / 'checkpoints', self.progress.update, self.config.checkpoint_hist)

    def _resume(self) -> None:
        config, folder = self.config, self.output / 'checkpoints'
        path = newest_checkpoint(folder) if config.resume == 'auto' else config.resume and Path(config.resume)
        if not path:
            self.scheduler.step_update(0) if self.on_updates else self.scheduler.step(0)
            return
        if not path.is_dir():
            raise FileNotFoundError(f'--resume {path}: no such folder; accepted are a checkpoint and auto')
        self.accelerator.load_state(str(path))
        best, old = self.output / 'best', self.output / '.best.old'
        if self.accelerator.is_main_process and old.exists() and not best.exists():
            os.replace(old, best)  # stopped between two renamings
        _logger.info('going on with %s: epoch %d, update %d', path, self.progress.epoch + 1, self.progress.update)

    def _begin(self) -> None:
        """Write down what the run is; drop what the log has of epochs that are done again."""
        self.output.mkdir(parents=True, exist_ok=True)
        _write(self.output / 'args.yaml', yaml.safe_dump(_plain(asdict(self.config)), sort_keys=False))
        if self.config.skip_damaged:
            _write(self.output / 'damaged.json', json.dumps(self.damaged, indent=2) + '\n')
        log = self.output / 'log.jsonl'
        if log.exists():
            lines = log.read_text(encoding='utf-8').splitlines(keepends=True)
            kept = [line for line in lines if line.endswith('\n') and json.loads(line)['epoch'] <= self.progress.epoch]
            _write(log, ''.join(kept))

    def _save_best(self, model: nn.Module) -> None:
        """Save the weights as they were evaluated, beside their place, and rename."""
        if not self.accelerator.is_main_process:
            return
        best, partial, old = self.output / 'best', self.output / '.best.partial', self.output / '.best.old'
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
        model = deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
        head = getattr(model, 'noah_cfg', {})
        head = {name: head[name] for name in ('num_groups', 'key_ratio') if name in head}
        model_args = {**head, **_model_kwargs(self.config)}
        for name in ('pretrained_backbone', 'init'):  # it has weights of its own now
            model_args.pop(name, None)
        save_for_hf(
            model, str(partial), safe_serialization=True, model_args=model_args,
            model_config=dict(label_names=list(self.class_names)))
        if best.exists():
            os.replace(best, old)
        os.replace(partial, best)
        shutil.rmtree(old, ignore_errors=True)

    def _end(self) -> Dict[str, Any]:
        progress, log = self.progress, self.output / 'log.jsonl'
        self.accelerator.wait_for_everyone()
        records = [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()]
        summary = {
            'config': {k: v for k, v in _plain(asdict(self.config)).items() if k not in ('output', 'resume')},
            'batch': self.plan._asdict(), 'params': sum(p.numel() for p in self.model.parameters()),
            **records[-1], 'best': records[progress.best_epoch - 1], 'skipped_updates': progress.skipped,
            'damaged': len(self.damaged), **versions()}
        if self.accelerator.is_main_process:
            draw_curve(log, self.output / 'curve.png', self.config.model, self.task.figures)
            _write(self.output / 'summary.json', json.dumps(summary, indent=2) + '\n')
        return summary

    @contextmanager
    def _sigterm(self) -> Iterator[None]:
        """A context in which SIGTERM is taken note of."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, 'terminated', True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _stop_requested(self) -> bool:
        """Whether any process was told to stop."""
        if self.accelerator.num_processes == 1:
            return self.terminated
        flag = torch.tensor(float(self.terminated), device=self.accelerator.device)
        return self.accelerator.reduce(flag, 'sum').item() > 0


@torch.inference_mode()
def evaluate(
        accelerator: Accelerator, model: nn.Module, loader: DataLoader, metrics: Any,
        max_batches: Optional[int] = None,
) -> Dict[str, float]:
    """The figures of a task's `Metrics` over the loaders of all processes; every image counts once if each loads its
    own."""
    model.eval()
    for i, (images, targets) in enumerate(loader):
        if i == max_batches:
            break
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        with accelerator.autocast():
            logits = model(images)
        metrics.update(logits.float(), targets)
    return metrics.compute()


def versions() -> Dict[str, Any]:
    """What a figure depends on: the code's revision, the packages, the processor and its threads."""
    git = subprocess.run(
        ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD'], capture_output=True, text=True, check=False)
    return {
        'revision': git.stdout.strip() or None, 'python': platform.python_version(), 'torch': torch.__version__,
        'timm': timm.__version__, 'accelerate': accelerate.__version__, 'machine': platform.machine(),
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
        'threads': torch.get_num_threads()}


def _check_output(config: TrainConfig, output: Path) -> Optional[Dict[str, Any]]:
    """The summary of a finished run that is to go on; None for a run to be made."""
    args, summary = output / 'args.yaml', output / 'summary.json'
    if not args.exists():
        return None
    if not config.resume:
        state = 'a finished' if summary.exists() else 'an unfinished'
        raise FileExistsError(f'{output} has {state} run; go on with it by --resume auto, or name another --output')
    defaults = _plain(asdict(TrainConfig(model=config.model, output=config.output)))  # of settings that came later
    before = {**defaults, **yaml.safe_load(args.read_text(encoding='utf-8'))}
    now = _plain(asdict(config))
    different = [f'{k} was {before[k]!r}, now {v!r}' for k, v in now.items() if before[k] != v and k not in PLACE]
    if different:
        raise ValueError(f'{output} cannot go on with other settings: {"; ".join(different)}')
    return json.loads(summary.read_text(encoding='utf-8')) if summary.exists() else None


def precision(device: torch.device) -> Optional[str]:
    """'bf16' on a GPU that has it, else None, which is that of `accelerate config`."""
    configured = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')  # 'no' where nothing was configured, too
    if configured != 'no' or device.type != 'cuda' or not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    _logger.info('mixed precision: bf16, which this GPU has; --mixed-precision no trains in float32')
    return 'bf16'


def is_convolutional(model: nn.Module) -> bool:
    """Whether most weights of a timm model, its head aside, are those of convolutions."""
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    head = {id(p) for classifier in classifiers for p in classifier.parameters()}
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    sizes = [(p.numel(), id(p) in convolutions) for p in model.parameters() if id(p) not in head]
    return 2 * sum(size for size, inside in sizes if inside) > sum(size for size, _ in sizes)


def _model_kwargs(config: TrainConfig) -> Dict[str, Any]:
    flags = dict(drop_path_rate=config.drop_path, noah_variant=config.noah_variant)
    return {**{name: value for name, value in flags.items() if value is not None}, **config.model_kwargs}


def build_model(config: TrainConfig, class_names: Tuple[str, ...]) -> nn.Module:
    """The model, its pretrained cfg that of this run: timm reads preprocessing from there and saves it.

    Raises:
        ValueError: If timm does not know the model, or it does not take the arguments or the image size.
    """
    check_model(config.model)
    overlay: Dict[str, Any] = {}
    if config.img_size:
        overlay.update(input_size=(3, config.img_size, config.img_size), pool_size=None)
    overlay.update({
        name: getattr(config, name) for name in ('crop_pct', 'crop_mode', 'interpolation') if getattr(config, name)})
    notes = find_task(config.task).notes
    if notes:
        overlay.update(notes=notes)
    if not config.pretrained:
        overlay.update(num_classes=len(class_names), tag=None, license=None, origin_url=None)
    try:
        model = timm.create_model(
            config.model, pretrained=config.pretrained, num_classes=len(class_names), pretrained_cfg_overlay=overlay,
            **_model_kwargs(config))
    except TypeError as error:
        raise ValueError(f'{config.model} does not take these arguments: {error}') from None
    if config.img_size:
        set_image_size(model, config.img_size)  # a saved model is built at the size that was saved with it
    classifier = model.get_classifier()
    is_new = config.pretrained and model.num_classes != model.pretrained_cfg['num_classes']
    # Some families of timm start it by its fan-out, EfficientNet 11 times as large for 10 classes as PyTorch would; few
    # images do not unlearn that.
    if is_new and type(classifier) in (nn.Linear, nn.Conv2d) and (
            classifier.weight.std() > 2 * (3 * classifier.weight[0].numel()) ** -0.5):
        classifier.reset_parameters()
    return model


def _to_csv(rows: Sequence[Dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(settings: Dict[str, Any]) -> Dict[str, Any]:
    return json.loads(json.dumps(settings))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f'.{path.name}.partial')
    partial.write_text(text, encoding='utf-8')
    os.replace(partial, path)
