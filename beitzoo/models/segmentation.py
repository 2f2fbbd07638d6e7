"""Semantic segmentation: a backbone, the neck that makes a pyramid of its maps, and the heads that name each pixel.

The originals' (`semantic_segmentation/` of BEiT and BEiT v2) is UPerNet (https://arxiv.org/abs/1807.10221) as
mmsegmentation builds it, with an auxiliary head in training. Beside it there is a linear decoder, by which frozen
features are compared.

Shapes: B batch, C channels, h w patch grid, K classes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.models.beit import Beit
from beitzoo.models.convolutions import convolve_joined, resize
from beitzoo.zoo.checkpoints import PretrainedConfig, Segment
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.networks import Pair, SegmenterConfig

_AUXILIARY_MAP = 2  # of the pyramid: the one at the patch grid
_CLASSIFIER_STD = 0.01


class Neck(nn.Module):
    """Make a pyramid of four maps of a plain network: 4, 2, 1 and 1/2 times their size.

    Strides 4, 8, 16 and 32 for patches of 16 pixels. It needs nothing of a BEiT: give it the maps of any network
    whose patches are all of one size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map four maps (B, C, h, w) to (B, C, 4h, 4w), (B, C, 2h, 2w), (B, C, h, w) and (B, C, h // 2, w // 2).

        Raises:
            InvalidValueError: There are not four maps, or they are too small to be halved.
        """
        check(len(maps) == 4, f"Got {len(maps)} maps; the neck makes a pyramid of four. Give it those of four blocks.")
        height, width = maps[3].shape[2:]
        check(
            min(height, width) >= 2,
            f"Got maps of {height} x {width} patches, and the smallest of the pyramid is half as large; it needs 2 x 2 "
            "patches or more. Give larger images.",
        )
        layers = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [layer(one) for layer, one in zip(layers, maps, strict=True)]


class ConvNorm(nn.Module):
    """A convolution that keeps the size, batch norm and ReLU; the names are mmsegmentation's.

    Of several maps, it is that of their concatenation, all resized to the size of the first.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, *maps: Tensor) -> Tensor:
        """Map one or more maps, together of `in_channels`, to (B, channels, h, w) of the size of the first."""
        return F.relu(self.bn(convolve_joined(self.conv, maps)), inplace=True)


