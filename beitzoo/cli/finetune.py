"""The command finetune."""

from pathlib import Path
from typing import Annotated

import typer

from beitzoo.cli import training

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def finetune(
    recipe: training.RecipeName,
    out: training.OutFolder,
    settings: training.Settings = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from this file instead of the weights of the recipe's model.")
    ] = None,
) -> None:
    """Train a classifier, or a segmentation model, by a recipe.

    It is measured once on held-out images. The same command goes on with a run that was interrupted.
    """
    training.require_extras()
    from beitzoo.training.recipe import load_recipe

    chosen = load_recipe(recipe, settings or ())
    if checkpoint is not None:
        chosen = chosen.starting_from(checkpoint)
    if chosen.task.kind == "segment":
        from beitzoo.training.tasks.segment import train_segmenter as train
    else:
        from beitzoo.training.tasks.finetune import finetune as train
    training.train_by(chosen, out, train)
