"""Files from the Hub in this process: what is asked, checked, retried and explained, without waiting."""
import errno
import hashlib
import logging
import os
import threading

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from noah_zoo.weights import WeightsError
from noah_zoo.weights import hub as module
from noah_zoo.weights.hub import MissingFileError, damage, disk_trouble, fetch, sha256_of, within

DATA = save({'weight': torch.randn(300, 300)})
SHA256 = hashlib.sha256(DATA).hexdigest()
FILE = 'model.safetensors'


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that were waited for, of which none pass."""
    waits = []
    monkeypatch.setattr(module.time, 'sleep', waits.append)
    return waits


@pytest.fixture
def repo(hub, request):
    """A repository of the test's own, with one file."""
    repo_id = 'fetch/' + hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    hub.put(repo_id, {FILE: DATA})
    return repo_id


@pytest.fixture
def get(repo, tmp_path):
    def get(**kwargs):
        return fetch('tiny', **dict(dict(repo_id=repo, cache_dir=tmp_path / 'cache'), **kwargs))
    return get


def refused(get, *parts, kind=WeightsError, **kwargs):
    with pytest.raises(kind) as info:
        get(**kwargs)
    for part in ('tiny: ', *parts):
        assert part in str(info.value)
    return str(info.value)


def spoil(path, change=lambda data: data[:-1] + bytes([data[-1] ^ 1])):
    blob = path.resolve()
    blob.write_bytes(change(blob.read_bytes()))


def asked(hub, method='GET'):
    return [request for request in hub.requests if request.method == method]


def test_a_commit_is_asked_for_once_a_branch_every_time(hub, repo, get, waits, caplog):
    revision = hub.commits(repo)[-1]
    path = get(revision=revision, sha256=SHA256)
    assert path.read_bytes() == DATA and path.parent.name == revision
    hub.requests.clear()
    assert get(revision=revision, sha256=SHA256) == get(revision=revision) == path
    assert hub.requests == []
    assert get() == get(revision='main') == path
    assert len(asked(hub, 'HEAD')) >= 2 and not asked(hub)

    newer = save({'weight': torch.randn(3)})
    hub.put(repo, {FILE: newer})
    assert get().read_bytes() == newer and get(revision=revision) == path

    hub.fault('status', method='HEAD', code=503, times=None)
    with caplog.at_level(logging.WARNING):
        assert get().read_bytes() == newer
    assert f'{hub.url} does not answer' in caplog.text and waits == []  # there is a file already


def test_offline(hub, repo, get, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    refused(get, f'no weights from {repo} on the Hub: HF_HUB_OFFLINE is set, and {FILE} is not in ', 'Unset it once')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    path = get()
    hub.requests.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert get() == get(revision=path.parent.name) == path
    spoil(path)
    for revision in (None, path.parent.name):
        refused(get, f'HF_HUB_OFFLINE is set, and the cached {path} is damaged', revision=revision)
    assert hub.requests == []


@pytest.mark.parametrize('recorded', [True, False])
def test_bytes_that_are_wrong_once_and_always(hub, repo, get, tmp_path, recorded, caplog):
    source = dict(revision=hub.commits(repo)[-1], sha256=SHA256) if recorded else {}
    hub.fault('flip', path=FILE)
    with caplog.at_level(logging.WARNING):
        path = get(**source)
    assert 'is damaged: its hash is' in caplog.text and len(asked(hub)) == 2
    for change in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:len(data) // 2]):
        spoil(path, change)
        assert damage(path).endswith(f', expected {SHA256}') and get(**source).read_bytes() == DATA
    spoil(path)
    hub.fault('flip', path=FILE, times=None)
    hub.requests.clear()
    message = refused(get, f'{FILE} of {repo} arrives damaged', 'HF_ENDPOINT', **source)
    assert f'expected {SHA256}' in message and len(asked(hub)) == 2  # the first try finds the cached file
    assert not [file for file in (tmp_path / 'cache').rglob('*') if file.is_symlink() or 'blobs' in file.parent.parts]


def test_another_file_than_the_recorded_one(hub, get):
    message = refused(get, f'has another {FILE} than the recorded one', 'nothing was downloaded', sha256='0' * 64)
    assert SHA256 in message and '0' * 64 in message and not asked(hub)


def test_git_hash_and_no_hash(hub, repo, get, tmp_path):
    hub.put(repo, {'config.json': b'{"a": 1}'})
    path = get(filename='config.json')
    expected = hashlib.sha1(b'blob 8\0{"a": 1}').hexdigest()
    assert path.resolve().name == expected and damage(path) is None
    assert damage(path, '0' * 40) == f'its hash is {expected}, expected {"0" * 40}'
    (tmp_path / 'other').write_bytes(b'...')
    assert damage(tmp_path / 'other') is None and damage(tmp_path / 'other', 'W/"3"') is None
    assert sha256_of(tmp_path / 'other') == hashlib.sha256(b'...').hexdigest()


@pytest.mark.parametrize('action, method, details', [
    ('status', 'HEAD', dict(code=503)), ('status', 'GET', dict(code=503)),
    ('status', 'HEAD', dict(code=429, headers={'Retry-After': '7'})),
    ('reset', 'GET', dict(after=100_000)), ('cut', 'GET', dict(after=100_000)),
    ('page', 'GET', dict(body=b'<html>')), ('short', 'GET', dict(by=7))], ids=str)
def test_a_fault_that_passes(hub, get, waits, action, method, details):
    hub.fault(action, method=method, **details)
    assert get().read_bytes() == DATA
    assert len(asked(hub, method)) >= 2
    if action == 'status' and method == 'HEAD':
        assert waits == [7. if 'headers' in details else 1.]


def test_a_hub_that_stays_busy(hub, get, waits):
    hub.fault('status', method='HEAD', code=503, times=None)
    refused(get, f'{hub.url} is busy (HTTP status 503), and {FILE} is not in ', 'Try again later')
    assert waits == [1., 2., 4.] and len(asked(hub, 'HEAD')) == 4
    hub.clear_faults()
    hub.fault('status', method='HEAD', code=429, headers={'Retry-After': '300'}, times=None)
    waits.clear()
    refused(get, 'busy (HTTP status 429)')
    assert waits == []


def test_no_answer(hub, get, monkeypatch):
    """The Hub is asked for its answer within `patience`, and what is looked up first, within that as well."""
    assert 'HF_HUB_ETAG_TIMEOUT' not in os.environ and module.patience() == 2.5
    timeouts = []

    def refuse(url, timeout):
        timeouts.append(timeout)
        raise ConnectionRefusedError('refused')

    with monkeypatch.context() as patch:
        patch.setattr(module, 'get_hf_file_metadata', refuse)
        message = refused(get, f'{hub.url} cannot be reached (refused)', 'HTTPS_PROXY', 'hf download', 'local-dir:')
    assert timeouts == [2.5] and f'{FILE} is not in' in message

    answered = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(module, 'patience', lambda: 0.05)
        patch.setattr(module, 'get_hf_file_metadata', lambda url, timeout: answered.wait())
        refused(get, 'cannot be reached (no answer in 0.05 s)')
    answered.set()

    path = get()
    monkeypatch.setattr(module, 'get_hf_file_metadata', refuse)
    assert get() == path
    spoil(path)
    refused(get, f'cannot be reached (refused), and the cached {path} is damaged')
    monkeypatch.setenv('HF_HUB_ETAG_TIMEOUT', '30')
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 30)
    assert module.patience() == 30


