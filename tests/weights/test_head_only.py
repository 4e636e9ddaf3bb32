"""Publishing the head of a frozen run alone, and the whole model from two repositories, on a Hub on loopback."""
import hashlib
import json
import re
import shutil
import time

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from timm.models import save_for_hf

from noah_zoo.models.saving import save_model
from noah_zoo.publish.publish import publish_run
from noah_zoo.weights import WeightsError
from noah_zoo.weights.head_only import KEY, MODEL_TYPE, read_backbone, write_head

from ..client import Client, digest
from ..commands import call
from ..conftest import HUB
from ..hub_server import HubServer
from ..pictures import make_photos
from ..project import FILES, TOKEN, Project, writes

BACKBONE = 'head/resnet'  # of the models of this process


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def noah_on(name, repo_id, **kwargs):
    """A NOAH model with the backbone of a repository, and a head that is not as new."""
    model = timm.create_model('noah', backbone=name, num_classes=3, pretrained_backbone=f'hf-hub:{repo_id}', **kwargs)
    for parameter in model.get_classifier().parameters():
        torch.nn.init.normal_(parameter)
    return model


def put_backbone(folder, repo_id, name):
    save_for_hf(timm.create_model(name), str(folder), safe_serialization=True)
    return HUB.put(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()})


def edited(run, folder, **changes):
    """A copy of a run with other settings."""
    shutil.copytree(run, folder)
    summary = json.loads((folder / 'summary.json').read_text())
    summary['config'].update(changes)
    (folder / 'summary.json').write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope='module')
def frozen(tmp_path_factory, trained_run):
    """The folder of a run on a frozen backbone, BACKBONE, as training leaves it. It is published as head/alone."""
    folder = tmp_path_factory.mktemp('frozen')
    put_backbone(folder / 'backbone', BACKBONE, 'test_resnet')
    run = edited(trained_run, folder / 'run', model='noah', freeze=True, model_kwargs=dict(
        backbone='test_resnet', pretrained_backbone=f'hf-hub:{BACKBONE}'))
    shutil.rmtree(run / 'best')
    save_model(noah_on('test_resnet', BACKBONE), run / 'best', label_names=['blue', 'green', 'red'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_TOKEN', TOKEN)
        publish_run(run, 'head/alone', head_only=True)
    HUB.put('head/whole', {path.name: path.read_bytes() for path in (run / 'best').iterdir()})
    return run


@pytest.fixture
def owner(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)


def test_head_and_backbone_make_the_model(hub, frozen, monkeypatch, tmp_path):
    args = ('publish', '--from', frozen, '--repo-id', 'head/pets', '--head-only')
    assert 'head/pets: ready to be sent' in call(*args, '--dry-run').stderr and not writes(hub)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    done = call(*args)
    assert done.stdout == "timm.create_model('hf-hub:head/pets', pretrained=True)\n", done.stderr
    files, stored = hub.files('head/pets'), hub.files(BACKBONE)['model.safetensors']
    assert set(files) == FILES and hub.tags('head/pets') == {'v1': hub.commits('head/pets')[-1]}
    config = json.loads((frozen / 'best' / 'config.json').read_text())
    assert json.loads(files['config.json']) == {**config, 'model_type': MODEL_TYPE}
    best, sent = load_file(frozen / 'best' / 'model.safetensors'), load(files['model.safetensors'])
    assert sent.keys() == {name for name in best if name.startswith('fc.')}
    assert all(torch.equal(sent[name], best[name]) for name in sent)
    (tmp_path / 'sent.safetensors').write_bytes(files['model.safetensors'])
    record = read_backbone(tmp_path / 'sent.safetensors')
    revision = hub.commits(BACKBONE)[-1]
    assert record == (BACKBONE, revision, 'model.safetensors', sha256(stored), ['fc.bias', 'fc.weight'])
    card = ModelCard(files['README.md'].decode())
    assert (card.data.base_model, card.data['base_model_relation']) == (BACKBONE, 'adapter')
    assert f'https://huggingface.co/{BACKBONE}/tree/{revision}' in card.text and sha256(stored) in card.text
    assert f'the head alone, {len(files["model.safetensors"]) / 1e3:,.1f} kB' in card.text

    model = timm.create_model('hf-hub:head/pets', pretrained=True, cache_dir=tmp_path / 'cache')
    assert digest(model.state_dict()) == digest(best)
    hub.requests.clear()
    assert call(*args).returncode == 0 and writes(hub) == [('POST', '/api/repos/create')]


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=9), dict(in_chans=1), dict(features_only=True, out_indices=(1, 3)), dict(exportable=True)])
def test_head_alone_takes_what_the_whole_model_takes(frozen, kwargs):
    digests = []
    for repo_id in ('head/alone', 'head/whole'):
        torch.manual_seed(0)
        digests.append(digest(timm.create_model(f'hf-hub:{repo_id}', pretrained=True, **kwargs).state_dict()))
    assert digests[0] == digests[1]


