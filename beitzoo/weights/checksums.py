"""Checksums of files, and records of them, so that a file is hashed once and not at every load."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from beitzoo.errors import UserError
from beitzoo.files import write_text

_logger = logging.getLogger(__name__)

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class DownloadError(UserError, OSError):
    """No source gave the file, or what it gave is not the file."""


class AbsentError(DownloadError):
    """The source was asked, and has no such file."""


class DamagedError(UserError, OSError):
    """A file's content is not what was stated."""


def own_folder(cache_dir: Path | None) -> Path:
    """Return our folder beside the hub's files; nothing of ours is written among them."""
    return (cache_dir or Path(constants.HF_HOME)) / "beitzoo"


def records_of(cache_dir: Path | None) -> Path:
    """Return where the checksum records of a cache's verified files are kept."""
    return records_in(own_folder(cache_dir))


def records_in(folder: Path) -> Path:
    """Return where they are in our own folder of a cache."""
    return folder / "checksums"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, as a sentence."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if line.endswith(".") else f"{line}."


def is_hash(name: str) -> bool:
    """Tell whether this is a sha256, or a hash of git's: the two by which the hub states content."""
    return _HASH.fullmatch(name) is not None


def verify_checksum(path: Path, expected: str, records: Path) -> None:
    """Compare a file with its sha256, or with its git blob hash where the hub keeps it in git.

    A file that was verified before and has the size and time it had then is not read again.

    Args:
        path: The file; links are followed.
        expected: 64 hexadecimal digits of sha256, or 40 of git.
        records: Folder of checksum records. Where it cannot be written, files are hashed at every load.

    Raises:
        DamagedError: The content has another hash.
        OSError: The file cannot be read.
    """
    file = path.resolve(strict=True)
    if _is_verified(file, expected, records):
        return
    stamp = _stamp(file)  # before it is read: what changes meanwhile is not verified
    found = content_hash(file, expected)
    if found != expected:
        raise DamagedError(f"{path} is damaged: its hash is {found}, expected {expected}.")
    _write_record(file, {"hash": expected, "verified": stamp}, records)


def check_prefix(path: Path, found: str, prefix: str | None) -> None:
    """Compare the sha256 of a file with the first digits that are stated of it, if there are any.

    Eight digits tell damage and mix-ups; against a file that was made to have them they are no proof.

    Raises:
        DamagedError: It begins with others.
    """
    if prefix is not None and not found.startswith(prefix):
        raise DamagedError(f"{path} is damaged: its sha256 is {found}, and must begin with {prefix}.")


def verify_again(path: Path, expected: str, records: Path) -> None:
    """Hash a file whatever its record says; a damaged one is not trusted by `verify_checksum` from now on."""
    _write_record(path.resolve(strict=True), {"hash": expected, "verified": None}, records)
    verify_checksum(path, expected, records)


def content_hash(path: Path, like: str) -> str:
    """Hash a file in the way that gave the hash `like`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while piece := file.read(2**20):
            digest.update(piece)
        return digest.hexdigest()


def record_checksum(path: Path, records: Path) -> str:
    """Record and return the sha256 that a file has now, for which nobody states one."""
    file = path.resolve(strict=True)
    stamp = _stamp(file)
    content = content_hash(file, like="0" * 64)
    _write_record(file, {"hash": content, "verified": stamp}, records)
    return content


def recorded_checksum(path: Path, records: Path) -> str | None:
    """Return the hash that was recorded for a file, whether or not it changed since."""
    return _read_record(path.resolve(), records).get("hash")


def _is_verified(file: Path, expected: str, records: Path) -> bool:
    record = _read_record(file, records)
    return record.get("hash") == expected and record.get("verified") == _stamp(file)


def _stamp(file: Path) -> dict[str, int]:
    """Describe the state of a file: what changes it changes this."""
    state = file.stat()
    return {name: getattr(state, f"st_{name}") for name in ("size", "mtime_ns", "ctime_ns", "ino")}


def _read_record(file: Path, records: Path) -> dict[str, Any]:
    try:
        record = json.loads(_record_of(file, records).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no record, or a damaged one: the file is hashed
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(file: Path, record: dict[str, Any], records: Path) -> None:
    try:
        write_text(_record_of(file, records), json.dumps({"path": str(file), **record}, indent=2) + "\n")
    except OSError as error:
        _logger.info("Cannot write a checksum record of %s in %s (%s); it will be hashed again.", file, records, error)


def _record_of(file: Path, records: Path) -> Path:
    return records / f"{hashlib.sha256(str(file).encode()).hexdigest()}.json"
