"""What the head costs, beside its plain form, other heads, vanilla twins and the paper's speeds; and what they
make of frozen features (`probe`).

Linux only: memory and the names of processors are read from /proc.
"""
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

import timm
import torch
from matplotlib.figure import Figure

import noah_zoo

from . import report
from .heads import measure_classes, measure_growth, measure_head, measure_training
from .measure import processor
from .pairs import measure_pairs, measure_train_pairs
from .probe import ProbeConfig, probe
from .settings import Run


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
    'classes': What(
        measure_classes, lambda rows: {'least': report.least_ratios(rows), **report.mean_ratios(rows)},
        report.table_classes, report.draw_classes),
    'pairs': What(measure_pairs, report.mean_losses, report.table_pairs, report.draw_pairs),
    'train_pairs': What(measure_train_pairs, report.mean_loss, report.table_train_pairs, report.draw_pairs),
    'training': What(measure_training, lambda rows: {}, report.table_costs, report.draw_training),
    'growth': What(measure_growth, lambda rows: {}, report.table_costs, report.draw_growth),
    'probe': What(
        measure_probe, lambda rows: {}, report.table_probe, report.draw_probe,
        'mean ± standard deviation over {run.probe.seeds} seeds'),
}


def benchmark(what: Sequence[str], **settings) -> Iterator[str]:
    """Measure, and write OUTPUT/WHAT-DEVICE-DTYPE.json and .png when all of it is measured.

    Args:
        what: Of `MEASURES`: 'head', 'classes', 'pairs', 'train_pairs', 'training', 'growth', 'probe'.
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
                with _busy(run.busy):
                    text = _measure(name, run, Path(partial), output)
            yield text
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """A context in which so many other processes take what they get of the processor."""
    code = f'import os\nwhile os.getppid() == {os.getpid()}: pass'  # whatever ends this process ends them
    others = [
        subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _measure(name: str, run: Run, partial: Path, output: Path) -> str:
    result = {'what': name, **_circumstances(run)}
    rows = MEASURES[name].measure(run)
    result.update(summary=MEASURES[name].summarize(rows), rows=rows)
    title = (
        f'{name} on {result["hardware"]}, {run.device}, {run.threads} threads, {run.dtype}, '
        f'{f"beside {run.busy} busy processes, " if run.busy else ""}'
        f'PyTorch {result["versions"]["torch"]}, {result["date"][:10]}')
    note = 'smoke run: the figures mean nothing' if run.quick else MEASURES[name].note.format(run=run)
    figure = MEASURES[name].draw(rows)
    figure.suptitle(f'{title}\n{note}', fontsize=9)
    stem = f'{name}-{run.device}-{run.dtype}' + (f'-busy{run.busy}' if run.busy else '')
    figure.savefig(partial / f'{stem}.png', dpi=120)
    (partial / f'{stem}.json').write_text(json.dumps(result, indent=1, allow_nan=False) + '\n', encoding='utf-8')
    for suffix in ('.png', '.json'):
        os.replace(partial / (stem + suffix), output / (stem + suffix))
    return f'{title}; {note}\n\n{MEASURES[name].table(rows)}\n'


def _circumstances(run: Run) -> Dict[str, Any]:
    cpu = processor()
    try:
        triton = importlib.metadata.version('triton')
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        'command': run.command, 'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'device': run.device, 'hardware': torch.cuda.get_device_name() if run.device == 'cuda' else cpu, 'cpu': cpu,
        'cores': os.cpu_count(), 'load_average': os.getloadavg(), 'threads': run.threads, 'busy': run.busy,
        'dtype': run.dtype, 'quick': run.quick, 'versions': {
            'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
            'triton': triton, 'noah_zoo': noah_zoo.__version__}}