def test_head_alone_is_saved_whole(hub, frozen, tmp_path):
    model = timm.create_model('hf-hub:head/alone', pretrained=True)
    assert 'state_dict' not in model.pretrained_cfg  # which would hold the memory
    save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=True)
    with safe_open(tmp_path / 'saved' / 'model.safetensors', 'pt') as weights:
        assert KEY not in (weights.metadata() or {})
    hub.requests.clear()
    saved = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True)
    best = load_file(frozen / 'best' / 'model.safetensors')
    assert digest(saved.state_dict()) == digest(best) and not hub.requests


def test_head_alone_in_a_folder_or_a_file(hub, frozen, tmp_path):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes(hub.files('head/alone')[name])
    overlay = dict(file=str(tmp_path / 'model.safetensors'), num_classes=3)
    best = load_file(frozen / 'best' / 'model.safetensors')
    for model in (
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True),
            timm.create_model(
                'noah', backbone='test_resnet', num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)):
        assert digest(model.state_dict()) == digest(best)


@pytest.mark.parametrize('changes, found', [
    (dict(revision='0' * 40), 'it has no such revision'),
    (dict(sha256='1' * 64), 'has another model.safetensors than the recorded one'),
    (dict(repo_id='head/gone'), 'no such repository'), (dict(filename='gone.safetensors'), 'it has no gone.safetens'),
    (dict(weather='fine'), 'names its backbone in a way that is not known here: '),
    ('head/resnet', 'names its backbone in a way that is not known here: head/resnet; update noah_zoo')])
def test_a_backbone_that_cannot_be_had(hub, frozen, tmp_path, changes, found):
    sent = hub.files('head/alone')['model.safetensors']
    (tmp_path / 'sent.safetensors').write_bytes(sent)
    record = read_backbone(tmp_path / 'sent.safetensors')._asdict()
    text = json.dumps({**record, **changes}) if isinstance(changes, dict) else changes
    save_file(load(sent), tmp_path / 'spoilt.safetensors', {KEY: text})
    overlay = dict(file=str(tmp_path / 'spoilt.safetensors'), num_classes=3)
    with pytest.raises(WeightsError) as info:
        timm.create_model(
            'noah', backbone='test_resnet', num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay,
            cache_dir=str(tmp_path / 'cache'))
    assert found in str(info.value)
    if 'names its backbone' not in found:
        changed = {**record, **changes}
        for part in ('{filename} of {repo_id}@{revision} with sha256 {sha256}', 'ask for the whole model'):
            assert part.format(**changed) in str(info.value)


def test_other_files_have_no_backbone(tmp_path):
    (tmp_path / 'pickle').write_bytes(b'...')
    save_file({'weight': torch.randn(3)}, tmp_path / 'other.safetensors')
    for name in ('pickle', 'other.safetensors', 'absent'):
        assert read_backbone(tmp_path / name) is None


