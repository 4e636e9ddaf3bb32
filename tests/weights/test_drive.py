"""The authors' files from Google Drive: downloaded once, checked, converted; or an error that says what to do."""
import errno
import hashlib
import io
import logging
import signal
import socket
import subprocess
from functools import partial

import gdown
import pytest
import requests
import timm
import torch
from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import load_file

from noah_zoo.catalog import drive_id
from noah_zoo.weights import WeightsError, convert_released
from noah_zoo.weights import drive as module
from noah_zoo.weights.drive import fetch_released
from tests.client import Client, SmallDisk, bound, digest
from tests.drive_server import HOSTS, DriveServer
from tests.hub_server import HubServer
from tests.released import cheap_state_dict, released_state_dict

NAME, THIN, TWIN = 'mobilenetv2_035_noah', 'deit_tiny_050_patch16_224_noah', 'gmlp_ti16_050_224'
CHUNK = 512 * 1024  # gdown writes by such pieces
PAGE = f'https://drive.google.com/file/d/{drive_id(NAME)}/view'
BY_HAND = (PAGE, f'noah-zoo convert FILE --model {NAME} --output DIR', 'local-dir:DIR')


def file_of(weights):
    """As the authors saved it."""
    stream = io.BytesIO()
    torch.save(dict(epoch=149, state_dict={f'module.{key}': value for key, value in weights.items()}), stream)
    return stream.getvalue()


@pytest.fixture(scope='module')
def released():
    """The released state dict of NAME."""
    return released_state_dict(NAME)


@pytest.fixture(scope='module')
def data(released):
    return file_of(released)


@pytest.fixture(scope='module')
def expected(released):
    return digest(convert_released(released, NAME))


@pytest.fixture(scope='module')
def server():
    with DriveServer() as drive:
        yield drive


@pytest.fixture(scope='module')
def client(server, tmp_path_factory):
    with HubServer() as hub:
        with Client({**hub.env(tmp_path_factory.mktemp('home')), **server.env()}, published={}) as client:
            yield client
        assert hub.requests == []  # nothing is recorded, so the Hub is not asked


@pytest.fixture
def drive(server, data, monkeypatch):
    """The Drive with the file of NAME, for this process and for the client."""
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    server.put(drive_id(NAME), data)
    server.requests.clear()
    yield server
    assert [host for host in server.refused if not host.endswith('.microsoft.com')] == []  # onnxruntime's telemetry
    server.refused.clear()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


def load(client, expected, cache, name=NAME, **kwargs):
    """A call in the client that must succeed, and give the right weights."""
    answer = client.create(name, cache_dir=str(cache), **kwargs)
    assert answer.error is None, answer.error
    assert answer.value == expected
    assert f'{name}.osvai_in1k: weights from the authors' in answer.log
    return answer


def fail(client, cache, *parts, **kwargs):
    """A call in the client that must raise WeightsError, with these parts; nothing is left of the file."""
    answer = client.create(NAME, cache_dir=str(cache), **kwargs)
    assert 'WeightsError' in answer.kinds, answer
    for part in (f'{NAME}.osvai_in1k', *parts):
        assert part in answer.error, answer.error
    assert big(cache) == []


def refused(cache, *parts):
    """As `fail`, in this process."""
    with pytest.raises(WeightsError) as info:
        fetch_released(NAME, cache)
    for part in (f'{NAME}.osvai_in1k', *parts):
        assert part in str(info.value)
    assert not cache.is_dir() or big(cache) == []


def fetched(cache, name=NAME):
    return digest(load_file(fetch_released(name, cache)))


def big(folder):
    return [path for path in folder.rglob('*') if path.is_file() and path.stat().st_size > 1000]


def test_downloaded_and_converted_once(drive, hub, expected, cache, caplog):
    create = partial(timm.create_model, pretrained=True, cache_dir=str(cache))
    with caplog.at_level(logging.INFO):
        assert digest(create(NAME).state_dict()) == expected
    assert f'{NAME}.osvai_in1k: weights from the authors' in caplog.text
    assert drive.requests == [(HOSTS[0], drive_id(NAME), '')]
    path, = big(cache)
    assert path.name == f'{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors'
    drive.requests.clear()
    for kwargs in ({}, dict(pretrained_cfg='osvai_in1k')):
        assert digest(create(NAME, **kwargs).state_dict()) == expected
    assert drive.requests == [] and hub.requests == []  # nothing is recorded, so the Hub is not asked


@pytest.mark.exhaustive
@pytest.mark.parametrize('case', [f'{THIN}.plain', TWIN])
def test_other_models(drive, cache, case):
    name, weights = case.replace('.plain', ''), released_state_dict(case)
    drive.put(drive_id(name), file_of(weights))
    model = timm.create_model(name, pretrained=True, cache_dir=str(cache))
    assert digest(model.state_dict()) == digest(convert_released(weights, name))


