"""Pictures for people to look at, put together from images and arrays: text, panels, masks, heat maps, maps of codes.

Everything is a function to a PIL image; `beside` and `stack` put images together. Ink is dark on white, so that a
picture reads the same on a light page and on a dark one.

Shapes: h w patch grid, V codes, D channels of a code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from beitzoo.errors import check
from beitzoo.zoo.networks import Pair

Array = NDArray[Any]
Colour = tuple[int, int, int]

INK: Colour = (34, 34, 34)
FAINT: Colour = (95, 95, 95)
PAPER: Colour = (255, 255, 255)
MASKED: Colour = (128, 128, 128)
MOUNT: Colour = (238, 238, 238)  # around an image that does not fill its place

# Five colours of matplotlib's viridis, which is in the public domain: as lightness rises with the value, it reads in
# print and without colour vision.
_HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
_PANEL = 224  # pixels that the longer side of a panel has about, whatever the image
_TILE = 50  # pixels of a single patch that is shown
_FRAME: Colour = (200, 200, 200)
_LEVELS = (50, 235)  # darkest and lightest level of a code's colour


# ---- putting together ----------------------------------------------------------------------------------------


def beside(images: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Put images side by side, their tops in line."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    whole = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + gap
    return whole


def stack(images: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Put images below one another, their left sides in line."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    whole = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height + gap
    return whole


def framed(image: Image.Image, margin: int = 16) -> Image.Image:
    """Put a margin around an image."""
    whole = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), PAPER)
    whole.paste(image, (margin, margin))
    return whole


def text(words: str, width: int, size: int = 15, colour: Colour = INK) -> Image.Image:
    """Write text into a strip of that width, in as many lines as it needs; a word that is too long is shortened."""
    font = ImageFont.load_default(size)
    lines = _lines(_printable(words), width, font)
    step = math.ceil(1.35 * size)
    strip = Image.new("RGB", (width, step * len(lines)), PAPER)
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        pen.text((0, step * number), line, fill=colour, font=font)
    return strip


def _printable(words: str) -> str:
    """Replace what no font has: bytes of a file name that are not text, and characters that move the pen."""
    return "".join(c if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF else "?" for c in words)


def _lines(words: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines: list[str] = []
    for word in words.split():
        word = shortened(word, width, font)
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]


def shortened(word: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut the middle out of a word that is wider than that; the ends of a file name tell most."""
    kept = len(word)
    short = word
    while kept > 2 and font.getlength(short) > width:
        kept -= 1
        short = f"{word[: (kept + 1) // 2]}...{word[-(kept // 2) :]}"
    return short


# ---- panels --------------------------------------------------------------------------------------------------


def panel_size(image: Image.Image) -> Pair:
    """Return the width and height at which an image is shown: as it is, or a whole number of times as large."""
    factor = max(1, round(_PANEL / max(image.size)))
    return image.width * factor, image.height * factor


def fit(image: Image.Image, size: Pair) -> Image.Image:
    """Show an image at a width and height: with hard pixels where these are whole multiples, smoothed otherwise."""
    if image.size == size:
        return image.convert("RGB")
    whole = size[0] % image.width == size[1] % image.height == 0
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def masked(panel: Image.Image, mask: Array) -> Image.Image:
    """Cover the masked patches of a panel, `mask` (h, w), with grey."""
    colours = np.broadcast_to(np.array(MASKED, dtype=np.uint8), (*mask.shape, 3))
    return _covered(panel, colours, mask)


def heat_map(panel: Image.Image, values: Array, most: float) -> Image.Image:
    """Colour each patch of a panel by its value, (h, w), from 0 to `most`; where it is NaN the panel shows, faded."""
    faded = Image.blend(panel.convert("L").convert("RGB"), Image.new("RGB", panel.size, PAPER), 0.6)
    known = ~np.isnan(values)
    return _covered(faded, heat_colours(np.where(known, values, 0) / most), known)


