"""Figures over the seeds of a comparison."""
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

from ..models.builder import HEAD_ARGS
from ..tasks import find_task
from ..text import table


def report(folders: Sequence[str]) -> str:
    """A Markdown table of the runs under some folders: a row per model and head, over seeds; NOAH follows its twin.

    Raises:
        FileNotFoundError: If there is no finished run.
        ValueError: If runs of one backbone differ in a setting other than head and seed, or runs in their task.
    """
    paths = sorted(path for folder in folders for path in Path(folder).rglob('summary.json'))
    if not paths:
        raise FileNotFoundError(f'no summary.json of a finished run under {", ".join(folders)}')
    summaries = [json.loads(path.read_text(encoding='utf-8')) for path in paths]
    runs, firsts = defaultdict(list), {}
    for path, summary in zip(paths, summaries):
        model, backbone, head, config = _split(summary['config'])
        runs[' '.join((model, *(f'{k}={v}' for k, v in sorted(head.items()))))].append(summary)
        first_path, first = firsts.setdefault(backbone, (path, config))
        different = [k for k in config.keys() | first if first.get(k) != config.get(k)]
        if different:
            raise ValueError(f'{path} differs from {first_path} in {", ".join(different)}; compare equal budgets')
    tasks = {summary['config'].get('task', 'multiclass') for summary in summaries}
    if len(tasks) > 1:
        raise ValueError(f'the runs are of the tasks {", ".join(sorted(tasks))}; compare runs of one')
    task = find_task(*tasks)
    rows = []
    for model, found in sorted(runs.items()):
        found.sort(key=lambda summary: summary['config']['seed'])
        figures = [math.nan if summary[task.metric] is None else summary[task.metric] for summary in found]
        spread = f' ± {statistics.stdev(figures):.2f}' if len(figures) > 1 else ''
        rows.append((
            model, f'{found[0]["params"]:,}', str(len(found)), f'{statistics.mean(figures):.2f}{spread}',
            ', '.join(f'{x:.2f}' for x in figures), f'{statistics.mean(s["seconds"] for s in found):.0f}'))
    mean = f'test {task.figures[task.metric]}, mean ± standard deviation'
    return table(('model', 'parameters', 'seeds', mean, 'each seed', 'seconds a run'), rows)


def _split(config: Dict[str, Any]) -> Tuple[str, str, Dict[str, Any], Dict[str, Any]]:
    """Model, backbone, arguments of the head, and the settings in which runs of one backbone must agree."""
    model_kwargs = dict(config.get('model_kwargs') or {})
    head = {name: model_kwargs.pop(name) for name in HEAD_ARGS if name in model_kwargs}
    if config.get('noah_variant'):
        head['noah_variant'] = config['noah_variant']
    model = config['model']
    if model == 'noah':
        model = f'{model_kwargs.pop("backbone", "resnet18")}_noah'
    rest = {k: v for k, v in config.items() if k not in ('model', 'seed', 'noah_variant') and v is not None}
    return model, model.removesuffix('_noah'), head, dict(rest, model_kwargs=model_kwargs)
