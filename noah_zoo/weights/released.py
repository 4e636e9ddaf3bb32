"""The authors' release, 25 NOAH models and their vanilla twins: read, checked, converted to timm's format."""
import argparse
import dataclasses
import functools
import logging
import os
import re
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional, Union

import torch
from timm.models import create_model, get_pretrained_cfg
from torch import Tensor

from ..catalog import TAG, Pair, find_row, released
from ..models.noah_deit import ThinDeit
from ..models.saving import save_model
from ..text import near, some
from .names import released_names

_logger = logging.getLogger(__name__)


class _Target(NamedTuple):
    """What a model wants under a released name: timm's name, and a tensor without data."""
    name: str
    tensor: Tensor


def read_released(path: Union[str, Path]) -> Any:
    """Read a released checkpoint on the CPU, without executing anything in it.

    Only tensors, plain containers and `argparse.Namespace` are accepted.

    Args:
        path: A file written by `torch.save`.

    Returns:
        What the file holds, for `convert_released`.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is no checkpoint, is truncated or damaged, or names another global than those accepted.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path}: is a folder; expected the released file')
    with path.open('rb') as file:
        head = file.read(64)
    if not head.startswith((b'PK\x03\x04', b'\x80')):  # torch's zip format, and the pickles of its older one
        raise ValueError(f'{path}: not a checkpoint: {_describe(head)}')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of pickles that are then refused
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # damaged files end in anything from EOFError to OSError
        foreign = re.search(r'GLOBAL (\S+)', str(error))
        if foreign:
            raise ValueError(
                f'{path}: refused, nothing in it was executed: its pickle names {foreign[1]}, expected nothing but '
                f'tensors, plain containers and argparse.Namespace') from None
        reason = (str(error).split('WeightsUnpickler error:')[-1].strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f'{path}: truncated, damaged or not a checkpoint: {reason}') from None


def _describe(head: bytes) -> str:
    if not head:
        return 'the file is empty'
    if head[8:9] == b'{':
        return 'it is in the safetensors format, which the release does not use; timm loads it as it is'
    if head.lstrip().startswith(b'<'):
        return 'it is a web page, such as the one before a large download'
    return f'it starts with {head[:16]!r}'


def convert_released(state_dict: Mapping[str, Any], name: str, ema: bool = False) -> Dict[str, Tensor]:
    """Rename the weights of a released checkpoint to those of the timm model, after checking that they fit.

    Args:
        state_dict: What the file holds: any container of the release, or a bare state dict.
        name: The timm name of a NOAH model or of its vanilla twin.
        ema: Take the averaged weights of the container.

    Returns:
        A state dict for `load_state_dict(strict=True)`. A thin DeiT is to be created with `pre_logits=True` if it has
        `representation.fc.weight`.

    Raises:
        ValueError: If the name is unknown, the container has no averaged weights, or the weights are not this
            model's: keys, shapes, types, or a value that is not finite.
    """
    released_model(name)
    given = weights_in(state_dict, name, ema)
    pre_logits = any(key.startswith('pre_logits.') for key in given)
    expected = _expected(name, pre_logits)
    problem = _mismatch(given, expected)
    if problem:
        owner = next((other for other in released() if not _mismatch(given, _expected(other, pre_logits))), None)
        raise ValueError(f'{name}: the weights are those of {owner}' if owner else f'{name}: {problem}')
    for key, value in given.items():
        if not value.isfinite().all():
            raise ValueError(f'{name}: {key} has values that are NaN or infinite; expected finite ones')
    return {target.name: given[key] for key, target in expected.items()}


def convert_file(path: Union[str, Path], name: str, output: Union[str, Path], ema: bool = False) -> Path:
    """Convert a released file to a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    The folder holds `model.safetensors` and timm's `config.json`. It appears whole or not at all: it is written under
    a temporary name beside its place, `.FOLDER.*.partial`, and renamed. Only a killed process leaves the temporary
    one behind; it may be deleted.

    Args:
        path: The released file.
        name: The timm name of a NOAH model or of its vanilla twin.
        output: The folder, absent or empty. Parents are made.
        ema: Take the averaged weights.

    Returns:
        The folder, as an absolute path.

    Raises:
        OSError: If the file cannot be read, or the folder cannot be written or is not empty.
        ValueError: See `read_released` and `convert_released`.
    """
    _check_empty(Path(output))
    weights = convert_released(read_released(path), name, ema)
    output = write_folder(weights, name, output)
    _logger.info('%s: converted %s to %s', name, path, output)
    return output


def write_folder(weights: Dict[str, Tensor], name: str, output: Union[str, Path]) -> Path:
    """Write converted weights as a folder; see `convert_file`.

    Args:
        weights: A state dict of `convert_released`.
        name: The timm name of a NOAH model or of its vanilla twin.
        output: The folder, absent or empty. Parents are made.

    Returns:
        The folder, as an absolute path.

    Raises:
        OSError: If the folder cannot be written or is not empty.
        RuntimeError: If the weights are not the model's.
    """
    output = Path(output).resolve()
    _check_empty(output)
    row = released_model(name)
    model_args = {}
    if name == row.name:
        model_args.update(num_groups=row.num_groups, key_ratio=row.key_ratio)
    if 'representation.fc.weight' in weights:
        model_args.update(pre_logits=True)
    # The twin is evaluated as its NOAH sibling, whatever timm's own default weights of that name want.
    cfg = dataclasses.replace(
        get_pretrained_cfg(f'{row.name}.{TAG}'), architecture=name, classifier=get_pretrained_cfg(name).classifier)
    model = create_model(name, pretrained_cfg=cfg.to_dict(), **model_args)
    model.load_state_dict(weights)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f'.{output.name}.{uuid.uuid4().hex[:8]}.partial')
    try:
        save_model(model, partial, model_args)
        if output.exists():
            output.rmdir()  # it is empty, and Windows does not rename onto a folder
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output


def _check_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f'{output}: exists and is not an empty folder; nothing was written')


def released_model(name: str) -> Pair:
    """The row of the catalog for a NOAH model or its vanilla twin.

    Raises:
        ValueError: If the name is neither.
    """
    row = find_row(name)
    if row is not None:
        return row
    close = near(name, released(), 0.5) or ', '.join(released())
    raise ValueError(f'{name!r} is not a model of the release; choose from {close}')


def weights_in(checkpoint: Any, name: str, ema: bool = False) -> Dict[str, Any]:
    """The weights in a container, without the prefix of a parallel wrapper."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'{name}: the file holds a {type(checkpoint).__name__}; expected a dict of tensors')
    places = ('state_dict_ema', 'model_ema') if ema else ('state_dict', 'model')
    weights = next((checkpoint[place] for place in places if isinstance(checkpoint.get(place), Mapping)), None)
    if weights is None and ema:
        raise ValueError(
            f'{name}: the file has no averaged weights: expected {" or ".join(places)}, found {some(checkpoint)}')
    weights = checkpoint if weights is None else weights
    stripped = {re.sub(r'^module\.', '', str(key)): value for key, value in weights.items()}
    if len(stripped) < len(weights):
        raise ValueError(f'{name}: the file has the same keys with and without the prefix "module."; expected one')
    return stripped


