"""What the commands that train have in common."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beitzoo.cli import extras

if TYPE_CHECKING:
    from beitzoo.training.recipe import Recipe

RecipeName = Annotated[str, typer.Argument(help="A TOML file, or the name of a packaged recipe, such as digits.")]
OutFolder = Annotated[Path, typer.Option(help="Receives checkpoints, log and metrics.json.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")]


def require_extras() -> None:
    """Say what must be installed to train."""
    extras.require("train", "accelerate", "sklearn")


def train_by(recipe: "Recipe", out: Path, train: Callable[["Recipe", Path], dict[str, Any]]) -> None:
    """Train and print the metrics; a run that was asked to stop says how to go on."""
    if recipe.run.tensorboard:
        extras.require("train", "tensorboard")
    from beitzoo.training.signals import Interrupted

    try:
        metrics = train(recipe, out)
    except Interrupted as stop:
        print(f"{stop} The same command goes on.", file=sys.stderr)
        raise typer.Exit(128 + stop.number) from None
    if metrics:  # of several processes the first has them
        print(json.dumps(metrics, indent=2))
