"""The command finetune."""

import json
from pathlib import Path
from typing import Annotated

import typer

from beitzoo.cli import extras

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def finetune(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, such as configs/finetune/digits.toml.")],
    out: Annotated[Path, typer.Option(help="Receives checkpoints, log and metrics.json.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
) -> None:
    """Train a classifier by a recipe and measure it once on held-out images."""
    extras.require("train", "accelerate", "sklearn")
    from beitzoo.training.recipe import load_recipe
    from beitzoo.training.tasks import finetune as task

    metrics = task.finetune(load_recipe(recipe, settings or ()), out)
    print(json.dumps(metrics, indent=2))
