"""The split of a data set into images to train on, to choose a checkpoint by, and to measure on; and its file."""

import csv
import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from beitzoo.errors import FileAccessError, InvalidValueError, UnsupportedError, check
from beitzoo.files import read_text, write_text
from beitzoo.images.image_set import ImageSet

# The name of the file, beside the checkpoints of a run.
SPLIT_FILE = "split.csv"
_COLUMNS = ("image", "bytes", "class", "split")


@dataclass(frozen=True)
class Split:
    """Indices into an `ImageSet`; `draw_split` gives every class the same share in each.

    Attributes:
        train: Images to train on.
        val: Images by which the best checkpoint is chosen.
        test: Images that are held out, for one measurement at the end.
    """

    train: list[int]
    val: list[int]
    test: list[int]


def draw_split(
    images: ImageSet, val_fraction: float, test_fraction: float, seed: int, indices: Sequence[int] | None = None
) -> Split:
    """Draw the held-out images, then the validation images from the rest, evenly from all classes if there are any.

    Images that may have several labels are drawn without a look at these.

    A class of which there is one image to draw from, as some of ImageNet-22k, keeps it for training.

    Args:
        images: All images.
        val_fraction: Share of the images that are not held out.
        test_fraction: Share of all images.
        seed: The same images, fractions and seed give the same split.
        indices: Draw from these images only.

    Raises:
        InvalidValueError: A class has too few images for these fractions.
    """
    rest, test = _draw(range(len(images.images)) if indices is None else indices, images, test_fraction, seed)
    train, val = _draw(rest, images, val_fraction, seed)
    return Split(train, val, test)


def _draw(indices: Sequence[int], images: ImageSet, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    if not fraction:
        return list(indices), []
    try:
        from sklearn.model_selection import train_test_split  # only drawing needs it, reading a split does not
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "Drawing a split needs scikit-learn; install it with: pip install 'beitzoo[train]'"
        ) from error
    several, alone = _without_single(indices, images.labels)
    classes = None if images.labels is None else [images.labels[index] for index in several]
    least = 1 if classes is None else len(set(classes))
    count = round(len(indices) * fraction)
    check(
        0 < least <= count <= len(several) - least,
        f"A fraction of {fraction} of {len(indices)} images is {count}, and both parts of a split need at least "
        f"{max(least, 1)}{', one of each class' * (least > 1)}. Give another fraction, 0 for none, or more images.",
    )
    kept, drawn = train_test_split(several, test_size=count, stratify=classes, random_state=seed)
    return [*kept, *alone], drawn


def _without_single(indices: Sequence[int], labels: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Return the images that are not the only one of their class, and those that are."""
    if labels is None:
        return list(indices), []
    sizes = Counter(labels[index] for index in indices)
    several = [index for index in indices if sizes[labels[index]] > 1]
    return several, [index for index in indices if sizes[labels[index]] == 1]


def choose_per_class(images: ImageSet, indices: Sequence[int], count: int, seed: int) -> list[int]:
    """Choose the same number of images of each class; a larger number chooses those of a smaller one and more.

    Raises:
        InvalidValueError: A class has fewer, or images have no class or several.
    """
    labels = images.one_label_each(f"a choice of {count} images of each class")
    shuffled = random.Random(seed).sample(list(indices), len(indices))
    seen: Counter[int] = Counter()
    chosen = set()
    for index in shuffled:
        if seen[labels[index]] < count:
            seen[labels[index]] += 1
            chosen.add(index)
    fewest = min(range(len(images.names)), key=lambda label: seen[label])
    check(
        seen[fewest] == count,
        f"There are not {count} images of each class to train on: {images.names[fewest]} has {seen[fewest]}.",
    )
    return [index for index in indices if index in chosen]


def write_split(path: Path, images: ImageSet, split: Split) -> None:
    """Write which image is in which part, a row for each, in the order of the split.

    An image is identified by `ImageSet.identity`: its place within the data set, and the size of its file. Several
    classes are joined by `;`; images without one have an empty class.
    """
    text = io.StringIO()
    # All fields are quoted: a file name may hold any character, line ends too.
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for part in fields(split):
        for index in getattr(split, part.name):
            name = ";".join(images.names[label] for label in images.classes_of(index))
            writer.writerow((*images.identity(index), name, part.name))
    write_text(path, text.getvalue())


def read_split(path: Path, images: ImageSet) -> Split:
    """Read a split that `write_split` wrote, as indices into a set of images.

    Images that the file does not list are in no part of the split. Images that are no longer there, or have another
    size, are left out. A file of the same name and size in a data set elsewhere is taken for the same image.

    Raises:
        FileAccessError: The file cannot be read.
        InvalidValueError: It is no such file.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
        rows = list(reader)
    except OSError as error:
        raise FileAccessError(f"Cannot read {path}: {error.strerror or error}. Check its permissions.") from error
    names = [field.name for field in fields(Split)]
    if tuple(reader.fieldnames or ()) != _COLUMNS or any(row["split"] not in names for row in rows):
        raise InvalidValueError(
            f"{path} is not a split: it must have the columns {', '.join(_COLUMNS)}, and {', '.join(names)} as splits. "
            "Restore it, or remove it to use all images."
        )
    found = {images.identity(index): index for index in range(len(images.images))}
    parts: dict[str, list[int]] = {name: [] for name in names}
    for row in rows:
        index = found.get((row["image"], row["bytes"]))
        if index is not None:
            parts[row["split"]].append(index)
    return Split(**parts)
