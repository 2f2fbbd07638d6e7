"""The command tokenize."""

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.cli import training

if TYPE_CHECKING:
    import torch

    from beitzoo.inference.tokenize import TokenJob
    from beitzoo.training.recipe import Recipe

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def tokenize(
    recipe: training.RecipeName,
    views: Annotated[int, typer.Option(min=1, help="Views of each image; epoch e of a run uses view e modulo this.")],
    out: Annotated[Path, typer.Option(help="Receives views and visual tokens; task.tokens of a recipe.")],
    settings: training.Settings = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Views per forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Compute the visual tokens for pretraining once.

    The recipe is that of the pretraining: its data, views, tokenizer and seed. What is done stays when the command is
    stopped, and the same command goes on. Images that cannot be read are listed, and pretraining leaves them out.
    """
    training.require_extras()
    from beitzoo.inference.tokenize import tokenize as run
    from beitzoo.measure.options import usable_device
    from beitzoo.training.recipe import load_recipe

    chosen = load_recipe(recipe, settings or (), kind="pretrain")
    job = _job(chosen, views, usable_device(device))
    print("\n".join(job.images.describe()), file=sys.stderr)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        tokens = run(job, out, batch_size, chosen.run.workers)
    for one in tokens.unreadable:
        print(f"No tokens: {one.name}: {one.reason}", file=sys.stderr)
    size = sum(path.stat().st_size for path in tokens.folder.glob("*.npy"))
    print(json.dumps({"images": len(job.samples), "unreadable": len(tokens.unreadable), "views": views, "bytes": size}))


def _job(recipe: "Recipe", count: int, device: "torch.device") -> "TokenJob":
    """Return what pretraining by a recipe needs tokens of."""
    from beitzoo.factory import create_tokenizer
    from beitzoo.images.augment import TwoViews
    from beitzoo.inference.tokenize import TokenJob
    from beitzoo.training.data import load_images, split_images
    from beitzoo.training.pretrain_sections import Pretrain
    from beitzoo.training.tasks.pretrain import check_network

    assert isinstance(recipe.task, Pretrain)
    images = load_images(recipe.data)
    split = split_images(images, recipe.data, test_fraction=0.0, val_fraction=0.0)
    tokenizer = create_tokenizer(recipe.task.tokenizer, pretrained=True, device=device)
    check_network(recipe, tokenizer)
    drawn = recipe.task.views.model_dump(include={"scale", "ratio", "jitter", "hflip"})
    return TokenJob(
        tokenizer=tokenizer,
        name=recipe.task.tokenizer,
        images=images,
        samples=split.train,
        views=TwoViews(token_size=tokenizer.img_size, token_interpolation=tokenizer.interpolation, **drawn),
        seed=recipe.train.seed,
        count=count,
    )
