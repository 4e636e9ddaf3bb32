"""The authors' files from Google Drive: downloaded once, checked, converted; or an error that says what to do."""
import hashlib
import io
import signal
import socket
import subprocess

import gdown
import pytest
import requests
import torch

from noah_zoo.catalog import drive_id
from noah_zoo.weights import WeightsError, convert_released
from noah_zoo.weights.drive import fetch_released
from tests.client import SOON, Client, SmallDisk, bound, digest
from tests.drive_server import HOSTS, DriveServer
from tests.hub_server import HubServer
from tests.released import released_state_dict

NAME, THIN, TWIN = 'mobilenetv2_035_noah', 'deit_tiny_050_patch16_224_noah', 'gmlp_ti16_050_224'
CHUNK = 512 * 1024  # gdown writes by such pieces
PAGE = f'https://drive.google.com/file/d/{drive_id(NAME)}/view'


def file_of(weights):
    """As the authors saved it."""
    stream = io.BytesIO()
    torch.save(dict(epoch=149, state_dict={f'module.{key}': value for key, value in weights.items()}), stream)
    return stream.getvalue()


@pytest.fixture(scope='module')
def released():
    """Released state dicts by model."""
    cases = {NAME: NAME, THIN: THIN, TWIN: TWIN, f'{THIN}.plain': f'{THIN}.plain'}
    return {case: released_state_dict(name) for case, name in cases.items()}


@pytest.fixture(scope='module')
def data(released):
    return file_of(released[NAME])


@pytest.fixture(scope='module')
def expected(released):
    return digest(convert_released(released[NAME], NAME))


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
def drive(server, data):
    server.put(drive_id(NAME), data)
    server.requests.clear()
    yield server
    assert server.refused == []


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


def load(client, expected, cache, name=NAME, **kwargs):
    """A call that must succeed, and give the right weights."""
    answer = client.create(name, cache_dir=str(cache), **kwargs)
    assert answer.error is None, answer.error
    assert answer.value == expected
    assert f'{name}.osvai_in1k: weights from the authors' in answer.log
    return answer


def fail(client, cache, *parts, **kwargs):
    """A call that must raise WeightsError, with a message that has these parts; nothing is left of the file."""
    answer = client.create(NAME, cache_dir=str(cache), **kwargs)
    assert 'WeightsError' in answer.kinds, answer
    for part in (f'{NAME}.osvai_in1k', *parts):
        assert part in answer.error, answer.error
    assert big(cache) == []
    return answer


def big(folder):
    return [path for path in folder.rglob('*') if path.is_file() and path.stat().st_size > 1000]


def test_downloaded_and_converted_once(drive, client, expected, cache):
    load(client, expected, cache)
    assert drive.requests == [(HOSTS[0], drive_id(NAME), '')]
    path, = big(cache)
    assert path.name == f'{hashlib.sha256(path.read_bytes()).hexdigest()}.safetensors'
    drive.requests.clear()
    assert load(client, expected, cache).seconds < SOON
    load(client, expected, cache, name=NAME, pretrained_cfg='osvai_in1k')
    assert drive.requests == []


@pytest.mark.parametrize('case', [THIN, f'{THIN}.plain', TWIN])
def test_other_models(drive, client, released, cache, case):
    name = case.replace('.plain', '')
    drive.put(drive_id(name), file_of(released[case]))
    load(client, digest(convert_released(released[case], name)), cache, name)


def test_its_layer_before_the_head_comes_with_it(drive, client, released, cache):
    drive.put(drive_id(THIN), file_of(released[THIN]))
    for kwargs in (dict(num_classes=7), dict(num_classes=0), dict(features_only=True), dict(in_chans=1)):
        answer = client.create(THIN, cache_dir=str(cache), **kwargs)
        assert answer.error is None, answer.error
    answer = client.create(THIN, cache_dir=str(cache), pre_logits=False)
    assert 'WeightsError' in answer.kinds and 'representation.fc.weight is surplus' in answer.error


@pytest.mark.parametrize('mode, after, requests', [
    ('warning', 0, 2), ('slow', 20_000_000, 1), ('cut_once', 5 * CHUNK + 10, 2)])
def test_detours(drive, client, data, expected, cache, mode, after, requests):
    drive.put(drive_id(NAME), data, mode=mode, after=after)
    load(client, expected, cache)
    assert len(drive.requests) == requests
    if mode == 'cut_once':
        assert drive.requests[1][2] == f'bytes={5 * CHUNK}-'


