"""Folders of images: which files in them are read, and which are left out and why."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from beitzoo.images.files import READS_AVIF

_JPEG = {".jfif", ".jpe", ".jpeg", ".jpg"}
_AVIF = {".avif"} if READS_AVIF else set()
SUFFIXES = frozenset({".bmp", ".gif", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp", *_JPEG, *_AVIF})
_UNDECODED = {".heic": "HEIC", ".heif": "HEIC", ".avif": "AVIF"}
# Folders that tools leave among images, of copies of them: archives made on macOS, a file server's thumbnails.
_OF_TOOLS = ("__MACOSX", "@eaDir")

HIDDEN = "hidden, or left by a tool"
EMPTY_CLASSES = "class folders without an image"
OUTSIDE = "outside of class folders"
NO_IMAGES = "not called like images"
WITHOUT_MASK = "images without a mask"
WITHOUT_IMAGE = "masks without an image"

# Names that a description gives of those that were left out for the same reason.
_EXAMPLES = 3


class LeftOut:
    """What was found and not taken, counted by the reason.

    Attributes:
        counts: How many there are of each reason.
        examples: The first few names of each.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(name)

    def take(self, other: "LeftOut") -> None:
        """Count all that another counted."""
        self.counts.update(other.counts)
        for reason, examples in other.examples.items():
            own = self.examples.setdefault(reason, [])
            own += examples[: _EXAMPLES - len(own)]

    def describe(self) -> list[str]:
        """Say what was left out and why, in a line for each reason."""
        return [
            f"Left out {count:,}, {reason}: {', '.join(self.examples[reason])}{', ...' * (count > _EXAMPLES)}"
            for reason, count in self.counts.items()
        ]


def find_images(places: Iterable[str], left_out: LeftOut | None = None) -> Iterator[Path]:
    """Turn files, folders (searched through) and globs into image paths, in order, one by one.

    A file is taken at its word; of a folder, what is called like an image. A place where there is nothing is itself
    among the paths, so that it is reported and not passed over.

    Args:
        places: As a person writes them; `~` is the home folder.
        left_out: Receives what folders hold that is no image.
    """
    for place in places:
        path = place if "\0" in place else os.path.expanduser(place)
        is_glob = "\0" not in path and not os.path.lexists(path)
        yield from _images_of(sorted(glob.glob(path, recursive=True)) if is_glob else [path], path, left_out)


def images_at(name: str, left_out: LeftOut | None = None) -> Iterator[Path]:
    """Return the file of that name, whatever characters are in it, or the images below the folder; else the name."""
    return _images_of([name], name, left_out)


def _images_of(names: Iterable[str], place: str, left_out: LeftOut | None) -> Iterator[Path]:
    found = False
    for name in names:
        for image in images_below(Path(name), left_out) if os.path.isdir(name) else [Path(name)]:
            found = True
            yield image
    if not found:
        yield Path(place)


def images_below(folder: Path, left_out: LeftOut | None = None, base: Path | None = None) -> Iterator[Path]:
    """Walk through a folder in order of names; a folder in it that cannot be listed is among the paths itself.

    Links to folders are followed, except back to a folder they are in, whose images are found anyway. What is hidden
    or was left by a tool is not entered.

    Args:
        folder: Where the walk starts.
        left_out: Receives what is no image, by its path below `base`, or else below the folder.
        base: A folder above.
    """
    left_out = LeftOut() if left_out is None else left_out
    base = folder if base is None else base
    left: list[tuple[Path, bool, frozenset[tuple[int, int]]]] = [(folder, True, frozenset())]
    while left:
        path, is_folder, above = left.pop()
        if path is not folder and (reason := why_not(path.name, is_folder)):
            left_out.add(reason, str(path.relative_to(base)))
            continue
        if not is_folder:
            yield path
            continue
        try:
            status = path.stat()
            within = above | {(status.st_dev, status.st_ino)}
            if within == above:
                continue
            with os.scandir(path) as entries:
                inside = sorted(((entry.name, _is_folder(entry)) for entry in entries), reverse=True)
        except OSError:
            yield path
            continue
        left += [(path / name, is_folder, within) for name, is_folder in inside]


def why_not(name: str, is_folder: bool) -> str | None:
    """Say why a file or folder of that name is not taken, or None if it is."""
    if name.startswith(".") or name in _OF_TOOLS:
        return HIDDEN
    suffix = os.path.splitext(name)[1].lower()
    if is_folder or suffix in SUFFIXES:
        return None
    if suffix in _UNDECODED:
        return f"{_UNDECODED[suffix]}, which is not decoded here (convert them to JPEG or PNG)"
    return NO_IMAGES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; it is no folder to search, and as a file it gets its reason
        return False
