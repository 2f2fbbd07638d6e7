"""Label maps as files: a palette PNG and an overlay of each image, and a CSV of the classes in all of them."""

import errno
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from PIL.Image import Image

from beitzoo.errors import FileAccessError
from beitzoo.files import full_path, write_atomically
from beitzoo.images.files import ImageError, open_image
from beitzoo.images.label_maps import IGNORE
from beitzoo.images.overlays import PixelClasses, count_pixels, overlay, palette_image
from beitzoo.inference.rows import csv_line, open_output, write_lines

if TYPE_CHECKING:
    from beitzoo.inference.segment import Segmentation

LABELS, OVERLAYS, SHARES = "labels", "overlays", "shares.csv"

# Of a row: `index` is the class's number and `share` its part of the pixels, 0 to 1; `label_map` is below the folder.
COLUMNS = ("path", "error", "label_map", "label", "index", "pixels", "share")

_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Labelled:
    """What became of one image.

    Attributes:
        path: The image.
        error: Why nothing was written, or None.
        label_map: The file of its label map, below the folder of all.
        counts: Its classes with the number of their pixels, most first.
    """

    path: Path
    error: str | None
    label_map: Path | None = None
    counts: tuple[tuple[int, int], ...] = ()


class Names:
    """Gives each image a name of its own below one folder, in the order they come.

    It is the image's path below what was named: of `photos`, `photos/a/1.jpg` is called `a/1`; a file that was named
    itself has no folder. What would be called like one before it gets a number: `1_2`, `1_3`. Names that differ in
    capital letters only count as the same, as on some file systems they are.
    """

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def take(self, path: Path, place: str) -> Path:
        """Return the name of an image, without a suffix, that was found by a file, a folder or a glob."""
        plain = _below(path, place).with_suffix("")
        for number in itertools.count(1):
            name = plain if number == 1 else plain.with_name(f"{plain.name}_{number}")
            key = str(name).casefold()
            if key not in self.taken:
                self.taken.add(key)
                return name
        raise AssertionError  # unreachable: the count has no end


def _below(path: Path, place: str) -> Path:
    """Return the path of an image below the folder that a place means, and never one that leads out of it."""
    place = os.path.expanduser(place)
    if os.path.isdir(place):
        base = Path(place)
    elif os.path.lexists(place):
        base = Path(place).parent
    else:
        parts = itertools.takewhile(lambda part: not re.search(r"[*?[]", part), Path(place).parts)
        base = Path(*parts)
    below = path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
    return below if below.name and ".." not in below.parts else Path(path.name or "image")


def check_folder(folder: Path) -> Path:
    """Return the full path of a folder that results can go to: a new one, or an empty one.

    What an earlier call wrote is never mixed with what this one writes.

    Raises:
        FileAccessError: It is a file, has something in it, or cannot be written to.
    """
    folder = full_path(folder)
    try:
        if not folder.is_dir() and os.path.lexists(folder):
            raise FileAccessError(f"--out {folder} is a file; give the name of a new folder.")
        if folder.is_dir() and any(folder.iterdir()):
            raise FileAccessError(
                f"--out {folder} has files in it already, which are not overwritten; give a new folder, or empty it."
            )
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileAccessError:
        raise
    except OSError as error:
        raise _unusable(folder, error) from error
    return folder


def _unusable(folder: Path, error: OSError) -> FileAccessError:
    return FileAccessError(f"--out {folder} cannot be used ({error.strerror}); give another folder.")


@contextmanager
def open_shares(folder: Path) -> Iterator[TextIO]:
    """Open the CSV of a folder; until all rows are written, and if a run ends early, it is `shares.csv.partial`.

    Raises:
        FileAccessError: The folder cannot be made, or the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    with open_output(folder / SHARES) as file:
        write_lines([csv_line(COLUMNS)], file)
        yield file


class LabelFiles:
    """Writes what a segmentation model made of images, one by one, into a folder.

    `labels/NAME.png` has the classes by number, with the palette of their colours; `overlays/NAME.jpg` is for people.

    Args:
        folder: That `check_folder` returned.
        classes: Names and colours of all classes.
        shares: The open CSV.
        overlays: False for none.
    """

    def __init__(self, folder: Path, classes: PixelClasses, shares: TextIO, overlays: bool = True) -> None:
        self.folder = folder
        self.classes = classes
        self.shares = shares
        self.overlays = overlays

    def write_all(self, segmentations: Iterable[tuple["Segmentation", Path]]) -> Iterator[Labelled]:
        """Write all, each with its name, as they come.

        Raises:
            FileAccessError: A file cannot be written, such as on a full disk.
        """
        for segmentation, name in segmentations:
            labelled = self._write(segmentation, name)
            write_lines(map(csv_line, self._rows(labelled)), self.shares)
            yield labelled

    def _write(self, segmentation: "Segmentation", name: Path) -> Labelled:
        assert segmentation.path is not None
        labels = segmentation.labels
        if labels is None:
            return Labelled(segmentation.path, segmentation.error)
        picture = None
        if self.overlays:
            try:
                picture = overlay(open_image(segmentation.path), labels, self.classes)
            except ImageError as error:  # it was there a moment before
                return Labelled(segmentation.path, str(error))
        label_map = Path(LABELS, f"{name}.png")
        _save(palette_image(labels, self.classes), self.folder / label_map, "PNG")
        if picture is not None:
            _save(picture, self.folder / OVERLAYS / f"{name}.jpg", "JPEG")
        return Labelled(segmentation.path, None, label_map, tuple(count_pixels(labels, self.classes)))

    def _rows(self, labelled: Labelled) -> Iterator[tuple[object, ...]]:
        """Return a row for each class in an image, most pixels first, or one with the error."""
        if labelled.error is not None:
            yield labelled.path, labelled.error, "", "", "", "", ""
        total = sum(pixels for _, pixels in labelled.counts)
        for number, pixels in labelled.counts:
            label = "" if number == IGNORE else self.classes.names[number]
            yield labelled.path, "", labelled.label_map, label, number, pixels, f"{pixels / total:.6g}"


def _save(image: Image, path: Path, form: str) -> None:
    options = {"quality": _JPEG_QUALITY, "subsampling": 0} if form == "JPEG" else {}
    write_atomically(path, lambda temporary: image.save(temporary, form, **options))
