"""Weights from the Hub when something goes wrong: they load right or not at all, and the message says what to do."""
import hashlib
import io
import os
import pickle
import re
import signal

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save

import noah_zoo  # noqa: F401
from tests.client import Client, SmallDisk, bound, digest
from tests.hub_server import HubServer

MIB = 1 << 20
NAME, LARGE = 'mobilenetv2_035_noah', 'mobilenetv2_100_noah'  # 7 MB; 14 MB, of which the client writes 10 MiB at once
PLAIN = 'owner/plain'  # holds the same file as NAME's own repository
TOKEN = 'hf_secret_of_the_owner'
pytestmark = pytest.mark.hub
OLD_CLIENT = bool(os.environ.get('HUB_CLIENT')) or huggingface_hub.__version__.startswith('0.')


def repo(name):
    return f'noah-zoo/{name}.osvai_in1k'


@pytest.fixture(scope='module')
def weights():
    """State dicts by model."""
    torch.manual_seed(0)
    return {name: timm.create_model(name).state_dict() for name in (NAME, LARGE)}


@pytest.fixture(scope='module')
def room(weights):
    """The Hub, and what is recorded of it."""
    right = save(weights[NAME])
    files = {NAME: right, LARGE: save(weights[LARGE]), 'mobilenetv2_050_noah': right,
             'mobilenetv2_075_noah': b'\xff' * 100_000}
    with HubServer({TOKEN: 'noah-zoo', 'hf_other': 'other'}) as hub:
        published = {}
        for name, data in files.items():
            revision = hub.put(repo(name), {'model.safetensors': data})
            published[repo(name)] = dict(revision=revision, sha256=hashlib.sha256(data).hexdigest())
        published[repo('mobilenetv2_050_noah')]['sha256'] = '0' * 64  # another file than the recorded one
        published[repo('resnet18_noah')] = dict(revision='1' * 40, sha256='0' * 64)  # no such repository
        hub.put(PLAIN, {'model.safetensors': right})
        yield hub, published


@pytest.fixture(scope='module')
def client(room, tmp_path_factory):
    hub, published = room
    env = {**hub.env(tmp_path_factory.mktemp('home')), 'HF_HUB_DOWNLOAD_TIMEOUT': '2'}
    with Client(env, published) as client:
        yield client
        assert TOKEN not in client.errors()


@pytest.fixture(scope='module')
def offline(room, tmp_path_factory):
    hub, published = room
    with Client({**hub.env(tmp_path_factory.mktemp('home')), 'HF_HUB_OFFLINE': '1'}, published) as client:
        yield client


@pytest.fixture
def hub(room):
    hub, _ = room
    hub.requests.clear()
    yield hub
    hub.clear_faults()
    hub.start()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / 'cache'


def at(repo_id):
    """Arguments of a model whose weights are to come from there, at a branch."""
    return dict(pretrained_cfg_overlay=dict(hf_hub_id=repo_id))


def seen(hub, method='GET', word='model.safetensors'):
    return [request for request in hub.requests if request.method == method and word in request.path]


def blobs(cache):
    """What is kept of weights, whole or in part."""
    kept = [path for path in cache.rglob('*') if path.is_file() and 'blobs' in path.parts or path.is_symlink()]
    return [path for path in kept if not (OLD_CLIENT and path.suffix == '.incomplete')]  # kept, to go on with it


def load(client, weights, cache, name=NAME, **kwargs):
    """A call that must succeed, and give the right weights."""
    answer = client.create(name, cache_dir=str(cache), **kwargs)
    assert answer.error is None, answer.error
    assert answer.value == digest(weights[name])
    return answer


def fail(client, cache, *parts, name=NAME, **kwargs):
    """A call that must raise WeightsError, with a message that names the model and has these parts."""
    answer = client.create(name, cache_dir=str(cache), **kwargs)
    assert 'WeightsError' in answer.kinds, answer
    for part in (name, *parts):
        assert part in answer.error, answer.error
    return answer


