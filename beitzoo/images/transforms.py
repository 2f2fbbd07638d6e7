"""From a data config to the transforms of training and evaluation; timm.data underneath."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from beitzoo.errors import InvalidOptionError, InvalidValueError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]
Prepared = TypeVar("Prepared")

_FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

# What Pillow raises at a resize for the shape of one image, such as a side that would have no pixels left, or more than
# there is memory for. All else, torch's RuntimeError too, means that the transform is wrong, and for every image.
_ODD_IMAGE = (ValueError, OSError, MemoryError, ZeroDivisionError)


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
        fast: Evaluate on tensors, up to twice as fast, with bilinear or bicubic interpolation. Of photographs it is
            up to two of 255 levels off; see `images.fast` for other images. The transform then takes uint8 tensors,
            (channels, height, width), as well as PIL images.
        **options: What `resolve_data_config` returns, and any option of `timm.data.create_transform`.
    """
    if not isinstance(is_training, bool):
        raise InvalidOptionError(
            f"The first argument of create_transform is is_training, and this is a {type(is_training).__name__}; for a "
            "model write create_transform(**resolve_data_config(model))."
        )
    if fast:
        from beitzoo.images.fast import FastTransform  # late, as it imports Pillow

        if is_training:
            raise InvalidValueError("There is no fast transform for training; leave out fast=True.")
        return FastTransform(create_transform(**options), options)
    # Imported late: with them comes torchvision, more than a second that importing beitzoo should not cost.
    from timm.data import create_transform as create_timm_transform
    from torchvision.transforms import Compose

    from beitzoo.images.steps import BoundedResize, FloorCrop, ImageSteps, allow_no_bits

    transform = create_timm_transform(is_training=is_training, **options)
    if not isinstance(transform, Compose):  # several, or one that a user of timm asked for by an option
        return transform
    steps = list(transform.transforms)
    for step in steps:
        allow_no_bits(step)
    for place, step in enumerate(() if is_training else steps):
        if type(step).__name__ in ("Resize", "ResizeKeepRatio"):
            steps[place] = BoundedResize(step)
        if type(step).__name__ == "CenterCrop" and options.get("crop_mode") == "center_floor":
            steps[place] = FloorCrop(*step.size)
    return ImageSteps(steps)


def prepare(image: "Image", transform: Callable[["Image"], Prepared]) -> Prepared:
    """Transform an image for a network.

    Raises:
        ImageError: The image has a shape that cannot be transformed, such as a side of which no pixel would be left.
    """
    from beitzoo.images.files import ImageError

    try:
        return transform(image)
    except _ODD_IMAGE as error:
        if isinstance(error, UserError):
            raise
        raise ImageError(f"cannot be prepared: {error or type(error).__name__}") from error
