"""Pictures of where models looked: overlays, classes by name, Grad-CAM++ against its formula, Figure 2."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from noah_zoo import add_noah_head
from noah_zoo.data.images import read_image
from noah_zoo.inference import predict as inference
from noah_zoo.inference import visualize
from noah_zoo.inference.predict import DEFAULT_MODEL, SAMPLES, load_model, load_twin, short_names
from noah_zoo.inference.visualize import as_model_sees, draw, find_classes, grad_cam, load_pair, overlay
from noah_zoo.models.attach import eval_transform, find_classifier
from noah_zoo.weights import find

from ..commands import call

ROOT = Path(__file__).resolve().parents[2]
BAG = SAMPLES / '0018_bag.png'
TWINS = (  # the first ones: a map, a class token, the features of patches
    'mobilenetv2_035', 'deit_tiny_050_patch16_224', 'mixer_s16_050_224', *(
        pytest.param(name, marks=pytest.mark.exhaustive) for name in (
            'resnet18', 'shufflenetv2_100', 'pvt_tiny_050', 'gmlp_ti16_050_224', 'convnext_atto', 'swin_s3_tiny_224')))


@pytest.fixture(scope='module')
def shipped():
    return load_model(DEFAULT_MODEL)


@pytest.fixture(scope='module')
def twin():
    return load_twin(DEFAULT_MODEL)


def test_overlay():
    picture = Image.new('RGB', (60, 40), (255, 0, 0))
    pixels = np.asarray(overlay(picture, torch.tensor([[0., 1.], [2., 3.]]) - 7.), int)
    assert pixels.shape == (40, 60, 3)
    red, green, blue = pixels[0, 0]
    assert blue > green  # the lowest is dark blue, not the picture's red
    assert tuple(pixels[-1, -1] > pixels[0, 0]) == (True, True, False)  # the highest is yellow
    brightness = pixels.sum(-1)
    assert (np.diff(brightness[:, -1]) >= 0).all() and (np.diff(brightness[-1]) >= 0).all()
    flat = np.asarray(overlay(picture, torch.full((2, 2), 5.)))
    assert (flat == flat[0, 0]).all()


def test_as_model_sees(shipped):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8))
    seen = as_model_sees(shipped, wide)
    assert seen.x_1CHW.shape == (1, 3, 64, 64) and seen.picture.size == (64, 64)
    mean, std = (torch.tensor(shipped.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    pixels = torch.from_numpy(np.asarray(seen.picture).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close((pixels - mean) / std, seen.x_1CHW[0], rtol=0, atol=0.01)
    assert as_model_sees(shipped.double(), wide).x_1CHW.dtype == torch.float64
    shipped.float()


def test_classes_by_name(shipped):
    assert find_classes(shipped, ['bag', '0', 'ankle BOOT']) == [8, 0, 9]
    imagenet = timm.create_model('test_resnet')
    assert find_classes(imagenet, ['tench', '999', 'Egyptian cat']) == [0, 999, 285]
    with pytest.raises(ValueError, match="no class 'bga' among 10, 0 to 9; did you mean 'Bag'"):
        find_classes(shipped, ['bga'])
    with pytest.raises(ValueError, match="no class '10' among 10"):
        find_classes(shipped, ['10'])


def trained(name):
    """timm begins with zeros in some classifiers."""
    model = timm.create_model(name, num_classes=5).eval()
    torch.nn.init.normal_(model.get_submodule(find_classifier(model)).weight, std=0.1)
    return model


def test_names_of_ones_own_are_whole():
    model = timm.create_model('mobilenetv2_035_noah', num_classes=3)
    model.pretrained_cfg['label_names'] = ['knot, live', 'knot', 'knot, dead']
    assert short_names(model) == ['knot, live', 'knot', 'knot, dead']
    assert find_classes(model, ['knot', 'Knot, dead', '0']) == [1, 2, 0]
    assert short_names(timm.create_model('mobilenetv2_035_noah'))[:2] == ['tench', 'goldfish']


@pytest.mark.parametrize('name', TWINS)
def test_grad_cam_of_every_kind_of_backbone(name):
    torch.manual_seed(0)
    model = trained(name)
    x = torch.randn(1, 3, 224, 224)
    maps = grad_cam(model, x, [3, 1])
    assert maps.shape == (1, 2, 224, 224) and maps.min() >= 0 and maps.max() <= 1
    assert not torch.equal(maps[0, 0], maps[0, 1]) and (maps.amax((2, 3)) > maps.amin((2, 3))).all()
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize('name', ['resnet18', 'mixer_s16_050_224'])
def test_grad_cam_against_its_formula(name):
    """Section 3 of https://arxiv.org/abs/1710.11063, for average pooling and a linear layer."""
    torch.manual_seed(0)
    model = trained(name)
    x, index = torch.randn(1, 3, 224, 224), 2
    with torch.no_grad():
        features = model.forward_features(x)
    side = 14 if features.ndim == 3 else 7
    maps_CHW = features[0] if features.ndim == 4 else features[0].T.reshape(-1, side, side)
    gradient_C = model.get_classifier().weight[index].detach() / side ** 2
    bottom_C = 2 * gradient_C ** 2 + maps_CHW.sum((1, 2)) * gradient_C ** 3
    alpha_C = gradient_C ** 2 / (bottom_C + 1e-6)
    weights_C = side ** 2 * alpha_C * gradient_C.clamp(min=0)
    cam_HW = (weights_C[:, None, None] * maps_CHW).sum(0).clamp(min=0)
    cam_HW = F.interpolate(cam_HW[None, None], (224, 224), mode='bilinear')[0, 0]
    cam_HW = (cam_HW - cam_HW.min()) / (cam_HW.max() - cam_HW.min())
    found_HW = grad_cam(model, x, [index])[0, 0]
    assert torch.corrcoef(torch.stack((cam_HW.flatten(), found_HW.flatten())))[0, 1] > 0.99
    assert (cam_HW - found_HW).abs().mean() < 0.02


