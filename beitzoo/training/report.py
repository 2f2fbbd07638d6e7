"""What a run shows of itself: pictures of its log and of its answers on the held-out images, drawn from its files."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
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
from beitzoo.images.duplicates import near_duplicates
from beitzoo.images.image_set import ImageSet
from beitzoo.training.folder import LOG, METRICS, RECIPE
from beitzoo.training.recipe import read_resolved
from beitzoo.training.sections import Finetune

CURVES, CONFUSION, MISTAKES = "curves.png", "confusion.png", "mistakes.png"
ANSWERS, PER_CLASS = "answers.csv", "per_class.csv"

# A matrix of more classes than this is not drawn: its cells would be smaller than a pixel. `per_class.csv` says more.
_MOST_CLASSES = 1000

# Near duplicates are looked for among so many images at most: each is decoded once more, a few seconds of photographs.
_MOST_COMPARED = 3000


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


def describe_duplicates(images: ImageSet, train: Sequence[int], test: Sequence[int]) -> list[str]:
    """Say how many held-out images look like one that is trained on, where the images are few enough to be compared."""
    if len(train) + len(test) > _MOST_COMPARED:
        return []
    pairs = near_duplicates(images, train, test)
    if not pairs:
        return []
    names = " and ".join(images.identity(index)[0] for index in pairs[0])
    found = len({held_out for _, held_out in pairs})
    return [
        f"{found:,} of {len(test):,} held-out images look almost like one to train on, such as {names}: a model may "
        "know these by heart."
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
