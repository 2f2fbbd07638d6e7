"""The command probe."""

import json
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from beitzoo.cli import extras
from beitzoo.cli.evaluate_pixels import list_failures
from beitzoo.cli.models import AsJson
from beitzoo.cli.networks import load_networks
from beitzoo.cli.records import Running, takes_records
from beitzoo.errors import InvalidValueError, check

if TYPE_CHECKING:
    from beitzoo.evaluation.probe_rows import LabelledData
    from beitzoo.results import Row

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


@dataclass(frozen=True)
class Data:
    """Which labelled images probes are fitted on and measured on.

    Attributes:
        data: The data set.
        test_data: Held-out images; else they are a part of the data set.
        split_seed: Draws the held-out images, where the data has no part for them.
        train_per_class: Images of each class to fit on.
        train_images: Images to fit on in all.
        label_seed: Draws those.
    """

    data: Annotated[str, typer.Option(help="'digits', class folders, or tables of images in the hub's form.")]
    test_data: Annotated[
        Path | None,
        typer.Option(help="Images to measure on; else a part of the data, or a third drawn from it."),
    ] = None
    split_seed: Annotated[int, typer.Option(min=0, help="Draws the images to measure on, as in a recipe.")] = 0
    train_per_class: Annotated[int, typer.Option(min=0, help="Fit on only this many images of each class.")] = 0
    train_images: Annotated[int, typer.Option(min=0, help="Fit on only this many images in all.")] = 0
    label_seed: Annotated[int | None, typer.Option(min=0, help="Draws those; if not given, the split's seed does.")] = (
        None
    )

    def load(self) -> "LabelledData":
        """Find the images and split them, as a recipe would."""
        from beitzoo.evaluation.probe_rows import LabelledData
        from beitzoo.files import full_path
        from beitzoo.images.datasets import guess_source
        from beitzoo.training.data import load_images, split_images
        from beitzoo.training.sections import DataSection

        path = None if self.data == "digits" else full_path(self.data)
        section = DataSection(
            source="digits" if path is None else guess_source(path),
            path=path,
            test_path=self.test_data,
            split_seed=self.split_seed,
            train_per_class=self.train_per_class,
            label_seed=self.label_seed,
        )
        images = load_images(section)
        check(images.labels is not None, f"The images of {self.data} have no classes, which a probe tells apart.")
        # As of a recipe that says nothing else, so that fine-tuning and probes see the same images.
        split = split_images(images, section, test_fraction=1 / 3, val_fraction=0.1)
        if self.train_images:
            split = replace(split, train=self._draw(split.train))
        asked: Row = {
            "data": self.data,
            "test_data": None if self.test_data is None else str(self.test_data),
            "split_seed": self.split_seed,
            "train_per_class": self.train_per_class,
            "train_images": self.train_images,
            "label_seed": self.label_seed,
        }
        return LabelledData(images, split, asked)

    def _draw(self, indices: Sequence[int]) -> list[int]:
        seed = self.split_seed if self.label_seed is None else self.label_seed
        check(
            self.train_images <= len(indices),
            f"--train-images {self.train_images}, but there are {len(indices)} images to fit on; leave it out for all.",
        )
        return random.Random(seed).sample(list(indices), self.train_images)


@takes_records
def probe(
    models: Annotated[list[str], typer.Argument(help="Model names, or folders of models.")],
    data: Data,
    blocks: Annotated[
        str | None, typer.Option(help="Such as 2,5,-1: counted from 0, negative from the end; all if not given.")
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Of the kNN probe.")] = 20,
    results_file: Annotated[
        Path | None, typer.Option(help="Append rows to this CSV; what it has already is not measured again.")
    ] = None,
    running: Running = Running(),  # noqa: B008 - a frozen record
    as_json: AsJson = False,
) -> None:
    """Measure frozen features: a linear and a kNN probe of each block.

    Features are the mean of a block's patch tokens, or its class token. Per cent of images whose class is right; the
    best block is chosen by other images than it is measured on. An unreadable image is listed and not counted, and the
    exit code is then 1.
    """
    extras.require("train", "accelerate", "sklearn")
    from beitzoo.evaluation.evaluate import Subject
    from beitzoo.evaluation.probe import Probing
    from beitzoo.evaluation.probe_rows import COLUMNS, KEY, probe_rows, seen_in_training
    from beitzoo.factory import look_up
    from beitzoo.measure.options import usable_device
    from beitzoo.results import Table as Rows

    check(running.checkpoint is None or len(models) == 1, "--checkpoint is one file; name the one model that it is of.")
    kept = Rows(results_file, COLUMNS, KEY)
    kept.check()
    where = usable_device(running.device)
    probing = Probing(_numbers(blocks), neighbours=neighbours, loading=running.loading)
    for name in models:
        look_up(name)  # what is misspelt is said before anything is measured
    labelled = data.load()
    print("\n".join(labelled.describe()), file=sys.stderr)
    rows: list[Row] = []
    failures: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        for name in tqdm(models, unit="model", disable=None):
            ((_, model),) = load_networks([name], running.checkpoint, where).items()
            shown = name if running.checkpoint is None else str(running.checkpoint)
            if note := seen_in_training(Subject(model.backbone, name, running.checkpoint), labelled):
                print(note, file=sys.stderr)
            found, failed = probe_rows(model.backbone, shown, labelled, probing, kept)
            rows += found
            failures += failed
    list_failures(failures)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_tables(rows)
    if failures:
        raise typer.Exit(1)


def _numbers(blocks: str | None) -> list[int] | None:
    try:
        return None if blocks is None else [int(number) for number in blocks.split(",")]
    except ValueError as error:
        raise InvalidValueError(f"--blocks {blocks!r} are no numbers; write some such as 2,5,-1.") from error


def _print_tables(rows: Sequence["Row"]) -> None:
    """Print a table for each model: a line per block, a column per feature and probe, and which is best."""
    from beitzoo.evaluation.probe_rows import best_rows

    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        kinds = list(dict.fromkeys((row["pooling"], row["probe"]) for row in own))
        table = Table("block", *(f"{pooling}, {probe}" for pooling, probe in kinds), box=None, pad_edge=False)
        values = {(row["block"], row["pooling"], row["probe"]): float(row["top1"] or 0) for row in own}
        for block in dict.fromkeys(row["block"] for row in own):
            table.add_row(str(block), *(f"{values[block, *kind]:.2f}" for kind in kinds))
        print(f"{model}: top-1 of {own[0]['count']} images, fitted on {own[0]['train_count']}")
        Console().print(table)
        for best in best_rows(own):
            where = f"block {best['block']}, {best['pooling']}: {float(best['top1'] or 0):.2f}"
            print(f"Best {best['probe']} probe, chosen by {best['val_count']} other images: {where}")
