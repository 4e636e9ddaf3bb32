"""Tasks as objects: names, a task of one's own from its file to a card, and what all of them are asked."""
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from noah_zoo.publish.run_card import run_card
from noah_zoo.tasks import TASKS, Multiclass, find_task, register_task
from noah_zoo.training import configure, train
from noah_zoo.training.report import report
from noah_zoo.training.validate import validate

from ..pictures import make_market, make_photos

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = 'mobilenetv2_035_noah.fashion_mnist'


def test_names():
    assert list(TASKS) == ['multiclass', 'multilabel', 'reid'] == [task.name for task in TASKS.values()]
    for task in TASKS.values():
        assert task.on_card.keys() <= task.figures.keys() and task.metric == next(iter(task.figures))
        assert register_task(task) is task
    for call in (
            lambda: find_task('foo'), lambda: validate(SHIPPED, task='foo'),
            lambda: train(configure(SHIPPED, 'out', task='foo'))):
        with pytest.raises(ValueError, match="^task='foo' is not one of multiclass, multilabel, reid; one of your own"):
            call()

    class Other(Multiclass):
        pass

    with pytest.raises(ValueError, match="task='multiclass' is built in; choose another name"):
        register_task(Other())
    Other.name = 'other'
    try:
        for _ in range(2):  # a cell of a notebook
            again = register_task(type('Other', (Multiclass,), {'name': 'other'})())
        assert find_task('other') is again
    finally:
        TASKS.pop('other', None)


def run_file(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    try:
        runpy.run_path(str(path))
    finally:
        TASKS.pop('focal', None)


def run_file_in_a_new_process(path, monkeypatch):
    done = subprocess.run(
        [sys.executable, path.name], cwd=path.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('run', [run_file, pytest.param(run_file_in_a_new_process, marks=pytest.mark.docs)])
def test_a_task_of_ones_own(run, tmp_path, monkeypatch, curves):
    text = (ROOT / 'docs' / 'train.md').read_text(encoding='utf-8')
    code = re.search(r'```python\n(from .*?register_task.*?)```', text, re.S)[1]
    (tmp_path / 'focal.py').write_text(code)
    make_photos(tmp_path / 'photos')
    run(tmp_path / 'focal.py', monkeypatch)
    run, = (tmp_path / 'runs').iterdir()
    summary = json.loads((run / 'summary.json').read_text())
    assert summary['config']['task'] == 'focal' and 0 <= summary['worst'] <= 100
    assert summary['best']['worst'] == max(json.loads(x)['worst'] for x in (run / 'log.jsonl').open())
    assert (run / 'curve.png').stat().st_size > 1000
    with pytest.raises(ValueError, match="task='focal' is not one of"):  # its file is not imported here
        report([str(run)])


def test_reid_as_any_other(tmp_path):
    make_market(tmp_path / 'market')
    summary = train(configure(
        'noah', str(tmp_path / 'run'), 'reid', task='reid', dataset='market1501', data_dir=str(tmp_path / 'market'),
        model_kwargs=dict(backbone='test_resnet'), epochs=1, batch_size=4, img_size=64, workers=0, cpu=True))
    best = f'local-dir:{tmp_path / "run" / "best"}'
    found = validate(best, 'market1501', 'reid', str(tmp_path / 'market'), 'test', cpu=True, workers=0)
    assert {key: found[key] for key in ('rank1', 'rank5', 'rank10', 'mAP', 'queries')} == pytest.approx(
        {key: summary[key] for key in ('rank1', 'rank5', 'rank10', 'mAP', 'queries')}, abs=1e-4)
    assert found['images'] == 18
    card = run_card(tmp_path / 'run', 'you/persons')
    assert card.data.pipeline_tag == 'image-feature-extraction'
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ('mAP', summary['mAP']), ('cmc', summary['rank1'])}
    assert f'mAP {summary["mAP"]:.2f} %; Rank-1 {summary["rank1"]:.2f} %' in card.text
    assert 'embedding @ embedding.T' in card.text and 'topk' not in card.text
    assert f'best mAP {summary["mAP"]:.2f}' and '| test mAP, mean' in report([str(tmp_path / 'run')])
    with pytest.raises(ValueError, match='market1501 is for --task reid, and the task is multiclass'):
        validate(best, 'market1501', data_dir=str(tmp_path / 'market'), split='test', cpu=True)


def test_no_picture(idx_dir, tmp_path):
    with pytest.raises(ValueError, match="picture='.*a.png': the task multiclass has none"):
        validate(SHIPPED, data_dir=str(idx_dir), picture=str(tmp_path / 'a.png'), cpu=True, workers=0)
