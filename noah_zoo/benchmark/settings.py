"""The settings of a benchmark, checked."""
from dataclasses import dataclass
from typing import Any, Dict, Sequence

import numpy as np
import torch

from ..catalog import CATALOG, find_row
from .measure import MIN_SECONDS
from .probe import ProbeConfig

WHAT = ('head', 'classes', 'pairs', 'train_pairs', 'training', 'growth', 'probe')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


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
    busy: int = 0
    quick: bool = False
    command: str = ''
    probe: ProbeConfig = ProbeConfig()

    def __post_init__(self) -> None:
        for name, given, accepted in (
                ('what', self.what, WHAT), ('device', [self.device], ('cpu', 'cuda')),
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
        if self.busy < 0:
            raise ValueError(f'busy={self.busy}: expected 0 or more processes')
        if 'probe' in self.what and self.dtype != 'float32':
            raise ValueError(f'dtype={self.dtype!r}: probe trains heads in float32')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError("device='cuda': PyTorch finds no GPU here; choose 'cpu'")

    @property
    def timing(self) -> Dict[str, Any]:
        return {'repeats': 2 if self.quick else self.repeats, 'device': self.device,
                'min_seconds': 0. if self.quick else MIN_SECONDS}