class UperHead(nn.Module):
    """UPerNet: the last map pooled to several grids, then from map to map up the pyramid, then all maps together."""

    def __init__(self, channels: int, config: SegmenterConfig) -> None:
        super().__init__()
        levels = len(config.pool_scales)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNorm(channels, channels, 1)) for side in config.pool_scales
        )
        self.bottleneck = ConvNorm(channels * (1 + levels), channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(channels, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvNorm(channels * 4, channels, 3)
        self.dropout = nn.Dropout2d(config.decoder_drop_rate)
        self.conv_seg = nn.Conv2d(channels, config.num_classes, kernel_size=1)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Map the four maps of a pyramid to logits (B, K, 4h, 4w) of the size of the first."""
        return self.conv_seg(self.dropout(self.fpn_bottleneck(*self._levels(pyramid))))

    def _levels(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Return the maps that are joined at the end, from the largest to the smallest.

        On its own, so that the sums it goes through are free again when they are joined.
        """
        *lower, last = pyramid
        top = self.bottleneck(last, *(pool(last) for pool in self.psp_modules))
        levels = [top]
        upwards = zip(reversed(self.lateral_convs), reversed(self.fpn_convs), reversed(lower), strict=True)
        for lateral, conv, one in upwards:
            top = lateral(one) + resize(top, _size(one))
            levels.insert(0, conv(top))
        return levels


class FcnHead(nn.Module):
    """The auxiliary head: convolutions over one map, and a classifier. It gives the backbone a shorter gradient."""

    def __init__(self, channels: int, config: SegmenterConfig) -> None:
        super().__init__()
        widths = [channels] + [config.auxiliary_channels] * config.auxiliary_convs
        self.convs = nn.Sequential(*(ConvNorm(before, after, 3) for before, after in itertools.pairwise(widths)))
        self.dropout = nn.Dropout2d(config.decoder_drop_rate)
        self.conv_seg = nn.Conv2d(widths[-1], config.num_classes, kernel_size=1)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Map a pyramid to logits (B, K, h, w) of the patch grid."""
        return self.conv_seg(self.dropout(self.convs(pyramid[_AUXILIARY_MAP])))


class LinearHead(nn.Module):
    """One norm, over the batch, and one linear on each patch."""

    def __init__(self, channels: int, config: SegmenterConfig) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(config.decoder_drop_rate)
        self.conv_seg = nn.Conv2d(channels, config.num_classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map the one map to logits (B, K, h, w) of the patch grid."""
        return self.conv_seg(self.dropout(self.bn(maps[0])))


class Segmenter(nn.Module):
    """A BEiT that names the class of each pixel.

    Blocks behind the last one that is read stay part of the network, but do not run: transformers' files have such.
    On many processes the training loop makes its norms those of the whole batch, as in the original; in another loop
    `nn.SyncBatchNorm.convert_sync_batchnorm` does, on GPUs. Names and files stay the same.

    A backbone of which no parameter asks for a gradient (`model.backbone.requires_grad_(False)`) stays in evaluation
    mode, so that its features are those of the frozen network: nothing in it is dropped in training.

    Attributes:
        config: The heads; `out_indices` are said.
        backbone: The network, which loses its last norm and its own head: no map depends on them.
    """

    def __init__(self, backbone: Beit, config: SegmenterConfig) -> None:
        super().__init__()
        check(
            backbone.mask_token is None,
            "Got a backbone with a mask token, which no map depends on; make it with use_mask_token=False.",
        )
        self.config = config.of_depth(len(backbone.blocks))
        backbone.prune_intermediate_layers(1, prune_norm=True)
        self.backbone = backbone
        self._name_head()
        width = backbone.num_features
        self.neck = Neck(width) if config.decoder == "upernet" else None
        self.decode_head = UperHead(width, config) if config.decoder == "upernet" else LinearHead(width, config)
        self.auxiliary_head = FcnHead(width, config) if config.has_auxiliary else None
        if not backbone.cls_token.is_meta:
            self.init_heads()

    # ---- forward ------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images to logits of the classes of pixels, coarser than the images; resize them to the images' size.

        Args:
            images: (B, in_chans, height, width).

        Returns:
            Logits (B, K, 4h, 4w), which is a quarter of each side of the images for patches of 16; (B, K, h, w) with
            the linear decoder. In training mode, with an auxiliary head, a pair: these, and the auxiliary head's
            (B, K, h, w), whose loss the original weighs 0.4.
        """
        maps = self.forward_features(images)
        logits = self.decode_head(maps)
        if self.auxiliary_head is None or not self.training:
            return logits
        return logits, self.auxiliary_head(maps)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Map images to what the heads read: the pyramid, or with the linear decoder the map of one block.

        Maps are raw outputs of blocks, (B, C, h, w), as in the original: no norm is between these and the neck.
        """
        blocks = self.config.out_indices
        assert blocks is not None
        x, bias = self.backbone.embed(images)
        prefix = self.backbone.num_prefix_tokens
        maps = [
            # Whole in memory as a map, as convolutions of a view are slower.
            tokens[:, prefix:].transpose(1, 2).unflatten(2, bias.grid).contiguous()
            for tokens in self.backbone.run_blocks(x, bias, blocks)
        ]
        return maps if self.neck is None else self.neck(maps)

    def train(self, mode: bool = True) -> "Segmenter":
        """Set training or evaluation mode; a frozen backbone is in evaluation mode always."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    # ---- changing a built model ---------------------------------------------------------------------

    @torch.inference_mode(False)
    def reset_classifier(self, num_classes: int) -> None:
        """Give all heads fresh classifiers; the rest stays, and the names of the classes do not."""
        self.config = replace(self.config, num_classes=num_classes)
        for head in self._heads():
            old = head.conv_seg.weight
            head.conv_seg = nn.utils.skip_init(
                nn.Conv2d, old.shape[1], num_classes, kernel_size=1, device=old.device, dtype=old.dtype
            )
            _init_classifier(head.conv_seg)
        self._name_head()

    def set_input_size(self, img_size: int | Pair | None = None, patch_size: int | Pair | None = None) -> None:
        """Make the backbone take images of another size, or cut them into other patches."""
        self.backbone.set_input_size(img_size, patch_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    def _name_head(self) -> None:
        self.backbone.pretrained = replace(self.backbone.pretrained, head=Segment(network=self.config))

    def _heads(self) -> list[UperHead | LinearHead | FcnHead]:
        return [self.decode_head] if self.auxiliary_head is None else [self.decode_head, self.auxiliary_head]

    # ---- initialisation -----------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Set every parameter: the backbone as for fine-tuning or from scratch, and the heads."""
        self.backbone.init_weights()
        self.init_heads()

    @torch.no_grad()
    def init_heads(self) -> None:
        """Set neck and heads as the original does: its convolutions by Kaiming's rule, small classifiers.

        The neck is PyTorch's default, as are all batch norms. `ConvModule` of mmcv, `decode_head.py` of mmsegmentation.
        """
        parts = [module for module in (self.neck, *self._heads()) if module is not None]
        for module in (module for part in parts for module in part.modules()):
            if isinstance(module, nn.ConvTranspose2d | nn.BatchNorm2d | nn.SyncBatchNorm):
                module.reset_parameters()
            elif isinstance(module, ConvNorm):
                assert isinstance(module.conv, nn.Conv2d)
                nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
        for head in self._heads():
            _init_classifier(head.conv_seg)

    # ---- what others ask ----------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Name no parameter: only vectors are not decayed.

        The original means to leave out the class token and positions, but looks for their names without the prefix of
        the backbone, so that both are decayed.
        """
        return set()

    def unused_parameters(self) -> set[str]:
        """Name the parameters that no output depends on: those of blocks behind the last one that is read."""
        blocks = self.config.out_indices
        assert blocks is not None
        unused = range(max(blocks) + 1, len(self.backbone.blocks))
        prefixes = tuple(f"backbone.blocks.{index}." for index in unused)
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which layer a parameter belongs to, as `Beit.group_matcher`; neck and heads are of the last layer."""
        return {
            name: pattern.replace("^", r"^backbone\.") for name, pattern in self.backbone.group_matcher(coarse).items()
        }

    @property
    def num_classes(self) -> int:
        """Classes of a pixel, K."""
        return self.config.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the logits; None where nobody named them."""
        return label_names(self.pretrained.head)

    @property
    def pretrained(self) -> PretrainedConfig:
        """The checkpoint the weights are from or meant for."""
        return self.backbone.pretrained

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Describe the checkpoint in timm's form, with the size and channels this model has now."""
        return self.backbone.pretrained_cfg

    default_cfg = pretrained_cfg


def _init_classifier(classifier: nn.Conv2d) -> None:
    assert classifier.bias is not None
    nn.init.normal_(classifier.weight, std=_CLASSIFIER_STD)
    nn.init.zeros_(classifier.bias)


def _size(x: Tensor) -> Pair:
    return x.shape[2], x.shape[3]
