"""Images that come one after the other: the Hub, and shards."""
import hashlib
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from noah_zoo.config import TrainConfig
from noah_zoo.data.factory import create_dataset, create_datasets
from noah_zoo.data.images import DamagedImageError
from noah_zoo.training import train

from .files import EXPECTED, GREYS, config, encode, make_hub, make_shards, photo, pixels, png, pngs, samples


def test_hfids(tmp_path, caplog):
    make_hub(tmp_path / 'Hub', pngs(8))
    name, cache = f'hfids/{tmp_path / "Hub"}', str(tmp_path / 'cache')
    stream = create_dataset(name, cache, 'train')
    assert stream.class_names == ('cat', 'dog') and len(stream) == 8
    for workers in (0, 2):
        assert pixels(stream, num_workers=workers)[0] == EXPECTED
    stream.input_img_mode = 'L'
    assert pixels(stream)[0] == {np.asarray(photo(i).convert('L')).tobytes(): i % 2 for i in range(8)}
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        training = create_dataset(name, cache, 'train', training=True, seed=seed)
        training.set_epoch(epoch)
        found, order = pixels(training)
        assert found == EXPECTED and len(order) == len(training) == 8
        orders.add(tuple(order))
    assert len(orders) == 3
    with pytest.raises(ValueError, match='no stream'):
        create_datasets(config(cache, dataset=name, val_fraction=0.5))
    train_set, val_set = create_datasets(config(cache, dataset=name, val_split='train'))
    assert train_set.training and not val_set.training


