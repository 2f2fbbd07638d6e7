"""The command finetune."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.cli import training
from beitzoo.cli.records import takes_records
from beitzoo.errors import check

if TYPE_CHECKING:
    from beitzoo.training.recipe import Recipe
    from beitzoo.training.run import Prepare

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


@dataclass(frozen=True)
class Start:
    """What is trained, and on what, besides or instead of a recipe.

    Attributes:
        data: The images.
        model: The model.
        checkpoint: Its weights.
    """

    data: Annotated[
        str | None,
        typer.Option(help="Images: class folders, perhaps in train, val and test; a CSV of path and label(s); tables."),
    ] = None
    model: Annotated[str | None, typer.Option(help="Model that is trained on them; a recipe is chosen to fit.")] = None
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from this file instead of the weights of the recipe's model.")
    ] = None


@takes_records
def finetune(
    out: training.OutFolder,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A TOML file, or the name of a packaged recipe, such as digits; or use --data and --model."
        ),
    ] = None,
    start: Start = Start(),
    settings: training.Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, by its own recipe.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that can be known, train one batch, and write nothing.")
    ] = False,
) -> None:
    """Train a classifier on your images, or any model by a recipe.

    With --data and --model a recipe is chosen, printed with its reasons, and kept in the run; first a probe says what
    frozen features reach. It is measured once on held-out images. The same command goes on with a run that was
    interrupted.
    """
    training.require_extras()
    given = [recipe, start.data, start.model, start.checkpoint, settings]
    told = False
    if resume:
        check(not any(given), "--resume goes on with the run in --out by its own recipe; leave out all but --out.")
        from beitzoo.training.own_images import resumed

        chosen = resumed(out)
    elif recipe is None:
        chosen, told = _planned(start, out, settings or (), dry_run)
    else:
        check(start.data is start.model is None, "Give a recipe, or --data and --model; --set changes a recipe.")
        from beitzoo.training.recipe import load_recipe

        chosen = load_recipe(recipe, settings or ())
        chosen = chosen if start.checkpoint is None else chosen.starting_from(start.checkpoint)
    if dry_run:
        _rehearse(chosen, out, told)
    else:
        _train(chosen, out, told)


def _planned(start: Start, out: Path, settings: Sequence[str], dry_run: bool) -> tuple["Recipe", bool]:
    """Choose a recipe and tell about it, or take that of the run in the folder; return it and whether all is told."""
    check(
        start.data is not None and start.model is not None,
        "Name what is trained and on what: --data PHOTOS --model NAME (`beitzoo list --pretrained`), or give a recipe.",
    )
    assert start.data is not None and start.model is not None
    from beitzoo.files import full_path
    from beitzoo.training.own_images import data_at, going_on, make_plan, tell
    from beitzoo.training.processes import Processes

    if start.checkpoint is not None:
        settings = [*settings, f"model.checkpoint={json.dumps(str(start.checkpoint), ensure_ascii=False)}"]
    data = data_at(start.data)
    there = going_on(start.model, data, full_path(out), settings)
    if there is not None:
        return there, False
    plan = make_plan(start.model, data, settings)
    if Processes.join().is_main:
        if dry_run:
            print("\n".join(plan.describe()), file=sys.stderr)
        else:
            tell(plan, full_path(out), probe=True)
    return plan.recipe, True


def _rehearse(recipe: "Recipe", out: Path, told: bool) -> None:
    from beitzoo.training.processes import Processes
    from beitzoo.training.rehearsal import rehearse

    rehearsal = rehearse(recipe, _prepare_of(recipe, told), out)
    if Processes.join().is_main:
        print("\n".join([*rehearsal.task.describe(), rehearsal.describe()]))
        print("Nothing was found that would stop this run; nothing was written.")


def _prepare_of(recipe: "Recipe", told: bool) -> "Prepare":
    if recipe.task.kind == "segment":
        from beitzoo.training.tasks.segment import prepare as prepare_segmenter

        return prepare_segmenter
    from beitzoo.training.tasks.finetune import prepare as prepare_classifier

    return partial(prepare_classifier, told=told)


def _train(recipe: "Recipe", out: Path, told: bool) -> None:
    if recipe.task.kind == "segment":
        from beitzoo.training.tasks.segment import train_segmenter

        training.train_by(recipe, out, train_segmenter)
    else:
        from beitzoo.training.tasks.finetune import finetune as train_classifier

        training.train_by(recipe, out, partial(train_classifier, told=told))
