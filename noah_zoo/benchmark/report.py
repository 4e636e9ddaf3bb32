"""Rows of the benchmark as Markdown tables and as figures."""
import itertools
import statistics
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..text import table

Row = Dict[str, Any]
HEAD_LOOKS = {  # label and colour, after Okabe and Ito, for every kind of colour vision
    'noah': ('NOAH', '#0072B2'), 'plain': ('NOAH, plain form', '#D55E00'),
    'compiled': ('NOAH, plain form, compiled', '#000000'), 'linear': ('pooling + linear', '#009E73'),
    'ml_decoder': ('ML-Decoder', '#CC79A7'), 'csra': ('CSRA', '#E69F00'), 'simpool': ('SimPool', '#D55E00'),
    'efficient_probing': ('Efficient Probing', '#000000'), 'latent': ('AttentionPoolLatent', '#56B4E9')}
PLAIN_FORMS = ('plain', 'compiled')  # that the others are as many times as fast as
MARKERS = dict(zip(('linear', 'noah', 'csra', 'simpool', 'efficient_probing', 'ml_decoder', 'latent'), 'osD^vPX'))
QUARTILES = ('q1', 'median', 'q3')
STEPS = {False: 'forward', True: 'forward + backward'}
PAIR_HEADER = ['model', 'batch', 'NOAH, images/s', 'vanilla, images/s', 'speed kept, %']
FIGURES = {  # of a row: its name, unit, and what to multiply by
    'seconds': ('time', 'ms', 1e3), 'peak_bytes': ('peak memory', 'MiB', 2**-20),
    'saved_bytes': ('kept for backward', 'MiB', 2**-20)}


def table_head(rows: Sequence[Row]) -> str:
    """A line per case, the heads side by side, and the geometric means of `mean_ratios`."""
    lines, others = [], _plain_forms(rows)
    for group in by_case(rows):
        case = group[0]['case']
        times = [row.get('skipped') or _cell(row, 'seconds') for row in group]
        lines.append([
            _shape(case).replace('\n', ', '), case['input_fmt'], _step(case), *times,
            *(_faster(group[0], other) for other in others)])
    labels = [f'{HEAD_LOOKS[row["head"]][0]}, ms' for row in by_case(rows)[0]]
    header = ['features', 'layout', 'step', *labels, *(f'{other} / NOAH' for other in others)]
    return (f'{table(header, lines)}\n\n'
            f'Plain / NOAH, geometric mean over the shapes at K=1,000: {_by_step(mean_ratios(rows))}.')


def table_classes(rows: Sequence[Row]) -> str:
    """A line per step and shape, a column per number of classes: plain / NOAH, and NOAH's images/s; and what of the
    former is least, and its geometric mean at the most classes."""
    noah = [row for row in rows if row['head'] == 'noah']
    sizes = list(dict.fromkeys(row['case']['num_classes'] for row in noah))
    lines: Dict[tuple, List[str]] = {}
    for row in noah:
        case = row['case']
        line = lines.setdefault((_step(case), _features(case).replace('\n', ', '), case['input_fmt']), [])
        line.append(f'{_faster(row, "plain")} ({_number(case["batch_size"] / row["seconds"]["median"])})')
    header = ['step', 'features', 'layout', *(f'K={k:,}' for k in sizes)]
    return (
        f'{table(header, [[*key, *line] for key, line in lines.items()])}\n\n'
        f"Plain / NOAH, and NOAH's images/s in brackets. The least: {_by_step(least_ratios(rows))}. Geometric mean "
        f'over the shapes at K={max(sizes):,}: {_by_step(mean_ratios(rows, max(sizes)))}.')


def least_ratios(rows: Sequence[Row]) -> Dict[str, float]:
    """Plain / NOAH, the least over shapes and numbers of classes, for every batch size and kind of step."""
    return {step: min(values) for step, values in _ratios(rows).items()}


def mean_ratios(rows: Sequence[Row], num_classes: int = 1000) -> Dict[str, float]:
    """Plain / NOAH, the geometric mean over the shapes at so many classes, for every batch size and kind of step."""
    ratios = _ratios([row for row in rows if row['case']['num_classes'] == num_classes])
    return {step: statistics.geometric_mean(values) for step, values in ratios.items()}


def _ratios(rows: Sequence[Row]) -> Dict[str, List[float]]:
    """Plain / NOAH of every batch size and kind of step."""
    ratios: Dict[str, List[float]] = {}
    for row in rows:
        if row['head'] == 'noah' and 'plain_by_this' in row:
            ratios.setdefault(_step(row['case']), []).append(row['plain_by_this']['median'])
    return ratios


