"""The training loop, on Accelerate and timm."""
import logging
import math
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, tqdm
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..config import TrainConfig
from ..data.base import Images
from ..data.damage import sample_values
from ..data.factory import create_datasets
from ..data.loader import EpochBatchSampler, EvalBatchSampler, create_loader, on_device, seed_everything
from ..data.split import EARLIER, RECORD, check_overlap, read_split, source_runs, write_split
from ..data.streams import Stream
from ..data.transforms import create_erasing, create_transforms
from ..inference.predict import has_bf16, logits_of, read_for
from ..models.attach import data_config_of, eval_transform, heads_of
from ..tasks import find_task
from .builders import (
    build_ema,
    build_model,
    build_optimizer,
    build_scheduler,
    frozen_norms_of,
    memory_format_of,
    steps_on_updates,
)
from .checkpoint import PREFIX, Progress, all_finite, checkpoints, newest_checkpoint, save_checkpoint
from .curve import draw_curve
from .features import FeatureBatches, HeadOnly, cache_features
from .run_folder import RunFolder, data_dir_of, run_of, settings_of, versions
from .settings import check_settings, check_tracker, learning_rate, plan_batch, tracked

_logger = logging.getLogger(__name__)

TERMINATED = 143  # exit code after SIGTERM: 128 + 15
OF_SETTINGS = (  # of an optimizer's groups, given by settings and the schedule: all else is state
    'lr', 'initial_lr', 'lr_scale', 'weight_decay', 'momentum', 'betas', 'eps', 'max_lr', 'min_lr', 'max_momentum',
    'base_momentum')
READ_EVERY = 10  # batches, on an accelerator: to read a loss is to wait until the device has computed it


def train(config: TrainConfig) -> Dict[str, Any]:
    """Train a model. The order of the data and everything random depend on the seed and the step alone, so a run that
    was stopped anywhere, and goes on with `resume='auto'`, ends with the same weights.

    Written under `config.output`: `best/` in timm's Hub layout, the weights of the best epoch as they were evaluated;
    `checkpoints/`; `log.jsonl` with a line per epoch; `args.yaml`; `classes.json`; for several classes per image
    `per_class.csv`, of the best epoch; at the end `summary.json` with settings, versions and figures, and `curve.png`.

    Returns:
        The summary.

    Raises:
        BlockingIOError: If another process writes to `config.output`.
        FileExistsError: If `config.output` has a run already, and `resume` does not say to go on with it.
        FileNotFoundError: If the data are not there.
        FloatingPointError: If a loss, a weight or a state of the optimizer is not finite. Nothing is saved then.
        OSError: If the disk is full; the checkpoints before are good.
        SystemExit: With 143, after a checkpoint, if the process is sent SIGTERM.
        ValueError: If timm does not know the model, or settings contradict each other or the run that goes on.
    """
    config, folder = with_precision(config), RunFolder(config.output)
    with folder.locked(config):
        summary = folder.finished(config)
        if summary is None:
            return Trainer(config).train()
        folder.check_images(config)
        return summary


def with_precision(config: TrainConfig) -> TrainConfig:
    """The settings, with what `mixed_precision='auto'` is on this machine."""
    if config.mixed_precision != 'auto':
        return config
    return replace(config, mixed_precision=precision(PartialState(cpu=config.cpu).device))


def precision(device: torch.device) -> Optional[str]:
    """'bf16' on a GPU that has it, else None, which is that of `accelerate config`."""
    configured = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')  # 'no' where nothing was configured, too
    if configured != 'no' or not has_bf16(device):
        return None
    _logger.info('mixed precision: bf16, which this GPU has; --mixed-precision no trains in float32')
    return 'bf16'


