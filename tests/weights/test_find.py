"""Where weights come from, in which order, by every way that timm has to ask for them."""
import hashlib

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from timm.models import get_pretrained_cfg, save_for_hf

from noah_zoo.catalog import CATALOG, SHIPPED, TAG, TWINS, drive_id
from noah_zoo.weights import convert_released
from tests.client import Client, digest
from tests.drive_server import DriveServer
from tests.hub_server import HubServer
from tests.released import cheap_state_dict

NAME, OTHER = 'mobilenetv2_035_noah', 'mobilenetv2_050_noah'  # OTHER is not recorded: its weights are on the Drive
REPO = f'noah-zoo/{NAME}.{TAG}'
PLACES = ('recorded', 'drive', 'file', 'pickle', 'folder', 'namespace', 'repository', 'state_dict')


def weights(place):
    """Weights that tell where they come from."""
    torch.manual_seed(PLACES.index(place))
    return timm.create_model(OTHER if place == 'drive' else NAME).state_dict()


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """A client and a folder of files; one tag is recorded, one is on the Drive."""
    folder = tmp_path_factory.mktemp('room')
    data = save(weights('recorded'))
    save_file(weights('file'), folder / 'file.safetensors')
    torch.save(dict(state_dict=weights('pickle')), folder / 'pickle.pth')
    torch.save(weights('pickle'), folder / 'bare.pth')
    model = timm.create_model(NAME)
    model.load_state_dict(weights('folder'))
    save_for_hf(model, str(folder / 'dir'), safe_serialization=True)
    config = (folder / 'dir' / 'config.json').read_bytes()
    released = cheap_state_dict(OTHER)
    torch.save(released, folder / 'released.pth')
    with HubServer() as hub, DriveServer() as drive:
        revision = hub.put(REPO, {'model.safetensors': data})
        hub.put(f'mine/{NAME}.{TAG}', {'model.safetensors': save(weights('namespace'))})
        hub.put('owner/repository', {'model.safetensors': save(weights('repository')), 'config.json': config})
        hub.put('owner/other_name', {'weights.safetensors': save(weights('repository'))})
        drive.put(drive_id(OTHER), (folder / 'released.pth').read_bytes())
        published = {REPO: dict(revision=revision, sha256=hashlib.sha256(data).hexdigest())}
        with Client({**hub.env(folder / 'home'), **drive.env()}, published) as client:
            yield client, folder, hub, drive