OTHER_RUNS = (
    (dict(freeze=False), 'it trained the backbone, too'),
    (dict(model_kwargs=dict(backbone='test_resnet')), 'it was trained from scratch'),
    (dict(model_kwargs=dict(pretrained_backbone='/home/me/twin.safetensors')),
     'it started from /home/me/twin.safetensors, which is not a safetensors file in a repository on the Hub'),
    (dict(model='local-dir:runs/old/best', pretrained=True), 'it started from local-dir:runs/old/best, which is not'),
    (dict(model='mobilenetv2_035_noah.fashion_mnist', pretrained=True), 'it started from mobilenetv2_035_noah.fashion'),
    (dict(model='resnet18_noah', pretrained=True), 'it started from resnet18_noah, which is not'),  # on Google Drive
    (dict(model='vit_base_patch16_clip_224.openai.x', pretrained=True), 'it started from vit_base_patch16_clip_224.o'))


def test_runs_that_have_no_head_alone(hub, frozen, tmp_path):
    for number, (changes, reason) in enumerate(OTHER_RUNS):
        folder = edited(frozen, tmp_path / str(number), **changes)
        with pytest.raises(ValueError) as info:
            publish_run(folder, 'head/none', head_only=True)
        assert f'{folder}: no head alone can be published: {reason}' in str(info.value), changes
        assert 'Accepted is a run with --freeze or --cache-features' in str(info.value)
    vanilla = edited(frozen, tmp_path / 'vanilla')
    shutil.rmtree(vanilla / 'best')
    save_for_hf(timm.create_model('test_resnet', num_classes=3), str(vanilla / 'best'), safe_serialization=True)
    with pytest.raises(ValueError, match='test_resnet is not a NOAH model'):
        publish_run(vanilla, 'head/none', head_only=True)
    assert not hub.requests


def test_a_backbone_that_changed(hub, frozen, tmp_path):
    def put(repo_id, change):
        weights = load(hub.files(BACKBONE)['model.safetensors'])
        return hub.put(repo_id, {'model.safetensors': save(change(weights))})

    def nudge(weights):
        weights['layer4.0.conv1.weight'][0, 0, 0, 0] += 1e-6
        return weights

    revision = put('head/nudged', nudge)
    with pytest.raises(ValueError) as info:
        write_head(frozen / 'best', tmp_path / 'head', 'head/nudged')
    for part in (f'head/nudged@{revision} is not what {frozen}/best was trained on: 1 of ',
                 'layer4.0.conv1.weight first', sha256(hub.files('head/nudged')['model.safetensors'])):
        assert part in str(info.value)
    put('head/short', lambda weights: {k: v for k, v in weights.items() if not k.startswith('layer4')})
    with pytest.raises(ValueError, match='is missing.*Publish the whole model'):
        write_head(frozen / 'best', tmp_path / 'head', 'head/short')
    assert not (tmp_path / 'head').exists()


def test_a_head_trained_on_a_head_names_the_same_backbone(hub, frozen, tmp_path):
    backbone = write_head(frozen / 'best', tmp_path / 'again', 'head/alone')
    assert backbone[:2] == (BACKBONE, hub.commits(BACKBONE)[-1])
    assert read_backbone(tmp_path / 'again' / 'model.safetensors')[:4] == backbone[:4]
    assert backbone.without == ('fc.bias', 'fc.weight')


def test_tensors_in_another_shape_and_form(hub, tmp_path):
    """Position embeddings for another image size go along; names that timm converts as it loads are refused."""
    put_backbone(tmp_path / 'backbone', 'head/vit', 'test_vit')
    save_for_hf(noah_on('test_vit', 'head/vit', img_size=64), str(tmp_path / 'best'), safe_serialization=True)
    backbone = write_head(tmp_path / 'best', tmp_path / 'head', 'head/vit')
    sent, best = load_file(tmp_path / 'head' / 'model.safetensors'), load_file(tmp_path / 'best' / 'model.safetensors')
    assert sent.keys() == {name for name in best if name.startswith('head.')} | {'pos_embed'}
    assert backbone.without == ('head.bias', 'head.weight')
    model = timm.create_model(f'local-dir:{tmp_path / "head"}', pretrained=True)
    assert digest(model.state_dict()) == digest(best)

    stored = load(hub.files('head/vit')['model.safetensors'])
    dino = {name.replace('.fc1.', '.w12.'): value for name, value in stored.items()}
    hub.put('head/dino', {'model.safetensors': save(dict(dino, mask_token=torch.zeros(1, 64)))})
    with pytest.raises(ValueError, match='in another form than timm, blocks.0.mlp.fc1..* Publish the whole model'):
        write_head(tmp_path / 'best', tmp_path / 'dino', 'head/dino')


