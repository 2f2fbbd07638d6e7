"""The command collect."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from beitzoo.cli.models import AsJson

if TYPE_CHECKING:
    from beitzoo.results import Row

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def collect(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, of any task.")],
    results_file: Annotated[
        Path | None, typer.Option(help="Put a row per run into this CSV; a run that it has already is replaced.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a table of finished runs.

    A row says what was trained, from what, at what cost, and how well it does; of runs that differ only in their seeds
    also mean and standard deviation. A folder without a finished run is told, and the exit code is then 1.
    """
    from beitzoo import results
    from beitzoo.training.collect import COLUMNS, KEY, UnfinishedError, read_run, row_of, summarise

    kept = results.Table(results_file, COLUMNS, KEY)
    kept.check()
    rows: list[Row] = []
    unfinished = []
    for folder in runs:
        try:
            rows.append(kept.replace(row_of(read_run(folder), str(folder))))
        except UnfinishedError as error:
            unfinished.append(f"Left out: {error}")
    if unfinished:
        print("\n".join(unfinished), file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
        for line in summarise(rows):
            print(line)
    if unfinished:
        raise typer.Exit(1)


def _print_table(rows: list["Row"]) -> None:
    """Print what any of the runs has, its name in full; decimals as a reader compares them."""
    columns = {"run": "run", "start": "from", "train_seconds": "seconds", "loss": "loss", "val_loss": "val loss"}
    columns |= {"token_accuracy": "tokens, %", "codes_used": "codes", "top1": "top1", "map": "mAP", "miou": "mIoU"}
    decimals = {"train_seconds": 0, "codes_used": 0, "loss": 4, "val_loss": 4}
    columns = {name: title for name, title in columns.items() if any(row[name] not in (None, "") for row in rows)}
    table = Table(box=None, pad_edge=False)
    for title in columns.values():
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row[name], decimals.get(name, 2)) for name in columns))
    Console().print(table)


def _shown(value: object, decimals: int) -> str:
    return f"{value:.{decimals}f}" if isinstance(value, float) else "" if value is None else str(value)
