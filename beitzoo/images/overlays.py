"""Label maps as pictures for people: an image under the colours of its classes, beside a legend.

Shapes: H W pixels of the image, K classes.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beitzoo.errors import check
from beitzoo.images import pictures
from beitzoo.images.label_maps import IGNORE
from beitzoo.images.pictures import FAINT, INK, PAPER, Array
from beitzoo.zoo.colours import Colour
from beitzoo.zoo.networks import Pair

_LEAST, _MOST = 512, 1600  # pixels of the longer side of the image as it is shown
_COVER = 0.6  # share of a class's colour in what is shown
_GREY = 0.7  # share of the image's own colours that is taken away, so that they are not taken for those of classes
_ENTRIES = 24  # classes that a legend names
_NARROWEST = 18  # of a column of the legend, in sizes of its text
_LONGEST_NAME = 16  # likewise, of a name
_EDGE: Colour = (120, 120, 120)
# Pillow's own font has English letters only; of others accents are dropped, which these letters do not have.
_PLAIN = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "Æ": "Ae", "Œ": "Oe", "Ø": "O"})
_PLAIN |= str.maketrans({"Ł": "L", "Đ": "D", "\u2013": "-", "\u2014": "-", "\u00a0": " "})


@dataclass(frozen=True)
class PixelClasses:
    """What the numbers in a label map stand for.

    Attributes:
        names: Of the classes, in the order of their numbers.
        colours: Likewise.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __post_init__(self) -> None:
        check(
            len(self.names) == len(self.colours) <= IGNORE,
            f"Got {len(self.names)} names and {len(self.colours)} colours; give one of each for every class, and "
            f"{IGNORE} at most.",
        )

    def palette(self) -> list[int]:
        """Return the levels of 256 colours as Pillow takes them; numbers that stand for no class are black."""
        flat = [level for colour in self.colours for level in colour]
        return flat + [0] * (3 * 256 - len(flat))


def count_pixels(labels: Array, classes: PixelClasses) -> list[tuple[int, int]]:
    """Return each class that is in a label map (H, W) with the number of its pixels, most first.

    Pixels of no class are counted as `IGNORE`.

    Raises:
        InvalidValueError: A number stands for nothing.
    """
    counts = np.array(Image.fromarray(labels).histogram())
    foreign = [number for number in np.flatnonzero(counts) if len(classes.names) <= number != IGNORE]
    check(
        not foreign,
        f"A label map has the numbers {', '.join(map(str, foreign[:5]))}, and there are {len(classes.names)} classes, "
        "from 0; give the names of all.",
    )
    order = np.argsort(-counts, kind="stable")
    return [(int(number), int(counts[number])) for number in order if counts[number]]


def palette_image(labels: Array, classes: PixelClasses) -> Image.Image:
    """Return a label map (H, W), uint8, as an image whose pixels are the numbers and whose palette is the colours."""
    image = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    image.putpalette(classes.palette())
    return image


def overlay(image: Image.Image, labels: Array, classes: PixelClasses) -> Image.Image:
    """Draw an image under the colours of its classes, with a legend of the classes in it and their shares.

    The longer side is shown with 512 to 1600 pixels. The legend is below a wide image and beside a high one; it names
    the 24 largest classes. Accents are dropped, and a name with other characters that the font lacks, which has English
    letters only, is given by its number.

    Args:
        image: Upright, as it was labelled.
        labels: Numbers of classes, uint8 (H, W) of the image's size; pixels of 255 are left as they are.
        classes: What they stand for.

    Raises:
        InvalidValueError: Sizes differ, or a number stands for nothing.
    """
    check(
        image.size == labels.shape[::-1],
        f"An image of {image.width} x {image.height} pixels and a label map of {labels.shape[1]} x {labels.shape[0]}; "
        "give both of one size.",
    )
    counts = count_pixels(labels, classes)
    size = _shown_size(image.size)
    panel = cover(pictures.fit(image, size), labels, classes)
    text_size = max(14, round(max(size) / 64))
    margin = text_size
    if panel.width >= panel.height:
        width = max(panel.width, _NARROWEST * text_size)
        whole = pictures.stack([panel, legend(counts, classes, text_size, width=width)], gap=margin)
    else:
        width = 2 * _NARROWEST * text_size
        whole = pictures.beside([panel, legend(counts, classes, text_size, width, panel.height)], gap=margin)
    return pictures.framed(whole, margin)


def _shown_size(size: Pair) -> Pair:
    """Enlarge a small image a whole number of times, so that pixels stay pixels, and reduce a large one."""
    longer = max(size)
    if longer <= _MOST:
        factor = math.ceil(_LEAST / longer)
        return size[0] * factor, size[1] * factor
    return max(1, round(size[0] * _MOST / longer)), max(1, round(size[1] * _MOST / longer))