def test_usage_of_head_only(tmp_path):
    for args in (('resnet18_noah',), ('--all',)):
        done = call('publish', *args, '--from', tmp_path, '--head-only')
        assert done.returncode == 2 and '--head-only is for a training run; give its --repo-id' in done.stderr


# Runs that were trained, and processes of their own


RESNET, VIT = 'timm/test_resnet.r160_in1k', 'timm/test_vit.r160_in1k'
NOAH = 'mobilenetv2_035_noah'
RECORDED = f'noah-zoo/{NOAH}.osvai_in1k'
TRAIN = '''
from noah_zoo.training import configure, train
for name, model, settings in runs:
    train(configure(model, f'{folder}/runs/{name}', 'none', **{**dict(
        dataset='folder', data_dir=f'{folder}/photos', val_fraction=0.25, epochs=1, batch_size=8, workers=0, cpu=True,
        lr=0.1, img_size=64), **settings}))
'''
PUBLISH = '''
from noah_zoo.publish.publish import publish_run
published = publish_run(run, repo_id, head_only=True, dry_run=dry_run)
value = published and published.revision
'''


def on(backbone):
    return dict(model_kwargs=dict(backbone=backbone, pretrained_backbone=backbone))


RUNS = (  # a frozen run of each way to start from weights on the Hub, and one that trains all of it
    ('resnet', 'noah', dict(freeze=True, model_ema_decay=0.5, **on('test_resnet.r160_in1k'))),
    ('vit', 'noah', dict(freeze=True, **on('test_vit'))),
    ('named', NOAH, dict(cache_features='features', pretrained=True)),
    ('trained', 'noah', on('test_resnet.r160_in1k')),
    ('again', 'hf-hub:you/resnet-head', dict(freeze=True, pretrained=True, seed=1)))


class Workshop(Project):
    """A project with runs, a registered model that is recorded, and backbones on the Hub."""

    def __init__(self, folder, hub):
        super().__init__(folder, hub)
        make_photos(folder / 'photos')
        torch.manual_seed(0)
        self.revisions = {
            repo_id: hub.put(repo_id, {'model.safetensors': save(timm.create_model(name).state_dict())})
            for repo_id, name in ((RESNET, 'test_resnet'), (VIT, 'test_vit'), (RECORDED, NOAH))}
        record = {RECORDED: dict(
            revision=self.revisions[RECORDED], sha256=sha256(hub.files(RECORDED)['model.safetensors']))}
        self.record.write_text(json.dumps(record))
        self.client = Client(hub.env(folder / 'home', TOKEN), record)

    def train(self, runs):
        answer = self.client.run(TRAIN, folder=str(self.folder), runs=runs)
        assert answer.error is None, self.client.errors()

    def send(self, run, repo_id=None, dry_run=False):
        """What scripts/publish.py does, in the client."""
        return self.client.run(
            PUBLISH, run=str(self.folder / 'runs' / run), repo_id=repo_id or f'you/{run}-head', dry_run=dry_run)

    def best(self, run):
        return load_file(self.folder / 'runs' / run / 'best' / 'model.safetensors')

    def edited(self, name, run='resnet', **changes):
        return edited(self.folder / 'runs' / run, self.folder / 'runs' / name, **changes)


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    with HubServer(users={TOKEN: 'you'}) as hub:
        workshop = Workshop(tmp_path_factory.mktemp('workshop'), hub)
        with workshop.client:
            workshop.train(RUNS[:-1])
            assert workshop.send('resnet').error is None, workshop.client.errors()
            workshop.train(RUNS[-1:])
            yield workshop


@pytest.fixture(scope='module')
def client(workshop):
    return workshop.client


@pytest.mark.hub
@pytest.mark.parametrize('run, repo_id, head', [
    ('resnet', RESNET, 'fc.'), ('vit', VIT, 'head.'), ('named', RECORDED, 'classifier.'), ('again', RESNET, 'fc.')])
