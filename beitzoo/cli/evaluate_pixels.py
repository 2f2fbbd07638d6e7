"""The command evaluate, of segmentation models: what it is measured by, and what it writes."""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from beitzoo.cli import extras
from beitzoo.cli.measured import Output, comment
from beitzoo.cli.networks import load_segmenter
from beitzoo.cli.segment import Looking
from beitzoo.errors import InvalidValueError, check

if TYPE_CHECKING:
    from beitzoo.evaluation.segmentation import SegmenterEvaluation
    from beitzoo.images.masked_sets import MaskedSet
    from beitzoo.models.segmentation import Segmenter

# Classes that a terminal has lines for.
_MOST_PRINTED = 30


@dataclass(frozen=True)
class Masks:
    """What a segmentation model is measured by, and where the details go.

    Attributes:
        classes: Names of the classes of the masks.
        reduce_zero_label: Number 0 stands for no class.
        ignore: Numbers that stand for no class.
        recipe: Says all this, and colours of masks in colour.
        per_class: Receives a row for each class.
        confusion: Receives a picture.
    """

    classes: Annotated[
        str | None, typer.Option(help="Of masks: 'ade20k', or names with commas; a classes.txt in the data by default.")
    ] = None
    reduce_zero_label: Annotated[
        bool | None,
        typer.Option(
            "--reduce-zero-label/--keep-zero-label",
            help="Number 0 in masks is no class, 1 the first; by default with --classes ade20k.",
        ),
    ] = None
    ignore: Annotated[str | None, typer.Option(help="Numbers in masks that are no class, such as 11 or 0,11.")] = None
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe, or a run's recipe.toml, whose task.labels say what masks stand for; a run's own by default."
        ),
    ] = None
    per_class: Annotated[Path | None, typer.Option(help="Write a row for each class of pixels to this CSV.")] = None
    confusion: Annotated[Path | None, typer.Option(help="Draw which classes are taken for which: PNG, SVG, PDF.")] = (
        None
    )

    def load(self, data: str, models: Sequence[str]) -> "MaskedSet":
        """Find the images and masks, which stand for what is said, or else for what they did in the models' own runs.

        Raises:
            UserError: There are none, or nothing says what their classes are.
        """
        from beitzoo.files import full_path
        from beitzoo.images.masked_sets import LabelOptions, find_masked_images, guess_masked_source

        path = full_path(data)
        return find_masked_images(guess_masked_source(path), path, LabelOptions(**self._said(models)))

    def _said(self, models: Sequence[str]) -> dict[str, Any]:
        """Say what masks stand for: the fields of `LabelOptions`."""
        says_nothing = (self.classes, self.reduce_zero_label, self.ignore) == (None, None, None)
        if self.recipe is None and says_nothing and (own := _labels_of_runs(models)) is not None:
            return own
        if self.recipe is not None:
            check(
                says_nothing,
                "--recipe says what masks stand for; leave --classes, --reduce-zero-label and --ignore out.",
            )
            return _labels_of(self.recipe)
        is_ade20k = self.classes == "ade20k"
        names = None if self.classes is None else tuple(name.strip() for name in self.classes.split(","))
        return {
            "classes": "ade20k" if is_ade20k else names,
            "reduce_zero_label": is_ade20k if self.reduce_zero_label is None else self.reduce_zero_label,
            "ignore": self._ignored(),
        }

    def _ignored(self) -> list[int]:
        try:
            return [] if self.ignore is None else [int(number) for number in self.ignore.split(",")]
        except ValueError as error:
            raise InvalidValueError(f"--ignore {self.ignore!r} are no numbers; write some such as 0,11.") from error

    @property
    def wants_details(self) -> bool:
        """Whether more than a row is asked for."""
        return self.per_class is not None or self.confusion is not None

    def check(self, models: int) -> None:
        """Make sure, before anything is measured, that the details can be written."""
        from beitzoo.evaluation.confusion_picture import check_picture

        check(
            models == 1 or not self.wants_details,
            "--per-class and --confusion are of one model; name one.",
        )
        if self.confusion is not None:
            extras.require("plots", "matplotlib")
            check_picture(self.confusion)

    def write(self, evaluation: "SegmenterEvaluation") -> None:
        """Write the details of a measurement."""
        from beitzoo.evaluation.confusion import CLASS_COLUMNS, class_rows
        from beitzoo.evaluation.confusion_picture import write_confusion
        from beitzoo.files import full_path, write_text
        from beitzoo.results import csv_text

        if evaluation.matrix is None:
            return
        if self.per_class is not None:
            rows = class_rows(evaluation.matrix, evaluation.names)
            write_text(full_path(self.per_class), csv_text(CLASS_COLUMNS, rows))
        if self.confusion is not None:
            row = evaluation.row
            title = f"{row['model']}: mIoU {row['miou']:.2f}, {row['count']} images"
            write_confusion(
                full_path(self.confusion), evaluation.matrix.counts.numpy(force=True), evaluation.names, title
            )


def _labels_of(recipe: str) -> dict[str, Any]:
    """Return what a recipe says of masks."""
    from beitzoo.training.recipe import load_recipe
    from beitzoo.training.segment_sections import TrainSegmenter

    found = load_recipe(recipe, kind="segment")
    check(isinstance(found.task, TrainSegmenter), f"{recipe} trains no segmentation model; give a recipe that does.")
    assert isinstance(found.task, TrainSegmenter)
    return found.task.labels.model_dump()


