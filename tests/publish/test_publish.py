"""Publishing on a Hub on loopback: in this process, and by the script of a clone that is killed and starts again."""
import json
import os
import re
import shutil
import signal
import time
from dataclasses import asdict

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load, load_file

from noah_zoo.catalog import PUBLISHED, Published
from noah_zoo.publish import publish as module
from noah_zoo.publish.publish import publish_model, publish_run
from noah_zoo.weights import WeightsError, convert_file, convert_released

from ..commands import call
from ..hub_server import HubServer
from ..project import FILES, TOKEN, Project, release, writes
from ..released import released_state_dict

NOAH, TWIN = 'mobilenetv2_035_noah', 'mobilenetv2_035'
REPO = f'noah-zoo/{NOAH}.osvai_in1k'


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A folder with the authors' file of NOAH, and with the same file under another model's name."""
    folder = tmp_path_factory.mktemp('weights')
    release(folder, NOAH)
    shutil.copy(folder / f'{NOAH}.pth.tar', folder / 'resnet18_noah.pth.tar')
    return folder


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The file that records what is published, empty; afterwards the package knows what it knew before."""
    path, before = tmp_path / 'published.json', dict(PUBLISHED)
    path.write_text('{}\n')
    monkeypatch.setattr(module, 'RECORD', path)
    yield path
    PUBLISHED.clear()
    PUBLISHED.update(before)


@pytest.fixture
def owner(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)


@pytest.fixture
def run(trained_run, tmp_path):
    """A run whose files name folders of this machine, and which has a file that is not to be sent."""
    run = tmp_path / 'run'
    shutil.copytree(trained_run, run)
    config = json.loads((run / 'best' / 'config.json').read_text())
    # as runs had it once, whose weights began with a file
    config['model_args'].update(pretrained_backbone=str(run / 'secret.safetensors'), init='random')
    (run / 'best' / 'config.json').write_text(json.dumps(config))
    summary = json.loads((run / 'summary.json').read_text())
    places = {name: str(run / name) for name in ('data_dir', 'cache_features', 'output', 'resume')}
    summary['config'].update(places, dataset='hfds/someone/pets', model_kwargs=dict(
        summary['config']['model_kwargs'], pretrained_backbone=str(run / 'secret.safetensors')))
    (run / 'summary.json').write_text(json.dumps(summary))
    (run / 'best' / 'optimizer.pt').write_bytes(b'not to be sent')
    return run


def check_model(hub, name, entry):
    """What is on the Hub of a model, and what is recorded of it."""
    repo_id = f'noah-zoo/{name}.osvai_in1k'
    files = hub.files(repo_id, entry['revision'])
    assert set(files) == FILES
    assert hub.tags(repo_id) == {'v1': entry['revision']}
    expected = convert_released(released_state_dict(name), name)
    weights = load(files['model.safetensors'])
    assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in expected)
    card = ModelCard(files['README.md'].decode())
    assert card.data.library_name == 'timm' and entry['sha256'] in card.text
    config = json.loads(files['config.json'])
    assert config['architecture'] == name and config['pretrained_cfg']['tag'] == 'osvai_in1k'
    model = timm.create_model(name)
    model.load_state_dict(weights)
    check_reference(files, model)
    return config


def check_reference(files, model):
    outputs = load(files['test/reference.safetensors'])
    with torch.inference_mode():
        features = model.eval().forward_features(outputs['input'])
        found = dict(features=features, pre_logits=model.forward_head(features, pre_logits=True),
                     logits=model(outputs['input']))
    assert outputs.keys() == {'input', *found}
    for key, value in found.items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-4, atol=1e-4)


