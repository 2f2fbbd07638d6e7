"""The same picture sooner: images resized by torchvision as uint8 tensors, and JPEG decoded by simplejpeg.

Decoded pixels are the same. Resized ones differ from timm's by at most one of 255 levels (photographs in
results/data_path.csv): both resize in whole numbers, and round at different places.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from beitzoo.images.files import open_image, opened

if TYPE_CHECKING:
    from PIL.Image import Image

# Beyond, the exact transform is used: it takes bounded memory for an image of any shape.
_MAX_ASPECT = 16
_ORIENTATION = 0x0112  # in EXIF
_TRANSPOSED = (5, 6, 7, 8)
_FLIPPED_ROWS = (3, 4, 7, 8)
_FLIPPED_COLUMNS = (2, 3, 6, 7)


def open_tensor(path: Path, in_chans: int = 3) -> Tensor:
    """Decode an image upright to uint8, (in_chans, height, width); a colour JPEG by simplejpeg, if it is installed.

    Raises:
        ImageError: As `open_image`, whose bounds hold here as well.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    with opened(path) as image:
        if image.format == "JPEG" and image.mode == "RGB" and in_chans == 3 and find_spec("simplejpeg"):
            import simplejpeg

            pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGB")
            return _upright(torch.from_numpy(pixels).permute(2, 0, 1), image.getexif().get(_ORIENTATION))
    return pil_to_tensor(open_image(path, in_chans))


def _upright(pixels: Tensor, orientation: int | None) -> Tensor:
    if orientation in _TRANSPOSED:
        pixels = pixels.transpose(1, 2)
    flips = [axis for axis, those in ((1, _FLIPPED_ROWS), (2, _FLIPPED_COLUMNS)) if orientation in those]
    return pixels.flip(flips) if flips else pixels


class FastTransform:
    """timm's evaluation transform on uint8 tensors, (channels, height, width), or on PIL images.

    Args:
        exact: The transform it stands in for; its crop is used, and it takes over where an image is very long.
        options: What that one was made of, as `resolve_data_config` returns it.

    Raises:
        ValueError: The options make steps that are not done on tensors here.
    """

    def __init__(self, exact: Any, options: dict[str, Any]) -> None:
        from timm.data import create_transform
        from torchvision.transforms import CenterCrop, Resize, v2

        self.exact = exact
        *steps, _ = create_transform(**options, normalize=False).transforms
        if [type(step) for step in steps] != [Resize, CenterCrop]:
            raise ValueError(
                f"There is no fast transform with the steps {', '.join(type(step).__name__ for step in steps)}; it "
                "has a resize and a centre crop, to a square unless it squashes. Leave out fast=True."
            )
        resize, self.crop = steps[0], exact.transforms[1]
        self.resize = v2.Resize(resize.size, interpolation=resize.interpolation, antialias=True)
        scale = 255 * torch.tensor((options["mean"], options["std"]), dtype=torch.float32)
        self.mean, self.std = scale.view(2, -1, 1, 1)

    def __call__(self, image: "Image | Tensor") -> Tensor:
        """Return the normalised image, (channels, height, width)."""
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
        short, long = sorted(pixels.shape[-2:])
        if long > _MAX_ASPECT * short:
            return self.exact(to_pil_image(pixels))
        return self.crop(self.resize(pixels)).to(torch.float32).sub_(self.mean).div_(self.std)
