"""Images that cannot be read, found beforehand and left out."""
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from noah_zoo.data.damage import leave_out_damaged, scan
from noah_zoo.data.factory import create_dataset, create_datasets
from noah_zoo.data.images import DamagedImageError

from ..commands import call
from .files import DAMAGED, config, load, make_folder


@pytest.fixture
def damaged_folder(tmp_path):
    make_folder(tmp_path, {'a': 6, 'b': 6})
    for i, (name, (content, _)) in enumerate(DAMAGED.items()):
        (tmp_path / 'train' / 'ab'[i % 2] / name).write_bytes(content)
    (tmp_path / 'validation/a/0.png').write_bytes(b'')
    return tmp_path


def test_damage_stops_a_worker_with_the_path(damaged_folder):
    train_set, _ = create_datasets(config(damaged_folder))
    train_set.transform = np.array
    with pytest.raises(DamagedImageError, match='train/./[a-z]+.(jpg|png): not a readable image: '):
        load(train_set, batch_size=3, num_workers=2)


def in_a_new_process(*words):
    return subprocess.run(
        [sys.executable, '-m', 'noah_zoo', *words], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize('run', [call, pytest.param(in_a_new_process, marks=pytest.mark.process)])
def test_damage_ends_a_training_in_a_line(run, tmp_path):
    make_folder(tmp_path, {'a': 9, 'b': 9})
    (tmp_path / 'train/a/zz.png').write_bytes(b'text')
    done = run(  # with workers that have more to send
        'finetune', '--model', 'mobilenetv2_035_noah.fashion_mnist', '--dataset', 'folder', '--data-dir', tmp_path,
        '--img-size', '32', '-b', '2', '--workers', '2', '--epochs', '1', '--cpu', '--output', tmp_path / 'run')
    assert done.returncode == 2
    assert re.fullmatch(
        'noah-zoo finetune: error: .*zz.png: not a readable image: [^:]*; --check-data finds all such images, '
        '--skip-damaged leaves them out', done.stderr.splitlines()[-1])


@pytest.mark.parametrize('workers', [0, 2])
def test_skip_damaged(workers, damaged_folder, caplog):
    whole, _ = create_datasets(config(damaged_folder))
    found = scan(whole, workers).damaged
    assert sorted(Path(whole.where(i)).name for i in found) == sorted(DAMAGED) and list(found) == sorted(found)
    for index, reason in found.items():
        assert DAMAGED[Path(whole.where(index)).name][1].lower() in reason.lower()
    with caplog.at_level(logging.WARNING):
        train_set, val_set = create_datasets(config(damaged_folder, skip_damaged=True, workers=workers))
    assert f'left out {len(DAMAGED)} of {12 + len(DAMAGED)} images' in caplog.text
    assert f'{damaged_folder}/validation/a/0.png: not a readable image: the file is empty' in caplog.text
    assert train_set.damaged == {whole.where(i): reason for i, reason in found.items()}
    assert val_set.damaged == {str(damaged_folder / 'validation/a/0.png'): 'the file is empty'}
    assert (len(train_set), len(val_set)) == (12, 11)
    assert scan(train_set).damaged == {} and train_set.read(0)[1] == 0 and train_set.read(11)[1] == 1


def test_known_damage_is_not_looked_for(damaged_folder, monkeypatch):
    first = create_datasets(config(damaged_folder, skip_damaged=True))
    monkeypatch.setattr('noah_zoo.data.damage.scan', None)
    again = create_datasets(config(damaged_folder, skip_damaged=True), {**first[0].damaged, **first[1].damaged})
    for a, b in zip(first, again):
        assert a.rows.tolist() == b.rows.tolist() and a.damaged == b.damaged


def test_nothing_but_damage(tmp_path):
    make_folder(tmp_path, {'a': 2})
    for path in (tmp_path / 'train/a').iterdir():
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='all 2 images are damaged, as is .*0.png'):
        leave_out_damaged(create_dataset('folder', str(tmp_path), 'train'))


SHARES = """
import sys, torch
from noah_zoo.data.factory import create_dataset
from noah_zoo.data.base import VALIDATION
from noah_zoo.data.damage import scan
rank, root, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group('gloo', init_method=f'file://{port}', rank=rank, world_size=2)
images = create_dataset('folder', root, 'train')
reads, read = [], images.read
images.read = lambda index: (reads.append(index), read(index))[1]
print(sorted(scan(images).damaged), len(reads))
"""


def test_shares_of_two_processes(damaged_folder, monkeypatch):
    images = create_dataset('folder', str(damaged_folder), 'train')
    expected = scan(images).damaged
    known, seen = [], []
    monkeypatch.setattr(images, 'read', lambda index: seen.append(index) or type(images).read(images, index))
    for name, value in (('is_initialized', True), ('get_world_size', 2), ('get_rank', 0)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)

    def gather(parts, found):
        known.append(found)
        parts[:] = [({}, [])] * (2 - len(known)) + known[::-1]
    monkeypatch.setattr(torch.distributed, 'all_gather_object', gather)
    first = scan(images).damaged
    assert sorted(seen) == list(range(0, len(images), 2))
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda: 1)
    assert first == {index: reason for index, reason in expected.items() if index % 2 == 0}
    both = scan(images).damaged
    assert sorted(seen) == list(range(len(images)))
    assert list(both.items()) == list(expected.items())  # of both, in order


@pytest.mark.process
def test_processes_read_a_share_each_and_agree(damaged_folder, tmp_path_factory):
    images = create_dataset('folder', str(damaged_folder), 'train')
    port = tmp_path_factory.mktemp('store') / 'file'
    processes = [subprocess.Popen(
        [sys.executable, '-c', SHARES, str(rank), str(damaged_folder), str(port)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]  # by gloo, too
    answers = [text.splitlines()[-1].rsplit(' ', 1) for text in printed]
    assert [answer for answer, _ in answers] == [str(list(scan(images).damaged))] * 2
    assert sum(int(reads) for _, reads in answers) == len(images)


def test_datasets_go_to_spawned_workers(damaged_folder):
    images = create_dataset('folder', str(damaged_folder), 'validation')
    copy = pickle.loads(pickle.dumps(images))
    assert len(copy) == len(images) and copy.where(3) == images.where(3) and copy.read(3)[1] == images.read(3)[1]
    assert np.array_equal(np.asarray(copy.read(3)[0]), np.asarray(images.read(3)[0]))
