"""The random transform of an image together with its mask, for semantic segmentation.

That of BEiT (`semantic_segmentation/configs` of both versions), which is mmsegmentation's: resize, random crop, flip,
photometric distortion, normalisation, padding. What is random is drawn first, as a `PixelView`: a pure function of its
generator, of the mask and of its size.

It is faster than the original's steps one by one, as only what is in the crop is resized, and as the shares of classes
are counted before the image is touched. It differs in three things: an image that shrinks is antialiased, as where the
model is used; a pixel of the resized mask takes the label at its centre, as the image does, where the original's is up
to half a pixel to the left and above; and hues have 255 steps, where the original's have 180.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beitzoo.errors import check
from beitzoo.images.label_maps import IGNORE
from beitzoo.zoo.networks import Pair

_TRIES = 10  # for a crop in which no class has too large a share, until the next one is taken as it is
_BRIGHTNESS = 32.0  # levels
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 18  # steps of 2 degrees
_LEVELS = np.arange(256, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Distortion:
    """How the colours of an image are changed; what was not drawn changes nothing.

    Attributes:
        brightness: Levels that are added.
        contrast: Factor on all levels.
        contrast_first: Whether contrast changes before saturation and hue; else after them.
        saturation: Factor on the saturation of HSV.
        hue: Turn of the hue, degrees.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = True
    saturation: float = 1.0
    hue: int = 0

    def apply(self, image: Image.Image) -> Image.Image:
        """Change an RGB or grey image; levels are cut off at 0 and 255 and rounded down after each change."""
        table = _change(_LEVELS, 1.0, self.brightness)
        image = _looked_up(image, _change(table, self.contrast) if self.contrast_first else table)
        if image.mode == "RGB" and (self.saturation != 1 or self.hue):
            hues = (_LEVELS + round(self.hue * 255 / 360)) % 255  # Pillow counts 255 to a turn
            tables = np.concatenate([hues, _change(_LEVELS, self.saturation), _LEVELS])
            image = image.convert("HSV").point(tables.astype(int).tolist()).convert("RGB")
        return image if self.contrast_first else _looked_up(image, _change(_LEVELS, self.contrast))


_AS_IT_IS = Distortion()


@dataclass(frozen=True, slots=True)
class PixelView:
    """What was drawn for one look at an image and its mask.

    Attributes:
        scaled: Height and width that the whole image is resized to.
        top: First row of the crop, in the resized image.
        left: First column of the crop.
        flip: Whether the crop is mirrored, left to right.
        distortion: How its colours are changed.
    """

    scaled: Pair
    top: int
    left: int
    flip: bool = False
    distortion: Distortion = _AS_IT_IS


