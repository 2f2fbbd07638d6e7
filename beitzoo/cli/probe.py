"""The command probe."""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from beitzoo.cli import extras
from beitzoo.cli.embed import block_numbers
from beitzoo.cli.measured import is_clean, list_failures
from beitzoo.cli.models import AsJson
from beitzoo.cli.networks import fastest, load_networks
from beitzoo.cli.probe_data import Data
from beitzoo.cli.records import Running, takes_records
from beitzoo.errors import InvalidValueError, check, closest

if TYPE_CHECKING:
    from beitzoo.evaluation.probe import Probing
    from beitzoo.evaluation.probe_rows import LabelledData, Probed
    from beitzoo.inference.pipeline import Loading
    from beitzoo.results import Row

Choice = TypeVar("Choice", bound=str)

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.


@dataclass(frozen=True)
class Asked:
    """What is probed, and how.

    Attributes:
        blocks: Whose output.
        poolings: Which features of each block.
        probes: Which probes.
        neighbours: Of the kNN probe.
    """

    blocks: Annotated[
        str | None, typer.Option(help="Such as 2,5,-1: counted from 0, negative from the end; all if not given.")
    ] = None
    poolings: Annotated[
        str | None,
        typer.Option("--pooling", help="Of mean, class and both, with commas; mean,class if not given (joint: both)."),
    ] = None
    probes: Annotated[
        str,
        typer.Option(
            help="Of linear (L-BFGS), ridge (closed form), joint (as in BEiT: one of each block, trained together) "
            "and knn, with commas."
        ),
    ] = "linear,knn"
    neighbours: Annotated[int, typer.Option(min=1, help="Of the kNN probe.")] = 20

    def probing(self, loading: "Loading") -> "Probing":
        """As probes take it."""
        from beitzoo.evaluation.probe import PROBES, Probing
        from beitzoo.inference.embed import POOLINGS

        return Probing(
            block_numbers(self.blocks),
            None if self.poolings is None else _chosen("--pooling", self.poolings, POOLINGS),
            self.neighbours,
            loading,
            _chosen("--probes", self.probes, PROBES),
        )


@dataclass(frozen=True)
class Output:
    """What is kept of probes, beside what is printed.

    Attributes:
        results_file: Table of rows.
        picture: Accuracy by block.
        keep_features: Features with their classes.
        as_json: Print rows as JSON.
    """

    results_file: Annotated[
        Path | None, typer.Option(help="Append rows to this CSV; what it has already is not measured again.")
    ] = None
    picture: Annotated[Path | None, typer.Option(help="Draw accuracy by block: .png, .svg or .pdf.")] = None
    keep_features: Annotated[
        Path | None, typer.Option(help="Write the features, .npz or .parquet, for --features; of one model.")
    ] = None
    as_json: AsJson = False

    def check(self, models: Sequence[str]) -> None:
        """Refuse what cannot be written, before anything is measured."""
        from beitzoo.evaluation.probe_picture import check_picture
        from beitzoo.inference.feature_files import check_name

        if self.picture is not None:
            check_picture(self.picture)
        if self.keep_features is not None:
            check_name(self.keep_features)
            alone = self.keep_features.suffix.lower() == ".npy"
            check(not alone, f"--keep-features {self.keep_features}: .npy has no classes; take .npz or .parquet.")
            check(len(models) == 1, "--keep-features is one file; name the one model whose features it shall have.")


