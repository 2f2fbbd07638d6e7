"""A contact sheet of a classifier's most confident wrong answers: each image with its class and what was answered."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor

from beitzoo.files import write_atomically
from beitzoo.images import pictures
from beitzoo.images.files import ImageError, as_image
from beitzoo.images.image_set import ImageSet

MOST = 24  # images of a sheet
_COLUMNS = 6
_SIDE = 184  # of the square that an image is fitted into, pixels
_GAP = 16
_WRONG: pictures.Colour = (176, 38, 30)  # dark enough to be read where red is not seen


class Judged(Protocol):
    """What a classifier answered on images, one class of each or several labels, and what would be right."""

    @property
    def images(self) -> Tensor:
        """Index of each image in its set, (N,) int64."""

    def __len__(self) -> int: ...

    def wrong(self) -> Tensor:
        """Tell which answers are wrong, (N,) bool."""

    def mistakes(self, most: int) -> list[int]:
        """Return the places of wrong answers, the most confident first, so many at most."""

    def captions(self, place: int, names: Sequence[str]) -> tuple[str, str, float]:
        """Say of an image what it is, what was answered, and how probable that is."""


def write_mistakes(path: Path, answers: Judged, images: ImageSet) -> None:
    """Draw the sheet as a PNG; of answers that are all right it says that."""
    sheet = draw_mistakes(answers, images)
    write_atomically(path, functools.partial(sheet.save, format="PNG"))


def draw_mistakes(answers: Judged, images: ImageSet, most: int = MOST) -> Image.Image:
    """Draw the sheet: the most confident mistake first, line by line; see `write_mistakes`."""
    places = answers.mistakes(most)
    wrong = int(answers.wrong().sum())
    width = _COLUMNS * _SIDE + (_COLUMNS - 1) * _GAP
    share = f"{wrong:,} of {len(answers):,} answers are wrong"
    shown = "" if wrong <= most else f"; the {len(places)} most confident of them"
    title = pictures.text(share + shown, width, 18)
    tiles = [_tile(answers, place, images) for place in places]
    lines = [pictures.beside(tiles[start : start + _COLUMNS], _GAP) for start in range(0, len(tiles), _COLUMNS)]
    return pictures.framed(pictures.stack([title, *lines], _GAP))


def _tile(answers: Judged, place: int, images: ImageSet) -> Image.Image:
    """Show one image above what it is, what was answered, and which file it is."""
    index = int(answers.images[place])
    truth, answer, probability = answers.captions(place, images.names)
    words = [
        pictures.text(f"is {truth}", _SIDE, 14),
        pictures.text(f"answer {answer}, {_per_cent(probability)}", _SIDE, 14, _WRONG),
        pictures.text(images.identity(index)[0], _SIDE, 11, pictures.FAINT),
    ]
    return pictures.stack([_square(images, index), *words], 3)


def _square(images: ImageSet, index: int) -> Image.Image:
    """Fit an image into the middle of a square: tiny ones a whole number of times as large, with hard pixels."""
    square = Image.new("RGB", (_SIDE, _SIDE), pictures.MOUNT)
    try:
        image = as_image(images.images[index])
    except ImageError:  # it could be read when the model saw it
        shown = pictures.text("cannot be read any more", _SIDE - 20, 14)
    else:
        factor = _SIDE / max(image.size)
        factor = int(factor) if factor >= 3 else factor
        size = tuple(max(1, round(side * factor)) for side in image.size)
        shown = pictures.fit(image, (size[0], size[1]))
    square.paste(shown, ((_SIDE - shown.width) // 2, (_SIDE - shown.height) // 2))
    return square


def _per_cent(probability: float) -> str:
    """Write a probability so that what is not certain does not look like it."""
    return ">99.9 %" if 0.9995 <= probability < 1 else f"{100 * probability:.1f} %"
