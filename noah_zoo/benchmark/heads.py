"""The head alone: time and memory of a forward pass and of a training step, beside other heads."""
import functools
import itertools
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ..layers.ablations import PocaVariant
from ..layers.noah_head import NoahHead
from ..layers.other_heads import CSRA, MLDecoder
from . import report
from .measure import kib, peak_memory, ratio, saved_bytes, summary, time_in_turn
from .settings import DTYPES, Run

_logger = logging.getLogger(__name__)
PLAIN_MAPS = {False: 5, True: 8}  # maps (B, N, K, L) that the plain form may hold at once: forward, with backward


@dataclass(frozen=True)
class Case:
    """What a head is given: sizes, the layout of the features, whether a step has a backward pass, and whether that
    leaves out the features, as they are kept from a backbone that does not change."""
    in_features: int
    num_groups: int
    key_ratio: float
    positions: int
    input_fmt: str = 'NCHW'
    num_classes: int = 1000
    batch_size: int = 16
    training: bool = False
    cached: bool = False

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


def _compiled(case: Case) -> nn.Module:
    torch.compiler.reset()  # of the cases before: many shapes of one function would be more than it recompiles
    return torch.compile(_noah(PocaVariant, case), fullgraph=True, dynamic=False)  # an error where it would stay eager


HEADS: Dict[str, Callable[[Case], nn.Module]] = {  # all without dropout
    'noah': functools.partial(_noah, NoahHead),
    'plain': functools.partial(_noah, PocaVariant),
    'compiled': _compiled,
    'linear': _linear,
    'ml_decoder': lambda case: MLDecoder(case.in_features, case.num_classes, input_fmt=case.input_fmt),
    'csra': lambda case: CSRA(case.in_features, case.num_classes, input_fmt=case.input_fmt),
}
CNN = Case(2048, 4, 1 / 8, 49)
SHAPES = (Case(1280, 8, 1 / 4, 49), CNN, Case(192, 4, 1 / 2, 196, 'NLC'), Case(768, 4, 1 / 2, 196, 'NLC'))
CLASSES = (2, 10, 100, 1000)
GROWTH_K, GROWTH_L = (100, 1000, 5089, 10000, 21843), (49, 196, 576, 1024)


def head_parts(head: str, case: Case, device: str, dtype: torch.dtype) -> Tuple[nn.Module, Tensor, Callable]:
    """A head, features, and the autocast context (none for float32) in which the one reads the other."""
    torch.manual_seed(0)
    module = HEADS[head](case).to(device).train(case.training)
    x = case.features(device, dtype).requires_grad_(case.training and not case.cached)
    return module, x, functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)