def heat_colours(shares: Array) -> Array:
    """Map numbers in [0, 1], of any shape, to colours (..., 3), uint8, from dark violet to yellow."""
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(shares, stops, _HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _covered(panel: Image.Image, colours: Array, where: Array) -> Image.Image:
    """Paint patches of a panel with colours (h, w, 3), where the mask (h, w) says so."""
    rows, columns = where.shape
    check(
        panel.height % rows == panel.width % columns == 0,
        f"A panel of {panel.width} x {panel.height} pixels has no {columns} x {rows} patches of one size; show the "
        "image at the network's own size.",
    )
    paint = Image.fromarray(np.ascontiguousarray(colours)).resize(panel.size, Image.Resampling.NEAREST)
    stencil = Image.fromarray(where.astype(np.uint8) * 255).resize(panel.size, Image.Resampling.NEAREST)
    return Image.composite(paint, panel.convert("RGB"), stencil)


# ---- scales --------------------------------------------------------------------------------------------------


def heat_scale(most: float, width: int) -> Image.Image:
    """Draw the scale of `heat_map`, 0 to `most`, with ticks at round numbers."""
    height, size = 12, 13
    bar = heat_colours(np.linspace(0, 1, width))[None].repeat(height, axis=0)
    strip = Image.new("RGB", (width, height + 6 + math.ceil(1.35 * size)), PAPER)
    strip.paste(Image.fromarray(bar), (0, 0))
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(size)
    for tick in round_ticks(most):
        x = min(round(tick / most * width), width - 1)
        pen.line([(x, height), (x, height + 3)], fill=INK)
        label = f"{tick:g}"
        length = font.getlength(label)
        pen.text((min(max(0, x - length / 2), width - length), height + 5), label, fill=INK, font=font)
    return strip


def round_ticks(most: float) -> list[float]:
    """Return three to six round numbers from 0 to at most `most`, a positive number."""
    power = 10.0 ** math.floor(math.log10(most))
    step = next(digit * power for digit in (0.2, 0.5, 1, 2) if most / (digit * power) < 6)
    return [number * step for number in range(math.floor(most / step) + 1)]


# ---- codes ---------------------------------------------------------------------------------------------------


def code_colours(vectors: Array) -> Array:
    """Give each code of a codebook, (V, D), a colour, (V, 3) uint8, so that neighbours look alike.

    Red, green and blue are a code's ranks along the first three principal components of the codebook. Ranks use the
    whole range of colours however the codes lie.
    """
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :3]  # the largest first
    # An axis has no direction of its own: its largest part points up, so that colours are the same on every machine.
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0))
    ranks = (centred @ (axes * signs)).argsort(axis=0, kind="stable").argsort(axis=0)
    low, high = _LEVELS
    levels = low + (high - low) * ranks / max(1, len(vectors) - 1)
    missing = 3 - levels.shape[1]
    return np.pad(levels, ((0, 0), (0, missing)), constant_values=(low + high) / 2).round().astype(np.uint8)


@dataclass(frozen=True)
class Coded:
    """An image as a grid of codes.

    Attributes:
        panel: The image, at the size of all others.
        ids: Code of each patch, (h, w).
        nearness: How near a patch is to its code, (h, w); the larger the nearer.
    """

    panel: Image.Image
    ids: Array
    nearness: Array


def code_patches(images: Sequence[Coded], colours: Array, width: int, codes: int = 6) -> list[Image.Image]:
    """Show the nearest patches of the codes that most patches have, a strip for each code.

    Args:
        images: All that patches are taken from.
        colours: Of all codes, (V, 3), as in the map of codes.
        width: Of a strip at most; it says how many patches are shown.
        codes: Strips at most; a code that only one patch has tells nothing and gets none.
    """
    counts = np.bincount(np.concatenate([image.ids.ravel() for image in images]), minlength=len(colours))
    chosen = [int(code) for code in np.argsort(-counts, kind="stable")[:codes] if counts[code] > 1]
    return [_strip(images, code, colours[code], width) for code in chosen]


def _strip(images: Sequence[Coded], code: int, colour: Array, width: int) -> Image.Image:
    """Show a code's colour, its number and the patches that are nearest to it, the nearest first."""
    places = [(image, y, x) for image in images for y, x in np.argwhere(image.ids == code).tolist()]
    places.sort(key=lambda place: -float(place[0].nearness[place[1], place[2]]))
    swatch = _tile(Image.fromarray(colour[None, None]))
    label = text(f"code {code}: {len(places)} patches", 3 * _TILE, 14)
    room = (width - swatch.width - label.width - 8) // (_TILE + 8)
    return beside([swatch, label, *(_patch(*place) for place in places[:room])])


def _patch(image: Coded, y: int, x: int) -> Image.Image:
    height, width = image.panel.height // image.ids.shape[0], image.panel.width // image.ids.shape[1]
    return _tile(image.panel.crop((x * width, y * height, (x + 1) * width, (y + 1) * height)))


def _tile(patch: Image.Image) -> Image.Image:
    """Show a small image at one size, in a frame, as a white one would not be seen on paper."""
    side = _TILE - 2
    return ImageOps.expand(patch.convert("RGB").resize((side, side), Image.Resampling.NEAREST), border=1, fill=_FRAME)