def test_both_make_the_model_that_was_trained(workshop, run, repo_id, head, tmp_path):
    hub, best = workshop.hub, workshop.best(run)
    revision = workshop.send(run).value
    assert hub.tags(f'you/{run}-head') == {'v1': revision}, workshop.client.errors()
    files, backbone = hub.files(f'you/{run}-head'), hub.files(repo_id)['model.safetensors']
    assert set(files) == FILES
    config = json.loads((workshop.folder / 'runs' / run / 'best' / 'config.json').read_text())
    # transformers knows no such model, and does not give the head another backbone
    assert json.loads(files['config.json']) == {**config, 'model_type': 'noah_head_without_backbone'}
    sent = load(files['model.safetensors'])
    assert sent.keys() == {k for k in best if k.startswith(head)} | ({'pos_embed'} if run == 'vit' else set())
    assert len(files['model.safetensors']) < (0.5 if run == 'named' else 0.2) * len(backbone)
    (tmp_path / 'sent.safetensors').write_bytes(files['model.safetensors'])
    record = read_backbone(tmp_path / 'sent.safetensors')
    revision = workshop.revisions[repo_id]
    assert record[:4] == (repo_id, revision, 'model.safetensors', sha256(backbone))

    card = ModelCard(files['README.md'].decode())
    assert (card.data.base_model, card.data['base_model_relation']) == (repo_id, 'adapter')
    assert f'https://huggingface.co/{repo_id}/tree/{revision}' in card.text and sha256(backbone) in card.text
    assert f'the head alone, {len(files["model.safetensors"]) / 1e3:,.1f} kB' in card.text
    assert 'import noah_zoo' in card.text and '--freeze' in card.text

    answer = workshop.client.create(f'hf-hub:you/{run}-head', cache_dir=str(tmp_path / 'cache'))
    assert answer.value == digest(best), answer.error
    sent = writes(workshop.hub)
    assert workshop.send(run).value == hub.tags(f'you/{run}-head')['v1']
    assert {path for _, path in writes(workshop.hub)[len(sent):]} == {'/api/repos/create'}


@pytest.mark.hub
def test_the_commands(workshop, tmp_path):
    args = ('scripts/publish.py', '--from', 'runs/named', '--repo-id', 'you/pets-head', '--head-only')
    assert 'ready to be sent: ' in workshop.run(*args, '--dry-run', token=None)
    workshop.hub.fault('hang', method='POST', path='/tag/', times=None, seconds=3600)
    process = workshop.start(*args)
    while not any(request.path.startswith('/api/models/you/pets-head/tag') for request in list(workshop.hub.requests)):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    workshop.hub.clear_faults()
    commits = workshop.hub.commits('you/pets-head')
    assert workshop.hub.tags('you/pets-head') == {}
    assert "timm.create_model('hf-hub:you/pets-head', pretrained=True)" in workshop.run(*args)
    assert workshop.hub.commits('you/pets-head') == commits
    assert workshop.hub.tags('you/pets-head') == {'v1': commits[-1]}

    # A process of its own with an empty cache and no token, then one without a network.
    printed = workshop.run(
        'scripts/predict.py', 'photos/red/0.jpg', '--model', 'hf-hub:you/pets-head', token=None,
        HF_HOME=str(tmp_path / 'home'))
    assert all(name in printed for name in ('red', 'blue', 'green'))
    code = '''
import sys, timm, noah_zoo
from safetensors.torch import save_file
save_file(timm.create_model('hf-hub:you/pets-head', pretrained=True).state_dict(), sys.argv[1])
'''
    workshop.run('-c', code, tmp_path / 'loaded', token=None, HF_HOME=str(tmp_path / 'home'), HF_HUB_OFFLINE='1',
                 HF_ENDPOINT='http://127.0.0.1:9')
    loaded, best = load_file(tmp_path / 'loaded'), workshop.best('named')
    assert loaded.keys() == best.keys() and all(torch.equal(loaded[name], best[name]) for name in best)


