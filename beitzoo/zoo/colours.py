"""The colour that each class of pixels is drawn in."""

import itertools
import math
from collections.abc import Sequence
from functools import cache

from beitzoo.errors import check
from beitzoo.zoo.checkpoints import Head
from beitzoo.zoo.labels import ade20k_classes, is_ade20k, label_names

Colour = tuple[int, int, int]

_MOST = 255  # classes of a label map of bytes, in which 255 is a pixel of no class
_STEPS = (0, 36, 73, 109, 146, 182, 219, 255)
_BRIGHT = 128  # of the brightest of red, green and blue: darker colours are hard to tell apart over a photograph
# Pixels of no class are black, and text and paper black and white.
_TAKEN: tuple[Colour, ...] = ((0, 0, 0), (255, 255, 255))


def class_colours(classes: Head | Sequence[str] | None, count: int) -> list[Colour]:
    """Return the colours of classes, red, green and blue from 0 to 255.

    Those of ADE20K have the colours of its published palette, so that pictures look as elsewhere. All others have
    colours of a fixed sequence, each as far from all before it, and from black and white, as can be: a few are easily
    told apart, and the first classes have the same colours however many there are.

    Args:
        classes: A head, or the names of its classes; None where nobody named them.
        count: How many there are, up to 255.
    """
    check(0 <= count <= _MOST, f"Got {count} classes; there are colours for up to {_MOST}.")
    names = classes if classes is None or isinstance(classes, Sequence) else label_names(classes)
    if names is not None and len(names) == count and is_ade20k(names):
        return [colour for _, colour in ade20k_classes()]
    return list(_distinct(count))


@cache
def _distinct(count: int) -> tuple[Colour, ...]:
    """Choose colours one by one from an even grid, each the farthest from those before it."""
    grid = itertools.product(_STEPS, _STEPS, _STEPS)
    places = {colour: _oklab(colour) for colour in grid if max(colour) >= _BRIGHT}
    taken = [_oklab(colour) for colour in _TAKEN]
    nearest = {colour: min(math.dist(place, other) for other in taken) for colour, place in places.items()}
    chosen: list[Colour] = []
    for _ in range(count):
        chosen.append(max(nearest, key=nearest.__getitem__))
        last = places[chosen[-1]]
        nearest = {colour: min(distance, math.dist(places[colour], last)) for colour, distance in nearest.items()}
    return tuple(chosen)


def _oklab(colour: Colour) -> tuple[float, float, float]:
    """Return the place of an sRGB colour in Oklab, where distances are as seen (bottosson.github.io/posts/oklab)."""
    r, g, b = (level / 3294.6 if level <= 10.31475 else ((level / 255 + 0.055) / 1.055) ** 2.4 for level in colour)
    long = math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)
    medium = math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    short = math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )
