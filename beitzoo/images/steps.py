"""Steps of a transform that differ from torchvision's. Imported late, as torchvision takes more than a second."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment, posterize
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import crop, get_dimensions

from beitzoo.errors import InvalidOptionError

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of a resized image of which the centre is cropped, 67 MB.
_MAX_RESIZED = 2**24


class ImageSteps(Compose):
    """Steps from a PIL image to a tensor, with a message for what is none."""

    def __call__(self, image: Any) -> Any:
        """Return the image after all steps."""
        from PIL.Image import Image

        if isinstance(image, Image) or (isinstance(image, Tensor) and image.is_floating_point()):
            return super().__call__(image)
        raise InvalidOptionError(
            f"A transform takes a PIL image, and this is a {type(image).__name__}; open a file with "
            "beitzoo.open_image(path), turn an array of uint8 into an image with PIL.Image.fromarray(array) and a "
            "tensor with torchvision's to_pil_image(tensor)."
        )


def allow_no_bits(step: Any) -> None:
    """Let timm's policies keep none of the bits of a colour, as at their strongest they do: the image is black then.

    Pillow did that up to version 12, and refuses it since.
    """
    operations: Sequence[AugmentOp] = ()
    if isinstance(step, RandAugment | AugMixAugment):
        operations = step.ops
    elif isinstance(step, AutoAugment):
        operations = [operation for pair in step.policy for operation in pair]
    for operation in operations:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: "Image", bits_to_keep: int, **options: Any) -> "Image":
    if bits_to_keep < 1:
        return image.point(lambda _: 0)
    posterized: Image = posterize(image, bits_to_keep, **options)
    return posterized


class FloorCrop:
    """Crop the centre as transformers does: half a pixel is rounded down, where timm rounds to even."""

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width

    def __call__(self, image: Any) -> Any:
        """Return the centre of the image."""
        _, height, width = get_dimensions(image)
        return crop(image, (height - self.height) // 2, (width - self.width) // 2, self.height, self.width)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size=({self.height}, {self.width}))"


class BoundedResize:
    """A resize to a short side, for a centre crop behind it, that takes bounded memory whatever the image.

    What is cut off at both ends is an even number of short sides. That many become an even number of pixels in the
    resized image, so that the crop's rounding, and with it the pixels it shows, stay what they are.
    """

    def __init__(self, resize: Any) -> None:
        self.resize = resize
        size = resize.size
        pixels = size**2 if isinstance(size, int) else size[0] * size[1]
        keeps_short_side = isinstance(size, int) or getattr(resize, "longest", None) == 0
        self.most = max(_MAX_RESIZED // pixels, 16) if keeps_short_side else None

    def __call__(self, image: "Image") -> Any:
        """Return the resized image."""
        return self.resize(self._without_ends(image))

    def __repr__(self) -> str:
        return repr(self.resize)

    def _without_ends(self, image: "Image") -> "Image":
        if self.most is None or isinstance(image, Tensor):  # timm takes tensors as well
            return image
        short, long = sorted(image.size)
        if long <= self.most * short:
            return image
        cut = 2 * short * -(-(long // short - self.most) // 4)
        box = (cut, 0, image.width - cut, image.height)
        return image.crop(box if image.width > image.height else (0, cut, image.width, image.height - cut))
