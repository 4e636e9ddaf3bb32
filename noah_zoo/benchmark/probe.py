"""Heads side by side on the features of one frozen backbone: accuracy, parameters, seconds of training."""
import functools
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from timm.layers import AttentionPoolLatent
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ..config import TrainConfig, default_dataset
from ..data.base import Images
from ..data.factory import create_datasets, split_images
from ..data.loader import EpochBatchSampler, EvalBatchSampler, seed_everything
from ..inference.predict import read_for
from ..layers.noah_head import NoahHead, fitting_key_ratio, fitting_num_groups
from ..layers.other_heads import CSRA, EfficientProbing, MLDecoder, SimPool
from ..models.attach import NoahModel, add_noah_head, begin, eval_transform
from ..tasks.multiclass import Metrics
from ..training.builders import build_model
from ..training.features import CachedFeatures, cache_features
from .measure import synchronize

HOLD_OUT = 0.2  # of the training images, on which the learning rate is chosen
MORE_RATES = 2  # at most, beyond the least or largest learning rate where that is the best
WEIGHT_DECAY, SMOOTHING, WARMUP = 0.05, 0.1, 0.05  # WARMUP: share of the updates
BATCH_SIZE, EVAL_BATCH_SIZE = 64, 256
QUICK = dict(updates=4, seeds=2, lrs=2, images=200, img_size=64)  # of a smoke run: at most; the size unless given


class Inputs(NamedTuple):
    """What a head is built for.

    Attributes:
        in_features: C, channels of a position.
        num_classes: K.
        backbone_params: Parameters of the backbone.
        is_map: Whether the backbone gives maps, as convolutional networks do, or tokens.
    """
    in_features: int
    num_classes: int
    backbone_params: int
    is_map: bool


def _noah(inputs: Inputs) -> nn.Module:
    num_groups = fitting_num_groups(inputs.in_features, inputs.backbone_params)
    key_ratio = fitting_key_ratio(inputs.in_features, num_groups)
    head = NoahHead(inputs.in_features, inputs.num_classes, num_groups, key_ratio, input_fmt='NLC')
    begin(head)
    return head


class PoolLinear(nn.Linear):
    """The usual head: logits (B, K) of the average over positions of features (B, L, C)."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        return super().forward(x_BLC.mean(dim=1))


def _latent(inputs: Inputs) -> nn.Module:
    """As timm's ViTs have it: a norm before its MLP."""
    width = inputs.in_features
    pool = AttentionPoolLatent(width, num_heads=_divisor(width, 8), norm_layer=nn.LayerNorm)
    return nn.Sequential(pool, nn.Linear(width, inputs.num_classes))


def _efficient(inputs: Inputs) -> nn.Module:
    num_queries = _divisor(inputs.in_features, 32)
    return EfficientProbing(inputs.in_features, inputs.num_classes, num_queries, input_fmt='NLC')


def _divisor(width: int, most: int) -> int:
    return next(n for n in range(most, 0, -1) if width % n == 0)


