"""The learning curve of a run as a picture."""
import json
import math
from pathlib import Path
from typing import Dict

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import save_figure


def draw_curve(log: Path, path: Path, title: str, figures: Dict[str, str], best_epoch: int) -> None:
    """Draw loss and figures over epochs from a run's `log.jsonl`.

    Args:
        log: The log, a line per epoch.
        path: The PNG to write.
        title: Title of the picture.
        figures: `Task.figures`; the title gives the first one in the best epoch.
        best_epoch: The best epoch.
    """
    records = [  # null is what was no number
        {k: math.nan if v is None else v for k, v in json.loads(line).items()}
        for line in log.read_text(encoding='utf-8').splitlines()]
    epochs = [record['epoch'] for record in records]
    figure = Figure(figsize=(9, 3.5), layout='constrained')
    losses, accuracy = figure.subplots(1, 2)
    for key, label, style in (('train_loss', 'training', '-'), ('val_loss', 'evaluation', '--')):
        if key in records[0]:
            losses.plot(epochs, [record[key] for record in records], style, marker='.', label=label)
    losses.set(xlabel='epoch', ylabel='loss', title=title)
    drawn = [key for key in figures if key in records[0]]
    for key, style in zip(drawn, ('-', '--', ':')):
        accuracy.plot(epochs, [record[key] for record in records], style, marker='.', label=figures[key])
    first = drawn[0]
    best = next(record[first] for record in records if record['epoch'] == best_epoch)
    accuracy.set(xlabel='epoch', ylabel='%', title=f'best {figures[first]} {best:.2f} in epoch {best_epoch}')
    for axes in (losses, accuracy):
        axes.legend()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)
