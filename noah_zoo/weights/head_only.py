"""Weights of a head alone: their file says which file on the Hub has the others."""
import json
import logging
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Tuple, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import disk_errors, write
from ..models.builder import WeightsError
from .hub import fetch, sha256_of

_logger = logging.getLogger(__name__)

KEY = 'noah_zoo.backbone'  # in the header of the head's file
MODEL_TYPE = 'noah_head_without_backbone'  # which transformers refuses; it would give the head a random backbone


class Backbone(NamedTuple):
    """A file of weights on the Hub, as it was when a head was trained on it.

    Attributes:
        repo_id: Its repository.
        revision: The commit.
        filename: The file, in the safetensors format.
        sha256: Of the file.
        without: Names of the tensors that the model does not have: the classifier that the head replaces.
    """
    repo_id: str
    revision: str
    filename: str
    sha256: str
    without: Tuple[str, ...] = ()


def read_backbone(file: Union[str, Path]) -> Optional[Backbone]:
    """What the file of a head alone says of its backbone; None for any other file.

    Raises:
        WeightsError: If it says so in a way that is not known here.
    """
    try:
        with safe_open(file, 'pt') as weights:
            record = (weights.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):  # who loads the file says what is wrong with it
        return None
    try:
        return Backbone(**json.loads(record)) if record else None
    except (TypeError, ValueError):
        raise WeightsError(
            f'{file} names its backbone in a way that is not known here: {record}; update noah_zoo') from None


def whole_weights(
        variant: str, file: Union[str, Path], cache_dir: Union[str, Path, None] = None,
) -> Optional[Dict[str, Tensor]]:
    """All weights of a model of which a file has the head alone; None for any other file.

    Args:
        variant: The model's name, for messages.
        file: The head's file.
        cache_dir: The Hub's cache, if not the usual one.

    Raises:
        WeightsError: If the backbone cannot be had, or is not the one that the head was trained on.
    """
    backbone = read_backbone(file)
    if backbone is None:
        return None
    path = _fetch(variant, backbone, cache_dir)
    _logger.info('%s: its backbone from %s@%s (%s)', variant, backbone.repo_id, backbone.revision, path)
    weights = {name: value for name, value in load_file(path).items() if name not in backbone.without}
    return {**weights, **load_file(file)}


def write_head(
        best: Path, folder: Path, repo_id: str, filename: str = 'model.safetensors', revision: Optional[str] = None,
) -> Backbone:
    """Write what was trained of a model with a frozen backbone: `model.safetensors`, with the model's `config.json`.

    Tensors of the backbone go along where the run has them in another shape: a first layer for other channels,
    position embeddings for another image size.

    Args:
        best: The whole model, in timm's Hub layout.
        folder: Where to write; is made.
        repo_id: Repository of the weights that training started from: the twin's, a NOAH model's, or a head alone.
        filename: The file in it.
        revision: A commit, tag or branch; 'main' if not given.

    Returns:
        The record of the backbone, as it was written.

    Raises:
        ValueError: If that backbone and the head are not the whole model.
        WeightsError: If the backbone cannot be had.
    """
    file = fetch(repo_id, repo_id, filename, revision)
    backbone = read_backbone(file)
    if backbone is None:
        commit = file.parents[len(Path(filename).parts) - 1].name  # snapshots/COMMIT/FILENAME
        backbone = Backbone(repo_id, commit, filename, sha256_of(file))
    else:  # a head alone, whose backbone is this one's, too
        file = _fetch(repo_id, backbone)
    place = f'{backbone.repo_id}@{backbone.revision}'
    try:
        model = timm.create_model(f'local-dir:{best}', pretrained_backbone=str(file))
    except (LookupError, RuntimeError, ValueError) as error:
        raise ValueError(f'{place} is not what {best} was trained on: {error}. Publish the whole model') from error
    ours, theirs, stored = load_file(best / 'model.safetensors'), model.state_dict(), load_file(file)
    frozen = [name for name in ours if not name.startswith(f'{model.noah_place}.')]
    changed = [name for name in frozen if name not in theirs or not torch.equal(ours[name], theirs[name])]
    if changed:
        raise ValueError(
            f'{place} is not what {best} was trained on: {len(changed)} of {len(frozen)} tensors differ, {changed[0]} '
            f'first (sha256 of its {filename}: {backbone.sha256}). It has changed since, or the run has trained it. '
            f'Publish the whole model')
    reshaped = {name for name in frozen if name in stored and stored[name].shape != ours[name].shape}
    converted = [
        name for name in frozen
        if name not in reshaped and (name not in stored or not torch.equal(ours[name], stored[name].to(ours[name])))]
    if converted:
        raise ValueError(
            f'{place} has the weights in another form than timm, {converted[0]} for one, and a head alone cannot refer '
            f'to them. Publish the whole model')
    backbone = backbone._replace(without=tuple(sorted(stored.keys() - ours.keys())))
    folder.mkdir(parents=True)
    config = json.loads((best / 'config.json').read_text(encoding='utf-8'))
    write(folder / 'config.json', json.dumps({**config, 'model_type': MODEL_TYPE}, indent=2) + '\n')
    sent = {name: ours[name] for name in ours if name in reshaped or name not in frozen}
    # One entry, as several are written in any order, and a repeated call has to find what it has sent.
    with disk_errors(folder):
        save_file(sent, folder / 'model.safetensors', {KEY: json.dumps(backbone._asdict())})
    return backbone


def _fetch(variant: str, backbone: Backbone, cache_dir: Union[str, Path, None] = None) -> Path:
    try:
        return fetch(
            variant, backbone.repo_id, backbone.filename, backbone.revision, backbone.sha256, cache_dir=cache_dir)
    except WeightsError as error:
        raise WeightsError(
            f'{variant}: the weights are a head alone, and its backbone cannot be had as it was, '
            f'{backbone.filename} of {backbone.repo_id}@{backbone.revision} with sha256 {backbone.sha256}: {error}. If '
            f'that repository has changed or is gone, ask for the whole model where the head comes from') from error
