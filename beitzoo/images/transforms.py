"""From a data config to the transforms of training and evaluation; timm.data underneath."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]

_FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

# Pixels of a resized image of which the centre is cropped, 67 MB.
_MAX_RESIZED = 2**24


class HasPretrainedCfg(Protocol):
    """A model that says how its images are prepared: ours, or timm's."""

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Describe the checkpoint in timm's form."""


def resolve_data_config(model: HasPretrainedCfg) -> dict[str, Any]:
    """Return the arguments of `create_transform` for a model, at the input size it has now.

    The dict is timm's: `timm.data.create_transform(**config)` takes it as well.
    """
    return {name: model.pretrained_cfg[name] for name in _FIELDS}


def create_transform(is_training: bool = False, *, fast: bool = False, **options: Any) -> Transform:
    """Build the transform from a PIL image to a normalised tensor, (channels, height, width).

    It is timm's, value for value. Only of an image that is longer than it is wide by a factor of hundreds (272 at 224
    pixels, 64 at 512), the ends are cut off before the resize, which would make gigabytes of them for the centre crop
    to drop. Its values are still timm's where the short side divides the long one; else some may be one or two of 255
    levels apart.

    Args:
        is_training: Random crops and augmentation instead of resize and centre crop.
        fast: Evaluate on tensors, up to twice as fast and up to one of 255 levels off, see `images.fast`. The
            transform then takes uint8 tensors, (channels, height, width), as well as PIL images.
        **options: What `resolve_data_config` returns, and any option of `timm.data.create_transform`.
    """
    if fast:
        from beitzoo.images.fast import FastTransform  # late, as it imports Pillow

        if is_training:
            raise ValueError("There is no fast transform for training; leave out fast=True.")
        return FastTransform(create_transform(**options), options)
    # Imported late: with it comes torchvision, more than a second that importing beitzoo should not cost.
    from timm.data import create_transform as create_timm_transform

    transform = create_timm_transform(is_training=is_training, **options)
    steps: list[Any] = [] if is_training else getattr(transform, "transforms", [])
    for place, step in enumerate(steps):
        if type(step).__name__ in ("Resize", "ResizeKeepRatio"):
            steps[place] = _Bounded(step)
        if type(step).__name__ == "CenterCrop" and options.get("crop_mode") == "center_floor":
            steps[place] = _FloorCrop(*step.size)
    return transform


class _FloorCrop:
    """Crop the centre as transformers does: half a pixel is rounded down, where timm rounds to even."""

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        self.width = width

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms.functional import crop, get_dimensions

        _, height, width = get_dimensions(image)
        return crop(image, (height - self.height) // 2, (width - self.width) // 2, self.height, self.width)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size=({self.height}, {self.width}))"


class _Bounded:
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
