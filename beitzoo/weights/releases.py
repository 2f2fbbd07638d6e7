"""Files of the authors' releases: plain https, one copy, resumed where a connection broke off."""

import logging
import time
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, httpx
from tqdm import tqdm

from beitzoo.weights import proofs
from beitzoo.weights.files import write_atomically
from beitzoo.weights.proofs import AbsentError, DownloadError
from beitzoo.zoo.config import ReleaseFile

_logger = logging.getLogger(__name__)

_TRIES = 3
_NOT_FETCHED = (httpx.HTTPError, OSError)
_ELSE = "or give checkpoint_path= a file that you have."


def path_of(source: ReleaseFile, folder: Path) -> Path:
    """Return where the copy of a release file is kept."""
    return folder / source.release / source.filename


def fetch(source: ReleaseFile, folder: Path) -> Path:
    """Get a release file once; nobody states its hash, so all that can be said later is that it did not change.

    Args:
        source: The file.
        folder: Our own folder of a cache.

    Raises:
        AbsentError: The release has no such file.
        DownloadError: It cannot be had, or the copy changed since it came.
    """
    path, memory = path_of(source, folder), proofs.memory_in(folder)
    try:
        if not path.exists():
            _download_once(source, path, memory)
        expected = source.sha256 or proofs.recorded(path, memory)
        if expected is not None:
            proofs.prove(path, expected, memory)
    except proofs.DamagedError as error:
        raise DownloadError(f"{error} Delete it and try again.") from error
    except _NOT_FETCHED as error:
        absent = isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 404
        raise (AbsentError if absent else DownloadError)(
            f"Could not get {source.url} into {path.parent}: {error or type(error).__name__}. "
            f"Check the connection, {_ELSE}"
        ) from error
    if source.sha256 is None:
        _logger.warning("%s is unverified: nobody states its hash.", path)
    return path


def _download_once(source: ReleaseFile, path: Path, memory: Path) -> None:
    if constants.is_offline_mode():
        raise DownloadError(
            f"{source.url} is not in {path.parent}, and the hub client is offline (HF_HUB_OFFLINE). Get it where there "
            f"is a connection ('beitzoo download NAME'), {_ELSE}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():  # another process may have been quicker
            write_atomically(path, lambda temporary: _download(source.url, temporary))
            proofs.remember(path, proofs.content_hash(path, like="0" * 64), memory)


def _download(url: str, path: Path) -> None:
    """Stream a file into place; a try after a cut asks for the rest, if the host still has the same content."""
    etag = ""
    for attempt in range(_TRIES):
        done = path.stat().st_size if etag else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-", "If-Range": etag} if done else {})
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
                response.raise_for_status()
                etag = response.headers.get("etag", "")
                _write(response, path)
            return
        except _NOT_FETCHED as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 500
            if status < 500 or attempt == _TRIES - 1:
                raise
            _logger.info("%s broke off (%s); trying again.", url, error)
            time.sleep(2**attempt)


def _write(response: httpx.Response, path: Path) -> None:
    if response.headers.get("content-type", "").startswith("text/html"):
        raise OSError("a web page came instead of the file (a login page of this network?)")
    left = response.headers.get("content-length")
    hidden = True if constants.HF_HUB_DISABLE_PROGRESS_BARS else None
    with path.open("ab" if response.status_code == 206 else "wb") as file:
        size = None if left is None else file.tell() + int(left)
        with tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, disable=hidden) as bar:
            for chunk in response.iter_raw():
                file.write(chunk)
                bar.update(len(chunk))
        if size is not None and file.tell() != size:
            raise OSError(f"{file.tell()} bytes came, {size} were announced")
