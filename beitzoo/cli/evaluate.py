"""The command evaluate."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from beitzoo.cli import extras
from beitzoo.cli.models import AsJson

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model names, or local-dir:FOLDER.")],
    data: Annotated[str, typer.Option(help="'digits' (its held-out third), or a folder of class folders (all).")],
    split_seed: Annotated[
        int | None, typer.Option(help="Which held-out third of the digits; by default the one the run held out.")
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Append a row per model to this CSV.")] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 accuracy; of several models also mean and standard deviation."""
    extras.require("train", "accelerate", "sklearn")
    from beitzoo import results
    from beitzoo.evaluation.evaluate import COLUMNS, accuracy_row, summarise
    from beitzoo.measure.options import usable_device

    kept = results.Table(results_file, tuple(COLUMNS))
    kept.check()

    rows = []
    for name in tqdm(models, unit="model", disable=None):
        row = accuracy_row(name, data, split_seed, usable_device(device))
        rows.append(kept.append(row))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("model", "top1", "top5", "images")
    for row in rows:
        table.add_row(str(row["model"]), f"{row['top1']:.2f}", f"{row['top5']:.2f}", str(row["count"]))
    Console().print(table)
    if len(rows) > 1:
        Console().print(summarise(rows))
