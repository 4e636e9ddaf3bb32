"""Whole models beside their vanilla twins."""
import functools
import itertools
from typing import Any, Callable, List, Sequence

import timm
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from timm.optim import create_optimizer_v2

from ..catalog import CATALOG, find_row
from . import report
from .heads import forward_step
from .measure import ratio, summary, time_in_turn
from .settings import DTYPES, Run


def model_step(name: str, batch_size: int, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A forward pass of a timm model with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name).to(device).eval()
    x = torch.randn(batch_size, *model.pretrained_cfg['input_size'], device=device)
    return forward_step(model, x, functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32))


def training_step(name: str, batch_size: int, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A whole training step on one batch in memory, channels last: forward, cross-entropy, backward, SGD's update."""
    torch.manual_seed(0)
    model = timm.create_model(name).to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.01, momentum=0.9)
    x = torch.randn(batch_size, *model.pretrained_cfg['input_size'], device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(model.num_classes, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure_pairs(run: Run) -> List[report.Row]:
    """Whole models, NOAH and vanilla: images/s, the share of speed that is kept, the paper's share (Table XVII)."""
    names = run.models or (['mobilenetv2_035_noah', 'deit_tiny_050_patch16_224_noah'] if run.quick else CATALOG)
    rows = _beside_twins(run, model_step, names, run.batch_sizes or (1 if run.device == 'cpu' else 200,))
    fps = 'cpu_fps' if run.device == 'cpu' else 'gpu_fps'
    for row in rows:
        pair = CATALOG[row['model']]
        paper = getattr(pair.paper, fps) / getattr(pair.vanilla_paper, fps)
        row.update(paper_kept=paper, lost_by_paper_lost=(1 - row['kept']['median']) / (1 - paper))
    return rows


def measure_train_pairs(run: Run) -> List[report.Row]:
    """Whole training steps of models, NOAH and vanilla: images/s, and the share of speed that is kept."""
    names = run.models or ['mobilenetv2_035_noah' if run.quick else 'resnet18_noah']
    batch_size = 2 if run.quick else 8 if run.device == 'cpu' else 128
    return _beside_twins(run, training_step, names, run.batch_sizes or (batch_size,))


def _beside_twins(run: Run, build: Callable, names: Sequence[str], batch_sizes: Sequence[int]) -> List[report.Row]:
    pairs = list(dict.fromkeys(find_row(name).name for name in names))
    rows = []
    with tqdm(total=len(pairs) * len(batch_sizes) * run.timing['repeats'], unit='repeat') as bar:
        for name, batch_size in itertools.product(pairs, batch_sizes):
            pair = CATALOG[name]
            bar.set_description(name)
            samples = time_in_turn({
                key: build(key, batch_size, run.device, DTYPES[run.dtype]) for key in (pair.name, pair.vanilla)},
                tick=bar.update, **run.timing)
            noah, vanilla = samples[pair.name], samples[pair.vanilla]
            rows.append({
                'model': pair.name, 'vanilla': pair.vanilla, 'batch_size': batch_size,
                'images_per_second': summary([batch_size / s for s in noah]),
                'vanilla_images_per_second': summary([batch_size / s for s in vanilla]), 'kept': ratio(vanilla, noah)})
    return rows
