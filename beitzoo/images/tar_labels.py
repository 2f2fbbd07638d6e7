"""Classes of the samples in WebDataset tars: one of each, or any number of labels."""

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from beitzoo.errors import InvalidValueError, check
from beitzoo.images.classes import Found, fault_among

# Between several labels, as in a CSV. A space or a comma may be within a name.
SEPARATORS = (";", "|")
_NUMBER = re.compile(r"-?\d{1,18}")
_KEYS = ("label", "labels")


class Separated(NamedTuple):
    """Several labels as a `cls` has them, of which it is not known yet by what those of other samples are separated."""

    text: str


# What a sample states: a class by number or word, the labels of a list, or nothing. No word at all is an empty text.
Stated = int | str | tuple[int | str, ...] | Separated | None


def stated_label(tar: tarfile.TarFile, fields: Mapping[str, tarfile.TarInfo]) -> Stated:
    """Read what a sample states of its class or labels; None if nothing is there, or what is there is none.

    Raises:
        InvalidValueError: It is a list with something else than labels in it.
    """
    if "cls" in fields:
        text = _content(tar, fields["cls"]).decode(errors="replace").strip()
        return Separated(text) if any(mark in text for mark in SEPARATORS) else _number_or_word(text)
    if "json" not in fields:
        return None
    try:
        stated = json.loads(_content(tar, fields["json"]))
        label = next((stated[key] for key in _KEYS if key in stated), None)
    except (ValueError, TypeError, RecursionError):
        return None
    if isinstance(label, list):
        return _checked(label, str(tar.name), fields["json"].name)
    return label if isinstance(label, int | str) and not isinstance(label, bool) else None


def found_labels(stated: Sequence[tuple[Path, Sequence[Stated], Sequence[str]]]) -> list[Found]:
    """Turn what samples state into classes: where one of them has several labels, or a list, each has a tuple.

    Args:
        stated: Of each tar its path, what its samples state, and the names of their images.

    Raises:
        InvalidValueError: Labels are separated in two ways, or one is empty, negative or there twice.
    """
    marks: dict[str, str] = {}
    several = False
    for path, labels, names in stated:
        for label, name in zip(labels, names, strict=True):
            several |= isinstance(label, tuple)  # what is separated is one too
            if isinstance(label, Separated):
                for mark in SEPARATORS:
                    if mark in label.text:
                        marks.setdefault(mark, f"{path}:{name}")
    if len(marks) > 1:
        places = " and ".join(f"that of {place} by {mark!r}" for mark, place in marks.items())
        raise InvalidValueError(
            f"Labels are separated in two ways: {places}. Take one throughout, which is in no name."
        )
    if not several:
        return [[_as_one(label) for label in labels] for _, labels, _ in stated]
    mark = next(iter(marks), SEPARATORS[0])
    return [
        [_as_set(label, mark, path, name) for label, name in zip(labels, names, strict=True)]
        for path, labels, names in stated
    ]


def _as_one(label: Stated) -> int | str | None:
    assert not isinstance(label, tuple)
    return None if label == "" else label


def _as_set(label: Stated, mark: str, path: Path, name: str) -> tuple[int | str, ...] | None:
    """Return the labels of a sample, none if it states that it has none; None if it states nothing."""
    match label:
        case Separated(text):
            return _checked([_number_or_word(word.strip()) for word in text.split(mark)], str(path), name)
        case tuple() | None:
            return label
        case "":
            return ()
        case int():
            return (label,) if label >= 0 else None  # as in test sets
    return (label,)


def _number_or_word(text: str) -> int | str:
    return int(text) if _NUMBER.fullmatch(text) else text


def _checked(labels: Sequence[object], path: str, name: str) -> tuple[int | str, ...]:
    fault = fault_among(labels)
    check(
        fault is None,
        f"{path}:{name}: among the labels is {fault}. Correct it; an image without labels has an empty list, or an "
        "empty cls.",
    )
    return tuple(label for label in labels if isinstance(label, int | str))


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # it is a regular file
    with file:
        return file.read()
