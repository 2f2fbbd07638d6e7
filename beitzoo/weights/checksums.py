"""Whether a file is what it should be, and a memory of it, so that a file is hashed once and not at every load."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

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


def notes_in(folder: Path) -> Path:
    """Return where, in our own folder of a cache, notes on proven files are kept."""
    return folder / "checksums"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, as a sentence."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if line.endswith(".") else f"{line}."


def is_hash(name: str) -> bool:
    """Tell whether this is a sha256, or a hash of git's: the two by which the hub states content."""
    return _HASH.fullmatch(name) is not None


def prove(path: Path, expected: str, notes: Path) -> None:
    """Compare a file with its sha256, or with its git blob hash where the hub keeps it in git.

    A file that was proven before and has the size and time it had then is not read again.

    Args:
        path: The file; links are followed.
        expected: 64 hexadecimal digits of sha256, or 40 of git.
        notes: Folder of notes on what was proven. Where it cannot be written, files are hashed at every load.

    Raises:
        DamagedError: The content has another hash.
        OSError: The file cannot be read.
    """
    file = path.resolve(strict=True)
    if _is_remembered(file, expected, notes):
        return
    stamp = _stamp(file)  # before it is read: what changes meanwhile is not proven
    found = content_hash(file, expected)
    if found != expected:
        raise DamagedError(f"{path} is damaged: its hash is {found}, expected {expected}.")
    _write_note(file, {"hash": expected, "proven": stamp}, notes)


def prove_again(path: Path, expected: str, notes: Path) -> None:
    """Hash a file whatever is remembered of it; if it is damaged, `prove` will not trust it either from now on."""
    _write_note(path.resolve(strict=True), {"hash": expected, "proven": None}, notes)
    prove(path, expected, notes)


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


def remember(path: Path, notes: Path) -> str:
    """Note and return the sha256 that a file has now, for which nobody states one."""
    file = path.resolve(strict=True)
    stamp = _stamp(file)
    content = content_hash(file, like="0" * 64)
    _write_note(file, {"hash": content, "proven": stamp}, notes)
    return content


def recorded(path: Path, notes: Path) -> str | None:
    """Return the hash that was noted for a file, whether or not it changed since."""
    return _read_note(path.resolve(), notes).get("hash")


def _is_remembered(file: Path, expected: str, notes: Path) -> bool:
    note = _read_note(file, notes)
    return note.get("hash") == expected and note.get("proven") == _stamp(file)


def _stamp(file: Path) -> dict[str, int]:
    """Describe the state of a file: what changes it changes this."""
    state = file.stat()
    return {name: getattr(state, f"st_{name}") for name in ("size", "mtime_ns", "ctime_ns", "ino")}


def _read_note(file: Path, notes: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note_of(file, notes).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no note, or one that was damaged: the file must speak for itself
        return {}
    return note if isinstance(note, dict) else {}


def _write_note(file: Path, note: dict[str, Any], notes: Path) -> None:
    try:
        write_text(_note_of(file, notes), json.dumps({"path": str(file), **note}, indent=2) + "\n")
    except OSError as error:
        _logger.info("Cannot note in %s what is known of %s (%s); it will be hashed again.", notes, file, error)


def _note_of(file: Path, notes: Path) -> Path:
    return notes / f"{hashlib.sha256(str(file).encode()).hexdigest()}.json"
