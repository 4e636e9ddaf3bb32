"""Publishing, by the real client and script, on a Hub on loopback."""
import json
import os
import shutil
import signal
import time

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load

from noah_zoo.weights import convert_released

from ..hub_server import HubServer
from ..project import FILES, ROOT, TOKEN, Project
from ..released import released_state_dict

NOAH, TWIN = 'mobilenetv2_035_noah', 'mobilenetv2_035'
@pytest.fixture
def project(tmp_path):
    with HubServer(users={TOKEN: 'noah-zoo'}) as hub:
        yield Project(tmp_path, hub)


def test_from_the_released_files_to_pretrained(project):
    project.release(NOAH, TWIN)
    assert 'sha256' in project.publish(NOAH, TWIN, '--dry-run', token=None)
    assert not project.hub.requests and project.record.read_text() == '{}\n'

    project.publish(NOAH, TWIN)
    record = json.loads(project.record.read_text())
    for name in (NOAH, TWIN):
        repo_id = f'noah-zoo/{name}.osvai_in1k'
        files = project.hub.files(repo_id)
        assert set(files) == FILES
        assert project.hub.tags(repo_id) == {'v1': record[repo_id]['revision']}
        expected = convert_released(released_state_dict(name), name)
        weights = load(files['model.safetensors'])
        assert weights.keys() == expected.keys() and all(torch.equal(weights[k], expected[k]) for k in expected)
        card = ModelCard(files['README.md'].decode())
        assert card.data.library_name == 'timm' and record[repo_id]['sha256'] in card.text
        config = json.loads(files['config.json'])
        assert config['architecture'] == name and config['pretrained_cfg']['tag'] == 'osvai_in1k'
        outputs = load(files['test/reference.safetensors'])
        model = timm.create_model(name).eval()
        model.load_state_dict(weights)
        with torch.inference_mode():
            features = model.forward_features(outputs['input'])
            found = dict(features=features, pre_logits=model.forward_head(features, pre_logits=True),
                         logits=model(outputs['input']))
        for key, value in found.items():
            torch.testing.assert_close(outputs[key], value, rtol=1e-4, atol=1e-4)
    args = json.loads(project.hub.files(f'noah-zoo/{NOAH}.osvai_in1k')['config.json'])['model_args']
    assert (args['num_groups'], args['key_ratio']) == (8, 0.25)

    # Again: nothing is sent, with the record and without it.
    sent = project.writes()
    assert project.publish(NOAH, TWIN).count('published already') == 2
    assert project.writes() == sent
    before = project.record.read_text()
    project.record.write_text('{}\n')
    project.publish(NOAH, TWIN)
    assert project.record.read_text() == before
    assert {path for _, path in project.writes()[len(sent):]} == {'/api/repos/create'}

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
    assert f"weights from noah-zoo/{NOAH}.osvai_in1k@{record[f'noah-zoo/{NOAH}.osvai_in1k']['revision']}" in printed
    assert all(request.token in (TOKEN, None) for request in project.hub.requests)
    for path in project.folder.rglob('*'):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='no SIGKILL')
def test_killed_anywhere_and_repeated(project):
    project.release(NOAH)
    repo_id = f'noah-zoo/{NOAH}.osvai_in1k'

    def kill_at(method, path, action, **details):
        project.hub.fault(action, method=method, path=path, times=None, **details)
        process = project.start('scripts/publish.py', NOAH, '--from', 'weights')
        wait_for(lambda: any(
            r.method == method and path.strip('/') in r.path for r in list(project.hub.requests)))
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        project.hub.clear_faults()

    kill_at('PUT', '', 'slow', rate=500_000)
    assert project.hub.tags(repo_id) == {} and 'model.safetensors' not in project.hub.files(repo_id)
    kill_at('POST', '/tag/', 'hang', seconds=60)
    commits = project.hub.commits(repo_id)
    assert project.hub.tags(repo_id) == {} and set(project.hub.files(repo_id)) == FILES
    assert project.record.read_text() == '{}\n'
    project.publish(NOAH)
    assert project.hub.commits(repo_id) == commits
    assert project.hub.tags(repo_id) == {'v1': json.loads(project.record.read_text())[repo_id]['revision']}


def test_what_comes_back_otherwise_is_not_tagged(project):
    project.release(NOAH)
    project.hub.fault('flip', method='GET', path='model.safetensors', times=None)
    message = project.publish(NOAH, code=2)
    assert 'model.safetensors' in message and 'damaged' in message
    assert project.hub.tags(f'noah-zoo/{NOAH}.osvai_in1k') == {} and project.record.read_text() == '{}\n'


def test_all_keeps_a_ledger(project):
    project.release(NOAH, TWIN)
    message = project.publish('--all', '--namespace', 'mirror', code=2)
    assert '48 of 50 failed' in message and 'resnet18_noah.pth.tar' in message
    assert set(json.loads(project.record.read_text())) == {f'mirror/{NOAH}.osvai_in1k', f'mirror/{TWIN}.osvai_in1k'}
    requests = len(project.hub.requests)
    shutil.rmtree(project.weights)
    project.weights.mkdir()
    assert project.publish('--all', '--namespace', 'mirror', code=2).count('published already') == 2
    assert len(project.hub.requests) > requests
    code = f"import noah_zoo, timm; timm.create_model({NOAH!r}, pretrained=True)"
    project.run('-c', code, token=None, NOAH_ZOO_NAMESPACE='mirror')