class Trainer:
    """A run of `train`: what it is made of, and its loop.

    Args:
        config: The settings, as `with_precision` gives them.

    Raises:
        FileNotFoundError, OSError, ValueError: As `train`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.folder, self.task = config, RunFolder(config.output), find_task(config.task)
        if config.log_with:
            check_tracker(config.log_with)
        self.accelerator = accelerator = Accelerator(
            cpu=config.cpu, mixed_precision=config.mixed_precision, log_with=config.log_with, project_dir=config.output,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))  # which `train_step` does itself
        steps = os.environ.get('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '1')
        if steps != '1' and accelerator.distributed_type != DistributedType.DEEPSPEED:
            _logger.warning(
                'ACCELERATE_GRADIENT_ACCUMULATION_STEPS=%s is not followed; --batch-size and --device-batch-size say '
                'how many batches are accumulated', steps)
        self.is_sharded = accelerator.distributed_type == DistributedType.FSDP
        check_settings(config, accelerator)
        self.plan = plan = plan_batch(config, accelerator.num_processes)

        seed_everything(config.seed)
        train_set, val_set = create_datasets(config, self.folder.damaged(config), self.task.reads)
        self.task.check_images(train_set, val_set)
        self.record_split = self._check_split(train_set, val_set)
        self.class_names = train_set.class_names
        self.folder.check_classes(self.class_names, config.resume)
        self.streams = [images for images in (train_set, val_set) if isinstance(images, Stream)]
        self.images = None if self.streams else [
            (len(images), images.names(config.data_dir)) for images in (train_set, val_set)]
        self.damaged = {**getattr(train_set, 'damaged', {}), **getattr(val_set, 'damaged', {})}
        model = build_model(config, self.class_names)
        rank, size = accelerator.process_index, plan.per_device
        data_config = data_config_of(model)
        train_transform, val_transform = create_transforms(config, data_config)
        read_for(model, train_set, val_set)
        values = None if self.streams else sample_values(train_set)
        if values and values.remark():
            _logger.warning('%s: %s', config.dataset, values.remark())
        self.sampler = None if isinstance(train_set, Stream) else EpochBatchSampler(
            len(train_set), size, plan.processes, rank, config.seed, config.aug_repeats,
            config.epoch_updates * plan.accumulation)
        val_sampler = None if isinstance(val_set, Stream) else EvalBatchSampler(
            len(val_set), size, plan.processes, rank)
        self.train_loader, self.val_loader = (on_device(loader, data_config, accelerator.device) for loader in (
            create_loader(train_set, train_transform, self.sampler, config.workers, size, config.seed, rank),
            create_loader(val_set, val_transform, val_sampler, config.workers, size)))
        self.batches = len(self.sampler) if self.sampler else len(train_set) // size  # of a process, in an epoch
        if config.smoke:
            self.batches = min(self.batches, config.smoke * plan.accumulation)
        if not self.batches:
            raise ValueError(
                f'the training set has {len(train_set)} images, fewer than a batch of {size} for each of '
                f'{plan.processes} processes; give a smaller --batch-size')
        updates = -(-self.batches // plan.accumulation)  # in an epoch
        if self.sampler and self.sampler.passes > 1:
            _logger.info(
                'an epoch passes %d times over the %s training images: %d updates', self.sampler.passes,
                f'{len(train_set):,}', updates)

        if config.sync_bn:
            model = convert_sync_batchnorm(model)
        self.memory_format = memory_format_of(model, config)
        self.model = model.to(accelerator.device, memory_format=self.memory_format)
        # Found before a checkpoint is loaded: a norm that learns its statistics goes on doing so.
        self.frozen_norms = frozen_norms_of(self.model, config)
        self.unsharded = deepcopy(self.model) if self.is_sharded else None  # takes the weights together for evaluation
        lr, reason = learning_rate(config)
        _logger.info('learning rate: %s; batch: %s', reason, plan)
        optimizer = build_optimizer(self.model, config, lr)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _tell_deepspeed(accelerator, config, plan.per_device * plan.processes, size)
        trained = HeadOnly(self.model) if config.cache_features else self.model
        # timm's scheduler is stepped by hand, so Accelerate is not told of it.
        self.prepared, self.optimizer = accelerator.prepare(
            torch.compile(trained) if config.torchcompile else trained, optimizer)
        self.on_updates = steps_on_updates(config)
        self.scheduler = build_scheduler(optimizer, config, updates)
        self.ema = build_ema(self.model, config)
        kept = (config.model_ema_decay or 0.) ** (updates * config.epochs)
        if kept > 0.01 and accelerator.is_main_process:
            _logger.warning(
                'model_ema_decay=%s is long for %d updates: at the end, the averaged weights are %.0f %% the initial '
                'ones; --model-ema-decay none evaluates the plain weights', config.model_ema_decay,
                updates * config.epochs, 100 * kept)
        self.progress = Progress()
        self.updates = updates
        self.pending: List[Tensor] = []  # losses of the latest updates, on the device
        self.loss = math.nan  # the last that was read
        waits = config.skip_nonfinite or accelerator.device.type == 'cpu'
        self.read_every = 1 if waits else max(READ_EVERY // plan.accumulation, 1)
        # of the scheduler `resume` reads nothing; checkpoints have it, so that those of before can be read
        accelerator.register_for_checkpointing(*filter(None, (self.progress, self.scheduler, self.ema)))
        self.erasing = create_erasing(config, accelerator.device)
        self.mixup = Mixup(
            config.mixup, config.cutmix, switch_prob=config.mixup_switch_prob, label_smoothing=config.smoothing,
            num_classes=len(self.class_names)) if config.mixup or config.cutmix else None
        self.criterion = self.task.create_criterion(config, train_set).to(accelerator.device)
        self.terminated = False

    def _check_split(self, train_set: Images, val_set: Images) -> Callable[[], None]:
        """Compare the validation images with what earlier runs were trained on; return what records the split.

        Raises:
            ValueError: If the weights that training starts from have seen validation images.
        """
        if isinstance(train_set, Stream) or isinstance(val_set, Stream):
            return lambda: None
        config, path = self.config, self.folder.path
        runs = source_runs(config.model, config.model_kwargs.get('pretrained_backbone'))
        source, own = run_of(config.resume), path.resolve()
        if source not in (None, own) and (source / RECORD).is_file():
            runs.append(source)
        earlier = set()
        if config.resume and (path / RECORD).is_file():
            earlier = {name for name, split in read_split(path).items() if split == EARLIER}
        for run in runs:
            earlier |= check_overlap(val_set, config.data_dir, run, data_dir_of(run), (
                f'--split-from {run} keeps its validation images' if config.val_fraction else
                'Validate on images that it has not seen'))
        return lambda: write_split(path, train_set, val_set, config.data_dir, earlier)

    def train(self) -> Dict[str, Any]:
        """All epochs that are left; gives the summary."""
        accelerator, progress, config = self.accelerator, self.progress, self.config
        self.resume()
        accelerator.wait_for_everyone()  # a late process must look at `output` before anything is written there
        if accelerator.is_main_process:
            self.folder.begin(config, self.class_names, progress.epoch, self.damaged)
            self.record_split()
        if config.log_with:
            accelerator.init_trackers(config.project, config=tracked(config))
        with self._sigterm():
            while progress.epoch < (min(config.epochs, 2) if config.smoke else config.epochs):
                began, done = time.perf_counter(), progress.seconds
                skipped = sum(stream.skipped for stream in self.streams)
                self.train_epoch(lambda: done + time.perf_counter() - began)  # noqa: B023  called in this epoch only
                self.check_finite()
                model = self.model_to_keep()
                train_seconds = time.perf_counter() - began
                figures, metrics = self.evaluate(model)
                progress.epoch += 1
                progress.seconds = done + time.perf_counter() - began
                record = {
                    'epoch': progress.epoch, 'train_loss': progress.loss / max(progress.updates_in_epoch, 1),
                    'lr': self.optimizer.param_groups[0]['lr'], **figures, 'train_seconds': round(train_seconds, 1),
                    'seconds': round(progress.seconds, 1)}
                if self.streams:
                    skipped = torch.tensor(sum(stream.skipped for stream in self.streams) - skipped)
                    record['damaged'] = accelerator.reduce(skipped.to(accelerator.device), 'sum').item()
                if not self.on_updates:
                    self.scheduler.step(progress.epoch)
                score = figures[self.task.metric], figures.get('val_loss', math.inf)
                if progress.is_best(*score):
                    (progress.best, progress.best_loss), progress.best_epoch = score, progress.epoch
                    rows = self.task.rows(metrics, self.class_names)
                    if accelerator.is_main_process:
                        self.folder.save_best(model, config, self.class_names)
                        self.folder.save_rows(rows)
                if accelerator.is_main_process:
                    self.folder.add(record)
                    _logger.info(
                        'epoch %d: train loss %.4f, val %s %.2f, %.0f s', record['epoch'], record['train_loss'],
                        self.task.figures[self.task.metric], figures[self.task.metric], record['seconds'])
                if config.log_with:
                    accelerator.log({k: v for k, v in record.items() if k != 'epoch'}, step=progress.epoch)
                progress.batch = progress.updates_in_epoch = 0
                progress.loss = 0.
                self.save()
        accelerator.wait_for_everyone()
        summary = self.summary()
        if accelerator.is_main_process:
            draw_curve(
                self.folder.log, self.folder.path / 'curve.png', config.model, self.task.figures, progress.best_epoch)
            self.folder.end(summary)
        accelerator.end_training()
        return summary

    def train_epoch(self, elapsed: Callable[[], float]) -> None:
        """What is left of the epoch under way.

        Args:
            elapsed: Gives the seconds that the run has taken.
        """
        config, plan, progress = self.config, self.plan, self.progress
        self.prepared.train()
        if config.freeze or progress.epoch < config.freeze_epochs:
            self.model.eval()
            heads_of(self.model).train()
        for norm in self.frozen_norms:
            norm.eval()
        batches = iter(self.epoch_batches())
        size = plan.per_device * plan.processes
        bar = tqdm(
            total=self.batches * size, initial=progress.batch * size, unit='img', unit_scale=True, leave=False,
            desc=f'epoch {progress.epoch + 1}/{config.epochs}')
        with bar:
            while progress.batch < self.batches:
                window = min(plan.accumulation, self.batches - progress.batch)
                self.train_step(batches, window)
                progress.batch += window
                bar.update(window * size)
                reads = progress.update % self.read_every == 0 or progress.batch == self.batches
                if reads:
                    lr = self.optimizer.param_groups[0]['lr']
                    bar.set_postfix(loss=f'{self.read_losses():.3f}', lr=f'{lr:.2e}', refresh=False)
                progress.seconds = elapsed()
                stop = self._stop_requested(reads)
                if stop or config.checkpoint_steps and progress.update % config.checkpoint_steps == 0:
                    path = self.save()
                if stop:
                    _logger.info('SIGTERM: saved %s; go on with --resume auto', path)
                    self.accelerator.end_training()
                    raise SystemExit(TERMINATED)

    def epoch_batches(self) -> Iterable:
        """The batches, from where the epoch stands."""
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.start = self.progress.epoch, self.progress.batch
            return self.train_loader
        self.train_loader.dataset.epoch = self.progress.epoch
        batches = iter(self.train_loader)
        for _ in range(self.progress.batch):
            next(batches)
        return batches

    def train_step(self, batches: Iterator, window: int) -> None:
        """One step of the optimizer over `window` batches; the mean loss over all processes is `pending`.

        Nothing in here waits for the device, unless updates may have to be left out.
        """
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
            if self.erasing is not None:
                images = self.erasing(images)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            accelerator.sync_gradients = last = micro == window - 1
            with nullcontext() if last else accelerator.no_sync(self.prepared):
                with accelerator.autocast():
                    loss = self.criterion(self.prepared(images), targets) / window
                accelerator.backward(loss)
            total += loss.detach()
        self.pending.append(accelerator.reduce(total, 'mean'))
        progress.update += 1
        if config.skip_nonfinite and not math.isfinite(self.read_losses()):  # on any process
            self.optimizer.zero_grad()
            for buffer, kept in zip(self.model.buffers(), before):  # batch norm's statistics are not finite either
                buffer.copy_(kept)
            return
        if progress.epoch < config.freeze_epochs:  # frozen, yet in the graph, which DDP and compiled models hold on to
            head = set(heads_of(self.model).parameters())
            for parameter in self.model.parameters():
                if parameter not in head:
                    parameter.grad = None
        if config.clip_grad:
            accelerator.clip_grad_norm_(self.prepared.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def read_losses(self) -> float:
        """Add up the losses that are pending, and give the last that was read; this waits for the device.

        Raises:
            FloatingPointError: If one is not finite, and no update may be left out any more.
        """
        progress = self.progress
        losses, self.pending = torch.stack(self.pending).tolist() if self.pending else [], []
        for update, self.loss in enumerate(losses, progress.update - len(losses) + 1):
            if math.isfinite(self.loss):
                progress.loss += self.loss
                progress.updates_in_epoch += 1
                continue
            if progress.skipped >= self.config.skip_nonfinite:
                raise FloatingPointError(
                    f'the loss is {self.loss} in step {update} (epoch {progress.epoch + 1}). {self._way_out(update)}, '
                    f'or skip such steps with --skip-nonfinite N')
            progress.skipped += 1
            _logger.info('update %d: the loss is %s; left out', update, self.loss)
        return self.loss

    def model_to_keep(self) -> nn.Module:
        """The model to evaluate and to keep, with all of its weights on every process."""
        if self.is_sharded:
            options = StateDictOptions(full_state_dict=True)
            self.unsharded.load_state_dict(get_model_state_dict(self.prepared, options=options))
            model = self.unsharded
        else:
            model = self.ema.module if self.ema else self.model
        if self.accelerator.num_processes > 1:
            distribute_bn(model, self.accelerator.num_processes)  # the first process's, as DistributedDataParallel does
        return model

    def evaluate(self, model: nn.Module) -> Tuple[Dict[str, float], Any]:
        """Figures of a model on the validation images, and the task's metrics that gave them."""
        metrics = self.task.create_metrics(len(self.class_names), self.accelerator.device)
        model = self.task.eval_model(HeadOnly(model) if self.config.cache_features else model)
        figures = evaluate(self.accelerator, model, self.val_loader, metrics, self.config.smoke or None)
        return figures, metrics

    def check_finite(self) -> None:
        """Raise FloatingPointError if a weight or a state of the optimizer is not finite."""
        self.read_losses()
        states = [self.model.state_dict(), self.ema.module.state_dict() if self.ema else {}]
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # whose states are its own
            states.append([dict(state) for state in self.optimizer.state.values()])
        if not all_finite(self.accelerator, *states):
            raise FloatingPointError(
                f'the weights are not finite after step {self.progress.update} (epoch {self.progress.epoch + 1}). '
                f'{self._way_out(self.progress.update + 1)}')

    def _way_out(self, step: int) -> str:
        """What to do when a step fails. A checkpoint taken just before it leads to the same failure."""
        good = [path for path in checkpoints(self.folder.checkpoints) if int(path.name.removeprefix(PREFIX)) < step - 1]
        start = f'Resume from {good[-1]} into another --output' if good else 'Start again'
        return f'{start} with a lower --lr'

    def save(self) -> Path:
        """Write a checkpoint, once losses, weights and optimizer are known to be finite."""
        self.check_finite()
        return save_checkpoint(
            self.accelerator, self.folder.checkpoints, self.progress.update, self.config.checkpoint_hist)

    def resume(self) -> None:
        """Go on where `config.resume` says, or begin.

        A checkpoint says where a run is; settings are those that were given. So learning rates follow their schedule,
        if more epochs were asked for, or a branch has another one. Only a run that goes on with its newest checkpoint
        has its best weights; going back, or from another run's checkpoint, the best is that of the epochs to come.

        Raises:
            ValueError: If the run had other images, an epoch another number of updates, or none is left.
        """
        config, progress = self.config, self.progress
        newest = newest_checkpoint(self.folder.checkpoints)
        path = newest if config.resume == 'auto' else config.resume and Path(config.resume)
        if path:
            schedule = deepcopy(self.scheduler.state_dict())
            given = [
                {name: group[name] for name in OF_SETTINGS if name in group} for group in self.optimizer.param_groups]
            self.accelerator.load_state(str(path))
            before = self.optimizer.param_groups[0]['lr']
            self.scheduler.load_state_dict(schedule)
            for group, settings in zip(self.optimizer.param_groups, given):
                group.update(settings)
            self._check_place(path)
        if config.cache_features:
            self.use_features()  # of the backbone that was loaded, and before anything is written
        progress.updates, progress.images = self.updates, self.images
        if self.on_updates:
            self.scheduler.step_update(progress.update)
        else:
            self.scheduler.step(progress.epoch)
        if path:
            if not newest or not path.samefile(newest):
                progress.best_epoch = 0
                self.save()  # 'auto' finds it from now on
            elif self.accelerator.is_main_process:
                self.folder.mend()
            _logger.info(
                'going on with %s: epoch %d of %d, update %d, learning rate %.2e, before %.2e', path,
                progress.epoch + 1, config.epochs, progress.update, self.optimizer.param_groups[0]['lr'], before)

    def use_features(self) -> None:
        """Have the loaders give the backbone's features instead of images."""
        config = self.config
        self.model.eval()
        with torch.random.fork_rng([]):  # which a checkpoint has set
            self.train_loader, self.val_loader = (
                FeatureBatches(
                    cache_features(
                        self.model, loader.dataset.images, eval_transform(self.model), Path(config.cache_features),
                        self.plan.per_device, config.workers),
                    loader.batch_sampler)
                for loader in (self.train_loader, self.val_loader))

    def _check_place(self, path: Path) -> None:
        """Find the place in the epoch from the updates, as batches may have another size now."""
        progress = self.progress
        is_branch = run_of(self.config.resume) not in (None, self.folder.path.resolve())  # which may have its own
        if not is_branch and self.images and progress.images and list(progress.images) != self.images:
            before, now = ([count for count, _ in images] for images in (progress.images, self.images))
            raise ValueError(
                f'{self.folder.path} cannot go on with other images: it had {before[0]:,} to train on and '
                f'{before[1]:,} to evaluate on, now there are {now[0]:,} and {now[1]:,}'
                f'{" of other names or labels" * (before == now)}; another --output with --model '
                f'local-dir:{self.folder.path / "best"} --split-from {self.folder.path} starts from its weights')
        if progress.updates not in (0, self.updates):
            raise ValueError(
                f'{path} cannot be gone on with: an epoch had {progress.updates} updates, and has {self.updates} now, '
                f'by other images or another batch_size or device_batch_size')
        done = (progress.update - progress.epoch * self.updates) * self.plan.accumulation
        progress.batch = min(done, self.batches)
        if self.config.resume != 'auto' and progress.epoch >= self.config.epochs:
            raise ValueError(
                f'{path} is the end of {progress.epoch} epochs, and epochs={self.config.epochs}: none is left to train')

    def summary(self) -> Dict[str, Any]:
        """What is said of a finished run: settings, figures of the last and the best epoch, versions."""
        progress, records = self.progress, self.folder.records()
        return {
            'config': settings_of(self.config), 'batch': self.plan._asdict(),
            'params': sum(p.numel() for p in self.model.parameters()), 'damaged': len(self.damaged),
            **records[progress.epoch], 'best': records[progress.best_epoch], 'skipped_updates': progress.skipped,
            **versions()}

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

    def _stop_requested(self, asks: bool) -> bool:
        """Whether any process was told to stop; several ask each other, which waits for the device, if `asks`."""
        if self.accelerator.num_processes == 1:
            return self.terminated
        if asks and self.terminated:
            self.accelerator.set_trigger()
        return asks and self.accelerator.check_trigger()


