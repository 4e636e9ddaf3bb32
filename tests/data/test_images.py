"""Reading image files: modes, depths, damage."""
import io
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from noah_zoo.data.damage import scan
from noah_zoo.data.factory import create_dataset
from noah_zoo.data.images import MODES, ORIENTATIONS, DamagedImageError, Values, mode_of, read_image

from .files import DAMAGED, GREYS, encode, make_folder, photo, png

COLOURS = np.random.default_rng(1).integers(0, 256, (9, 7, 4)).astype(np.uint8)


def array(data):
    image = read_image(data)
    assert image.mode == 'RGB'
    return np.asarray(image)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB'])
@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_modes_that_pillow_converts(mode, kind):
    image = Image.fromarray(COLOURS[..., :3]).convert(mode)
    data = encode(image, kind)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert np.array_equal(array(data), np.asarray(image.convert('RGB')))


def on_white(colours, alpha):
    alpha = np.asarray(alpha, float)[..., np.newaxis] / 255
    return alpha * colours + (1 - alpha) * 255


def test_transparency_is_white():
    rgb, alpha = COLOURS[..., :3], COLOURS[..., 3]
    assert np.abs(array(encode(Image.fromarray(COLOURS), 'png')) - on_white(rgb, alpha)).max() <= 1
    for kind in ('tiff', 'webp'):
        options = dict(lossless=True, exact=True) if kind == 'webp' else {}
        assert np.abs(array(encode(Image.fromarray(COLOURS), kind, **options)) - on_white(rgb, alpha)).max() <= 1
    grey = Image.fromarray(COLOURS[..., :2], 'LA')
    expected = on_white(np.repeat(COLOURS[..., :1], 3, axis=2), COLOURS[..., 1])
    assert np.abs(array(encode(grey, 'png')) - expected).max() <= 1
    opaque = np.dstack([rgb, np.full_like(alpha, 255)])
    assert np.array_equal(array(encode(Image.fromarray(opaque), 'png')), rgb)


@pytest.mark.parametrize('transparency', [3, bytes(range(256))])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(COLOURS[..., :3]).quantize(16)
    data = encode(image, 'png', transparency=transparency)
    assert 'transparency' in Image.open(io.BytesIO(data)).info
    indices = np.asarray(image)
    alpha = np.where(indices == 3, 0, 255) if transparency == 3 else indices
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = array(data)
    assert np.abs(found - on_white(np.asarray(image.convert('RGB')), alpha)).max() <= 1


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'tiff', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_undone(kind, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12], upright[8:, 12:] = (255, 0, 0), (0, 0, 255)  # red at the upper left, blue at the lower right
    undo = {**{1: lambda x: x}, **{k: lambda x, m=m: x.transpose(m) for k, m in ORIENTATIONS.items()}}[orientation]
    stored = next(
        image for how in (None, *Image.Transpose)
        for image in [Image.fromarray(upright) if how is None else Image.fromarray(upright).transpose(how)]
        if image.size in ((24, 16), (16, 24)) and np.array_equal(np.asarray(undo(image)), upright))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {'jpeg': dict(quality=100, subsampling=0), 'webp': dict(lossless=True)}.get(kind, {})
    found = array(encode(stored, kind, exif=exif, **options)).astype(int)
    assert found.shape == (16, 24, 3) and np.abs(found - upright).max() < 40
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(stored, kind, exif=exif, **options)))))
    assert np.array_equal(found, expected[..., :3])  # as Pillow undoes it


