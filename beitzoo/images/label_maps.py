"""Label maps: the class of every pixel of an image, read from a mask file. What does not fit is an error, no guess.

A mask is a file of numbers or, where a colour table says which colour is which class, of colours. A label map is what
it stands for: an array (H, W) of uint8 with classes 0 to K - 1, and 255 where a pixel is of no class.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from beitzoo.errors import check
from beitzoo.images.files import Encoded, ImageError, opened

# The number of a pixel of no class.
IGNORE = 255

Numbers = np.ndarray[Any, np.dtype[Any]]
LabelMap = np.ndarray[Any, np.dtype[np.uint8]]

_LARGEST = 2**16
# What an error says of numbers or colours that stand for nothing: the most frequent few.
_EXAMPLES = 5
# Pillow scales grey of 2 and 4 bits to the range of 8, by these factors.
_FACTORS = {"L;2": 85, "L;4": 17}
_LOSSLESS_TIFF = (None, "raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "zstd", "lzma")
_WHITE_IS_ZERO, _PHOTOMETRIC = 0, 262


_KINDS = {
    "RGB": "colours (RGB)",
    "RGBA": "colours (RGBA)",
    "CMYK": "colours (CMYK)",
    "LA": "grey with transparency",
    "PA": "a palette with transparency",
    "F": "fractions (32-bit floating point)",
    "1": "numbers (1 bit)",
    "L": "numbers (8-bit grey)",
    "I": "numbers (32 bits)",
    "I;16": "numbers (16-bit grey)",
}


class MaskError(ImageError):
    """A mask that can be read, but does not say what is asked: another size, numbers out of range, another kind."""


class UnlabelledError(MaskError):
    """A mask of which no pixel has a class: nothing can be learned from it, nor measured on it."""


@dataclass(frozen=True)
class MaskLabels:
    """What the pixels of masks stand for.

    Attributes:
        names: Of the K classes, in the order of the model's outputs: at least 2 and at most 255.
        reduce_zero_label: Number 0 stands for no class and number k + 1 for class k, as in ADE20K's files. 255 stays
            no class, so there are 254 classes at most.
        ignore: Numbers in the files that stand for no class, besides 255.
        colours: Of masks in colour, red, green and blue of each class; all other colours stand for no class. None
            where masks hold numbers.

    Raises:
        InvalidValueError: These contradict each other.
    """

    names: tuple[str, ...]
    reduce_zero_label: bool = False
    ignore: frozenset[int] = frozenset()
    colours: Mapping[str, tuple[int, int, int]] | None = None

    def __post_init__(self) -> None:
        most = IGNORE - self.reduce_zero_label
        check(
            2 <= len(self.names) <= most,
            f"Masks of {len(self.names):,} classes: a label map has 2 to {most} classes"
            f"{' where number 0 stands for none' * self.reduce_zero_label}. Name all classes, the background too.",
        )
        empty = [place for place, name in enumerate(self.names) if not name.strip()]
        check(not empty, f"Class {empty[:1]} has no name; give every class one.")
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        check(not twice, f"Two classes are called {twice[:1]}; give each a name of its own.")
        wrong = sorted(number for number in self.ignore if not 0 <= number < _LARGEST)
        check(
            not wrong, f"{wrong[:1]} is to be ignored, and masks have numbers from 0 to {_LARGEST - 1:,}; leave it out."
        )
        taken = [self.names[n - self.first] for n in sorted(self.ignore) if 0 <= n - self.first < len(self.names)]
        check(
            not taken,
            f"The number of {taken[:1]} is to be ignored. Leave it out of ignore, or name only the classes that are "
            "left and number the masks anew.",
        )
        if self.colours is not None:
            self._check_colours(self.colours)

    def _check_colours(self, colours: Mapping[str, tuple[int, int, int]]) -> None:
        check(
            not (self.reduce_zero_label or self.ignore),
            "Masks in colour have no numbers; leave out reduce_zero_label and ignore. Other colours than those of the "
            "table stand for no class.",
        )
        missing, foreign = set(self.names) - colours.keys(), colours.keys() - set(self.names)
        check(not missing, f"The colour table lacks {', '.join(sorted(missing))}; give every class a colour.")
        check(not foreign, f"The colour table has {', '.join(sorted(foreign))}, which is no class; leave it out.")
        for name, colour in colours.items():
            check(
                len(colour) == 3 and all(0 <= part <= 255 for part in colour),
                f"The colour of {name} is {tuple(colour)}; expected red, green and blue, each from 0 to 255.",
            )
        owners: dict[tuple[int, ...], str] = {}
        for name, colour in colours.items():
            other = owners.setdefault(tuple(colour), name)
            check(
                other == name, f"{other} and {name} have the same colour {tuple(colour)}; masks cannot tell them apart."
            )

    @property
    def first(self) -> int:
        """The number of the first class in mask files."""
        return int(self.reduce_zero_label)

    @cached_property
    def _table(self) -> np.ndarray[Any, np.dtype[np.int16]]:
        """Class of each number from 0 to 65,535; -1 where it stands for nothing."""
        table = np.full(_LARGEST, -1, dtype=np.int16)
        table[self.first : self.first + len(self.names)] = range(len(self.names))
        table[[IGNORE, *([0] if self.reduce_zero_label else []), *self.ignore]] = IGNORE
        return table

    def of_numbers(self, numbers: Numbers) -> LabelMap:
        """Return the label map of the numbers in a mask.

        Args:
            numbers: Whole numbers (H, W) of any type.

        Raises:
            MaskError: Says which numbers stand for nothing, and how many pixels have them.
        """
        if numbers.dtype.itemsize > 2 and ((numbers < 0) | (numbers >= _LARGEST)).any():
            raise MaskError(self._what_is_wrong(numbers))
        classes = np.take(self._table, numbers)
        if classes.min(initial=0) < 0:
            raise MaskError(self._what_is_wrong(numbers))
        return classes.astype(np.uint8)

    def _what_is_wrong(self, numbers: Numbers) -> str:
        found = Counter(dict(zip(*(part.tolist() for part in np.unique(numbers, return_counts=True)), strict=True)))
        wrong = {n: count for n, count in found.most_common() if not 0 <= n < _LARGEST or self._table[n] < 0}
        shown = ", ".join(
            f"{number} ({count:,} pixel{'s' * (count > 1)})" for number, count in list(wrong.items())[:_EXAMPLES]
        )
        more = f" and {len(wrong) - _EXAMPLES} others" * (len(wrong) > _EXAMPLES)
        last = self.first + len(self.names) - 1
        both = f"If {last + 1} stands for no class, add it to ignore; if 0 does, set reduce_zero_label"
        either = "Name all classes, or add numbers that stand for none to ignore"
        return (
            f"numbers out of range: {shown}{more}. The {len(self.names)} classes have the numbers {self.first} to "
            f"{last}, and 255 stands for no class. {both if {last + 1} == wrong.keys() and not self.first else either}"
        )

    def of_colours(self, colours: Numbers) -> LabelMap:
        """Return the label map of a mask in colour, (H, W, 3) of uint8; a colour of no class becomes 255."""
        assert self.colours is not None
        own = np.array([self.colours[name] for name in self.names], dtype=np.uint8)
        packed = _packed(own)
        order = np.argsort(packed)
        pixels = _packed(colours)
        places = np.searchsorted(packed[order], pixels).clip(max=len(order) - 1)
        return np.where(packed[order][places] == pixels, order[places], IGNORE).astype(np.uint8)


def read_label_map(mask: Path | Encoded, labels: MaskLabels, size: tuple[int, int] | None = None) -> LabelMap:
    """Read a mask as label map (H, W) of uint8: classes 0 to K - 1, and `IGNORE`.

    Masks are PNG or TIFF files, which keep every number. Grey ones of 1 to 16 bits and palettes are read as numbers; of
    a palette it is the place in it that counts, not the colour. With a colour table, masks in RGB and palettes are read
    as colours, and transparency is dropped. A mask is turned upright as its own EXIF data say, like any image, and must
    then have the size of its image. It is never resized.

    Args:
        mask: A file, or a file within a file; not an open image, whose numbers Pillow may have scaled.
        labels: What its pixels stand for.
        size: Width and height of its image, upright; None asks for none.

    Raises:
        MaskError: It has another size, numbers that stand for nothing, or is no mask of this kind.
        ImageError: It cannot be read.
    """
    with opened(mask) as image:
        _check_file(image)
        factor = _FACTORS.get(_rawmode(image)[:3], 1)
        upright = ImageOps.exif_transpose(image)
        if size is not None and upright.size != size:
            raise MaskError(_other_size(upright.size, size))
        if labels.colours is not None:
            return labels.of_colours(_colours(upright))
        return labels.of_numbers(_numbers(upright) // factor)


def unknown_colours(mask: Path | Encoded, labels: MaskLabels) -> Counter[tuple[int, int, int]]:
    """Count the pixels of each colour of a mask that stands for no class."""
    with opened(mask) as image:
        colours = _colours(image)
    pixels, counts = np.unique(_packed(colours[labels.of_colours(colours) == IGNORE]), return_counts=True)
    found = zip(pixels.tolist(), counts.tolist(), strict=True)
    return Counter({(pixel >> 16, pixel >> 8 & 255, pixel & 255): count for pixel, count in found})


def _packed(colours: Numbers) -> Numbers:
    """Return colours (..., 3) as one number each."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


