"""What the head costs, beside its plain form, other heads, vanilla twins and the paper's speeds; and what they
make of frozen features (`probe`).

Linux only: memory and the names of processors are read from /proc.
"""
import datetime
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from matplotlib.figure import Figure
from torch import Tensor, nn

import noah_zoo

from ..catalog import CATALOG, find_row
from ..layers.ablations import PocaVariant
from ..layers.noah_head import NoahHead
from ..layers.other_heads import CSRA, MLDecoder
from . import report
from .measure import MIN_SECONDS, kib, peak_memory, ratio, saved_bytes, summary, time_in_turn
from .probe import ProbeConfig, probe

_logger = logging.getLogger(__name__)
PLAIN_MAPS = {False: 5, True: 8}  # maps (B, N, K, L) that the plain form may hold at once: forward, with backward
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Case:
    """What a head is given: sizes, the layout of the features, and whether a step has a backward pass."""
    in_features: int
    num_groups: int
    key_ratio: float
    positions: int
    input_fmt: str = 'NCHW'
    num_classes: int = 1000
    batch_size: int = 16
    training: bool = False

    def features(self, device: str, dtype: torch.dtype) -> Tensor:
        """Random features as a backbone delivers them, contiguous in the order of `input_fmt`; a map is square."""
        side = round(self.positions ** 0.5)
        shapes = {'NCHW': (self.in_features, side, side), 'NLC': (self.positions, self.in_features)}
        return torch.randn(self.batch_size, *shapes[self.input_fmt], device=device, dtype=dtype)


def _noah(cls, case: Case) -> nn.Module:
    return cls(case.in_features, case.num_classes, case.num_groups, case.key_ratio, input_fmt=case.input_fmt)


def _linear(case: Case) -> nn.Module:
    pool = NoahHead(case.in_features, 0, input_fmt=case.input_fmt)
    return nn.Sequential(pool, nn.Linear(case.in_features, case.num_classes))


HEADS: Dict[str, Callable[[Case], nn.Module]] = {  # all without dropout
    'noah': functools.partial(_noah, NoahHead),
    'plain': functools.partial(_noah, PocaVariant),
    'linear': _linear,
    'ml_decoder': lambda case: MLDecoder(case.in_features, case.num_classes, input_fmt=case.input_fmt),
    'csra': lambda case: CSRA(case.in_features, case.num_classes, input_fmt=case.input_fmt),
}
CNN = Case(2048, 4, 1 / 8, 49)
SHAPES = (Case(1280, 8, 1 / 4, 49), CNN, Case(192, 4, 1 / 2, 196, 'NLC'), Case(768, 4, 1 / 2, 196, 'NLC'))
GROWTH_K, GROWTH_L = (100, 1000, 5089, 10000, 21843), (49, 196, 576, 1024)


def head_parts(head: str, case: Case, device: str, dtype: torch.dtype) -> Tuple[nn.Module, Tensor, Callable]:
    """A head, features, and the autocast context (none for float32) in which the one reads the other."""
    torch.manual_seed(0)
    module = HEADS[head](case).to(device).train(case.training)
    x = case.features(device, dtype).requires_grad_(case.training)
    return module, x, functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)