def images_of(figure):
    return [axes for part in figure.subfigs for axes in part.axes if axes.images]


def test_figure_2(shipped, twin):
    image = read_image(BAG)
    figure = draw(shipped, image, [8, 0, 6], block=2, twin=twin)
    chance = f'{next(inference.predict(shipped, [BAG], 1))["predictions"][0]["probability"]:.1%}'
    axes = images_of(figure)
    assert len(axes) == 2 + 3 * 8 + 2 * 3
    titles = [one.get_title() for one in axes]
    assert titles[:3] == ['image', 'block 1', 'block 2'] and titles.count('sum over blocks') == 1
    assert titles[-6] == f'Bag\n{chance}' and titles[-5].startswith('T-shirt/top\n')
    assert [one.get_ylabel() for one in axes if one.get_ylabel()] == [
        'attention', 'value', 'product', 'attention', 'Grad-CAM++']
    above, below, _ = figure.subfigs
    assert above.get_suptitle().startswith(f'Bag, {chance}') and 'mobilenetv2_035_noah' in above.get_suptitle()
    assert below.get_suptitle() == 'Block 3 for several classes; below, the vanilla mobilenetv2_035'
    shown = [np.asarray(one.images[0].get_array()) for one in axes]
    assert np.array_equal(shown[3], shown[-6])  # block 3 for the bag stands in both panels
    assert not np.array_equal(shown[-6], shown[-5]) and not np.array_equal(shown[-3], shown[-2])


def test_figure_of_tokens_without_a_twin():
    model = add_noah_head(timm.create_model('test_vit', img_size=64), num_classes=3).eval()
    figure = draw(model, read_image(BAG))
    num_blocks = model.get_classifier().num_groups
    assert len(images_of(figure)) == 2 + 3 * num_blocks + 3
    assert figure.subfigs[1].get_suptitle() == 'Block 1 for several classes'


