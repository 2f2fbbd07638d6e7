"""The BEiT backbone, from pixels to logits.

A plain vision transformer with four habits of its own: attention scores get a learned bias for the
relative position of query and key, keys have no bias term, every residual branch is scaled by a learned
vector (layer scale), and in the fine-tuned networks the last norm sits behind the mean over patches.
BEiT: https://arxiv.org/abs/2106.08254, `modeling_finetune.py`. BEiT v2 (https://arxiv.org/abs/2208.06366)
is the same network.

Shapes: B batch, N tokens (1 class token, then h w patches row by row), C channels, H heads, D channels of
a head, h w patch grid. Parameter names are unilm's and timm's; they are a public contract.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beitzoo.models import position
from beitzoo.models.attention import attend
from beitzoo.models.position import PositionBias, RelativePositionBias
from beitzoo.zoo.config import BeitConfig, GlobalPool, Pair, PretrainedConfig, override


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) to patches (B, h w, C)."""
        expected = (self.config.in_chans, *self.config.img_size)
        if images.shape[1:] != expected:
            raise ValueError(
                f"Got images of shape {tuple(images.shape)}; this model takes {('batch', *expected)}. "
                "Resize the images, or create the model with img_size=(height, width) and in_chans=channels."
            )
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values only, and on the scores one for position."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if config.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if config.qkv_bias else None
        self.relative_position_bias_table = (
            nn.Parameter(torch.zeros(position.table_rows(config.grid_size), config.num_heads))
            if config.use_rel_pos_bias
            else None
        )
        self.attn_drop = config.attn_drop_rate
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor, bias: PositionBias) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias.to(q.dtype), v + self.v_bias.to(v.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = self.attn_drop if self.training else 0.0
        x = attend(q, k, v, bias.of(self.relative_position_bias_table), dropout)  # (B, H, N, D)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linears with an exact GELU between; one dropout, at the end, as in the original."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.hidden_dim, config.embed_dim)
        self.drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        return self.drop(self.fc2(self.act(self.fc1(x))))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch for whole samples and scale the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Keep each sample of (B, N, C) with probability 1 - rate."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Attention, then MLP; each normed on the way in and scaled on the way back to the residual."""

    def __init__(self, config: BeitConfig, index: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(dim, config.norm_eps)
        self.mlp = Mlp(config)
        self.gamma_1 = nn.Parameter(torch.full((dim,), float(config.init_values))) if config.init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), float(config.init_values))) if config.init_values else None
        self.drop_path = DropPath(config.drop_path_rate * index / max(config.depth - 1, 1))

    def forward(self, x: Tensor, bias: PositionBias) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        branch = self.attn(self.norm1(x), bias)
        x = x + self.drop_path(branch if self.gamma_1 is None else self.gamma_1 * branch)
        branch = self.mlp(self.norm2(x))
        return x + self.drop_path(branch if self.gamma_2 is None else self.gamma_2 * branch)