def _by_step(values: Dict[str, float]) -> str:
    return '; '.join(f'{step}: {value:.2f}' for step, value in values.items())


def table_costs(rows: Sequence[Row]) -> str:
    """A line per case and head: time, peak memory, and what is kept for backward, and its share of the plain form's."""
    lines, others = [], _plain_forms(rows)
    for group in by_case(rows):
        plain = next(row for row in group if row['head'] == 'plain').get('saved_bytes')
        for row in group:
            case = row['case']
            share = f' ({row["saved_bytes"] / plain:.1%} of plain)' if plain and 'saved_bytes' in row else ''
            lines.append([
                *(f'{case[name]:,}' for name in ('num_classes', 'positions', 'batch_size')), STEPS[case['training']],
                HEAD_LOOKS[row['head']][0], row.get('skipped') or _cell(row, 'seconds'),
                *(_faster(row, other) for other in others), _cell(row, 'peak_bytes'),
                _cell(row, 'saved_bytes') + share])
    return table([
        'K', 'L', 'batch', 'step', 'head', 'ms', *(f'{other} / this' for other in others), 'peak memory, MiB',
        'kept for backward, MiB'], lines)


def table_pairs(rows: Sequence[Row]) -> str:
    """A line per pair, which pairs keep less speed than in the paper, and how much is lost on average."""
    lines = [
        [*_pair(row), f'{100 * row["paper_kept"]:.1f}', f'{row["lost_by_paper_lost"]:.2f}'] for row in rows]
    header = [*PAIR_HEADER, "the paper's, %", "lost / paper's"]
    mean = mean_losses(rows)
    return (
        f'{table(header, lines)}\n\n'
        f"Below the paper's: {len(mean['below_paper'])} of {len(rows)} ({', '.join(mean['below_paper']) or 'none'}). "
        f"Mean loss of speed: {mean['lost']:.1%}; the paper's on the same pairs: {mean['paper_lost']:.1%}; "
        f"{mean['lost'] / mean['paper_lost']:.2f} of it.")


def table_train_pairs(rows: Sequence[Row]) -> str:
    """A line per pair, and how much speed of a training step is lost on average."""
    return f'{table(PAIR_HEADER, map(_pair, rows))}\n\nMean loss of speed: {mean_loss(rows)["lost"]:.1%}.'


def mean_loss(rows: Sequence[Row]) -> Dict[str, float]:
    """The share of speed that the pairs lose on average."""
    return {'lost': 1 - statistics.mean(row['kept']['median'] for row in rows)}


def mean_losses(rows: Sequence[Row]) -> Dict[str, Any]:
    """The share of speed that the pairs lose on average, here and in the paper, and which lose more than there."""
    return {
        'below_paper': [row['model'] for row in rows if row['kept']['median'] < row['paper_kept']],
        **mean_loss(rows),
        'paper_lost': 1 - statistics.mean(row['paper_kept'] for row in rows)}


def draw_head(rows: Sequence[Row]) -> Figure:
    """A panel per batch size and kind of step; shapes from left to right."""
    def draw(axes: Axes, chosen: Sequence[Row]) -> None:
        _side_by_side(axes, chosen, 'seconds', [_shape(group[0]['case']) for group in by_case(chosen)])

    return _panels(rows, draw)


def draw_classes(rows: Sequence[Row]) -> Figure:
    """A panel per batch size and kind of step, plain / NOAH over the number of classes, a line per shape."""
    def draw(axes: Axes, chosen: Sequence[Row]) -> None:
        for shape in dict.fromkeys(_features(row['case']) for row in chosen):
            drawn = [row for row in chosen if _features(row['case']) == shape]
            q1, median, q3 = (np.array([row['plain_by_this'][name] for row in drawn]) for name in QUARTILES)
            classes = [row['case']['num_classes'] for row in drawn]
            axes.errorbar(classes, median, [median - q1, q3 - median], fmt='o-', capsize=2, markersize=5, label=shape)
        axes.axhline(1, color='black', linewidth=0.8)
        axes.set(xscale='log', yscale='log', xlabel='number of classes', ylabel='plain / NOAH')
        axes.grid(alpha=0.3, which='both')

    return _panels([row for row in rows if row['head'] == 'noah' and 'plain_by_this' in row], draw)


def draw_training(rows: Sequence[Row]) -> Figure:
    """A panel each for time, peak memory and what is kept for backward."""
    figure = Figure(figsize=(13, 4.5), layout='constrained')
    cases = [group[0]['case'] for group in by_case(rows)]
    for axes, key in reversed([*zip(figure.subplots(1, len(FIGURES)), FIGURES)]):  # the first has every head
        _side_by_side(axes, rows, key, [f'{_classes(case)}\nbatch {case["batch_size"]}' for case in cases])
        axes.set_title(f'{FIGURES[key][0]}, {STEPS[True]}')
    return _with_legend(figure, axes)


