"""The table over seeds, from the summaries that `noah-zoo train` writes."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from noah_zoo.layers.ablations import VARIANTS
from noah_zoo.training.report import report

from ..commands import call

ROOT = Path(__file__).resolve().parents[2]


def write(folder, model, seed, top1, **config):
    folder = folder / f'{model}-{seed}'
    folder.mkdir(parents=True)
    summary = {
        'config': {'model': model, 'seed': seed, 'epochs': 3, **config}, 'top1': top1, 'seconds': 100 + seed,
        'params': 1234567}
    (folder / 'summary.json').write_text(json.dumps(summary))


def test_mean_and_spread(tmp_path):
    for seed, top1 in ((2, 93.0), (0, 90.0), (1, 91.5)):
        write(tmp_path, 'a_noah', seed, top1)
    write(tmp_path, 'a', 0, 80.25)
    lines = report([str(tmp_path)]).splitlines()
    assert lines[2] == '| a | 1,234,567 | 1 | 80.25 | 80.25 | 100 |'
    assert lines[3] == '| a_noah | 1,234,567 | 3 | 91.50 ± 1.50 | 90.00, 91.50, 93.00 | 101 |'


def test_unequal_budgets_are_not_compared(tmp_path):
    write(tmp_path, 'a', 0, 90.)
    write(tmp_path, 'b', 0, 91., epochs=30)  # another pair
    report([str(tmp_path)])
    write(tmp_path, 'a_noah', 0, 91., epochs=30)
    with pytest.raises(ValueError, match='differs from .* in epochs'):
        report([str(tmp_path)])


def in_a_new_process(*words):
    return subprocess.run(
        [sys.executable, '-m', 'noah_zoo', *words], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize('run', [call, pytest.param(in_a_new_process, marks=pytest.mark.process)])
def test_nothing_to_report(run, tmp_path):
    result = run('report', tmp_path)
    assert result.returncode == 2 and 'no summary.json of a finished run' in result.stderr
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('page, folder', [
    ('docs/numbers.md', 'fashion_mnist'), ('docs/numbers.md', 'fashion_mnist_pairs'),
    ('docs/ablations.md', 'ablations')])
def test_the_figures_of_the_docs(page, folder):
    # A table is what the command beside it prints.
    table = report([str(ROOT / 'results' / folder)])
    assert table in (ROOT / page).read_text(encoding='utf-8')


def test_the_ablations_are_all_there():
    heads = [line.split('|')[1].split()[1:] for line in report([str(ROOT / 'results' / 'ablations')]).splitlines()[2:]]
    variants = [word.partition('=')[2] for head in heads for word in head if word.startswith('noah_variant=')]
    assert sorted(variants) == sorted(VARIANTS) and len(heads) == 2 + 5 + len(VARIANTS)  # twin, NOAH, Table VI