HEADS: Dict[str, Callable[[Inputs], nn.Module]] = {  # from features (B, L, C), in the order of the table
    'linear': lambda inputs: PoolLinear(*inputs[:2]),
    'noah': _noah,
    'csra': lambda inputs: CSRA(*inputs[:2], input_fmt='NLC'),
    'simpool': lambda inputs: SimPool(*inputs[:2], gamma=2. if inputs.is_map else 1.25, input_fmt='NLC'),
    'efficient_probing': _efficient,
    'ml_decoder': lambda inputs: MLDecoder(*inputs[:2], input_fmt='NLC'),
    'latent': _latent,
}


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the measure 'probe', checked. What is called as in `TrainConfig` means the same.

    Attributes:
        model: A timm name, 'hf-hub:...' or 'local-dir:...'.
        pretrained: With its weights; if None, unless it is a smoke run.
        img_size: Image size; the model's if None.
        train_images: Images to train on, as many of each class, drawn at random; all if None.
        heads: Of `HEADS`.
        seeds: Trainings of every head, with seeds from 0.
        updates: Of every training.
        lrs: Learning rates, of which each head has the best; where that is the least or the largest, up to `MORE_RATES`
            beyond it are tried.
        cache_features: Folder in which the features are kept.
    """
    model: str = 'resnet18'
    pretrained: Optional[bool] = None
    dataset: Optional[str] = None
    data_dir: Optional[str] = None
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    train_split: str = 'train'
    val_split: str = 'validation'
    val_fraction: float = 0.
    img_size: Optional[int] = None
    train_images: Optional[int] = None
    heads: Sequence[str] = tuple(HEADS)
    seeds: int = 3
    updates: int = 1000
    lrs: Sequence[float] = (2e-4, 1e-3, 5e-3, 2.5e-2)
    cache_features: str = '~/.cache/noah_zoo/features'
    workers: int = 2

    def __post_init__(self) -> None:
        for name in self.heads:
            if name not in HEADS:
                raise ValueError(f'heads: {name!r} is not one of {", ".join(HEADS)}')
        for name in ('seeds', 'updates', 'img_size', 'train_images'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected 1 or more')
        if self.workers < 0:
            raise ValueError(f'workers={self.workers}: expected 0 or more')
        if not self.heads:
            raise ValueError(f'heads: none of {", ".join(HEADS)}; expected one or more')
        if not self.lrs or not all(0 < lr < float('inf') for lr in self.lrs):
            raise ValueError(f'lrs={self.lrs}: expected one or more rates above 0')


class Rows:
    """The features that every head is given, of some images.

    Attributes:
        targets: Class numbers of all images.
    """

    def __init__(self, model: nn.Module, cached: CachedFeatures, device: str) -> None:
        self.model, self.cached, self.device, self.targets = model, cached, device, cached.targets

    def batch(self, indices: Sequence[int]) -> Tuple[Tensor, Tensor]:
        """Features (B, L, C) in float32, as a NOAH head of the model is given them, and class numbers (B,)."""
        x, targets = (tensor.to(self.device) for tensor in self.cached.batch(indices))
        with torch.no_grad():
            features = self.model.forward_head(x)
        return features.flatten(1, -2).float(), targets.to(self.device)


class Positions(nn.Identity):
    """A head, by its `input_fmt`, that gives the positions it is given."""
    input_fmt = 'NLC'


def without_classifier(model: nn.Module, num_classes: int) -> NoahModel:
    """Make a timm model, in place, one whose `forward_head` gives what its NOAH head would be given, every position."""
    if isinstance(model, NoahModel):
        model.reset_classifier(num_classes)
    else:
        add_noah_head(model, num_classes)
    model.set_submodule(model.noah_place, Positions())
    return model.requires_grad_(False).eval()


def create_backbone(config: ProbeConfig, class_names: Tuple[str, ...], quick: bool) -> NoahModel:
    """The frozen model, `without_classifier`.

    Raises:
        RuntimeError: If there are no weights for it.
        ValueError: If timm does not know the model, or it takes no NOAH head or images of that size.
    """
    img_size = config.img_size or (QUICK['img_size'] if quick else None)
    pretrained = not quick if config.pretrained is None else config.pretrained
    torch.manual_seed(0)
    settings = TrainConfig(model=config.model, output='', img_size=img_size, pretrained=pretrained)
    model = build_model(settings, class_names)
    return without_classifier(model, len(class_names))


def create_images(config: ProbeConfig, quick: bool) -> Tuple[Images, Images]:
    """The images to train on and to test on.

    Raises:
        FileNotFoundError: If the data are not there.
        ValueError: If the data are a stream or no single classes, or have too few images of a class.
    """
    names = (
        'model', 'dataset', 'data_dir', 'input_key', 'target_key', 'train_split', 'val_split', 'val_fraction')
    sets = create_datasets(TrainConfig(output='', **{name: getattr(config, name) for name in names}))
    if not all(isinstance(images, Images) for images in sets):
        raise ValueError(f'{config.dataset}: a stream has no fixed images to probe on; use hfds/ or folder')
    train_set, test_set = sets
    if quick:
        return _some(train_set), _some(test_set)
    return equal_classes(train_set, config.train_images) if config.train_images else train_set, test_set


def _some(images: Images) -> Images:
    return images.take(np.sort(np.random.RandomState(0).permutation(len(images))[:QUICK['images']]))


def equal_classes(images: Images, count: int, seed: int = 0) -> Images:
    """Some of the images, as many of each class, drawn at random, in the order that they had.

    Raises:
        ValueError: If the classes do not divide `count`, or one has not as many images.
    """
    labels, num_classes = images.labels[images.rows], len(images.class_names)
    per_class, rest = divmod(count, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    if rest or not per_class:
        raise ValueError(f'train_images={count} is not a multiple of the {num_classes} classes')
    if counts.min() < per_class:
        raise ValueError(
            f'train_images={count} is {per_class} of each class, and {images.class_names[counts.argmin()]!r} has '
            f'{counts.min()}; accepted is up to {num_classes * counts.min()}')
    rng = np.random.RandomState(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(num_classes)]
    return images.take(np.sort(np.concatenate(chosen)))


def hold_out(images: Images, seed: int, data_dir: Optional[str] = None) -> Tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on and of those held out, nearly the same share of each class."""
    parts = split_images(images, HOLD_OUT, seed, data_dir)
    return tuple(np.flatnonzero(np.isin(images.rows, part.rows)) for part in parts)