def test_a_run_goes_up_the_same_way(project):
    run = project.folder / 'runs' / 'pets'
    labels = ['cat', 'dog']
    overlay = dict(num_classes=2, input_size=(3, 64, 64), pool_size=None, tag=None, license=None, origin_url=None)
    torch.manual_seed(0)
    model = timm.create_model(NOAH, pretrained_cfg_overlay=overlay, output_stride=16)
    timm.models.save_for_hf(
        model, str(run / 'best'), safe_serialization=True, model_config=dict(label_names=labels),
        # as runs had it once, whose weights began with a file
        model_args=dict(
            output_stride=16, pretrained_backbone=str(project.folder / 'secret.safetensors'), init='random'))
    example = ROOT / 'results' / 'fashion_mnist' / f'{NOAH}-seed1' / 'summary.json'
    summary = json.loads(example.read_text())
    places = {name: str(project.folder / name) for name in ('data_dir', 'cache_features', 'output', 'resume')}
    summary['config'].update(
        places, dataset='hfds/someone/pets', model_kwargs=dict(
            output_stride=16, pretrained_backbone=str(project.folder / 'secret.safetensors')))
    summary['best'] = {key: summary[key] for key in ('epoch', 'top1', 'val_loss')}
    (run / 'summary.json').write_text(json.dumps(summary))
    (run / 'best' / 'optimizer.pt').write_bytes(b'not to be sent')

    message = project.run('scripts/publish.py', '--from', run, '--repo-id', 'you/pets', '--private')
    assert "timm.create_model('hf-hub:you/pets', pretrained=True)" in message
    files = project.hub.files('you/pets')
    assert set(files) == FILES and list(project.hub.tags('you/pets')) == ['v1']
    assert not [name for name, content in files.items() if str(project.folder).encode() in content]
    card = ModelCard(files['README.md'].decode())
    assert card.data.datasets == ['someone/pets'] and card.data.eval_results[0].metric_value == summary['top1']
    assert all(label in card.text for label in labels)
    assert project.record.read_text() == '{}\n'

    load_it = '''
import torch, noah_zoo, timm
model = timm.create_model('hf-hub:you/pets', pretrained=True).eval()
print(model.pretrained_cfg['label_names'], model.num_classes, model.noah_cfg['num_groups'])
print(model(torch.ones(1, 3, 64, 64)).double().sum().item())
'''
    printed = project.run('-c', load_it)
    assert "['cat', 'dog'] 2 8" in printed
    with torch.inference_mode():
        total = model.eval()(torch.ones(1, 3, 64, 64)).double().sum().item()
    assert abs(float(printed.split()[-1]) - total) < 1e-5
    assert '401' in project.run('-c', load_it, code=1, token=None, HF_HOME=str(project.folder / 'other'))
    assert 'exists' not in project.run('scripts/publish.py', '--from', run, '--repo-id', 'you/pets', '--private')
    assert list(project.hub.tags('you/pets')) == ['v1']


def test_bad_input(project):
    project.release(NOAH)
    (project.weights / 'resnet18_noah.pth.tar').write_bytes((project.weights / f'{NOAH}.pth.tar').read_bytes())
    project.hub.put(f'open/{NOAH}.osvai_in1k', {'README.md': b'public'})
    cases = [
        (dict(name='resnet51_noah'), "'resnet51_noah' is not a model of the release; choose from"),
        (dict(name='resnet50_noah'), 'weights has neither resnet50_noah/model.safetensors nor'),
        (dict(name='resnet18_noah'), f'resnet18_noah: the weights are those of {NOAH}'),
        (dict(name=NOAH, source='nowhere'), "nowhere: no such folder; --from takes a folder or 'official'"),
        (dict(name=NOAH, namespace='open', private=True), 'exists and is public; nothing was sent'),
    ]
    code = '''
import json, sys
from noah_zoo.publish.publish import publish_model, publish_run
for kwargs in json.loads(sys.argv[1]):
    try:
        publish_model(**dict(dict(source='weights'), **kwargs))
        print('published')
    except (OSError, ValueError, RuntimeError) as error:
        print(' '.join(str(error).split()))
for args in (('weights', 'you/pets'), ('weights', 'pets')):
    try:
        publish_run(*args)
    except (OSError, ValueError) as error:
        print(error)
'''
    printed = project.run('-c', code, json.dumps([kwargs for kwargs, _ in cases])).splitlines()
    for (kwargs, message), line in zip(cases, printed):
        assert message in line, kwargs
    assert printed[len(cases):] == [
        'weights has no summary.json: not the folder of a finished run',
        "--repo-id 'pets' is not of the form USER/MODEL"]
    assert project.record.read_text() == '{}\n' and not project.hub.tags(f'open/{NOAH}.osvai_in1k')
    for token in (None, 'hf_expired'):
        assert 'hf auth login' in project.publish(NOAH, token=token, code=2)
    for args in ((), (NOAH, '--all'), (NOAH, '--repo-id', 'you/pets'), ('--repo-id', 'a/b', '--namespace', 'a')):
        assert 'usage:' in project.publish(*args, code=2)