def cover(panel: Image.Image, labels: Array, classes: PixelClasses) -> Image.Image:
    """Blend an image with the colours of classes; what is at the edge of its region has the full colour.

    Args:
        panel: The image, of any size.
        labels: Numbers of classes, uint8 (H, W); brought to the image's size by nearest.
        classes: What they stand for.
    """
    shown = np.array(Image.fromarray(labels).resize(panel.size, Image.Resampling.NEAREST))
    colours = Image.fromarray(np.array(classes.palette(), dtype=np.uint8).reshape(256, 3)[shown])
    paler = Image.blend(panel.convert("RGB"), panel.convert("L").convert("RGB"), _GREY)
    strength = np.where(_edges(shown, max(1, round(max(panel.size) / 800))), 1, _COVER)
    strength[shown == IGNORE] = 0
    stencil = Image.fromarray((strength * 255).round().astype(np.uint8))
    return Image.composite(colours, paler, stencil)


def _edges(labels: Array, width: int) -> Array:
    """Tell which pixels have one of another class within `width` pixels to the right, to the left, below or above."""
    edges = np.zeros(labels.shape, dtype=bool)
    for step in range(1, width + 1):
        beside = labels[:, step:] != labels[:, :-step]
        below = labels[step:] != labels[:-step]
        edges[:, step:] |= beside
        edges[:, :-step] |= beside
        edges[step:] |= below
        edges[:-step] |= below
    return edges


# ---- legend --------------------------------------------------------------------------------------------------


def legend(
    counts: Sequence[tuple[int, int]], classes: PixelClasses, size: int, width: int, height: int | None = None
) -> Image.Image:
    """List classes in columns: colour, name and share of the pixels in per cent.

    Args:
        counts: Classes with the number of their pixels, in order; of these all shares are made.
        classes: What they stand for.
        size: Of the text, pixels.
        width: Of the whole at most.
        height: If given, columns are as long as fits, and what does not fit is summed up; else they are evenly long.
    """
    font = ImageFont.load_default(size)
    total = max(1, sum(pixels for _, pixels in counts))
    step = round(1.5 * size)
    entries = [_Entry(_name(number, classes), pixels / total, _swatch(number, classes)) for number, pixels in counts]
    widest = max((font.getlength(entry.name) for entry in entries[:_ENTRIES]), default=0)
    column = math.ceil(min(widest, _LONGEST_NAME * size) + 6.5 * size)
    columns = max(1, (width + size) // (column + size))
    column = min(column, width)
    room = _ENTRIES if height is None else min(_ENTRIES, columns * max(2, height // step))
    if len(entries) > room:
        rest = entries[room - 1 :]
        entries = [*entries[: room - 1], _Entry(f"and {len(rest)} more", sum(entry.share for entry in rest), None)]
    rows = math.ceil(len(entries) / columns) if height is None else min(len(entries), max(2, height // step))
    strips = [
        pictures.stack([_line(entry, column, size) for entry in entries[start : start + rows]], gap=0)
        for start in range(0, len(entries), rows)
    ]
    return pictures.beside(strips, gap=size)


@dataclass(frozen=True)
class _Entry:
    """A line of a legend; without a colour it is about several classes."""

    name: str
    share: float
    colour: Colour | None


def _swatch(number: int, classes: PixelClasses) -> Colour:
    return PAPER if number == IGNORE else classes.colours[number]


def _name(number: int, classes: PixelClasses) -> str:
    """Return what a class is called, in characters that can be drawn."""
    if number == IGNORE:
        return "no class"
    name = unicodedata.normalize("NFKD", classes.names[number]).translate(_PLAIN)
    name = "".join(character for character in name if not unicodedata.combining(character))
    return name if name.strip() and all(_is_drawn(character) for character in name) else f"class {number}"


@cache
def _is_drawn(character: str) -> bool:
    """Tell whether the font has a character: all that it lacks look the same, like one that nobody has."""
    font = ImageFont.load_default(24)
    if not character.isprintable() or 0xD800 <= ord(character) <= 0xDFFF:
        return False
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))


def _line(entry: _Entry, width: int, size: int) -> Image.Image:
    font = ImageFont.load_default(size)
    strip = Image.new("RGB", (width, round(1.5 * size)), PAPER)
    pen = ImageDraw.Draw(strip)
    middle = strip.height // 2
    if entry.colour is not None:
        top = middle - size // 2
        pen.rectangle([0, top, round(1.4 * size), top + size], fill=entry.colour, outline=_EDGE)
    share = "< 0.1 %" if 0 < entry.share < 0.0005 else f"{100 * entry.share:.1f} %"
    left = round(2 * size)
    name = pictures.shortened(entry.name, width - left - round(4.2 * size), font)
    pen.text((left, middle), name, fill=FAINT if entry.colour is None else INK, font=font, anchor="lm")
    pen.text((width - 1, middle), share, fill=FAINT, font=font, anchor="rm")
    return strip