@dataclass(frozen=True, kw_only=True)
class PixelViews:
    """The random transform from an image and its mask to what a segmentation model is trained on.

    Attributes:
        size: Height and width of the crop, pixels.
        mean: Per channel, on the scale from 0 to 1.
        std: Per channel, likewise.
        fit: Longer and shorter side that an image is fitted into before it is scaled; 4 times the shorter side of
            `size` and that side if None, as the original's (2048, 512) and (2560, 640).
        ratio: Range of the factor on `fit`, evenly drawn.
        max_share: A crop in which one class has this share of the labelled pixels or more, or which has fewer than two
            classes, is drawn again, up to ten times; 1 takes any.
        hflip: Probability of a horizontal flip.
        distort: Change brightness, contrast, saturation and hue, each with probability 1/2.
    """

    size: Pair
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Pair | None = None
    ratio: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    hflip: float = 0.5
    distort: bool = True

    def __post_init__(self) -> None:
        low, high = self.ratio
        check(0 < low <= high, f"ratio={self.ratio}; give a range of positive numbers, the smaller one first.")
        check(min(self.size) > 0, f"size={self.size}; both sides need a pixel or more.")
        check(self.fit is None or min(self.fit) > 0, f"fit={self.fit}; both sides need a pixel or more.")
        check(0 < self.max_share <= 1, f"max_share={self.max_share}; it must be in (0, 1].")
        check(min(self.std) > 0, f"std={self.std}; every channel needs a positive one.")

    def draw_and_apply(
        self, image: Image.Image, label_map: np.ndarray, generator: random.Random
    ) -> tuple[Tensor, Tensor]:
        """Draw a view of an image and its mask and apply it."""
        return self.apply(image, label_map, self.draw(label_map, generator))

    def draw(self, label_map: np.ndarray, generator: random.Random) -> PixelView:
        """Draw what is random for a mask, uint8 (height, width), distributed as by mmsegmentation."""
        scaled = self._draw_scaled(label_map.shape, generator)
        corner = self._draw_corner(scaled, generator)
        for _ in range(_TRIES):
            if self.max_share == 1 or _is_varied(self._cut_labels(label_map, scaled, corner), self.max_share):
                break
            corner = self._draw_corner(scaled, generator)
        flip = generator.random() < self.hflip
        return PixelView(scaled, *corner, flip, _draw_distortion(generator) if self.distort else _AS_IT_IS)

    def apply(self, image: Image.Image, label_map: np.ndarray, view: PixelView) -> tuple[Tensor, Tensor]:
        """Map an image and its mask to tensors of the crop's size, in which the view is at the top left.

        Args:
            image: RGB, or grey ("L"), which has neither saturation nor hue to change.
            label_map: uint8 (height, width), the class of each pixel or `IGNORE`.
            view: As `draw` returns it.

        Returns:
            The image, float32 (C, *size), normalised, 0 where it does not reach; and the classes, int64 (*size),
            `IGNORE` there.

        Raises:
            InvalidValueError: Image and mask differ in size, or `mean` is of another number of channels.
        """
        check(
            label_map.shape == (image.height, image.width),
            f"The image has {image.width} x {image.height} pixels, and its mask {label_map.shape[1]} x "
            f"{label_map.shape[0]}; give the mask of this image.",
        )
        channels = len(image.getbands())
        check(
            channels == len(self.mean) == len(self.std),
            f"The image has {channels} channels, mean {len(self.mean)} and std {len(self.std)}; they must be as many.",
        )
        levels = view.distortion.apply(self._cut_image(image, view))
        labels = self._cut_labels(label_map, view.scaled, (view.top, view.left))
        return self._normalised(np.array(levels), view.flip), self._padded(labels, view.flip)

    def _draw_scaled(self, shape: tuple[int, ...], generator: random.Random) -> Pair:
        """Draw the height and width that an image is resized to; the ratio of its sides stays."""
        fit = self.fit or (4 * min(self.size), min(self.size))
        ratio = generator.uniform(*self.ratio)
        longer, shorter = int(max(fit) * ratio), int(min(fit) * ratio)
        factor = min(longer / max(shape), shorter / min(shape))
        height, width = (max(int(side * factor + 0.5), 1) for side in shape)
        return height, width

    def _draw_corner(self, scaled: Pair, generator: random.Random) -> Pair:
        """Draw the top left corner of a crop; 0 along a side that is no longer than the crop."""
        top, left = (generator.randint(0, max(side - crop, 0)) for side, crop in zip(scaled, self.size, strict=True))
        return top, left

    def _cut_size(self, scaled: Pair) -> Pair:
        return min(scaled[0], self.size[0]), min(scaled[1], self.size[1])

    def _cut_labels(self, label_map: np.ndarray, scaled: Pair, corner: Pair) -> np.ndarray:
        """Return a crop of the resized mask, each pixel with the label at its centre."""
        rows, columns = (
            (2 * np.arange(start, start + cut) + 1) * side // (2 * whole)
            for side, whole, start, cut in zip(label_map.shape, scaled, corner, self._cut_size(scaled), strict=True)
        )
        return label_map[rows[:, None], columns]

    def _cut_image(self, image: Image.Image, view: PixelView) -> Image.Image:
        """Return a crop of the resized image, made of the part that it shows."""
        height, width = self._cut_size(view.scaled)
        across, down = image.width / view.scaled[1], image.height / view.scaled[0]
        box = (
            view.left * across,
            view.top * down,
            min((view.left + width) * across, image.width),
            min((view.top + height) * down, image.height),
        )
        return image.resize((width, height), Image.Resampling.BILINEAR, box)

    def _normalised(self, levels: np.ndarray, flip: bool) -> Tensor:
        """Map uint8 (height, width) or (height, width, C) to float32 (C, *size)."""
        pixels = torch.from_numpy(levels).reshape(*levels.shape[:2], -1).permute(2, 0, 1)
        image = torch.zeros(len(pixels), *self.size)
        view = image[:, : pixels.shape[1], : pixels.shape[2]]
        mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (self.mean, self.std))
        view.copy_(pixels.flip(2) if flip else pixels).sub_(mean).div_(std)
        return image

    def _padded(self, labels: np.ndarray, flip: bool) -> Tensor:
        padded = torch.full(self.size, IGNORE, dtype=torch.int64)
        padded[: labels.shape[0], : labels.shape[1]] = torch.from_numpy(labels[:, ::-1].copy() if flip else labels)
        return padded


def _is_varied(labels: np.ndarray, max_share: float) -> bool:
    """Tell whether there are two classes or more, and none has too large a share of the labelled pixels."""
    counts = Image.fromarray(labels).histogram()  # a tenth of the time of NumPy's bincount
    counts[IGNORE] = 0
    return sum(count > 0 for count in counts) > 1 and max(counts) / sum(counts) < max_share


def _draw_distortion(generator: random.Random) -> Distortion:
    """Draw each change with probability 1/2, and whether contrast comes first."""
    return Distortion(
        brightness=generator.uniform(-_BRIGHTNESS, _BRIGHTNESS) if _coin(generator) else 0.0,
        contrast_first=_coin(generator),
        contrast=generator.uniform(*_CONTRAST) if _coin(generator) else 1.0,
        saturation=generator.uniform(*_SATURATION) if _coin(generator) else 1.0,
        hue=2 * generator.randrange(-_HUE, _HUE) if _coin(generator) else 0,
    )


def _coin(generator: random.Random) -> bool:
    return generator.random() < 0.5


def _change(levels: np.ndarray, factor: float, added: float = 0.0) -> np.ndarray:
    return np.clip(levels * factor + added, 0, 255).astype(np.uint8).astype(np.float32)


def _looked_up(image: Image.Image, table: np.ndarray) -> Image.Image:
    """Replace each level of each channel by the one in a table, if there is one that changes."""
    if np.array_equal(table, _LEVELS):
        return image
    return image.point(table.astype(int).tolist() * len(image.getbands()))