def test_within():
    assert within(60, lambda: 3) == 3
    with pytest.raises(KeyError, match='gone'):
        within(60, lambda: {}['gone'])


def test_who_may(hub, repo, get, monkeypatch):
    hub.put('fetch/private', {FILE: DATA}, private=True)
    hub.put('fetch/gated', {FILE: DATA}, gated=True, granted=['you'])
    for repo_id, said in (
            ('fetch/none', 'no such repository, or a private one. Check the name (NOAH_ZOO_NAMESPACE'),
            ('fetch/private', 'if it is private, log in with `hf auth login` or set HF_TOKEN'),
            ('fetch/gated', f'it is gated. Accept its terms at {hub.url}/fetch/gated'), ('a/b/c', "'a/b/c'")):
        refused(get, f'no weights from {repo_id} on the Hub: ', said, repo_id=repo_id)
    refused(get, f'it has no such revision; {hub.url}/{repo} lists branches', revision='v9')
    refused(get, 'it has no none.bin', kind=MissingFileError, filename='none.bin')
    monkeypatch.setenv('HF_TOKEN', 'hf_expired')
    refused(get, 'access refused', 'Log in again with `hf auth login` or renew HF_TOKEN')
    monkeypatch.setenv('HF_TOKEN', 'hf_you')
    for repo_id in ('fetch/private', 'fetch/gated'):
        assert get(repo_id=repo_id).read_bytes() == DATA
    assert {request.token for request in hub.requests} == {None, 'hf_expired', 'hf_you'}


def test_what_the_disk_refuses(get, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise error

    for number, said in (
            (errno.ENOSPC, f'the disk of {tmp_path / "cache"} is full. Free some space, or pass cache_dir=FOLDER'),
            (errno.EROFS, f'{tmp_path / "cache"} cannot be written')):
        error = OSError(number, os.strerror(number))
        monkeypatch.setattr(module, 'hf_hub_download', fail)
        refused(get, said, 'cache_dir=FOLDER or set HF_HOME')
        assert disk_trouble(error, 'x').startswith(('the disk of x is full', 'x cannot be written'))
    assert disk_trouble(RuntimeError('I/O error: No space left on device'), 'x').startswith('the disk of x is full')
    assert disk_trouble(ConnectionResetError(errno.ECONNRESET, 'reset'), 'x') is None


def test_a_damaged_file_that_cannot_be_removed(monkeypatch, tmp_path, caplog):
    (tmp_path / 'folder').mkdir()
    module._discard(tmp_path / 'folder')
    assert f'{tmp_path / "folder"} is damaged and cannot be removed' in caplog.text
