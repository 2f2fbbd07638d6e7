"""The command finetune."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from beitzoo.cli import extras

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def finetune(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a packaged recipe, such as digits.")],
    out: Annotated[Path, typer.Option(help="Receives checkpoints, log and metrics.json.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from this file instead of the weights of the recipe's model.")
    ] = None,
) -> None:
    """Train a classifier by a recipe.

    It is measured once on held-out images. The same command goes on with a run that was interrupted.
    """
    extras.require("train", "accelerate", "sklearn")
    from beitzoo.training.recipe import load_recipe
    from beitzoo.training.signals import Interrupted
    from beitzoo.training.tasks.finetune import finetune as train

    chosen = load_recipe(recipe, settings or ())
    if checkpoint is not None:
        chosen = chosen.starting_from(checkpoint)
    try:
        metrics = train(chosen, out)
    except Interrupted as stop:
        print(f"{stop} The same command goes on.", file=sys.stderr)
        raise typer.Exit(128 + stop.number) from None
    if metrics:  # of several processes the first has them
        print(json.dumps(metrics, indent=2))
