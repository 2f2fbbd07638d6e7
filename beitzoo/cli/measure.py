"""The commands about measurements: report, benchmark."""

from pathlib import Path
from typing import Annotated

import typer

from beitzoo.cli import extras
from beitzoo.files import full_path

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def report(
    out: Annotated[Path, typer.Option(help="Receives plots/ and accuracy/.")],
    results: Annotated[Path, typer.Option(help="Folder whose CSV files are read.")] = Path("results"),
) -> None:
    """Draw what was measured.

    Accuracy against speed, and the ratio to each peer; the published accuracies are written as tables.
    """
    extras.require("plots", "matplotlib")
    from beitzoo.measure.report import write_report

    for path in write_report(full_path(results), full_path(out)):
        print(path)


# The flags of the benchmark are its own business.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def benchmark(context: typer.Context) -> None:
    """Time models, by the flags of timm's benchmark.py."""
    from beitzoo.measure.benchmark import main

    raise typer.Exit(main(context.args))
