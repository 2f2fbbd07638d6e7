"""Two views of one image for masked image modelling: what the network sees, and what the tokenizer sees.

BEiT, `datasets.py` and `transforms.py` of both versions: colour jitter and flip, then one random crop box that is
resized twice, so that patch and visual token at the same place show the same part of the image.

What is random is drawn first, as a `View`: a pure function of its generator and of the image's size. It can be stored
and applied again, to either view alone.

It is faster than torchvision's transforms, as only the crop is changed in colour, by one table of levels where channels
do not mix, and as PyTorch resizes bytes faster than Pillow. On photographs, 97 % of the values are torchvision's and
all but one of 1,000 are within one of 255 levels; the mean that contrast needs is of a sample in large images. A few
pixels at hard edges of some crops are up to 20 levels off: bicubic overshoots, and Pillow, which resizes columns before
rows there, cuts that off at another place.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.zoo.checkpoints import HALF, Interpolation
from beitzoo.zoo.networks import Pair

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = Literal["brightness", "contrast", "saturation"]

FILTERS: tuple[Interpolation, ...] = ("bilinear", "bicubic", "lanczos")
COLOURS: tuple[Colour, ...] = ("brightness", "contrast", "saturation")
_TRIES = 10  # for a crop box that fits into the image, until the middle is taken
_SAMPLE = 40_000  # pixels that the mean of an image is made of


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
        for name, value in {"patch": self.patch_interpolation, "token": self.token_interpolation}.items():
            check(value in FILTERS, f"{name}_interpolation={value!r}; views are resized by {', '.join(FILTERS)}.")
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
        pixels = _cut(image, view)
        return self._patch_view(pixels, view), self._token_view(pixels, view)

    def apply_patch(self, image: "Image", view: View) -> Tensor:
        """Return the network's view alone: the very one that `apply` returns."""
        return self._patch_view(_cut(image, view), view)

    def apply_token(self, image: "Image", view: View) -> Tensor:
        """Return the tokenizer's view alone: the very one that `apply` returns."""
        return self._token_view(_cut(image, view), view)

    def _patch_view(self, pixels: Tensor, view: View) -> Tensor:
        levels = _resized(pixels, self.patch_size, self.patch_interpolation, view.flip)
        statistics = torch.tensor([_per_channel(values, len(levels)) for values in (self.mean, self.std)])
        mean, std = 255 * statistics.view(2, -1, 1, 1)
        return levels.sub_(mean).div_(std)

    def _token_view(self, pixels: Tensor, view: View) -> Tensor:
        return _resized(pixels, self.token_size, self.token_interpolation, view.flip).div_(255)

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


def _cut(image: "Image", view: View) -> Tensor:
    """Return the part of the image that both views show, with its colours changed, uint8 (C, height, width)."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    crop = image.crop((view.left, view.top, view.left + view.width, view.top + view.height))
    pixels: Tensor = pil_to_tensor(_jittered(crop, image, view.jitter))
    return pixels


def _jittered(crop: "Image", image: "Image", jitter: Sequence[tuple[Colour, float]]) -> "Image":
    """Change the colours of a crop as if those of the whole image had been changed before it was cut.

    Brightness and saturation change each pixel by itself. Contrast needs the mean of the whole image, with what comes
    before it done to that as well; a sample of the pixels will do.
    """
    from PIL.ImageStat import Stat

    names = [name for name, _ in jitter]
    if "contrast" not in names:
        return _changed(crop, jitter, grey=0)
    place = names.index("contrast")
    before = _changed(_sampled(image), jitter[:place], grey=0)
    return _changed(crop, jitter, grey=int(Stat(before.convert("L")).mean[0] + 0.5))


def _changed(image: "Image", jitter: Sequence[tuple[Colour, float]], grey: int) -> "Image":
    """Change colours in order; what changes all channels alike is gathered in one table of the 256 levels.

    Args:
        image: Of any mode of 8 bits.
        jitter: The changes with their factors.
        grey: The level from which contrast grows.
    """
    from PIL import Image
    from PIL.ImageEnhance import Color

    table = None
    for name, factor in jitter:
        if name == "saturation":
            image, table = Color(_looked_up(image, table)).enhance(factor), None
        else:
            levels = table or Image.frombytes("L", (256, 1), bytes(range(256)))
            table = Image.blend(Image.new("L", (256, 1), grey if name == "contrast" else 0), levels, factor)
    return _looked_up(image, table)


def _sampled(image: "Image") -> "Image":
    """Return every n-th pixel of every n-th row, so that no more are left than a mean needs."""
    from PIL.Image import Resampling

    step = max(1, math.isqrt(image.width * image.height // _SAMPLE))
    size = -(-image.width // step), -(-image.height // step)
    return image.resize(size, Resampling.NEAREST)


def _looked_up(image: "Image", table: "Image | None") -> "Image":
    """Replace each level of each channel by the one in the table, if there is one."""
    return image if table is None else image.point(table.tobytes() * len(image.getbands()))


def _resized(pixels: Tensor, size: Pair, interpolation: Interpolation, flip: bool) -> Tensor:
    """Resize uint8 (C, height, width) and mirror it if asked to; return the levels as float32."""
    resized = F.interpolate(pixels[None], size, mode=interpolation, antialias=True)[0]
    return (resized.flip(-1) if flip else resized).to(torch.float32)


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    """Return one value for each channel; the mean where there are others, as `DataConfig.fitted_to` does."""
    return [*values] if len(values) == channels else [sum(values) / len(values)] * channels
