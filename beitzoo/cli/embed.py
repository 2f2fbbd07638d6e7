"""The command embed."""

import sys
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.cli.inputs import find_listed
from beitzoo.cli.measured import list_failures
from beitzoo.cli.networks import fastest, load_backbone
from beitzoo.cli.records import Running, takes_records
from beitzoo.errors import InvalidValueError, check
from beitzoo.zoo.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from beitzoo.images.folder_classes import ImageClasses
    from beitzoo.images.folders import LeftOut
    from beitzoo.inference.embed import Reading
    from beitzoo.inference.feature_files import Description, Failures
    from beitzoo.models.beit import Beit

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

_NOBODY_NAMED = (
    f"No --model was named, so {DEFAULT_MODEL} makes the features, which knows handwritten digits and nothing else; "
    "'beitzoo list --pretrained' shows all."
)


class Pooling(StrEnum):
    """How tokens become the feature of an image; see `inference.embed.Reading`."""

    POOLED = "pooled"
    MEAN = "mean"
    CLASS = "class"
    BOTH = "both"
    PATCHES = "patches"


class Precision(StrEnum):
    """How numbers are written."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Asked:
    """Which features, and how they are written.

    Attributes:
        pooling: How tokens become the feature of an image.
        blocks: Whose output, with commas.
        dtype: Of the numbers in the file.
    """

    pooling: Annotated[
        Pooling,
        typer.Option(
            help="What the head reads (pooled), mean of the patch tokens, class token, both side by side, or all patch "
            "tokens."
        ),
    ] = Pooling.POOLED
    blocks: Annotated[
        str | None,
        typer.Option(help="Read these blocks: 2,5,-1 from 0, negative from the end, or 'all'; else the network's end."),
    ] = None
    dtype: Annotated[Precision, typer.Option(help="Of the numbers in the file.")] = Precision.FLOAT32

    def description(self, name: str, network: "Beit", classes: "ImageClasses | None") -> "Description":
        """Return what the file says of all rows."""
        from beitzoo.inference.feature_files import Description

        reading = self.reading(network)
        return Description(
            model=name,
            pooling=reading.pooling,
            blocks=reading.numbers(network),
            shape=reading.shape(network),
            names=classes.names if classes else (),
            img_size=network.config.img_size,
            dtype=self.dtype.value,
        )

    def reading(self, network: "Beit") -> "Reading":
        """As the embedding takes it.

        Raises:
            InvalidValueError: Blocks are no numbers.
        """
        from beitzoo.inference.embed import Reading

        every = list(range(len(network.blocks)))
        return Reading(self.pooling.value, every if self.blocks == "all" else block_numbers(self.blocks))


@takes_records
def embed(
    images: Annotated[
        list[str],
        typer.Argument(help="Files, folders or globs; '-' reads files and folders from stdin, a line each."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="FILE.npz or FILE.parquet: features, paths, status, classes; or FILE.npy: features alone."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help=f"A name, a folder or a run. If none: {DEFAULT_MODEL}"),
    ] = None,
    asked: Asked = Asked(),
    running: Running = Running(),  # noqa: B008 - a frozen record
) -> None:
    """Write the features of images: a row for each, in their order, with its path and status.

    Of images in class folders, PLACE/CLASS/IMAGE, the classes are written too, for probe --features. An unreadable
    image is a row with the reason and without features (in .npy: NaN), and exit code 1 at the end. .npz and .npy are
    made in memory; .parquet is written as images are read. --pooling both --blocks all is what probes read.
    """
    from beitzoo.images.folder_classes import classes_by_folder
    from beitzoo.images.folders import LeftOut
    from beitzoo.inference.embed import embed_each
    from beitzoo.inference.feature_files import check_name, feature_rows, write_features
    from beitzoo.measure.options import usable_device
    from beitzoo.progress import watch

    check_name(out)
    name = model or str(running.checkpoint or DEFAULT_MODEL)
    if not (model or running.checkpoint):
        print(_NOBODY_NAMED, file=sys.stderr)
    network = load_backbone(name, running.checkpoint if model else None, usable_device(running.device))
    reading = asked.reading(network)
    left_out = LeftOut()
    listed = list(find_listed(images, left_out))
    check(bool(listed), "There are no images: nothing was listed on stdin. Give files or folders.")
    classes = classes_by_folder(listed)
    described = reading.describe(network)
    # Where both are given, the name is only that of the network.
    description = asked.description(str(running.checkpoint or name), network, classes)
    (network,) = fastest([network], len(listed), running.batch_size, running.optimized)
    embeddings = embed_each(network, (path for _, path in listed), reading, loading=running.loading)
    outcomes = ((one.features, one.error) for one in watch(embeddings, "image", len(listed)))
    rows = feature_rows(outcomes, (str(path) for _, path in listed), classes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is in its row
        failures = write_features(out, rows, len(listed), description)
    _summarise(out, description, f"{len(listed):,} rows, {described}", left_out, failures)


def _summarise(out: Path, description: "Description", rows: str, left_out: "LeftOut", failures: "Failures") -> None:
    """Say on stderr what was written, left out and not read; exit with 1 if anything was not read."""
    shape = " x ".join(map(str, description.shape))
    classes = f"{len(description.names):,} classes" if description.names else "no classes"
    for line in left_out.describe():
        print(line, file=sys.stderr)
    print(f"Wrote {out}: {rows}: {shape} {description.dtype}; {classes}.", file=sys.stderr)
    if not failures:
        return
    print(f"{len(failures):,} rows have no features; each says why.", file=sys.stderr)
    list_failures(failures)
    raise typer.Exit(1)


def block_numbers(blocks: str | None) -> list[int] | None:
    """Return the numbers in `2,5,-1`, or None without any.

    Raises:
        InvalidValueError: They are no numbers.
    """
    try:
        return None if blocks is None else [int(number) for number in blocks.split(",")]
    except ValueError as error:
        raise InvalidValueError(f"--blocks {blocks!r} are no numbers; write some such as 2,5,-1.") from error
