"""The log of a run for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Value = str | int | float
FOLDER = "tensorboard"
_EVENTS = "events.out.tfevents."  # then come the second it was made in, a dot, and what is no order
_NOT_DRAWN = ("line", "epoch", "update")


class Board:
    """Event files beside `log.csv`, with the same numbers: `updates/loss` is the column `loss` of such lines.

    Steps are updates. What was written of updates that will be done again is not shown any more: the new file says so
    in its first event, and is therefore read last.
    """

    def __init__(self, directory: Path, update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        _move_forward(directory / FOLDER)
        writer: Any = SummaryWriter  # not annotated
        self._writer = writer(directory / FOLDER, purge_step=update + 1)

    def write(self, values: Mapping[str, Value]) -> None:
        """Draw a point in the curve of each value of a line."""
        for name, value in values.items():
            if name not in _NOT_DRAWN:
                self._writer.add_scalar(f"{values['line']}/{name}", value, values["update"])

    def sync(self) -> None:
        """Write out what waits in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _move_forward(folder: Path) -> None:
    """Rename event files, in their order, if one made now would not be read after them; they are read by name.

    That is so of a run that goes on within a second, or on a machine whose clock is behind.
    """
    now = f"{_EVENTS}{int(time.time()):010d}"
    files = sorted(path for path in folder.glob(f"{_EVENTS}*") if path.name >= now)
    for number, path in enumerate(files):
        path.rename(folder / f"{now}-{number:04d}.{path.name.removeprefix(_EVENTS).partition('.')[2]}")
