"""Two views of one image for masked image modelling: what the network sees, and what the tokenizer sees.

BEiT, `datasets.py` and `transforms.py` of both versions: colour jitter and flip, then one random crop box that is
resized twice, so that patch and visual token at the same place show the same part of the image.

What is random is drawn first, as a `View`: a pure function of its generator and of the image's size. It can be stored
and applied again, to either view alone.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from beitzoo.errors import check
from beitzoo.zoo.checkpoints import HALF, Interpolation
from beitzoo.zoo.networks import Pair

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = Literal["brightness", "contrast", "saturation"]

COLOURS: tuple[Colour, ...] = ("brightness", "contrast", "saturation")
_TRIES = 10  # for a crop box that fits into the image, until the middle is taken


@dataclass(frozen=True, slots=True)
class View:
    """What was drawn for one look at an image.

    Attributes:
        top: First row of the crop, in the image as it is; a flip comes after the crop.
        left: First column of the crop.
        height: Rows of the crop.
        width: Columns of the crop.
        flip: Whether the crop is mirrored, left to right.
        jitter: Changes of colour with their factors, in order; 1 changes nothing.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    jitter: tuple[tuple[Colour, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TwoViews:
    """The random transform from an image to both views.

    Attributes:
        patch_size: Height and width of the network's view, pixels; it is resized by `patch_interpolation`.
        token_size: Height and width of the tokenizer's view, pixels: 112 by lanczos for DALL-E's, 224 by bicubic for
            BEiT v2's.
        mean: Of the network's view, per channel; averaged for images of another number of channels.
        std: Of the network's view, per channel, likewise. The tokenizer's view stays in [0, 1].
        scale: Range of the crop's area, as shares of the image; BEiT v2 begins at 0.2.
        ratio: Range of the crop's width by its height.
        jitter: Strength of random brightness, contrast and saturation.
        hflip: Probability of a horizontal flip.
        patch_interpolation: Filter of the network's view.
        token_interpolation: Filter of the tokenizer's view.
    """

    patch_size: Pair = (224, 224)
    token_size: Pair = (112, 112)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.4
    hflip: float = 0.5
    patch_interpolation: Interpolation = "bicubic"
    token_interpolation: Interpolation = "lanczos"

    def __post_init__(self) -> None:
        for name, (low, high) in {"scale": self.scale, "ratio": self.ratio}.items():
            check(0 < low <= high, f"{name}={(low, high)}; give a range of positive numbers, the smaller one first.")
        check(self.jitter >= 0, f"jitter={self.jitter}; give 0 for none, or a positive strength.")
        check(min(self.std) > 0, f"std={self.std}; every channel needs a positive one.")

    def draw(self, width: int, height: int, generator: random.Random) -> View:
        """Draw what is random for an image of this size, distributed as by torchvision's transforms."""
        jitter: list[tuple[Colour, float]] = []
        if self.jitter:
            low, high = max(0.0, 1 - self.jitter), 1 + self.jitter
            jitter = [(name, generator.uniform(low, high)) for name in generator.sample(COLOURS, len(COLOURS))]
        flip = generator.random() < self.hflip
        return View(*self._draw_box(width, height, generator), flip, tuple(jitter))

    def __call__(self, image: "Image", generator: random.Random) -> tuple[Tensor, Tensor]:
        """Draw a view of an image and apply it."""
        return self.apply(image, self.draw(image.width, image.height, generator))

    def apply(self, image: "Image", view: View) -> tuple[Tensor, Tensor]:
        """Map an image to the network's view (C, *patch_size), normalised, and the tokenizer's, (C, *token_size)."""
        crop = _cut(image, view)
        return self._patch_view(crop), _resized(crop, self.token_size, self.token_interpolation)

    def apply_patch(self, image: "Image", view: View) -> Tensor:
        """Return the network's view alone: the very one that `apply` returns."""
        return self._patch_view(_cut(image, view))

    def apply_token(self, image: "Image", view: View) -> Tensor:
        """Return the tokenizer's view alone: the very one that `apply` returns."""
        return _resized(_cut(image, view), self.token_size, self.token_interpolation)

    def _patch_view(self, crop: "Image") -> Tensor:
        from torchvision.transforms import functional as F

        pixels = _resized(crop, self.patch_size, self.patch_interpolation)
        return F.normalize(pixels, _per_channel(self.mean, len(pixels)), _per_channel(self.std, len(pixels)))

    def _draw_box(self, width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
        """Draw top, left, height and width: area uniform, ratio log-uniform; the middle if none fits."""
        low, high = map(math.log, self.ratio)
        for _ in range(_TRIES):
            area = width * height * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return generator.randint(0, height - h), generator.randint(0, width - w), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


def _cut(image: "Image", view: View) -> "Image":
    """Return the part of the image that both views show, its colours changed, flipped."""
    from PIL.Image import Transpose
    from torchvision.transforms import functional as F

    change = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "saturation": F.adjust_saturation}
    for name, factor in view.jitter:
        image = change[name](image, factor)
    crop = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
    return crop.transpose(Transpose.FLIP_LEFT_RIGHT) if view.flip else crop


def _resized(image: "Image", size: Pair, interpolation: Interpolation) -> Tensor:
    from PIL.Image import Resampling
    from torchvision.transforms import functional as F

    resized: Tensor = F.to_tensor(image.resize(size[::-1], Resampling[interpolation.upper()]))
    return resized


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    """Return one value for each channel; the mean where there are others, as `DataConfig.fitted_to` does."""
    return [*values] if len(values) == channels else [sum(values) / len(values)] * channels
