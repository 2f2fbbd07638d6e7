"""Probes of each block as rows of a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from beitzoo.errors import check
from beitzoo.evaluation.features import POOLINGS, Features, extract_features, keep_features, kept_features
from beitzoo.evaluation.probe import PROBES, Findings, Probing, probe_features
from beitzoo.evaluation.subjects import Origin, fingerprint
from beitzoo.files import full_path
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.images.transforms import resolve_data_config
from beitzoo.inference.embed import Pooling
from beitzoo.inference.feature_files import Description, FeatureTable
from beitzoo.models.beit import Beit
from beitzoo.models.inputs import take_indices
from beitzoo.results import ENVIRONMENT, Row, Table, environment

_DATA = ("data", "test_data", "data_version", "split_seed", "train_per_class", "train_images", "label_seed")
_ASKED = ("model", "weights", *_DATA, "block", "pooling", "probe", "neighbours")
_FOUND = ("img_size", "top1", "top1_err", "val_top1", "count", "train_count", "val_count", "failures")
COLUMNS = (*_ASKED, *_FOUND, *ENVIRONMENT)
# What was asked for, and where it was measured; not when.
KEY = (*_ASKED, *(name for name in ENVIRONMENT if name != "date"))


@dataclass(frozen=True)
class LabelledData:
    """Images with classes, what each is for, and how that was asked for.

    Attributes:
        images: All images.
        split: Which are for what.
        asked: The columns that say so in a row.
    """

    images: ImageSet
    split: Split
    asked: Row

    def describe(self) -> list[str]:
        """Say what was found, and which images are for what."""
        split = self.split
        chosen = f", {len(split.val):,} to choose a block by" * bool(split.val)
        parts = f"{len(split.train):,} images to fit probes on{chosen}, {len(split.test):,} to measure them on."
        return [*self.images.describe(), parts]


@dataclass(frozen=True)
class Probed:
    """Features that are probed: of a network, made when they are needed, or of a file.

    Attributes:
        name: What rows call the network.
        weights: Fingerprint of its weights, or of the file of features; None for weights of a name.
        blocks: Whose output they are, in order; None is the network's own.
        poolings: What there is of each block.
        img_size: Of images in front of the network.
        device: Where features are made.
        features: Makes or returns them.
    """

    name: str
    weights: str | None
    blocks: Sequence[int | None]
    poolings: tuple[Pooling, ...]
    img_size: int | None
    device: torch.device
    features: Callable[[], Features]


def of_network(model: Beit, origin: Origin, data: LabelledData, probing: Probing, keep: Path | None = None) -> Probed:
    """Return the features of a network that are made when they are needed.

    Args:
        model: The network, or the backbone of a masked image model.
        origin: Where its weights are from.
        data: Its images.
        probing: Which blocks, and how images are loaded.
        keep: File that receives the features; they are then made at once.
    """
    size = resolve_data_config(model)["input_size"][2]
    blocks = sorted(set(take_indices(probing.blocks, len(model.blocks))))
    split = data.split

    def make() -> Features:
        used = [*split.train, *split.val, *split.test]
        return extract_features(model, data.images, used, blocks, probing.loading)

    name = origin.shown
    probed = Probed(name, origin.fingerprint(), blocks, (*POOLINGS, "both"), size, model.cls_token.device, make)
    if keep is None:
        return probed
    shape = (len(blocks), 2 * model.num_features)
    description = Description(name, "both", tuple(blocks), shape, data.images.names, model.config.img_size)
    kept = keep_features(keep, make, data.images, split, description)  # even where a table has all rows already
    return replace(probed, features=lambda: kept)


def of_file(path: Path, table: FeatureTable, probing: Probing) -> Probed:
    """Return the features that were read from a file.

    Args:
        path: The file.
        table: What is in it.
        probing: Which blocks.

    Raises:
        InvalidValueError: Probes of single patches, or of blocks that the file has not, were asked for.
    """
    features, description = kept_features(table), table.description
    if probing.blocks is not None:
        missing = sorted(set(probing.blocks) - {block for block in features.blocks if block is not None})
        there = ", ".join(map(str, features.blocks)).replace("None", "the network's output alone")
        check(not missing, f"The file has no features of block {missing[:1]}; it has {there}, counted from 0.")
        features = features.of_blocks(sorted(set(probing.blocks)))
    size = None if description.img_size is None else description.img_size[1]
    kept = fingerprint([full_path(path)])
    cpu = torch.device("cpu")
    return Probed(description.model, kept, features.blocks, features.poolings, size, cpu, lambda: features)


def probe_rows(
    probed: Probed, data: LabelledData, probing: Probing, kept: Table
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Probe features and append a row for each block, pooling and probe; those that the table has are taken from it.

    Args:
        probed: The features.
        data: The images that they are of.
        probing: What is probed, and how.
        kept: Has the columns `COLUMNS` and the key `KEY`.

    Returns:
        The rows, and the images that were left out, with the reason; none of rows that were there already.
    """
    stamp = environment(probed.device)
    asked: list[Row] = [
        {
            **stamp,
            "model": probed.name,
            "weights": probed.weights,
            **data.asked,
            "block": block,
            "pooling": pooling,
            "probe": probe,
            "neighbours": probing.neighbours if probe == "knn" else None,
        }
        for block in probed.blocks
        for pooling, probe in probing.pairs(probed.poolings)
    ]
    there = [kept.find(row) for row in asked]
    if all(there):
        return [row for row in there if row], []
    findings = probe_features(probed.features(), np.asarray(data.images.labels), data.split, probing)
    rows = []
    for old, row, scores in zip(there, asked, _scores(findings), strict=True):
        rows.append(old or kept.replace({**row, **scores, "img_size": probed.img_size}))
    return rows, findings.failures


def _scores(findings: Findings) -> list[Row]:
    counts = findings.counts
    return [
        {
            "top1": round(one.top1, 3),
            "top1_err": round(100 - one.top1, 3),
            "val_top1": None if one.val_top1 is None else round(one.val_top1, 3),
            "count": counts["test"],
            "train_count": counts["train"],
            "val_count": counts["val"],
            "failures": len(findings.failures),
        }
        for one in findings.found
    ]


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Return, of the rows of one network, that of each probe which validation images choose.

    None where there were no such images: what the test images themselves choose would be too good.
    """
    chosen = [row for row in rows if row["val_top1"] not in (None, "")]
    of_probes = [[row for row in chosen if row["probe"] == probe] for probe in PROBES]
    return [max(own, key=lambda row: float(row["val_top1"] or 0)) for own in of_probes if own]


def block_name(row: Row) -> str:
    """Name the block of a row; without a number it is the output of the network."""
    return "output" if row["block"] in (None, "") else str(row["block"])


def seen_in_training(origin: Origin, data: LabelledData) -> str | None:
    """Say so if a network's own run was trained on images that it is now measured on, or chosen by them."""
    own = origin.split(data.images)
    seen = set(data.split.test) & (set() if own is None else {*own.train, *own.val})
    if not seen:
        return None
    return (
        f"Note: {origin.name} was itself trained on {len(seen):,} of the {len(data.split.test):,} images that it is "
        "measured on, or chosen by them."
    )
