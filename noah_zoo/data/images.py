"""Image files, read as a model wants them, grey, RGB or RGBA, or refused."""
import io
import os
from pathlib import Path
from typing import NamedTuple, Optional, Tuple, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

ValueRange = Tuple[float, float]
TYPE_RANGES = {'I': (0, 65535), 'F': (0, 1)}  # of Pillow's modes
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # of Pillow, by the channels of a model
UNREADABLE = ': not a readable image: '
MAX_PIXELS = 'NOAH_ZOO_MAX_PIXELS'
ORIENTATIONS = dict(zip(range(2, 9), (  # of EXIF, and what undoes them; 1 is upright
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


if MAX_PIXELS in os.environ:
    Image.MAX_IMAGE_PIXELS = int(os.environ[MAX_PIXELS]) // 2  # Pillow raises above twice its limit


class DamagedImageError(ValueError):
    """An image that cannot be read: '<where>: not a readable image: <reason>'. Made of one string, as torch's
    DataLoader makes a worker's exception anew from its text."""


def mode_of(channels: int) -> str:
    """The mode in which images are read for a model of so many channels: 1 is grey, 3 RGB, 4 RGB and transparency.

    Raises:
        ValueError: If images have no such mode.
    """
    if channels not in MODES:
        raise ValueError(
            f'the model takes images of {channels} channels (in_chans={channels}); accepted are 1 (grey), 3 (RGB) and '
            f'4 (RGBA)')
    return MODES[channels]


def read_image(
        source: Union[str, Path, bytes], where: Optional[str] = None, mode: str = 'RGB',
        value_range: Optional[ValueRange] = None) -> Image.Image:
    """Read an image file whole.

    As everywhere in timm, the first frame of several is taken. Not as in timm: what EXIF says of the orientation is
    applied, as cameras turn no image themselves; transparency becomes white unless it is kept, where otherwise whatever
    lies under it would be seen; and see `convert` for 16-bit and floating-point images.

    Args:
        source: The file's path or content.
        where: What errors call the image; the path if None.
        mode: 'L', 'RGB' or 'RGBA'; see `mode_of`.
        value_range: As of `convert`.

    Raises:
        DamagedImageError: If it does not exist, is no image, is cut short, or has so many pixels that Pillow refuses
            it; the environment variable NOAH_ZOO_MAX_PIXELS sets another limit.
        OSError: If the file cannot be opened or read, which says nothing of the image.
    """
    where = str(source) if where is None else where
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError:
        reason = 'a link to nothing' if Path(source).is_symlink() else 'no such file'
        raise DamagedImageError(f'{where}{UNREADABLE}{reason}{"" if where == str(source) else f" {source}"}') from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return convert(_upright(image), mode, value_range)
    except (MemoryError, Warning):  # not the image's fault; warnings come here under python -W error
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = 'the file is empty' if not data else str(error) or type(error).__name__
        if data and isinstance(error, UnidentifiedImageError):  # its text has an address in memory
            reason = 'not a format that Pillow knows'
        if isinstance(error, Image.DecompressionBombError):
            reason = (
                f'more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, as a decompression bomb has; if the file is sound, '
                f'set the environment variable {MAX_PIXELS} to a higher number')
        raise DamagedImageError(f'{where}{UNREADABLE}{reason}') from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # what of the image is damaged is told from here on
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # of the metadata, which an image can do without
        return image
    return image.transpose(ORIENTATIONS[orientation]) if orientation in ORIENTATIONS else image


def convert(image: Image.Image, mode: str, value_range: Optional[ValueRange] = None) -> Image.Image:
    """Return the image in an 8-bit mode, on white where it is transparent unless `mode` is 'RGBA'.

    Gray images of 16 or 32 bits are scaled: `value_range` becomes 0 to 255, and values outside are clipped. Without
    `value_range`, the file type decides: integers of 0 to 65535 and floating-point numbers of 0 to 1. The result's
    `info['values']` has the `Values` of the original.

    Raises:
        ValueError: If a value is not finite, or there is no `value_range` and values are outside of the file type's. Of
            floating-point images, up to 5 % above it are clipped.
    """
    if image.mode != 'F' and not image.mode.startswith('I'):
        if image.has_transparency_data and mode != 'RGBA':
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
        return image.convert(mode)
    values = np.asarray(image).astype(np.float64)
    low, high = TYPE_RANGES['F' if image.mode == 'F' else 'I'] if value_range is None else value_range
    lowest, highest = float(values.min()), float(values.max())
    most = high if image.mode != 'F' else low + 1.05 * (high - low)
    if not (low <= lowest and highest <= most if value_range is None else np.isfinite(values).all()):  # for NaN, too
        raise ValueError(
            f'values from {lowest:g} to {highest:g}; expected {low:g} to {high:g}. Give the range of the data set with '
            f'--value-range LOW HIGH')
    if image.mode == 'F':
        scaled = np.rint((values - low) / (high - low) * 255)
    else:
        scaled = np.floor((values - low) / (high + 1 - low) * 256)
    converted = Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert(mode)
    converted.info['values'] = Values(lowest, highest, low, high)
    return converted


class Values(NamedTuple):
    """The lowest and the highest value of 16-bit or floating-point images, and the range that is scaled to 8 bits."""
    lowest: float
    highest: float
    low: float
    high: float

    def __or__(self, other: Optional['Values']) -> 'Values':
        """Of both images."""
        if other is None:
            return self
        return self._replace(lowest=min(self.lowest, other.lowest), highest=max(self.highest, other.highest))

    def remark(self) -> str:
        """What to say if less than an eighth of the range is used; else nothing."""
        if self.highest - self.lowest >= (self.high - self.low) / 8:
            return ''
        return (
            f'values from {self.lowest:g} to {self.highest:g} use less than an eighth of the range {self.low:g} to '
            f'{self.high:g}; give the range of the data set with --value-range LOW HIGH')