def train_head(
        build: Callable[[], nn.Module], rows: Rows, indices: np.ndarray, lr: float, updates: int, seed: int,
        tick: Callable[[], Any] = lambda: None,
) -> Tuple[nn.Module, float]:
    """A head trained on the features of some images, and the seconds it took.

    The seed decides its initial weights and the order of the batches.
    """
    seed_everything(seed)
    head = build().to(rows.device)
    optimizer = create_optimizer_v2(head, opt='adamw', lr=lr, weight_decay=WEIGHT_DECAY)
    warmup = round(WARMUP * updates)
    scheduler = CosineLRScheduler(
        optimizer, updates - warmup, warmup_t=warmup, warmup_lr_init=lr / 10, warmup_prefix=True, t_in_epochs=False)
    scheduler.step_update(0)
    sampler, update = EpochBatchSampler(len(indices), min(BATCH_SIZE, len(indices)), 1, 0, seed), 0
    synchronize(rows.device)
    start = time.perf_counter()
    while update < updates:
        for keys in sampler:
            x_BLC, targets = rows.batch(indices[[index for _, _, index in keys]])
            optimizer.zero_grad()
            F.cross_entropy(head(x_BLC), targets, label_smoothing=SMOOTHING).backward()
            optimizer.step()
            update += 1
            scheduler.step_update(update)
            tick()
            if update == updates:
                break
        sampler.epoch += 1
    synchronize(rows.device)
    return head.eval(), time.perf_counter() - start


@torch.inference_mode()
def evaluate_head(head: nn.Module, rows: Rows, indices: Sequence[int], num_classes: int) -> Dict[str, float]:
    """Figures of `Metrics` on some images."""
    metrics = Metrics(num_classes, torch.device(rows.device))
    for keys in EvalBatchSampler(len(indices), EVAL_BATCH_SIZE, 1, 0):
        x_BLC, targets = rows.batch(indices[[index for _, _, index in keys]])
        metrics.update(head(x_BLC), targets)
    return metrics.compute()


