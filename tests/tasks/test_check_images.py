"""Images of which a task can make nothing, found before the first step; and the fewest that it can do with."""
import csv
import json
import math

import pytest
import torch

from noah_zoo.data.factory import check_data
from noah_zoo.tasks import find_task
from noah_zoo.tasks.multilabel import Metrics
from noah_zoo.training import configure, train
from noah_zoo.training.curve import draw_curve
from noah_zoo.training.run_folder import RunFolder

from ..data.files import make_folder, photo


def make_csv(root, **splits):
    root.mkdir()
    for split, labels in splits.items():
        rows = [(f'{split}{i}.png', text) for i, text in enumerate(labels)]
        for i, (name, _) in enumerate(rows):
            photo(i).save(root / name)
        with open(root / f'{split}.csv', 'w', newline='') as file:
            csv.writer(file).writerows([('file_name', 'labels'), *rows])


def make_persons(root, query, gallery):
    for folder, persons in (
            ('bounding_box_train', [(1, 1), (1, 2), (2, 1), (2, 2)]), ('query', query), ('bounding_box_test', gallery)):
        (root / folder).mkdir(parents=True)
        for i, (identity, camera) in enumerate(persons):
            photo(i).save(root / folder / f'{identity:04}_c{camera}s1_{i:06}_00.jpg')


CASES = {
    'one class': (
        dict(dataset='folder'), lambda root: make_folder(root, {'only': 4}),
        r'the training images have 1 class \(only\); expected 2 or more'),
    'no positives to evaluate': (
        dict(dataset='csv', task='multilabel'), lambda root: make_csv(root, train=['a', 'b', ''], validation=['', '']),
        'none of the 2 validation images has a class'),
    'one camera': (
        dict(dataset='market1501', task='reid'), lambda root: make_persons(root, [(7, 1), (8, 1)], [(7, 1), (8, 1)]),
        'none of the 2 queries has an image of the same identity by another camera in the gallery; the cameras are 1'),
    'no match': (
        dict(dataset='market1501', task='reid'), lambda root: make_persons(root, [(7, 1)], [(8, 2), (9, 2)]),
        'none of the 1 queries has'),
}


@pytest.mark.parametrize('name', CASES)
def test_refused_before_the_first_step(name, tmp_path):
    settings, make, message = CASES[name]
    make(tmp_path / 'data')
    config = configure(
        'mobilenetv2_035_noah', str(tmp_path / 'run'), 'none', data_dir=str(tmp_path / 'data'), workers=0, cpu=True,
        **settings)
    task = find_task(config.task)
    for function in (train, lambda config: check_data(config, task.reads, task.check_images)):
        with pytest.raises(ValueError, match=message):
            function(config)
    assert not (tmp_path / 'run').exists()


def test_a_defect_or_nothing(tmp_path):
    make_csv(tmp_path / 'data', train=['defect', ''] * 4, validation=['defect', '', ''])
    config = configure(
        'mobilenetv2_035_noah', str(tmp_path / 'run'), 'none', dataset='csv', data_dir=str(tmp_path / 'data'),
        task='multilabel', loss='bce', img_size=32, batch_size=4, epochs=1, workers=0, cpu=True)
    assert 'all of them readable' in check_data(config, 'multilabel', find_task('multilabel').check_images)
    summary = train(config)
    assert 0 < summary['mAP'] <= 100 and (tmp_path / 'run/best/model.safetensors').exists()
    assert 'defect,1,' in (tmp_path / 'run/per_class.csv').read_text()


def test_figures_of_one_class_are_those_of_two_that_are_alike():
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 1), torch.randint(2, (40, 1))
    found = []
    for columns in (1, 2):
        metrics = Metrics(columns, torch.device('cpu'))
        for start in (0, 25):
            rows = slice(start, start + 25)
            metrics.update(logits[rows].repeat(1, columns), targets[rows].repeat(1, columns))
        found.append(metrics.compute())
    assert found[0] == pytest.approx(found[1])


def test_no_number_is_null_in_the_log(tmp_path):
    folder = RunFolder(str(tmp_path))
    for epoch, top1 in ((1, math.nan), (2, 50.), (3, math.inf)):
        folder.add({'epoch': epoch, 'train_loss': 1., 'val_loss': math.nan, 'top1': top1})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in folder.log.read_text().splitlines()]
    assert [line['top1'] for line in lines] == [None, 50., None]
    draw_curve(folder.log, tmp_path / 'curve.png', 'a run', {'top1': 'top-1'}, 2)
