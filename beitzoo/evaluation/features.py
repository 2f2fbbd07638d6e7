"""Frozen features: what each block of a network says of an image, pooled, for probes; computed, or kept in files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from beitzoo.errors import check
from beitzoo.images.folder_classes import ImageClasses
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.inference.classify import eval_mode
from beitzoo.inference.embed import Array, Pooling, Reading, embedding
from beitzoo.inference.feature_files import OK, Description, FeatureTable, feature_rows, write_features
from beitzoo.inference.pipeline import Failure, Loading, run_jobs
from beitzoo.models.beit import Beit

# What one pass over the images gives of each block: class token and mean of the patch tokens.
POOLINGS: tuple[Pooling, ...] = ("mean", "class")


@dataclass(frozen=True)
class Features:
    """Pooled features of some images, for blocks as they leave them: raw, without the network's last norm.

    The linear probe of BEiT reads them so too (`run_linear_eval.py`).

    Attributes:
        indices: Which images of the set, in order; those that could not be read are not among them.
        blocks: The blocks, counted from 0, in order; None is the output of the network.
        values: For each pooling (blocks, images, C).
        failures: Images without features, with the reason.
    """

    indices: list[int]
    blocks: list[int | None]
    values: dict[Pooling, Array]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def of(self, block: int | None, pooling: Pooling) -> Array:
        """Return the features that leave one block, float32 (images, C); `both` are class token and mean, 2 C.

        Raises:
            InvalidValueError: There are none of this block or pooling.
        """
        check(
            block in self.blocks and pooling in self.poolings,
            f"There are no features {pooling!r} of block {block}; there are {', '.join(self.poolings)} of "
            f"{', '.join(map(str, self.blocks))}. Make others with beitzoo embed.",
        )
        place = self.blocks.index(block)
        if pooling == "both":
            return np.concatenate([self.of(block, "class"), self.of(block, "mean")], axis=1)
        return self.values[pooling][place].astype(np.float32, copy=False)

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """What there is of each block."""
        return (*self.values, "both") if set(POOLINGS) <= self.values.keys() else tuple(self.values)

    def of_blocks(self, blocks: Sequence[int | None]) -> "Features":
        """Return those of some of the blocks."""
        places = [self.blocks.index(block) for block in blocks]
        values = {pooling: values[places] for pooling, values in self.values.items()}
        return Features(self.indices, [*blocks], values, self.failures)

    def part(self, indices: Sequence[int]) -> "Features":
        """Return those of some images of the set, in this order, and no failures."""
        place = {index: place for place, index in enumerate(self.indices)}
        found = [index for index in indices if index in place]
        places = [place[index] for index in found]
        return Features(found, self.blocks, {pooling: values[:, places] for pooling, values in self.values.items()})


def extract_features(
    model: Beit,
    images: ImageSet,
    indices: Sequence[int],
    blocks: Sequence[int] | None = None,
    loading: Loading | None = None,
) -> Features:
    """Compute the features of some images of a set, without gradient, dropout or stochastic depth.

    All are kept in memory: 8 bytes for each image, block and channel. No random number is drawn, and the model's
    training mode is as before when this returns.

    Args:
        model: Any network; of a masked image model its `backbone`. It sees images by its own transform, unmasked.
        images: The set.
        indices: Which of its images.
        blocks: Blocks whose output is kept, counted from 0, negative from the end; all if None.
        loading: Batch size and threads.

    Raises:
        InvalidValueError: There is no such block, or the model takes images that are not in files.
    """
    reading = Reading("both", range(len(model.blocks)) if blocks is None else blocks)
    chosen = reading.numbers(model)
    assert chosen is not None
    found: list[int] = []
    failures: list[tuple[str, str]] = []
    rows = np.empty((len(chosen), len(indices), 2 * model.num_features), dtype=np.float32)
    job = embedding(model, reading)
    with eval_mode([model]):
        for index, (outcome,) in run_jobs(indices, [job], loading or Loading(), lambda index: images.images[index]):
            if isinstance(outcome, Failure):
                failures.append((images.identity(index)[0], outcome.reason))
            else:
                rows[:, len(found)] = outcome
                found.append(index)
    return Features(found, [*chosen], _both(rows[:, : len(found)]), failures)


def kept_features(table: FeatureTable) -> Features:
    """Return the features that are in a file; images are counted by its rows.

    Raises:
        InvalidValueError: They are of single patches, which no probe reads.
    """
    description = table.description
    check(
        description.pooling != "patches",
        f"These are features of single patches of {description.model}, and a probe reads one of each image. Make them "
        "with another --pooling, such as both.",
    )
    there = [place for place, status in enumerate(table.status) if status == OK]
    failures = [(path, status) for path, status in zip(table.paths, table.status, strict=True) if status != OK]
    values = table.features[there]
    blocks: list[int | None] = [None] if description.blocks is None else [*description.blocks]
    values = values[None] if description.blocks is None else values.swapaxes(0, 1)
    pooled: dict[Pooling, Array] = {description.pooling: values}
    if description.pooling == "both":
        pooled = _both(values)
    return Features(there, blocks, pooled, failures)


def keep_features(
    path: Path, make: Callable[[], Features], images: ImageSet, split: Split, description: Description
) -> Features:
    """Make features of a network's blocks and write them to a file, with the classes and parts of their images.

    Rows are in the order of the set, so that a split of them is drawn as one of the set.

    Args:
        path: Ends in .npz or .parquet. That it cannot be written is known before features are made.
        make: Returns what `extract_features` does for the images of the split.
        images: The set, with classes.
        split: What its images are for.
        description: Of the file.
    """
    labels = images.labels
    assert labels is not None
    part_of = {index: "train" for index in split.train}
    part_of |= {index: "validation" for index in split.val} | {index: "test" for index in split.test}
    indices = sorted(part_of)
    made: list[Features] = []

    def outcomes() -> Iterator[tuple[Array | None, str | None]]:
        made.append(make())
        place_of = {index: place for place, index in enumerate(made[0].indices)}
        reasons = dict(made[0].failures)
        both = np.concatenate([made[0].values["class"], made[0].values["mean"]], axis=2).swapaxes(0, 1)
        for index in indices:
            place = place_of.get(index)
            yield (None, reasons[images.identity(index)[0]]) if place is None else (both[place], None)

    names = (images.identity(index)[0] for index in indices)
    classes = ImageClasses([labels[index] for index in indices], images.names, [part_of[index] for index in indices])
    write_features(path, feature_rows(outcomes(), names, classes), len(indices), description)
    return made[0]


def _both(values: Array) -> dict[Pooling, Array]:
    """Part class token and mean, (..., 2 C)."""
    token, mean = np.split(values, 2, axis=-1)
    return {"mean": mean, "class": token}
