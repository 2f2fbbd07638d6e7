"""Data sets in several files (shards), such as tables and tars: which files, and which part of the data set each is."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError
from beitzoo.files import full_path
from beitzoo.images.folders import why_not

# How parts of a data set are called in names of files and folders, as in `train-00000-of-00002.parquet`.
PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
PART_OF = {word: part for part, words in PARTS.items() for word in words}
_BRACES = re.compile(r"\{([^{}]*)\}")
_LONGEST_RANGE = 100_000


@dataclass(frozen=True)
class Shards:
    """Files that make up a data set.

    Attributes:
        root: The folder that all are in.
        parts: Files of each part, in order of their names. All are in `train` where nothing is held out by name.
    """

    root: Path
    parts: dict[str, list[Path]]

    @property
    def files(self) -> list[Path]:
        """All files, part by part."""
        return [file for files in self.parts.values() for file in files]


def find_shards(path: Path, suffixes: tuple[str, ...], kind: str) -> Shards:
    """Find files by a folder (searched through), a pattern or the name of one.

    Args:
        path: `*`, `?` and `[...]` as in a shell, and lists and ranges in braces: `{a,b}`, `{0000..0146}`.
        suffixes: Of the files that are meant, in small letters; they select in a folder.
        kind: What such a file is called in messages.

    Raises:
        MissingFileError: There are none.
        FileAccessError: The folder cannot be listed, or what is there is no file.
    """
    path = full_path(path)
    if path.is_dir():
        root, files = path, [file for file in _files_below(path) if file.name.lower().endswith(suffixes)]
    else:
        names = [name for pattern in _expanded(str(path)) for name in _matches(pattern)]
        files = sorted(Path(name) for name in set(names))
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path.parent
    if not files:
        raise MissingFileError(
            f"No {kind} at {path}. Give a folder with {' or '.join(suffixes)} files in it, one such file, or a pattern "
            "such as 'train-*' of them."
        )
    for file in files:
        if not file.is_file():  # a pipe would be waited for without end
            raise FileAccessError(f"{file} is a folder, a pipe or a link to nothing. Remove it, or give other {kind}.")
    return Shards(root, _in_parts(root, files))


def _files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Walk through a folder in order of names, past what is hidden and links back to a folder they are in."""
    within = above | {os.path.realpath(folder)}
    if within == above:
        return
    try:
        with os.scandir(folder) as entries:
            inside = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise FileAccessError(f"The folder {folder} cannot be listed: {error.strerror}. Give another one.") from error
    for name, is_folder in inside:
        if is_folder and why_not(name, is_folder) is None:
            yield from _files_below(folder / name, within)
        elif not is_folder and not name.startswith("."):
            yield folder / name


def _matches(pattern: str) -> list[str]:
    return [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)


def _expanded(pattern: str) -> list[str]:
    """Write out the first pair of braces, and so all."""
    match = _BRACES.search(pattern)
    if match is None or os.path.lexists(pattern):
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in _choices(match[1]) for name in _expanded(f"{before}{choice}{after}")]


def _choices(inside: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    if not (first.isdecimal() and last.isdecimal() and int(last) - int(first) < _LONGEST_RANGE):
        raise InvalidValueError(
            f"{{{inside}}} is no range of at most {_LONGEST_RANGE:,} numbers; write one such as {{0000..0146}}."
        )
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]


def _in_parts(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Sort files by the part that their names say; what says nothing is for training, as is all if nothing else is."""
    parts: dict[str, list[Path]] = {part: [] for part in PARTS}
    for file in files:
        parts[_part_of(file.relative_to(root))].append(file)
    found = {part: those for part, those in parts.items() if those}
    return found if "train" in found else {"train": files}


def arrange(parts: Sequence[str]) -> tuple[list[int], dict[str, range]]:
    """Bring images into the order of their parts; return it, as indices, and where each part then lies.

    Parts count where one of several is to train on, and images in no part are then not used; else there are none.

    Args:
        parts: Of each image; empty where none is named.
    """
    order = [*PARTS, ""]
    counts = Counter(parts)
    places, end = {}, 0
    for part in filter(counts.__contains__, order):
        places[part] = range(end, end + counts[part])
        end += counts[part]
    named = {part: place for part, place in places.items() if part}
    own = named if "train" in named and len(named) > 1 else {}
    return sorted(range(len(parts)), key=lambda place: order.index(parts[place])), own


def _part_of(name: Path) -> str:
    """Return the part that a word of a name says, the last folder before the first."""
    for place in reversed(name.parts):
        for word in re.split(r"[^a-z0-9]+", place.lower()):
            if word in PART_OF:
                return PART_OF[word]
    return "train"
