"""Two views of one image for masked image modelling: what the network sees, and what the tokenizer sees.

BEiT, `datasets.py` and `transforms.py` of both versions: colour jitter and flip, then one random crop box that is
resized twice, so that patch and visual token at the same place show the same part of the image.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from beitzoo.zoo.checkpoints import HALF, Interpolation
from beitzoo.zoo.networks import Pair

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class TwoViews:
    """The random transform from an image to both views. Draws from the global generators of PyTorch and Python.

    Attributes:
        patch_size: Height and width of the network's view, pixels; it is resized by `patch_interpolation`.
        token_size: Height and width of the tokenizer's view, pixels: 112 by lanczos for DALL-E's, 224 by bicubic for
            BEiT v2's.
        mean: Of the network's view, per channel.
        std: Of the network's view, per channel. The tokenizer's view stays in [0, 1].
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

    def __call__(self, image: "Image") -> tuple[Tensor, Tensor]:
        """Map an image to the network's view (C, *patch_size), normalised, and the tokenizer's, (C, *token_size)."""
        from torchvision.transforms import ColorJitter, RandomResizedCrop
        from torchvision.transforms import functional as F

        if self.jitter:
            image = ColorJitter(self.jitter, self.jitter, self.jitter)(image)
        if torch.rand(()) < self.hflip:
            image = F.hflip(image)
        top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), list(self.ratio))
        crop = image.crop((left, top, left + width, top + height))
        views = [
            F.to_tensor(crop.resize(size[::-1], _filter(interpolation)))
            for size, interpolation in (
                (self.patch_size, self.patch_interpolation),
                (self.token_size, self.token_interpolation),
            )
        ]
        return F.normalize(views[0], list(self.mean), list(self.std)), views[1]


def _filter(interpolation: Interpolation) -> int:
    from PIL.Image import Resampling

    return Resampling[interpolation.upper()]
