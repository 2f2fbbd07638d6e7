"""From a row's sources to a verified file on this machine. Bytes only: no tensors, no names of parameters."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

from beitzoo.weights import checksums, hub, releases
from beitzoo.weights.checksums import AbsentError, DownloadError
from beitzoo.weights.shards import INDEX_SUFFIX, shards
from beitzoo.zoo.checkpoints import HubFile, LocalFile, PackageFile, ReleaseFile, Source, WebFile

_logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Verdict:
    """What a look at a source's local copy showed.

    Attributes:
        source: Where the copy is from.
        path: The copy; None if there is none.
        state: `verified` is the content that the table or the hub states. `prefix matches` means that only the
            first digits of the hash are stated, and are right. `unverified` means that nobody states a hash: the copy
            is as it was downloaded, if that was recorded. `damaged` is none of these.
        detail: The hash it was compared with, or what is wrong.
    """

    source: Source
    path: Path | None
    state: Literal["verified", "prefix matches", "unverified", "damaged", "not downloaded"]
    detail: str = ""


def fetch(sources: Sequence[Source], cache_dir: Path | None = None) -> Path:
    """Return the path of a verified copy, from the first source that has one.

    A repository that could not be asked is not asked for its next file either: that file is the pickle beside the
    safetensors, and an outage or a refusal is no reason to load it.

    Args:
        sources: Places with the same tensors, in order of preference.
        cache_dir: Where downloads are kept; None is the hub's own cache.

    Raises:
        AbsentError: All sources were asked, and none has the file.
        DownloadError: Says for each source what was wanted, from where, why it failed and what to do.
    """
    failures: list[DownloadError] = []
    unreachable = set()
    for source in sources:
        if isinstance(source, HubFile) and source.repo_id in unreachable:
            continue
        try:
            path = _fetch(source, cache_dir)
        except DownloadError as error:
            failures.append(error)
            if isinstance(source, HubFile) and not isinstance(error, AbsentError) and not constants.is_offline_mode():
                unreachable.add(source.repo_id)
            continue
        for failure in failures:
            _logger.warning("%s Used %s instead.", failure, path)
        return path
    if not failures:
        raise DownloadError("This model has no source of weights; create it with pretrained=False.")
    absent = all(isinstance(failure, AbsentError) for failure in failures)
    raise (AbsentError if absent else DownloadError)("\n".join(map(str, failures)))


def verify(source: Source, cache_dir: Path | None = None) -> Verdict:
    """Hash the local copy of a source again, without network; the next load sees to what is damaged."""
    path = find_local(source, cache_dir)
    if path is None:
        return Verdict(source, None, "not downloaded")
    records = checksums.records_of(cache_dir)
    stated = None if isinstance(source, LocalFile) else source.sha256
    recorded = checksums.recorded_checksum(path, records)
    if stated is None and isinstance(source, HubFile):
        stated = hub.filed_hash(path) or recorded
    expected = stated or recorded
    prefix = source.sha256_prefix if isinstance(source, ReleaseFile | WebFile) else None
    if expected is None and prefix is not None:
        expected = checksums.record_checksum(path, records)
    if expected is None:
        return Verdict(source, path, "unverified", "nobody states its hash")
    try:
        checksums.verify_again(path, expected, records)
        checksums.check_prefix(path, expected, prefix)
    except OSError as error:
        remedy = "The next load fetches it again." if isinstance(source, HubFile) else "Delete it."
        return Verdict(source, path, "damaged", f"{error} {remedy}")
    if prefix is not None and stated is None:
        detail = f"its sha256 begins with {prefix}, as its name states; nobody states the rest of {expected}"
        return Verdict(source, path, "prefix matches", detail)
    return Verdict(source, path, "verified" if stated else "unverified", expected)


def find_local(source: Source, cache_dir: Path | None = None) -> Path | None:
    """Return where a source's copy is on this machine, if it is; asks nobody and verifies nothing."""
    match source:
        case HubFile():
            return hub.find_local(source, cache_dir)
        case ReleaseFile() | WebFile():
            path = releases.path_of(source, checksums.own_folder(cache_dir))
        case PackageFile(name):
            path = PACKAGE / name
        case LocalFile():
            path = source.path
    return path if path.is_file() else None


def _fetch(source: Source, cache_dir: Path | None) -> Path:
    match source:
        case LocalFile(path):
            if not path.is_file():
                raise AbsentError(f"There is no file {path}; name one that exists, or another model.")
            return path
        case PackageFile(name, sha256):
            path = PACKAGE / name
            try:
                checksums.verify_checksum(path, sha256, checksums.records_of(cache_dir))
            except OSError as error:
                raise DownloadError(f"The package's weights are damaged: {error} Reinstall beitzoo.") from error
            return path
        case HubFile():
            path = hub.fetch(source, cache_dir)
            if source.filename.endswith(INDEX_SUFFIX):
                for name in shards(path):
                    hub.fetch(replace(source, filename=name, revision=hub.commit_of(path)), cache_dir)
            return path
        case ReleaseFile() | WebFile():
            return releases.fetch(source, checksums.own_folder(cache_dir))
