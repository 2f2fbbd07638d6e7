"""Classes of images in shards: numbered, named, and images without one left out."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from beitzoo.errors import MissingFileError, check
from beitzoo.files import read_text
from beitzoo.images.files import Encoded
from beitzoo.images.folders import LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.shards import Shards

WITHOUT_CLASS = "without one of the classes"
CLASSES_FILE = "classes.txt"
# Each class number below the largest is a class, so a number such as an identifier would make as many classes.
_MOST_CLASSES = 1_000_000

Numbers = np.ndarray[Any, np.dtype[np.int64]]
# What each image of a file has: a class by number or word, several, or none.
Found = Sequence[int | str | tuple[int | str, ...] | None]


class Container(Protocol):
    """A file of encoded images."""

    path: Path

    def __getitem__(self, place: int) -> Encoded:
        """Return the image at a place, without reading it."""


@dataclass(frozen=True)
class Classes:
    """The class of each image in each of several files.

    Attributes:
        numbers: For each file an array; -1 where an image has none. Where images may have several, 0 where it is known
            which they have.
        names: Of the classes; None if no image has one.
        sets: Where images may have several, for each file those of each image.
    """

    numbers: Sequence[Numbers]
    names: tuple[str, ...] | None
    sets: Sequence[Sequence[tuple[int, ...]]] | None = None


def classes_of(shards: Shards, found: Sequence[Found | Numbers], noted: Sequence[str]) -> Classes:
    """Number the classes that the images of each file have, and name them.

    Words are numbered in their order. Numbers are named as noted, or by the lines of a `classes.txt` beside the files,
    or else by themselves; negative ones, as in the hub's test sets, are none.

    Args:
        shards: The files.
        found: For each file, in their order, the class of each image, or several in a tuple; None where there is none.
        noted: Names of the classes that the files themselves state.

    Raises:
        InvalidValueError: A number is that of no class, or some images have one class and others several.
    """
    lists: list[Found] = [labels.tolist() if isinstance(labels, np.ndarray) else labels for labels in found]
    ones = [[label for label in labels if not isinstance(label, tuple)] for labels in lists]
    if all(len(one) == len(labels) for one, labels in zip(ones, lists, strict=True)):
        return _one_of_each(shards, ones, noted)
    check(
        all(label is None for labels in ones for label in labels),
        f"Some files at {shards.root} have one class of each image, others lists of several. Give one kind alone.",
    )
    return _label_sets_of(shards, lists, noted)


def _one_of_each(shards: Shards, found: Sequence[Sequence[int | str | None]], noted: Sequence[str]) -> Classes:
    """Number and name classes of which each image has one or none."""
    if any(isinstance(label, str) for labels in found for label in labels):
        words = [[None if label is None else str(label) for label in labels] for labels in found]
        names = tuple(sorted({word for those in words for word in those if word is not None}))
        number: dict[str | None, int] = {name: place for place, name in enumerate(names)}
        return Classes([_array([number.get(word, -1) for word in those]) for those in words], names)
    numbers = [
        _array([-1 if label is None else min(int(label), _MOST_CLASSES) for label in labels]) for labels in found
    ]
    most = max((int(those.max()) for those in numbers if len(those)), default=-1)
    check(
        most < _MOST_CLASSES,
        f"An image at {shards.root} has a class number of {_MOST_CLASSES:,} or more. Number the classes from 0, or "
        "write them as words.",
    )
    if most < 0:
        return Classes(numbers, None)
    names = tuple(noted) or _names_of_file(shards) or tuple(map(str, range(most + 1)))
    check(
        most < len(names),
        f"An image at {shards.root} has the class number {most}, but only {len(names)} classes are named, which are "
        f"numbered from 0. Correct the number, or name all classes in a {CLASSES_FILE}.",
    )
    return Classes(numbers, names)


def _label_sets_of(shards: Shards, found: Sequence[Found], noted: Sequence[str]) -> Classes:
    """Number and name the labels of images that may have several, as `classes_of` does with one of each."""
    several = [[own if isinstance(own, tuple) else None for own in those] for those in found]
    flat = _one_of_each(shards, [[label for own in those for label in own or ()] for those in several], noted)
    sets = []
    for those, numbers in zip(several, flat.numbers, strict=True):
        rest = iter(numbers.tolist())
        sets.append([tuple(sorted(islice(rest, len(own or ())))) for own in those])
    known = [_array([-1 if own is None else 0 for own in those]) for those in several]
    return Classes(known, tuple(noted) if flat.names is None else flat.names, sets)


def fault_among(labels: Sequence[object]) -> str | None:
    """Say what is wrong among the labels of one image; None if they are whole numbers from 0 or words, each once."""
    for label in labels:
        if label is None or label == "":
            return "an empty one"
        if isinstance(label, bool) or not isinstance(label, int | str):
            return f"{label!r}, which is no whole number and no word"
        if isinstance(label, int) and label < 0:
            return "a negative one"
        if labels.count(label) > 1:
            return f"{label!r} twice"
    return None


def _array(numbers: list[int]) -> Numbers:
    return np.array(numbers, dtype=np.int64)


def _names_of_file(shards: Shards) -> tuple[str, ...] | None:
    for folder in dict.fromkeys([shards.root, *(file.parent for file in shards.files)]):
        if (file := folder / CLASSES_FILE).is_file():
            return tuple(line.strip() for line in read_text(file).splitlines() if line.strip())
    return None


def names_in(file: Path) -> tuple[str, ...]:
    """Read the names of the classes; a name left out would give all later ones another number."""
    names = [line.strip() for line in read_text(file).removeprefix("\ufeff").rstrip().splitlines()]
    check(bool(names), f"{file} is empty; write the name of a class on each line, in the order of their numbers.")
    empty = [number for number, name in enumerate(names, start=1) if not name]
    check(not empty, f"{file}, line {empty[:1]}: there is no name. Each line names a class; remove it or write one.")
    for number, name in enumerate(names):
        first = names.index(name)
        check(
            first == number, f"{file}, lines {first + 1} and {number + 1}: both are {name!r}. Give each class a name."
        )
    return tuple(names)


def images_of(shards: Shards, containers: Sequence[Container], classes: Classes, left_out: LeftOut) -> ImageSet:
    """Return the images of all files that have one of the classes; all images if none has one.

    Raises:
        MissingFileError: There are no images.
    """
    names = classes.names
    keep = [np.ones(len(numbers), bool) if names is None else numbers >= 0 for numbers in classes.numbers]
    for container, kept in zip(containers, keep, strict=True):
        list_left_out(shards, container, ~kept, WITHOUT_CLASS, left_out)
    images = kept_images(shards, containers, keep, left_out)
    if classes.sets is not None:
        label_sets = [own for sets, kept in zip(classes.sets, keep, strict=True) for own in compress(sets, kept)]
        return replace(images, label_sets=label_sets, names=names or ())
    labels = [numbers[kept] for numbers, kept in zip(classes.numbers, keep, strict=True)]
    return replace(images, labels=None if names is None else np.concatenate(labels).tolist(), names=names or ())


def list_left_out(
    shards: Shards, container: Container, places: np.ndarray[Any, np.dtype[np.bool_]], reason: str, left_out: LeftOut
) -> None:
    """List the images of a file, True in `places`, that are left out for a reason."""
    for place in np.flatnonzero(places):
        file = container.path.relative_to(shards.root).as_posix()
        left_out.add(reason, f"{file}:{container[int(place)].place}")


def kept_images(
    shards: Shards,
    containers: Sequence[Container],
    keep: Sequence[np.ndarray[Any, np.dtype[np.bool_]]],
    left_out: LeftOut,
) -> ImageSet:
    """Return the images of all files that are kept, True in `keep`, without classes and in the parts of the files.

    Raises:
        MissingFileError: There are no images.
    """
    rows = [np.flatnonzero(kept) for kept in keep]
    counts = iter(map(len, rows))
    parts: dict[str, range] = {}
    end = 0
    for part, files in shards.parts.items():
        start = end
        end += sum(next(counts) for _ in files)
        if end > start:
            parts[part] = range(start, end)
    if not end:
        raise MissingFileError(
            ". ".join([f"No images in the files at {shards.root}; give others", *left_out.describe()])
        )
    own = parts if len(parts) > 1 else {}
    return ImageSet(ShardImages(containers, rows), None, (), shards.root, left_out, own)


class ShardImages(Sequence[Encoded]):
    """Chosen images of several files, file by file."""

    def __init__(self, containers: Sequence[Container], places: Sequence[Numbers]) -> None:
        self._containers, self._places = list(containers), list(places)
        self._ends = np.cumsum([len(those) for those in places]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        file = bisect_right(self._ends, index)
        places = self._places[file]
        return self._containers[file][int(places[index - self._ends[file] + len(places)])]
