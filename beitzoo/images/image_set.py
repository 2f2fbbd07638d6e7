"""The record of a data set of images, whatever it was made of."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from beitzoo.errors import InvalidValueError
from beitzoo.images.files import Encoded
from beitzoo.images.folders import LeftOut

# Digits of a sha256 that tell one version of the images from another.
_DIGITS = 12
# What stands before the names of images that are held out in a place of their own.
_HELD_OUT = "held out:"


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set with their classes, before they are split and transformed.

    Attributes:
        images: The images themselves, the files they are in, or files within files; the same type throughout.
        labels: Class of each; None where the images have no classes, or several each.
        names: Names of the classes; none where there are no labels.
        root: The folder that all files are in; None where the images are not files.
        left_out: What else was found there, and why it was not taken.
        parts: Where the data set comes in parts of its own, the indices of each: `train`, and `validation`, `test` or
            both. Only `train` is for training. Images in no part are not used.
        test_root: The folder of the part `test`, where it is another than `root`.
        label_sets: Where an image may have several classes or none, those of each, in order; then `labels` is None.
    """

    images: Sequence[Image.Image | Path | Encoded]
    labels: Sequence[int] | None
    names: tuple[str, ...]
    root: Path | None = None
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    parts: Mapping[str, range] = field(default_factory=dict)
    test_root: Path | None = None
    label_sets: Sequence[tuple[int, ...]] | None = None

    @property
    def has_classes(self) -> bool:
        """Whether images have classes: one each, or several or none each."""
        return self.labels is not None or self.label_sets is not None

    def classes_of(self, index: int) -> tuple[int, ...]:
        """Return the classes of an image; none where images have no classes."""
        if self.label_sets is not None:
            return self.label_sets[index]
        return () if self.labels is None else (self.labels[index],)

    def class_sizes(self, indices: Iterable[int] | None = None) -> Counter[int]:
        """Count the images of each class, among all images or some."""
        if indices is None:
            indices = range(len(self.labels or self.label_sets or ()))
        return Counter(label for index in indices for label in self.classes_of(index))

    def one_label_each(self, purpose: str) -> Sequence[int]:
        """Return the class of each image, for what needs exactly one.

        Args:
            purpose: What needs it, such as "a probe".

        Raises:
            InvalidValueError: The images have no classes, or may have several.
        """
        if self.labels is not None:
            return self.labels
        have = "have no classes" if self.label_sets is None else "may have several labels each"
        where = "" if self.root is None else f" in {self.root}"
        raise InvalidValueError(
            f"The images{where} {have}, and {purpose} needs one class of each. Give class folders, or a CSV with a "
            "column `label`" + ("." if self.label_sets is None else "; finetune and evaluate take several labels.")
        )

    @property
    def held_out(self) -> Sequence[int]:
        """Indices of the images that a network may be measured on: all, or those in parts that are not for training."""
        held_out = [part for name, part in self.parts.items() if name != "train"]
        return [index for part in held_out for index in part] if self.parts else range(len(self.images))

    def describe(self) -> list[str]:
        """Say what was found and what was left out, in a few lines."""
        where = "" if self.root is None else f" in {self.root}"
        parts = ", ".join(f"{len(part):,} {name}" for name, part in self.parts.items())
        return [
            f"{len(self.images):,} images {self._classes(where)}",
            *([f"Parts of its own: {parts}; only train is for training."] if parts else []),
            *self.left_out.describe(),
        ]

    def _classes(self, where: str) -> str:
        if not self.has_classes:
            return f"without classes{where}"
        sizes = self.class_sizes()
        fewest, most = (min(sizes, key=lambda c: (sizes[c], c)), max(sizes.values())) if sizes else (0, 0)
        even = f"{most:,} of each" if sizes[fewest] == most else f"{sizes[fewest]:,} ({self.names[fewest]}) to {most:,}"
        if self.label_sets is None:
            return f"of {len(self.names):,} classes{where}: {even}"
        several = Counter(map(len, self.label_sets))
        without = f", {several[0]:,} without any" if several[0] else ""
        return f"with up to {max(several)} of {len(self.names):,} labels each{where}: {even}{without}"

    @cached_property
    def version(self) -> str:
        """First digits of a sha256 that is another when images were exchanged or their classes or parts are others.

        It is of the names of images, of sizes and times of change of their files, of classes and of parts. What is in
        the files is not read, which would take as long as measuring them.
        """
        return digest_of(self._lines())

    def version_of(self, indices: Iterable[int]) -> str:
        """Return first digits of a sha256 of the `version`, and of which of the images are meant."""
        return digest_of([self.version, repr([*indices])])

    def _lines(self) -> Iterator[str]:
        """Say what the set is, and what each image is."""
        changed = TimesOfChange()
        yield repr((self.names, {name: (part.start, part.stop) for name, part in self.parts.items()}))
        for index, image in enumerate(self.images):
            yield repr((*self.identity(index), changed.of(image), self.classes_of(index)))

    def identity(self, index: int) -> tuple[str, str]:
        """Say which image it is wherever the data set lies, and how many bytes its file has.

        An image file is named by its path below the root, one in a table by `TABLE:ROW`, one in a tar by `TAR:MEMBER`,
        and a digit by `digits:INDEX`.
        """
        image = self.images[index]
        if isinstance(image, Image.Image):
            return f"digits:{index}", ""
        is_held_out = self.test_root is not None and index in self.parts["test"]
        root = self.test_root if is_held_out else self.root
        file, place = (image.container, f":{image.place}") if isinstance(image, Encoded) else (image, "")
        name = (file if root is None else file.relative_to(root)).as_posix()
        return f"{_HELD_OUT * is_held_out}{name}{place}", size_of(image)


