"""The control for learned tokenizers: visual tokens from a fixed random projection of patches.

What pretraining gains over it is what a learned tokenizer is worth. BEST-RQ (https://arxiv.org/abs/2202.01855,
section 3.1) trains speech networks on such tokens.

Shapes: B batch, h w token grid, V codes of the codebook, D channels of a code.
"""

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.models.tokenizers import check_images
from beitzoo.zoo.networks import Pair, RandomConfig


class RandomTokenizer(nn.Module):
    """The nearest, by angle, of random codes to a random projection of a patch; it has no parameters to train.

    Attributes:
        config: What was built.
        interpolation: Filter by which images are brought to its size.
        decodes_to: What `decode` returns.
    """

    interpolation: Final = "bicubic"
    decodes_to: Final = "features"
    projection: Tensor
    codes: Tensor

    def __init__(self, config: RandomConfig) -> None:
        super().__init__()
        self.config = config
        inputs = config.in_chans * config.patch_size[0] * config.patch_size[1] + 1
        generator = torch.Generator(device="cpu").manual_seed(config.seed)
        self.register_buffer("projection", _draw(inputs, config.code_dim, generator))
        self.register_buffer("codes", F.normalize(_draw(config.vocab_size, config.code_dim, generator), dim=1))

    @property
    def img_size(self) -> Pair:
        """Height and width of its images in pixels."""
        return self.config.img_size

    @property
    def in_chans(self) -> int:
        """Colour channels of its images."""
        return self.config.in_chans

    @property
    def grid_size(self) -> Pair:
        """Rows and columns of codes."""
        height, width = self.config.img_size
        return height // self.config.patch_size[0], width // self.config.patch_size[1]

    @property
    def vocab_size(self) -> int:
        """Codes to tell apart."""
        return self.config.vocab_size

    def set_input_size(self, img_size: Pair) -> None:
        """Take images of another size; the projection knows no positions.

        Raises:
            InvalidValueError: It is no whole number of patches.
        """
        self.config = replace(self.config, img_size=img_size)

    @property
    def codebook(self) -> Tensor:
        """All codes, unit vectors, (V, D)."""
        return self.codes

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) with values in [0, 1] to codes (B, h, w), int64.

        Contrast does not count, as codes are compared by angle.

        Raises:
            InvalidValueError: The images are of another size, channel count or type than the tokenizer's.
        """
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):  # a rounded projection may be nearer to another code
            found = (features @ self.codes.t()).argmax(dim=-1)
        return found.unflatten(1, self.grid_size)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) with values in [0, 1] to what is rounded to codes, (B, h w, D).

        A patch is projected as its deviations from its mean, and its mean as one number beside them. Brightness is in
        every pixel: projected as they are, nearly all patches would point in the same direction and share a few codes
        (BEST-RQ, section 3.1, normalises its input for the same reason). Without the mean, the code of a patch of one
        colour would be chosen by rounding errors.

        Raises:
            InvalidValueError: The images are of another size, channel count or type than the tokenizer's.
        """
        check_images(images, self.in_chans, self.img_size)
        with torch.autocast(images.device.type, enabled=False):
            patch = self.config.patch_size
            pixels = F.unfold(images.to(self.projection.dtype), patch, stride=patch).transpose(1, 2)  # (B, h w, pixels)
            mean = pixels.mean(dim=-1, keepdim=True)
            return torch.cat([pixels - mean, mean - 0.5], dim=-1) @ self.projection

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) to their vectors, (B, h w, D): there is no way back to the pixels."""
        return F.embedding(codes.flatten(1), self.codes)


def _draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw numbers (rows, columns) that are normal to the eye and, unlike `randn`, the same bits on every machine.

    The sum of twelve uniform numbers has variance 1. Each is a multiple of 2^-24, so their sum in double precision is
    exact in any order.
    """
    uniform = torch.rand(12, rows, columns, generator=generator, device="cpu", dtype=torch.float32)
    return (uniform.double().sum(dim=0) - 6).float()