@pytest.fixture(scope='module')
def pair(workshop):
    """The same model, as a whole in a repository of its own."""
    best = workshop.folder / 'runs' / 'resnet' / 'best'
    workshop.hub.put('you/resnet', {path.name: path.read_bytes() for path in best.iterdir()})
    return 'hf-hub:you/resnet', 'hf-hub:you/resnet-head'


@pytest.mark.hub
@pytest.mark.parametrize('kwargs', [
    dict(), dict(num_classes=9), dict(in_chans=1), dict(in_chans=5, num_classes=2), dict(features_only=True),
    dict(features_only=True, out_indices=(1, 3)), dict(drop_rate=0.5), dict(exportable=True)])
def test_timms_habits(client, pair, kwargs):
    code = '''
value = []
for name in names:
    torch.manual_seed(0)
    value.append(digest(create(name, cache_dir=cache, **kwargs).state_dict()))
'''
    answer = client.run(code, names=pair, kwargs=kwargs, cache=None)
    assert answer.error is None, client.errors()
    assert answer.value[0] == answer.value[1]


@pytest.mark.hub
def test_another_cache_and_no_memory_is_held(client, pair, tmp_path):
    code = '''
model = create(name, features_only=True, cache_dir=cache)
value = ['state_dict' in module.pretrained_cfg for module in model.modules() if hasattr(module, 'pretrained_cfg')]
'''
    answer = client.run(code, name=pair[1], cache=str(tmp_path))
    assert answer.error is None and answer.value and not any(answer.value)
    assert {path.name for path in tmp_path.glob('models--*')} == {
        'models--you--resnet-head', 'models--timm--test_resnet.r160_in1k'}
    assert 'weights from you/resnet-head on the Hub' in answer.log and f'its backbone from {RESNET}@' in answer.log


@pytest.mark.hub
def test_saved_it_is_whole(client, pair, workshop, tmp_path):
    code = '''
from timm.models import save_for_hf
save_for_hf(create(name), folder, safe_serialization=True)
'''
    assert client.run(code, name=pair[1], folder=str(tmp_path / 'saved')).error is None
    with safe_open(tmp_path / 'saved' / 'model.safetensors', 'pt') as weights:
        assert KEY not in (weights.metadata() or {})
    requests = len(workshop.hub.requests)
    answer = client.create(f'local-dir:{tmp_path / "saved"}', cache_dir=str(tmp_path / 'empty'))
    assert answer.value == digest(workshop.best('resnet')) and len(workshop.hub.requests) == requests


@pytest.mark.hub
def test_a_downloaded_folder_is_as_good(client, pair, workshop, tmp_path):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes(workshop.hub.files('you/resnet-head')[name])
    assert client.create(f'local-dir:{tmp_path}').value == digest(workshop.best('resnet'))
    overlay = dict(file=str(tmp_path / 'model.safetensors'), num_classes=3)
    answer = client.create('noah', backbone='test_resnet', num_classes=3, pretrained_cfg_overlay=overlay)
    assert answer.value == digest(workshop.best('resnet'))


@pytest.mark.hub
def test_validate(client, workshop):
    code = '''
from noah_zoo.training.validate import validate
value = [validate(name, 'folder', data_dir=data_dir, split='train', workers=0, cpu=True) for name in names]
'''
    best = str(workshop.folder / 'runs' / 'resnet' / 'best')
    answer = client.run(
        code, names=['hf-hub:you/resnet-head', f'local-dir:{best}'], data_dir=str(workshop.folder / 'photos'))
    assert answer.error is None, client.errors()
    head, whole = answer.value
    assert head['images'] == 42 and {**head, 'model': ''} == {**whole, 'model': ''}


