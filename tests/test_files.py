"""Files are written atomically: the right mode, links, fsync; a failure keeps the old file and says why."""

import errno
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from beitzoo import files
from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError
from beitzoo.files import full_path, read_text, remove_abandoned, write_atomically, write_text


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda mask: os.umask(mask) and None
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("new"),
    "torch": lambda path: torch.save({"a": torch.ones(2)}, path),
    "safetensors": lambda path: save_file({"a": torch.ones(2)}, path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_new_file_has_the_mode_of_the_umask_and_a_replaced_one_keeps_its_own(
    write: Callable[[Path], object], umask: Callable[[int], None], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "file"
    for mask in (0o077, 0o002):
        umask(mask)
        path.unlink(missing_ok=True)
        write_atomically(path, write)
        assert mode(path) == 0o666 & ~mask
    path.chmod(0o640)
    write_atomically(path, write)
    assert mode(path) == 0o640
    assert os.listdir(path.parent) == ["file"]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target.name)
    for text in ("first", "second"):  # also where it points to nothing yet
        write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    path = tmp_path / "file"
    original = os.fsync

    def record(handle: int) -> None:
        flushed.append(("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file", path.exists()))
        original(handle)

    monkeypatch.setattr(files.os, "fsync", record)
    write_atomically(path, WRITERS["torch"])
    assert flushed == [("file", False), ("folder", True)]


def test_names_may_be_as_long_as_a_name_can_be_and_need_not_be_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    for name in ("n" * 255, odd):
        write_text(tmp_path / name, name)
        assert read_text(tmp_path / name) == name
    assert (tmp_path / odd).read_bytes() == b"caf\xe9"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text(Path("~/file"), "text")
    assert read_text(tmp_path / "file") == read_text(Path("~/file")) == "text"


def refuse(path: Path) -> None:
    path.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def swallow(path: Path) -> None:
    """Fail on a full disk as torch.save does: without a word of it."""
    path.unlink()
    path.symlink_to("/dev/full")
    raise RuntimeError("unexpected pos 576 vs 534")


@pytest.mark.parametrize("write", [refuse, swallow])
def test_a_full_disk_is_named_and_the_old_file_stays(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileAccessError, match=f"Cannot write {path}: No space left on device. Check .* free space"):
        write_atomically(path, write)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


def test_errors_of_the_writer_pass_unchanged(tmp_path: Path) -> None:
    for error in (InvalidValueError("no"), MissingFileError("no"), RuntimeError("no"), KeyboardInterrupt()):

        def fail(_: Path, error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            write_atomically(tmp_path / "file", fail)
        assert caught.value is error
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    for path, message in {
        tmp_path: "it is a folder",
        Path("/dev/null"): "it is a device or a pipe",
        tmp_path / "file" / "below": r"Not a directory|File exists",
        tmp_path / "circle": "circle",
        Path("/proc/file"): "No such file or directory",
        tmp_path / ("n" * 256): "File name too long",
    }.items():
        with pytest.raises(FileAccessError, match=message) as caught:
            write_text(path, "text")
        assert str(path) in str(caught.value)
    with pytest.raises(MissingFileError, match=str(tmp_path / "absent")):
        read_text(tmp_path / "absent")
    with pytest.raises(FileAccessError, match="Is a directory"):
        read_text(tmp_path)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_while_it_writes_the_old_file_stays(tmp_path: Path) -> None:
    path, begun = tmp_path / "file", tmp_path / "begun"
    path.write_text("old")

    def write_slowly(temporary: Path) -> None:
        temporary.write_text("half")
        begun.touch()
        time.sleep(60)

    process = os.fork()
    if process == 0:
        write_atomically(path, write_slowly)
        os._exit(0)
    while not begun.exists():
        time.sleep(0.001)
    partial, other = next(tmp_path.glob(".*.partial")), tmp_path / ".0123abcd-0.partial"
    other.touch()  # of another file
    remove_abandoned(path)
    assert partial.read_text() == "half"  # as the other process still writes it
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert partial.exists()  # of who killed it nobody asked yet
    remove_abandoned(path)
    assert {file.name for file in tmp_path.iterdir()} == {"file", "begun", other.name}


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 300])
def test_a_path_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(FileAccessError, match="Give another path"):
        full_path(name)