def _labels_of_runs(models: Sequence[str]) -> dict[str, Any] | None:
    """Return what the recipes of the runs that trained these models say of masks; None if there are none.

    Raises:
        InvalidValueError: They say different things.
    """
    recipes = [str(path) for model in models if (path := _recipe_of_run(model)) is not None]
    found = [_labels_of(path) for path in recipes]
    if not found:
        return None
    check(
        all(one == found[0] for one in found),
        "The runs of these models read masks in different ways; say by --recipe, or by --classes, --ignore and "
        "--reduce-zero-label, what the masks stand for here.",
    )
    said = [f"{name} {value}" for name, value in found[0].items() if value]
    if said:
        print(f"Masks are read as by {recipes[0]}: {', '.join(said)}.", file=sys.stderr)
    return found[0]


def _recipe_of_run(model: str) -> Path | None:
    """Return the recipe of the run whose folder, or best or last model, that is."""
    from beitzoo.factory import look_up
    from beitzoo.training.folder import RECIPE
    from beitzoo.zoo.checkpoints import LocalFile

    pretrained = look_up(model).pretrained
    sources = () if pretrained is None else pretrained.sources
    files = [source.path.absolute() for source in sources if isinstance(source, LocalFile)]
    recipes = [folder / RECIPE for file in files for folder in file.parents[:2]]
    return next((path for path in recipes if path.is_file()), None)


def are_segmenters(models: Sequence[str]) -> bool:
    """Tell whether all these are segmentation models, before anything of them is downloaded.

    Raises:
        UserError: A name is unknown, or only some are.
    """
    from beitzoo.factory import look_up
    from beitzoo.zoo.checkpoints import Segment

    of_pixels = []
    for name in models:
        pretrained = look_up(name).pretrained
        of_pixels.append(pretrained is not None and isinstance(pretrained.head, Segment))
    check(
        all(of_pixels) or not any(of_pixels),
        "Only some of these are segmentation models, and no data measures both kinds. Evaluate each kind alone.",
    )
    return any(of_pixels)


def evaluate_segmenters(
    models: Sequence[str], data: str, masks: Masks, looking: Looking, output: Output
) -> "Sequence[SegmenterEvaluation]":
    """Measure segmentation models; each row is written and printed when it is measured."""
    from beitzoo import results
    from beitzoo.evaluation.segmentation import COLUMNS, KEY, PlannedSegmenter
    from beitzoo.evaluation.subjects import Origin
    from beitzoo.evaluation.sweep import run_sweep
    from beitzoo.measure.options import usable_device
    from beitzoo.training.collect import summarise_models

    running, options = output.running, looking.options
    masks.check(len(models))
    kept = results.Table(output.results_file, COLUMNS, KEY)
    kept.check()
    where = usable_device(running.device)
    masked = masks.load(data, models)
    print("\n".join(masked.describe()), file=sys.stderr)

    def plan(name: str) -> PlannedSegmenter:
        def load() -> "Segmenter":
            return load_segmenter(name, running.checkpoint, where)[1]

        origin = Origin(name, running.checkpoint)
        return PlannedSegmenter(
            origin, masked, data, options, running.workers, load, where, optimized=running.optimized
        )

    evaluations: list[SegmenterEvaluation] = []
    sweep = run_sweep(
        [plan(name) for name in models], kept, retry_failed=output.retry_failed, again=masks.wants_details
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        for evaluation, was_there in sweep:
            evaluations.append(evaluation)
            masks.write(evaluation)
            if evaluation.row.get("error"):
                print(f"{evaluation.row['model']}: failed: {evaluation.row['error']}", file=sys.stderr)
            elif not output.as_json:
                _print(evaluation, f", in {kept.path} already" * was_there)
    comment(evaluations)
    rows = [evaluation.row for evaluation in evaluations]
    if output.as_json:
        print(json.dumps(rows, indent=2))
    else:
        for line in summarise_models(rows, "miou", "mIoU"):
            print(line)
    return evaluations


def _print(evaluation: "SegmenterEvaluation", addition: str) -> None:
    """Print the scores of one model, and those of its classes if they are few."""
    from beitzoo.evaluation.confusion import class_rows

    row = evaluation.row
    scores = ", ".join(
        f"{name} {float(row[column] or 0):.2f}"
        for name, column in (("mIoU", "miou"), ("mAcc", "macc"), ("aAcc", "aacc"))
    )
    print(f"{row['model']}: {scores} ({row['count']} images, {row['failures']} failures{addition})", flush=True)
    if evaluation.matrix is None or len(evaluation.names) > _MOST_PRINTED:
        return
    table = Table("class", "IoU", "Acc", "pixels", "predicted", box=None, pad_edge=False)
    for one in class_rows(evaluation.matrix, evaluation.names):
        shares = ["" if one[name] is None else f"{one[name]:.2f}" for name in ("iou", "acc")]
        table.add_row(str(one["class"]), *shares, f"{one['pixels']:,}", f"{one['predicted_pixels']:,}")
    Console().print(table)