def test_its_layer_before_the_head_comes_with_it(drive, cache):
    weights = released_state_dict(THIN)
    drive.put(drive_id(THIN), file_of(weights))
    create = partial(timm.create_model, THIN, pretrained=True, cache_dir=str(cache))
    assert digest(create().state_dict()) == digest(convert_released(weights, THIN))
    for kwargs in (dict(num_classes=7, in_chans=1), dict(num_classes=0)):
        assert torch.equal(create(**kwargs).representation.fc.weight, weights['pre_logits.fc.weight'])
    create(features_only=True)
    with pytest.raises(WeightsError, match='representation.fc.weight is surplus'):
        create(pre_logits=False)


@pytest.mark.parametrize('mode, after, requests', [
    ('warning', 0, 2), pytest.param('slow', 20_000_000, 1, marks=pytest.mark.hub), ('cut_once', 5 * CHUNK + 10, 2)])
def test_detours(drive, data, expected, cache, mode, after, requests, monkeypatch):
    if mode == 'cut_once':
        monkeypatch.setattr('time.sleep', lambda seconds: None)  # gdown's, before it goes on
    drive.put(drive_id(NAME), data, mode=mode, after=after)
    assert fetched(cache) == expected
    assert len(drive.requests) == requests
    if mode == 'cut_once':
        assert drive.requests[1][2] == f'bytes={5 * CHUNK}-'


@pytest.mark.parametrize('mode, after, message', [
    ('quota', 0, 'quota is used up: too many have downloaded it; try again in 24 hours'),
    ('missing', 0, 'Cannot retrieve the public link'),
    ('html', 0, 'it is a web page'),
    ('truncated', 3_000_000, 'truncated, damaged or not a checkpoint'),
    ('truncated', 0, 'the file is empty'),
    *(pytest.param(*case, marks=pytest.mark.hub) for case in (
        ('private', 0, 'Cannot retrieve the public link'), ('short', 3_000_000, 'Download is incomplete'))),
])
def test_faults(drive, data, cache, mode, after, message):
    drive.put(drive_id(NAME), data, mode=mode, after=after)
    refused(cache, message, *BY_HAND)


