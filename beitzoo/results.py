"""Tables of results, CSV or JSON: rows found by a key, each with the environment it was measured in."""

import csv
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from beitzoo.errors import FileAccessError, InvalidValueError
from beitzoo.files import full_path, read_text, write_text

if TYPE_CHECKING:
    import torch

Value = str | int | float | bool | None
Row = dict[str, Value]
Format = Literal["csv", "json"]

# The columns of every row that say what it was measured with.
ENVIRONMENT = ("device", "threads", "torch", "beitzoo", "commit", "python", "platform", "date")

# What /proc/cpuinfo calls instruction sets that decide how fast a network is: the first of the vectors that is there,
# and all of the others.
_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve2": "SVE2", "sve": "SVE", "asimd": "NEON"}
_PRODUCTS = {"avx512_vnni": "VNNI", "avx_vnni": "VNNI", "asimddp": "dot products", "i8mm": "I8MM", "amx_tile": "AMX"}
_PRODUCTS |= {"avx512_bf16": "bfloat16", "bf16": "bfloat16", "avx512_fp16": "float16"}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
    """Rows of one kind in a file; it can be read by others at every moment, and several runs can append to it.

    Attributes:
        path: The file; None keeps no rows.
        columns: All columns, in order.
        key: Those that make two rows the same measurement: what was asked for, and where; not when.
        form: CSV or a JSON list.
    """

    path: Path | None
    columns: tuple[str, ...]
    key: tuple[str, ...] = ()
    form: Format = "csv"

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", full_path(self.path))

    def check(self) -> None:
        """Make sure that rows can be appended, before the first is measured.

        A file of an earlier version, one that has the environment and no column but these, is rewritten with all
        columns; those that it did not have are empty in its rows.

        Raises:
            InvalidValueError: The file holds other columns, or is of the other format.
            FileAccessError: The file cannot be written.
        """
        if self.path is None:
            return
        _check_writable(self.path)
        with _locked(self.path):
            header, rows = _parse(self.path, self.form)
            if not header or header == list(self.columns):
                return
            missing = [name for name in (self.columns[0], *ENVIRONMENT) if name not in header]
            foreign = [name for name in header if name not in self.columns]
            if missing or foreign:
                differs = [f"lacks the columns {missing}"] * bool(missing) + [f"has {foreign}"] * bool(foreign)
                raise InvalidValueError(
                    f"{self.path} is no table of such rows: it {' and '.join(differs)}. Give another file with "
                    "--results-file."
                )
            if self.form == "csv":
                self._write([{name: row.get(name) for name in self.columns} for row in rows])

    def rows(self) -> list[Row]:
        """Return all rows; those of a CSV hold text."""
        return [] if self.path is None else read_rows(self.path, self.form)

    def find(self, wanted: Row) -> Row | None:
        """Return the row of the same measurement, or None."""
        return next((row for row in self.rows() if self._key_of(row) == self._key_of(wanted)), None)

    def append(self, row: Row) -> Row:
        """Append a row, which is on disk when this returns; return it with all columns."""
        return self._add(row, lambda old: True)

    def replace(self, row: Row) -> Row:
        """Append a row as `append` does, in the place of those of the same measurement."""
        return self._add(row, lambda old: self._key_of(old) != self._key_of(row))

    def _add(self, row: Row, stays: Callable[[Row], bool]) -> Row:
        full = {name: row.get(name) for name in self.columns}
        assert row.keys() <= full.keys(), row.keys() - full.keys()
        if self.path is not None:
            self.check()
            with _locked(self.path):
                self._write([*filter(stays, _parse(self.path, self.form)[1]), full])
        return full

    def drop_failed(self, wanted: Sequence[Row]) -> None:
        """Take out the rows of these measurements that have an `error`, so that they are measured again."""
        if self.path is None or not self.path.exists():
            return
        keys = {self._key_of(row) for row in wanted}
        with _locked(self.path):
            rows = _parse(self.path, self.form)[1]
            kept = [row for row in rows if not (row.get("error") and self._key_of(row) in keys)]
            if len(kept) < len(rows):
                self._write(kept)

    def _key_of(self, row: Row) -> tuple[str, ...]:
        return tuple("" if row.get(name) is None else str(row[name]) for name in self.key)

    def _write(self, rows: Sequence[Row]) -> None:
        assert self.path is not None
        if self.form == "csv":
            write_text(self.path, csv_text(self.columns, rows))
        else:
            filled = [{k: v for k, v in row.items() if k in ENVIRONMENT or v not in (None, "")} for row in rows]
            write_text(self.path, json.dumps(filled, indent=2) + "\n")


