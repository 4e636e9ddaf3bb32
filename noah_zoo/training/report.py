"""Floor 4: figures over the seeds of a comparison."""
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Sequence


def report(folders: Sequence[str]) -> str:
    """A Markdown table of the runs under some folders: a row per model, over seeds; a NOAH model follows its twin.

    Raises:
        FileNotFoundError: If there is no finished run.
        ValueError: If runs of a pair, NOAH model and twin, differ in a setting other than model and seed.
    """
    paths = sorted(path for folder in folders for path in Path(folder).rglob('summary.json'))
    if not paths:
        raise FileNotFoundError(f'no summary.json of a finished run under {", ".join(folders)}')
    summaries = [json.loads(path.read_text(encoding='utf-8')) for path in paths]
    runs, firsts = defaultdict(list), {}
    for path, summary in zip(paths, summaries):
        config = summary['config']
        runs[config['model']].append(summary)
        first_path, first = firsts.setdefault(config['model'].removesuffix('_noah'), (path, config))
        different = [k for k, v in config.items() if k not in ('model', 'seed') and first.get(k) != v]
        if different:
            raise ValueError(f'{path} differs from {first_path} in {", ".join(different)}; compare equal budgets')
    lines = [
        '| model | parameters | seeds | test top-1, mean ± standard deviation | each seed | seconds a run |',
        '| --- | --- | --- | --- | --- | --- |']
    for model, found in sorted(runs.items()):
        found.sort(key=lambda summary: summary['config']['seed'])
        top1 = [summary['top1'] for summary in found]
        spread = f' ± {statistics.stdev(top1):.2f}' if len(top1) > 1 else ''
        lines.append(
            f'| {model} | {found[0]["params"]:,} | {len(found)} | {statistics.mean(top1):.2f}{spread} | '
            f'{", ".join(f"{t:.2f}" for t in top1)} | {statistics.mean(s["seconds"] for s in found):.0f} |')
    return '\n'.join(lines)