@pytest.mark.parametrize('case', ['byte', 'other', 'pickle'])
def test_wrong_content(drive, data, released, expected, cache, case):
    if case == 'byte':  # in the middle of a tensor, where torch does not notice
        spoilt = bytearray(data)
        spoilt[len(data) // 2] ^= 1
        assert torch.load(io.BytesIO(spoilt))
        drive.put(drive_id(NAME), bytes(spoilt))
        refused(cache, 'damaged on the way: the checksum of')
    elif case == 'other':
        drive.put(drive_id(NAME), file_of(cheap_state_dict('resnet18')))
        refused(cache, 'the weights are those of resnet18')
    else:
        stream = io.BytesIO()
        torch.save(dict(released, more=subprocess.Popen), stream)
        drive.put(drive_id(NAME), stream.getvalue())
        refused(cache, 'nothing in it was executed')
    drive.put(drive_id(NAME), data)
    assert fetched(cache) == expected


def test_damaged_in_the_cache(drive, expected, cache, caplog):
    assert fetched(cache) == expected
    path, = big(cache)
    right = path.read_bytes()
    for spoilt in (right[:len(right) // 2], right[:-1] + bytes([right[-1] ^ 1]), b''):
        path.write_bytes(spoilt)
        caplog.clear()
        assert fetched(cache) == expected
        assert 'is damaged: its hash is' in caplog.text
        assert big(cache) == [path] and path.read_bytes() == right
    assert len(drive.requests) == 4


def test_offline(drive, expected, cache, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    refused(cache, 'HF_HUB_OFFLINE is set, and the converted file is not in the cache', *BY_HAND)
    assert drive.requests == []
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    fetch_released(NAME, cache)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert fetched(cache) == expected and len(drive.requests) == 1


def test_no_network(drive, cache, monkeypatch):
    """An address that nobody listens at, then a look-up of the name that takes too long."""
    with socket.socket() as proxy:
        proxy.bind(('127.0.0.1', 0))
        for name in ('HTTPS_PROXY', 'https_proxy'):
            monkeypatch.setenv(name, f'http://127.0.0.1:{proxy.getsockname()[1]}')
        refused(cache, 'drive.google.com cannot be reached', 'HTTPS_PROXY', *BY_HAND)

    def wait_for(seconds, function):
        assert seconds == 2.5
        raise TimeoutError('no answer in 2.5 s')

    monkeypatch.setattr(module, 'within', wait_for)
    refused(cache, 'drive.google.com cannot be reached (no answer in 2.5 s)')
    assert drive.requests == []


def test_another_process_has_the_lock(tmp_path, monkeypatch, caplog):
    acquire, timeouts = FileLock.acquire, []

    def counted(self, timeout=None):
        timeouts.append(timeout)
        if timeout is None:
            other.release()
        return acquire(self, 0.01 if timeout else timeout)

    other = FileLock(tmp_path / 'lock', is_singleton=False)
    other.acquire()
    monkeypatch.setattr(FileLock, 'acquire', counted)
    with module._lock(NAME, tmp_path):
        assert timeouts == [1, None]
    assert f'{NAME}: another process is downloading the weights; waiting for it' in caplog.text


@pytest.mark.parametrize('error, message', [
    (requests.exceptions.ProxyError('refused'),  # an OSError
     "the authors' file on Google Drive: refused. To get it by hand: "),
    (OSError(errno.ENOSPC, 'No space left on device'), 'the disk of .*assets is full'),
    (OSError(errno.EROFS, 'Read-only file system'), 'assets cannot be written .*cache_dir=FOLDER'),
])
def test_errors_of_network_and_disk(monkeypatch, cache, error, message):
    def refuse(**kwargs):
        raise error

    monkeypatch.setattr(requests, 'head', lambda *args, **kwargs: None)
    monkeypatch.setattr(gdown, 'download', refuse)
    with pytest.raises(WeightsError, match=message):
        fetch_released(NAME, cache)


def test_a_file_where_the_folder_should_be(drive, cache):
    cache.write_bytes(b'')
    refused(cache, str(cache))
    assert cache.read_bytes() == b''


# Other processes, hosts that do not answer, and disks


@pytest.mark.hub
def test_eight_processes_download_once(drive, client, data, expected, cache):
    drive.put(drive_id(NAME), data, mode='slow', after=5_000_000)
    answer = client.run('value = together(8, name, cache_dir=cache)', name=NAME, cache=str(cache))
    assert answer.value == [expected] * 8, answer
    assert drive.requests == [(HOSTS[0], drive_id(NAME), '')]
    assert len(big(cache)) == 1


@pytest.mark.hub
@pytest.mark.parametrize('number, status', [(signal.SIGKILL, -9), (signal.SIGINT, 3)], ids=['kill', 'ctrl-c'])
def test_stopped_in_a_download(drive, client, data, expected, cache, number, status):
    drive.put(drive_id(NAME), data, mode='slow', after=2_000_000)
    for _ in range(2):
        answer = client.run(
            'value = stopped(number, 1_000_000, name, cache_dir=cache)', number=number, name=NAME, cache=str(cache))
        assert answer.value == status, answer
        assert bool(big(cache)) == (number == signal.SIGKILL)
    drive.put(drive_id(NAME), data)
    load(client, expected, cache)
    assert len(big(cache)) == 1


@pytest.mark.hub
@pytest.mark.parametrize('how', ['refused', 'silent'])
def test_no_network_in_a_client(drive, client, expected, cache, how):
    with socket.socket() as proxy:
        proxy.bind(('127.0.0.1', 0))
        address = f'http://127.0.0.1:{proxy.getsockname()[1]}'
        if how == 'silent':
            proxy.listen()  # and never answers, so that whoever waits for it waits for ever
        env = {'HTTPS_PROXY': address, 'https_proxy': address}
        fail(client, cache, 'drive.google.com cannot be reached', 'HTTPS_PROXY', PAGE, 'local-dir:', env=env)
        load(client, expected, cache)
        load(client, expected, cache, env=env)


@pytest.mark.hub
def test_no_name_server(drive, client, cache):
    answer = client.run('create_without_names(name, cache_dir=cache)', name=NAME, cache=str(cache))
    assert 'WeightsError' in answer.kinds and 'drive.google.com cannot be reached' in answer.error, answer


@pytest.mark.hub
def test_offline_and_read_only(drive, server, client, expected, cache, tmp_path):
    with HubServer() as hub:
        env = {**hub.env(tmp_path / 'home'), **server.env(), 'HF_HUB_OFFLINE': '1'}
        with Client(env, published={}, prefix=bound()) as reader:
            fail(reader, cache, 'HF_HUB_OFFLINE is set', PAGE)
            load(client, expected, cache)
            drive.requests.clear()
            folders = [cache, *(path for path in cache.rglob('*') if path.is_dir())]
            try:
                for folder in folders:
                    folder.chmod(0o555)
                load(reader, expected, cache)
                answer = reader.create(THIN, cache_dir=str(cache))
                assert 'WeightsError' in answer.kinds and 'cannot be written' in answer.error, answer
            finally:
                for folder in folders:
                    folder.chmod(0o755)
    assert drive.requests == hub.requests == []


@pytest.mark.hub
@pytest.mark.parametrize('free', [4_000_000, 10_000_000], ids=['download', 'conversion'])
def test_full_disk(drive, client, data, expected, tmp_path, free):
    assert 7_000_000 > len(data) > 6_000_000
    with SmallDisk(tmp_path / 'disk', 20) as disk:
        ballast = disk / 'ballast'
        ballast.write_bytes(bytes((20 << 20) - free))
        answer = client.create(NAME, cache_dir=str(disk))
        assert 'WeightsError' in answer.kinds and f'the disk of {disk / "assets"} is full' in answer.error, answer
        assert big(disk) == [ballast]
        ballast.unlink()
        load(client, expected, disk)
