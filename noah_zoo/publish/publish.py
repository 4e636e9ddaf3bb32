"""Publishing on the Hugging Face Hub: a revision is tagged once it came back as it was sent."""
import filecmp
import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..catalog import CATALOG, NAMESPACE, PUBLISHED, RECORD, TAG, Published
from ..files import disk_errors, write
from ..models.builder import WeightsError
from ..models.saving import saved_config
from ..text import one_line
from ..weights.drive import fetch_released
from ..weights.find import place_on_hub
from ..weights.head_only import write_head
from ..weights.hub import damage, fetch, sha256_of
from ..weights.released import convert_file, released_model, write_folder
from .cards import model_card
from .run_card import run_card, start_of

_logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, CARD, REFERENCE = 'model.safetensors', 'config.json', 'README.md', 'test/reference.safetensors'
RELEASED_SUFFIXES = ('.pth.tar', '.pth', '.pt', '.tar', '.bin')


def publish_model(
        name: str,
        source: Union[str, Path],
        namespace: str = NAMESPACE,
        private: bool = False,
        dry_run: bool = False,
) -> Optional[Published]:
    """Publish the authors' weights of one model as NAMESPACE/NAME.osvai_in1k, and record its revision and sha256.

    A model that is recorded, and whose repository has not changed since, is left as it is.

    Args:
        name: The timm name of a NOAH model or of its vanilla twin.
        source: 'official' for the authors' file on Google Drive; or a folder with NAME/model.safetensors as written
            by `convert_file`, or with the released file NAME.pth.tar (.pth, .pt, .tar, .bin).
        namespace: User or organisation on the Hub.
        private: Make the repository private.
        dry_run: Do all but ask or change the Hub.

    Returns:
        What is recorded; None after a dry run.

    Raises:
        OSError: If a file is missing or cannot be written.
        ValueError: If the name is unknown, or the weights are not this model's.
        WeightsError: If the Hub cannot be reached, refuses, or gives back something else than was sent.
    """
    released_model(name)
    repo_id = f'{namespace}/{name}.{TAG}'
    if not dry_run:
        if not os.access(RECORD, os.W_OK):
            raise PermissionError(f'{RECORD} records what is published and cannot be written; publish from a clone')
        if repo_id in PUBLISHED and _head(repo_id) == PUBLISHED[repo_id].revision:
            _logger.info('%s: published already, at %s', repo_id, PUBLISHED[repo_id].revision)
            return PUBLISHED[repo_id]
        _check_login(repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _find_folder(name, source, Path(scratch) / 'converted')
        _check_parameters(name, folder)
        card = model_card(name, repo_id, sha256_of(folder / WEIGHTS))
        published = publish_folder(folder, repo_id, card, private, dry_run)
    if published:
        record = json.loads(RECORD.read_text(encoding='utf-8'))
        record[repo_id] = asdict(published)
        write(RECORD, json.dumps(record, indent=2, sort_keys=True) + '\n')
        PUBLISHED[repo_id] = published
    return published


def publish_run(
        run_dir: Union[str, Path],
        repo_id: str,
        private: bool = False,
        dry_run: bool = False,
        head_only: bool = False,
) -> Optional[Published]:
    """Publish the best weights of a training run, for `timm.create_model('hf-hub:REPO_ID', pretrained=True)`.

    Args:
        run_dir: The folder of a finished run of `noah_zoo.training.train`.
        repo_id: USER/MODEL on the Hub.
        private: Make the repository private.
        dry_run: Do all but ask or change the Hub; for the head alone, the backbone is fetched all the same.
        head_only: Send the head alone. It was trained on a frozen backbone, which is on the Hub already.

    Returns:
        The revision and the weights' sha256; None after a dry run.

    Raises:
        OSError, ValueError, WeightsError: As `publish_model`.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
        raise ValueError(f'--repo-id {repo_id!r} is not of the form USER/MODEL')
    run_dir = Path(run_dir)
    for filename in ('summary.json', f'best/{WEIGHTS}', f'best/{CONFIG}'):
        if not (run_dir / filename).is_file():
            raise FileNotFoundError(f'{run_dir} has no {filename}: not the folder of a finished run')
    card = run_card(run_dir, repo_id)
    place = _backbone_place(run_dir) if head_only else None
    if not dry_run:
        _check_login(repo_id)
    best = run_dir / 'best'
    if place is None:
        return publish_folder(best, repo_id, card, private, dry_run)
    with tempfile.TemporaryDirectory() as scratch:
        head = Path(scratch) / 'head'
        backbone = write_head(best, head, *place)
        card = run_card(run_dir, repo_id, backbone, (head / WEIGHTS).stat().st_size)
        return publish_folder(head, repo_id, card, private, dry_run, whole=best / WEIGHTS)


def _backbone_place(run_dir: Path) -> Tuple[str, str, Optional[str]]:
    """Repository, file and revision of the backbone that a run trained a head on.

    Raises:
        ValueError: If the run trained something else, or the backbone is not on the Hub.
    """
    architecture = json.loads((run_dir / 'best' / CONFIG).read_text(encoding='utf-8'))['architecture']
    settings = json.loads((run_dir / 'summary.json').read_text(encoding='utf-8'))['config']
    source = start_of(settings)
    place = source and place_on_hub(source)
    reason = None
    if architecture not in (*CATALOG, 'noah'):
        reason = f'{architecture} is not a NOAH model'
    elif not settings.get('freeze'):
        reason = 'it trained the backbone, too'
    elif not source:
        reason = 'it was trained from scratch'
    elif not place or not place[1].endswith('.safetensors'):
        reason = f'it started from {source}, which is not a safetensors file in a repository on the Hub'
    if reason:
        raise ValueError(
            f'{run_dir}: no head alone can be published: {reason}. Accepted is a run with --freeze or --cache-features '
            f'of a NOAH model (or --model noah with pretrained_backbone=) that started from weights on the Hub; any '
            f'run can be published whole')
    return place


def publish_folder(
        folder: Path, repo_id: str, card: ModelCard, private: bool = False, dry_run: bool = False,
        whole: Optional[Path] = None,
) -> Optional[Published]:
    """Publish a folder with `model.safetensors` and timm's `config.json`.

    The model is loaded strictly and run on a reference input, which goes along with its features, pre-logits and
    logits (`test/reference.safetensors`). One commit has everything. It is downloaded into an empty cache, compared
    byte by byte and run again; then the commit is tagged v1, v2, ... Whatever is there already is not sent again, so
    an interrupted call is simply repeated.

    Args:
        folder: The folder.
        repo_id: USER/MODEL on the Hub.
        card: The model card.
        private: Make the repository private.
        dry_run: Do all but ask or change the Hub.
        whole: All weights of the model, if the folder's are a head alone.

    Returns:
        The revision and the weights' sha256; None after a dry run.

    Raises:
        OSError, WeightsError: As `publish_model`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        staging, cache = Path(scratch) / 'staging', Path(scratch) / 'cache'
        (staging / REFERENCE).parent.mkdir(parents=True)
        shutil.copyfile(folder / WEIGHTS, staging / WEIGHTS)
        write(staging / CONFIG, saved_config(folder / CONFIG))
        card.save(staging / CARD)
        outputs = reference(_load(staging, whole))
        with disk_errors(staging):
            save_file(outputs, staging / REFERENCE)
        published = Published('', sha256_of(staging / WEIGHTS))
        if dry_run:
            size = sum(path.stat().st_size for path in staging.rglob('*') if path.is_file())
            _logger.info('%s: ready to be sent: %.1f MB, sha256 %s', repo_id, size / 1e6, published.sha256)
            return None
        try:
            revision = _upload(staging, repo_id, private, outputs)
            for filename in (WEIGHTS, CONFIG, CARD, REFERENCE):
                back = fetch(repo_id, repo_id, filename, revision, cache_dir=cache)
                if not filecmp.cmp(back, staging / filename, shallow=False):
                    raise WeightsError(f'{repo_id}: {filename} came back other than it was sent; nothing was tagged')
            model = timm.create_model(f'hf-hub:{repo_id}@{revision}', pretrained=True, cache_dir=cache)
            if not _close(reference(model), load_file(staging / REFERENCE)):
                raise WeightsError(f'{repo_id}: the model that came back gives other logits; nothing was tagged')
            tag = _tag(repo_id, revision)
        except (WeightsError, AssertionError):
            raise
        except Exception as error:  # the client's come from httpx, requests, OSError and its own families
            raise WeightsError(f'{repo_id}: {_explain(error)}') from error
    _logger.info('%s: published as %s, revision %s', repo_id, tag, revision)
    return Published(revision, published.sha256)


@torch.inference_mode()
def reference(model: nn.Module) -> Dict[str, Tensor]:
    """What a model makes of a fixed input.

    Returns:
        'input' (1, C, H, W) at the model's own size, and of `forward_features` and `forward_head` the 'features',
        'pre_logits' and 'logits'.
    """
    model.eval()
    shape = (1, *model.pretrained_cfg['input_size'])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    features = model.forward_features(x)
    outputs = {
        'input': x, 'features': features, 'pre_logits': model.forward_head(features, pre_logits=True),
        'logits': model.forward_head(features)}
    # pooled features may be a view: a class token is one of the features
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in outputs.items()}