def _check_file(image: Image.Image) -> None:
    """Refuse files whose pixels may not be those that were saved."""
    if image.format not in ("PNG", "TIFF"):
        lossy = ", which does not keep numbers as they are" * (image.format in ("JPEG", "WEBP", "AVIF"))
        raise MaskError(f"a {image.format} file{lossy}; masks are PNG or TIFF files. Save them as PNG")
    if getattr(image, "n_frames", 1) > 1:
        raise MaskError("a file of several images, of which only one could be the mask; save that as PNG")
    compression = image.info.get("compression")
    if image.format == "TIFF" and compression not in _LOSSLESS_TIFF:
        raise MaskError(f"a TIFF file compressed as {compression}, which does not keep numbers; save it as PNG")
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise MaskError("a TIFF file whose numbers are inverted (WhiteIsZero); save it as PNG")


def _colours(image: Image.Image) -> Numbers:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise MaskError(
            f"{_KINDS.get(image.mode, image.mode)}, where colours are expected; leave out the colour table, or give "
            "masks in RGB"
        )
    image.load()
    image.info.pop("transparency", None)  # `convert` would warn of it
    return np.asarray(image.convert("RGB"))


def _numbers(image: Image.Image) -> Numbers:
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise MaskError(
            f"{_KINDS.get(image.mode, image.mode)}, where numbers of classes are expected{_equal_channels(image)}; "
            "give a table of the classes' colours, or save masks in one channel"
        )
    numbers = np.asarray(image)
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def _rawmode(image: Image.Image) -> str:
    """Return how pixels lie in the file of an image that is not loaded yet."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _equal_channels(image: Image.Image) -> str:
    channels = image.split()[:3]
    equal = len(channels) == 3 and all(channel.tobytes() == channels[0].tobytes() for channel in channels)
    return " (all channels are equal, so one of them may be what is meant)" * equal


def _other_size(size: tuple[int, int], image: tuple[int, int]) -> str:
    turned = size == image[::-1]
    return (
        f"it has {size[0]} x {size[1]} pixels and its image {image[0]} x {image[1]}"
        f"{', upright as its EXIF data say: the mask may be of the photograph before it was turned' * turned}. Make "
        "the mask anew, or resize it by nearest"
    )
