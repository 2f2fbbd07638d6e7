"""Image files and the pixels in them. What cannot be read is an error with its reason."""

import logging
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageOps, features

from beitzoo.errors import InvalidOptionError, UserError

_logger = logging.getLogger(__name__)

# A file is opened as what it contains, whatever it is called; decoders outside this list never run.
# Pillow can be built without a decoder for AVIF.
READS_AVIF = bool(features.check("avif"))
# They are tried in this order.
FORMATS = ("JPEG", "PNG", "WEBP", *(("AVIF",) if READS_AVIF else ()), "BMP", "GIF", "PPM", "TIFF")

# Notes of a JPEG that may say how it is turned; without them, looking costs a tenth of decoding a tiny image.
_TURNING = {"exif", "xmp"}
# Values of the EXIF orientation that swap width and height.
_ON_ITS_SIDE = (5, 6, 7, 8)
# What one image may take while it is decoded; the header says so beforehand. Enough for cameras of 60 megapixels.
MAX_BYTES = 500_000_000
# Pillow holds 4 bytes a pixel, and while it turns or converts an image, two of them.
_BYTES_PER_PIXEL = 8
# libwebp has two canvases of its own, and so has libavif; a progressive JPEG all its coefficients; 16 bits become 8 by
# way of 32.
_BYTES_PER_PIXEL_MORE = 16
# A file up to this size is read at once: decoders read a header in many small steps, which costs more in a file.
_READ_AT_ONCE = 2**20
# A progressive JPEG is gone through once per scan, of which a small file can have thousands; cameras write about ten.
_MAX_SCANNED_PIXELS = 1_500_000_000


class ImageError(UserError, ValueError):
    """A file that is not an image, or not one we open."""


