"""The command replay."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beitzoo.cli.training import require_extras

if TYPE_CHECKING:
    from beitzoo.training.processes import Processes
    from beitzoo.training.recipe import Recipe


def replay(
    run: Annotated[
        Path, typer.Argument(help="The folder of a run that ended with a loss or a metric that is not finite.")
    ],
) -> None:
    """Do the update or the validation again by which a run failed, and say where numbers end to be finite.

    The exit code is 1 if it does not fail again.
    """
    require_extras()
    from beitzoo.training.replay import replay as do_again

    result = do_again(run, _prepare)
    print("\n".join(result.describe()))
    if not result.failed:
        raise typer.Exit(1)


def _prepare(recipe: "Recipe", processes: "Processes") -> Any:
    """Make the task of a recipe; each kind has a module of its name."""
    return import_module(f"beitzoo.training.tasks.{recipe.task.kind}").prepare(recipe, processes)
