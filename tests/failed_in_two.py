"""A program in which two processes train until the loss is no number, with whole weights in each and with parts.

`python failed_in_two.py DATA OUT` fills `OUT/none` and `OUT/full`, called by `run.sharding`, with what such runs leave.
"""

import sys
from functools import partial
from pathlib import Path

from colours import colour_recipe
from forks import run_together

from beitzoo.training.failure import NonFiniteError
from beitzoo.training.recipe import Recipe
from beitzoo.training.tasks.finetune import finetune


def recipe_for(data: Path, sharding: str) -> Recipe:
    """A rate that grows until the numbers end, with a frozen block, a moving average and parts."""
    train = {"epochs": 4, "batch_size": 4, "lr": 1e20, "warmup_epochs": 4, "clip_grad": 0, "accumulation": 2}
    recipe = colour_recipe(data, {"log_updates": 9, "sharding": sharding}, ema_decay=0.5, **train)
    return Recipe.model_validate({**recipe.model_dump(), "task": {"kind": "finetune", "freeze_blocks": 1}})


def fail(data: Path, out: Path, sharding: str) -> None:
    """Train in this process, with the others."""
    try:
        finetune(recipe_for(data, sharding), out / sharding)
    except NonFiniteError as error:
        print(error)
    else:
        raise AssertionError("the loss stayed finite")


def main(data: str, out: str) -> None:
    sys.exit(max(run_together(partial(fail, Path(data), Path(out), one), 2) for one in ("none", "full")))


if __name__ == "__main__":
    main(*sys.argv[1:])