def head_step(head: str, case: Case, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A forward pass, or a training step: gradients are dropped, then forward, cross-entropy and backward."""
    module, x, autocast = head_parts(head, case, device, dtype)
    if not case.training:
        return _forward(module, x, autocast)
    targets = torch.randint(case.num_classes, (case.batch_size,), device=device)
    leaves = [x, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        with autocast():
            loss = F.cross_entropy(module(x), targets)
        loss.backward()

    return step


def model_step(name: str, batch_size: int, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A forward pass of a timm model with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).eval()
    x = torch.randn(batch_size, *model.pretrained_cfg['input_size'], device=device)
    return _forward(model, x, functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32))


def _forward(module: nn.Module, x: Tensor, autocast: Callable) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.inference_mode(), autocast():
            return module(x)

    return step


@dataclass(frozen=True)
class Run:
    """Settings of `benchmark`, checked."""
    what: Sequence[str]
    device: str = 'cpu'
    threads: int = 1
    output: str = 'results/benchmark'
    repeats: int = 21
    batch_sizes: Sequence[int] = ()
    num_classes: Sequence[int] = ()
    models: Sequence[str] = ()
    dtype: str = 'float32'
    quick: bool = False
    command: str = ''
    probe: ProbeConfig = ProbeConfig()

    def __post_init__(self) -> None:
        for name, given, accepted in (
                ('what', self.what, MEASURES), ('device', [self.device], ('cpu', 'cuda')),
                ('dtype', [self.dtype], DTYPES)):
            for value in given:
                if value not in accepted:
                    raise ValueError(f'{name}: {value!r} is not one of {", ".join(accepted)}')
        for name in self.models:
            if find_row(name) is None:
                raise ValueError(f'{name!r} is not a model of Table XVII; choose from {", ".join(CATALOG)}')
        for name in ('threads', 'repeats', 'batch_sizes', 'num_classes'):
            if np.min(getattr(self, name), initial=1) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: expected 1 or more')
        if 'probe' in self.what and self.dtype != 'float32':
            raise ValueError(f'dtype={self.dtype!r}: probe trains heads in float32')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError("device='cuda': PyTorch finds no GPU here; choose 'cpu'")

    @property
    def timing(self) -> Dict[str, Any]:
        return {'repeats': 2 if self.quick else self.repeats, 'device': self.device,
                'min_seconds': 0. if self.quick else MIN_SECONDS}


def measure_heads(run: Run, cases: Sequence[Case], heads: Sequence[str], memory: bool) -> List[report.Row]:
    """A row per case and head: time, `plain_by_this` (how much faster it is than the plain form), memory if asked.

    Under autocast the casts of the weights count as kept for backward.
    """
    rows, dtype = [], DTYPES[run.dtype]
    with tqdm(total=len(cases) * run.timing['repeats'], unit='repeat') as bar:
        for case in cases:
            bar.set_description(f'K={case.num_classes} L={case.positions} C={case.in_features} B={case.batch_size}')
            here = {head: {'head': head, 'case': asdict(case)} for head in heads}
            skipped = _too_large(case, run.device) if 'plain' in heads else None
            if skipped:
                _logger.warning('plain form, %s: %s', case, skipped)
                here['plain']['skipped'] = skipped
            measured = [head for head in heads if 'skipped' not in here[head]]
            steps = {head: head_step(head, case, run.device, dtype) for head in measured}
            samples = time_in_turn(steps, tick=bar.update, **run.timing)
            steps.clear()
            for head in measured:
                row = here[head]
                row['seconds'] = summary(samples[head])
                if 'plain' in samples:
                    row['plain_by_this'] = ratio(samples['plain'], samples[head])
                if memory:
                    build = functools.partial(head_step, head, case, run.device, dtype)
                    row['peak_bytes'] = peak_memory(build, run.device, run.threads)
                if memory and case.training:
                    module, x, autocast = head_parts(head, case, run.device, dtype)
                    leaves = [x, *module.parameters()]
                    row['gradient_bytes'] = sum(leaf.nbytes for leaf in leaves)
                    with autocast():
                        row['saved_bytes'] = saved_bytes(functools.partial(module, x), leaves)
            rows += here.values()
    return rows


def _too_large(case: Case, device: str) -> Optional[str]:
    maps = case.batch_size * case.num_groups * case.num_classes * case.positions
    needed = 4 * maps * PLAIN_MAPS[case.training]
    free = torch.cuda.mem_get_info()[0] if device == 'cuda' else kib('/proc/meminfo', 'MemAvailable') * 1024
    return f'needs up to {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free' if needed > free else None


def measure_head(run: Run) -> List[report.Row]:
    """The head alone beside others: forward at every batch size, a training step at the largest."""
    batch_sizes = run.batch_sizes or ((1, 2) if run.quick else (1, 16))
    steps = [*itertools.product(batch_sizes, [False]), (max(batch_sizes), True)]
    shapes = SHAPES[::2] if run.quick else SHAPES
    cases = [replace(shape, batch_size=size, training=training) for size, training in steps for shape in shapes]
    return measure_heads(run, cases, list(HEADS), memory=False)


def measure_training(run: Run) -> List[report.Row]:
    """A training step, its peak memory, and what is kept for its backward pass."""
    batch_sizes = run.batch_sizes or ((2,) if run.quick else (64,))
    num_classes = run.num_classes or ((100,) if run.quick else (1000, 21843))
    cases = [replace(CNN, num_classes=k, batch_size=b, training=True) for k in num_classes for b in batch_sizes]
    return measure_heads(run, cases, ['noah', 'plain', 'linear'], memory=True)


def measure_growth(run: Run) -> List[report.Row]:
    """Time and peak memory as the number of classes grows (L = 49), and the number of positions (K = 1000)."""
    batch_sizes, few = (run.batch_sizes or (1,), 2) if run.quick else (run.batch_sizes or (16,), None)
    sizes = dict.fromkeys([*((k, 49) for k in GROWTH_K[:few]), *((1000, length) for length in GROWTH_L[:few])])
    cases = [
        replace(CNN, num_classes=k, positions=length, batch_size=batch_size, training=training)
        for batch_size in batch_sizes for training in (False, True) for k, length in sizes]
    return measure_heads(run, cases, ['noah', 'plain'], memory=True)


def measure_pairs(run: Run) -> List[report.Row]:
    """Whole models, NOAH and vanilla: images/s, the share of speed that is kept, the paper's share (Table XVII)."""
    names = run.models or (['mobilenetv2_035_noah', 'deit_tiny_050_patch16_224_noah'] if run.quick else CATALOG)
    pairs = list(dict.fromkeys(find_row(name).name for name in names))
    batch_sizes = run.batch_sizes or (1 if run.device == 'cpu' else 200,)
    rows = []
    with tqdm(total=len(pairs) * len(batch_sizes) * run.timing['repeats'], unit='repeat') as bar:
        for name, batch_size in itertools.product(pairs, batch_sizes):
            pair = CATALOG[name]
            bar.set_description(name)
            samples = time_in_turn({
                key: model_step(key, batch_size, run.device, DTYPES[run.dtype]) for key in (pair.name, pair.vanilla)},
                tick=bar.update, **run.timing)
            noah, vanilla = samples[pair.name], samples[pair.vanilla]
            fps = 'cpu_fps' if run.device == 'cpu' else 'gpu_fps'
            paper = getattr(pair.paper, fps) / getattr(pair.vanilla_paper, fps)
            kept = ratio(vanilla, noah)
            rows.append({
                'model': pair.name, 'vanilla': pair.vanilla, 'batch_size': batch_size,
                'images_per_second': summary([batch_size / s for s in noah]),
                'vanilla_images_per_second': summary([batch_size / s for s in vanilla]),
                'kept': kept, 'paper_kept': paper, 'lost_by_paper_lost': (1 - kept['median']) / (1 - paper)})
    return rows


def measure_probe(run: Run) -> List[report.Row]:
    """Heads trained on the features of a frozen backbone."""
    return probe(run.probe, run.device, run.quick)


class What(NamedTuple):
    """Something to measure. `note` is a format for what the figures are."""
    measure: Callable[[Run], List[report.Row]]
    summarize: Callable[[List[report.Row]], Dict[str, Any]]
    table: Callable[[List[report.Row]], str]
    draw: Callable[[List[report.Row]], Figure]
    note: str = 'medians (quartiles) of {run.repeats} samples'


MEASURES = {
    'head': What(measure_head, report.mean_ratios, report.table_head, report.draw_head),
    'pairs': What(measure_pairs, report.mean_losses, report.table_pairs, report.draw_pairs),
    'training': What(measure_training, lambda rows: {}, report.table_costs, report.draw_training),
    'growth': What(measure_growth, lambda rows: {}, report.table_costs, report.draw_growth),
    'probe': What(
        measure_probe, lambda rows: {}, report.table_probe, report.draw_probe,
        'mean ± standard deviation over {run.probe.seeds} seeds'),
}


def benchmark(what: Sequence[str], **settings) -> Iterator[str]:
    """Measure, and write OUTPUT/WHAT-DEVICE.json and .png when all of it is measured.

    Args:
        what: Of `MEASURES`: 'head', 'pairs', 'training', 'growth', 'probe'.
        **settings: Of `Run`; and of `ProbeConfig`, with 'probe' only.

    Yields:
        For each, its table as Markdown under a line with hardware and versions.

    Raises:
        ValueError: If a setting is not accepted, or PyTorch finds no GPU.
        OSError: If nothing can be written to `output`.
        RuntimeError: If memory runs out.
    """
    of_probe = {field.name: settings.pop(field.name) for field in fields(ProbeConfig) if field.name in settings}
    if of_probe and 'probe' not in what:
        raise ValueError(f'{", ".join(of_probe)}: of probe only; got {" ".join(what)}')
    unused = [name for name in ('models', 'batch_sizes', 'num_classes', 'repeats') if name in settings]
    if unused and set(what) == {'probe'}:
        raise ValueError(f'{", ".join(unused)}: not of probe, which has its own settings')
    run = Run(what, probe=ProbeConfig(**of_probe), **settings)
    output = Path(run.output)
    output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        for name in dict.fromkeys(run.what):
            with tempfile.TemporaryDirectory(prefix='.benchmark-', dir=output) as partial:  # fails now, if at all
                text = _measure(name, run, Path(partial), output)
            yield text
    finally:
        torch.set_num_threads(threads)


def _measure(name: str, run: Run, partial: Path, output: Path) -> str:
    result = {'what': name, **_circumstances(run)}
    rows = MEASURES[name].measure(run)
    result.update(summary=MEASURES[name].summarize(rows), rows=rows)
    title = (
        f'{name} on {result["hardware"]}, {run.device}, {run.threads} threads, {run.dtype}, '
        f'PyTorch {result["versions"]["torch"]}, {result["date"][:10]}')
    note = 'smoke run: the figures mean nothing' if run.quick else MEASURES[name].note.format(run=run)
    figure = MEASURES[name].draw(rows)
    figure.suptitle(f'{title}\n{note}', fontsize=9)
    stem = f'{name}-{run.device}'
    figure.savefig(partial / f'{stem}.png', dpi=120)
    (partial / f'{stem}.json').write_text(json.dumps(result, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    for suffix in ('.png', '.json'):
        os.replace(partial / (stem + suffix), output / (stem + suffix))
    return f'{title}; {note}\n\n{MEASURES[name].table(rows)}\n'


def _circumstances(run: Run) -> Dict[str, Any]:
    cpu = re.search(r'^model name\s*: (.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    cpu = cpu[1] if cpu else platform.machine()
    try:
        triton = importlib.metadata.version('triton')
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        'command': run.command, 'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'device': run.device, 'hardware': torch.cuda.get_device_name() if run.device == 'cuda' else cpu, 'cpu': cpu,
        'cores': os.cpu_count(), 'load_average': os.getloadavg(), 'threads': run.threads, 'dtype': run.dtype,
        'quick': run.quick, 'versions': {
            'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
            'triton': triton, 'noah_zoo': noah_zoo.__version__}}
