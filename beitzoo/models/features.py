"""`features_only`: maps from chosen blocks, as timm's consumers read them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import InvalidValueError
from beitzoo.models.beit import Beit, FeatureFormat
from beitzoo.models.inputs import take_indices
from beitzoo.zoo.networks import pyramid_blocks

# A pyramid's scale against the patch grid: strides 4, 8, 16, 32 for patches of 16 (BEiT, segmentation backbone).
PYRAMID = (4.0, 2.0, 1.0, 0.5)


class BeitFeatures(nn.Module):
    """A backbone that returns a list of feature maps.

    Args:
        backbone: Its head and the blocks behind the last chosen one are dropped.
        out_indices: The last n blocks, or these. None: the last three, or, for a pyramid, those of the original's
            segmentation models (a third, half, two thirds and all of the depth; of shallow models the last four).
        norm: Apply the trained norm to every map.
        output_fmt: Maps (B, C, h, w), or patches (B, h w, C).
        pyramid: Bring four maps to 4, 2, 1 and 1/2 times the patch grid, by bilinear resizing and pooling.

    Attributes:
        feature_info: timm's: `channels()`, `reduction()`, `module_name()` of the maps.
    """

    def __init__(
        self,
        backbone: Beit,
        *,
        out_indices: int | Sequence[int] | None = None,
        norm: bool = False,
        output_fmt: FeatureFormat = "NCHW",
        pyramid: bool = False,
    ) -> None:
        super().__init__()
        from timm.models import FeatureInfo  # late: importing timm costs seconds

        depth = len(backbone.blocks)
        if out_indices is None:
            out_indices = pyramid_blocks(depth) if pyramid else min(3, depth)
        chosen = sorted(set(take_indices(out_indices, depth)))  # the order in which blocks give their maps
        if pyramid and (len(chosen) != len(PYRAMID) or output_fmt != "NCHW"):
            raise InvalidValueError(
                f"A pyramid is {len(PYRAMID)} NCHW maps; got out_indices={out_indices}, {output_fmt}."
            )
        self.out_indices = backbone.prune_intermediate_layers(chosen, prune_norm=not norm)
        backbone.mask_token = None  # no map depends on it, and DDP stops where a parameter gets no gradient
        backbone.config = replace(backbone.config, use_mask_token=False)
        info: list[dict[str, Any]] = backbone.feature_info
        for index, scale in zip(chosen, PYRAMID if pyramid else (), strict=False):
            info[index]["reduction"] = int(info[index]["reduction"] / scale)
        self.feature_info = FeatureInfo(_monotonous(info, chosen), tuple(chosen))
        self.backbone = backbone
        self.norm = norm
        self.output_fmt: FeatureFormat = output_fmt
        self.pyramid = pyramid

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, in_chans, height, width) to one feature map per chosen block."""
        maps: list[Tensor] = self.backbone.forward_intermediates(
            images, self.out_indices, norm=self.norm, output_fmt=self.output_fmt, intermediates_only=True
        )
        if not self.pyramid:
            return maps
        return [_scale(m, scale) for m, scale in zip(maps, PYRAMID, strict=True)]

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make the backbone take images of another size."""
        self.backbone.set_input_size(img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that are not decayed."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Describe the checkpoint in timm's form."""
        return self.backbone.pretrained_cfg

    default_cfg = pretrained_cfg


def _scale(x: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return x
    if scale < 1:
        return F.max_pool2d(x, kernel_size=round(1 / scale))
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def _monotonous(info: list[dict[str, Any]], chosen: list[int]) -> list[dict[str, Any]]:
    """Give blocks that are not chosen the stride of the next chosen one; timm insists that strides never fall."""
    stride = info[-1]["reduction"]
    for index in range(len(info) - 1, -1, -1):
        stride = info[index]["reduction"] if index in chosen else stride
        info[index] = {**info[index], "reduction": stride}
    return info
