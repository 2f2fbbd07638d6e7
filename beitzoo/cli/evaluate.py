"""The command evaluate."""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from beitzoo.cli.models import AsJson
from beitzoo.cli.networks import load_networks
from beitzoo.cli.records import Running, takes_records
from beitzoo.errors import check

if TYPE_CHECKING:
    from beitzoo.evaluation.evaluate import Evaluation
    from beitzoo.results import Row

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

# Unreadable images that are listed for one model.
_MOST_LISTED = 20


@takes_records
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model names, or folders of models.")],
    data: Annotated[
        str, typer.Option(help="'digits', class folders, or tables; images a run was trained on are left out.")
    ],
    split_seed: Annotated[
        int | None, typer.Option(help="Use the third of the digits that this seed holds out.")
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Append a row per model to this CSV.")] = None,
    running: Running = Running(),  # noqa: B008 - a frozen record
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 accuracy.

    Of several models also mean and standard deviation. An unreadable image is listed and not counted, and the
    exit code is then 1.
    """
    from beitzoo import results
    from beitzoo.evaluation.evaluate import COLUMNS, Subject, load_data
    from beitzoo.evaluation.evaluate import evaluate as evaluate_one
    from beitzoo.factory import look_up
    from beitzoo.measure.options import usable_device

    check(running.checkpoint is None or len(models) == 1, "--checkpoint is one file; name the one model that it is of.")
    kept = results.Table(results_file, tuple(COLUMNS))
    kept.check()
    where = usable_device(running.device)
    for name in models:
        look_up(name)  # what is misspelt is said before anything is measured
    images = load_data(data)
    print("\n".join(images.describe()), file=sys.stderr)
    evaluations = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        for name in tqdm(models, unit="model", disable=None):
            ((_, model),) = load_networks([name], running.checkpoint, where).items()
            subject = Subject(model, name, running.checkpoint)
            evaluations.append(evaluate_one(subject, images, data, split_seed, running.loading))
            kept.append(evaluations[-1].row)
    rows = [evaluation.row for evaluation in evaluations]
    _comment(evaluations)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    if any(evaluation.failures for evaluation in evaluations):
        raise typer.Exit(1)


def _comment(evaluations: Sequence["Evaluation"]) -> None:
    """Say on stderr what was measured, and which images could not be; each once for all models."""
    for note in dict.fromkeys(note for evaluation in evaluations for note in evaluation.notes):
        print(note, file=sys.stderr)
    list_failures([failure for evaluation in evaluations for failure in evaluation.failures])


def list_failures(failures: Sequence[tuple[str, str]]) -> None:
    """Say on stderr which images were not counted, and why; each once."""
    failures = list(dict.fromkeys(failures))
    for image, reason in failures[:_MOST_LISTED]:
        print(f"Not counted: {image}: {reason}", file=sys.stderr)
    if len(failures) > _MOST_LISTED:
        print(f"Not counted: {len(failures) - _MOST_LISTED:,} more", file=sys.stderr)


def _print_table(rows: Sequence["Row"]) -> None:
    from beitzoo.evaluation.evaluate import summarise

    table = Table("model", "top1", "top5", "images", "failures", box=None, pad_edge=False)
    for row in rows:
        top5 = "" if row["top5"] is None else f"{row['top5']:.2f}"
        table.add_row(str(row["model"]), f"{row['top1']:.2f}", top5, str(row["count"]), str(row["failures"]))
    Console().print(table)
    if len(rows) > 1:
        print(summarise(rows))
