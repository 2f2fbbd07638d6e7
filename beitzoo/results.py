"""Tables of rows, CSV or JSON, each row with the environment it was measured in; a file is whole at every moment."""

import csv
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from beitzoo.files import write_atomically

Value = str | int | float | bool | None
Row = dict[str, Value]
Format = Literal["csv", "json"]


# The columns that every row ends with.
ENVIRONMENT = ("device", "threads", "torch", "beitzoo", "commit", "python", "platform", "date")


def environment(device: torch.device) -> Row:
    """Describe what a measurement was made with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "beitzoo": importlib.metadata.version("beitzoo"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def check_columns(path: Path, columns: Sequence[str], form: Format = "csv") -> None:
    """Make sure that rows with these columns can be appended to a file, before they are measured.

    A file of an earlier version, one that has the environment and no column but these, is rewritten with all of them;
    what it did not have is empty in its rows.

    Raises:
        ValueError: The file is of another kind: other columns, or the other format.
        OSError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent), path.open("a", encoding="utf-8"):
            pass  # both the file and its folder must be writable: rows replace the file
    except OSError as error:
        raise OSError(f"Cannot write {path} ({error.strerror}); give another file with --results-file.") from error
    with _locked(path):
        header, rows = _parse(path, form)
        if not header or header == list(columns):
            return
        missing = [name for name in ("model", *ENVIRONMENT) if name not in header]
        foreign = [name for name in header if name not in columns]
        if missing or foreign:
            raise ValueError(
                f"{path} is no table of such rows: it lacks the columns {missing} and has {foreign} of its own. "
                "Give another file with --results-file."
            )
        if form == "csv":
            _replace(path, _csv_text([{name: row.get(name) for name in columns} for row in rows], header=True))


def read_rows(path: Path, form: Format = "csv") -> list[Row]:
    """Return the rows of a file; those of a CSV hold text, and none is there if the file is not."""
    return _parse(path, form)[1] if path.exists() else []


def append_row(path: Path, row: Mapping[str, Value], form: Format = "csv") -> None:
    """Append a row, with a header if the CSV is new; it is on disk when this returns, and the file is never half of it.

    Raises:
        ValueError: The file has other columns.
    """
    check_columns(path, list(row), form)
    with _locked(path):
        text = path.read_text(encoding="utf-8")
        if form == "json":
            filled = {name: value for name, value in row.items() if name in ENVIRONMENT or value not in (None, "")}
            _replace(path, json.dumps([*json.loads(text or "[]"), filled], indent=2) + "\n")
        else:
            _replace(path, text + _csv_text([row], header=not text))


def drop_rows(path: Path, unwanted: Callable[[Row], bool], form: Format = "csv") -> int:
    """Take rows out of a file; return how many they were."""
    with _locked(path):
        header, rows = _parse(path, form)
        kept = [row for row in rows if not unwanted(row)]
        if len(kept) < len(rows) and form == "json":
            _replace(path, json.dumps(kept, indent=2) + "\n")
        elif len(kept) < len(rows):
            head = _csv_text([{name: name for name in header}], header=False)
            _replace(path, head + _csv_text(kept, header=False))
    return len(rows) - len(kept)


def _parse(path: Path, form: Format) -> tuple[list[str], list[Row]]:
    """Return the columns of a file and its rows; no columns if it is empty."""
    text = path.read_text(encoding="utf-8")
    if not text:
        return [], []
    if form == "json":
        return _parse_json(path, text)
    if not text.endswith("\n"):
        raise ValueError(f"{path} does not end with a line; mend it, or give another file with --results-file.")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: list[Row] = [dict(row) for row in reader]
    header = list(reader.fieldnames or ())
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} has rows that are longer or shorter than its header; mend it, or give another file.")
    return header, rows


def _parse_json(path: Path, text: str) -> tuple[list[str], list[Row]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give another file with --results-file.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a JSON list of rows; give another file with --results-file.")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _csv_text(rows: Sequence[Mapping[str, Value]], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    """Put a new version of a file in the place of the old one, in one step that outlives a power cut."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_atomically(path, write)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other runs that append to files in this folder waiting; where the system has no such lock, do not."""
    if os.name != "posix":
        yield
        return
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        os.fsync(folder)
    finally:
        os.close(folder)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the last commit that changed the package, and a hash of what differs from it; empty without a checkout.

    Not the checkout's own commit: one that only adds rows to a table must not make them rows of other code.
    """
    package = Path(__file__).parent
    if not (package.parent / ".git").exists() or shutil.which("git") is None:
        return ""
    git = ["git", "-C", str(package)]
    commit = subprocess.run([*git, "log", "-1", "--format=%h", "--", "."], capture_output=True, text=True)
    changes = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True)
    difference = subprocess.run([*git, "diff", "HEAD", "--", "."], capture_output=True, text=True).stdout
    state = hashlib.sha256((changes.stdout + difference).encode()).hexdigest()[:7]
    return commit.stdout.strip() + (f"+{state}" if changes.stdout.strip() else "")
