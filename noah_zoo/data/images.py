"""Image files, read as a model wants them, grey, RGB or RGBA, or refused."""
import io
from pathlib import Path
from typing import Optional, Union

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # of Pillow, by the channels of a model
UNREADABLE = ': not a readable image: '
ORIENTATIONS = dict(zip(range(2, 9), (  # of EXIF, and what undoes them; 1 is upright
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


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


def read_image(source: Union[str, Path, bytes], where: Optional[str] = None, mode: str = 'RGB') -> Image.Image:
    """Read an image file whole.

    As everywhere in timm, the first frame of several is taken. Not as in timm: what EXIF says of the orientation is
    applied, as cameras turn no image themselves; transparency becomes white unless it is kept, where otherwise whatever
    lies under it would be seen; and see `convert` for 16-bit and floating-point images.

    Args:
        source: The file's path or content.
        where: What errors call the image; the path if None.
        mode: 'L', 'RGB' or 'RGBA'; see `mode_of`.

    Raises:
        DamagedImageError: If it is no image, is cut short, is a link to nothing, or has so many pixels that Pillow
            refuses it.
        OSError: If the file cannot be opened or read, which says nothing of the image.
    """
    where = str(source) if where is None else where
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError:
        if Path(source).is_symlink():
            raise DamagedImageError(f'{where}{UNREADABLE}a link to nothing') from None
        raise
    try:
        with Image.open(io.BytesIO(data)) as image:
            return convert(_upright(image), mode)
    except (MemoryError, Warning):  # not the image's fault; warnings come here under python -W error
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = 'the file is empty' if not data else str(error) or type(error).__name__
        if data and isinstance(error, UnidentifiedImageError):  # its text has an address in memory
            reason = 'not a format that Pillow knows'
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


def convert(image: Image.Image, mode: str) -> Image.Image:
    """`image.convert(mode)`, on white where it is transparent unless `mode` is 'RGBA', and but for the modes that are
    clipped to white.

    16-bit grey, which is 'I;16' or 'I' by format and version of Pillow, is divided by 256. Floating-point grey of 0 to
    1 is multiplied by 255; of 0 to 255 it is rounded down.

    Raises:
        ValueError: If values are out of these ranges.
    """
    if image.mode != 'F' and not image.mode.startswith('I'):
        if image.has_transparency_data and mode != 'RGBA':
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
        return image.convert(mode)
    values = np.asarray(image)
    low, high = values.min(), values.max()
    largest = 255 if image.mode == 'F' else 65535
    if not (low >= 0 and high <= largest):  # in this form for NaN
        raise ValueError(f'mode {image.mode} with values from {low} to {high}, accepted are 0 to {largest}')
    if image.mode == 'F':
        values = np.rint(values * 255) if high <= 1 else values
    else:
        values = values // 256
    return Image.fromarray(values.astype(np.uint8)).convert(mode)
