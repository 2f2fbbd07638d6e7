"""Rows of CSV files, each with the environment it was measured in."""

import csv
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

Value = str | int | float | bool | None
Row = dict[str, Value]


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


def check_columns(path: Path, columns: list[str]) -> None:
    """Make sure that rows with these columns can be appended to a file, before they are measured.

    Raises:
        ValueError: The file has other columns.
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        text = file.read()
    if text and not text.endswith("\n"):
        raise ValueError(f"{path} does not end with a line; mend it, or give another file with --results-file.")
    header = next(csv.reader(text.splitlines()), None)
    if header is not None and header != columns:
        raise ValueError(f"{path} has the columns {header}, not {columns}; give another file with --results-file.")


def append_row(path: Path, row: Mapping[str, Value]) -> None:
    """Append a row to a CSV file, with a header if the file is new; it is on disk when this returns.

    Raises:
        ValueError: The file has other columns.
    """
    check_columns(path, list(row))
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of this checkout, with a plus if files differ from it; empty if installed without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    if shutil.which("git") is None:
        return ""
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