def digest_of(lines: Iterable[str]) -> str:
    """Return the first digits of a sha256 of lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:_DIGITS]


class TimesOfChange:
    """When the files that images are in were changed last; each is asked for once."""

    def __init__(self) -> None:
        self._of_containers: dict[Path, int | None] = {}

    def of(self, image: Image.Image | Path | Encoded) -> int | None:
        """Return the time in nanoseconds; None of an image in memory, and where the file is not there."""
        if isinstance(image, Image.Image):
            return None
        if isinstance(image, Path):
            return _changed(image)
        if image.container not in self._of_containers:
            self._of_containers[image.container] = _changed(image.container)
        return self._of_containers[image.container]


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # it is found to be unreadable when it is opened
        return None


def size_of(image: Path | Encoded) -> str:
    """Return how many bytes an image file has, as text; empty where that is not known."""
    try:
        size = image.size if isinstance(image, Encoded) else image.stat().st_size
    except OSError:  # it is found to be unreadable when it is opened
        size = None
    return "" if size is None else str(size)


def with_held_out(images: ImageSet, held_out: ImageSet) -> ImageSet:
    """Return a set of both, of which the second is the part `test`; a part of that name in the first is not used.

    Raises:
        InvalidValueError: One has classes and the other not, or others; or an image is in both.
    """
    if "train" in held_out.parts:
        raise InvalidValueError(f"{held_out.root} has a part to train on as well; give the files that are held out.")
    if images.has_classes != held_out.has_classes:
        raise InvalidValueError(f"Only one of {images.root} and {held_out.root} has classes; give two of a kind.")
    if (images.label_sets is None) != (held_out.label_sets is None):
        one, several = (images, held_out) if images.label_sets is None else (held_out, images)
        raise InvalidValueError(
            f"The images of {one.root} have one class each, and those of {several.root} may have several labels; give "
            "two of a kind."
        )
    foreign = [name for name in held_out.names if name not in images.names]
    if foreign:
        raise InvalidValueError(
            f"{foreign[0]} is a class of {held_out.root}, but none of {images.root}; both must have the same classes."
        )
    twice = _places(images) & _places(held_out)
    if twice:
        raise InvalidValueError(f"{min(twice)} would be both trained on and held out; give other files.")
    count = len(images.images)
    parts = {**(images.parts or {"train": range(count)}), "test": range(count, count + len(held_out.images))}
    labels, label_sets = None, None
    number = [images.names.index(name) for name in held_out.names]
    if images.labels is not None and held_out.labels is not None:
        labels = [*images.labels, *(number[label] for label in held_out.labels)]
    elif images.label_sets is not None and held_out.label_sets is not None:
        renumbered = (tuple(sorted(number[label] for label in own)) for own in held_out.label_sets)
        label_sets = [*images.label_sets, *renumbered]
    left_out = LeftOut()
    for found in (images.left_out, held_out.left_out):
        left_out.take(found)
    both = Joined(images.images, held_out.images)
    return ImageSet(both, labels, images.names, images.root, left_out, parts, held_out.root, label_sets)


class Joined(Sequence[Any]):
    """Two sequences, one behind the other."""

    def __init__(self, first: Sequence[Any], second: Sequence[Any]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]


def _places(images: ImageSet) -> set[Path]:
    """Return the files that the images are in."""
    return {
        image.container if isinstance(image, Encoded) else image
        for image in images.images
        if not isinstance(image, Image.Image)
    }
