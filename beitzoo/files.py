"""Atomic writes: readers see the old file or the new one, never a part, even after a power cut."""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from beitzoo.errors import FileAccessError, MissingFileError, UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`.

    A link is followed, and the file it points to is replaced. A file that is replaced keeps its mode; a new one gets
    the mode that the umask of the process allows.

    Raises:
        FileAccessError: The file cannot be written: names the file and the reason.
    """
    try:
        target = _followed(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _created(target) as temporary:
            mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            _fill(temporary, write)
            temporary.chmod(mode)  # safetensors replaces the file by one of its own
            _flush(temporary)
            temporary.replace(target)
            _flush(target.parent)
    except UserError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; file names in it that are not UTF-8 keep their bytes."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "surrogateescape")))


def read_text(path: Path) -> str:
    """Read a text file that `write_text` wrote.

    Raises:
        MissingFileError: It is not there.
        FileAccessError: It cannot be read.
    """
    try:
        return full_path(path).read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no file {path}; check the name.") from error
    except OSError as error:
        raise FileAccessError(f"Cannot read {path}: {error.strerror or error}. Check its permissions.") from error


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `path` with atomically written files, then rename it to `path`.

    Raises:
        FileAccessError: The folder cannot be written, or exists: names it and the reason.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            temporary.rename(path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except UserError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write to a file that stays open; an error of the system becomes one that names the file.

    Raises:
        FileAccessError: The file cannot be written, such as on a full disk.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def remove_partial(directory: Path) -> None:
    """Remove what killed processes left half written below a folder; none may be writing there."""
    for partial in list(directory.rglob(".*.partial")):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of `write_atomically(path, ...)`, and nothing that one still writes.

    For what stays open while it is written: `write` must neither replace its file nor close it for good. Where the
    system or the folder has no locks, nobody can tell, and all stays.
    """
    target = _followed(path)
    for partial in target.parent.glob(f".{_digest(target)}-*.partial"):
        with contextlib.suppress(OSError), partial.open("rb") as file:
            if _lock(file.fileno(), wait=False):
                partial.unlink(missing_ok=True)


def full_path(path: str | Path) -> Path:
    """Return a path with `~` replaced.

    Raises:
        FileAccessError: No file can have that name, or one may not look there.
    """
    try:
        full = Path(path).expanduser()
        full.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return full
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise FileAccessError(f"Cannot use {str(path)!r}: {reason}. Give another path.") from error
    return full


def _cannot_write(path: Path, error: OSError) -> FileAccessError:
    return FileAccessError(
        f"Cannot write {path}: {error.strerror or error}. Check the folder's permissions and free space, or choose "
        "another."
    )


def _followed(path: Path) -> Path:
    """Return the file that a path means in the end; only a regular one can be replaced."""
    try:
        target = full_path(path).resolve()
    except RuntimeError as error:  # links in a circle, or a ~ without a home
        raise FileAccessError(f"Cannot write {path}: {str(error).rstrip('.')}. Choose another file.") from error
    if target.is_symlink():  # what Python 3.13 leaves of links in a circle
        raise FileAccessError(f"Cannot write {path}: its links lead in a circle. Choose another file.")
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a device or a pipe"
        raise FileAccessError(f"Cannot write {path}: it is {kind}. Choose another file.")
    return target


@contextlib.contextmanager
def _created(target: Path) -> Iterator[Path]:
    """Make a temporary file beside the target, locked as long as this is entered and this process lives."""
    while True:
        # Not made of the file's name, which may be as long as a name can be.
        temporary = target.with_name(f".{_digest(target)}-{secrets.token_hex(8)}.partial")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        _lock(handle, wait=True)
        if temporary.exists():  # else somebody took it for abandoned before it was locked
            break
        os.close(handle)
    if os.name != "posix":  # there no open file can be renamed, and there are no locks
        os.close(handle)
    try:
        yield temporary
    finally:
        if os.name == "posix":
            os.close(handle)
        temporary.unlink(missing_ok=True)


def _digest(target: Path) -> str:
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file; False if another has, or if there are no such locks here."""
    try:
        import fcntl  # not on Windows
    except ModuleNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _fill(temporary: Path, write: Callable[[Path], object]) -> None:
    """Call `write`; where it fails on a full disk without saying so, as torch.save does, raise the system's error."""
    try:
        write(temporary)
    except OSError:
        raise
    except Exception:
        with temporary.open("ab") as file:
            file.write(bytes(2**20))
        raise


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