@pytest.mark.parametrize('channels', [1, 4])
def test_figure_of_other_channels(channels, tmp_path):
    timm.models.save_for_hf(
        add_noah_head(timm.create_model('test_resnet', in_chans=channels, num_classes=3)), str(tmp_path / 'saved'))
    image = Image.open(BAG).convert('RGBA')
    image.putalpha(Image.linear_gradient('L').resize(image.size))
    image.save(tmp_path / 'bag.png')
    model = load_model(f'local-dir:{tmp_path / "saved"}')
    seen = as_model_sees(model, read_image(tmp_path / 'bag.png', mode={1: 'L', 4: 'RGBA'}[channels]))
    assert seen.x_1CHW.shape == (1, channels, 160, 160) and seen.picture.mode == 'RGB'
    on_white = eval_transform(other := timm.create_model('test_resnet'))(read_image(tmp_path / 'bag.png'))
    mean, std = (torch.tensor(other.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    expected = ((on_white * std + mean) * 255).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(seen.picture, float) - expected).max() <= 3  # the bag is grey
    result = call('visualize', tmp_path / 'bag.png', '--model', f'local-dir:{tmp_path / "saved"}', '--twin', 'none',
                  '--output', tmp_path / 'where.png', '--dpi', '40')
    assert result.returncode == 0 and (tmp_path / 'where.png').stat().st_size > 1000, result.stderr


def test_what_cannot_be_drawn(shipped, twin):
    image = read_image(BAG)
    with pytest.raises(ValueError, match='no POCA block 9; mobilenetv2_035_noah has blocks 1 to 8'):
        draw(shipped, image, block=8)
    with pytest.raises(ValueError, match='no NOAH head'):
        draw(twin, image)
    with pytest.raises(ValueError, match='the twin has 7 classes, the model 10'):
        draw(shipped, image, twin=timm.create_model('test_resnet', num_classes=7))


def test_the_shipped_twin(twin):
    images = sorted(SAMPLES.glob('*.png'))
    results = list(inference.predict(twin, images))
    right = [r['predictions'][0]['label'].lower().replace('/', '_').replace(' ', '_') in r['path'] for r in results]
    assert len(right) == 12 and sum(right) >= 10


@pytest.mark.parametrize('mirror', [None, 'mirror'])
def test_the_authors_twin(mirror, tmp_path, monkeypatch):
    expected = timm.create_model('resnet18').state_dict()
    save_file(expected, tmp_path / 'released.safetensors')
    if mirror:
        monkeypatch.setenv('NOAH_ZOO_NAMESPACE', mirror)
        files = {'mirror/resnet18.osvai_in1k': tmp_path / 'released.safetensors'}
        monkeypatch.setattr(find, 'fetch', lambda name, repo_id, **kwargs: files[repo_id])
    else:
        monkeypatch.delenv('NOAH_ZOO_NAMESPACE', raising=False)
        files = {'resnet18': tmp_path / 'released.safetensors'}
        monkeypatch.setattr(find, 'fetch_released', lambda name, cache_dir: files[name])
    model = load_twin('resnet18_noah')
    assert torch.equal(model.state_dict()['fc.weight'], expected['fc.weight']) and not model.training
    assert model.pretrained_cfg['crop_pct'] == 0.875  # evaluated as the NOAH model is, not as timm's own weights
    with pytest.raises(ValueError, match='resnet50.a1_in1k: no vanilla twin'):
        load_twin('resnet50.a1_in1k')


def test_a_pair():
    model, twin, reason = load_pair(DEFAULT_MODEL)
    assert twin.num_classes == model.num_classes == 10 and reason is None
    assert load_pair(DEFAULT_MODEL, 'none')[1:] == (None, None)


def test_a_pair_without_grad_cam(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    _, twin, reason = load_pair(DEFAULT_MODEL)
    assert twin is None and reason.endswith("pip install 'noah-zoo[visualize]'")
    with pytest.raises(ImportError, match='grad-cam is missing'):
        load_pair(DEFAULT_MODEL, 'resnet18')


def test_the_script(tmp_path):
    for output, more in (
            ('0018_bag_attention.png', []), ('x.png', ['--output', 'x', '--classes', 'bag', '--twin', 'none']),
            ('y.JPG', ['--output', 'y.JPG', '--classes', 'bag', 'shirt', '--twin', 'none'])):
        result = call('visualize', BAG, '--dpi', 60, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [output] and Image.open(tmp_path / output).size[0] > 500


def test_the_script_without_a_twin(shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, 'load_pair', lambda name, twin, device: (shipped, None, 'no weights'))
    monkeypatch.setattr(visualize, 'draw', lambda *args: drawn.append(args) or Figure())
    drawn = []
    result = call('visualize', BAG, '--classes', 'shirt', '0', '--block', 3, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, 'without Grad-CAM++: no weights\n')
    (model, image, classes, block, twin), = drawn
    assert model is shipped and (classes, block, twin) == ([6, 0], 2, None) and image.size == (28, 28)


@pytest.mark.parametrize('args, message', [
    (['none.png'], 'none.png'),
    ([BAG, '--block', 0], 'no POCA block 0; mobilenetv2_035_noah has blocks 1 to 8'),
    ([BAG, '--output', 'none/x.png'], 'none: no such folder for x.png'),
    ([BAG, '--output', 'x.pgn'], "x.pgn: '.pgn' is not one of .eps, "),
    ([BAG, '--model', 'none', '--output', 'x.txt'], "x.txt: '.txt' is not one of")])
def test_bad_arguments(args, message, tmp_path):
    result = call('visualize', *args, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert 'Traceback' not in result.stderr and not list(tmp_path.iterdir())