@pytest.fixture(scope='module')
def client(room):
    return room[0]


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
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='owner/repository')), {}, 'repository', 'owner/repository'),
    (f'{NAME}.fashion_mnist', dict(pretrained_cfg_overlay=dict(
        hf_hub_id='owner/repository', num_classes=1000, input_size=(3, 224, 224))), {}, 'repository', 'on the Hub'),
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='owner/repository@main')), {}, 'repository', 'on the Hub'),
    (NAME, dict(pretrained_cfg_overlay=dict(
        hf_hub_id='owner/other_name', hf_hub_filename='weights.safetensors')), {}, 'repository', 'on the Hub'),
    (f'{NAME}', dict(checkpoint_path='{folder}/file.safetensors', pretrained=False), {}, 'file', ''),
    (f'{NAME}', dict(checkpoint_path='{folder}/file.safetensors'), {}, 'file', ''),
    ('local-dir:{folder}/dir', {}, {}, 'folder', '{folder}/dir'),
    ('hf-hub:owner/repository', {}, {}, 'repository', 'weights from owner/repository on the Hub'),
    ('hf-hub:owner/repository@main', {}, {}, 'repository', 'weights from owner/repository@main on the Hub'),
    # The Hub
    (NAME, {}, {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (f'{NAME}.{TAG}', {}, {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (NAME, dict(pretrained_cfg=TAG), {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (NAME, dict(pretrained_cfg_overlay=dict(crop_pct=0.9)), {}, 'recorded', f'{NAME}.{TAG}: weights from {REPO}@'),
    (NAME, dict(drop_rate=0.5, drop_path_rate=0.1), {}, 'recorded', REPO),
    (NAME, {}, {'NOAH_ZOO_NAMESPACE': 'mine'}, 'namespace', f'weights from mine/{NAME}.{TAG} on the Hub'),
    # The Drive
    (OTHER, {}, {}, 'drive', f"{OTHER}.{TAG}: weights from the authors' release, converted"),
    (OTHER, dict(pretrained_cfg_overlay=dict(hf_hub_id=None)), {}, 'drive', "authors' release"),
])
def test_order(room, tmp_path, name, kwargs, env, place, log):
    client, folder, hub, drive = room

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        return value.format(folder=folder) if isinstance(value, str) else value

    hub.requests.clear()
    drive.requests.clear()
    answer = client.create(filled(name), env=env, cache_dir=str(tmp_path), **filled(kwargs))
    assert answer.error is None, answer.error
    expected = convert_released(cheap_state_dict(OTHER), OTHER) if place == 'drive' else weights(place)
    assert answer.value == digest(expected)
    assert filled(log) in answer.log
    overridden = 'checkpoint_path' in kwargs  # timm loads it after the others
    assert overridden or bool(hub.requests) == (place in ('recorded', 'namespace', 'repository'))
    assert bool(drive.requests) == (place == 'drive')
    assert {request.path.split('/resolve/')[0] for request in hub.requests} <= {
        f'/{REPO}', f'/mine/{NAME}.{TAG}', '/owner/repository', '/owner/other_name'}


def test_weights_inside_the_package(room, tmp_path):
    client, _, hub, drive = room
    hub.requests.clear()
    drive.requests.clear()
    for name in SHIPPED:
        for env in ({}, {'NOAH_ZOO_NAMESPACE': 'mine'}):
            answer = client.create(name, env=env, cache_dir=str(tmp_path))
            assert answer.value == digest(timm.create_model(name, pretrained=True).state_dict())
            assert f'{name}: weights inside the package' in answer.log and str(client.package) in answer.log
    assert hub.requests == drive.requests == [] and list(tmp_path.iterdir()) == []


def test_a_state_dict(client):
    answer = client.run('''
given = timm.create_model(name).state_dict()
model = create(name, pretrained_cfg_overlay=dict(state_dict=given))
value = digest(given) == digest(model.state_dict()), 'state_dict' in model.pretrained_cfg
''', name=NAME)
    assert answer.value == [True, False], answer
    assert f'{NAME}: weights from a state dict' in answer.log


@pytest.mark.parametrize('name, kwargs, message', [
    (NAME, dict(pretrained_cfg_overlay=dict(file='/nowhere/x.safetensors')), '/nowhere/x.safetensors, which does not'),
    (NAME, dict(pretrained_cfg=dict(architecture=NAME)), "no weights are known for the tag None; use a tag of"),
    (NAME, dict(pretrained_cfg=dict(architecture=NAME, tag='mine')), "no weights are known for the tag 'mine'"),
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='a/b/c')), 'a/b/c'),
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
def test_no_weights_no_model(room, name, kwargs, message):
    client, folder, _, _ = room
    if 'file' in kwargs.get('pretrained_cfg_overlay', {}):
        file = kwargs['pretrained_cfg_overlay']['file'].format(folder=folder)
        kwargs = dict(kwargs, pretrained_cfg_overlay=dict(kwargs['pretrained_cfg_overlay'], file=file))
    answer = client.create(name, **kwargs)
    assert answer.value is None and message in answer.error, answer


@pytest.mark.parametrize('name, place', [(NAME, 'recorded'), (OTHER, 'drive')])
def test_adapted(client, tmp_path, name, place):
    given = convert_released(cheap_state_dict(OTHER), OTHER) if place == 'drive' else weights(place)
    torch.save(given, tmp_path / 'given.pth')
    answer = client.run('''
given = torch.load(path)
backbone = {key: value for key, value in given.items() if not key.startswith('classifier')}

def same(model, but=()):
    own = model.state_dict()
    return all(torch.equal(own[key], value) for key, value in backbone.items() if key not in but)

def make(**kwargs):
    return create(name, cache_dir=cache, **kwargs).eval()

seven, none, grey = make(num_classes=7), make(num_classes=0), make(in_chans=1, num_classes=7)
assert same(seven) and same(none) and same(grey, ['conv_stem.weight'])
assert seven.num_classes == 7 and not seven.get_classifier().key.weight.any()  # it begins as pooling
assert not torch.equal(seven.get_classifier().value.weight, make(num_classes=7).get_classifier().value.weight)
assert grey.conv_stem.weight.shape[1] == 1
torch.testing.assert_close(grey.conv_stem.weight, given['conv_stem.weight'].sum(1, keepdim=True))  # timm's rule
assert same(make(num_classes=7, num_groups=4, key_ratio=0.5))
image = torch.randn(1, 3, 64, 64)
with torch.no_grad():
    whole = make()
    assert torch.equal(none(image), whole.forward_head(whole.forward_features(image), pre_logits=True))
    features = make(features_only=True, out_indices=(1, 4))
    maps = whole.forward_intermediates(image, indices=(1, 4), intermediates_only=True)
    for one, other in zip(features(image), maps):
        assert torch.equal(one, other)
assert whole.pretrained_cfg['tag'] == 'osvai_in1k' and whole.pretrained_cfg['num_classes'] == 1000
value = True
''', name=name, cache=str(tmp_path / 'cache'), path=str(tmp_path / 'given.pth'))
    assert answer.value, answer


def test_what_timm_lists():
    expected = {f'{name}.{TAG}' for name in (*CATALOG, *TWINS)} | set(SHIPPED)
    listed = timm.list_pretrained()
    assert len(expected) == 36 and len(set(listed)) == len(listed) and expected <= set(listed)
    assert not [name for name in listed if '_noah' in name and name not in expected]
    for name in expected:
        cfg = get_pretrained_cfg(name)
        assert cfg.has_weights and cfg.architecture == name.partition('.')[0] and cfg.tag == name.partition('.')[2]
        assert name in SHIPPED or cfg.url == f'https://drive.google.com/file/d/{drive_id(cfg.architecture)}/view'


def test_what_is_recorded_is_in_the_cfg(client):
    answer = client.run('value = timm.get_pretrained_cfg(name).hf_hub_id', name=f'{NAME}.{TAG}')
    assert answer.value.startswith(f'{REPO}@')
    assert client.run('value = timm.get_pretrained_cfg(name).hf_hub_id', name=OTHER).value is None
