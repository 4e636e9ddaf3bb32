"""A file from the Hugging Face Hub that is what it should be, or an error that says what to do."""
import errno
import hashlib
import logging
import os
import re
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from ..models.builder import WeightsError
from ..text import one_line

_logger = logging.getLogger(__name__)

BUSY = (408, 429, 500, 502, 503, 504)
WAITS = (1., 2., 4.)  # seconds before each new try
LONGEST_WAIT = 60.  # seconds, if the Hub asks for another wait
CONNECTION_ERRNOS = (None, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.ETIMEDOUT)


class MissingFileError(WeightsError):
    """The repository is there, the file is not."""


def fetch(
        name: str,
        repo_id: str,
        filename: str = 'model.safetensors',
        revision: Optional[str] = None,
        sha256: Optional[str] = None,
        cache_dir: Union[str, Path, None] = None,
) -> Path:
    """A file of a repository, from the Hub's cache or downloaded into it, its content checked at every call.

    The content is checked against `sha256`, else against the hash that the Hub states, which is also the blob's name
    in the cache. A damaged file is fetched again. A file at a commit that is in the cache needs no network; at a
    branch or tag the Hub is asked, and the cached file is taken, with a warning, if it does not answer.

    Args:
        name: The model's name, for messages.
        repo_id: Namespace and name of the repository.
        filename: The file in it.
        revision: A commit, tag or branch; 'main' if not given.
        sha256: What the file must have.
        cache_dir: The Hub's cache, if not the usual one.

    Returns:
        The path of the file in the cache.

    Raises:
        MissingFileError: If the repository does not have the file.
        WeightsError: If the file cannot be had, or is not what it should be. Nothing damaged that was downloaded is
            left in the cache.
    """
    try:
        return _fetch(name, repo_id, filename, revision, sha256, cache_dir)
    except WeightsError:
        raise
    except Exception as error:  # the client's come from httpx, requests, OSError and its own families
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        kind = MissingFileError if missing else WeightsError
        reason = f'it has no {filename}' if missing else _explain(error, repo_id, filename, revision, cache_dir)
        raise kind(f'{name}: no weights from {repo_id} on the Hub: {reason}') from error


def damage(path: Path, expected: Optional[str] = None) -> Optional[str]:
    """What is wrong with a file, or None.

    Args:
        path: The file.
        expected: The sha256 of its content, or git's hash of it; by default the name of the blob that it links to.
    """
    if expected is None and path.is_symlink():
        expected = Path(os.readlink(path)).name
    if re.fullmatch('[0-9a-f]{64}', expected or ''):
        found = sha256_of(path)
    elif re.fullmatch('[0-9a-f]{40}', expected or ''):
        found = _digest(path, hashlib.sha1(b'blob %d\0' % path.stat().st_size))
    else:  # nothing to compare with
        return None
    return None if found == expected else f'its hash is {found}, expected {expected}'


def sha256_of(path: Path, title: Optional[str] = None) -> str:
    """The sha256 of a file's content, in hexadecimal digits; with a title, that of a progress bar from 1 GB on."""
    return _digest(path, hashlib.sha256(), title)


