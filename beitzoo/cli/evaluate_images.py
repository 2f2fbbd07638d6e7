"""The command evaluate, of classifiers: how they are measured, and what is written and printed."""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from beitzoo.cli import extras
from beitzoo.cli.measured import Output, comment
from beitzoo.cli.networks import load_networks
from beitzoo.errors import InvalidValueError, check

if TYPE_CHECKING:
    from beitzoo.evaluation.evaluate import ClassifierEvaluation, Dtype, Judging
    from beitzoo.models.beit import Beit
    from beitzoo.results import Row


class Crop(StrEnum):
    """Whose rule cuts a square out of an image."""

    TIMM = "timm"
    UNILM = "unilm"


class Outputs(StrEnum):
    """Which outputs compete."""

    AUTO = "auto"
    ALL = "all"
    DATA = "data"


@dataclass(frozen=True)
class Judged:
    """How classifiers are measured.

    Attributes:
        split_seed: Use the third of the digits that this seed holds out.
        dtype: What models compute in, with commas.
        crop: Whose rule cuts a square out of an image.
        sizes: Sides of the input, with commas.
        outputs: Which outputs compete.
        real_labels: Reassessed labels of ImageNet.
    """

    split_seed: Annotated[int | None, typer.Option(help="Use the third of the digits that this seed holds out.")] = None
    dtype: Annotated[
        str, typer.Option(help="What classifiers compute in; of several, such as float32,bfloat16,int8, a row each.")
    ] = "float32"
    crop: Annotated[
        Crop, typer.Option(help="timm: by the checkpoint's crop_pct; unilm: 0.875 below 384 pixels, else all.")
    ] = Crop.TIMM
    sizes: Annotated[
        str | None, typer.Option(help="Sizes to average over, such as 224,256 pixels; the model's own by default.")
    ] = None
    outputs: Annotated[
        Outputs,
        typer.Option(help="Outputs that compete: all, or of the data's classes; auto: these on ImageNet-A and -R."),
    ] = Outputs.AUTO
    real_labels: Annotated[
        str | None, typer.Option(help="ReaL labels of ImageNet's validation images: 'timm' for its list, or real.json.")
    ] = None

    def judging(self, flip: bool) -> "Judging":
        """As the evaluation takes them.

        Raises:
            InvalidValueError: Sizes are no numbers, or one is impossible.
        """
        from beitzoo.evaluation.evaluate import Judging
        from beitzoo.evaluation.looks import Looks
        from beitzoo.evaluation.truth import Labelling

        try:
            sizes = tuple(int(size) for size in self.sizes.split(",")) if self.sizes else ()
        except ValueError:
            raise InvalidValueError(
                f"--sizes {self.sizes}: these are no numbers; give pixels with commas, such as 224,256."
            ) from None
        looks = Looks(self.crop.value, sizes, flip)
        return Judging(looks, Labelling(self.outputs.value, self.real_labels), self.split_seed)

    def dtypes(self) -> "list[Dtype]":
        """Return what models compute in, each once.

        Raises:
            InvalidValueError: There is another.
        """
        from beitzoo.evaluation.evaluate import DTYPES

        words = list(dict.fromkeys(word.strip() for word in self.dtype.split(",")))
        unknown = [word for word in words if word not in DTYPES]
        check(not unknown, f"--dtype {', '.join(unknown)}: there are {', '.join(DTYPES)}; write some with commas.")
        return [dtype for word in words for dtype in DTYPES if dtype == word]


def evaluate_classifiers(
    models: Sequence[str], data: str, judged: Judged, flip: bool, confusion: Path | None, output: Output
) -> "list[ClassifierEvaluation]":
    """Measure classifiers; each row is written and told when it is measured, and not measured if it is there."""
    from beitzoo import results
    from beitzoo.evaluation.evaluate import COLUMNS, KEY, load_data
    from beitzoo.evaluation.sweep import Sweep, run_sweep
    from beitzoo.measure.options import usable_device

    running, judging, dtypes = output.running, judged.judging(flip), judged.dtypes()
    _check_confusion(confusion, len(models) * len(dtypes), judged)
    check(running.optimized or "int8" not in dtypes, "int8 is of the optimized copy alone; leave --no-optimize out.")
    kept = results.Table(output.results_file, tuple(COLUMNS), KEY)
    kept.check()
    where = usable_device(running.device)
    images = load_data(data, judging.labelling.real_labels)
    check(
        confusion is None or images.label_sets is None,
        "The images may have several labels each, which are confused with nothing; leave --confusion out.",
    )
    print("\n".join(images.describe()), file=sys.stderr)

    def load(name: str) -> "Beit":
        return load_networks([name], running.checkpoint, where)[name]

    asked = (models, dtypes, images, data, judging, load)
    planned = Sweep(*asked, running.checkpoint, where, running.loading, running.optimized).rows
    evaluations = []
    rows = run_sweep(planned, kept, retry_failed=output.retry_failed, again=confusion is not None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        for evaluation, was_there in tqdm(rows, "rows", len(planned), unit="row", disable=None):
            evaluations.append(evaluation)
            if len(planned) > 1 or was_there:
                tqdm.write(_line(evaluation.row, f" in {kept.path} already" * was_there), sys.stderr)
    comment(evaluations)
    if confusion is not None:
        _draw(confusion, evaluations[0])
    _print([evaluation.row for evaluation in evaluations], output.as_json)
    return evaluations


def _check_confusion(confusion: Path | None, rows: int, judged: Judged) -> None:
    """Make sure, before anything is measured, that the picture can be drawn."""
    from beitzoo.evaluation.confusion_picture import check_picture

    if confusion is None:
        return
    check(rows == 1, "--confusion is of one model in one --dtype; name one.")
    check(judged.real_labels is None, "With --real-labels an image has several classes; leave --confusion out.")
    extras.require("plots", "matplotlib")
    check_picture(confusion)


def _draw(path: Path, evaluation: "ClassifierEvaluation") -> None:
    from beitzoo.evaluation.confusion import count_answers
    from beitzoo.evaluation.confusion_picture import write_confusion
    from beitzoo.files import full_path

    counts, names = count_answers(evaluation.answers, evaluation.names)
    row = evaluation.row
    write_confusion(full_path(path), counts, names, f"{row['model']}: top-1 {row['top1']:.2f}, {row['count']} images")


def _line(row: "Row", addition: str) -> str:
    """Say in a line what a row is of, and what was found."""
    title = f"{row['model']} {row['dtype']}"
    name = _score(row)
    return f"{title}: failed: {row['error']}" if row.get("error") else f"{title}: {name} {row[name]}{addition}"


def _score(row: "Row") -> str:
    """Return the column that says how well a model does: top-1, or mean average precision of several labels."""
    return "top1" if row.get("map") in (None, "") else "map"


def _print(rows: Sequence["Row"], as_json: bool) -> None:
    from beitzoo.training.collect import summarise_models

    if as_json:
        print(json.dumps(rows, indent=2))
        return
    scored = ("map",) if any(_score(row) == "map" for row in rows) else ("top1", "top5", "ece")
    table = Table("model", "dtype", *scored, "images", "failures", box=None, pad_edge=False)
    for row in rows:
        scores = [f"{float(value):.2f}" if (value := row.get(name)) not in (None, "") else "" for name in scored]
        counts = [str(row.get("count") or 0), str(row.get("error") or row["failures"])]
        table.add_row(str(row["model"]), str(row["dtype"]), *scores, *counts)
    Console().print(table)
    for line in summarise_models(rows, scored[0]):
        print(line)