@pytest.mark.parametrize('mode, after, message', [
    ('quota', 0, 'quota is used up: too many have downloaded it; try again in 24 hours'),
    ('private', 0, 'Cannot retrieve the public link'),
    ('missing', 0, 'Cannot retrieve the public link'),
    ('html', 0, 'it is a web page'),
    ('truncated', 3_000_000, 'truncated, damaged or not a checkpoint'),
    ('truncated', 0, 'the file is empty'),
    ('short', 3_000_000, 'Download is incomplete'),
])
def test_faults(drive, client, data, expected, cache, mode, after, message):
    drive.put(drive_id(NAME), data, mode=mode, after=after)
    fail(client, cache, message, PAGE, f'noah-zoo convert FILE --model {NAME} --output DIR', 'local-dir:DIR')
    drive.put(drive_id(NAME), data)
    load(client, expected, cache)


@pytest.mark.parametrize('case', ['byte', 'other', 'pickle'])
def test_wrong_content(drive, client, data, released, expected, cache, case):
    if case == 'byte':  # in the middle of a tensor, where torch does not notice
        spoilt = bytearray(data)
        spoilt[len(data) // 2] ^= 1
        assert torch.load(io.BytesIO(spoilt))
        drive.put(drive_id(NAME), bytes(spoilt))
        fail(client, cache, 'damaged on the way: the checksum of')
    elif case == 'other':
        drive.put(drive_id(NAME), file_of(released[TWIN]))
        fail(client, cache, f'the weights are those of {TWIN}')
    else:
        stream = io.BytesIO()
        torch.save(dict(released[NAME], more=subprocess.Popen), stream)
        drive.put(drive_id(NAME), stream.getvalue())
        fail(client, cache, 'nothing in it was executed')
    drive.put(drive_id(NAME), data)
    load(client, expected, cache)


def test_damaged_in_the_cache(drive, client, expected, cache):
    load(client, expected, cache)
    path, = big(cache)
    right = path.read_bytes()
    for spoilt in (right[:len(right) // 2], right[:-1] + bytes([right[-1] ^ 1]), b''):
        path.write_bytes(spoilt)
        assert 'is damaged: its hash is' in load(client, expected, cache).log
        assert big(cache) == [path] and path.read_bytes() == right
    assert len(drive.requests) == 4


def test_eight_processes_download_once(drive, client, data, expected, cache):
    drive.put(drive_id(NAME), data, mode='slow', after=5_000_000)
    answer = client.run('value = together(8, name, cache_dir=cache)', name=NAME, cache=str(cache))
    assert answer.value == [expected] * 8, answer
    assert drive.requests == [(HOSTS[0], drive_id(NAME), '')]
    assert len(big(cache)) == 1


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


@pytest.mark.parametrize('how', ['refused', 'silent'])
def test_no_network_is_told_soon(drive, client, expected, cache, how):
    with socket.socket() as proxy:
        proxy.bind(('127.0.0.1', 0))
        address = f'http://127.0.0.1:{proxy.getsockname()[1]}'
        if how == 'silent':
            proxy.listen()
        env = {'HTTPS_PROXY': address, 'https_proxy': address}
        answer = fail(client, cache, 'drive.google.com cannot be reached', 'HTTPS_PROXY', PAGE, 'local-dir:', env=env)
        assert answer.seconds < SOON
        load(client, expected, cache)
        assert load(client, expected, cache, env=env).seconds < SOON


def test_no_name_server_is_told_soon(drive, client, cache):
    answer = client.run('create_without_names(name, cache_dir=cache)', name=NAME, cache=str(cache))
    assert 'WeightsError' in answer.kinds and 'drive.google.com cannot be reached' in answer.error, answer
    assert answer.seconds < SOON


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


def test_an_error_of_the_network_is_none_of_the_disk(monkeypatch, cache):
    def refuse(**kwargs):
        raise requests.exceptions.ProxyError('refused')  # an OSError

    monkeypatch.setattr(requests, 'head', lambda *args, **kwargs: None)
    monkeypatch.setattr(gdown, 'download', refuse)
    with pytest.raises(WeightsError, match="the authors' file on Google Drive: refused. To get it by hand: .*"):
        fetch_released(NAME, cache)


def test_a_file_where_the_folder_should_be(drive, client, cache):
    cache.write_bytes(b'')
    answer = client.create(NAME, cache_dir=str(cache))
    assert 'WeightsError' in answer.kinds and str(cache) in answer.error, answer
    assert cache.read_bytes() == b''
