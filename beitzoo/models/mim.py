"""Masked image modelling: a backbone and the head that predicts the visual tokens of masked patches.

BEiT (https://arxiv.org/abs/2106.08254), section 2.3: one linear head over the patch tokens. BEiT v2
(https://arxiv.org/abs/2208.06366), section 2.3, adds patch aggregation: the last class token and the patch tokens of
an earlier block go through two further blocks and the same head, so that the class token must hold what the patches
of the earlier block lack. `modeling_pretrain.py` of both.

Shapes: B batch, h w patch grid, M masked patches of the whole batch, V visual tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.models import initial, kernels
from beitzoo.models.beit import Beit, Block
from beitzoo.models.kernels import PositionBias
from beitzoo.zoo.checkpoints import PretrainedConfig
from beitzoo.zoo.networks import MimConfig


class MaskedImageModel(nn.Module):
    """A BEiT in pretraining. The original's names are the backbone's and the head's, without the prefix `backbone`.

    Attributes:
        config: The head.
        backbone: The network; it has a mask token and a norm on its tokens.
    """

    def __init__(self, backbone: Beit, config: MimConfig) -> None:
        super().__init__()
        network = backbone.config
        check(
            network.use_mask_token and not network.norm_after_pooling and not network.num_classes,
            "A masked image model needs a backbone with use_mask_token=True, use_fc_norm=False and num_classes=0.",
        )
        check(
            config.early_layers <= network.depth,
            f"early_layers={config.early_layers} of a network of {network.depth} blocks; choose an earlier block.",
        )
        check(
            not (config.early_layers and network.use_rel_pos_bias),
            "Patch aggregation with a bias table in each block is not built, as no released model has both; use "
            "use_shared_rel_pos_bias=True.",
        )
        self.config = config
        self.backbone = backbone
        width = network.embed_dim
        self.lm_head = nn.Linear(width, config.vocab_size)
        if config.early_layers:
            last = config.early_layers + config.head_layers
            deep = replace(network, depth=max(network.depth, last))  # for the rate of stochastic depth
            self.cls_pt_layers = nn.ModuleList(Block(deep, index) for index in range(config.early_layers, last))
        if config.early_layers and not config.shared_lm_head:
            self.cls_pt_norm = nn.LayerNorm(width, network.norm_eps)
            self.cls_pt_lm_head = nn.Linear(width, config.vocab_size)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    # ---- forward ------------------------------------------------------------------------------------

    def forward(
        self, images: Tensor, bool_masked_pos: Tensor, all_patches: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict visual tokens; with patch aggregation twice, from the last block and from the aggregation.

        Args:
            images: (B, in_chans, height, width).
            bool_masked_pos: (B, h w) or (B, h, w), True where a patch is masked.
            all_patches: Predict the tokens of all patches, not only of masked ones, which are a third of the work.

        Returns:
            Logits (M, V) of the masked patches of all images, in order, or (B, h w, V) of all patches.

        Raises:
            InvalidValueError: No patch is masked, or the mask is of another shape.
        """
        x, bias = self.backbone.embed(images, bool_masked_pos)
        prefix = self.backbone.num_prefix_tokens
        needed = _Needed(prefix) if all_patches else _Needed.masked(bool_masked_pos.flatten(1), prefix)
        tokens = self._tokens(x, bias, needed.kept)
        heads = [(self.backbone.norm, self.lm_head)] * len(tokens)
        if not self.config.shared_lm_head and len(tokens) == 2:
            heads[1] = (self.cls_pt_norm, self.cls_pt_lm_head)
        logits = [head(norm(needed.of(x))) for (norm, head), x in zip(heads, tokens, strict=True)]
        return logits[0] if len(logits) == 1 else (logits[0], logits[1])

    def _tokens(self, x: Tensor, bias: PositionBias, kept: Tensor | None) -> list[Tensor]:
        """Return the raw tokens that heads read: of the last block, and of patch aggregation.

        Args:
            x: Tokens that enter the first block, (B, 1 + h w, C).
            bias: What blocks know about positions.
            kept: Places of the tokens that are needed, (B, K); no others are returned then.
        """
        early = x
        depth, early_layers = len(self.backbone.blocks), self.config.early_layers
        for index in range(depth):
            is_last = index == depth - 1 and early_layers < depth  # else its patches are those that are aggregated
            x = self.backbone.run_block(index, x, bias, kept if is_last else None)
            if index + 1 == early_layers:
                early = x
        if not early_layers:
            return [x]
        prefix = self.backbone.num_prefix_tokens
        aggregated = torch.cat([x[:, :prefix], early[:, prefix:]], dim=1)
        *blocks, last = self.cls_pt_layers
        for block in blocks:
            aggregated = block(aggregated, bias)
        return [x, last(aggregated, bias, kept)]

    def forward_features(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Map images to the normed tokens of the last block, (B, 1 + h w, C), as the backbone does."""
        return self.backbone.forward_features(images, bool_masked_pos)

    # ---- initialisation -----------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter as the original does before pretraining.

        Linear and convolution weights and tokens are drawn by `initial.cut_normal`. The linears of the aggregation's
        blocks keep PyTorch's default, as the original makes these blocks after it has set all others.
        """
        network = self.backbone
        initial.reset(self, network.config.init_values, initial.cut_normal)
        initial.cut_normal(network.patch_embed.proj.weight)
        assert network.patch_embed.proj.bias is not None
        nn.init.zeros_(network.patch_embed.proj.bias)
        for token in (network.cls_token, network.mask_token, network.pos_embed):
            if token is not None:
                initial.cut_normal(token)
        initial.rescale(network.blocks)
        if self.config.early_layers:
            for module in self.cls_pt_layers.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
            initial.rescale(self.cls_pt_layers, first=self.config.early_layers + 1)

    # ---- what others ask ----------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that are not decayed in pretraining: positions of tokens and the class token.

        Bias tables and the mask token are decayed, as in the original.
        """
        tokens = {"backbone.cls_token", "backbone.pos_embed"}
        return {name for name, _ in self.named_parameters() if name in tokens}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    @property
    def pretrained(self) -> PretrainedConfig:
        """The checkpoint the weights are from or meant for."""
        return self.backbone.pretrained

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Describe the checkpoint in timm's form, with the size and channels this model has now."""
        return self.backbone.pretrained_cfg

    default_cfg = pretrained_cfg


@dataclass(frozen=True)
class _Needed:
    """Which tokens heads read.

    Attributes:
        prefix: Tokens before the patches.
        chosen: Which of the kept tokens are masked patches, (B, K); None if all patches are needed.
        kept: Places of prefix and masked patches, (B, K), filled up with the first token's; None if all are kept.
    """

    prefix: int
    chosen: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def masked(cls, mask: Tensor, prefix: int) -> "_Needed":
        """Take the masked patches; the mask is (B, h w). What is traced keeps all tokens, for shapes that are known.

        Raises:
            InvalidValueError: No patch is masked.
        """
        masked = F.pad(mask, (prefix, 0), value=False)
        if not kernels.is_eager():
            return cls(prefix, masked)
        counts = mask.sum(dim=1, keepdim=True)
        most = int(counts.max())
        check(most > 0, "Got a mask without a masked patch; there is nothing to predict.")
        # A stable sort puts the prefix first, then masked patches in their order.
        order = F.pad(mask.byte(), (prefix, 0), value=2).argsort(dim=1, descending=True, stable=True)[
            :, : prefix + most
        ]
        is_real = torch.arange(prefix + most, device=mask.device) < prefix + counts
        kept = order.where(is_real, 0)
        return cls(prefix, masked.take_along_dim(kept, dim=1), kept)

    def of(self, x: Tensor) -> Tensor:
        """Return the patches that are needed: (B, h w, C), or (M, C) of all images, in order."""
        return x[:, self.prefix :] if self.chosen is None else x[self.chosen]


def mim_loss(logits: Tensor | Sequence[Tensor], targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, nats, of logits (M, V) against visual tokens (M,); that of several heads is added.

    BEiT v2, equation 6: both heads weigh the same.
    """
    several = [logits] if isinstance(logits, Tensor) else logits
    return torch.stack([F.cross_entropy(one.float(), targets) for one in several]).sum()