@functools.cache
def _expected(name: str, pre_logits: bool) -> Dict[str, _Target]:
    """What a model wants, by released names."""
    with torch.device('meta'):
        model = create_model(name)
        if pre_logits and isinstance(model, ThinDeit):
            model = create_model(name, pre_logits=True)
    tensors = model.state_dict()
    names = released_names(tensors, released_model(name).family)
    return {names[key]: _Target(key, tensor) for key, tensor in tensors.items()}


def _mismatch(given: Dict[str, Any], expected: Dict[str, _Target]) -> Optional[str]:
    """What is wrong with the keys, types and shapes, in one line, or None."""
    missing = [key for key in expected if key not in given]
    surplus = [key for key in given if key not in expected]
    wrong = []
    for key, (_, target) in expected.items():
        value = given.get(key, target)
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            wrong.append(f'{key} is a {type(value).__name__}, expected a dense tensor')
        elif value.shape != target.shape:
            wrong.append(f'{key} has shape {list(value.shape)}, expected {list(target.shape)}')
        elif value.is_floating_point() != target.is_floating_point():
            wrong.append(f'{key} has type {value.dtype}, expected {target.dtype}')
    parts = [f'missing keys ({len(missing)} of {len(expected)}): {some(missing)}'] if missing else []
    parts += [f'surplus keys ({len(surplus)}): {some(surplus)}'] if surplus else []
    parts += [some(wrong)] if wrong else []
    return '; '.join(parts) or None
