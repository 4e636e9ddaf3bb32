"""What a saved model's `config.json` says."""
import json
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import noah_zoo
from noah_zoo.models.saving import save_model, saved_config
from noah_zoo.weights.head_only import MODEL_TYPE

NAMES = [('resnet18', {}), ('resnet18_noah', {}), ('noah', dict(backbone='test_vit', img_size=64))]


@pytest.mark.parametrize('name, args', NAMES)
def test_a_model_comes_back_with_its_classes(name, args, tmp_path):
    model = timm.create_model(name, num_classes=3, in_chans=1, **args).eval()
    save_model(model, tmp_path, dict(args), label_names=['a', 'b', 'c'])
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_classes'] == 3 and config['label_names'] == ['a', 'b', 'c']
    assert 'num_classes' not in config['model_args'] and config['model_args']['in_chans'] == 1
    assert args.get('backbone') == config['model_args'].get('backbone') and 'problem_type' not in config
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(model(x), loaded(x)) and loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5)(x).shape == (1, 5)
    assert saved_config(tmp_path / 'config.json') == (tmp_path / 'config.json').read_text()


def test_as_transformers_creates_it(tmp_path):
    """It gives the number of classes, and the saved arguments beside it."""
    save_model(noah_zoo.add_noah_head(timm.create_model('test_resnet'), num_classes=3), tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    model = timm.create_model(
        config['architecture'], pretrained=False, num_classes=config['num_classes'], **config['model_args'])
    assert type(model).__name__ == 'NoahResNet' and model.num_classes == 3


def test_what_training_began_with_is_left_out(tmp_path):
    model = timm.create_model('resnet18_noah', num_classes=3, init='random')
    save_model(model, tmp_path, dict(num_groups=4, init='random'))
    args = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert 'init' not in args and args['num_groups'] == 4


def test_several_classes_per_image(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3, pretrained_cfg_overlay=dict(notes=('multilabel',)))
    save_model(model, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['problem_type'] == 'multi_label_classification'
    assert 'multilabel' in timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg['notes']


# What transformers makes of saved models, beside timm.
COMPARE = '''
import sys
from pathlib import Path
import noah_zoo, timm, torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

image = Image.open(Path(noah_zoo.__file__).parent / 'samples' / '0008_sandal.png')
for folder in sorted(Path(sys.argv[1]).glob('whole-*')):
    theirs = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    config = resolve_model_data_config(theirs)
    x = create_transform(**config)(image.convert('L' if config['input_size'][0] == 1 else 'RGB'))[None]
    ours, processor = (
        kind.from_pretrained(folder) for kind in (AutoModelForImageClassification, AutoImageProcessor))
    with torch.inference_mode():
        logits, expected = ours.eval()(x).logits, theirs(x)
    assert type(ours.timm_model).__name__ == type(theirs).__name__
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert ours.config.id2label == {0: 'a', 1: 'b', 2: 'c'}
    several = ours.config.problem_type == 'multi_label_classification'
    assert several == folder.name.endswith('several')
    if config['input_size'][0] == 3:
        torch.testing.assert_close(processor(image.convert('RGB'))['pixel_values'], x, rtol=0, atol=0)
        scores = {row['label']: row['score'] for row in pipeline('image-classification', model=str(folder))(image)}
        probabilities = (expected.sigmoid() if several else expected.softmax(-1))[0]
        torch.testing.assert_close(torch.tensor([scores[name] for name in 'abc']), probabilities, rtol=0, atol=1e-5)
    print(folder.name)

folder = Path(sys.argv[1]) / 'timm'
try:
    AutoModelForImageClassification.from_pretrained(folder)
except TypeError as error:
    assert "multiple values for keyword argument 'num_classes'" in str(error), error
    print('refused: timm')
config = AutoConfig.from_pretrained(folder)
config.model_args.pop('num_classes')
assert AutoModelForImageClassification.from_pretrained(folder, config=config).num_labels == 3
try:
    AutoModelForImageClassification.from_pretrained(Path(sys.argv[1]) / 'head')
except ValueError as error:
    assert 'noah_head_without_backbone' in str(error), error
    print('refused: head')
'''
SAVED = {
    'twin': ('resnet18', {}), 'noah': ('resnet18_noah', {}), 'grey': ('mobilenetv2_035_noah', dict(in_chans=1)),
    'thin': ('deit_tiny_050_patch16_224_noah', {}), 'pyramid': ('pvt_tiny_noah', {}),
    'vit': ('noah', dict(backbone='test_vit', img_size=64)), 'several': ('noah', dict(backbone='test_resnet'))}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.network
def test_transformers(tmp_path, other_tools):
    torch.manual_seed(0)
    for kind, (name, args) in SAVED.items():
        model = timm.create_model(name, num_classes=3, **args)
        if kind == 'several':
            model.pretrained_cfg['notes'] = ('multilabel',)
        with torch.no_grad():  # statistics and all
            for tensor in (t for t in model.state_dict().values() if t.is_floating_point()):
                tensor.add_(torch.rand_like(tensor), alpha=0.05)
        save_model(model, tmp_path / f'whole-{kind}', dict(args), label_names=['a', 'b', 'c'])
    save_for_hf(timm.create_model('resnet18', num_classes=3), tmp_path / 'timm', safe_serialization=True)
    config = json.loads((tmp_path / 'timm' / 'config.json').read_text())
    (tmp_path / 'head').mkdir()
    (tmp_path / 'head' / 'config.json').write_text(json.dumps({**config, 'model_type': MODEL_TYPE}))
    root = str(Path(noah_zoo.__file__).parents[1])
    done = subprocess.run(
        [other_tools, '-c', COMPARE, tmp_path], env={**os.environ, 'PYTHONPATH': root}, capture_output=True, text=True,
        check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split('\n')[:-1] == [f'whole-{kind}' for kind in sorted(SAVED)] + [
        'refused: timm', 'refused: head']
