"""Files of the Hugging Face hub, through its client, with verified checksums.

The client checks sizes, never content, trusts its cache for ever, and can wait for minutes. Here content is compared
with the hash that the table or else the hub states, a damaged copy is fetched again, and waits are bounded.
"""

import contextlib
import errno
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, httpx

from beitzoo.weights import checksums
from beitzoo.weights.checksums import AbsentError, DamagedError, DownloadError, first_line
from beitzoo.zoo.checkpoints import HubFile

_logger = logging.getLogger(__name__)

_TRIES = 3
# Seconds after which nothing is tried again. One call of the client may outlast it: it obeys a hub's Retry-After.
_LONGEST = 60
_NOT_FETCHED = (httpx.HTTPError, OSError, HFValidationError, json.JSONDecodeError)
# What may name a file in the cache. Hubs give the content's hash; a proxy may give a name of its own making.
_FILE_NAME = re.compile(r"\w[\w.-]*")
_ELSE = "or give checkpoint_path= a file that you have."


def fetch(source: HubFile, cache_dir: Path | None = None) -> Path:
    """Return a file as it is on the hub now, or the cached one if its commit is fixed or the hub cannot be asked.

    Raises:
        AbsentError: The hub says that there is no such file.
        DownloadError: It cannot be had; says what was wanted, from where, why it failed and what to do.
    """
    failed: Exception | None = None
    deadline = time.monotonic() + _LONGEST
    for attempt in range(0 if constants.is_offline_mode() else _TRIES):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            return _fetch_online(source, cache_dir)
        except _NOT_FETCHED as error:
            failed = error
            heals = isinstance(error, DamagedError) or not (_is_final(error) or find_local(source, cache_dir))
            if not heals or time.monotonic() > deadline:
                break
    answer = None if failed is None else _answer(failed)
    if failed is None or not isinstance(answer, RemoteEntryNotFoundError | RevisionNotFoundError | DamagedError):
        return _from_cache(source, cache_dir, failed)
    kind = AbsentError if isinstance(answer, RemoteEntryNotFoundError) else DownloadError
    raise kind(f"Could not get {_name(source)} from {constants.ENDPOINT}: {_explain(failed, source)}") from failed


def find_local(source: HubFile, cache_dir: Path | None = None) -> Path | None:
    """Return the cached file, if there is one; asks nobody and verifies nothing."""
    try:
        found = try_to_load_from_cache(source.repo_id, source.filename, cache_dir, source.revision)
    except HFValidationError:
        return None  # what has no valid name is not in the cache; asking for it says what is wrong
    return Path(found) if isinstance(found, str) else None


def commit_of(path: Path) -> str | None:
    """Return the commit of a file in the hub's cache, by which to ask for further files of the same model."""
    commit = path.parent.name
    return commit if _is_commit(commit) else None