def test_a_model_of_the_release(hub, weights, record, monkeypatch, tmp_path):
    done = call('publish', NOAH, '--from', weights, '--dry-run')
    assert done.returncode == 0 and re.search(rf'{REPO}: ready to be sent: .* MB, sha256 [0-9a-f]{{64}}', done.stderr)
    assert not hub.requests and record.read_text() == '{}\n' and REPO not in PUBLISHED

    monkeypatch.setenv('HF_TOKEN', TOKEN)
    done = call('publish', NOAH, '--from', weights)
    assert done.returncode == 0 and f'{REPO}: published as v1, revision ' in done.stderr
    content = json.loads(record.read_text())
    assert content == {REPO: asdict(PUBLISHED[REPO])}
    config = check_model(hub, NOAH, content[REPO])
    assert (config['model_args']['num_groups'], config['model_args']['key_ratio']) == (8, 0.25)
    assert {request.token for request in hub.requests} <= {TOKEN, None}  # None: an upload of LFS

    # Again: nothing is sent, with the record and without it.
    hub.requests.clear()
    assert 'published already' in call('publish', NOAH, '--from', tmp_path / 'nowhere').stderr
    assert not writes(hub)
    before = record.read_text()
    record.write_text('{}\n')
    del PUBLISHED[REPO]
    assert publish_model(NOAH, weights) == PUBLISHED[REPO]
    assert record.read_text() == before and writes(hub) == [('POST', '/api/repos/create')]

    monkeypatch.delenv('HF_TOKEN')
    model = timm.create_model(NOAH, pretrained=True, cache_dir=tmp_path / 'cache')
    assert torch.equal(model.classifier.key.weight, released_state_dict(NOAH)['head.query.weight'])


def test_all_keeps_a_ledger(hub, weights, record, owner, monkeypatch, tmp_path):
    names = [NOAH, 'resnet18_noah', 'resnet50', 'resnet51']
    monkeypatch.setattr('noah_zoo.catalog.released', lambda: names)
    done = call('publish', '--all', '--from', weights, '--namespace', 'ledger')
    assert done.returncode == 2 and '3 of 4 failed; run the same command again for those' in done.stderr
    for part in (
            f'resnet18_noah: the weights are those of {NOAH}',
            'has neither resnet50/model.safetensors nor the released',
            "'resnet51' is not a model of the release; choose from resnet50"):
        assert part in done.stderr
    assert set(json.loads(record.read_text())) == {f'ledger/{NOAH}.osvai_in1k'}
    done = call('publish', '--all', '--from', tmp_path, '--namespace', 'ledger')
    assert done.stderr.count('published already') == 1 and done.returncode == 2
    monkeypatch.setenv('NOAH_ZOO_NAMESPACE', 'ledger')
    monkeypatch.delenv('HF_TOKEN')
    model = timm.create_model(NOAH, pretrained=True, cache_dir=tmp_path / 'cache')
    assert torch.equal(model.classifier.key.weight, released_state_dict(NOAH)['head.query.weight'])


