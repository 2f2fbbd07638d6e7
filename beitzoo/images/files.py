"""Image files: which there are, and the pixels in them. What cannot be read is an error with its reason."""

import glob
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

from beitzoo.errors import UserError

_logger = logging.getLogger(__name__)

# A file is opened as what it contains, whatever it is called; decoders outside this list never run.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# What one image may take while it is decoded; the header says so beforehand. Enough for cameras of 60 megapixels.
MAX_BYTES = 500_000_000
# Pillow holds 4 bytes a pixel, and while it turns or converts an image, two of them.
_BYTES_PER_PIXEL = 8
# libwebp has two canvases of its own; a progressive JPEG all its coefficients; 16 bits become 8 by way of 32.
_BYTES_PER_PIXEL_MORE = 16
# A progressive JPEG is gone through once per scan, of which a small file can have thousands; cameras write about ten.
_MAX_SCANNED_PIXELS = 1_500_000_000


class ImageError(UserError, ValueError):
    """A file that is not an image, or not one we open."""


def open_image(path: Path, in_chans: int = 3) -> Image.Image:
    """Decode an image upright, as grey for one channel and RGB otherwise.

    Of an animation it is the first frame. Transparency is dropped and colour profiles are not applied, as when timm
    reads its datasets; 16 bits are scaled to 8.

    Raises:
        ImageError: The file is missing, damaged, cut short, too large or of a format outside `FORMATS`.
    """
    with opened(path) as image:
        image.load()
        _turn_upright(image, path)
        image.info.pop("transparency", None)  # `convert` would warn, and change nothing
        mode = "L" if in_chans == 1 else "RGB"
        eight_bit = _eight_bit(image)
        return eight_bit if eight_bit.mode == mode else eight_bit.convert(mode)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a file whose header is acceptable; no pixel is decoded yet. All that fails inside is an `ImageError`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device could be waited for without end
            raise ImageError("a folder, not an image" if path.is_dir() else "not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            _check_cost(image, path)
            yield image
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such file"
        case Image.UnidentifiedImageError():
            return f"not an image that can be read ({', '.join(FORMATS)})"
        case OSError(errno=int(), strerror=str(reason)):
            return f"the file cannot be opened: {reason}"
        case Image.DecompressionBombError():
            return f"too large: {error}"
        case _:
            return f"damaged or unreadable: {error or type(error).__name__}"


def _check_cost(image: Image.Image, path: Path) -> None:
    """Refuse by its header what would take too much memory or time to decode."""
    pixels = image.width * image.height
    progressive = "progressive" in image.info
    costly = image.format == "WEBP" or image.mode.startswith("I;16") or progressive
    most = MAX_BYTES // (_BYTES_PER_PIXEL_MORE if costly else _BYTES_PER_PIXEL)
    if pixels > most:
        raise ImageError(
            f"too large: {image.width} x {image.height} are {pixels:,} pixels, and {most:,} of this kind are decoded "
            "at most; make it smaller"
        )
    if progressive and _has_more_scans(path, _MAX_SCANNED_PIXELS // pixels):
        raise ImageError("too slow: a progressive JPEG with a great many scans; save it anew")


def _has_more_scans(path: Path, most: int) -> bool:
    """Tell whether a JPEG file has more scans than that, by their markers, which cannot be in the data of a scan."""
    scans = 0
    with path.open("rb") as file:
        while scans <= most and (part := file.read(2**20)):
            scans += part.count(b"\xff\xda")
    return scans > most


def _turn_upright(image: Image.Image, path: Path) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # damaged notes about an image do not make its pixels unreadable
        _logger.warning("The EXIF data of %s is damaged, so it is not turned: %s.", path, error)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8; `convert` would clip it."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ImageError("its pixels are 32-bit numbers of unknown range; convert it to 8 or 16 bits")
    return image


def find_images(places: Iterable[str]) -> Iterator[Path]:
    """Turn files, folders (searched through) and globs into image paths, in order, one by one.

    A file is taken at its word; of a folder, what is called like an image. A place where there is nothing is itself
    among the paths, so that it is reported and not passed over.
    """
    for place in places:
        path = place if "\0" in place else os.path.expanduser(place)
        is_glob = "\0" not in path and not os.path.lexists(path)
        yield from _images_of(sorted(glob.glob(path, recursive=True)) if is_glob else [path], path)


def images_at(name: str) -> Iterator[Path]:
    """Return the file of that name, whatever characters are in it, or the images below the folder; else the name."""
    return _images_of([name], name)


def _images_of(names: Iterable[str], place: str) -> Iterator[Path]:
    found = False
    for name in names:
        for image in images_below(Path(name)) if os.path.isdir(name) else [Path(name)]:
            found = True
            yield image
    if not found:
        yield Path(place)


def images_below(folder: Path) -> Iterator[Path]:
    """Walk through a folder in order of names; a folder in it that cannot be listed is among the paths itself.

    Links to folders are followed, except back to a folder they are in, whose images are found anyway.
    """
    left: list[tuple[Path, bool, frozenset[tuple[int, int]]]] = [(folder, True, frozenset())]
    while left:
        path, is_folder, above = left.pop()
        if not is_folder:
            if path.suffix.lower() in SUFFIXES:
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; it is no folder to search, and as a file it gets its reason
        return False