def test_damage_in_hfids(tmp_path, caplog):
    rows = pngs(8)
    rows[5] = rows[5][:100]
    make_hub(tmp_path / 'hub', rows)
    name, cache = f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache')
    with pytest.raises(DamagedImageError, match=r'hub\[train\] sample 1 of worker 1: not a readable image'):
        pixels(create_dataset(name, cache, 'train'), num_workers=2)
    stream = create_dataset(name, cache, 'train', skip_damaged=True)
    with caplog.at_level(logging.WARNING):
        assert len(pixels(stream)[0]) == 7
    assert stream.skipped == 1 and 'sample 5 of worker 0: not a readable image' in caplog.text
    assert len(pixels(stream, num_workers=2)[0]) == 7 and stream.skipped == 2


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_of_a_damaged_stream_is_whole(workers, tmp_path):
    rows = pngs(8)
    rows[5] = rows[5][:100]
    make_hub(tmp_path / 'hub', rows)
    stream = create_dataset(
        f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train', training=True, skip_damaged=True)
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        found, order = pixels(stream, num_workers=workers)
        assert len(order) == len(stream) == 8 and len(found) == 7 and stream.skipped == epoch + 1
    make_hub(tmp_path / 'broken', [b'no image'] * 4)
    stream = create_dataset(
        f'hfids/{tmp_path / "broken"}', str(tmp_path / 'cache'), 'train', training=True, skip_damaged=True)
    with pytest.raises(ValueError, match='all images that this process reads are damaged'):
        pixels(stream)


def test_16_bit_in_hfids_and_no_class_names(tmp_path):
    data = png(7, 9, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in GREYS))
    make_hub(tmp_path / 'hub', [data])
    image, _ = next(iter(create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train')))
    assert np.array_equal(np.asarray(image)[..., 0], GREYS // 256)
    make_hub(tmp_path / 'hub', [data], labels=[-1])
    with pytest.raises(ValueError, match='the label is -1'):
        next(iter(create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache2'), 'train')))
    with pytest.raises(ValueError, match="no column 'img'"):
        create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train', input_key='img')
    with pytest.raises(ValueError, match="column 'fine' has no class names"):
        create_dataset(f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache'), 'train', target_key='fine')


@pytest.fixture
def webdataset():
    return pytest.importorskip('webdataset')


def test_wds(tmp_path, webdataset):
    root = make_shards(tmp_path, [samples(0, 5), samples(5, 8)])
    stream = create_dataset('wds/', root, 'train')
    assert stream.class_names == ('cat', 'dog') and len(stream) == 8
    for workers in (0, 1, 2, 3):  # a third worker has no shard
        found, order = pixels(stream, num_workers=workers)
        assert found == EXPECTED and len(order) == 8
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        stream = create_dataset('wds/', root, 'train', training=True, seed=seed)
        stream.set_epoch(epoch)
        found, order = pixels(stream)
        assert found == EXPECTED and len(order) == 8
        assert orders.setdefault((seed, epoch), order) == order
    assert len(set(map(tuple, orders.values()))) == 3
    stream.set_loader_cfg(2, batch_size=3)
    found, order = pixels(stream, num_workers=2)  # 6 each, of shards of 5 and 3
    assert found == EXPECTED and len(order) == len(stream) == 12
    with pytest.raises(ValueError, match='2 shards are too few for 1 processes of 3 workers'):
        pixels(stream, num_workers=3)


def test_wds_epoch_reaches_workers_that_stay(tmp_path, webdataset):
    stream = create_dataset('wds/', make_shards(tmp_path, [samples(0, 4), samples(4, 8)]), 'train', training=True)
    stream.transform = np.array
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([image.numpy().tobytes() for image, _ in loader])
    assert orders[0] == orders[2] != orders[1]


def test_damage_in_wds(tmp_path, webdataset, caplog):
    shards = [samples(0, 4), samples(4, 8)]
    shards[1][2] = ('broken', b'', 0)
    root = make_shards(tmp_path, shards)
    with pytest.raises(DamagedImageError, match=r'wds/\[train\] train-1.tar broken: not a readable image: the file is'):
        pixels(create_dataset('wds/', root, 'train'), num_workers=2)
    stream = create_dataset('wds/', root, 'train', skip_damaged=True)
    with caplog.at_level(logging.WARNING):
        assert len(pixels(stream)[0]) == 7
    assert stream.skipped == 1 and 'train-1.tar broken: not a readable image' in caplog.text
    shards[1][2] = ('label', encode(photo(), 'png'), 'dog')
    with pytest.raises(ValueError, match='train-1.tar label: no label'):
        pixels(create_dataset('wds/', make_shards(tmp_path, shards), 'train'))
    shards[1][2] = ('label', encode(photo(), 'png'), 2)
    with pytest.raises(ValueError, match='train-1.tar label: the label is 2, accepted are 0 to 1'):
        pixels(create_dataset('wds/', make_shards(tmp_path, shards), 'train'))
    whole = (tmp_path / 'train-0.tar').read_bytes()
    for cut in (5000, 700):
        (tmp_path / 'train-0.tar').write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='train-0.tar'):
            pixels(create_dataset('wds/', root, 'train', skip_damaged=True))


def test_a_run_says_what_its_stream_left_out(tmp_path, webdataset):
    shards = [samples(0, 4), samples(4, 8)]
    shards[1][2] = ('broken', b'', 0)
    root = make_shards(tmp_path, shards)
    summary = train(TrainConfig(
        model='mobilenetv2_035_noah', output=str(tmp_path / 'run'), dataset='wds/', data_dir=root, val_split='train',
        img_size=32, epochs=2, batch_size=2, lr=1e-5, workers=0, cpu=True, skip_damaged=True))
    records = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').open()]
    assert [record['damaged'] for record in records] == [2, 2]  # one, in training and in evaluation
    assert summary['damaged'] == 2


def test_wds_that_is_refused(tmp_path, webdataset):
    root = make_shards(tmp_path, [samples(0, 2)], names=None)
    with pytest.raises(ValueError, match='no readable classnames.txt'):
        create_dataset('wds/', root, 'train')
    with pytest.raises(ValueError, match='split validation not found'):
        create_dataset('wds/', root, 'validation')
    info = json.loads((tmp_path / '_info.json').read_text())
    del info['splits']['train']['shard_lengths']
    (tmp_path / '_info.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"_info.json has no 'shard_lengths' for a split; expected is {\"splits\": {"):
        create_dataset('wds/', root, 'train')
    (tmp_path / '_info.json').unlink()
    with pytest.raises(ValueError, match=r'split train not found in info .* expected is {"splits"'):
        create_dataset('wds/', root, 'train')


STREAM = """
import hashlib, json, sys, numpy as np, torch
from torch.utils.data import DataLoader
from noah_zoo.data.factory import create_dataset
rank, port, name, root = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group('gloo', init_method=f'file://{port}', rank=rank, world_size=2)
for training in (False, True):
    stream = create_dataset(name, root, 'train', training=training)
    stream.set_loader_cfg(2, 1)
    stream.transform = np.array
    images = [hashlib.sha256(image.numpy().tobytes()).hexdigest()
              for image, _ in DataLoader(stream, batch_size=None, num_workers=2)]
    print(json.dumps([len(stream), images]))
"""


def stream_of(kind, tmp_path):
    """Name and folder of a stream of the images of EXPECTED."""
    if kind == 'wds':
        pytest.importorskip('webdataset')
        name, root = 'wds/', make_shards(tmp_path / 'shards', [samples(i, i + 2) for i in range(0, 8, 2)])
    else:
        make_hub(tmp_path / 'hub', pngs(8))
        name, root = f'hfids/{tmp_path / "hub"}', str(tmp_path / 'cache')
        create_dataset(name, root, 'train')  # its cache is there before two write it at once
    return name, root


@pytest.mark.parametrize('kind', ['hfids', 'wds'])
def test_shares_of_two_processes(kind, tmp_path, monkeypatch):
    name, root = stream_of(kind, tmp_path)
    for function, value in (('is_initialized', True), ('get_world_size', 2)):
        monkeypatch.setattr(torch.distributed, function, lambda value=value: value)
    for training in (False, True):
        shares = []
        for rank in range(2):
            monkeypatch.setattr(torch.distributed, 'get_rank', lambda rank=rank: rank)
            stream = create_dataset(name, root, 'train', training=training)
            stream.set_loader_cfg(0, 1)
            shares.append(pixels(stream)[1])
            assert len(shares[-1]) == len(stream) == 4
        assert sorted(shares[0] + shares[1]) == sorted(EXPECTED)


@pytest.mark.process
@pytest.mark.parametrize('kind', ['hfids', 'wds'])
def test_processes_read_a_share_of_a_stream(kind, tmp_path):
    name, root = stream_of(kind, tmp_path)
    processes = [subprocess.Popen(
        [sys.executable, '-c', STREAM, str(rank), str(tmp_path / 'store'), name, root], stdout=subprocess.PIPE,
        text=True) for rank in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]  # by gloo, too
    answers = [[json.loads(line) for line in text.splitlines() if not line.startswith('[Gloo]')] for text in printed]
    every = sorted(hashlib.sha256(image).hexdigest() for image in EXPECTED)
    for shares in zip(*answers):  # each image once; the epochs of both are as long as they say
        assert sorted(shares[0][1] + shares[1][1]) == every
        assert [len(images) for _, images in shares] == [length for length, _ in shares] == [4, 4]