def _close(ours: Dict[str, Tensor], theirs: Dict[str, Tensor]) -> bool:
    """Equal up to the rounding of another machine: 1e-4 of the largest magnitude."""
    return ours.keys() == theirs.keys() and all(
        ours[key].shape == theirs[key].shape and (ours[key] - theirs[key]).abs().max() <= 1e-4 * theirs[key].abs().max()
        for key in ours)


def _find_folder(name: str, source: Union[str, Path], converted: Path) -> Path:
    """A folder with the model in timm's format, converted if need be."""
    if source == 'official':
        return write_folder(load_file(fetch_released(name)), name, converted)
    if not Path(source).is_dir():
        raise FileNotFoundError(f"{source}: no such folder; --from takes a folder or 'official'")
    folder = Path(source) / name
    if (folder / WEIGHTS).is_file():
        architecture = json.loads((folder / CONFIG).read_text(encoding='utf-8'))['architecture']
        if architecture != name:
            raise ValueError(f'{folder} has the weights of {architecture}, not of {name}')
        return folder
    for suffix in RELEASED_SUFFIXES:
        if (Path(source) / f'{name}{suffix}').is_file():
            return convert_file(Path(source) / f'{name}{suffix}', name, converted)
    raise FileNotFoundError(
        f'{source} has neither {name}/{WEIGHTS} nor the released file {name}{" (".join(RELEASED_SUFFIXES[:1])}')