def read_rows(path: Path, form: Format = "csv") -> list[Row]:
    """Return the rows of a file, none if it does not exist; those of a CSV hold text.

    Raises:
        InvalidValueError: It is no table.
        FileAccessError: It cannot be read.
    """
    return _parse(path, form)[1] if path.exists() else []


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Value]]) -> str:
    """Return a CSV of these columns; what else a row has is left out."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def environment(device: "torch.device") -> Row:
    """Describe what a measurement is made with: the columns `ENVIRONMENT`."""
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "beitzoo": importlib.metadata.version("beitzoo"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def describe_cpu(cpuinfo: str, cores: int) -> str:
    """Return a processor's name, cores and instruction sets from the text of /proc/cpuinfo.

    The name alone does not tell machines apart: clouds give one name to processors with and without AVX-512.
    """
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    vectors = [name for flag, name in _VECTORS.items() if flag in flags][:1]
    products = dict.fromkeys(name for flag, name in _PRODUCTS.items() if flag in flags)
    name = facts.get("model name") or platform.processor() or platform.machine()
    return ", ".join(filter(None, (name, f"{cores} core{'s' * (cores != 1)}", " ".join([*vectors, *products]))))


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    # Those this process may use, where the system says.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return describe_cpu(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "", cores)


def _check_writable(path: Path) -> None:
    """Make the folder and the file, if they are not there: rows replace the file, so both must be writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.resolve().parent), path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise FileAccessError(
            f"Cannot write {path} ({error.strerror}); give another file with --results-file."
        ) from error


def _parse(path: Path, form: Format) -> tuple[list[str], list[Row]]:
    """Return the columns of a file and its rows; no columns if it is empty."""
    text = read_text(path)
    if not text:
        return [], []
    if form == "json":
        return _parse_json(path, text)
    if not text.endswith("\n"):
        raise InvalidValueError(f"{path} does not end with a line break; mend it, or give another file.")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows: list[Row] = [dict(row) for row in reader]
    except csv.Error as error:
        raise InvalidValueError(f"{path} is not a CSV ({error}); give another file.") from error
    header = list(reader.fieldnames or ())
    if any(None in row or None in row.values() for row in rows):
        raise InvalidValueError(
            f"{path} has rows that are longer or shorter than its header; mend it, or give another file."
        )
    return header, rows


def _parse_json(path: Path, text: str) -> tuple[list[str], list[Row]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InvalidValueError(f"{path} is not JSON ({error}); give another file with --results-file.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidValueError(f"{path} is not a JSON list of rows; give another file with --results-file.")
    return list(dict.fromkeys(name for row in rows for name in row)), rows


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let other runs that write files in this folder wait; where the file system has no such lock, say so and go on."""
    if os.name != "posix":
        yield
        return
    import fcntl

    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:  # NFS, some FUSE: ENOLCK, ENOTSUP, EBADF
            _warn_of_no_lock(path.parent, error.strerror or str(error))
        yield
    finally:
        os.close(folder)


@functools.cache
def _warn_of_no_lock(folder: Path, reason: str) -> None:
    _logger.warning("%s cannot be locked (%s): let no other run write results there meanwhile.", folder, reason)


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
