"""The command evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.cli.evaluate_images import Judged, evaluate_classifiers
from beitzoo.cli.evaluate_pixels import Masks, are_segmenters, evaluate_segmenters
from beitzoo.cli.measured import Output, is_clean
from beitzoo.cli.models import AsJson
from beitzoo.cli.networks import names_with_weights
from beitzoo.cli.records import Running, takes_records
from beitzoo.cli.segment import Looking
from beitzoo.errors import check

if TYPE_CHECKING:
    from beitzoo.evaluation.subjects import Evaluation

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


@dataclass(frozen=True)
class Rows:
    """What rows there are, and where they go.

    Attributes:
        model_list: More models, in a file.
        results_file: Receives the rows.
        retry_failed: Measure again what failed before.
    """

    model_list: Annotated[Path | None, typer.Option(help="File with a name or glob per line; # starts a comment.")] = (
        None
    )
    results_file: Annotated[
        Path | None, typer.Option(help="Append each row to this CSV; rows that it has are not measured again.")
    ] = None
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure again what failed before.")] = False


@takes_records
def evaluate(
    data: Annotated[
        str,
        typer.Option(
            help="'digits', class folders, tables, or images with masks; images a run was trained on are left out."
        ),
    ],
    models: Annotated[
        list[str] | None, typer.Argument(help="Names, globs such as 'beit_*_224', or folders of models.")
    ] = None,
    rows: Rows = Rows(),
    judged: Judged = Judged(),  # noqa: B008 - a frozen record
    looking: Looking = Looking(),  # noqa: B008 - a frozen record
    masks: Masks = Masks(),  # noqa: B008 - a frozen record
    running: Running = Running(),  # noqa: B008 - a frozen record
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 accuracy, or of segmentation models mIoU, mAcc and aAcc.

    Of models whose runs differ in their seeds only also mean and standard deviation. An unreadable image or mask is
    listed and not counted, and the exit code is then 1. A sweep that is stopped and started again with the same
    --results-file goes on; a model that fails in it is a row with an error. Segmentation models have --mode,
    --short-side, --stride, --scales and --flip as in `beitzoo segment`, and all options of masks; classifiers have
    --flip and --confusion of these, and --batch-size, --split-seed, --dtype, --crop, --sizes, --outputs and
    --real-labels.
    """
    names = names_with_weights(models or (), rows.model_list)
    check(running.checkpoint is None or len(names) == 1, "--checkpoint is one file; name the one model that it is of.")
    output = Output(rows.results_file, as_json, running, rows.retry_failed)
    if are_segmenters(names):
        check(
            judged == Judged(),
            "--split-seed, --dtype, --crop, --sizes, --outputs and --real-labels are for classifiers. Leave them out.",
        )
        measured: Sequence[Evaluation] = evaluate_segmenters(names, data, masks, looking, output)
    else:
        check(
            (replace(looking, flip=False), replace(masks, confusion=None)) == (Looking(), Masks()),
            f"{names[0]} is no segmentation model: --mode, --short-side, --stride, --scales and what is said of masks "
            "are for those. Leave them out.",
        )
        measured = evaluate_classifiers(names, data, judged, looking.flip, masks.confusion, output)
    if not all(is_clean(one.row) for one in measured):
        raise typer.Exit(1)
