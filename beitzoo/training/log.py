"""The log of a run: `log.csv`, and what a person sees of it while the run goes on."""

import csv
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from beitzoo.files import read_text, write_text, writing
from beitzoo.progress import LINE_EVERY
from beitzoo.training.board import Board, Value

_OF_UPDATES = ("lr", "weight_decay", "grad_norm", "images_per_sec", "wait_share", "seconds")
_ALWAYS = ("line", "epoch", "update", "loss", *_OF_UPDATES)


class Log:
    """A CSV with a line for every few updates and one for each epoch; `line` says which it is.

    `loss` is the mean over all items of the line's updates, `grad_norm` that over the updates (before clipping),
    `wait_share` the share of the main process's time that waited for batches, and `seconds` the time since the run
    began. Lines of updates that will be done again are taken out first.
    """

    def __init__(self, path: Path, names: tuple[str, ...], update: int, board: Board | None = None) -> None:
        self._path = path
        self._board = board
        self.columns = [*_ALWAYS, *names]
        kept = _lines_until(path, update) if path.is_file() else []
        write_text(path, "\n".join([",".join(self.columns), *kept]) + "\n")
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, restval="", lineterminator="\n")

    def write(self, values: Mapping[str, Value]) -> None:
        """Append a line; it can be read at once.

        Raises:
            FileAccessError: It cannot be written, such as on a full disk.
        """
        with writing(self._path):
            self._writer.writerow(values)
            self._file.flush()
            if self._board is not None:
                self._board.write(values)

    def sync(self) -> None:
        """Wait until what was written is on disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.sync()

    def close(self) -> None:
        """Close the files."""
        with writing(self._path):  # what could not be written is tried once more
            self._file.close()
            if self._board is not None:
                self._board.close()


class Display:
    """What the main process says on stderr: a bar of updates on a terminal, else a line per epoch or half a minute."""

    def __init__(self, updates: int, done: int, shown: bool) -> None:
        self._terminal = shown and sys.stderr.isatty()
        self._shown = shown
        self._bar = tqdm(total=updates, initial=done, unit="update", disable=not self._terminal, dynamic_ncols=True)
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()

    def advance(self) -> None:
        """Count an update."""
        self._bar.update()

    def show(self, values: Mapping[str, Value]) -> None:
        """Show a line of the log."""
        facts = {"loss": f"{values['loss']:.3f}", "lr": f"{values['lr']:.2g}"}
        facts["images/s"] = f"{values['images_per_sec']:,.0f}"
        facts["waited"] = f"{values['wait_share']:.0%}"
        if self._terminal:
            self._bar.set_postfix(facts)
        elif self._shown and time.monotonic() - self._last >= LINE_EVERY:
            self._say(values, facts)

    def show_epoch(self, values: Mapping[str, Value], metrics: Mapping[str, float]) -> None:
        """Say how an epoch went."""
        if self._shown:
            facts = {"loss": values["loss"], **metrics}
            self._say(values, {name: _shown(value) for name, value in facts.items()})

    def _say(self, values: Mapping[str, Value], facts: Mapping[str, str]) -> None:
        self._last = time.monotonic()
        text = ", ".join(f"{name} {fact}" for name, fact in facts.items())
        tqdm.write(f"epoch {values['epoch']}, update {values['update']}: {text}", file=sys.stderr)


def _shown(value: Value) -> str:
    """Return a number as people read it: of what is counted, such as codes in use, no decimals."""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _lines_until(path: Path, update: int) -> list[str]:
    """Return the lines of a log up to an update; the last one may be cut short, and is then of a later update."""
    column = _ALWAYS.index("update")
    lines = [line.split(",") for line in read_text(path).splitlines()[1:]]
    complete = [line for line in lines if len(line) > column + 1 and line[column].isdigit()]
    return [",".join(line) for line in complete if int(line[column]) <= update]