def draw_growth(rows: Sequence[Row]) -> Figure:
    """Time and peak memory, over the number of classes and over that of positions."""
    figure = Figure(figsize=(10, 8), layout='constrained')
    fixed = {'num_classes': ('positions', 'L', 49), 'positions': ('num_classes', 'K', 1000)}
    for line, key in zip(figure.subplots(2, 2), ('seconds', 'peak_bytes')):
        for axes, (grows, (other, letter, size)) in zip(line, fixed.items()):
            chosen = sorted(
                (row for row in rows if row['case'][other] == size and key in row), key=lambda row: row['case'][grows])
            for label in dict.fromkeys(map(_label, chosen)):
                drawn = [row for row in chosen if _label(row) == label]
                style = 'o-' if drawn[0]['case']['training'] else 'o--'
                _errorbars(axes, [row['case'][grows] for row in drawn], drawn, key, style, label)
            name, unit, _ = FIGURES[key]
            axes.set(
                xscale='log', yscale='symlog' if unit == 'MiB' else 'log', xlabel=grows.replace('num_', 'number of '),
                ylabel=f'{name}, {unit}', title=f'{name}, {letter}={size}')
            if unit == 'MiB':
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    return _with_legend(figure, axes, ncols=2)


def draw_pairs(rows: Sequence[Row]) -> Figure:
    """The share of speed that every pair keeps, and the paper's where there is one."""
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(rows)), layout='constrained')
    axes = figure.subplots()
    y = np.arange(len(rows))
    q1, median, q3 = (np.array([100 * row['kept'][name] for row in rows]) for name in QUARTILES)
    axes.errorbar(
        median, y, xerr=[median - q1, q3 - median], fmt='o', color=HEAD_LOOKS['noah'][1], capsize=2, label='here')
    if 'paper_kept' in rows[0]:
        axes.plot([100 * row['paper_kept'] for row in rows], y, 'D', color='#D55E00', label='paper, Table XVII')
    axes.set_yticks(y, [f'{row["model"]}, batch {row["batch_size"]}' for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel='speed of NOAH, % of the vanilla twin', title='share of speed that is kept')
    axes.grid(alpha=0.3)
    return _with_legend(figure, axes)


def table_probe(rows: Sequence[Row]) -> str:
    """A line per head, and what they were trained on."""
    case = rows[0]['case']
    lines = [[
        HEAD_LOOKS[row['head']][0], f'{row["params"]:,}', _mean(row['top1']),
        ', '.join(f'{value:.2f}' for value in row['top1']['each']),
        f'{row["lr"]:g}{" (edge)" if row["lr_at_edge"] else ""}', _number(statistics.mean(row['seconds']))]
        for row in rows]
    header = ['head', 'parameters', 'test top-1, %', 'each seed', 'learning rate', 'seconds of training']
    rates = ', '.join(f'{rate:g}' for rate in case['lrs'])
    edge = '; (edge): the least or largest that was tried' if any(row['lr_at_edge'] for row in rows) else ''
    return (
        f'{table(header, lines)}\n\n'
        f'{_probed(case)}; {case["updates"]:,} updates of {min(case["batch_size"], case["train_images"])} images; '
        f'learning rates {rates}, and beyond where the best is at an end{edge}.')


def _probed(case: Dict[str, Any]) -> str:
    return (
        f'{case["model"]} on {case["dataset"]}: {case["train_images"]:,} training and {case["test_images"]:,} test '
        f'images, L={case["positions"]}, C={case["in_features"]}, K={case["num_classes"]}')


def _mean(stats: Dict[str, Any]) -> str:
    return f'{stats["mean"]:.2f}' + ('' if stats['std'] is None else f' ± {stats["std"]:.2f}')


def draw_probe(rows: Sequence[Row]) -> Figure:
    """Accuracy, with its standard deviation, over the number of parameters; every seed a dot; the legend best first."""
    figure = Figure(figsize=(9, 5), layout='constrained')
    axes = figure.subplots()
    drawn = []
    for row in sorted(rows, key=lambda row: -row['top1']['mean']):
        label, color, top1, params = *HEAD_LOOKS[row['head']], row['top1'], row['params']
        while any(1 / 1.08 < params / other < 1.08 for other in drawn):
            params *= 1.1
        drawn.append(params)
        axes.plot([params] * len(top1['each']), top1['each'], '.', color=color, markersize=4, alpha=0.6)
        axes.errorbar(
            params, top1['mean'], top1['std'] or 0., fmt=MARKERS[row['head']], color=color, capsize=3, markersize=7,
            label=f'{label}\n{row["params"]:,}')
    axes.set(
        xscale='log', xlabel='parameters of the head (almost equal ones side by side)', ylabel='test top-1, %')
    axes.set_title(_probed(rows[0]['case']), fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside right upper', fontsize=9, labelspacing=0.8)
    return figure


def by_case(rows: Sequence[Row]) -> List[List[Row]]:
    """The rows of every case, which follow one another."""
    return [list(group) for _, group in itertools.groupby(rows, lambda row: row['case'])]


def _side_by_side(axes: Axes, rows: Sequence[Row], key: str, labels: Sequence[str]) -> None:
    heads = list(dict.fromkeys(row['head'] for row in rows))
    for place, head in enumerate(heads):
        drawn = {  # from where it is drawn to the row
            i + (place - (len(heads) - 1) / 2) * 0.12: row
            for i, group in enumerate(by_case(rows)) for row in group if row['head'] == head and key in row}
        _errorbars(axes, list(drawn), list(drawn.values()), key, 'o', HEAD_LOOKS[head][0])
    unit = FIGURES[key][1]
    axes.set(ylabel=unit, yscale='symlog' if unit == 'MiB' else 'log', xlim=(-0.5, len(labels) - 0.5))
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.grid(alpha=0.3)


def _panels(rows: Sequence[Row], draw: Callable[[Axes, Sequence[Row]], None]) -> Figure:
    """A panel per batch size and kind of step, three to a line."""
    steps = list(dict.fromkeys(_step(row['case']) for row in rows))
    lines = -(-len(steps) // 3)
    figure = Figure(figsize=(15, 0.6 + 4.2 * lines), layout='constrained')
    for place, step in enumerate(steps, 1):
        axes = figure.add_subplot(lines, min(len(steps), 3), place)
        draw(axes, [row for row in rows if _step(row['case']) == step])
        axes.set_title(step)
    return _with_legend(figure, axes)


def _with_legend(figure: Figure, axes: Axes, ncols: int = 6) -> Figure:
    figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=ncols, fontsize=9)
    return figure


def _errorbars(axes: Axes, x: Sequence[float], rows: Sequence[Row], key: str, style: str, label: str) -> None:
    if not rows:
        return
    stats = [row[key] if isinstance(row[key], dict) else dict.fromkeys(QUARTILES, row[key]) for row in rows]
    q1, median, q3 = (np.array([s[name] for s in stats]) * FIGURES[key][2] for name in QUARTILES)
    color = HEAD_LOOKS[rows[0]['head']][1]
    axes.errorbar(x, median, [median - q1, q3 - median], fmt=style, color=color, capsize=2, markersize=5, label=label)


def _label(row: Row) -> str:
    return f'{HEAD_LOOKS[row["head"]][0]}, {_step(row["case"])}'


def _step(case: Dict[str, Any]) -> str:
    return f'batch {case["batch_size"]}, {STEPS[case["training"]]}{", cached features" if case.get("cached") else ""}'


def _plain_forms(rows: Sequence[Row]) -> List[str]:
    return [head for head in PLAIN_FORMS if any(row['head'] == head for row in rows)]


def _faster(row: Row, other: str) -> str:
    key = f'{other}_by_this'
    return _number(row[key]['median']) if key in row else '-'


def _classes(case: Dict[str, Any]) -> str:
    return f'K={case["num_classes"]:,}'


def _shape(case: Dict[str, Any]) -> str:
    return f'{_features(case)}\n{_classes(case)}'


def _features(case: Dict[str, Any]) -> str:
    r = 1 / case['key_ratio']
    return f'C={case["in_features"]}, L={case["positions"]}\nN={case["num_groups"]}, r=1/{r:.0f}'


def _number(value: float) -> str:
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'


def _quartiles(stats: Dict[str, float], scale: float = 1.) -> str:
    return '{} ({}–{})'.format(*(_number(stats[name] * scale) for name in ('median', 'q1', 'q3')))


def _pair(row: Row) -> List[Any]:
    speeds = [_quartiles(row[key]) for key in ('images_per_second', 'vanilla_images_per_second')]
    return [row['model'], row['batch_size'], *speeds, _quartiles(row['kept'], 100)]


def _cell(row: Row, key: str) -> str:
    if key not in row:
        return '-'
    scale = FIGURES[key][2]
    return _quartiles(row[key], scale) if isinstance(row[key], dict) else _number(row[key] * scale)
