"""What a saved model's `config.json` says."""
import json

import pytest
import timm
import torch

import noah_zoo
from noah_zoo.models.saving import save_model, saved_config

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
