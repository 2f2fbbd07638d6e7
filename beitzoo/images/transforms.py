"""From a data config to the transforms of training and evaluation; timm.data underneath."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]

_FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


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


def create_transform(is_training: bool = False, **options: Any) -> Transform:
    """Build the transform from a PIL image to a normalised tensor, (channels, height, width).

    Args:
        is_training: Random crops and augmentation instead of resize and centre crop.
        **options: What `resolve_data_config` returns, and any option of `timm.data.create_transform`.
    """
    # Imported late: with it comes torchvision, more than a second that importing beitzoo should not cost.
    from timm.data import create_transform as create_timm_transform

    return create_timm_transform(is_training=is_training, **options)
