"""What users do to a model by hand: another layer in the head's place, a scripted model's weights, a second import."""
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from noah_zoo import NoahHead, add_noah_head

PLACES = {
    'resnet18': 'fc', 'mobilenetv2_035': 'classifier', 'deit_tiny_050_patch16_224': 'head', 'mixer_s16_050_224': 'head',
    'gmlp_ti16_050_224': 'head', 'pvt_tiny_050': 'head', 'shufflenetv2_100': 'fc'}


def create(name, **kwargs):
    return timm.create_model(name, num_classes=10, **kwargs).eval()


@pytest.mark.parametrize('vanilla', PLACES)
def test_another_layer_in_the_place_of_the_head(vanilla):
    """It gets what it gets in the baseline: pooled features."""
    torch.manual_seed(0)
    model, place = create(f'{vanilla}_noah'), PLACES[vanilla]
    x = torch.randn(2, 3, 64, 64) if vanilla.startswith(('res', 'mob', 'shu', 'pvt')) else torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        layer = nn.Linear(pooled.shape[1], 5)
        setattr(model, place, layer)
        torch.testing.assert_close(model(x), layer(pooled), rtol=1e-4, atol=1e-5)
        assert model.get_classifier() is layer
        torch.testing.assert_close(torch.jit.script(model)(x), layer(pooled), rtol=1e-4, atol=1e-5)
        setattr(model, place, nn.Identity())
        torch.testing.assert_close(model(x), pooled, rtol=1e-4, atol=1e-5)
        model.reset_classifier(4)
        assert isinstance(model.get_classifier(), NoahHead) and model(x).shape == (2, 4)


def test_a_head_that_is_wrapped_stays_one():
    """As `torch.compile` of the head does."""
    model = add_noah_head(create('test_resnet'))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        model.fc = torch.compile(model.fc, backend='eager')
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('name', ['resnet18_noah', 'deit_tiny_050_patch16_224_noah'])
def test_weights_of_the_scripted_model(name):
    model, other = create(name), create(name)
    keys = other.load_state_dict(torch.jit.script(model).state_dict())
    assert not keys.missing_keys and not keys.unexpected_keys
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match='Missing key'):
        other.load_state_dict({})


@pytest.mark.process
def test_a_second_import():
    """As notebooks' autoreload and plugin hosts do."""
    code = '''
import sys, timm, torch, warnings
warnings.simplefilter('ignore')  # timm names every model that is registered again
x, outputs = torch.randn(1, 3, 64, 64), []
for _ in range(3):
    import noah_zoo
    model = timm.create_model('mobilenetv2_035_noah.fashion_mnist', pretrained=True).train()
    model.classifier.drop_rate = 0.
    outputs.append(model.eval()(x))
    outputs[-1].sum().backward()
    for name in [name for name in sys.modules if name.split('.')[0] == 'noah_zoo']:
        del sys.modules[name]
assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize('name, last', [('resnet18_noah', 'layer4'), ('mobilenetv2_035_noah', 'conv_head')])
def test_torch_pruning(name, last):
    """The head and the layers that write its input keep their widths; all else is pruned."""
    import torch_pruning
    torch.manual_seed(0)
    model, x = create(name), torch.randn(1, 3, 64, 64)
    before = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.get_classifier().parameters())
    ignored = [*model.get_classifier().modules(), *model.get_submodule(last).modules()]
    torch_pruning.pruner.MagnitudePruner(
        model, x, importance=torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=ignored).step()
    model.train()(x.expand(2, -1, -1, -1)).sum().backward()
    assert model(x).shape == (1, 10) and sum(p.numel() for p in model.parameters()) < 0.9 * before
    assert sum(p.numel() for p in model.get_classifier().parameters()) == head
