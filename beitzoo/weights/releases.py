"""Files of the authors' releases and others at plain addresses: one copy, resumed where a connection broke off."""

import logging
import time
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, httpx
from tqdm import tqdm

from beitzoo.weights import checksums
from beitzoo.weights.checksums import AbsentError, DownloadError, first_line
from beitzoo.zoo.checkpoints import ReleaseFile, WebFile

_logger = logging.getLogger(__name__)

_TRIES = 3
_NOT_FETCHED = (httpx.HTTPError, OSError)
_ELSE = "or give checkpoint_path= a file that you have."


def path_of(source: ReleaseFile | WebFile, folder: Path) -> Path:
    """Return where the copy of a file is kept."""
    return folder / source.folder / source.filename


def fetch(source: ReleaseFile | WebFile, folder: Path) -> Path:
    """Get a file once and compare it with what is known of its hash.

    Where nobody states one, all that can be said later is that the file did not change.

    Args:
        source: The file.
        folder: Our own folder of a cache.

    Raises:
        AbsentError: The release has no such file.
        DownloadError: It cannot be had, or the copy changed since it came.
    """
    path, records = path_of(source, folder), checksums.records_in(folder)
    try:
        if not path.exists():
            _download_once(source, path)
        expected = (
            source.sha256 or checksums.recorded_checksum(path, records) or checksums.record_checksum(path, records)
        )
        checksums.verify_checksum(path, expected, records)
        checksums.check_prefix(path, expected, source.sha256_prefix)
    except DownloadError:
        raise
    except checksums.DamagedError as error:
        raise DownloadError(f"{error} Delete it and try again.") from error
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        remedy = "Its authors may have moved it," if status == 404 else f"The host refused ({status}); try again later,"
        raise (AbsentError if status == 404 else DownloadError)(
            f"Could not get {source.url} into {path.parent}: {first_line(error)} {remedy} {_ELSE}"
        ) from error
    except _NOT_FETCHED as error:
        raise DownloadError(
            f"Could not get {source.url} into {path.parent}: {first_line(error)} Check the connection, {_ELSE}"
        ) from error
    if source.sha256 is None and source.sha256_prefix is None:
        _logger.warning("%s is unverified: nobody states its hash.", path)
    return path


def _download_once(source: ReleaseFile | WebFile, path: Path) -> None:
    """Bring the file into place, one process at a time; what a killed one left is gone on with."""
    if constants.is_offline_mode():
        raise DownloadError(
            f"{source.url} is not in {path.parent}, and the hub client is offline (HF_HUB_OFFLINE). Get it where there "
            f"is a connection ('beitzoo download NAME'), {_ELSE}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part, etag = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "etag"))
    with WeakFileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():  # another process may have been quicker
            _download(source.url, part, etag)
            part.replace(path)
            etag.unlink(missing_ok=True)


def _download(url: str, part: Path, etag: Path) -> None:
    """Stream a file; after a cut, ask for the rest, if the host still has the content of the same etag."""
    for attempt in range(_TRIES):
        same = etag.read_text(encoding="utf-8") if etag.exists() and part.exists() else ""
        headers = {"Accept-Encoding": "identity"}
        if same:
            headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": same}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
                if response.status_code == 416:  # what is here is no beginning of what is there
                    etag.unlink()
                response.raise_for_status()
                etag.write_text(response.headers.get("etag", ""), encoding="utf-8")
                _write(response, part)
            return
        except _NOT_FETCHED as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 500
            if (status < 500 and status != 416) or attempt == _TRIES - 1:
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