def filed_hash(path: Path) -> str | None:
    """Return the hash under which the hub filed the content of a cached file: its cache names blobs by it.

    One step of the link only: behind it may be a shared store with names of another kind. None where the cache has
    no links.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    try:
        name = Path(os.readlink(path)).name
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None  # a file, not a link
    return name if checksums.is_hash(name) else None


def _fetch_online(source: HubFile, cache_dir: Path | None) -> Path:
    cached, etag, commit = find_local(source, cache_dir), None, source.revision
    if cached is None or not _is_commit(commit):
        etag, commit = _look(source)
    if cached is None or commit_of(cached) != commit:
        with _locked(source, cache_dir):
            cached = find_local(source, cache_dir)  # another process may have been quicker
            if cached is None or commit_of(cached) != commit:
                cached = _download(source, cache_dir)
    try:
        _verify(source, cached, cache_dir, etag)
    except DamagedError as error:
        _logger.warning("%s It is fetched again.", error)
        with _locked(source, cache_dir):
            return _heal(source, cache_dir)
    return cached


@contextmanager
def _locked(source: HubFile, cache_dir: Path | None) -> Iterator[None]:
    """Keep other processes from changing a file of the cache meanwhile; the client takes links away to renew them."""
    locks = checksums.own_folder(cache_dir) / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _logger.info("Cannot make %s (%s); going on without a lock against other processes.", locks, error)
        yield
        return
    name = f"{source.repo_id}--{source.filename}.lock".replace("/", "--")
    with WeakFileLock(locks / name):
        yield


def _look(source: HubFile) -> tuple[str | None, str | None]:
    """Return the hash and the commit that the hub gives for a file now; None and None if it has no such file.

    The client would wait for minutes on a silent hub, and takes whatever the hub calls the content as the name of a
    file on this disk; both are found out here, before it is called.
    """
    try:
        url = hf_hub_url(source.repo_id, source.filename, revision=source.revision)
        stated = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RemoteEntryNotFoundError:
        return None, None  # the client will ask again, and note in its cache that there is none
    etag, commit = stated.etag or "", stated.commit_hash
    if not _FILE_NAME.fullmatch(etag) or not _is_commit(commit):
        raise OSError(f"this is no answer of a hub: it gives {commit!r} as commit and {etag!r} as hash")
    if source.sha256 not in (None, etag) and len(etag) == 64:
        raise DownloadError(
            f"its hash there is {etag}, not {source.sha256}, so it was replaced. Update beitzoo, {_ELSE}"
        )
    return etag, commit


def _download(source: HubFile, cache_dir: Path | None, force: bool = False) -> Path:
    try:
        path = hf_hub_download(
            source.repo_id, source.filename, revision=source.revision, cache_dir=cache_dir, force_download=force
        )
    except RuntimeError as error:  # of the Xet transfer
        raise OSError(f"{first_line(error)} HF_HUB_DISABLE_XET=1 downloads it by plain HTTP.") from error
    return Path(path)


def _heal(source: HubFile, cache_dir: Path | None) -> Path:
    """Fetch a damaged file again, unless another process has done so meanwhile."""
    damaged = find_local(source, cache_dir)
    etag, _ = _look(source)
    if damaged is not None:
        with contextlib.suppress(DamagedError):
            _verify(source, damaged, cache_dir, etag)
            return damaged
        damaged.unlink()  # the client replaces content, but leaves a link to content of another name as it is
    path = _download(source, cache_dir, force=True)
    try:
        _verify(source, path, cache_dir, etag)
    except DamagedError:
        _drop(path)
        raise
    return path


def _drop(damaged: Path) -> None:
    """Take a file out of the cache that came damaged again and again, so that no other library loads it either."""
    if damaged.is_symlink():
        (damaged.parent / os.readlink(damaged)).unlink(missing_ok=True)
    damaged.unlink(missing_ok=True)


def _verify(source: HubFile, path: Path, cache_dir: Path | None, etag: str | None = None) -> None:
    """Compare a file with the hash in the table, or else with what the hub says now or said when the file came."""
    said = etag if etag and checksums.is_hash(etag) else None
    expected = (
        source.sha256 or filed_hash(path) or said or checksums.recorded_checksum(path, checksums.records_of(cache_dir))
    )
    if expected is None:
        _logger.warning("%s is unverified: nobody states its hash.", path)
    else:
        checksums.verify_checksum(path, expected, checksums.records_of(cache_dir))


def _from_cache(source: HubFile, cache_dir: Path | None, failed: Exception | None) -> Path:
    """Return the verified cached file although the hub could not be asked, or say why there is none."""
    cache = cache_dir or constants.HF_HUB_CACHE
    why = "the hub client is offline (HF_HUB_OFFLINE)" if failed is None else _explain(failed, source)
    cached = find_local(source, cache_dir)
    if cached is not None:
        try:
            _verify(source, cached, cache_dir)
        except OSError as error:
            raise DownloadError(f"{error} It could not be fetched again: {why}") from failed
        if failed is not None:
            _logger.warning("Used the cached copy of %s. From %s: %s", _name(source), constants.ENDPOINT, why)
        return cached
    if failed is not None:
        raise DownloadError(f"Could not get {_name(source)} from {constants.ENDPOINT}: {why}") from failed
    if try_to_load_from_cache(source.repo_id, source.filename, cache_dir, source.revision) is not None:
        raise AbsentError(f"There is no {_name(source)}; the hub said so when it was last asked.")
    raise DownloadError(
        f"{_name(source)} is not in the cache {cache}, and {why}. Get it where there is a connection "
        f"('beitzoo download NAME'), {_ELSE}"
    )


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and checksums.is_hash(revision)


def _name(source: HubFile) -> str:
    return f"{source.repo_id}/{source.filename} at revision {source.revision or 'main'}"


def _answer(error: BaseException) -> BaseException:
    """Return the hub's answer, which the client may hide behind 'check your connection'."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_final(error: Exception) -> bool:
    """Tell whether asking again would give the same answer."""
    answer = _answer(error)
    if isinstance(answer, HfHubHTTPError) and not isinstance(answer, RepositoryNotFoundError):
        # A bare 403 may be a link to the content that has expired; the next try gets a fresh one.
        return answer.response.status_code < 500 and answer.response.status_code not in (403, 408, 429)
    return isinstance(answer, HFValidationError | RepositoryNotFoundError | DownloadError)


def _explain(error: Exception, source: HubFile) -> str:
    """Say why the hub did not give a file, and what to do about it."""
    answer = _answer(error)
    login = "log in with 'hf auth login' or set HF_TOKEN."
    page = f"{constants.ENDPOINT}/{source.repo_id}"
    reasons: dict[type[BaseException], str] = {
        GatedRepoError: f"its owners give access on request. Ask at {page}, then {login}",
        RepositoryNotFoundError: f"there is no such repository, or it is private. Check the name; if private, {login}",
        RevisionNotFoundError: f"there is no such revision. See {page}/tree/main for its branches and tags.",
        RemoteEntryNotFoundError: f"there is no such file. See {page}/tree/main for what there is.",
        HFValidationError: f"that is no name of a repository. Names are 'owner/name': {first_line(answer)}",
        DamagedError: f"{answer} It came so again and again; its host, or the way to it, is at fault.",
    }
    for kind, reason in reasons.items():
        if isinstance(answer, kind):
            return reason
    if isinstance(answer, HfHubHTTPError) and answer.response.status_code in (401, 403):
        return f"access is refused ({answer.response.status_code}). Check your token with 'hf auth whoami'."
    if isinstance(answer, DownloadError):
        return str(answer)
    if isinstance(answer, PermissionError) or getattr(answer, "errno", None) in (errno.ENOSPC, errno.EROFS):
        return f"{first_line(answer)} Make room in the cache, or choose another with cache_dir= or HF_HOME."
    return f"{first_line(answer)} Check the connection and HF_ENDPOINT, {_ELSE}"
