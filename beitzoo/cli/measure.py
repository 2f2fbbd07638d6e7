"""The commands about measurements: report, benchmark."""

from pathlib import Path
from typing import Annotated

import typer

from beitzoo.cli import extras
from beitzoo.errors import check
from beitzoo.files import full_path

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def report(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a training run: draw its log, and its confusions, into it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Receives plots/ and accuracy/; of measurements.")] = None,
    results: Annotated[Path, typer.Option(help="Folder whose CSV files are read, without RUN.")] = Path("results"),
) -> None:
    """Draw a training run, or what was measured.

    Of measurements: accuracy against speed, and the ratio to each peer; the published accuracies are written as tables.
    """
    check((run is None) != (out is None), "Give either the folder of a run, or --out FOLDER for pictures of results.")
    extras.require("plots", "matplotlib")
    if run is not None:
        from beitzoo.training.report import draw_run

        paths = draw_run(run)
    else:
        from beitzoo.measure.report import write_report

        assert out is not None
        paths = write_report(full_path(results), full_path(out))
    for path in paths:
        print(path)


# The flags of the benchmark are its own business.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def benchmark(context: typer.Context) -> None:
    """Time models, by the flags of timm's benchmark.py."""
    from beitzoo.measure.benchmark import main

    raise typer.Exit(main(context.args))
