"""What a run shows of itself: pictures of its log and of its answers on the held-out images, drawn from its files."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from beitzoo.errors import MissingFileError
from beitzoo.evaluation.answers import (
    Answers,
    read_class_names,
    read_confusion,
    write_answers,
    write_class_rows,
)
from beitzoo.evaluation.label_answers import LabelAnswers, write_label_answers, write_label_rows
from beitzoo.evaluation.mistakes import write_mistakes
from beitzoo.files import full_path, read_text
from beitzoo.images.image_set import ImageSet
from beitzoo.training.folder import LOG, METRICS, RECIPE
from beitzoo.training.recipe import read_resolved
from beitzoo.training.sections import Finetune

CURVES, CONFUSION, MISTAKES = "curves.png", "confusion.png", "mistakes.png"
ANSWERS, PER_CLASS = "answers.csv", "per_class.csv"

# A matrix of more classes than this is not drawn: its cells would be smaller than a pixel. `per_class.csv` says more.
_MOST_CLASSES = 1000


def can_draw() -> bool:
    """Tell whether the library that draws curves and matrices is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def describe_pictures(directory: Path) -> list[str]:
    """Say before a run which pictures it will lack, and how to get them."""
    if can_draw():
        return []
    return [
        f"{CURVES} and {CONFUSION} will be missing, as matplotlib is not installed. Install it with: pip install "
        f"'beitzoo[plots]'; if the run has ended by then, `beitzoo report {directory}` draws them."
    ]


def write_findings(directory: Path, answers: Answers | LabelAnswers, images: ImageSet) -> None:
    """Write what a classifier answered on the held-out images: `answers.csv`, `per_class.csv` and `mistakes.png`.

    Args:
        directory: The folder of the run.
        answers: All of them, one class of each image or several labels.
        images: The set that they are of.
    """
    if isinstance(answers, LabelAnswers):
        write_label_answers(directory / ANSWERS, answers, images)
        write_label_rows(directory / PER_CLASS, answers, images.names)
    else:
        write_answers(directory / ANSWERS, answers, images)
        write_class_rows(directory / PER_CLASS, answers, images.names)
    write_mistakes(directory / MISTAKES, answers, images)


def draw_run(directory: Path, metrics: Mapping[str, object] | None = None) -> list[Path]:
    """Draw `curves.png` of a run's log and, if it tells one class, `confusion.png`; return what was drawn.

    Several labels of an image are confused with nothing: `per_class.csv` says how well each is found.

    Args:
        directory: The folder of a run of any task, finished or not.
        metrics: What its `metrics.json` will hold; by default what it holds.

    Raises:
        MissingFileError: There is no run.
        InvalidValueError: One of its files is damaged.
    """
    from beitzoo.evaluation.confusion_picture import write_confusion
    from beitzoo.training.curves import write_curves

    directory = full_path(directory)
    if not (directory / RECIPE).is_file() or not (directory / LOG).is_file():
        raise MissingFileError(f"{directory} is no folder of a run: it lacks {RECIPE} or {LOG}. Give another one.")
    if metrics is None:
        metrics = json.loads(read_text(directory / METRICS)) if (directory / METRICS).is_file() else {}
    recipe = read_resolved(directory / RECIPE)
    title = f"{directory.absolute().name}: {recipe.task.kind}, {Path(recipe.model.name).name}"
    write_curves(directory / LOG, directory / CURVES, metrics, title)
    drawn = [directory / CURVES]
    several = isinstance(recipe.task, Finetune) and recipe.task.labels == "many"
    if (directory / ANSWERS).is_file() and not several:
        names = read_class_names(directory / PER_CLASS)
        counts = read_confusion(directory / ANSWERS, len(names)) if len(names) <= _MOST_CLASSES else None
        if counts is not None:
            total = int(counts.sum())
            right = f"{100 * counts.trace() / total:.1f} % of {total:,} held-out images are right"
            write_confusion(directory / CONFUSION, counts, names, right)
            drawn.append(directory / CONFUSION)
    return drawn