def probe(config: ProbeConfig, device: str = 'cpu', quick: bool = False) -> List[Dict[str, Any]]:
    """A row per head: its learning rate, chosen on held-out training images; accuracy and seconds over the seeds.

    Raises:
        FileNotFoundError: If the data are not there.
        OSError: If there is no room for the features.
        RuntimeError: If there are no weights for the model.
        ValueError: If a setting is not accepted.
    """
    config = replace(config, dataset=config.dataset or default_dataset(config.data_dir))
    train_images, test_images = create_images(config, quick)
    num_classes = len(train_images.class_names)
    model = create_backbone(config, train_images.class_names, quick).to(device)
    transform = eval_transform(model)
    read_for(model, train_images, test_images)
    train_rows, test_rows = (
        Rows(model, cache_features(
            model, images, transform, Path(config.cache_features), BATCH_SIZE, config.workers), device)
        for images in (train_images, test_images))
    updates, seeds = config.updates, config.seeds
    lrs = sorted(set(config.lrs))
    if quick:
        updates, seeds, lrs = min(updates, QUICK['updates']), min(seeds, QUICK['seeds']), lrs[:QUICK['lrs']]
    x_BLC, _ = train_rows.batch([0])
    inputs = Inputs(
        x_BLC.shape[2], num_classes, sum(p.numel() for p in model.parameters()), model.noah_features.fmt != 'NLC')
    case = {
        **asdict(config), 'updates': updates, 'seeds': seeds, 'lrs': lrs, 'train_images': len(train_images),
        'test_images': len(test_images), 'positions': x_BLC.shape[1], **inputs._asdict(), 'batch_size': BATCH_SIZE,
        'weight_decay': WEIGHT_DECAY, 'smoothing': SMOOTHING, 'hold_out': HOLD_OUT}
    fit, held_out = hold_out(train_images, 0, config.data_dir)
    everything, tested = np.arange(len(train_images)), np.arange(len(test_images))
    rows = []
    with tqdm(total=len(config.heads) * (len(lrs) + seeds) * updates, unit='update') as bar:
        for name in dict.fromkeys(config.heads):
            build = functools.partial(HEADS[name], inputs)

            def figures_of(lr: float, name: str = name, build: Callable = build) -> Dict[str, float]:
                bar.set_description(f'{name}, rate {lr:g}')
                bar.total += 0 if lr in lrs else updates
                head, _ = train_head(build, train_rows, fit, lr, updates, 0, bar.update)
                return evaluate_head(head, train_rows, held_out, num_classes)

            found = search_rates(figures_of, lrs, 0 if quick else MORE_RATES)
            lr = best_rate(found)
            figures, seconds = [], []
            for seed in range(seeds):
                bar.set_description(f'{name}, seed {seed}')
                head, took = train_head(build, train_rows, everything, lr, updates, seed, bar.update)
                figures.append(evaluate_head(head, test_rows, tested, num_classes)['top1'])
                seconds.append(took)
            rows.append({
                'head': name, 'case': case, 'params': sum(p.numel() for p in head.parameters()), 'lr': lr,
                'lr_at_edge': len(found) > 1 and lr in (min(found), max(found)),
                'held_out_top1': {f'{rate:g}': result['top1'] for rate, result in found.items()},
                'top1': {
                    'mean': statistics.mean(figures), 'std': statistics.stdev(figures) if seeds > 1 else None,
                    'each': figures},
                'seconds': seconds})
    return rows


def search_rates(
        figures_of: Callable[[float], Dict[str, float]], lrs: Sequence[float], more: int,
) -> Dict[float, Dict[str, float]]:
    """Figures by learning rate: of those given, and of up to `more` beyond them, as long as the best is at an end."""
    found = {lr: figures_of(lr) for lr in lrs}
    for _ in range(more if len(lrs) > 1 else 0):
        rates, best = sorted(found), best_rate(found)
        if best not in (rates[0], rates[-1]):
            break
        end, inner = rates[:2] if best == rates[0] else rates[:-3:-1]
        found[end * end / inner] = figures_of(end * end / inner)
    return found


def best_rate(found: Dict[float, Dict[str, float]]) -> float:
    """The learning rate with the best held-out accuracy; of equals, that with the least loss."""
    return max(found, key=lambda lr: (found[lr]['top1'], -found[lr]['val_loss']))
