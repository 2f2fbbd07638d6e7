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

from beitzoo.cli.evaluate_pixels import Masks, Output, are_segmenters, comment, evaluate_segmenters
from beitzoo.cli.models import AsJson
from beitzoo.cli.networks import load_networks
from beitzoo.cli.records import Running, takes_records
from beitzoo.cli.segment import Looking
from beitzoo.errors import check

if TYPE_CHECKING:
    from beitzoo.evaluation.evaluate import Evaluation
    from beitzoo.evaluation.segmentation import SegmenterEvaluation
    from beitzoo.results import Row

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


@takes_records
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model names, or folders of models.")],
    data: Annotated[
        str,
        typer.Option(
            help="'digits', class folders, tables, or images with masks; images a run was trained on are left out."
        ),
    ],
    split_seed: Annotated[
        int | None, typer.Option(help="Use the third of the digits that this seed holds out.")
    ] = None,
    looking: Looking = Looking(),  # noqa: B008 - a frozen record
    masks: Masks = Masks(),  # noqa: B008 - a frozen record
    results_file: Annotated[Path | None, typer.Option(help="Append a row per model to this CSV.")] = None,
    running: Running = Running(),  # noqa: B008 - a frozen record
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 accuracy, or of segmentation models mIoU, mAcc and aAcc.

    Of several models also mean and standard deviation. An unreadable image or mask is listed and not counted, and the
    exit code is then 1. Segmentation models have --mode, --short-side, --stride, --scales and --flip as in `beitzoo
    segment`, and all options of masks; --batch-size is of classifiers.
    """
    check(running.checkpoint is None or len(models) == 1, "--checkpoint is one file; name the one model that it is of.")
    evaluations: Sequence[Evaluation] | Sequence[SegmenterEvaluation]
    if are_segmenters(models):
        check(split_seed is None, "--split-seed draws a part of the digits, which have no masks. Leave it out.")
        evaluations = evaluate_segmenters(models, data, masks, looking, Output(results_file, as_json, running))
    else:
        check(
            (looking, masks) == (Looking(), Masks()),
            f"{models[0]} is no segmentation model: --mode, --short-side, --stride, --scales, --flip and what is said "
            "of masks are for those. Leave them out.",
        )
        evaluations = _evaluate_classifiers(models, data, split_seed, Output(results_file, as_json, running))
    if any(evaluation.failures for evaluation in evaluations):
        raise typer.Exit(1)


def _evaluate_classifiers(
    models: Sequence[str], data: str, split_seed: int | None, output: Output
) -> "Sequence[Evaluation]":
    from beitzoo import results
    from beitzoo.evaluation.evaluate import COLUMNS, Subject, load_data
    from beitzoo.evaluation.evaluate import evaluate as evaluate_one
    from beitzoo.measure.options import usable_device

    running = output.running
    kept = results.Table(output.results_file, tuple(COLUMNS))
    kept.check()
    where = usable_device(running.device)
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
    comment(evaluations)
    if output.as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return evaluations


def _print_table(rows: Sequence["Row"]) -> None:
    from beitzoo.evaluation.evaluate import summarise

    table = Table("model", "top1", "top5", "images", "failures", box=None, pad_edge=False)
    for row in rows:
        top5 = "" if row["top5"] is None else f"{row['top5']:.2f}"
        table.add_row(str(row["model"]), f"{row['top1']:.2f}", top5, str(row["count"]), str(row["failures"]))
    Console().print(table)
    if len(rows) > 1:
        print(summarise(rows))
