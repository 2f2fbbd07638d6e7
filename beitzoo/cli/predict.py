"""The command predict."""

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.inference.rows import Form
from beitzoo.zoo.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from beitzoo.inference.classify import Tally

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


def predict_(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs; '-' reads files and folders from stdin, a line each. While the list goes "
            "on, rows come three batches behind it; -b 1 keeps that short."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"Model name, or local-dir:FOLDER; repeatable. If none: {DEFAULT_MODEL}"),
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 3,
    form: Annotated[Form, typer.Option("--format", help="Of the rows, which are written as they come.")] = Form.TABLE,
    output: Annotated[Path | None, typer.Option(help="Write to this file; until the end, to FILE.partial.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = 2,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Classify images. An unreadable one is a row with the reason, and exit code 1 at the end."""
    from beitzoo.factory import create_model
    from beitzoo.images.files import find_images
    from beitzoo.inference.classify import Tally, predict
    from beitzoo.inference.rows import open_output, write_rows
    from beitzoo.measure.options import usable_device
    from beitzoo.progress import watch

    where = usable_device(device)
    networks = {
        name: create_model(name, pretrained=True, device=where) for name in dict.fromkeys(models or [DEFAULT_MODEL])
    }
    total = None if "-" in images else len(networks) * sum(1 for _ in find_images(images))
    tally = Tally(predict(networks, _paths(images), topk=topk, batch_size=batch_size, workers=workers))
    unit = "image" if len(networks) == 1 else "row"
    rows_on_terminal = output is None and sys.stdout.isatty()
    with warnings.catch_warnings(), open_output(output) as file:
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is in its row
        write_rows(watch(tally, unit, total, bar=not rows_on_terminal), form, file, topk)
    _exit_with_one_if_failed(tally, unit)


def _exit_with_one_if_failed(tally: "Tally", unit: str) -> None:
    if not tally.rows:
        print("There were no images: nothing was listed on stdin.", file=sys.stderr)
    elif tally.failed:
        print(f"{tally.failed:,} of {tally.rows:,} {unit}s have no answer; each says why.", file=sys.stderr)
    if tally.failed or not tally.rows:
        raise typer.Exit(1)


def _paths(arguments: Iterable[str]) -> Iterator[Path]:
    """Find the images of all arguments; where one is '-', those named on stdin, read line by line as needed."""
    from beitzoo.images.files import find_images, images_at

    for argument in arguments:
        if argument == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            for line in filter(None, lines):
                yield from images_at(line)
        else:
            yield from find_images([argument])