def _check_parameters(name: str, folder: Path) -> None:
    """Compare with the catalog, or for a thin DeiT without `pre_logits` with what the paper prints."""
    row, model = released_model(name), _load(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    params, paper = (row.params, row.paper) if name == row.name else (row.vanilla_params, row.vanilla_paper)
    thin = 'representation.fc.weight' not in model.state_dict() and hasattr(model, 'representation')
    if round(count / 1e6, 2) != paper.params_m if thin else count != params:
        expected = f'{paper.params_m}M' if thin else f'{params:,}'
        raise ValueError(f'{name}: {folder} has {count:,} parameters, expected {expected}')


def _load(folder: Path, whole: Optional[Path] = None) -> nn.Module:
    """The model of a folder, its parameters exactly those of the file, or of the one with all weights."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    weights, loaded = load_file(whole or folder / WEIGHTS), model.state_dict()
    if weights.keys() != loaded.keys() or not all(torch.equal(weights[key], loaded[key]) for key in weights):
        raise WeightsError(f'{folder}: the model does not hold the weights of the file as they are')
    return model


def _head(repo_id: str) -> Optional[str]:
    """The newest commit of a repository; None if it cannot be told."""
    try:
        return HfApi().model_info(repo_id).sha
    except Exception:
        return None


def _check_login(repo_id: str) -> None:
    """Say that there is no valid token before the work, not after it."""
    try:
        HfApi().whoami()
    except Exception as error:
        raise WeightsError(f'{repo_id}: {_explain(error)}') from error


def _upload(staging: Path, repo_id: str, private: bool, outputs: Dict[str, Tensor]) -> str:
    """Send what is not there yet, in one commit; gives the commit that has everything."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    info = api.model_info(repo_id, files_metadata=True)
    if private and not info.private:
        raise WeightsError(f'{repo_id} exists and is public; nothing was sent')
    theirs = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings}

    def there(filename: str) -> bool:
        return filename in theirs and damage(staging / filename, theirs[filename]) is None

    if there(WEIGHTS) and there(CONFIG) and REFERENCE in theirs:
        # Another machine rounds otherwise: a reference that holds is not replaced.
        old = fetch(repo_id, repo_id, REFERENCE, info.sha, cache_dir=staging.parent / 'old')
        if _close(outputs, load_file(old)):
            shutil.copyfile(old, staging / REFERENCE)
    if all(there(filename) for filename in (WEIGHTS, CONFIG, CARD, REFERENCE)):
        return info.sha
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=staging, commit_message='Weights, config, card and reference outputs',
        parent_commit=info.sha)
    return commit.oid


def _tag(repo_id: str, revision: str) -> str:
    api = HfApi()
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
    for tag, commit in tags.items():
        if commit == revision:
            return tag
    numbers: List[int] = [int(tag[1:]) for tag in tags if re.fullmatch(r'v\d+', tag)]
    tag = f'v{max(numbers, default=0) + 1}'
    api.create_tag(repo_id, tag=tag, revision=revision)
    return tag


def _explain(error: Exception) -> str:
    """What happened, and what to type next."""
    reason = one_line(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return 'not logged in, or with a token that is not valid. Run `hf auth login` or set HF_TOKEN'
    if status == 403:
        return f'this token may not write there ({reason}). Choose another --namespace or --repo-id, or another token'
    if status in (409, 412):
        return 'the repository changed in the meantime. Run the same command again'
    return f'{reason}. Nothing was tagged; run the same command again, it goes on where it was'
