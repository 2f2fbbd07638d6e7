"""From a row's source to a proven file on this machine. Bytes only: no tensors, no names of parameters."""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import httpx

from beitzoo.weights.files import write_atomically
from beitzoo.zoo.config import HubFile, LocalFile, PackageFile, ReleaseFile, Source

_logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]

_NOT_FETCHED = (httpx.HTTPError, OSError, ValueError)


class DownloadError(OSError):
    """No source gave the file, or what it gave is not the file."""


def fetch(sources: Sequence[Source], cache_dir: Path | None = None) -> Path:
    """Return the path of a proven copy, from the first source that has one.

    Args:
        sources: Places with the same file, in order of preference.
        cache_dir: Where downloads are kept; None is the hub's own cache.

    Raises:
        DownloadError: Says for each source what was wanted, from where, and why it failed.
    """
    failures = []
    for source in sources:
        try:
            return _fetch(source, cache_dir)
        except DownloadError as error:
            failures.append(str(error))
    raise DownloadError("\n".join(failures) or "This model has no source of weights; create it with pretrained=False.")


def _fetch(source: Source, cache_dir: Path | None) -> Path:
    match source:
        case LocalFile(path):
            if not path.is_file():
                raise DownloadError(f"There is no file {path}; name one that exists, or another model.")
            return path
        case PackageFile(name, sha256):
            path = PACKAGE / name
            _prove(path, sha256, "Reinstall beitzoo.")
            return path
        case HubFile():
            return _download(source, cache_dir)
        case ReleaseFile():
            return _download_release(source, cache_dir)


def _download(source: HubFile, cache_dir: Path | None) -> Path:
    where = f"{source.repo_id}/{source.filename} at revision {source.revision or 'main'}"
    try:
        path = Path(hf_hub_download(source.repo_id, source.filename, revision=source.revision, cache_dir=cache_dir))
    except _NOT_FETCHED as error:
        cause = error.__cause__ or error
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise DownloadError(
            f"Could not get {where} from {constants.ENDPOINT} or from the cache in "
            f"{cache_dir or constants.HF_HUB_CACHE}: {reason} Check the connection, or give checkpoint_path=."
        ) from error
    _prove(
        path,
        source.sha256 or _stated_hash(path),
        "Delete it and try again; if that does not help, its host is damaged.",
    )
    return path


def _download_release(source: ReleaseFile, cache_dir: Path | None) -> Path:
    """Get a release file once; nobody states its hash, so its size is all that can be compared."""
    path = (cache_dir or Path(constants.HF_HOME) / "beitzoo") / source.release / source.filename
    if not path.exists():
        if constants.is_offline_mode():
            raise DownloadError(f"{source.url} is not in {path.parent}, and the hub client is set to be offline.")
        try:
            write_atomically(path, lambda temporary: _stream(source.url, temporary))
        except _NOT_FETCHED as error:
            raise DownloadError(f"Could not get {source.url}: {error}. Check the connection.") from error
    _prove(path, source.sha256, "Delete it and try again.")
    return path


def _stream(url: str, path: Path) -> None:
    with httpx.stream("GET", url, follow_redirects=True, timeout=60) as response, path.open("wb") as file:
        response.raise_for_status()
        for chunk in response.iter_raw():
            file.write(chunk)
        stated = response.headers.get("content-length")
    if stated is not None and path.stat().st_size != int(stated):
        raise OSError(f"{path.stat().st_size} bytes came, {stated} were announced")


def _stated_hash(path: Path) -> str | None:
    """Return the hash under which the hub filed a download; its cache names the link's target by it.

    One step of the link only: behind it may be a shared store with names of another kind.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None


def _prove(path: Path, expected: str | None, remedy: str) -> None:
    """Compare a file with its sha256, or, where the hub keeps the file in git, with its git blob hash."""
    if expected is None:
        _logger.warning("%s is unverified: nobody states its hash.", path)
        return
    try:
        content = path.read_bytes() if len(expected) == 40 else None
        found = _git_hash(content) if content is not None else _sha256(path)
    except OSError as error:
        raise DownloadError(f"Cannot read {path}: {error.strerror}. {remedy}") from error
    if found != expected:
        raise DownloadError(f"{path} is damaged: its hash is {found}, expected {expected}. {remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
