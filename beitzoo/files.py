"""Atomic writes: readers see the old file or the new one, never a part, even after a power cut."""

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from beitzoo.errors import FileAccessError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    A link is followed, and the file it points to is replaced. A file that is replaced keeps its mode; a new one gets
    the mode that the umask of the process allows.

    Raises:
        FileAccessError: The file cannot be written: names the file and the reason.
    """
    try:
        target = path.expanduser().resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not made of the file's name, which may be as long as a name can be.
        temporary = target.with_name(f".{secrets.token_hex(8)}.partial")
        try:
            _create(temporary, like=target)
            write(temporary)
            _flush(temporary)
            temporary.replace(target)
            _flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FileAccessError(
            f"Cannot write {path}: {error.strerror or error}. Check the folder's permissions and free space, or choose "
            "another."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; file names in it that are not UTF-8 keep their bytes."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "surrogateescape")))


def read_text(path: Path) -> str:
    """Read a text file that `write_text` wrote."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def _create(temporary: Path, like: Path) -> None:
    """Create the file with the mode of the one that it will replace, or else as the umask says."""
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    with contextlib.suppress(FileNotFoundError):
        temporary.chmod(stat.S_IMODE(like.stat().st_mode))


def _flush(path: Path) -> None:
    """Write a file or folder through to disk; file systems that cannot sync a folder are left alone."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
