"""Whole models beside their vanilla twins."""
import functools
import itertools
from typing import Any, Callable, List

import timm
import torch
from huggingface_hub.utils import tqdm

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