def head_step(head: str, case: Case, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A forward pass, or a training step: gradients are dropped, then forward, cross-entropy and backward."""
    module, x, autocast = head_parts(head, case, device, dtype)
    if not case.training:
        return forward_step(module, x, autocast)
    targets = torch.randint(case.num_classes, (case.batch_size,), device=device)
    leaves = [x, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        with autocast():
            loss = F.cross_entropy(module(x), targets)
        loss.backward()

    return step


def forward_step(module: nn.Module, x: Tensor, autocast: Callable) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.inference_mode(), autocast():
            return module(x)

    return step


def measure_heads(run: Run, cases: Sequence[Case], heads: Sequence[str], memory: bool) -> List[report.Row]:
    """A row per case and head: time, `plain_by_this` (how much faster it is than the plain form), memory if asked.

    On CUDA the compiled plain form is one of `heads` in training steps of 1,000 classes, and there is
    `compiled_by_this` as well; compiling takes half a minute, on a CPU minutes and a C++ compiler. Under autocast the
    casts of the weights count as kept for backward.
    """
    rows, dtype = [], DTYPES[run.dtype]
    heads = [head for head in heads if head != 'compiled' or run.device == 'cuda']
    with tqdm(total=len(cases) * run.timing['repeats'], unit='repeat') as bar:
        for case in cases:
            bar.set_description(f'K={case.num_classes} L={case.positions} C={case.in_features} B={case.batch_size}')
            here = {head: {'head': head, 'case': asdict(case)} for head in heads}
            if 'compiled' in heads and not (case.training and case.num_classes == 1000):
                here['compiled']['skipped'] = '-'
            skipped = _too_large(case, run.device) if 'plain' in heads else None
            if skipped:
                _logger.warning('plain form, %s: %s', case, skipped)
                for head in {*report.PLAIN_FORMS} & {*heads}:
                    here[head]['skipped'] = skipped
            measured = [head for head in heads if 'skipped' not in here[head]]
            steps = {head: head_step(head, case, run.device, dtype) for head in measured}
            samples = time_in_turn(steps, tick=bar.update, **run.timing)
            steps.clear()
            for head in measured:
                row = here[head]
                row['seconds'] = summary(samples[head])
                for other in report.PLAIN_FORMS:
                    if other in samples:
                        row[f'{other}_by_this'] = ratio(samples[other], samples[head])
                if memory and head != 'compiled':
                    build = functools.partial(head_step, head, case, run.device, dtype)
                    row['peak_bytes'] = peak_memory(build, run.device, run.threads)
                if memory and head != 'compiled' and case.training:
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
    """The head alone beside others, on CUDA also what memory each needs."""
    return measure_heads(run, head_cases(run), list(HEADS), memory=run.device == 'cuda')


def head_cases(run: Run) -> List[Case]:
    """Four shapes, forward at every batch size and a training step at the largest; a CNN with other numbers of classes.

    The batch sizes on CUDA are 1 and the paper's 200. Very many classes are for CUDA alone: on a CPU they take minutes.
    """
    batch_sizes = run.batch_sizes or ((1, 2) if run.quick else (1, 16) if run.device == 'cpu' else (1, 200))
    steps = [*itertools.product(batch_sizes, [False]), (max(batch_sizes), True)]
    shapes = SHAPES[::2] if run.quick else SHAPES
    cases = [replace(shape, batch_size=size, training=training) for size, training in steps for shape in shapes]
    num_classes, size = ((10,), 2) if run.quick else ((10, 100) if run.device == 'cpu' else (10, 100, 21843), 64)
    return cases + [
        replace(CNN, num_classes=k, batch_size=size, training=training)
        for training in (False, True) for k in num_classes]


def measure_classes(run: Run) -> List[report.Row]:
    """From few classes to many: a forward pass, a training step on cached features, and one with their gradient."""
    batch_sizes, shapes = run.batch_sizes or ((2,) if run.quick else (32,)), (Case(512, 4, 1 / 2, 49), *SHAPES)
    cases = [
        replace(shape, num_classes=k, batch_size=size, training=training, cached=cached)
        for size in batch_sizes for training, cached in ((False, False), (True, True), (True, False))
        for shape in (shapes[3:4] if run.quick else shapes)
        for k in run.num_classes or (CLASSES[:2] if run.quick else CLASSES)]
    return measure_heads(run, cases, ['noah', 'plain', 'linear'], memory=False)


def measure_training(run: Run) -> List[report.Row]:
    """A training step, its peak memory, and what is kept for its backward pass."""
    batch_sizes = run.batch_sizes or ((2,) if run.quick else (64,))
    num_classes = run.num_classes or ((100,) if run.quick else (1000, 21843))
    cases = [replace(CNN, num_classes=k, batch_size=b, training=True) for k in num_classes for b in batch_sizes]
    return measure_heads(run, cases, ['noah', 'plain', 'compiled', 'linear'], memory=True)


def measure_growth(run: Run) -> List[report.Row]:
    """Time and peak memory as the number of classes grows (L = 49), and the number of positions (K = 1000)."""
    batch_sizes, few = (run.batch_sizes or (1,), 2) if run.quick else (run.batch_sizes or (16,), None)
    sizes = dict.fromkeys([*((k, 49) for k in GROWTH_K[:few]), *((1000, length) for length in GROWTH_L[:few])])
    cases = [
        replace(CNN, num_classes=k, positions=length, batch_size=batch_size, training=training)
        for batch_size in batch_sizes for training in (False, True) for k, length in sizes]
    return measure_heads(run, cases, ['noah', 'plain'], memory=True)