def test_metadata_that_are_broken_do_not_matter():
    data = encode(photo(), 'jpeg', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff')
    assert np.array_equal(array(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('kind', ['jpeg', 'tiff'])
def test_cmyk(kind):
    colours = np.zeros((16, 16, 4), np.uint8)
    colours[:, :8] = (0, 255, 255, 0)  # red
    colours[:, 8:] = (0, 0, 0, 255)  # black
    data = encode(Image.fromarray(colours, 'CMYK'), kind)
    assert Image.open(io.BytesIO(data)).mode == 'CMYK'
    rgb = array(data).astype(int)
    assert np.abs(rgb[:, :8] - (255, 0, 0)).max() <= 3  # JPEG loses a little
    assert np.abs(rgb[:, 8:]).max() <= 3


def test_16_bit_grey_is_scaled():
    files = {
        'png': png(7, 9, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in GREYS)),
        'tiff': encode(Image.fromarray(GREYS), 'tiff'),
        'pgm': b'P5 7 9 65535\n' + GREYS.astype('>u2').tobytes(),
        'int32': encode(Image.fromarray(GREYS.astype(np.int32)), 'tiff')}
    for name, data in files.items():
        assert Image.open(io.BytesIO(data)).mode.startswith('I'), name
        rgb = array(data)
        assert all(np.array_equal(rgb[..., c], GREYS // 256) for c in range(3)), name
    assert {Image.open(io.BytesIO(data)).mode for data in files.values()} == {'I', 'I;16'}
    with pytest.raises(DamagedImageError, match='values from 0 to 65536; expected 0 to 65535. Give .* --value-range'):
        read_image(encode(Image.fromarray(np.array([[0, 65536]], np.int32)), 'tiff'), 'x')


def test_floating_point():
    def tiff(values):
        return encode(Image.fromarray(np.asarray(values, np.float32)), 'tiff')
    assert array(tiff([[0, 0.5, 1]]))[0, :, 1].tolist() == [0, 128, 255]
    # The scale does not depend on the image's own values: 0.98 and 1.02 are nearly the same gray.
    assert array(tiff([[0, 0.98]]))[0, :, 0].tolist() == [0, 250]
    assert array(tiff([[0, 0.98, 1.02]]))[0, :, 0].tolist() == [0, 250, 255]
    for values in ([[-1, 0]], [[0, 1.1]], [[0, 256]], [[0, np.nan]]):
        with pytest.raises(DamagedImageError, match='expected 0 to 1. Give the range .* with --value-range'):
            read_image(tiff(values), 'x')


def test_value_range():
    reflectance = encode(Image.fromarray(np.array([[-1, 0, 50, 100, 200]], np.float32)), 'tiff')
    image = read_image(reflectance, mode='L', value_range=(0, 100))
    assert np.asarray(image).tolist() == [[0, 0, 128, 255, 255]]
    assert image.info['values'] == Values(-1, 200, 0, 100)
    x_ray = encode(Image.fromarray(np.array([[0, 1024, 2048, 4095, 5000]], np.uint16)), 'png')
    assert np.asarray(read_image(x_ray, mode='L', value_range=(0, 4095))).tolist() == [[0, 64, 128, 255, 255]]
    hounsfield = encode(Image.fromarray(np.array([[-1000, 0, 1047]], np.int32)), 'tiff')
    assert np.asarray(read_image(hounsfield, mode='L', value_range=(-1000, 1047))).tolist() == [[0, 125, 255]]
    with pytest.raises(DamagedImageError, match='values from nan'):
        read_image(encode(Image.fromarray(np.array([[np.nan, 1]], np.float32)), 'tiff'), 'x', value_range=(0, 1))


def test_values_of_many_images():
    values = Values(10, 500, 0, 65535) | Values(0, 4000, 0, 65535) | None
    assert values == Values(0, 4000, 0, 65535)
    assert values.remark() == (
        'values from 0 to 4000 use less than an eighth of the range 0 to 65535; give the range of the data set with '
        '--value-range LOW HIGH')
    assert not Values(0, 8192, 0, 65535).remark()


def test_the_modes_of_other_channels():
    rgb, alpha = COLOURS[..., :3], COLOURS[..., 3]
    data = encode(Image.fromarray(COLOURS), 'png')
    assert np.array_equal(np.asarray(read_image(data, mode='RGBA')), COLOURS)  # the transparency is kept
    grey = np.asarray(read_image(data, mode='L'))
    assert np.abs(grey - on_white(rgb, alpha) @ (0.299, 0.587, 0.114)).max() <= 1.5
    opaque = np.asarray(read_image(encode(Image.fromarray(rgb), 'png'), mode='RGBA'))
    assert np.array_equal(opaque[..., :3], rgb) and (opaque[..., 3] == 255).all()
    plain = encode(Image.fromarray(alpha), 'png')
    assert np.array_equal(np.asarray(read_image(plain, mode='L')), alpha)
    for mode in MODES.values():
        deep = read_image(encode(Image.fromarray(GREYS), 'tiff'), mode=mode)
        floats = read_image(encode(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), 'tiff'), mode=mode)
        assert deep.mode == floats.mode == mode
        assert np.array_equal(np.asarray(deep).reshape(*GREYS.shape, -1)[..., 0], GREYS // 256)
        assert np.asarray(floats).reshape(3, -1)[:, 0].tolist() == [0, 128, 255]
    assert [mode_of(channels) for channels in (1, 3, 4)] == ['L', 'RGB', 'RGBA']
    for channels in (2, 12):
        with pytest.raises(ValueError, match=f'in_chans={channels}.*accepted are 1 .grey., 3 .RGB. and 4 .RGBA.'):
            mode_of(channels)


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_file(name, tmp_path):
    content, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedImageError) as error:
        read_image(tmp_path / name)
    where, _, told = str(error.value).partition(': not a readable image: ')
    assert where == str(tmp_path / name) and reason.lower() in told.lower() and '0x' not in told
    assert str(type(error.value)('as torch makes it')) == 'as torch makes it'


def test_an_image_between_pillows_two_limits_is_read():
    side = 9600  # Pillow warns from 89 million pixels and refuses from 179 million
    with pytest.warns(Image.DecompressionBombWarning):
        assert read_image(png(side, side, 1, 0, bytes((1 + side // 8) * side))).size == (side, side)


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    """A file that is gone is an unreadable image; an error of the disk says nothing of the image."""
    make_folder(tmp_path, {'a': 2}, ['train'])
    images = create_dataset('folder', str(tmp_path), 'train')
    (tmp_path / 'train/a/1.png').unlink()
    with pytest.raises(DamagedImageError, match='1.png: not a readable image: no such file'):
        images.read(1)
    assert scan(images).damaged == {1: 'no such file'}

    def read_bytes(path):
        raise OSError(5, 'Input/output error', str(path))
    monkeypatch.setattr('noah_zoo.data.images.Path.read_bytes', read_bytes)
    for read in (images.read, lambda index: scan(images)):
        with pytest.raises(OSError, match='Input/output error.*0.png'):
            read(0)