def test_a_run_goes_up_the_same_way(hub, run, record, monkeypatch, tmp_path):
    args = ('publish', '--from', run, '--repo-id', 'you/pets', '--private')
    done = call(*args, '--dry-run')
    assert (done.returncode, hub.requests) == (0, []) and 'you/pets: ready to be sent' in done.stderr
    monkeypatch.setenv('HF_TOKEN', 'hf_you')
    done = call(*args)
    assert done.returncode == 0 and done.stdout == "timm.create_model('hf-hub:you/pets', pretrained=True)\n"
    files = hub.files('you/pets')
    assert set(files) == FILES and list(hub.tags('you/pets')) == ['v1']
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert not {'pretrained_backbone', 'init'} & set(json.loads(files['config.json'])['model_args'])
    card = ModelCard(files['README.md'].decode())
    best = json.loads((run / 'summary.json').read_text())['best']
    assert card.data.datasets == ['someone/pets'] and card.data.eval_results[0].metric_value == best['top1']
    assert all(label in card.text for label in ('blue', 'green', 'red')) and record.read_text() == '{}\n'

    model = timm.create_model('hf-hub:you/pets', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    saved = load_file(run / 'best' / 'model.safetensors')
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg['label_names'] == ['blue', 'green', 'red']
    check_reference(files, model)

    # Again: nothing is sent. Another card is another revision, with a tag of its own.
    hub.requests.clear()
    assert call(*args).returncode == 0 and writes(hub) == [('POST', '/api/repos/create')]
    summary = json.loads((run / 'summary.json').read_text())
    (run / 'summary.json').write_text(json.dumps(dict(summary, best=dict(best, top1=12.5))))
    published = publish_run(run, 'you/pets', private=True)
    assert hub.tags('you/pets')['v2'] == published.revision == hub.commits('you/pets')[-1]
    assert set(hub.tags('you/pets')) == {'v1', 'v2'} and hub.files('you/pets', 'v1') == files
    changed = {name for name, content in hub.files('you/pets').items() if content != files[name]}
    assert changed == {'README.md'}

    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(RepositoryNotFoundError, match='401'):
        timm.create_model('hf-hub:you/pets', pretrained=True, cache_dir=tmp_path / 'other')


def test_what_comes_back_otherwise_is_not_tagged(hub, run, owner, monkeypatch):
    hub.fault('flip', method='GET', path='model.safetensors', times=None)
    with pytest.raises(WeightsError, match='model.safetensors of you/spoilt arrives damaged'):
        publish_run(run, 'you/spoilt')
    hub.clear_faults()
    with monkeypatch.context() as patch:
        patch.setattr(module.filecmp, 'cmp', lambda *args, shallow: False)
        with pytest.raises(WeightsError, match='model.safetensors came back other than it was sent; nothing was tag'):
            publish_run(run, 'you/spoilt')
    reference, calls = module.reference, []
    with monkeypatch.context() as patch:
        patch.setattr(module, 'reference', lambda model: calls.append(0) or {
            key: value * (1 + 0.001 * (len(calls) - 1)) for key, value in reference(model).items()})
        with pytest.raises(WeightsError, match='the model that came back gives other logits; nothing was tagged'):
            publish_run(run, 'you/spoilt')
    assert hub.tags('you/spoilt') == {} and len(calls) == 2
    load_file = module.load_file
    with monkeypatch.context() as patch:
        patch.setattr(module, 'load_file', lambda file: {key: value + 1 for key, value in load_file(file).items()})
        with pytest.raises(WeightsError, match='the model does not hold the weights of the file as they are'):
            publish_run(run, 'you/spoilt')
    publish_run(run, 'you/spoilt')
    assert list(hub.tags('you/spoilt')) == ['v1']


def test_a_reference_of_another_machine_is_kept(hub, run, owner, monkeypatch):
    """One that is equal up to rounding; beyond that, it is replaced."""
    first = publish_run(run, 'you/rounded')
    reference = module.reference

    def times(factor):
        return lambda model: {key: value * factor for key, value in reference(model).items()}

    for factor, kept in ((1 + 1e-5, True), (1.001, False)):
        with monkeypatch.context() as patch:
            patch.setattr(module, 'reference', times(factor))
            published = publish_run(run, 'you/rounded')
        assert (published.revision == first.revision) == kept
    assert set(hub.tags('you/rounded')) == {'v1', 'v2'}


def test_what_the_hub_refuses(hub, run, owner):
    for code, message in (
            (403, 'this token may not write there .* Choose another --namespace or --repo-id, or another token'),
            (412, 'the repository changed in the meantime. Run the same command again'),
            (400, 'Nothing was tagged; run the same command again, it goes on where it was')):
        hub.fault('status', method='POST', path='/commit/', code=code)
        with pytest.raises(WeightsError, match=f'you/refused: .*{message}'):
            publish_run(run, 'you/refused')
    assert len(hub.commits('you/refused')) == 1
    hub.fault('status', method='POST', path='/tag/', code=400)
    with pytest.raises(WeightsError, match='Nothing was tagged'):
        publish_run(run, 'you/refused')
    commits = hub.commits('you/refused')
    published = publish_run(run, 'you/refused')
    assert hub.commits('you/refused') == commits and hub.tags('you/refused') == {'v1': published.revision}


def test_folders_and_the_official_file(hub, weights, record, monkeypatch, tmp_path):
    folder = convert_file(weights / f'{NOAH}.pth.tar', NOAH, tmp_path / NOAH)
    shutil.copytree(folder, tmp_path / 'resnet18_noah')
    assert publish_model(NOAH, tmp_path, dry_run=True) is None
    with pytest.raises(ValueError, match=f'resnet18_noah has the weights of {NOAH}, not of resnet18_noah'):
        publish_model('resnet18_noah', tmp_path, dry_run=True)
    names = []
    monkeypatch.setattr(module, 'fetch_released', lambda name: names.append(name) or folder / 'model.safetensors')
    assert publish_model(NOAH, 'official', dry_run=True) is None
    assert names == [NOAH] and not hub.requests

    monkeypatch.setattr(module, '_load', lambda folder: torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=f'{NOAH}: .* has 9 parameters, expected 1,692,128'):
        publish_model(NOAH, tmp_path, dry_run=True)
    thin = torch.nn.Linear(2, 3)
    thin.representation = torch.nn.Identity()
    monkeypatch.setattr(module, '_load', lambda folder: thin)
    with pytest.raises(ValueError, match='has 9 parameters, expected 1.54M'):
        module._check_parameters('deit_tiny_050_patch16_224_noah', tmp_path)


def test_bad_input(hub, weights, record, owner, monkeypatch, tmp_path):
    hub.put(f'open/{NOAH}.osvai_in1k', {'README.md': b'public'})
    for args, message in (
            (('resnet51_noah', weights), "'resnet51_noah' is not a model of the release; choose from"),
            (('resnet50_noah', weights), 'has neither resnet50_noah/model.safetensors nor'),
            ((NOAH, 'nowhere'), "nowhere: no such folder; --from takes a folder or 'official'"),
            ((NOAH, weights, 'open', True), 'exists and is public; nothing was sent')):
        with pytest.raises((OSError, ValueError, RuntimeError), match=message):
            publish_model(*args)
    with pytest.raises(FileNotFoundError, match='has no summary.json: not the folder of a finished run'):
        publish_run(weights, 'you/pets')
    with pytest.raises(ValueError, match="--repo-id 'pets' is not of the form USER/MODEL"):
        publish_run(weights, 'pets')
    assert record.read_text() == '{}\n' and not hub.tags(f'open/{NOAH}.osvai_in1k')
    for args in ((), (NOAH, '--all'), (NOAH, '--repo-id', 'you/pets'), ('--repo-id', 'a/b', '--namespace', 'a')):
        done = call('publish', *args, '--from', weights)
        assert done.returncode == 2 and 'usage:' in done.stderr
    monkeypatch.setattr(module, 'RECORD', tmp_path / 'absent.json')
    with pytest.raises(PermissionError, match='records what is published and cannot be written; publish from a clone'):
        publish_model(NOAH, weights)


def test_not_logged_in(hub, weights, run, record, monkeypatch):
    for token in ('hf_expired', None):
        if token:
            monkeypatch.setenv('HF_TOKEN', token)
        else:
            monkeypatch.delenv('HF_TOKEN')
        for args in ((NOAH, '--from', weights), ('--from', run, '--repo-id', 'you/none')):
            done = call('publish', *args)
            assert done.returncode == 2 and 'Run `hf auth login` or set HF_TOKEN' in done.stderr
            assert 'hf_expired' not in done.stderr + done.stdout
    assert not writes(hub)


def test_head_of_a_repository_that_cannot_be_read(hub, record, owner):
    """What is recorded is published again if the Hub does not answer, or has something newer."""
    assert module._head('you/nothing') is None
    oid = hub.put('you/something', {'README.md': b''})
    assert module._head('you/something') == oid
    PUBLISHED[REPO] = Published('0' * 40, '1' * 64)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        publish_model(NOAH, 'nowhere')


# The script of a clone, in processes of its own


@pytest.fixture
def project(tmp_path):
    with HubServer(users={TOKEN: 'noah-zoo'}) as hub:
        yield Project(tmp_path, hub)


@pytest.mark.hub
def test_from_the_released_files_to_pretrained(project):
    release(project.weights, NOAH, TWIN)
    assert 'sha256' in project.publish(NOAH, TWIN, '--dry-run', token=None)
    assert not project.hub.requests and project.record.read_text() == '{}\n'

    project.publish(NOAH, TWIN)
    record = json.loads(project.record.read_text())
    for name in (NOAH, TWIN):
        check_model(project.hub, name, record[f'noah-zoo/{name}.osvai_in1k'])
    sent = writes(project.hub)
    assert project.publish(NOAH, TWIN).count('published already') == 2
    assert writes(project.hub) == sent

    # The recorded tag needs neither a namespace nor a token, and the twin that timm owns loads by its repository.
    code = f'''
import logging; logging.basicConfig(level=logging.INFO)
import noah_zoo, timm
print(timm.create_model({NOAH!r}, pretrained=True).state_dict()['classifier.key.weight'].double().sum().item())
timm.create_model('hf-hub:noah-zoo/{TWIN}.osvai_in1k', pretrained=True)
'''
    printed = project.run('-c', code, token=None)
    total = convert_released(released_state_dict(NOAH), NOAH)['classifier.key.weight'].double().sum().item()
    assert str(total) in printed
    assert f"weights from {REPO}@{record[REPO]['revision']}" in printed
    assert all(request.token in (TOKEN, None) for request in project.hub.requests)
    for path in project.folder.rglob('*'):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.hub
@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL')
def test_killed_anywhere_and_repeated(project):
    release(project.weights, NOAH)

    def kill_at(method, path, action, **details):
        project.hub.fault(action, method=method, path=path, times=None, **details)
        process = project.start('scripts/publish.py', NOAH, '--from', 'weights')
        wait_for(lambda: any(
            r.method == method and path.strip('/') in r.path for r in list(project.hub.requests)), process)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        project.hub.clear_faults()

    kill_at('PUT', '', 'slow', rate=100_000)
    assert project.hub.tags(REPO) == {} and 'model.safetensors' not in project.hub.files(REPO)
    kill_at('POST', '/tag/', 'hang', seconds=3600)
    commits = project.hub.commits(REPO)
    assert project.hub.tags(REPO) == {} and set(project.hub.files(REPO)) == FILES
    assert project.record.read_text() == '{}\n'
    project.publish(NOAH)
    assert project.hub.commits(REPO) == commits
    assert project.hub.tags(REPO) == {'v1': json.loads(project.record.read_text())[REPO]['revision']}


@pytest.mark.hub
def test_all_of_the_release(project):
    release(project.weights, NOAH, TWIN)
    message = project.publish('--all', '--namespace', 'mirror', code=2)
    assert '48 of 50 failed' in message and 'resnet18_noah.pth.tar' in message
    assert set(json.loads(project.record.read_text())) == {f'mirror/{NOAH}.osvai_in1k', f'mirror/{TWIN}.osvai_in1k'}
    shutil.rmtree(project.weights)
    project.weights.mkdir()
    assert project.publish('--all', '--namespace', 'mirror', code=2).count('published already') == 2
    code = f"import noah_zoo, timm; timm.create_model({NOAH!r}, pretrained=True)"
    project.run('-c', code, token=None, NOAH_ZOO_NAMESPACE='mirror')


@pytest.mark.hub
def test_messages_of_the_script(project):
    release(project.weights, NOAH)
    for token in (None, 'hf_expired'):
        assert 'hf auth login' in project.publish(NOAH, token=token, code=2)
    project.hub.fault('flip', method='GET', path='model.safetensors', times=None)
    message = project.publish(NOAH, code=2)
    assert 'model.safetensors' in message and 'damaged' in message
    assert project.hub.tags(REPO) == {} and project.record.read_text() == '{}\n'