@pytest.mark.hub
def test_a_record_of_other_weights_is_refused(client, workshop, tmp_path):
    files = workshop.hub.files('you/resnet-head')
    (tmp_path / 'sent').write_bytes(files['model.safetensors'])
    torch.manual_seed(1)
    other = {k: v.repeat(2) if v.ndim == 1 else v for k, v in timm.create_model('test_resnet').state_dict().items()}
    data = save(other)
    revision = workshop.hub.put('other/shapes', {'model.safetensors': data})
    record = read_backbone(tmp_path / 'sent')._replace(
        repo_id='other/shapes', revision=revision, sha256=sha256(data))
    for text, message in (
            (json.dumps(record._asdict()), 'conv1.1.weight has shape [32], not [16]'),
            (json.dumps(dict(record._asdict(), weather='fine')), 'names its backbone in a way that is not known here'),
            ('timm/test_resnet', 'names its backbone in a way that is not known here')):
        spoilt = {**files, 'model.safetensors': save(load(files['model.safetensors']), {KEY: text})}
        workshop.hub.put('you/spoilt', spoilt)
        answer = client.create('hf-hub:you/spoilt', cache_dir=str(tmp_path))
        assert 'WeightsError' in answer.kinds and message in answer.error, answer.error


@pytest.mark.hub
def test_a_repository_that_changed_since_the_run_is_found_out(workshop):
    before = workshop.hub.files(RESNET)['model.safetensors']
    message = workshop.send('trained').error
    assert 'it trained the backbone, too' in message and 'any run can be published whole' in message
    folder = workshop.edited('thawed', 'trained', freeze=True)  # says so, and did not
    message = workshop.send('thawed').error
    revision = workshop.hub.commits(RESNET)[-1]
    assert f'{RESNET}@{revision} is not what {folder}/best was trained on' in message and sha256(before) in message
    try:
        weights = load(before)
        weights['layer4.0.conv1.weight'][0, 0, 0, 0] += 1e-6
        revision = workshop.hub.put(RESNET, {'model.safetensors': save(weights)})
        message = workshop.send('resnet', repo_id='you/late').error
        assert f'{RESNET}@{revision} is not what' in message and '1 of ' in message
        assert 'layer4.0.conv1.weight first' in message and sha256(save(weights)) in message
        short = save({name: value for name, value in weights.items() if not name.startswith('layer4')})
        workshop.hub.put(RESNET, {'model.safetensors': short})
        message = workshop.send('resnet', repo_id='you/late').error
        assert 'is missing' in message and 'Publish the whole model' in message
    finally:
        workshop.hub.put(RESNET, {'model.safetensors': before})
    assert workshop.send('resnet', 'you/late', dry_run=True).error is None
    assert ('POST', '/api/models/you/late/commit/main') not in writes(workshop.hub)


@pytest.mark.hub
def test_weights_in_another_form_are_refused(workshop):
    """Files that timm converts as it loads: DINOv2's own names, and a patch embedding that is a matrix."""
    stored = load(workshop.hub.files(VIT)['model.safetensors'])
    before = workshop.hub.files(VIT)['model.safetensors']
    try:
        dino = {name.replace('.fc1.', '.w12.'): value for name, value in stored.items()}
        workshop.hub.put(VIT, {'model.safetensors': save(dict(dino, mask_token=torch.zeros(1, 64)))})
        message = workshop.send('vit', repo_id='you/dino').error
        assert 'in another form than timm, blocks.0.mlp.fc1.' in message and 'Publish the whole model' in message
        flat = dict(stored, **{'patch_embed.proj.weight': stored['patch_embed.proj.weight'].flatten(1)})
        workshop.hub.put(VIT, {'model.safetensors': save(flat)})
        assert workshop.send('vit', repo_id='you/flat').error is None  # the one that timm reshapes goes along
    finally:
        workshop.hub.put(VIT, {'model.safetensors': before})
    sent = load(workshop.hub.files('you/flat')['model.safetensors'])
    assert {'patch_embed.proj.weight', 'pos_embed'} < sent.keys() and len(sent) == 6


@pytest.mark.hub
def test_what_does_not_come_back_is_not_tagged(workshop):
    workshop.hub.fault('flip', method='GET', path=r'you/bad/.*model.safetensors', times=None)
    assert 'damaged' in workshop.send('resnet', repo_id='you/bad').error
    workshop.hub.clear_faults()
    assert workshop.hub.tags('you/bad') == {}


@pytest.mark.hub
def test_help(workshop):
    text = ' '.join(workshop.run('scripts/publish.py', '--help').split())
    assert re.search('--head-only .*frozen backbone', text)