def _tell_deepspeed(accelerator: Accelerator, config: TrainConfig, batch: int, per_device: int) -> None:
    """Tell DeepSpeed what it cannot learn from a data loader: it clips and steps inside of `backward`."""
    accelerator.state.deepspeed_plugin.deepspeed_config.update(  # windows of accumulation are averaged by `train_step`
        train_micro_batch_size_per_gpu=per_device, gradient_accumulation_steps=1, train_batch_size=batch,
        gradient_clipping=config.clip_grad or 0., zero_allow_untested_optimizer=True)


@torch.inference_mode()
def evaluate(
        accelerator: Accelerator, model: nn.Module, loader: Iterable, metrics: Any,
        max_batches: Optional[int] = None,
) -> Dict[str, float]:
    """Update a task's metrics with the loaders of all processes, and give the figures; every image counts once if each
    process loads its own. A process without images updates with none of the image that its sampler pads with: states
    have to have a shape before processes exchange them."""
    batches = ((images.to(accelerator.device), targets) for images, targets in islice(loader, max_batches))
    is_padding = getattr(getattr(loader, 'batch_sampler', None), 'is_padding', False)
    for logits, targets in logits_of(model, batches, accelerator.autocast):
        if is_padding:
            logits, targets = logits[:0], targets[:0]
        metrics.update(logits, targets.to(accelerator.device))
    return metrics.compute()
