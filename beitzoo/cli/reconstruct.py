"""The command reconstruct."""

import sys
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.errors import InvalidValueError, check

if TYPE_CHECKING:
    import torch

    from beitzoo.factory import Tokenizer
    from beitzoo.images.masks import Masking
    from beitzoo.models.mim import MaskedImageModel
    from beitzoo.zoo.networks import Pair

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

# Rows of one picture; each is about 250 pixels high.
_MOST = 64


def reconstruct(
    images: Annotated[list[str], typer.Argument(help="Files, folders or globs.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint of masked image modelling: a name, a folder or a run.")
    ],
    out: Annotated[Path, typer.Option(help="The picture, a PNG file.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Name, folder or run; by default the one that the model was trained with.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the masks.")] = 0,
    masked: Annotated[
        int | None, typer.Option(min=1, help="Patches to mask; by default as in the run, or 75 of 196.")
    ] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Draw what a model predicts for masked patches.

    A row of panels for each image: the image, the masked image, the predicted visual tokens and the image's own (as
    pixels or, where the tokenizer does not decode to pixels, as colours), and the loss of each masked patch. An image
    that cannot be read is listed, and the exit code is then 1.
    """
    from beitzoo.images.folders import LeftOut, find_images
    from beitzoo.inference.pipeline import Failure
    from beitzoo.inference.reconstruct import picture, reconstruct, write_picture
    from beitzoo.measure.options import usable_device

    check(out.suffix.lower() == ".png", f"--out {out} is not called like a PNG file; give a name that ends in .png.")
    left_out = LeftOut()
    paths = list(islice(find_images(images, left_out), _MOST + 1))
    check(len(paths) <= _MOST, f"One picture shows {_MOST} images at most, and there are more; name fewer.")
    network, codes, names = _load(model, tokenizer, usable_device(device))
    masking = _masking(model, network.backbone.config.grid_size, masked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        outcomes = reconstruct(network, codes, paths, masking, seed=seed)
    records = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
    if records:
        write_picture(picture(records, f"{names}, seed {seed}"), out)
    for record in records:
        print(record.describe())
    for line in left_out.describe():
        print(line, file=sys.stderr)
    failed = [(path, one.reason) for path, one in zip(paths, outcomes, strict=True) if isinstance(one, Failure)]
    for path, reason in failed:
        print(f"{path}: {reason}", file=sys.stderr)
    if failed:
        print(f"The picture is without {len(failed):,} of {len(paths):,} images.", file=sys.stderr)
        raise typer.Exit(1)


def _load(model: str, tokenizer: str | None, device: "torch.device") -> "tuple[MaskedImageModel, Tokenizer, str]":
    """Create both networks, and say which they are.

    Raises:
        InvalidValueError: The checkpoint has no head for visual tokens, or does not say what its tokenizer is.
    """
    from beitzoo.factory import create_model, create_tokenizer, look_up
    from beitzoo.models.mim import MaskedImageModel
    from beitzoo.zoo.checkpoints import Mim
    from beitzoo.zoo.pretrained import PRETRAINED
    from beitzoo.zoo.tokenizers import TOKENIZERS

    entry = look_up(model, head=Mim)
    head = entry.pretrained.head if entry.pretrained else None
    if not isinstance(head, Mim):
        able = ", ".join(name for name, row in PRETRAINED.items() if isinstance(row.head, Mim))
        raise InvalidValueError(
            f"{entry.name} has no head that predicts visual tokens. These have one: {able}; and so has the folder of a "
            "run of `beitzoo pretrain`."
        )
    chosen = tokenizer or head.tokenizer
    if chosen is None:
        raise InvalidValueError(
            f"{entry.name} does not say which tokenizer's codes it predicts. Name it with --tokenizer: "
            f"{', '.join(TOKENIZERS)}, or the folder of a run of `beitzoo train-tokenizer`."
        )
    network = create_model(model, pretrained=True, head="mim", device=device)
    assert isinstance(network, MaskedImageModel)
    return network, create_tokenizer(chosen, pretrained=True, device=device), f"model {model}, tokenizer {chosen}"


def _masking(model: str, grid: "Pair", masked: int | None) -> "Masking":
    """Return how patches are masked: as in the run, if the model is one's own, or else as BEiT does."""
    from beitzoo.files import full_path
    from beitzoo.images.masks import Masking
    from beitzoo.inference.reconstruct import default_masking
    from beitzoo.training.folder import RECIPE
    from beitzoo.training.pretrain_sections import Pretrain
    from beitzoo.training.recipe import read_resolved

    masking = default_masking(grid)
    recipe = full_path(model.removeprefix("local-dir:")) / RECIPE
    if recipe.is_file() and isinstance(task := read_resolved(recipe).task, Pretrain):
        masking = Masking(grid=grid, **task.mask.model_dump())
    return masking if masked is None else replace(masking, count=masked)
