"""Classes of images that a CSV lists: a row for each image, with its path and its label."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beitzoo.errors import InvalidValueError, MissingFileError, check
from beitzoo.files import full_path
from beitzoo.images.classes import CLASSES_FILE, names_in
from beitzoo.images.csv_rows import NOT_THERE, file_in, part_in, read_rows, text_in
from beitzoo.images.folders import LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.shards import arrange

# The column of images, also as `segment`'s CSV of pairs and as the hub's `metadata.csv` call it.
_COLUMNS = (("path", "image", "file_name"), ("label",))


@dataclass(frozen=True)
class _Row:
    """A row of the CSV; the part is empty where none is named."""

    image: Path
    label: str
    part: str
    line: int


def listed_images(path: Path) -> ImageSet:
    """Return the images that a CSV lists, with their classes.

    Its first line names the columns: `path` (or `image`, or `file_name`), relative to the folder of the CSV; `label`;
    and perhaps `part`, one of `train`, `validation` and `test`. Where a `classes.txt` lies beside it, a label is one
    of the names in that, or the number of one, counted from 0. Else a label is the name of a class, and classes are in
    order of their names; where all are whole numbers, of these.

    Raises:
        MissingFileError: There is no such file, or no image in it.
        InvalidValueError: A row is not as it should be; says in which line.
    """
    path = full_path(path)
    left_out = LeftOut()
    rows = _rows_of(path, left_out)
    if not rows:
        raise MissingFileError(". ".join([f"No images in {path}; write a row for each", *left_out.describe()]))
    names, numbers = _numbered(rows, path)
    order, parts = arrange([row.part for row in rows])
    root = Path(os.path.commonpath([path.parent.absolute(), *(row.image.parent for row in rows)]))
    images = [rows[place].image for place in order]
    return ImageSet(images, [numbers[rows[place].label] for place in order], names, root, left_out, parts)


def _rows_of(path: Path, left_out: LeftOut) -> list[_Row]:
    rows, lines = [], dict[Path, int]()
    for line, row in read_rows(path, _COLUMNS):
        place = f"{path}, line {line}"
        image = file_in(row, "path", place, path.parent)
        label, part = text_in(row, "label", place).strip(), part_in(row, place)
        first = lines.setdefault(image, line)
        check(first == line, f"{path}, lines {first} and {line}: both name {row['path']}. Remove one of them.")
        if image.is_file():
            rows.append(_Row(image, label, part, line))
        else:
            left_out.add(NOT_THERE, os.path.relpath(image, path.parent))
    return rows


def _numbered(rows: Sequence[_Row], path: Path) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Return the names of the classes, and the number of each label."""
    file = path.parent / CLASSES_FILE
    labels = {row.label: row.line for row in reversed(rows)}  # with the first line of each
    if not file.is_file():
        by_number = all(label.isascii() and label.isdecimal() for label in labels)
        names = tuple(sorted(labels, key=int if by_number else None))
        return names, {name: place for place, name in enumerate(names)}
    names = names_in(file)
    numbers = {**{str(place): place for place in range(len(names))}, **{name: n for n, name in enumerate(names)}}
    for label, line in sorted(labels.items(), key=lambda item: item[1]):
        if label not in numbers:
            raise InvalidValueError(
                f"{path}, line {line}: the label {label!r} is no class of {file}, which names {len(names)}. Write one "
                f"of these names, or a number from 0 to {len(names) - 1}; or remove that file."
            )
    return names, numbers
