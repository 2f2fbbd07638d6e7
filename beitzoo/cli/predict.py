"""The command predict."""

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.cli.inputs import count_listed, find_listed
from beitzoo.cli.networks import fastest, load_networks
from beitzoo.cli.records import Running, takes_records
from beitzoo.inference.rows import Form, choose_form
from beitzoo.zoo.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from beitzoo.images.folders import LeftOut
    from beitzoo.inference.classify import Tally

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

_NOBODY_NAMED = (
    f"No --model was named, so {DEFAULT_MODEL} answers, which reads handwritten digits and nothing else; 'beitzoo list "
    "--pretrained' shows all."
)


@takes_records
def predict_(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs; '-' reads files and folders from stdin, a line each. While the list goes "
            "on, rows come a batch behind it; -b 1 keeps that short."
        ),
    ],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"Model name or folder of a model; repeatable. If none: {DEFAULT_MODEL}"),
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 3,
    form: Annotated[
        Form | None, typer.Option("--format", help="Of the rows; by default as --output is named, or a table.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write to this file; until the end, to FILE.partial.")] = None,
    running: Running = Running(),  # noqa: B008 - a frozen record
) -> None:
    """Classify images. An unreadable one is a row with the reason, and exit code 1 at the end."""
    from beitzoo.images.folders import LeftOut
    from beitzoo.inference.classify import Tally, predict_each
    from beitzoo.inference.fastest import HANDFUL, count_ahead
    from beitzoo.inference.rows import open_output, write_rows
    from beitzoo.measure.options import usable_device
    from beitzoo.progress import watch

    form = choose_form(form, output)
    names = models or ([] if running.checkpoint else [DEFAULT_MODEL])
    networks = load_networks(names, running.checkpoint, usable_device(running.device))
    left_out = LeftOut()
    paths: Iterable[Path] = (path for _, path in find_listed(images, left_out))
    # What is listed on stdin may come slowly, so nobody waits to count it.
    count, paths = (HANDFUL + 1, paths) if "-" in images else count_ahead(paths)
    chosen = fastest(networks.values(), count, running.batch_size, running.optimized)
    faster = dict(zip(networks, chosen, strict=True))
    tally = Tally(predict_each(faster, paths, topk=topk, loading=running.loading))
    unit = "image" if len(networks) == 1 else "row"
    rows_on_terminal = output is None and sys.stdout.isatty()
    with warnings.catch_warnings(), open_output(output) as file:
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is in its row
        if not (models or running.checkpoint):
            print(_NOBODY_NAMED, file=sys.stderr)
        watched = watch(tally, unit, count_listed(images, len(networks)), bar=not rows_on_terminal)
        write_rows(watched, form, file, topk, rows_for_widths=min(running.batch_size, 16) * len(networks))
    _summarise(tally, unit, left_out)


def _summarise(tally: "Tally", unit: str, left_out: "LeftOut") -> None:
    """Say on stderr what has no row or no answer; exit with 1 if there was nothing, or something failed."""
    for line in left_out.describe():
        print(line, file=sys.stderr)
    if not tally.rows:
        print("There were no images: nothing was listed on stdin.", file=sys.stderr)
    elif tally.failed:
        print(f"{tally.failed:,} of {tally.rows:,} {unit}s have no answer; each says why.", file=sys.stderr)
    if tally.failed or not tally.rows:
        raise typer.Exit(1)
