"""The faster way to a tensor: images resized by torchvision as uint8 tensors, and JPEG decoded by simplejpeg.

Decoded pixels are the same. Resized ones differ from timm's, as both resize in whole numbers and round at different
places. Measured from 32 to 640 pixels with every crop: bilinear is at most two of 255 levels off, of any image; bicubic
is at most two off of photographs, and of any image whose height grows. Where the height shrinks and pixels alternate
between black and white, bicubic is up to 31 off: it overshoots, and both cut that off at different places. Other
filters are refused: nearest takes other pixels, and torchvision has not all of them for tensors.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from beitzoo.errors import InvalidOptionError, InvalidValueError
from beitzoo.images.files import Encoded, as_image, opened

if TYPE_CHECKING:
    from PIL.Image import Image

_FILTERS = ("bilinear", "bicubic")
# Beyond, the exact transform is used: it takes bounded memory for an image of any shape.
_MAX_ASPECT = 16
_ORIENTATION = 0x0112  # in EXIF
_TRANSPOSED = (5, 6, 7, 8)
_FLIPPED_ROWS = (3, 4, 7, 8)
_FLIPPED_COLUMNS = (2, 3, 6, 7)


def open_tensor(source: Path | Encoded, in_chans: int = 3) -> Tensor:
    """Decode an image upright to uint8, (in_chans, height, width); a colour JPEG by simplejpeg, if it is installed.

    Raises:
        ImageError: As `open_image`, whose bounds hold here as well.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor

    with opened(source) as image:
        if image.format == "JPEG" and image.mode == "RGB" and in_chans == 3 and find_spec("simplejpeg"):
            import simplejpeg

            content = source.read() if isinstance(source, Encoded) else source.read_bytes()
            pixels = simplejpeg.decode_jpeg(content, "RGB")
            return _upright(torch.from_numpy(pixels).permute(2, 0, 1), image.getexif().get(_ORIENTATION))
    return pil_to_tensor(as_image(source, in_chans))


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
        InvalidValueError: The options make steps that are not done on tensors here, or not to a few levels.
    """

    def __init__(self, exact: Any, options: dict[str, Any]) -> None:
        from timm.data import create_transform
        from torchvision.transforms import CenterCrop, Resize, v2

        self.exact = exact
        if options.get("interpolation", "bilinear") not in _FILTERS:
            raise InvalidValueError(
                f"There is no fast transform with interpolation={options['interpolation']!r}; it has "
                f"{' and '.join(_FILTERS)}. Leave out fast=True."
            )
        *steps, _ = create_transform(**options, normalize=False).transforms
        if [type(step) for step in steps] != [Resize, CenterCrop]:
            raise InvalidValueError(
                f"There is no fast transform with the steps {', '.join(type(step).__name__ for step in steps)}; it "
                "has a resize and a centre crop, to a square unless it squashes. Leave out fast=True."
            )
        resize, self.crop = steps[0], exact.transforms[1]
        self.resize = v2.Resize(resize.size, interpolation=resize.interpolation, antialias=True)
        scale = 255 * torch.tensor((options["mean"], options["std"]), dtype=torch.float32)
        self.mean, self.std = scale.view(2, -1, 1, 1)

    def __call__(self, image: "Image | Tensor") -> Tensor:
        """Return the normalised image, (channels, height, width)."""
        from PIL.Image import Image
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        if not (isinstance(image, Image) or (isinstance(image, Tensor) and image.dtype == torch.uint8)):
            raise InvalidOptionError(
                f"A fast transform takes a PIL image or a tensor of uint8, and this is a {type(image).__name__}; open "
                "a file with beitzoo.open_image(path)."
            )
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
        short, long = sorted(pixels.shape[-2:])
        if long > _MAX_ASPECT * short:
            return self.exact(to_pil_image(pixels))
        return self.crop(self.resize(pixels)).to(torch.float32).sub_(self.mean).div_(self.std)
