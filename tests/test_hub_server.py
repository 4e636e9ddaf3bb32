"""The test Hub against the real client. HF_* is read at import, so the client lives in child processes."""
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time

import pytest

from tests.hub_server import HubServer

MIB = 1 << 20
REPO = 'noah-zoo/tiny'
PRELUDE = '''
import hashlib, json, sys
from pathlib import Path
import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
api = HfApi()

def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as raised:
        return type(raised).__name__
    return None

def say(**answer):
    print(json.dumps(answer))
'''


@pytest.fixture(scope='module')
def weights():
    """25 MiB that compress to nothing smaller."""
    return random.Random(5).randbytes(25 * MIB)


@pytest.fixture
def hub():
    with HubServer({'hf_owner': 'noah-zoo', 'hf_other': 'someone'}) as server:
        yield server


def start(hub, home, code, *args, token=None, **env):
    command = [sys.executable, '-c', PRELUDE + code, *args]
    return subprocess.Popen(
        command, env={**hub.env(home, token), **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*args, **kwargs):
    """What the child says."""
    child = start(*args, **kwargs)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def download(hub, home, filename='model.safetensors', **env):
    code = '''
path = None
def fetch():
    global path
    path = hf_hub_download(sys.argv[1], sys.argv[2])
say(error=error(fetch), sha256=path and sha256(path))
'''
    return run(hub, home, code, REPO, filename, **env)


def seen(hub, method, word=''):
    return [request for request in hub.requests if request.method == method and word in request.path]


@pytest.mark.hub
def test_publish_and_fetch(hub, tmp_path, weights):
    folder = tmp_path / 'folder'
    (folder / 'runs').mkdir(parents=True)
    files = {'model.safetensors': weights, 'README.md': b'---\nlicense: mit\ntags: [noah]\n---\n# Tiny\n',
             'runs/config.json': b'{"num_classes": 10}'}
    for path, data in files.items():
        (folder / path).write_bytes(data)
    said = run(hub, tmp_path / 'a', '''
repo, folder = sys.argv[1:]
user = api.whoami()['name']
url = api.create_repo(repo)
again = error(api.create_repo, repo)
same = api.create_repo(repo, exist_ok=True)
first = api.upload_folder(repo_id=repo, folder_path=folder)
second = api.upload_folder(repo_id=repo, folder_path=folder)
api.create_tag(repo, tag='v1', revision=first.oid)
twice = error(api.create_tag, repo, tag='v1')
api.create_tag(repo, tag='v2')
api.delete_tag(repo, tag='v2')
refs = api.list_repo_refs(repo)
info = api.model_info(repo, revision='v1', files_metadata=True)
tree = [(type(row).__name__, row.path) for row in api.list_repo_tree(repo, recursive=True)]
top = [row.path for row in api.list_repo_tree(repo)]
paths = api.get_paths_info(repo, ['model.safetensors', 'runs', 'nothing'])
say(user=user, id=url.repo_id, again=again, same=same.repo_id, oid=first.oid, second=second.oid, twice=twice,
    tags={tag.name: tag.target_commit for tag in refs.tags}, branches={b.name: b.target_commit for b in refs.branches},
    sha=info.sha, license=info.card_data.license, lfs={s.rfilename: s.lfs and s.lfs.sha256 for s in info.siblings},
    tree=tree, top=top, paths={row.path: getattr(row, 'size', None) for row in paths},
    has=[api.file_exists(repo, 'README.md'), api.file_exists(repo, 'none')],
    repos=[api.repo_exists(repo), api.repo_exists('noah-zoo/none')])
''', REPO, str(folder), token='hf_owner')
    digest = hashlib.sha256(weights).hexdigest()
    oid = said['oid']
    names = ['.gitattributes', *sorted(files)]
    assert (said['user'], said['id'], said['same']) == ('noah-zoo', REPO, REPO)
    assert said['again'] == said['twice'] == 'HfHubHTTPError'
    assert said['tags'] == hub.tags(REPO) == {'v1': oid} and said['branches'] == {'main': hub.commits(REPO)[-1]}
    assert said['sha'] == said['second'] == oid == hub.commits(REPO)[1] and len(hub.commits(REPO)) == 2
    assert said['license'] == 'mit' and said['lfs'] == {name: None for name in names} | {'model.safetensors': digest}
    assert sorted(path for _, path in said['tree']) == sorted([*names, 'runs'])
    assert ['RepoFolder', 'runs'] in said['tree']
    assert sorted(said['top']) == ['.gitattributes', 'README.md', 'model.safetensors', 'runs']
    assert said['paths'] == {'model.safetensors': 25 * MIB, 'runs': None}
    assert said['has'] == said['repos'] == [True, False]
    assert len(seen(hub, 'PUT')) == 1
    stored = hub.files(REPO)
    stored.pop('.gitattributes')
    assert stored == files == {path: hub.files(REPO, 'v1')[path] for path in files}

    said = run(hub, tmp_path / 'b', '''
repo, commit = sys.argv[1:]
get = lambda revision, name='model.safetensors': hf_hub_download(repo, name, revision=revision)
same = [sha256(get(revision)) for revision in (None, 'v1', commit)]
snapshot = Path(api.snapshot_download(repo, revision='v1'))
say(same=same, json=(snapshot / 'runs/config.json').read_text(), entry=error(get, None, 'none.json'),
    revision=error(get, 'v9'), repo=error(hf_hub_download, 'noah-zoo/none', 'config.json'))
''', REPO, oid)
    assert said['same'] == [digest] * 3 and json.loads(said['json']) == {'num_classes': 10}
    assert said['entry'] in ('EntryNotFoundError', 'RemoteEntryNotFoundError')
    assert said['revision'] == 'RevisionNotFoundError' and said['repo'] == 'RepositoryNotFoundError'
    assert len(seen(hub, 'GET', 'model.safetensors')) == 1  # later ones come from the cache


@pytest.mark.hub
def test_refused(hub, tmp_path):
    hub.put(REPO, {'config.json': b'{"a": 1}'}, private=True)
    hub.put('noah-zoo/gated', {'config.json': b'{"a": 2}'}, gated=True, granted=['nobody'])
    code = '''
add = lambda data: [CommitOperationAdd('config.json', data)]
repo, gated = 'noah-zoo/tiny', 'noah-zoo/gated'
say(private=error(hf_hub_download, repo, 'config.json'), info=error(api.model_info, repo),
    gated=error(hf_hub_download, gated, 'config.json'), gated_info=error(api.model_info, gated),
    write=error(api.create_commit, gated, add(b'{}'), commit_message='one'))
'''
    said = run(hub, tmp_path / 'a', code)
    assert said['private'] == said['info'] == 'RepositoryNotFoundError'
    assert said['gated'] == 'GatedRepoError' and said['gated_info'] is None and said['write'] is not None
    said = run(hub, tmp_path / 'b', code, token='hf_other')
    assert said['private'] is None and said['info'] is None and said['gated'] == 'GatedRepoError'
    hub.put('noah-zoo/gated', {}, granted=['someone'])
    assert run(hub, tmp_path / 'c', code, token='hf_other')['gated'] is None
    said = run(hub, tmp_path / 'd', code, token='hf_stale')
    assert said['info'] == said['gated_info'] == 'HfHubHTTPError' and said['private'] is not None


@pytest.mark.hub
def test_commits(hub, tmp_path):
    first = hub.put(REPO, {'config.json': b'{"a": 1}', 'old/notes.txt': b'old'})
    said = run(hub, tmp_path, '''
from huggingface_hub import CommitOperationDelete
repo, first = sys.argv[1:]
add = lambda data, path='config.json': [CommitOperationAdd(path, data)]
second = api.create_commit(repo, add(b'{"a": 2}') + [CommitOperationDelete('old/')], commit_message='two')
def stale():
    try:
        api.create_commit(repo, add(b'{"a": 3}'), commit_message='three', parent_commit=first)
    except Exception as raised:
        return raised.response.status_code
api.create_branch(repo, branch='dev')
api.upload_file(repo_id=repo, path_in_repo='dev.json', path_or_fileobj=b'{}', revision='dev')
api.create_repo('noah-zoo/gone', private=True)
api.delete_repo('noah-zoo/gone')
api.delete_repo('noah-zoo/gone', missing_ok=True)
say(second=second.oid, stale=stale(),
    branch=error(api.create_commit, repo, add(b'{}'), commit_message='x', revision='x'),
    card=error(api.create_commit, repo, add(b'---\\n- a\\n---\\n', 'README.md'), commit_message='card'))
''', REPO, first, token='hf_owner')
    assert said['stale'] == 412 and said['branch'] == 'RevisionNotFoundError' and said['card'] == 'ValueError'
    assert hub.commits(REPO)[1:] == [first, said['second']]
    assert hub.files(REPO, first)['config.json'] == b'{"a": 1}'
    assert set(hub.files(REPO)) == {'.gitattributes', 'config.json'} and hub.files(REPO)['config.json'] == b'{"a": 2}'
    assert 'dev.json' in hub.files(REPO, 'dev')


@pytest.mark.hub
def test_damage(hub, tmp_path, weights):
    hub.put(REPO, {'model.safetensors': weights, 'config.json': b'{"a": 1}'})
    digest = hashlib.sha256(weights).hexdigest()

    hub.fault('cut', path='model', after=12 * MIB)
    said = download(hub, tmp_path / 'cut')
    if said['error']:  # a client below 1.0 resumes in its next call
        said = download(hub, tmp_path / 'cut')
    assert said['sha256'] == digest
    assert [request.status for request in seen(hub, 'GET')] == [200, 206]
    assert seen(hub, 'GET')[1].range == f'bytes={10 * MIB}-'

    hub.fault('flip', path='model')
    said = download(hub, tmp_path / 'flip')
    assert said['error'] is None and said['sha256'] != digest  # no client looks at the bytes

    hub.fault('short', method='GET|HEAD', path='model', by=7, times=None)
    assert download(hub, tmp_path / 'short')['sha256'] == hashlib.sha256(weights[:-7]).hexdigest()
    hub.clear_faults()
    hub.fault('short', path='model', by=7)
    assert download(hub, tmp_path / 'shorter')['error'] is not None

    hub.fault('page', path='config', body=b'<html>')
    assert download(hub, tmp_path / 'page', 'config.json')['error'] == 'OSError'  # of another size
    hub.fault('etag', method='HEAD', path='config', value='0' * 40)
    assert download(hub, tmp_path / 'etag', 'config.json')['error'] is None
    assert list((tmp_path / 'etag').rglob('blobs/' + '0' * 40))


def ask(hub, method='GET', path=f'/{REPO}/resolve/main/model.safetensors', body=b'', headers=''):
    """An open connection on which a request was sent."""
    connection = socket.create_connection(('127.0.0.1', int(hub.url.rpartition(':')[2])), timeout=20)
    connection.sendall(f'{method} {path} HTTP/1.1\r\nHost: hub\r\n{headers}\r\n'.encode() + body)
    return connection


def read(connection):
    """All there is, and the exception that ended it."""
    received = bytearray()
    try:
        while block := connection.recv(MIB):
            received += block
    except OSError as error:
        return received, error
    return received, None


@pytest.mark.hub
def test_sockets(hub):
    hub.put(REPO, {'model.safetensors': bytes(range(256)) * 4096})
    hub.fault('reset', after=1000)
    hub.fault('reset', after=None)
    hub.fault('cut', after=900_000)
    hub.fault('slow', rate=500_000)
    received, error = read(ask(hub))
    assert isinstance(error, ConnectionResetError) and len(received.partition(b'\r\n\r\n')[2]) == 1000
    assert b'Content-Length: 1048576' in received
    received, error = read(ask(hub))
    assert isinstance(error, ConnectionResetError) and not received
    received, error = read(ask(hub))
    assert error is None and len(received.partition(b'\r\n\r\n')[2]) == 900_000
    begin = time.monotonic()
    read(ask(hub, headers='Range: bytes=100000-599999\r\nConnection: close\r\n'))
    assert 0.9 < time.monotonic() - begin  # half a megabyte at 500 kB/s

    hub.fault('hang', seconds=3600)
    silent, url = ask(hub), hub.url
    while hub.requests[-1].status is not None:
        time.sleep(0.01)
    hub.stop()
    assert read(silent)[0] == b''
    with pytest.raises(ConnectionRefusedError):
        ask(hub)
    hub.start()
    assert hub.url == url
    assert read(ask(hub, headers='Connection: close\r\nRange: bytes=5-6\r\n'))[0].endswith(b'\r\n\r\n\x05\x06')
    assert [request.status for request in hub.requests] == [200, None, 200, 206, None, 206]


@pytest.mark.hub
def test_killed_upload_leaves_nothing(hub, tmp_path, weights):
    (tmp_path / 'model.safetensors').write_bytes(weights)
    code = '''
api.create_repo(sys.argv[1], exist_ok=True)
api.upload_file(repo_id=sys.argv[1], path_in_repo='model.safetensors', path_or_fileobj=sys.argv[2])
say()
'''
    given = (hub, tmp_path / 'home', code, REPO, str(tmp_path / 'model.safetensors'))
    hub.fault('slow', method='PUT', rate=2 * MIB)
    child = start(*given, token='hf_owner')
    while not seen(hub, 'PUT'):
        assert child.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    child.kill()
    child.communicate()
    assert seen(hub, 'PUT')[0].status is None and len(hub.commits(REPO)) == 1
    hub.fault('status', method='POST', path='/commit/', code=503)
    child = start(*given, token='hf_owner')
    child.communicate(timeout=60)
    assert child.returncode and len(seen(hub, 'PUT')) == 2 and len(hub.commits(REPO)) == 1
    run(*given, token='hf_owner')
    assert len(seen(hub, 'PUT')) == 2 and hub.files(REPO)['model.safetensors'] == weights

    # By hand: bytes that are not the announced ones, and a commit of an object that never came.
    oid = hashlib.sha256(b'right').hexdigest()
    close = 'Connection: close\r\nContent-Length: {}\r\nAuthorization: Bearer hf_owner\r\n'
    answer = read(ask(hub, 'PUT', f'/lfs/{REPO}/{oid}?size=5', b'wrong', close.format(5)))[0]
    assert answer.startswith(b'HTTP/1.1 400 ')
    lines = [{'key': 'header', 'value': {'summary': 'x'}},
             {'key': 'lfsFile', 'value': {'path': 'a.bin', 'algo': 'sha256', 'oid': oid, 'size': 5}}]
    body = '\n'.join(map(json.dumps, lines)).encode()
    answer = read(ask(hub, 'POST', f'/api/models/{REPO}/commit/main', body, close.format(len(body))))[0]
    assert answer.startswith(b'HTTP/1.1 400 ') and 'a.bin' not in hub.files(REPO)


def test_environment(hub, tmp_path, monkeypatch):
    for name in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'https_proxy', 'HTTP_PROXY', 'HUGGING_FACE_HUB_TOKEN'):
        monkeypatch.setenv(name, 'x')
    env = hub.env(tmp_path)
    assert {name for name in env if name.startswith('HF_')} == {
        'HF_ENDPOINT', 'HF_HOME', 'HF_HUB_DISABLE_XET', 'HF_HUB_DISABLE_TELEMETRY', 'HF_HUB_DISABLE_PROGRESS_BARS'}
    assert not {'https_proxy', 'HTTP_PROXY', 'HUGGING_FACE_HUB_TOKEN'} & set(env) and env['PATH'] == os.environ['PATH']
    assert hub.env(tmp_path, 'hf_owner')['HF_TOKEN'] == 'hf_owner'
    with pytest.raises(ValueError, match='explode'):
        hub.fault('explode')
