"""The authors' own files, from Google Drive, converted once and kept beside the Hub's cache."""
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Optional, Union

import torch
from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path, constants
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import save

from ..catalog import TAG, drive_id, drive_page
from ..models.builder import WeightsError
from .hub import damage, disk_trouble, patience, sha256_of, within
from .released import convert_released, read_released

_logger = logging.getLogger(__name__)


def fetch_released(name: str, cache_dir: Union[str, Path, None] = None) -> Path:
    """The authors' weights of a model as safetensors: from the cache, or downloaded and converted into it.

    The cached file is named after its sha256, which is checked at every call. Of several processes that start
    together one downloads, the others wait for it. A connection that breaks is taken up where it was; what an
    interrupted call leaves behind is removed by the next one.

    Args:
        name: The timm name of a NOAH model or of its vanilla twin.
        cache_dir: The Hub's cache, if not the usual one.

    Raises:
        WeightsError: If the file cannot be had, or is not what it should be.
    """
    assets = Path(cache_dir) / 'assets' if cache_dir else None
    try:
        folder = cached_assets_path('noah_zoo', TAG, name, assets_dir=assets)
        path = _cached(name, folder)
        if path is None:
            with _lock(name, folder):
                path = _cached(name, folder) or _make(name, folder)
        return path
    except (OSError, ValueError) as error:  # of the disk and its folders: those of the network do not come here
        where = assets or constants.HF_ASSETS_CACHE
        raise WeightsError(f'{name}.{TAG}: {disk_trouble(error, where) or error}') from error


def _cached(name: str, folder: Path) -> Optional[Path]:
    for path in folder.glob('*.safetensors'):
        problem = damage(path, path.stem)
        if problem is None:
            return path
        _logger.warning('%s: the cached %s is damaged: %s', name, path, problem)
    return None


def _lock(name: str, folder: Path) -> Any:
    lock = FileLock(folder / 'lock')
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        _logger.warning('%s: another process is downloading the weights; waiting for it', name)
        return lock.acquire()


def _make(name: str, folder: Path) -> Path:
    """Download and convert, under the lock, in a folder of its own that does not stay."""
    work = folder / 'work'
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        released, converted = work / 'released', work / 'converted'
        _download(name, released)
        try:
            checkpoint = read_released(released)
            if zipfile.is_zipfile(released):
                with zipfile.ZipFile(released) as archive:
                    spoilt = archive.testzip()
                if spoilt is not None:
                    raise ValueError(f'{released}: damaged on the way: the checksum of {spoilt} is wrong')
            weights = {
                key: value.clone(memory_format=torch.contiguous_format)
                for key, value in convert_released(checkpoint, name).items()}
        except ValueError as error:
            raise _refused(name, error) from error
        converted.write_bytes(save(weights, metadata={'format': 'pt'}))
        path = folder / f'{sha256_of(converted)}.safetensors'
        for old in folder.glob('*.safetensors'):  # all damaged
            old.unlink()
        os.replace(converted, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _logger.info("%s: downloaded the authors' file and converted it to %s", name, path)
    return path


def _download(name: str, released: Path) -> None:
    import gdown
    import requests

    if constants.HF_HUB_OFFLINE:
        raise _refused(name, 'HF_HUB_OFFLINE is set, and the converted file is not in the cache')
    try:
        within(patience(), lambda: requests.head('https://drive.google.com', timeout=patience()))
    except (requests.RequestException, TimeoutError) as error:
        reason = f'drive.google.com cannot be reached ({error}); check the network and the proxy (HTTPS_PROXY)'
        raise _refused(name, reason) from error
    try:
        gdown.download(
            id=drive_id(name), output=str(released), quiet=are_progress_bars_disabled(), use_cookies=False, timeout=30.,
            retries=3, log_messages={'start': f"{name}: the authors' file\n", 'output': ''})
    except requests.RequestException as error:  # an OSError, but not of the disk
        raise _refused(name, error) from error
    except OSError:
        raise
    except Exception as error:
        quota = 'Too many users' in str(error)
        reason = 'its quota is used up: too many have downloaded it; try again in 24 hours' if quota else error
        raise _refused(name, reason) from error


def _refused(name: str, reason: object) -> WeightsError:
    return WeightsError(
        f"{name}.{TAG}: no weights from the authors' file on Google Drive: {' '.join(str(reason).split())}. To get it "
        f'by hand: download {drive_page(name)} with a browser, run `noah-zoo convert FILE --model {name} '
        f"--output DIR`, and load timm.create_model('local-dir:DIR', pretrained=True)")