class Encoded(ABC):
    """An image file that lies within another file, such as a table or a tar, and is read when it is opened.

    It pickles to a few bytes, so it costs little to send to another process.

    Attributes:
        container: The file that it lies in.
        place: Where in it: the number of a row, or the name of a member.
    """

    container: Path
    place: int | str

    @property
    @abstractmethod
    def size(self) -> int | None:
        """How many bytes it has, without reading them; None if it is not there."""

    @abstractmethod
    def read(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            ImageError: There are none.
            OSError: The container cannot be read.
        """


def open_image(path: str | Path, in_chans: int = 3) -> Image.Image:
    """Decode an image upright, as grey for one channel and RGB otherwise, as all commands do.

    It is turned as its EXIF data say; 16 bits are scaled to 8; CMYK and palettes become RGB. Transparency is dropped
    and colour profiles are not applied, as when timm reads its datasets. Of an animation it is the first frame.

    Args:
        path: A file; `~` is the home folder, unless there is a file of that very name.
        in_chans: 1 for grey, else RGB.

    Raises:
        ImageError: The file is missing, damaged, cut short, too large or of a format outside `FORMATS`.
        InvalidOptionError: It is no path.
    """
    if not isinstance(path, str | Path):
        raise InvalidOptionError(
            f"open_image takes a path, and this is {_what(path)}; convert decoded images to PIL with Image.fromarray."
        )
    name = str(path)
    if name.startswith("~") and "\0" not in name and not os.path.lexists(name):
        path = name = os.path.expanduser(name)
    return _decoded(path if isinstance(path, Path) else Path(path), name, in_chans)


def _decoded(source: Path | Encoded, name: str, in_chans: int) -> Image.Image:
    with opened(source) as image:
        image.load()
        return _converted(_upright(image, name, in_place=True), in_chans)


def upright_size(source: Path | Encoded) -> tuple[int, int]:
    """Return width and height of the image that `as_image` returns, from the header alone.

    Raises:
        ImageError: The file cannot be read, as far as the header tells.
    """
    with opened(source) as image:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _ON_ITS_SIDE
        except Exception:  # `as_image` does not turn by damaged notes either
            turned = False
        return image.size[::-1] if turned else image.size


def as_image(source: Any, in_chans: int = 3) -> Image.Image:
    """Return what `open_image` does, of a path, of a file within a file, or of an image that is decoded already.

    Args:
        source: A path, a file in a table or a tar (`Encoded`), a PIL image, or unsigned bytes as an array (H, W) or
            (H, W, 1 or 3 or 4) or as a tensor (1 or 3 or 4, H, W).
        in_chans: 1 for grey, else RGB.

    Raises:
        ImageError: The image cannot be read.
        InvalidOptionError: It is none of these.
    """
    if isinstance(source, str | Path):
        return open_image(source, in_chans)
    if isinstance(source, Encoded):
        return _decoded(source, f"{source.container}:{source.place}", in_chans)
    if isinstance(source, Image.Image):
        try:
            source.load()  # Pillow may read the file behind it only now
        except Exception as error:
            raise ImageError(_reason(error)) from error
        return _converted(_upright(source, "an image"), in_chans)
    array = source.permute(1, 2, 0).numpy(force=True) if hasattr(source, "permute") and source.ndim == 3 else source
    shape: tuple[int, ...] = tuple(getattr(array, "shape", ()))
    channels = shape[-1] if len(shape) == 3 else 1
    if str(getattr(array, "dtype", "")) != "uint8" or len(shape) not in (2, 3) or channels not in (1, 3, 4):
        raise InvalidOptionError(
            f"An image cannot be made of {_what(source)}. Give a path, a PIL image, an array (height, width, channels) "
            "of uint8, or a tensor (channels, height, width) of uint8; what is normalised already goes to the model "
            "itself."
        )
    return _converted(Image.fromarray(array[:, :, 0] if shape[2:] == (1,) else array), in_chans)


def _what(value: Any) -> str:
    """Describe a value that is not what it should be."""
    kind = type(value).__name__
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return f"a {kind}" if shape is None else f"a {kind} of shape {tuple(shape)} and {dtype}"


def _converted(image: Image.Image, in_chans: int) -> Image.Image:
    image.info.pop("transparency", None)  # `convert` would warn, and change nothing
    mode = "L" if in_chans == 1 else "RGB"
    eight_bit = _eight_bit(image)
    return eight_bit if eight_bit.mode == mode else eight_bit.convert(mode)


@contextmanager
def opened(source: Path | Encoded) -> Iterator[Image.Image]:
    """Open a file whose header is acceptable; no pixel is decoded yet. All that fails inside is an `ImageError`."""
    try:
        with _bytes_of(source) as file:
            try:
                with Image.open(file, formats=FORMATS) as image:
                    _check_cost(image, file)
                    yield image
            except Image.UnidentifiedImageError as error:
                raise ImageError(_foreign(file)) from error
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ImageError(_reason(error)) from error


def _bytes_of(source: Path | Encoded) -> BinaryIO:
    """Open what is not empty."""
    if isinstance(source, Encoded):
        content = source.read()
        if not content:
            raise ImageError("it is empty")
        return BytesIO(content)
    status = source.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device could be waited for without end
        raise ImageError("a folder, not an image" if source.is_dir() else "not a regular file")
    if not status.st_size:
        raise ImageError("the file is empty")
    # By the file and not by its name: Pillow maps some named files into memory, which ends the process where they are
    # cut short meanwhile, and scrambles the pixels of a turned TIFF (13.0).
    if status.st_size > _READ_AT_ONCE:
        return source.open("rb")
    with source.open("rb", buffering=0) as file:
        return BytesIO(file.read())


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such file"
        case OSError(errno=int(), strerror=str(reason)):
            return f"the file cannot be opened: {reason}"
        case Image.DecompressionBombError():
            return f"too large: {error}"
        case _:
            return f"damaged or unreadable: {error or type(error).__name__}"


def _foreign(file: BinaryIO) -> str:
    """Say what a file is that no decoder takes; phones write HEIC, which Pillow does not decode."""
    file.seek(0)
    start = file.read(12)
    brand = start[8:] if start[4:8] == b"ftyp" else b""
    if brand in (b"avif", b"avis"):
        return "an AVIF image, which Pillow does not decode here; convert it to JPEG or PNG"
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        return "a HEIC image, which is not decoded; convert it to JPEG or PNG"
    return f"not an image that can be read ({', '.join(FORMATS)})"


def _check_cost(image: Image.Image, file: BinaryIO) -> None:
    """Refuse by its header what would take too much memory or time to decode."""
    pixels = image.width * image.height
    progressive = "progressive" in image.info
    costly = image.format in ("AVIF", "WEBP") or image.mode.startswith("I;16") or progressive
    most = MAX_BYTES // (_BYTES_PER_PIXEL_MORE if costly else _BYTES_PER_PIXEL)
    if pixels > most:
        raise ImageError(
            f"too large: {image.width} x {image.height} are {pixels:,} pixels, and {most:,} of this kind are decoded "
            "at most; make it smaller"
        )
    if progressive and _has_more_scans(file, _MAX_SCANNED_PIXELS // pixels):
        raise ImageError("too slow: a progressive JPEG with a great many scans; save it again")


def _has_more_scans(file: BinaryIO, most: int) -> bool:
    """Tell whether a JPEG file has more scans than that, by their markers, which cannot be in the data of a scan."""
    scans, place = 0, file.tell()
    file.seek(0)
    while scans <= most and (part := file.read(2**20)):
        scans += part.count(b"\xff\xda")
    file.seek(place)
    return scans > most


def _upright(image: Image.Image, name: str, in_place: bool = False) -> Image.Image:
    """Turn an image as its EXIF data say; in place it takes less memory."""
    if in_place and image.format == "JPEG" and not _TURNING & image.info.keys():
        return image
    try:
        if not in_place:
            return ImageOps.exif_transpose(image)
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # damaged notes about an image do not make its pixels unreadable
        _logger.warning("The EXIF data of %s is damaged, so it is not turned: %s.", name, error)
        return image if in_place else image.copy()
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8; `convert` would clip it."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ImageError("its pixels are 32-bit numbers of unknown range; convert it to 8 or 16 bits")
    return image
