"""Exported files: the same logits, without this package and without PyTorch; errors; 8 bits."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import onnx
import pytest
import timm
import torch
from PIL import Image
from timm.layers import AvgPool2dSame, Conv2dSame, ScaledStdConv2dSame, create_pool2d
from torch import nn

from noah_zoo import NoahHead, add_noah_head
from noah_zoo.catalog import CATALOG, FASHION_MNIST_CLASSES
from noah_zoo.data.images import DamagedImageError, read_image
from noah_zoo.inference import export as module
from noah_zoo.inference.export import SUFFIXES, ExportedModel, describe, export, load_exported, quantize
from noah_zoo.inference.predict import DEFAULT_MODEL, SAMPLES, load_model, predict
from noah_zoo.models.attach import eval_transform
from noah_zoo.training.validate import validate

from ..commands import call

ROOT = Path(__file__).resolve().parents[2]
ANY_SIZE = 'resnet', 'mobilenet', 'shufflenet', 'pvt'


def spread(model):
    """A head as after training, whose attention is not even."""
    torch.manual_seed(1)
    for parameter in next(part for part in model.modules() if isinstance(part, NoahHead)).parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def classifier(**kwargs):
    """A test_resnet with NOAH, whose attention is not even."""
    overlay = dict(input_size=(3, 64, 64), pool_size=None, label_names=FASHION_MNIST_CLASSES)
    kwargs = {'num_classes': 10, 'pretrained_cfg_overlay': overlay, **kwargs}
    return spread(add_noah_head(timm.create_model('test_resnet', **kwargs)))


@pytest.fixture(scope='module')
def model():
    return classifier()


@pytest.fixture(scope='module')
def files(model, tmp_path_factory):
    """The model in every format, by the name of the format."""
    return {fmt: export(model, tmp_path_factory.mktemp(fmt) / f'model{suffix}', fmt)
            for fmt, suffix in SUFFIXES.items()}


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    """The shipped model and its ONNX file."""
    model = load_model(DEFAULT_MODEL)
    return model, export(model, tmp_path_factory.mktemp('onnx') / 'model.onnx')


@pytest.mark.parametrize('fmt', SUFFIXES)
def test_every_format(fmt, model, files):
    exported = files[fmt]
    assert exported.dynamic_size and exported.batch_size is None
    assert list(exported.errors) == ['1 x 3 x 64 x 64', '3 x 3 x 64 x 64', '1 x 3 x 96 x 128']
    assert max(exported.errors.values()) <= 1e-4
    run, shape = load_exported(exported.path)
    assert shape == ([None] * 4 if fmt == 'torchscript' else [None, 3, None, None])
    images = torch.randn(5, 3, 80, 112)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(run(images), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(ExportedModel(exported.path)(images), expected, rtol=0, atol=1e-4)
    assert expected.std() > 1e-3 and not torch.allclose(expected[0], expected[1], atol=1e-3)
    assert {path.name for path in exported.path.parent.iterdir()} == {f'model{SUFFIXES[fmt]}', 'model.json'}
    if fmt == 'onnx':  # onnxruntime 1.14 reads it
        file = onnx.load(exported.path)
        assert file.ir_version == 8 and [opset.version for opset in file.opset_import] == [18]


def marks(name, fmt):
    """`shipped` is a MobileNet."""
    if name == 'deit_tiny_050_patch16_224_noah':
        return [pytest.mark.export]
    is_slow = fmt == 'onnx' or fmt == 'torch-export' and name in ('resnet101_noah', 'resnet152_noah')
    return [pytest.mark.export, pytest.mark.exhaustive, *([pytest.mark.slow] if is_slow else [])]


@pytest.mark.parametrize(
    'name, fmt', [pytest.param(name, fmt, marks=marks(name, fmt)) for name in CATALOG for fmt in SUFFIXES])
def test_every_model(name, fmt, tmp_path):
    model = spread(timm.create_model(name))
    exported = export(model, tmp_path / f'model{SUFFIXES[fmt]}', fmt)
    assert exported.dynamic_size == (CATALOG[name].family in ANY_SIZE)
    assert len(exported.errors) == 2 + exported.dynamic_size and max(exported.errors.values()) <= 1e-4
    images = torch.randn(5, 3, 192, 256) if exported.dynamic_size else torch.randn(5, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(load_exported(exported.path)[0](images), model(images), rtol=0, atol=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {f'model{SUFFIXES[fmt]}', 'model.json'}


@pytest.mark.parametrize('name, kwargs, dynamic_size, fmt', [
    pytest.param('test_convnext', {}, True, 'onnx', marks=pytest.mark.export),
    pytest.param('test_vit', {}, True, 'torch-export', marks=pytest.mark.export),
    pytest.param('test_vit', {}, True, 'torchscript', marks=pytest.mark.export),
    ('test_vit', dict(dynamic_img_size=False), False, 'torchscript'),
    pytest.param('test_vit', dict(dynamic_img_size=False), False, 'onnx', marks=pytest.mark.export)])
def test_any_timm_model_with_the_head(name, kwargs, dynamic_size, fmt, tmp_path):
    model = spread(add_noah_head(timm.create_model(name, **kwargs), num_classes=7))
    exported = export(model, tmp_path / f'model{SUFFIXES[fmt]}', fmt)
    assert exported.dynamic_size <= dynamic_size and len(exported.errors) == 2 + exported.dynamic_size
    assert json.loads(exported.description.read_text())['label_names'] == [str(i) for i in range(7)]


@pytest.mark.parametrize('fmt', ['torchscript', pytest.param('onnx', marks=pytest.mark.export)])
def test_a_model_without_the_head(fmt, tmp_path):
    model = timm.create_model('test_resnet').eval()
    assert max(export(model, tmp_path / f'model{SUFFIXES[fmt]}', fmt).errors.values()) <= 1e-4


@pytest.mark.export
@pytest.mark.parametrize('name', [
    name if name == 'resnet18_noah' else pytest.param(name, marks=[pytest.mark.exhaustive, pytest.mark.slow])
    for name, row in CATALOG.items() if row.family in ('resnet', 'mobilenet', 'shufflenet')])
def test_old_runtimes(name, tmp_path):
    model = spread(timm.create_model(name))
    exported = export(model, tmp_path / 'model.onnx', batch_size=1)
    file = onnx.load(exported.path)
    assert file.ir_version == 8 and [opset.version for opset in file.opset_import] == [18]  # onnxruntime 1.14
    assert 'Shape' not in {node.op_type for node in file.graph.node}
    net, x_BCHW = cv2.dnn.readNetFromONNX(str(exported.path)), torch.randn(1, 3, 224, 224)
    net.setInput(x_BCHW.numpy())
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(net.forward()), model(x_BCHW), rtol=0, atol=1e-4)


@pytest.mark.export
@pytest.mark.parametrize('fmt, batch_size, opset', [('onnx', 1, 18), ('onnx', 5, 20), ('torch-export', 2, 18)])
def test_fixed_shapes(fmt, batch_size, opset, tmp_path):
    torch.manual_seed(0)
    model = spread(add_noah_head(timm.create_model('test_vit'), num_classes=7))
    exported = export(model, tmp_path / f'model{SUFFIXES[fmt]}', fmt, batch_size=batch_size, opset=opset)
    assert (exported.dynamic_size, exported.batch_size) == (False, batch_size)
    assert list(exported.errors) == [f'{batch_size} x 3 x 160 x 160'] and max(exported.errors.values()) <= 1e-4
    description = json.loads(exported.description.read_text())
    assert (description['dynamic_image_size'], description['batch_size']) == (False, batch_size)
    if fmt == 'onnx':
        file = onnx.load(exported.path)
        shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim]
                  for value in (*file.graph.input, *file.graph.output)]
        assert shapes == [[batch_size, 3, 160, 160], [batch_size, 7]]
        assert [entry.version for entry in file.opset_import] == [opset]
    images = torch.randn(3, 3, 160, 160)  # not a multiple of the batch
    with torch.no_grad():
        torch.testing.assert_close(ExportedModel(exported.path)(images), model(images), rtol=0, atol=1e-4)


def test_two_files_of_one_name(model, tmp_path):
    path = export(model, tmp_path / 'model.pt2', 'torch-export', check=False, batch_size=2).path
    export(model, tmp_path / 'model.pt', 'torchscript', check=False)  # writes model.json anew
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ExportedModel(path)(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.export
@pytest.mark.parametrize('with_head', [True, False])
def test_padding_that_depends_on_the_size(with_head, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('tf_efficientnet_lite0', num_classes=7).eval()
    if with_head:
        spread(add_noah_head(model))
    exported = export(model, tmp_path / 'model.onnx')
    assert not exported.dynamic_size and list(exported.errors) == ['1 x 3 x 224 x 224', '3 x 3 x 224 x 224']
    assert max(exported.errors.values()) <= 1e-4
    assert json.loads(exported.description.read_text())['dynamic_image_size'] is False


class Small(nn.Module):
    """A convolution, its average and a linear layer."""
    pretrained_cfg = dict(input_size=(3, 32, 32), label_names=('a', 'b'))
    num_classes = 2

    def __init__(self, conv=nn.Conv2d):
        super().__init__()
        self.conv, self.fc = conv(3, 4, 3, stride=2), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize('conv, expected', [(Conv2dSame, False), (nn.Conv2d, True)])
def test_a_small_model_with_such_a_padding(conv, expected, tmp_path):
    exported = export(Small(conv), tmp_path / 'model.pt2', 'torch-export')
    assert exported.dynamic_size is expected and len(exported.errors) == 2 + expected
    assert load_exported(exported.path)[1] == [None, 3, *([None, None] if expected else [32, 32])]


@pytest.mark.parametrize('make, expected', [
    (lambda: Conv2dSame(3, 4, 3, stride=2), True), (lambda: create_pool2d('max', 3, 2, padding='same'), True),
    (lambda: AvgPool2dSame(3, stride=2), True), (lambda: ScaledStdConv2dSame(3, 4, 3, stride=2, padding='same'), True),
    (lambda: Windows(), True), (lambda: Conv2dSame(3, 4, 3), False), (lambda: nn.Conv2d(3, 4, 3, 2, padding=1), False),
    (lambda: nn.ReflectionPad2d(1), False), (lambda: nn.Conv2d(3, 4, 16, 16), False)])
def test_which_padding_depends_on_the_size(make, expected):
    assert module._pads_by_size(make().eval(), torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 96)) is expected


class Windows(nn.Module):
    """Pads a map to whole windows of 24 x 24."""

    def forward(self, x):
        return nn.functional.pad(x, (0, -x.shape[3] % 24, 0, -x.shape[2] % 24))


@pytest.mark.process
def test_it_runs_without_this_package(model, files, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    torch.save(images, tmp_path / 'images.pt')
    code = f'''
import sys, torch
sys.modules.update(noah_zoo=None, timm=None, torchvision=None)  # importing one is an error
images = torch.load('images.pt')
program, script = {str(files['torch-export'].path)!r}, {str(files['torchscript'].path)!r}
with torch.no_grad():
    torch.save([torch.export.load(program).module()(images), torch.jit.load(script)(images)], 'logits.pt')
'''
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, check=True, timeout=200)
    with torch.no_grad():
        for logits in torch.load(tmp_path / 'logits.pt'):
            torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-4)


@pytest.mark.export
@pytest.mark.process
def test_the_consumer_of_the_docs(shipped, tmp_path):
    model, exported = shipped
    code = re.search(r'```python\n(import json.*?)```', (ROOT / 'docs' / 'export.md').read_text(), re.DOTALL)[1]
    photos = [*sorted(SAMPLES.glob('*.png')), wide(tmp_path)]
    for suffix in ('.onnx', '.json'):
        (tmp_path / f'model{suffix}').write_bytes(exported.path.with_suffix(suffix).read_bytes())
    Image.open(photos[0]).convert('RGB').save(tmp_path / 'photo.jpg')
    code = "import sys\nsys.modules.update(torch=None, torchvision=None, timm=None, noah_zoo=None)\n" + code + (
        f'print(json.dumps([classify(path) for path in {[str(path) for path in photos]}]))\n')
    output = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, check=True, timeout=100, capture_output=True, text=True).stdout
    compare_with_docs(json.loads(output.splitlines()[-1]), model, photos)


def wide(folder):
    """A sample in the middle of a black picture."""
    picture = Image.new('RGB', (90, 61))
    picture.paste(Image.open(SAMPLES / '0018_bag.png').resize((61, 61)), (15, 0))
    picture.save(folder / 'wide.png')
    return folder / 'wide.png'


def compare_with_docs(found, model, photos):
    for guesses, result in zip(found, predict(model, photos), strict=True):
        expected = [(guess['label'], guess['probability']) for guess in result['predictions'][:3]]
        assert [label for label, _ in guesses] == [label for label, _ in expected]
        assert [p for _, p in guesses] == pytest.approx([p for _, p in expected], abs=1e-3)


def test_the_code_of_the_docs(model, files, tmp_path):
    classify = consumer_of_the_docs(files['onnx'].path.parent)
    photos = [*sorted(SAMPLES.glob('*.png'))[:3], wide(tmp_path)]
    compare_with_docs([classify(photo) for photo in photos], model, photos)


def consumer_of_the_docs(folder):
    """The `classify` of the docs for the model in a folder."""
    code = re.search(r'```python\n(import json.*?)```', (ROOT / 'docs' / 'export.md').read_text(), re.DOTALL)[1]
    code = code.replace("print(classify('photo.jpg'))", '').replace("'model.", f"'{folder.as_posix()}/model.")
    namespace = {}
    exec(code, namespace)
    return namespace['classify']


@pytest.mark.export
@pytest.mark.parametrize('input_size', [(3, 128, 64), (3, 48, 80)])
def test_rectangles(input_size, tmp_path):
    torch.manual_seed(0)
    model = classifier(num_classes=5, pretrained_cfg_overlay=dict(
        input_size=input_size, pool_size=None, crop_pct=0.9))
    export(model, tmp_path / 'model.onnx')
    classify = consumer_of_the_docs(tmp_path)
    for size in ((400, 300), (91, 202), (200, 100)):
        path = tmp_path / 'photo.png'
        Image.open(SAMPLES / '0018_bag.png').convert('RGB').resize(size).save(path)
        with torch.no_grad():
            expected = model(eval_transform(model)(read_image(path))[None])[0].softmax(0)
        found = {int(label): p for label, p in classify(path)}
        assert [expected[i].item() for i in found] == pytest.approx(list(found.values()), abs=2e-3)


@pytest.mark.parametrize('channels', [1, pytest.param(4, marks=pytest.mark.export)])
def test_other_channels(channels, tmp_path):
    torch.manual_seed(0)
    overlay = dict(input_size=(channels, 64, 64), pool_size=None)
    timm.models.save_for_hf(
        classifier(num_classes=5, in_chans=channels, pretrained_cfg_overlay=overlay), str(tmp_path / 'm'))
    model = load_model(f'local-dir:{tmp_path / "m"}')
    exported = export(model, tmp_path / 'model.onnx', batch_size=1)
    description = json.loads(exported.description.read_text())
    assert description['input_size'] == [channels, 64, 64]
    photos = sorted(SAMPLES.glob('*.png'))
    transparent = Image.open(photos[0]).convert('RGBA')
    transparent.putalpha(Image.linear_gradient('L').resize(transparent.size))
    transparent.save(tmp_path / 'transparent.png')
    photos.append(tmp_path / 'transparent.png')
    small = quantize(exported.path, photos, tmp_path / 'small.onnx')
    transform, mode = eval_transform(model), {1: 'L', 4: 'RGBA'}[channels]
    x_BCHW = torch.stack([transform(read_image(photo, mode=mode)) for photo in photos])
    with torch.no_grad():
        logits, expected = ExportedModel(small.path)(x_BCHW), model(x_BCHW)
    assert 0 < (logits - expected).square().mean().sqrt() < 0.3 * expected.std()
    classify = consumer_of_the_docs(tmp_path)
    for photo, logits in zip(photos, expected):
        found = {int(label): p for label, p in classify(photo)}
        assert [logits.softmax(0)[i].item() for i in found] == pytest.approx(list(found.values()), abs=2e-3)


def test_description(model, files):
    exported = files['onnx']
    description = json.loads(exported.description.read_text(encoding='utf-8'))
    assert description == {**describe(model), 'format': 'onnx', 'dynamic_image_size': True, 'batch_size': None}
    assert description['label_names'] == list(FASHION_MNIST_CLASSES)
    again = ExportedModel(exported.path)
    image = read_image(SAMPLES / '0018_bag.png')
    assert torch.equal(eval_transform(again)(image), eval_transform(model)(image))
    found = describe(load_model(DEFAULT_MODEL))
    assert found['label_names'][8] == 'Bag' and found['input_size'] == [3, 64, 64] and found['crop'] == [64, 64]
    overlay = dict(input_size=(3, 128, 64), pool_size=None, crop_pct=0.9)
    assert describe(classifier(pretrained_cfg_overlay=overlay))['resize'] == [142, 71]
    other = timm.create_model('deit_tiny_050_patch16_224_noah', img_size=(64, 96))
    assert describe(other)['crop'] == [64, 96] and eval_transform(other)(image).shape == (3, 64, 96)


def quantized(model, path, output):
    """The 8-bit file of an ONNX file, its logits of the samples and those of the model."""
    images = sorted(map(str, SAMPLES.glob('*.png')))
    small = quantize(path, images, output)
    types = {node.op_type for node in onnx.load(small.path).graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= types
    assert json.loads(small.description.read_text())['int8'] is True
    x_BCHW = torch.stack([eval_transform(model)(read_image(image)) for image in images])
    with torch.no_grad():
        logits, expected = ExportedModel(small.path)(x_BCHW), model(x_BCHW)
    difference = (logits - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < difference < 0.3
    return small, logits, expected


def test_8_bits(model, files, tmp_path, monkeypatch):
    # onnxruntime's inference of symbolic shapes gives up this model, and left files where it ran
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    path = files['onnx'].path
    small, *_ = quantized(model, path, tmp_path / 'small.onnx')
    assert small.path.stat().st_size < path.stat().st_size and (small.dynamic_size, small.batch_size) == (True, None)
    assert not any(Path().iterdir())


@pytest.mark.export
def test_8_bits_of_the_shipped_model(shipped, tmp_path):
    model, exported = shipped
    small, logits, expected = quantized(model, exported.path, tmp_path / 'small.onnx')
    assert small.path.stat().st_size < exported.path.stat().st_size / 2
    assert (logits.argmax(1) == expected.argmax(1)).sum() >= 11


@pytest.mark.export
def test_8_bits_of_fixed_batches(shipped, tmp_path):
    model, _ = shipped
    whole = export(model, tmp_path / 'model.onnx', batch_size=5)
    small, logits, expected = quantized(model, whole.path, tmp_path / 'small.onnx')
    assert small.batch_size == 5 and (logits.argmax(1) == expected.argmax(1)).sum() >= 11


def test_8_bits_with_a_damaged_image(files, tmp_path):
    (tmp_path / 'photo.jpg').write_bytes(b'no image')
    with pytest.raises(DamagedImageError, match='photo.jpg'):
        quantize(files['onnx'].path, [tmp_path / 'photo.jpg'], tmp_path / 'small.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['photo.jpg']


def test_accuracy_of_a_file(tmp_path):
    model = load_model(DEFAULT_MODEL)
    exported = export(model, tmp_path / 'model.pt', 'torchscript', check=False)
    labels = [label.casefold().replace('/', '_').replace(' ', '_') for label in model.pretrained_cfg['label_names']]
    for path in SAMPLES.glob('*.png'):
        index = labels.index(path.stem.partition('_')[2])
        (tmp_path / 'validation' / str(index)).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'validation' / str(index) / path.name).write_bytes(path.read_bytes())
    description = json.loads(exported.description.read_text())
    for names in ('0123456789', '8123456709'):  # the logits in this order
        (tmp_path / 'model.json').write_text(json.dumps({**description, 'label_names': list(names)}))
        result = validate(str(exported.path), 'folder', data_dir=str(tmp_path), cpu=True, workers=0)
        guesses = [(int(names[guess['predictions'][0]['index']]), labels.index(Path(guess['path']).stem[5:]))
                   for guess in predict(model, sorted(SAMPLES.glob('*.png')))]
        assert result['images'] == 12 and len(guesses) == 12
        assert result['top1'] == pytest.approx(100 * sum(guess == label for guess, label in guesses) / 12)
    assert result['top1'] < 90 and sum(guess == label for guess, label in guesses) > 6


@pytest.mark.parametrize('make, output, fmt, error, message', [
    (lambda: timm.create_model('test_resnet'), 'm.onnx', 'tflite', ValueError, "'tflite' is unknown; choose from onnx"),
    (lambda: timm.create_model('test_resnet'), 'm.pt', 'onnx', ValueError, 'm.pt: a file of format onnx ends with'),
    (lambda: Picky(), 'm.pt2', 'torch-export', ValueError, 'Picky cannot be exported as torch-export: .*'),
    pytest.param(
        lambda: Picky(), 'm.onnx', 'onnx', ValueError, 'Picky cannot be exported as onnx: .*',
        marks=pytest.mark.export),
    (lambda: timm.create_model('test_resnet'), 'none/m.onnx', 'onnx', OSError, 'none')])
def test_refused(make, output, fmt, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export(make(), tmp_path / output, fmt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kwargs, message', [
    (dict(batch_size=0), 'batch_size=0, format onnx: expected 1 or more'),
    (dict(batch_size=1, fmt='torchscript'), 'batch_size=1, format torchscript: expected 1 or more, and onnx or'),
    (dict(opset=17), 'opset=17; expected 18 or later'),
    pytest.param(
        dict(opset=99), 'Small cannot be exported as onnx: it would have opset 18, not 99', marks=pytest.mark.export)])
def test_options_refused(kwargs, message, tmp_path):
    kwargs = dict(dict(fmt='onnx'), **kwargs)
    with pytest.raises(ValueError, match=message):
        export(Small(), tmp_path / f'm{SUFFIXES[kwargs["fmt"]]}', **kwargs)
    assert not list(tmp_path.iterdir())


class Picky(nn.Module):
    """What it does depends on the values of an image, in a way that no exporter can write down."""
    pretrained_cfg = dict(input_size=(3, 32, 32), label_names=('a', 'b'))
    num_classes = 2

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        pooled = x.mean((2, 3))
        return self.fc(pooled) if pooled.numpy(force=True).sum() > 0 else pooled[:, :2]


def test_other_logits_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'TOLERANCE', -1.)
    old = tmp_path / 'm.pt2'
    old.write_bytes(b'what was there')
    with pytest.raises(ValueError, match='Small as torch-export: logits of 1 x 3 x 32 x 32 images differ by'):
        export(Small(), tmp_path / 'm.pt2', 'torch-export')
    assert old.read_bytes() == b'what was there' and [path.name for path in tmp_path.iterdir()] == ['m.pt2']


@pytest.mark.parametrize('fmt', ['onnx', 'int8', 'load'])
def test_a_missing_package(fmt, files, tmp_path, monkeypatch):
    missing = 'onnxscript' if fmt == 'onnx' else 'onnxruntime'
    for name in [name for name in sys.modules if name.split('.')[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'noah-zoo\[export\]'"):
        if fmt == 'onnx':
            export(Small(), tmp_path / 'm.onnx', check=False)
        elif fmt == 'int8':
            quantize(files['onnx'].path, [], tmp_path / 'm.onnx')
        else:
            load_exported(files['onnx'].path)


@pytest.mark.parametrize('suffix', SUFFIXES.values())
def test_a_damaged_file(suffix, tmp_path):
    path = tmp_path / f'model{suffix}'
    path.write_bytes(b'PK\x03\x04 cut')
    with pytest.raises(ValueError, match=f'model{suffix} is no whole {suffix} file'):
        load_exported(path)
    with pytest.raises(FileNotFoundError, match='model.json'):
        ExportedModel(path)
    with pytest.raises(FileNotFoundError, match='none.onnx: no such file'):
        ExportedModel(tmp_path / 'none.onnx')


def test_the_script(tmp_path):
    (tmp_path / f'{DEFAULT_MODEL}.pt').write_text('an older file, which is replaced')
    result = call('export', '--format', 'torchscript', '--check', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'batches of any size, images of any size' in result.stdout
    assert result.stdout.count('largest difference') == 3
    assert {path.name for path in tmp_path.iterdir()} == {f'{DEFAULT_MODEL}.pt', f'{DEFAULT_MODEL}.json'}
    assert ExportedModel(tmp_path / f'{DEFAULT_MODEL}.pt').num_classes == 10


def test_the_script_for_8_bits_and_accuracy(trained_run, photos, tmp_path):
    data_dir = folder_of_splits(photos, tmp_path / 'data')
    result = call('export', '--model', f'local-dir:{trained_run / "best"}', '--static', 4, '--opset', 20,
                  '--output', 'm.onnx', '--int8', photos / 'red', '--dataset', 'folder', '--data-dir', data_dir,
                  cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    whole, accuracy, small, of_small = result.stdout.splitlines()
    assert re.fullmatch(r'm\.onnx: \d\.\d\d MB, batches of 4, images of 32 x 32 only', whole)
    assert re.fullmatch(r'm\.int8\.onnx: \d\.\d\d MB, batches of 4, images of 32 x 32 only', small)
    model = load_model(f'local-dir:{trained_run / "best"}')
    chosen = [path for path in sorted(photos.glob('*/*.jpg')) if path.stem in ('0', '1', '2', '3')]
    found = [(guess['predictions'][0]['label'], Path(guess['path']).parent.name) for guess in predict(model, chosen)]
    right = [guess == label for guess, label in found]
    assert accuracy == f'  top-1 on 12 images of folder: {100 * sum(right) / 12:.2f} %'
    assert of_small.startswith('  top-1 on 12 images of folder: ')
    file = onnx.load(tmp_path / 'm.onnx')
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim]
              for value in (*file.graph.input, *file.graph.output)]
    assert shapes == [[4, 3, 32, 32], [4, 3]] and [entry.version for entry in file.opset_import] == [20]
    description = json.loads((tmp_path / 'm.json').read_text())
    assert (description['dynamic_image_size'], description['batch_size']) == (False, 4)


def folder_of_splits(photos, folder):
    """Four photographs of each class to validate on."""
    for path in sorted(photos.glob('*/*.jpg')):
        if path.stem in ('0', '1', '2', '3'):
            (folder / 'validation' / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / 'validation' / path.parent.name)
    return folder


@pytest.mark.export
def test_the_script_with_fixed_shapes(tmp_path):
    result = call('export', '--static', '--check', '--opset', 19, '--output', 'm.onnx', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'batches of 1, images of 64 x 64 only' in result.stdout and result.stdout.count('largest difference') == 1
    assert [opset.version for opset in onnx.load(tmp_path / 'm.onnx').opset_import] == [19]


@pytest.mark.parametrize('args, message', [
    (['--model', 'resnet18_noha'], "unknown model 'resnet18_noha'; did you mean resnet18_noah"),
    (['--format', 'tflite'], "invalid choice: 'tflite'"),
    (['--format', 'torchscript', '--int8', 'x'], '--int8 is for --format onnx, not torchscript'),
    (['--format', 'torchscript', '--opset', 18], '--opset is for --format onnx, not torchscript'),
    (['--static', 'many'], "argument --static: invalid int value: 'many'"),
    (['--int8', 'nowhere'], 'nowhere: no such file or folder'),
    (['--output', 'nowhere/m.onnx'], 'nowhere: no such folder for m.onnx'),
    (['--output', 'm.tflite'], 'm.tflite: a file of format onnx ends with .onnx')])
def test_bad_arguments(args, message, tmp_path):
    result = call('export', *args, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and 'Traceback' not in result.stderr
    assert not list(tmp_path.iterdir())