class Beit(nn.Module):
    """A BEiT with a classification head, or without one (`num_classes=0`).

    Attributes:
        config: What was built; follows `set_input_size` and `reset_classifier`.
        pretrained: The checkpoint the weights are from or meant for; says how images are prepared.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        self.pretrained = PretrainedConfig(num_classes=config.num_classes)
        self.grad_checkpointing = False
        dim = config.embed_dim

        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim)) if config.use_abs_pos_emb else None
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        self.rel_pos_bias = (
            RelativePositionBias(config.grid_size, config.num_heads) if config.use_shared_rel_pos_bias else None
        )
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        pooled = config.norm_after_pooling
        self.norm: nn.Module = nn.Identity() if pooled else nn.LayerNorm(dim, config.norm_eps)
        self.fc_norm: nn.Module = nn.LayerNorm(dim, config.norm_eps) if pooled else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head: nn.Module = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()
        self.init_weights()

    # ---- forward ------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) to logits (B, num_classes), or features (B, C) without a head."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images to tokens (B, N, C): normed if the model has `norm`, raw if it norms after pooling."""
        patches = self.patch_embed(images)
        bias = self.position_bias(self.config.grid_size, patches.dtype)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
        return self.norm(x)

    def position_bias(self, grid: Pair, dtype: torch.dtype) -> PositionBias:
        """Gather what the blocks of one forward pass need to know about positions in this grid."""
        shared = self.rel_pos_bias
        table = None if shared is None else shared.relative_position_bias_table
        return PositionBias(grid, dtype, None if table is None else position.bias(table, grid, dtype))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, N, C) to logits, or with `pre_logits` to features (B, C) before the head.

        With `global_pool=''` nothing is pooled, and both keep their N.
        """
        if self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, 0]
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    # ---- changing a built model ---------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """Return the head; an identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Give the model a fresh head of `num_classes` (0 for none), and another pooling if one is named.

        Device and dtype are kept.
        """
        if global_pool is not None:
            self.set_global_pool(global_pool)
        self.config = override(self.config, num_classes=num_classes)
        like = self.cls_token
        if num_classes:
            self.head = nn.utils.skip_init(
                nn.Linear, self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
            self._init_head()
        else:
            self.head = nn.Identity()

    def set_global_pool(self, global_pool: GlobalPool) -> None:
        """Pool another way. The trained norm stays where it is, before or after the pooling."""
        self.config = override(self.config, global_pool=global_pool, use_fc_norm=self.config.norm_after_pooling)

    def set_input_size(self, img_size: int | Pair) -> None:
        """Make the model take images of another size, fitting its position parameters to the new grid.

        The parameters are new objects: make an optimizer after this, not before.
        """
        source = self.config.grid_size
        self.config = self.patch_embed.config = override(self.config, img_size=img_size)
        target = self.config.grid_size
        with torch.no_grad():
            for module in self.modules():
                if (
                    isinstance(module, Attention | RelativePositionBias)
                    and module.relative_position_bias_table is not None
                ):
                    table = module.relative_position_bias_table
                    module.relative_position_bias_table = nn.Parameter(position.resize_table(table, source, target))
            if self.pos_embed is not None:
                self.pos_embed = nn.Parameter(position.resize_pos_embed(self.pos_embed, source, target))

    def set_in_chans(self, in_chans: int) -> None:
        """Make the model take images with another number of channels.

        One channel gets the sum of the weights; more get the old ones in turn, scaled so that an image of equal
        channels looks the same as before (timm's rule). The parameter is a new object.
        """
        weight = self.patch_embed.proj.weight.detach()
        self.config = self.patch_embed.config = override(self.config, in_chans=in_chans)
        turns = torch.arange(in_chans, device=weight.device) % weight.shape[1]
        fitted = weight.sum(1, keepdim=True) if in_chans == 1 else weight[:, turns] * (weight.shape[1] / in_chans)
        self.patch_embed.proj.weight = nn.Parameter(fitted)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    # ---- initialisation -----------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter as the original does for a network to be fine-tuned or trained from scratch.

        Linear weights, class token and positions: normal, std 0.02, cut at 2; biases and bias tables 0; patch
        projection: PyTorch's default. The last linear of each branch is divided by sqrt(2 * layer), so that the
        residual does not grow with depth (BEiT, section 2.5).
        """
        self.patch_embed.proj.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                _init_linear(module)
            elif isinstance(module, Attention | RelativePositionBias | Block):
                for parameter in module.parameters(recurse=False):
                    nn.init.zeros_(parameter)
        for layer, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            for gamma in (block.gamma_1, block.gamma_2):
                if gamma is not None:
                    nn.init.constant_(gamma, self.config.init_values)
            block.attn.proj.weight.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2 * layer))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self._init_head()

    @torch.no_grad()
    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            _init_linear(self.head)
            self.head.weight.mul_(self.config.head_init_scale)

    # ---- what others ask ----------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that describe positions and the class token; they are not decayed."""
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return {"cls_token", "pos_embed"} & dict(self.named_parameters()).keys() | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which layer a parameter belongs to, in timm's form, for layer-wise learning-rate decay.

        What is neither stem nor block is of the last layer, like the head: the norms and, as in unilm but not in
        timm, the shared bias table.
        """
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)",
        }

    @property
    def num_classes(self) -> int:
        """Width of the head; 0 without one."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels C of tokens and features."""
        return self.config.embed_dim

    embed_dim = head_hidden_size = num_features

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token."""
        return 1

    @property
    def global_pool(self) -> GlobalPool:
        """How tokens become one feature."""
        return self.config.global_pool

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Describe the checkpoint in timm's form, with the size and channels this model has now."""
        return self.pretrained.to_timm(self.config)

    default_cfg = pretrained_cfg


def _init_linear(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
