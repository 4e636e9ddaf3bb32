"""Where weights come from, in which order, by every way that timm has to ask for them."""
import functools
import hashlib
import logging
import pickle

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from timm.models import get_pretrained_cfg, save_for_hf

from noah_zoo.catalog import CATALOG, PUBLISHED, SHIPPED, TAG, TWINS, Published, drive_id, weights_at
from noah_zoo.weights import WeightsError, convert_released
from noah_zoo.weights.find import place_on_hub
from tests.client import Client, digest
from tests.conftest import HUB
from tests.drive_server import DriveServer
from tests.hub_server import HubServer
from tests.released import cheap_state_dict

NAME, OTHER = 'mobilenetv2_035_noah', 'mobilenetv2_050_noah'  # OTHER is not recorded: its weights are on the Drive
REPO = f'noah-zoo/{NAME}.{TAG}'
PLACES = ('recorded', 'drive', 'file', 'pickle', 'folder', 'namespace', 'repository', 'state_dict')


@functools.cache
def weights(place):
    """Weights that tell where they come from."""
    if place == 'drive':
        return convert_released(cheap_state_dict(OTHER), OTHER)
    torch.manual_seed(PLACES.index(place))
    return timm.create_model(NAME).state_dict()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Files; the same weights are in repositories of `HUB`."""
    folder = tmp_path_factory.mktemp('files')
    save_file(weights('file'), folder / 'file.safetensors')
    torch.save(dict(state_dict=weights('pickle')), folder / 'pickle.pth')
    torch.save(weights('pickle'), folder / 'bare.pth')
    model = timm.create_model(NAME)
    model.load_state_dict(weights('folder'))
    save_for_hf(model, str(folder / 'dir'), safe_serialization=True)
    config, repository = (folder / 'dir' / 'config.json').read_bytes(), save(weights('repository'))
    HUB.put(f'mine/{NAME}.{TAG}', {'model.safetensors': save(weights('namespace'))})
    HUB.put('find/repository', {'model.safetensors': repository, 'config.json': config})
    HUB.put('find/other_name', {'weights.safetensors': repository})
    HUB.put('find/pickle', {'pytorch_model.bin': (folder / 'pickle.pth').read_bytes()})
    HUB.put('find/evil', {'pytorch_model.bin': pickle.dumps(print, protocol=2)})
    HUB.put('find/malformed', {'model.safetensors': b'\xff' * 1000})
    return folder


@pytest.fixture(scope='module')
def recorded():
    data = save(weights('recorded'))
    return Published(HUB.put(REPO, {'model.safetensors': data}), hashlib.sha256(data).hexdigest())


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    released = tmp_path_factory.mktemp('drive') / 'released.pth'
    torch.save(cheap_state_dict(OTHER), released)
    with DriveServer() as drive:
        drive.put(drive_id(OTHER), released.read_bytes())
        yield drive


@pytest.fixture
def create(folder, recorded, server, hub, tmp_path, monkeypatch, caplog):
    """`timm.create_model` where one tag is recorded and one is on the Drive; fills in '{folder}', that of the files."""
    def filled(value):
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return value.format(folder=folder) if isinstance(value, str) else value

    def create(name, env=(), pretrained=True, **kwargs):
        with monkeypatch.context() as patch:
            for variable, value in {**server.env(), **dict(env)}.items():
                patch.setenv(variable, value)
            return timm.create_model(filled(name), pretrained, cache_dir=str(tmp_path / 'cache'), **filled(kwargs))

    monkeypatch.setitem(PUBLISHED, REPO, recorded)
    caplog.set_level(logging.INFO)
    server.requests.clear()
    return create


FILE = dict(pretrained_cfg_overlay=dict(file='{folder}/file.safetensors'))


@pytest.mark.parametrize('name, kwargs, env, place, log', [
    # The caller's
    (NAME, FILE, {}, 'file', f'{NAME}: weights from {{folder}}/file.safetensors'),
    (f'{NAME}.{TAG}', FILE, {}, 'file', 'file.safetensors'),
    (f'{NAME}.fashion_mnist', dict(pretrained_cfg_overlay=dict(
        file='{folder}/file.safetensors', num_classes=1000, input_size=(3, 224, 224))), {}, 'file', 'file.safetensors'),
    (NAME, FILE, {'NOAH_ZOO_NAMESPACE': 'mine'}, 'file', 'file.safetensors'),
    (NAME, dict(pretrained_cfg_overlay=dict(file='{folder}/pickle.pth')), {}, 'pickle', 'pickle.pth'),
    (NAME, dict(pretrained_cfg_overlay=dict(url='file://{folder}/bare.pth')), {}, 'pickle', 'bare.pth'),
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='find/repository')), {}, 'repository', 'find/repository'),
    (f'{NAME}.fashion_mnist', dict(pretrained_cfg_overlay=dict(
        hf_hub_id='find/repository', num_classes=1000, input_size=(3, 224, 224))), {}, 'repository', 'on the Hub'),
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='find/repository@main')), {}, 'repository', 'on the Hub'),
    (NAME, dict(pretrained_cfg_overlay=dict(
        hf_hub_id='find/other_name', hf_hub_filename='weights.safetensors')), {}, 'repository', 'on the Hub'),
    (f'{NAME}', dict(checkpoint_path='{folder}/file.safetensors', pretrained=False), {}, 'file', ''),
    (f'{NAME}', dict(checkpoint_path='{folder}/file.safetensors'), {}, 'file', ''),
    ('local-dir:{folder}/dir', {}, {}, 'folder', '{folder}/dir'),
    ('hf-hub:find/repository', {}, {}, 'repository', 'weights from find/repository on the Hub'),
    ('hf-hub:find/repository@main', {}, {}, 'repository', 'weights from find/repository@main on the Hub'),
    # The Hub
    (NAME, {}, {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (f'{NAME}.{TAG}', {}, {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (NAME, dict(pretrained_cfg=TAG), {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (NAME, dict(pretrained_cfg_overlay=dict(crop_pct=0.9)), {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (NAME, dict(drop_rate=0.5, drop_path_rate=0.1), {}, 'recorded', REPO),
    (NAME, {}, {'NOAH_ZOO_NAMESPACE': 'mine'}, 'namespace', f'weights from mine/{NAME}.{TAG} on the Hub'),
    # The Drive
    (OTHER, {}, {}, 'drive', f"{OTHER}.{TAG}: weights from the authors' release, converted"),
    pytest.param(
        OTHER, dict(pretrained_cfg_overlay=dict(hf_hub_id=None)), {}, 'drive', "authors' release",
        marks=pytest.mark.exhaustive),
])
def test_order(create, folder, server, hub, caplog, name, kwargs, env, place, log):
    assert digest(create(name, env, **kwargs).state_dict()) == digest(weights(place))
    assert log.format(folder=folder) in caplog.text
    overridden = 'checkpoint_path' in kwargs  # timm loads it after the others
    assert overridden or bool(hub.requests) == (place in ('recorded', 'namespace', 'repository'))
    assert bool(server.requests) == (place == 'drive')
    assert {request.path.split('/resolve/')[0] for request in hub.requests} <= {
        f'/{REPO}', f'/mine/{NAME}.{TAG}', '/find/repository', '/find/other_name'}


def test_weights_inside_the_package(create, server, hub, caplog, tmp_path):
    for name, shipped in SHIPPED.items():
        expected = digest(timm.create_model(name, pretrained=True).state_dict())
        for env in ({}, {'NOAH_ZOO_NAMESPACE': 'mine'}):
            caplog.clear()
            assert digest(create(name, env).state_dict()) == expected
            assert f'{name}: weights inside the package ({shipped.file})' in caplog.text
    assert hub.requests == server.requests == [] and not (tmp_path / 'cache').exists()


def test_a_state_dict(create, caplog):
    model = create(NAME, pretrained_cfg_overlay=dict(state_dict=weights('state_dict')))
    assert digest(model.state_dict()) == digest(weights('state_dict')) and 'state_dict' not in model.pretrained_cfg
    assert f'{NAME}: weights from a state dict' in caplog.text


def test_a_repository_with_a_pickle_only(create, hub):
    model = create(NAME, pretrained_cfg_overlay=dict(hf_hub_id='find/pickle'))
    assert digest(model.state_dict()) == digest(weights('pickle'))
    for repo_id, more, message in (
            ('find/evil', {}, "find/evil on the Hub has no safetensors, only a pickle: .* its pickle names"),
            ('find/pickle', dict(hf_hub_filename='ema.safetensors'), 'it has no ema.safetensors'),
            ('mine/nothing', {}, 'no such repository')):
        with pytest.raises(WeightsError, match=message):
            create(NAME, pretrained_cfg_overlay=dict(hf_hub_id=repo_id, **more))
    hub.put('find/empty', {'README.md': b''})
    with pytest.raises(WeightsError, match='find/empty on the Hub: it has no model.safetensors'):
        create(NAME, pretrained_cfg_overlay=dict(hf_hub_id='find/empty'))


@pytest.mark.parametrize('name, kwargs, message', [
    (NAME, dict(pretrained_cfg_overlay=dict(file='/nowhere/x.safetensors')), '/nowhere/x.safetensors, which does not'),
    (NAME, dict(pretrained_cfg=dict(architecture=NAME)), "no weights are known for the tag None; use a tag of"),
    (NAME, dict(pretrained_cfg=dict(architecture=NAME, tag='mine')), "no weights are known for the tag 'mine'"),
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='a/b/c')), 'a/b/c'),
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='find/malformed')), 'not in the safetensors format'),
    (NAME, dict(env={'NOAH_ZOO_NAMESPACE': 'nobody'}), f'nobody/{NAME}.{TAG} on the Hub: no such repository'),
    (OTHER, FILE, 'the weights are not those of this model'),
    (OTHER, dict(FILE, num_classes=7), 'the weights are not those of this model'),
    (NAME, dict(FILE, num_classes=1000, pretrained_cfg_overlay=dict(
        FILE['pretrained_cfg_overlay'], num_classes=7)), 'add num_classes=1000 to pretrained_cfg_overlay'),
    (f'{NAME}.fashion_mnist', FILE, 'give the num_classes, num_groups, key_ratio, '),
    (NAME, dict(num_groups=2), 'the weights have a head whose key and value are [[8000, 40, 1, 1], [8000, '),
    (NAME, dict(pretrained_cfg='no_such_tag'), 'no_such_tag'),
    ('resnet18_noah', dict(FILE), 'the weights are not those of this model'),
    (NAME, dict(checkpoint_path='/nowhere/x.safetensors'), ''),
])
def test_no_weights_no_model(create, name, kwargs, message):
    with pytest.raises((RuntimeError, FileNotFoundError)) as info:
        create(name, **kwargs)
    assert message in str(info.value)


def test_recorded_but_no_safetensors(create, hub, monkeypatch):
    data = b'\xff' * 1000
    repo_id = f'noah-zoo/resnet18_noah.{TAG}'
    revision = hub.put(repo_id, {'model.safetensors': data})
    monkeypatch.setitem(PUBLISHED, repo_id, Published(revision, hashlib.sha256(data).hexdigest()))
    with pytest.raises(WeightsError, match='arrived as it was sent, but is not in the safetensors format'):
        create('resnet18_noah')


@pytest.mark.parametrize('name, place', [
    (NAME, 'recorded'), pytest.param(OTHER, 'drive', marks=pytest.mark.exhaustive)])
def test_adapted(create, name, place):
    given = weights(place)
    backbone = {key: value for key, value in given.items() if not key.startswith('classifier')}

    def same(model, but=()):
        own = model.state_dict()
        return all(torch.equal(own[key], value) for key, value in backbone.items() if key not in but)

    seven, none, grey = (
        create(name, **kwargs).eval()
        for kwargs in (dict(num_classes=7), dict(num_classes=0), dict(in_chans=1, num_classes=7)))
    assert same(seven) and same(none) and same(grey, ['conv_stem.weight'])
    assert seven.num_classes == 7 and not seven.get_classifier().key.weight.any()  # it begins as pooling
    assert not torch.equal(seven.get_classifier().value.weight, grey.get_classifier().value.weight)
    assert grey.conv_stem.weight.shape[1] == 1
    torch.testing.assert_close(grey.conv_stem.weight, given['conv_stem.weight'].sum(1, keepdim=True))  # timm's rule
    assert same(create(name, num_classes=7, num_groups=4, key_ratio=0.5))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole = create(name).eval()
        assert torch.equal(none(image), whole.forward_head(whole.forward_features(image), pre_logits=True))
        features = create(name, features_only=True, out_indices=(1, 4)).eval()
        maps = whole.forward_intermediates(image, indices=(1, 4), intermediates_only=True)
        for one, other in zip(features(image), maps):
            assert torch.equal(one, other)
    assert whole.pretrained_cfg['tag'] == TAG and whole.pretrained_cfg['num_classes'] == 1000


def test_place_on_hub(monkeypatch):
    file, recorded = 'model.safetensors', Published('0' * 40, '1' * 64)
    for source, place in (
            ('hf-hub:a/b', ('a/b', file, None)), ('hf_hub:a/b@c', ('a/b', file, 'c')), ('local-dir:a/b', None),
            ('resnet50.a1_in1k', ('timm/resnet50.a1_in1k', file, None)), ('resnet50.no_tag', None), (NAME, None)):
        assert place_on_hub(source) == place, source
    monkeypatch.setenv('NOAH_ZOO_NAMESPACE', 'mine')
    assert place_on_hub(NAME) == (f'mine/{NAME}.{TAG}', file, None)
    assert place_on_hub('resnet50.a1_in1k') == ('timm/resnet50.a1_in1k', file, None)
    monkeypatch.setitem(PUBLISHED, f'mine/{NAME}.{TAG}', recorded)
    assert place_on_hub(f'{NAME}.{TAG}') == (f'mine/{NAME}.{TAG}', file, recorded.revision)


def test_what_timm_lists():
    expected = {f'{name}.{TAG}' for name in (*CATALOG, *TWINS)} | set(SHIPPED)
    listed = timm.list_pretrained()
    assert len(expected) == 36 and len(set(listed)) == len(listed) and expected <= set(listed)
    assert not [name for name in listed if '_noah' in name and name not in expected]
    for name in expected:
        cfg = get_pretrained_cfg(name)
        assert cfg.has_weights and cfg.architecture == name.partition('.')[0] and cfg.tag == name.partition('.')[2]
        assert name in SHIPPED or cfg.url == f'https://drive.google.com/file/d/{drive_id(cfg.architecture)}/view'


def test_what_is_recorded_is_in_the_cfg(monkeypatch):
    monkeypatch.setitem(PUBLISHED, REPO, Published('0' * 40, '1' * 64))
    assert weights_at(NAME)['hf_hub_id'] == f'{REPO}@{"0" * 40}'
    assert weights_at(OTHER) == dict(url=f'https://drive.google.com/file/d/{drive_id(OTHER)}/view', hf_hub_id=None)


@pytest.mark.hub
def test_a_record_is_read_by_a_new_process(tmp_path):
    """The record is a file of the package, read as the models are registered."""
    with HubServer() as hub:
        data = save(weights('recorded'))
        revision = hub.put(REPO, {'model.safetensors': data})
        published = {REPO: dict(revision=revision, sha256=hashlib.sha256(data).hexdigest())}
        with Client(hub.env(tmp_path / 'home'), published) as client:
            answer = client.create(NAME)
            assert answer.value == digest(weights('recorded')), answer
            assert f'{NAME}.{TAG}: weights from {REPO}@{revision} on the Hub' in answer.log
            code = 'value = timm.get_pretrained_cfg(name).hf_hub_id'
            assert client.run(code, name=f'{NAME}.{TAG}').value == f'{REPO}@{revision}'
            assert client.run(code, name=OTHER).value is None
            for name in SHIPPED:
                answer = client.create(name)
                assert answer.error is None and str(client.package) in answer.log
