"""The log of a run for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Value = str | int | float
FOLDER = "tensorboard"
_NOT_DRAWN = ("line", "epoch", "update")


class Board:
    """Event files beside `log.csv`, with the same numbers: `updates/loss` is the column `loss` of such lines.

    Steps are updates. What was written of updates that will be done again is not shown any more.
    """

    def __init__(self, directory: Path, update: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

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
