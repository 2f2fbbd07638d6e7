"""Models that are measured: which weights they have, which images they were not trained on, and what was found."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from torch import nn

from beitzoo.errors import check, some_of
from beitzoo.factory import look_up
from beitzoo.files import full_path
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import SPLIT_FILE, Split, draw_split, read_split
from beitzoo.results import Row
from beitzoo.weights.names import find_weights
from beitzoo.weights.shards import INDEX_SUFFIX, shards
from beitzoo.zoo.checkpoints import LocalFile
from beitzoo.zoo.registry import DEFAULT_MODEL, UnknownModelError, find

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model are from, which is known before it is loaded.

    Attributes:
        name: As in `create_model`.
        checkpoint: The file of its weights, where they are not those of the name.
    """

    name: str
    checkpoint: Path | None = None

    @property
    def shown(self) -> str:
        """What rows call the model."""
        return self.name if self.checkpoint is None else str(self.checkpoint)

    def files(self) -> list[Path]:
        """Return the files of weights on this machine that it stands for; the first is what is read."""
        if self.checkpoint is not None:
            return [full_path(self.checkpoint)]
        pretrained = look_up(self.name).pretrained
        sources = () if pretrained is None else pretrained.sources
        return [source.path for source in sources if isinstance(source, LocalFile)]

    def fingerprint(self) -> str | None:
        """Return the first digits of a sha256 of what the model is made of, wherever it lies; None for a released one.

        It is of the weights in files, or of their revision on the hub, and of what is known of the network, its classes
        and its transform. A released checkpoint, by its name in the table, does not change.
        """
        files = self.files()
        if not files and _is_released(self.name):
            return None
        entry, weights = look_up(self.name), [] if not files else _with_shards(find_weights(files[0]))
        known = entry.pretrained
        if known is not None:
            known = replace(known, sources=tuple(one for one in known.sources if not isinstance(one, LocalFile)))
        return fingerprint(weights, repr((entry.config, known)))

    def split(self, images: ImageSet) -> Split | None:
        """Find the split that the model was trained with: in the file that its run wrote; seed 0 of the shipped one."""
        if self.checkpoint is None and look_up(self.name).name == DEFAULT_MODEL:
            return None if images.root is not None else _split_of_digits(images, 0)
        splits = [
            folder / SPLIT_FILE
            for file in self.files()
            for place in (file.absolute(), file.resolve())
            for folder in place.parents[:2]
        ]
        return next((read_split(path, images) for path in splits if path.is_file()), None)


@dataclass(frozen=True)
class Subject(Generic[Network]):
    """A model that is measured, and where its weights are from.

    Attributes:
        model: The classifier, segmentation model or backbone.
        name: As in `create_model`; the row has it.
        checkpoint: The file of its weights, where they are not those of the name.
        dtype: What it computes in, where its parameters do not say so.
    """

    model: Network
    name: str
    checkpoint: Path | None = None
    dtype: str | None = None

    @property
    def origin(self) -> Origin:
        """Where its weights are from."""
        return Origin(self.name, self.checkpoint)


@dataclass
class Evaluation:
    """One measurement of a model of any kind.

    Attributes:
        row: What was asked for, what was found, and where it was measured.
        failures: Images that were not counted, with the reason.
        notes: What a reader of the row must know.
        names: Of all outputs, in their order; none where nobody named them.
    """

    row: Row
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()


def fingerprint(files: Sequence[Path], said: str = "") -> str:
    """Return the first digits of a sha256 of what is in these files, and of what is said of them."""
    digest = hashlib.sha256(said.encode("utf-8", "surrogateescape"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _is_released(name: str) -> bool:
    try:
        return find(name).pretrained is not None
    except UnknownModelError:
        return False


def _with_shards(weights: Path) -> list[Path]:
    is_index = weights.name.endswith(INDEX_SUFFIX)
    return [weights.with_name(name) for name in shards(weights)] if is_index else [weights]


def images_for(origin: Origin, images: ImageSet, split_seed: int | None) -> tuple[list[int], list[str]]:
    """Choose the images that a model was not trained on, nor chosen by; and say what was left out.

    Args:
        origin: Of the model.
        images: All images.
        split_seed: Of the digits, use the third that this seed holds out.

    Raises:
        InvalidValueError: It was trained on all of them, or on some that the seed holds out.
    """
    own = origin.split(images)
    if split_seed is None and (own is not None or images.root is not None):
        return unseen_images(origin.name, images, own)
    seen = set() if own is None else {*own.train, *own.val}
    held_out = _split_of_digits(images, split_seed or 0).test
    check(
        not seen & set(held_out),
        f"{origin.name} was trained on images that split_seed {split_seed} holds out; leave --split-seed out to "
        "measure it on those that its own run held out.",
    )
    return sorted(held_out), []


def unseen_images(name: str, images: ImageSet, own: Split | None) -> tuple[list[int], list[str]]:
    """Choose the images that are held out and that a model was not trained on; and say what was left out.

    Args:
        name: What notes and errors call the model.
        images: All images.
        own: How the model's own run split them, if that is known.

    Raises:
        InvalidValueError: It was trained on all of them.
    """
    seen = set() if own is None else {*own.train, *own.val}
    shown = images.held_out
    unseen = [index for index in shown if index not in seen]
    check(bool(unseen), f"{name} was trained on all {len(shown):,} images; evaluate it on others.")
    notes = []
    if len(shown) < len(images.images):
        notes.append(f"The data has parts; only the {len(shown):,} images that are held out by their names count.")
    if left_out := len(shown) - len(unseen):
        notes.append(f"Left out {left_out:,} of {len(shown):,} images, which {name} was trained on or chosen by.")
    return unseen, notes


def _split_of_digits(images: ImageSet, seed: int) -> Split:
    check(images.root is None, "--split-seed draws a part of the digits, and this is a folder. Leave it out.")
    return draw_split(images, val_fraction=0.1, test_fraction=1 / 3, seed=seed)


def check_unnamed(model: str, outputs: int, names: Sequence[str]) -> None:
    """Refuse to compare a model whose classes nobody named with data of another number of classes."""
    check(
        len(names) == outputs,
        f"{model} tells {outputs} classes apart and nobody named them, the data has {len(names)}: {some_of(names)}. "
        "Evaluate a model that was trained on these classes.",
    )
