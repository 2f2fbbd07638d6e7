"""Classes of images that a CSV lists: a row for each image, with its path and its label, or several labels."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beitzoo.errors import InvalidValueError, MissingFileError, check
from beitzoo.files import full_path
from beitzoo.images.classes import CLASSES_FILE, names_in
from beitzoo.images.csv_rows import NOT_THERE, file_in, header_of, part_in, read_rows, text_in
from beitzoo.images.folders import LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.shards import arrange

# The column of images, also as `segment`'s CSV of pairs and as the hub's `metadata.csv` call it.
_PATHS = ("path", "image", "file_name")
_LABELS = ("label", "labels")
# Between several labels: as fastai's examples and ChestX-ray14 have them. A space or a comma may be within a name.
_SEPARATORS = (";", "|")


@dataclass(frozen=True)
class _Row:
    """A row of the CSV; the part is empty where none is named."""

    image: Path
    labels: tuple[str, ...]
    part: str
    line: int


def listed_images(path: Path) -> ImageSet:
    """Return the images that a CSV lists, with their classes.

    Its first line names the columns: `path` (or `image`, or `file_name`), relative to the folder of the CSV; what says
    the classes; and perhaps `part`, one of `train`, `validation` and `test`. Classes are said by one of

    - `label`: the class of each image.
    - `labels`: any number of labels of each image, separated by `;` or `|`; nothing for none.
    - a column for each class with 1 where an image has it, else 0; then there are no columns but these.

    With the last two an image may have several classes or none (`ImageSet.label_sets`). Where a `classes.txt` lies
    beside the CSV, a label is one of the names in that, or the number of one, counted from 0. Else a label is the name
    of a class, and classes are in order of their names, where all are whole numbers of these; or of their columns.

    Raises:
        MissingFileError: There is no such file, or no image in it.
        InvalidValueError: A row is not as it should be; says in which line.
    """
    path = full_path(path)
    left_out = LeftOut()
    header = header_of(path)
    columns = _class_columns(header)
    rows = _rows_of(path, _labels_in_columns(path, columns) if columns else _labels_in_words(path, header), left_out)
    if not rows:
        raise MissingFileError(". ".join([f"No images in {path}; write a row for each", *left_out.describe()]))
    names, numbers = _numbered(rows, path, columns)
    order, parts = arrange([row.part for row in rows])
    root = Path(os.path.commonpath([path.parent.absolute(), *(row.image.parent for row in rows)]))
    images = [rows[place].image for place in order]
    found = [tuple(sorted(numbers[label] for label in rows[place].labels)) for place in order]
    if "label" in header:
        return ImageSet(images, [label for (label,) in found], names, root, left_out, parts)
    _check_none_twice(rows, numbers, path)
    return ImageSet(images, None, names, root, left_out, parts, label_sets=found)


def _class_columns(header: Sequence[str]) -> tuple[str, ...]:
    """Return the columns that stand for a class each; none where a column of labels says the classes."""
    if set(header) & set(_LABELS) or not set(header) & set(_PATHS):
        return ()
    return tuple(name for name in header if name not in (*_PATHS, "part"))


_Read = Iterator[tuple[int, dict[str, str], tuple[str, ...]]]


def _labels_in_columns(path: Path, columns: Sequence[str]) -> _Read:
    """Yield line, row and labels of a CSV with a column for each class."""
    for line, row in read_rows(path, (_PATHS,)):
        for name in columns:
            check(
                row[name].strip() in ("0", "1"),
                f"{path}, line {line}: the column {name!r} has {row[name]!r}. Without a column label or labels every "
                "column but path and part is a class, with 1 where an image has it, else 0. Write one of these, "
                "remove the column, or name the one that says the labels `label` or `labels`.",
            )
        yield line, row, tuple(name for name in columns if row[name].strip() == "1")


def _labels_in_words(path: Path, header: Sequence[str]) -> _Read:
    """Yield line, row and labels of a CSV with a column `label` or `labels`."""
    rows = list(read_rows(path, (_PATHS, _LABELS)))
    if "label" in header:
        yield from ((line, row, (text_in(row, "label", f"{path}, line {line}").strip(),)) for line, row in rows)
        return
    separator = _separator(path, rows)
    for line, row in rows:
        words = [word.strip() for word in row["label"].split(separator)] if row["label"].strip() else []
        check(
            all(words),
            f"{path}, line {line}: {row['label']!r} has an empty label. Write one label between two {separator!r}, and "
            "nothing at all for an image without.",
        )
        yield line, row, tuple(words)


def _separator(path: Path, rows: Sequence[tuple[int, Mapping[str, str]]]) -> str:
    """Return what separates labels in this file."""
    found = {mark: line for line, row in reversed(rows) for mark in _SEPARATORS if mark in row["label"]}
    if len(found) > 1:
        lines = " and ".join(f"line {found[mark]} has {mark!r}" for mark in _SEPARATORS)
        raise InvalidValueError(f"{path}: {lines}. Separate labels by one of them throughout, which is in no name.")
    for line, row in rows:
        check(
            bool(found) or "," not in row["label"] or (path.parent / CLASSES_FILE).is_file(),
            f"{path}, line {line}: the labels {row['label']!r} have a comma, but labels are separated by "
            f"{' or '.join(map(repr, _SEPARATORS))}. Write one of these; if that is the name of one class, list the "
            f"names of all in a file {CLASSES_FILE} beside the CSV.",
        )
    return next(iter(found), _SEPARATORS[0])


def _rows_of(path: Path, read: _Read, left_out: LeftOut) -> list[_Row]:
    rows, lines = [], dict[Path, int]()
    for line, row, labels in read:
        place = f"{path}, line {line}"
        image, part = file_in(row, "path", place, path.parent), part_in(row, place)
        first = lines.setdefault(image, line)
        check(first == line, f"{path}, lines {first} and {line}: both name {row['path']}. Remove one of them.")
        if image.is_file():
            rows.append(_Row(image, labels, part, line))
        else:
            left_out.add(NOT_THERE, os.path.relpath(image, path.parent))
    return rows


def _numbered(rows: Sequence[_Row], path: Path, columns: Sequence[str]) -> tuple[tuple[str, ...], Mapping[str, int]]:
    """Return the names of the classes, and the number of each label."""
    file = path.parent / CLASSES_FILE
    # With the first line of each.
    labels = {label: row.line for row in reversed(rows) for label in row.labels} | dict.fromkeys(columns, 1)
    if not file.is_file():
        by_number = all(label.isascii() and label.isdecimal() for label in labels)
        names = tuple(columns) or tuple(sorted(labels, key=int if by_number else None))
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


def _check_none_twice(rows: Sequence[_Row], numbers: Mapping[str, int], path: Path) -> None:
    """Refuse rows that have a label twice, or once by its name and once by its number."""
    for row in rows:
        own = [numbers[label] for label in row.labels]
        for place, label in enumerate(row.labels):
            check(
                own.index(own[place]) == place,
                f"{path}, line {row.line}: the label {label!r} is there twice. Remove one of them.",
            )
