"""Where the weights of a model come from."""
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, get_pretrained_cfg

from ..catalog import NAMESPACE, PUBLISHED, SHIPPED, TAG, registered
from ..models.builder import WEIGHT_PLACES, WeightsError
from .drive import fetch_released
from .head_only import whole_weights
from .hub import MissingFileError, fetch
from .released import read_released, weights_in

_logger = logging.getLogger(__name__)


def find_weights(
        variant: str, cfg: PretrainedCfg, cache_dir: Optional[str] = None,
) -> Tuple[PretrainedCfg, Dict[str, Any]]:
    """The pretrained cfg with the place of verified weights; the log says which.

    In this order: what the caller gave; weights inside the package; the Hub, for a tag whose revision and sha256 are
    recorded, or in the namespace NOAH_ZOO_NAMESPACE if that is set; the authors' file on Google Drive, converted. Of
    weights that are a head alone, given by a repository, folder or file, the backbone is fetched as well.

    Args:
        variant: The model's name.
        cfg: Its pretrained cfg.
        cache_dir: The Hub's cache, if not the usual one.

    Returns:
        The cfg, and the arguments of the model that the weights imply.

    Raises:
        WeightsError: If there are none, or they cannot be had, or are not in the safetensors format.
    """
    name = f'{variant}.{cfg.tag}'
    known = get_pretrained_cfg(name) if cfg.tag == TAG or name in SHIPPED else PretrainedCfg()
    given = {place: getattr(cfg, place) for place in WEIGHT_PLACES if getattr(cfg, place) != getattr(known, place)}
    if known.tag is None or any(given.values()):
        places = dict(dict.fromkeys(WEIGHT_PLACES), **given)
        return _given(variant, replace(cfg, **places), cache_dir), {}
    if name in SHIPPED:
        _logger.info('%s: weights inside the package (%s)', name, cfg.file)
        return cfg, {}
    file = fetch_of_authors(variant, cache_dir)
    with safe_open(file, 'pt') as weights:
        pre_logits = 'representation.fc.weight' in weights.keys()
    return replace(cfg, file=str(file), source=None), dict(pre_logits=True) if pre_logits else {}


def fetch_of_authors(variant: str, cache_dir: Optional[str] = None) -> Path:
    """The authors' weights of a NOAH model or vanilla twin, from the Hub or Google Drive as `find_weights` has it.

    Raises:
        WeightsError: If they cannot be had, or are not in the safetensors format.
    """
    name, namespace = f'{variant}.{TAG}', os.environ.get('NOAH_ZOO_NAMESPACE')
    repo_id = f'{namespace or NAMESPACE}/{name}'
    published = PUBLISHED.get(repo_id)
    if published:
        file = fetch(name, repo_id, revision=published.revision, sha256=published.sha256, cache_dir=cache_dir)
        _logger.info('%s: weights from %s@%s on the Hub (%s)', name, repo_id, published.revision, file)
    elif namespace:
        file = fetch(name, repo_id, cache_dir=cache_dir)
        _logger.info('%s: weights from %s on the Hub (%s)', name, repo_id, file)
    else:
        file = fetch_released(variant, cache_dir)
        _logger.info("%s: weights from the authors' release, converted (%s)", name, file)
    try:
        with safe_open(file, 'pt'):
            return file
    except SafetensorError as error:
        raise WeightsError(
            f'{name}: {file} arrived as it was sent, but is not in the safetensors format: {error}. Tell the owner of '
            f'{repo_id}, or load a file of your own with pretrained_cfg_overlay=dict(file=FILE)') from None


def place_on_hub(source: str) -> Optional[Tuple[str, str, Optional[str]]]:
    """Repository, file and revision of what `timm.create_model(source, pretrained=True)` loads; None if elsewhere."""
    scheme, colon, hub_id = source.partition(':')
    filename = None
    if colon and scheme not in ('hf-hub', 'hf_hub'):
        return None
    if not colon:
        try:
            cfg = get_pretrained_cfg(source) or PretrainedCfg()
        except RuntimeError:  # a tag that timm does not know
            return None
        hub_id, filename = cfg.hf_hub_id, cfg.hf_hub_filename
        namespace = os.environ.get('NOAH_ZOO_NAMESPACE')
        if namespace and cfg.tag == TAG and cfg.architecture in registered():
            repo_id = f'{namespace}/{cfg.architecture}.{TAG}'
            hub_id = f'{repo_id}@{PUBLISHED[repo_id].revision}' if repo_id in PUBLISHED else repo_id
    if not hub_id:
        return None
    repo_id, _, revision = hub_id.partition('@')
    return repo_id, filename or 'model.safetensors', revision or None


def _given(variant: str, cfg: PretrainedCfg, cache_dir: Optional[str]) -> PretrainedCfg:
    """The caller's own place; a repository on the Hub is fetched with care, the others are timm's to load."""
    place = next((place for place in ('state_dict', 'file', 'hf_hub_id', 'url') if getattr(cfg, place)), None)
    if place is None:
        raise WeightsError(
            f'{variant}: no weights are known for the tag {cfg.tag!r}; use a tag of timm.list_pretrained({variant!r}), '
            f"pretrained_cfg_overlay=dict(file='FILE'), or pretrained=False")
    if place == 'file' and not Path(cfg.file).exists():
        raise WeightsError(f'{variant}: the weights were to come from {cfg.file}, which does not exist')
    if place != 'hf_hub_id':
        _logger.info('%s: weights from %s', variant, 'a state dict' if place == 'state_dict' else getattr(cfg, place))
        if place == 'file':
            file = Path(cfg.file)
            return _completed(variant, cfg, file / 'model.safetensors' if file.is_dir() else file, cache_dir)
        return cfg
    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    get = partial(fetch, variant, repo_id, revision=revision or None, cache_dir=cache_dir)
    try:
        file = get(cfg.hf_hub_filename or 'model.safetensors')
    except MissingFileError as error:
        if cfg.hf_hub_filename:
            raise
        try:
            file = get('pytorch_model.bin')
        except MissingFileError:
            raise error from None
    _logger.info('%s: weights from %s on the Hub (%s)', variant, cfg.hf_hub_id, file)
    if file.suffix == '.safetensors':
        return _completed(variant, replace(cfg, file=str(file), source=None), file, cache_dir)
    try:
        return replace(cfg, state_dict=weights_in(read_released(file), variant), source=None)
    except ValueError as error:
        raise WeightsError(f'{variant}: {repo_id} on the Hub has no safetensors, only a pickle: {error}') from None


def _completed(variant: str, cfg: PretrainedCfg, file: Path, cache_dir: Optional[str]) -> PretrainedCfg:
    """The cfg as it is, or with all weights where the file has those of the head alone."""
    weights = whole_weights(variant, file, cache_dir)
    return cfg if weights is None else replace(cfg, state_dict=weights, source=None)