def patience() -> float:
    """Seconds to wait for a first answer: HF_HUB_ETAG_TIMEOUT if that is set, else few, to tell soon of no network."""
    return float(constants.HF_HUB_ETAG_TIMEOUT) if 'HF_HUB_ETAG_TIMEOUT' in os.environ else 2.5


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns or raises, waiting for it no longer than that: looking a name up has no time limit.

    Raises:
        TimeoutError: If it takes longer.
    """
    outcome = []

    def call() -> None:
        try:
            outcome.append((function(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f'no answer in {seconds:g} s')
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def disk_trouble(error: BaseException, folder: Union[str, Path]) -> Optional[str]:
    """What the disk refused and what to do then, or None if it was not the disk."""
    number = getattr(error, 'errno', None)
    elsewhere = 'pass cache_dir=FOLDER or set HF_HOME'
    if number in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(error):
        return f'the disk of {folder} is full. Free some space, or {elsewhere}'
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f'{folder} cannot be written ({one_line(error)}). To use another folder, {elsewhere}'
    return None


def _fetch(
        name: str, repo_id: str, filename: str, revision: Optional[str], sha256: Optional[str],
        cache_dir: Union[str, Path, None]) -> Path:
    """`fetch`, with the errors of the client."""
    path = _cached(repo_id, filename, revision, cache_dir)
    pinned = re.fullmatch('[0-9a-f]{40}', revision or '')
    if path and pinned and not _damaged(name, path, sha256):
        return path
    ask = partial(get_hf_file_metadata, hf_hub_url(repo_id, filename, revision=revision), timeout=patience())
    try:
        remote = _retried(name, partial(within, patience(), ask), _busy, () if path and not pinned else WAITS)
    except Exception as error:
        unanswered = _busy(error) or _broken(error)
        if path is None or pinned or not unanswered or _damaged(name, path, sha256):
            raise
        level = logging.INFO if constants.HF_HUB_OFFLINE else logging.WARNING
        _logger.log(level, '%s: %s does not answer (%s); taking %s', name, constants.ENDPOINT, one_line(error), path)
        return path
    if sha256 and re.fullmatch('[0-9a-f]{64}', remote.etag or '') and remote.etag != sha256:
        raise WeightsError(
            f'{name}: {repo_id} on the Hub has another {filename} than the recorded one: its sha256 is '
            f'{remote.etag}, expected {sha256}; nothing was downloaded. Update noah_zoo, or tell who recorded it')
    download = partial(hf_hub_download, repo_id, filename, revision=revision, cache_dir=cache_dir)
    problem = None
    try:
        for _ in range(3):  # the first may give a cached file
            path = Path(_retried(
                name, partial(download, force_download=problem is not None), lambda e: _busy(e) or _broken(e), WAITS))
            problem = _damaged(name, path, sha256 or remote.etag)
            if problem is None:
                return path
    finally:
        if problem is not None:
            _discard(path)
    raise WeightsError(
        f'{name}: {filename} of {repo_id} arrives damaged: {problem}; it was not kept. Try again later or from '
        f'another network, without a proxy or mirror (HF_ENDPOINT is {constants.ENDPOINT})')


def _cached(
        repo_id: str, filename: str, revision: Optional[str], cache_dir: Union[str, Path, None]) -> Optional[Path]:
    path = try_to_load_from_cache(repo_id, filename, cache_dir, revision)
    return Path(path) if isinstance(path, str) else None


def _damaged(name: str, path: Path, expected: Optional[str]) -> Optional[str]:
    """`damage`, which the log tells too."""
    problem = damage(path, expected)
    if problem is not None:
        _logger.warning('%s: %s is damaged: %s', name, path, problem)
    return problem


def _digest(path: Path, digest: Any, title: Optional[str] = None) -> str:
    size = path.stat().st_size
    silent = title is None or size < 1e9
    with path.open('rb') as file, tqdm(
            total=size, desc=title, unit='B', unit_scale=True, leave=False, disable=silent) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _discard(path: Path) -> None:
    for file in {path.resolve(), path}:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            _logger.warning('%s is damaged and cannot be removed: %s', file, error)


def _retried(name: str, function: Callable[[], Any], again: Callable[[Exception], bool], waits: tuple) -> Any:
    """What a function returns, called again, after a wait each, for errors that may pass."""
    for wait in (*waits, None):
        try:
            return function()
        except Exception as error:
            asked = getattr(getattr(error, 'response', None), 'headers', {}).get('Retry-After', '')
            if wait is not None and asked.isdigit():
                wait = float(asked)
            if wait is None or wait > LONGEST_WAIT or not again(error):
                raise
            _logger.warning('%s: %s; trying again in %g s', name, one_line(error), wait)
            time.sleep(wait)


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> Optional[int]:
    """The HTTP status that an error, or its cause, is about."""
    responses = (link.response for link in _chain(error) if isinstance(link, HfHubHTTPError))
    return next((response.status_code for response in responses if response is not None), None)


def _busy(error: BaseException) -> bool:
    return _status(error) in BUSY


def _broken(error: BaseException) -> bool:
    """Whether there was no answer, or one that broke off."""
    return (
        _status(error) is None and getattr(error, 'errno', None) in CONNECTION_ERRNOS
        and not isinstance(error, (HFValidationError, LocalEntryNotFoundError)) and not disk_trouble(error, ''))


def _explain(
        error: BaseException, repo_id: str, filename: str, revision: Optional[str],
        cache_dir: Union[str, Path, None]) -> str:
    """What happened, and what to type next."""
    folder = cache_dir or constants.HF_HUB_CACHE
    trouble = disk_trouble(error, folder)
    if trouble or isinstance(error, HFValidationError):
        return trouble or one_line(error)
    for link in _chain(error):
        if isinstance(link, GatedRepoError):
            return (
                f'it is gated. Accept its terms at {constants.ENDPOINT}/{repo_id}, then log in with `hf auth login` or '
                f'set HF_TOKEN')
        if isinstance(link, RepositoryNotFoundError):
            return (
                'no such repository, or a private one. Check the name (NOAH_ZOO_NAMESPACE, if it is set); if it is '
                'private, log in with `hf auth login` or set HF_TOKEN')
        if isinstance(link, RevisionNotFoundError):
            return f'it has no such revision; {constants.ENDPOINT}/{repo_id} lists branches, tags and commits'
    path = _cached(repo_id, filename, revision, cache_dir)
    state = f'the cached {path} is damaged' if path else f'{filename} is not in {folder}'
    if constants.HF_HUB_OFFLINE:
        return (
            f'HF_HUB_OFFLINE is set, and {state}. Unset it once to download, or run `hf download {repo_id}` where '
            f'there is a network and copy the cache')
    if _status(error) in (401, 403):
        return f'access refused ({one_line(error)}). Log in again with `hf auth login` or renew HF_TOKEN'
    if _busy(error):
        return f'{constants.ENDPOINT} is busy (HTTP status {_status(error)}), and {state}. Try again later'
    return (
        f'{constants.ENDPOINT} cannot be reached ({one_line(error)}), and {state}. Check the network and the proxy '
        f'(HTTPS_PROXY), or wait longer for an answer with HF_HUB_ETAG_TIMEOUT=30. Without a network: '
        f'`hf download {repo_id}` elsewhere and copy the cache, or load a folder with '
        f"timm.create_model('local-dir:FOLDER', pretrained=True)")