def spoil(cache, action):
    """Damage the one cached file."""
    blob, = [path for path in blobs(cache) if not path.is_symlink()]
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data if action == 'flip' else data[:len(data) // 2])
    return blob


# The usual


def test_a_recorded_tag_is_asked_for_once(hub, client, weights, cache):
    answer = load(client, weights, cache)
    assert f'{NAME}.osvai_in1k: weights from {repo(NAME)}@' in answer.log
    assert len(seen(hub)) == 1
    hub.requests.clear()
    load(client, weights, cache)
    assert hub.requests == []


def test_a_branch_is_asked_for_every_time(hub, client, weights, cache):
    load(client, weights, cache, **at(PLAIN))
    load(client, weights, cache, **at(PLAIN))
    assert len(seen(hub)) == 1 and len(seen(hub, 'HEAD')) >= 2
    hub.stop()
    assert 'does not answer' in load(client, weights, cache, **at(PLAIN)).log
    hub.start()
    hub.fault('status', method='HEAD', code=503, times=None)
    assert 'does not answer' in load(client, weights, cache, **at(PLAIN)).log


def test_offline_with_a_warm_cache(hub, client, offline, weights, cache):
    fail(offline, cache, 'HF_HUB_OFFLINE is set', 'Unset it')
    load(client, weights, cache)
    load(client, weights, cache, **at(PLAIN))
    hub.requests.clear()
    load(offline, weights, cache)
    load(offline, weights, cache, **at(PLAIN))
    assert hub.requests == []


def test_namespace(hub, client, weights, cache):
    hub.put(f'mine/{NAME}.osvai_in1k', {'model.safetensors': save(weights[LARGE])})
    fail(client, cache, 'the weights are not those of this model', env={'NOAH_ZOO_NAMESPACE': 'mine'})
    hub.put(f'mine/{NAME}.osvai_in1k', {'model.safetensors': save(weights[NAME])})
    answer = load(client, weights, cache, env={'NOAH_ZOO_NAMESPACE': 'mine'})
    assert f'weights from mine/{NAME}.osvai_in1k' in answer.log
    fail(client, cache, 'nobody/', 'NOAH_ZOO_NAMESPACE', env={'NOAH_ZOO_NAMESPACE': 'nobody'})
    fail(client, cache, 'a/b/c', env={'NOAH_ZOO_NAMESPACE': 'a/b/c'})


# Wrong bytes


def test_a_byte_wrong_on_the_way(hub, client, weights, cache):
    hub.fault('flip', path='model')
    answer = load(client, weights, cache)
    assert 'is damaged: its hash is' in answer.log and len(seen(hub)) == 2


@pytest.mark.parametrize('action', ['flip', 'short'])
@pytest.mark.parametrize('source', [{}, at(PLAIN)], ids=['recorded', 'branch'])
def test_always_wrong_bytes(hub, client, weights, cache, source, action):
    hub.fault(action, method='GET|HEAD', path='model', times=None)
    fail(client, cache, 'arrives damaged', 'HF_ENDPOINT', **source)
    assert blobs(cache) == []
    repo_id, revision = (PLAIN, 'main') if source else (repo(NAME), hub.commits(repo(NAME))[-1])
    answer = client.run(
        "hf_hub_download(repo_id, 'model.safetensors', revision=revision, cache_dir=cache, local_files_only=True)",
        repo_id=repo_id, revision=revision, cache=str(cache))
    assert 'LocalEntryNotFoundError' in answer.kinds
    hub.clear_faults()
    load(client, weights, cache, **source)


@pytest.mark.parametrize('action', ['flip', 'cut'])
@pytest.mark.parametrize('source', [{}, at(PLAIN)], ids=['recorded', 'branch'])
def test_damaged_in_the_cache(hub, client, offline, weights, cache, source, action):
    load(client, weights, cache, **source)
    blob = spoil(cache, action)
    answer = fail(offline, cache, 'is damaged', 'HF_HUB_OFFLINE', **source)
    path = re.search(r'cached (\S+) is damaged', answer.error)[1]
    assert os.path.realpath(path) == str(blob)
    hub.requests.clear()
    assert 'is damaged' in load(client, weights, cache, **source).log
    assert len(seen(hub)) == 1
    load(offline, weights, cache, **source)


def test_damaged_in_the_cache_and_no_network(hub, client, cache, weights):
    load(client, weights, cache)
    spoil(cache, 'flip')
    hub.stop()
    fail(client, cache, 'is damaged', 'cannot be reached')


def test_another_file_than_the_recorded_one(hub, client, cache):
    name = 'mobilenetv2_050_noah'
    fail(client, cache, 'has another model.safetensors', '0' * 64, 'nothing was downloaded', name=name)
    assert seen(hub) == [] and blobs(cache) == []


def test_malformed_but_as_it_was_sent(hub, client, cache):
    fail(client, cache, 'not in the safetensors format', name='mobilenetv2_075_noah')
    assert len(seen(hub)) == 1
    hub.put('owner/malformed', {'model.safetensors': b'\xff' * 1000})
    fail(client, cache, 'not in the safetensors format', **at('owner/malformed'))


@pytest.mark.parametrize('case', ['another', 'missing', 'surplus'])
def test_other_weights_with_other_classes(hub, client, weights, cache, case):
    # timm looks for missing keys only where the number of classes is the checkpoint's.
    given = dict(weights[LARGE if case == 'another' else NAME])
    if case == 'missing':
        del given['blocks.2.0.conv_pw.weight']
    if case == 'surplus':
        given['blocks.2.0.conv_pw.bias'] = torch.randn(7)
    if case == 'another':
        given['more'] = torch.randn(7)
    hub.put(f'owner/{case}', {'model.safetensors': save(given)})
    for kwargs in ({}, dict(num_classes=7), dict(num_classes=0), dict(features_only=True)):
        fail(client, cache, 'not those of this model', **at(f'owner/{case}'), **kwargs)


# No network, a busy Hub, broken connections


@pytest.mark.parametrize('source', [{}, at(PLAIN)], ids=['recorded', 'branch'])
@pytest.mark.parametrize('how', ['refused', 'silent'])
def test_no_network_is_told_before_an_answer(hub, client, weights, cache, how, source):
    if how == 'refused':
        hub.stop()
    else:
        hub.fault('hang', method='GET|HEAD', seconds=3600, times=None)
    fail(client, cache, hub.url, 'cannot be reached', 'HTTPS_PROXY', 'hf download', 'local-dir:', **source)
    hub.start()
    hub.clear_faults()
    load(client, weights, cache, **source)
    hub.fault('hang', method='GET|HEAD', seconds=3600, times=None)
    load(client, weights, cache, **source)  # the cached file


def test_no_name_server(hub, client, cache):
    answer = client.run('create_without_names(name, cache_dir=cache)', name=NAME, cache=str(cache))
    assert 'WeightsError' in answer.kinds and f'{hub.url} cannot be reached' in answer.error, answer


def test_the_pickle_is_no_way_out(hub, client, weights, cache):
    stream = io.BytesIO()
    torch.save(weights[NAME], stream)
    hub.put('owner/both', {'model.safetensors': save(weights[NAME]), 'pytorch_model.bin': stream.getvalue()})
    hub.fault('status', method='GET|HEAD', path='safetensors', code=503, times=None)
    parts = () if OLD_CLIENT else ('busy (HTTP status 503)', 'Try again later')  # 0.36 tries on by itself, for longer
    answer = fail(client, cache, *parts, **at('owner/both'))
    assert OLD_CLIENT or all(f'trying again in {wait} s' in answer.log for wait in (1, 2, 4))
    assert seen(hub, 'HEAD', 'bin') == seen(hub, 'GET', 'bin') == []


@pytest.mark.parametrize('action, method, details', [
    ('status', 'HEAD', dict(code=503)),
    ('status', 'HEAD', dict(code=429, headers={'Retry-After': '1'})),
    ('status', 'GET', dict(code=503)),
    ('status', 'GET', dict(code=429, headers={'Retry-After': '1'})),
    ('reset', 'GET', dict(after=3_000_000)),
    ('reset', 'GET', dict(after=None)),
    ('cut', 'GET', dict(after=3_000_000)),
    ('hang', 'GET', dict(after=3_000_000)),
    ('short', 'GET', dict(by=7)),
    ('page', 'GET', dict(body=b'<html>')),
], ids=str)
def test_a_fault_that_passes(hub, client, weights, cache, action, method, details):
    hub.put('owner/faulty', {'model.safetensors': save(weights[NAME])})
    hub.fault(action, method=method, path='owner/faulty', **details)
    load(client, weights, cache, **at('owner/faulty'))
    times = [request.time for request in seen(hub, method, 'owner/faulty')]
    assert len(times) >= 2
    if 'headers' in details:
        assert times[1] - times[0] >= 1


def test_the_second_question_is_not_answered(hub, client, weights, cache):
    hub.fault('slow', method='HEAD', path='model', rate=MIB)  # the first one is
    hub.fault('status', method='HEAD', path='model', code=503)
    load(client, weights, cache)
    assert len(seen(hub, 'HEAD')) >= 3


def test_a_long_wait_is_not_begun(hub, client, cache):
    hub.fault('status', method='HEAD', code=429, headers={'Retry-After': '300'}, times=None)
    parts = () if OLD_CLIENT else ('busy (HTTP status 429)',)  # 0.35 tries on by itself, until its time is up
    answer = fail(client, cache, *parts)
    assert OLD_CLIENT or 'trying again' not in answer.log


def test_a_cut_download_goes_on(hub, client, weights, cache):
    hub.fault('cut', path='model', after=12 * MIB)
    load(client, weights, cache, LARGE)
    assert [request.range for request in seen(hub)] == [None, f'bytes={10 * MIB}-']
    assert [request.status for request in seen(hub)] == [200, 206]


# Who may


def test_refused(hub, client, weights, cache):
    files = {'model.safetensors': save(weights[NAME])}
    hub.put('owner/gated', files, gated=True, granted=['other'])
    hub.put('owner/private', files, private=True)
    fail(client, cache, 'access refused', 'hf auth login', 'HF_TOKEN', env={'HF_TOKEN': 'hf_expired'}, **at(PLAIN))
    fail(client, cache, 'owner/nothing', 'no such repository', 'Check the name', **at('owner/nothing'))
    fail(client, cache, repo('resnet18_noah'), 'no such repository', name='resnet18_noah')
    fail(client, cache, 'no such revision', **at(f'{PLAIN}@v9'))
    for env in ({}, {'HF_TOKEN': TOKEN}):
        fail(client, cache, 'gated', f'{hub.url}/owner/gated', 'HF_TOKEN', env=env, **at('owner/gated'))
    fail(client, cache, 'private', 'HF_TOKEN', **at('owner/private'))
    load(client, weights, cache, env={'HF_TOKEN': 'hf_other'}, **at('owner/gated'))
    load(client, weights, cache, env={'HF_TOKEN': 'hf_other'}, **at('owner/private'))
    hub.put('owner/card', {'README.md': b'# Card'})
    fail(client, cache, 'owner/card', 'it has no model.safetensors', **at('owner/card'))


def test_the_token_stays_with_the_client(hub, client, weights, cache):
    hub.put('owner/token', {'model.safetensors': save(weights[NAME])})
    hub.fault('flip', path='owner/token')
    hub.fault('status', method='HEAD', path='owner/token', code=503)
    env = {'HF_TOKEN': TOKEN}
    answers = [load(client, weights, cache, env=env, **at('owner/token'))]
    answers += [fail(client, cache, 'owner/nothing', env=env, **at('owner/nothing'))]
    assert {request.token for word in ('token', 'nothing') for request in seen(hub, 'HEAD', word)} == {TOKEN}
    assert {request.token for request in seen(hub, 'GET', 'owner/token')} == {TOKEN}
    assert TOKEN not in str(answers) + client.errors()
    files = [path for path in cache.rglob('*') if path.is_file()]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_repository_with_a_pickle_only(hub, client, weights, cache, tmp_path):
    marker = tmp_path / 'executed'
    for name, content in dict(
            plain_pickle=dict(epoch=3, state_dict=weights[NAME]),
            evil_pickle=dict(weights[NAME], more=Evil(str(marker)))).items():
        stream = io.BytesIO()
        torch.save(content, stream)
        hub.put(f'owner/{name}', {'pytorch_model.bin': stream.getvalue()})
    load(client, weights, cache, **at('owner/plain_pickle'))
    fail(client, cache, 'owner/evil_pickle', 'mkdir', 'nothing in it was executed', **at('owner/evil_pickle'))
    kwargs = dict(pretrained_cfg_overlay=dict(hf_hub_id='owner/plain_pickle', hf_hub_filename='ema.safetensors'))
    fail(client, cache, 'it has no ema.safetensors', **kwargs)  # nothing else is taken where a file was named
    hub.put('owner/bare_pickle', {'pytorch_model.bin': pickle.dumps(Evil(str(marker)))})
    fail(client, cache, 'owner/bare_pickle', **at('owner/bare_pickle'))
    assert not marker.exists()
    torch.load(io.BytesIO(hub.files('owner/evil_pickle')['pytorch_model.bin']), weights_only=False)
    assert marker.exists()  # so it would have been


# Processes and disks


@pytest.mark.parametrize('spoilt', [False, True], ids=['cold', 'damaged'])
def test_processes_that_start_together(hub, client, weights, cache, spoilt):
    if spoilt:
        load(client, weights, cache)
        spoil(cache, 'flip')
    hub.fault('slow', path='model', rate=20 * MIB, times=None)
    answer = client.run('value = together(4, name, cache_dir=cache)', name=NAME, cache=str(cache))
    assert answer.value == [digest(weights[NAME])] * 4, answer
    hub.stop()
    load(client, weights, cache)


@pytest.mark.parametrize('number, status', [(signal.SIGKILL, -9), (signal.SIGINT, 3)], ids=['kill', 'ctrl-c'])
def test_stopped_in_a_download(hub, client, weights, cache, number, status):
    hub.fault('hang', path='model', after=12 * MIB, seconds=60)
    answer = client.run(
        'value = stopped(number, 9_000_000, name, cache_dir=cache)', number=number, name=LARGE, cache=str(cache))
    assert answer.value == status, answer
    hub.fault('status', method='HEAD', path='model', code=404, error_code='EntryNotFound')
    fail(client, cache, 'it has no model.safetensors', name=LARGE)  # what is left is not taken for the file
    load(client, weights, cache, LARGE)


def test_read_only_cache(room, hub, client, weights, cache, tmp_path):
    cache.mkdir()
    folders = [cache]
    with Client(hub.env(tmp_path / 'home'), room[1], bound()) as reader:
        try:
            cache.chmod(0o555)
            assert reader.run("(Path(cache) / 'x').touch()", cache=str(cache)).kinds[0] == 'PermissionError'
            fail(reader, cache, 'cannot be written', 'cache_dir=')
            cache.chmod(0o755)
            load(client, weights, cache)
            folders = [cache, *(path for path in cache.rglob('*') if path.is_dir() and not path.is_symlink())]
            for folder in folders:
                folder.chmod(0o555)
            load(reader, weights, cache)
            spoil(cache, 'flip')
            fail(reader, cache, 'cannot be written', 'cache_dir=')
        finally:
            for folder in folders:
                folder.chmod(0o755)
        load(reader, weights, cache)


def test_full_disk(hub, client, weights, tmp_path):
    with SmallDisk(tmp_path / 'disk', 10) as disk:
        ballast = disk / 'ballast'
        ballast.write_bytes(bytes(6_000_000))
        fail(client, disk, f'the disk of {disk} is full', 'cache_dir=')
        assert blobs(disk) == []
        ballast.unlink()
        load(client, weights, disk)