@takes_records
def probe(
    data: Data,
    models: Annotated[list[str] | None, typer.Argument(help="Model names, or folders of models.")] = None,
    asked: Asked = Asked(),
    output: Output = Output(),
    running: Running = Running(),  # noqa: B008 - a frozen record
) -> None:
    """Measure frozen features: linear and kNN probes of each block.

    Features are the mean of a block's patch tokens, its class token, or both side by side. Per cent of images whose
    class is right; the best block is chosen by other images than it is measured on. An unreadable image is listed and
    not counted, and the exit code is then 1. Features are computed once for all probes, and kept if --keep-features
    says so. A file made by embed has the parts of its images if they were in folders train, val and test.
    """
    extras.require("train", "accelerate", "sklearn")
    from beitzoo.evaluation.probe_picture import draw_probes
    from beitzoo.evaluation.probe_rows import COLUMNS, KEY, of_file, probe_rows
    from beitzoo.results import Table as Rows

    named = models or []
    check(running.checkpoint is None or len(named) == 1, "--checkpoint is one file; name the one model that it is of.")
    check(
        bool(named) != bool(data.features),
        "Give models with --data, or a file of --features without models; it is of one already.",
    )
    output.check(named)
    kept = Rows(output.results_file, COLUMNS, KEY)
    kept.check()
    probing = asked.probing(running.loading)
    rows: list[Row] = []
    failures: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is listed
        if data.features is not None:
            labelled, table = data.load_features(data.features)
            print("\n".join(labelled.describe()), file=sys.stderr)
            rows, failures = probe_rows(of_file(data.features, table, probing), labelled, probing, kept)
        else:
            for probed, labelled in _networks(named, data, probing, running, output.keep_features):
                found, failed = probe_rows(probed, labelled, probing, kept)
                rows += found
                failures += failed
    list_failures(failures)
    if output.picture is not None:
        draw_probes(rows, output.picture)
    if output.as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print_tables(rows)
    if not all(map(is_clean, rows)):
        raise typer.Exit(1)


def _networks(
    names: Sequence[str], data: Data, probing: "Probing", running: Running, keep: Path | None
) -> "Iterator[tuple[Probed, LabelledData]]":
    """Load one network after the other."""
    from beitzoo.evaluation.probe_rows import of_network, seen_in_training
    from beitzoo.evaluation.subjects import Origin
    from beitzoo.factory import look_up
    from beitzoo.measure.options import usable_device

    checkpoint, where = running.checkpoint, usable_device(running.device)
    for name in names:
        look_up(name)  # what is misspelt is said before anything is measured
    labelled = data.load()
    split = labelled.split
    print("\n".join(labelled.describe()), file=sys.stderr)
    for name in tqdm(names, unit="model", disable=None):
        ((_, model),) = load_networks([name], checkpoint, where).items()
        network, origin = model.backbone, Origin(name, checkpoint)
        if note := seen_in_training(origin, labelled):
            print(note, file=sys.stderr)
        count = len(split.train) + len(split.val) + len(split.test)
        (network,) = fastest([network], count, running.batch_size, running.optimized)
        yield of_network(network, origin, labelled, probing, keep), labelled


def _chosen(option: str, given: str, known: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices that are written with commas, each once."""
    words = [word.strip() for word in given.split(",")]
    found = [choice for word in words for choice in known if choice == word]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise InvalidValueError(f"{option} {given}: there is no {unknown[0]!r}; {closest(unknown[0], known)}")
    return tuple(dict.fromkeys(found))


def _print_tables(rows: Sequence["Row"]) -> None:
    """Print a table for each model: a line per block, a column per feature and probe, and which is best."""
    from beitzoo.evaluation.probe_rows import best_rows, block_name

    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        kinds = list(dict.fromkeys((row["pooling"], row["probe"]) for row in own))
        table = Table("block", *(f"{pooling}, {probe}" for pooling, probe in kinds), box=None, pad_edge=False)
        values = {(block_name(row), row["pooling"], row["probe"]): float(row["top1"] or 0) for row in own}
        for block in dict.fromkeys(map(block_name, own)):
            table.add_row(block, *(f"{values[block, *kind]:.2f}" for kind in kinds))
        print(f"{model}: top-1 of {own[0]['count']} images, fitted on {own[0]['train_count']}")
        Console().print(table)
        for best in best_rows(own):
            block = block_name(best)
            named = block if block == "output" else f"block {block}"
            where = f"{named}, {best['pooling']}: {float(best['top1'] or 0):.2f}"
            print(f"Best {best['probe']} probe, chosen by {best['val_count']} other images: {where}")
