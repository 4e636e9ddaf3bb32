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
from safetensors.torch import load, load_file, save
from timm.models import save_for_hf

from noah_zoo.weights.head_only import KEY, read_backbone

from ..client import Client, digest
from ..hub_server import HubServer
from ..pictures import make_photos
from ..project import FILES, TOKEN, Project

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
        """A copy of a run with other settings."""
        folder = self.folder / 'runs' / name
        shutil.copytree(self.folder / 'runs' / run, folder)
        summary = json.loads((folder / 'summary.json').read_text())
        summary['config'].update(changes)
        (folder / 'summary.json').write_text(json.dumps(summary))
        return folder


def sha256(data):
    return hashlib.sha256(data).hexdigest()


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
    writes = workshop.writes()
    assert workshop.send(run).value == hub.tags(f'you/{run}-head')['v1']
    assert {path for _, path in workshop.writes()[len(writes):]} == {'/api/repos/create'}


def test_the_commands(workshop, tmp_path):
    args = ('scripts/publish.py', '--from', 'runs/named', '--repo-id', 'you/pets-head', '--head-only')
    assert 'ready to be sent: ' in workshop.run(*args, '--dry-run', token=None)
    workshop.hub.fault('hang', method='POST', path='/tag/', times=None, seconds=60)
    process = workshop.start(*args)
    end = time.monotonic() + 120
    while not any(request.path.startswith('/api/models/you/pets-head/tag') for request in list(workshop.hub.requests)):
        assert time.monotonic() < end and process.poll() is None
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


def test_a_downloaded_folder_is_as_good(client, pair, workshop, tmp_path):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes(workshop.hub.files('you/resnet-head')[name])
    assert client.create(f'local-dir:{tmp_path}').value == digest(workshop.best('resnet'))
    overlay = dict(file=str(tmp_path / 'model.safetensors'), num_classes=3)
    answer = client.create('noah', backbone='test_resnet', num_classes=3, pretrained_cfg_overlay=overlay)
    assert answer.value == digest(workshop.best('resnet'))


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


@pytest.mark.parametrize('changes, found', [
    (dict(revision='0' * 40), 'it has no such revision'),
    (dict(sha256='1' * 64), 'has another model.safetensors than the recorded one: its sha256 is {sha256}, expected 1'),
    (dict(repo_id='timm/gone'), 'no such repository'),
    (dict(filename='gone.safetensors'), 'it has no gone.safetensors'),
])
def test_a_changed_backbone_is_refused(client, workshop, changes, found, tmp_path):
    files = workshop.hub.files('you/resnet-head')
    (tmp_path / 'sent').write_bytes(files['model.safetensors'])
    record = read_backbone(tmp_path / 'sent')._replace(**changes)
    files['model.safetensors'] = save(load(files['model.safetensors']), {KEY: json.dumps(record._asdict())})
    workshop.hub.put('you/spoilt', files)
    answer = client.create('hf-hub:you/spoilt', cache_dir=str(tmp_path))
    assert 'WeightsError' in answer.kinds
    data = workshop.hub.files(RESNET)['model.safetensors']
    for part in (
            f'{record.filename} of {record.repo_id}@{record.revision} with sha256 {record.sha256}',
            found.format(sha256=sha256(data)), 'ask for the whole model where the head comes from'):
        assert part in answer.error, answer.error
    with safe_open(tmp_path / 'sent', 'pt') as weights:
        assert weights.metadata().keys() == {KEY}


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
    assert ('POST', '/api/models/you/late/commit/main') not in workshop.writes()


@pytest.mark.parametrize('changes, reason', [
    (dict(freeze=False), 'it trained the backbone, too'),
    (dict(model_kwargs=dict(backbone='test_resnet')), 'it was trained from scratch'),
    (dict(model_kwargs=dict(pretrained_backbone='/home/me/twin.safetensors')), 'from /home/me/twin.safetensors, which'),
    (dict(model='local-dir:runs/old/best', pretrained=True), 'from local-dir:runs/old/best, which is not'),
    (dict(model=f'{NOAH}.fashion_mnist', pretrained=True), f'from {NOAH}.fashion_mnist, which is not'),
    (dict(model='resnet18_noah', pretrained=True), 'from resnet18_noah, which is not'),  # on Google Drive
    (dict(model='vit_base_patch16_clip_224.openai.x', pretrained=True), 'which is not'),
])
def test_other_runs_are_refused(workshop, changes, reason):
    folder = workshop.edited('other', **changes)
    requests = len(workshop.hub.requests)
    try:
        message = workshop.send('other').error
    finally:
        shutil.rmtree(folder)
    assert f'{folder}: no head alone can be published: ' in message and reason in message
    assert 'Accepted is a run with --freeze or --cache-features' in message
    assert len(workshop.hub.requests) == requests


def test_a_model_of_timm_is_refused(workshop):
    folder = workshop.edited('vanilla', model='hf-hub:timm/test_resnet.r160_in1k', pretrained=True)
    shutil.rmtree(folder / 'best')
    save_for_hf(timm.create_model('test_resnet', num_classes=3), str(folder / 'best'), safe_serialization=True)
    assert 'test_resnet is not a NOAH model' in workshop.send('vanilla').error


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


def test_what_does_not_come_back_is_not_tagged(workshop):
    workshop.hub.fault('flip', method='GET', path=r'you/bad/.*model.safetensors', times=None)
    assert 'damaged' in workshop.send('resnet', repo_id='you/bad').error
    workshop.hub.clear_faults()
    assert workshop.hub.tags('you/bad') == {}


def test_help_and_usage(workshop):
    text = ' '.join(workshop.run('scripts/publish.py', '--help').split())
    assert re.search('--head-only .*frozen backbone', text)
    for args in (('resnet18_noah',), ('--all',)):
        message = workshop.run('scripts/publish.py', *args, '--from', 'weights', '--head-only', code=2)
        assert '--head-only is for a training run; give its --repo-id' in message
