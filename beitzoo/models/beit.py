"""The BEiT backbone, from pixels to logits.

A plain vision transformer with four habits of its own: attention scores get a learned bias for the
relative position of query and key, keys have no bias term, every residual branch is scaled by a learned
vector (layer scale), and in the fine-tuned networks the last norm sits behind the mean over patches.
BEiT: https://arxiv.org/abs/2106.08254, `modeling_finetune.py`. BEiT v2 (https://arxiv.org/abs/2208.06366)
is the same network.

Shapes: B batch, N tokens (1 class token, then h w patches row by row), C channels, H heads, D channels of
a head, h w patch grid. Parameter names are unilm's and timm's; they are a public contract.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beitzoo.errors import InvalidValueError
from beitzoo.models import initial, inputs, kernels, position
from beitzoo.models.kernels import PositionBias
from beitzoo.models.position import RelativePositionBias
from beitzoo.zoo.checkpoints import Classify, PretrainedConfig
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.networks import BeitConfig, GlobalPool, Pair, override

FeatureFormat = Literal["NCHW", "NLC"]


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, height, width) to patches (B, h w, C)."""
        return self.proj(inputs.fit(images, self.config)).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)

    def resample(self, patch_size: Pair) -> None:
        """Fit the kernel to another patch size."""
        from timm.layers import resample_patch_embed  # late: importing timm costs seconds

        fitted = resample_patch_embed(self.proj.weight.detach(), list(patch_size))
        self.proj.weight = _like(self.proj.weight, fitted)
        self.proj.kernel_size = self.proj.stride = patch_size

    @property
    def img_size(self) -> Pair:
        """Height and width of the images it was made for."""
        return self.config.img_size

    @property
    def patch_size(self) -> Pair:
        """Height and width of a patch."""
        return self.config.patch_size

    @property
    def grid_size(self) -> Pair:
        """Rows and columns of patches in an image of that size."""
        return self.config.grid_size

    @property
    def num_patches(self) -> int:
        """Patches of an image of that size."""
        return self.grid_size[0] * self.grid_size[1]


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values only, and on the scores one for position."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if config.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if config.qkv_bias else None
        table = nn.Parameter(torch.zeros(config.bias_rows, config.num_heads)) if config.use_rel_pos_bias else None
        self.relative_position_bias_table = table
        self.attn_drop = config.attn_drop_rate
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(config.proj_drop_rate)

    def forward(self, x: Tensor, bias: PositionBias | None = None) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        bias = bias or kernels.position_bias(inputs.own_grid(x, self.config), self.config, like=x)
        qkv = self._project(x)
        dropout = self.attn_drop if self.training else 0.0
        x = kernels.attend(qkv, bias.of(self.relative_position_bias_table, qkv), dropout)  # (B, H, N, D)
        return self.proj_drop(kernels.call_linear(self.proj, x.transpose(1, 2).flatten(2)))

    def weights(self, x: Tensor, bias: PositionBias) -> Tensor:
        """Return how much each token (query, rows) takes from each (key, columns), (B, H, N, N)."""
        q, k, _ = self._project(x)
        return kernels.attention_weights(q, k, bias.of(self.relative_position_bias_table, q))

    def _project(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to queries, keys and values, (3, B, H, N, D)."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = kernels.call_linear(self.qkv, x, bias).unflatten(-1, (3, self.num_heads, self.head_dim))
        return qkv.permute(2, 0, 3, 1, 4)  # (B, N, 3, H, D) -> (3, B, H, N, D)


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
        hidden = self.act(kernels.call_linear(self.fc1, x))
        return self.drop(kernels.call_linear(self.fc2, hidden))


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

    def forward(self, x: Tensor, bias: PositionBias | None = None, kept: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C), or only those that are kept to (B, K, C).

        Args:
            x: Tokens.
            bias: From `Beit.position_bias`. Without it, as timm's blocks are called, a block goes by its own table,
                and tokens are those of one image of the network's size.
            kept: Places of the tokens that are needed behind this block, (B, K); the MLP leaves out all others.
        """
        x = self._add(x, self.gamma_1, self.attn(self.norm1(x), bias))
        if kept is not None:
            x = x.take_along_dim(kept[..., None], dim=1)
        return self._add(x, self.gamma_2, self.mlp(self.norm2(x)))

    def _add(self, x: Tensor, gamma: Tensor | None, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + branch if gamma is None else torch.addcmul(x, gamma, branch)


class Beit(nn.Module):
    """A BEiT with a classification head, or without one (`num_classes=0`).

    Attributes:
        config: What was built; follows `set_input_size` and `reset_classifier`.
        pretrained: The checkpoint the weights are from or meant for; says how images are prepared.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config = replace(config)  # its own, as others may leave notes on it
        self.pretrained = PretrainedConfig(head=Classify(num_classes=config.num_classes))
        self.checkpointed_blocks: frozenset[int] = frozenset()
        dim = config.embed_dim

        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.use_mask_token else None
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
        if not self.cls_token.is_meta:  # values come later, and PyTorch's arithmetic without values is slow
            self.init_weights()

    # ---- forward ------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, *img_size) to logits (B, num_classes), or features (B, C) without a head."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Map images to tokens (B, N, C): normed if the model has `norm`, raw if it norms after pooling.

        Args:
            images: (B, in_chans, height, width).
            bool_masked_pos: (B, h w) or (B, h, w); True patches are replaced by the mask token.
        """
        return self.norm(*self.run_blocks(*self.embed(images, bool_masked_pos), [len(self.blocks) - 1]))

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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: FeatureFormat = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return what comes out of chosen blocks; arguments and result are timm's.

        Args:
            x: Images, (B, in_chans, height, width).
            indices: The last n blocks, or these blocks (negative from the end), or all.
            return_prefix_tokens: Pair each map with its class token, (B, 1, C).
            norm: Apply the trained norm, wherever the model has it.
            stop_early: Leave out the blocks behind the last chosen one.
            output_fmt: Maps (B, C, h, w), or patches (B, h w, C).
            intermediates_only: Return the list alone, not `(tokens, list)`.
        """
        if output_fmt not in get_args(FeatureFormat):
            raise InvalidValueError(f"output_fmt={output_fmt!r}; there are {', '.join(get_args(FeatureFormat))}.")
        chosen = inputs.take_indices(indices, len(self.blocks))
        tokens, bias = self.embed(x)
        last = max(chosen) if stop_early else len(self.blocks) - 1
        *found, tokens = self.run_blocks(tokens, bias, [*sorted(set(chosen)), last])
        found = list(map(self._trained_norm, found)) if norm else found
        prefixes = [t[:, : self.num_prefix_tokens] for t in found]
        patches = [t[:, self.num_prefix_tokens :] for t in found]
        if output_fmt == "NCHW":
            patches = [t.transpose(1, 2).unflatten(2, bias.grid).contiguous() for t in patches]
        intermediates = list(zip(patches, prefixes, strict=True)) if return_prefix_tokens else patches
        return intermediates if intermediates_only else (self.norm(tokens), intermediates)

    def attention_maps(self, images: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
        """Return the attention weights of chosen blocks, (B, blocks, H, N, N); rows are queries and sum to 1.

        Other blocks run as always, and the result is what the fused kernels compute without showing it.

        Args:
            images: (B, in_chans, height, width).
            blocks: These blocks, negative from the end; all if None.
        """
        chosen = inputs.take_indices(blocks, len(self.blocks))
        x, bias = self.embed(images)
        maps = []
        for index, tokens in zip(chosen, self.run_blocks(x, bias, [index - 1 for index in chosen]), strict=True):
            block = self.blocks[index]
            assert isinstance(block, Block)
            maps.append(block.attn.weights(block.norm1(tokens), bias))
        return torch.stack(maps, dim=1)

    def position_bias(self, grid: Pair) -> PositionBias:
        """Return what the blocks of one forward pass need to know about positions in this grid."""
        like = next(self.parameters())  # not by name: torch.fx puts what has no device in the place of a parameter
        return kernels.position_bias(grid, self.config, like, self.rel_pos_bias)

    def embed(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, PositionBias]:
        """Map images to the tokens (B, N, C) that enter the first block, and what all blocks know about positions."""
        patches = self.patch_embed(images)
        bias = self.position_bias(inputs.grid_of(images, self.config))
        if bool_masked_pos is not None:
            patches = self._mask(patches, bool_masked_pos)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if self.pos_embed is not None:
            x = x + position.resize_pos_embed(self.pos_embed, self.config.grid_size, bias.grid)
        return self.pos_drop(x), bias

    def _mask(self, patches: Tensor, bool_masked_pos: Tensor) -> Tensor:
        if self.mask_token is None:
            raise InvalidValueError("This model has no mask token; create it with use_mask_token=True.")
        masked = inputs.flat_mask(bool_masked_pos, patches)
        return torch.where(masked[..., None], self.mask_token.to(patches.dtype), patches)

    def run_blocks(self, x: Tensor, bias: PositionBias, blocks: Sequence[int]) -> list[Tensor]:
        """Return the tokens behind each of these blocks, -1 for those that enter; blocks behind the last do not run."""
        outputs = {-1: x}
        for index in range(max(blocks) + 1):
            x = self.run_block(index, x, bias)
            if index in blocks:
                outputs[index] = x
        return [outputs[index] for index in blocks]

    def run_block(self, index: int, x: Tensor, bias: PositionBias, kept: Tensor | None = None) -> Tensor:
        """Map tokens through one block (see `Block`), recomputed in the backward pass if that was asked for."""
        block = self.blocks[index]
        if index in self.checkpointed_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, bias, kept, use_reentrant=False)
        return block(x, bias) if kept is None else block(x, bias, kept)

    def _trained_norm(self, x: Tensor) -> Tensor:
        return self.fc_norm(x) if self.config.norm_after_pooling else self.norm(x)

    # ---- changing a built model ---------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """Return the head; an identity if there is none."""
        return self.head

    @torch.inference_mode(False)
    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Give the model a fresh head of `num_classes` (0 for none), and another pooling if one is named.

        Device and dtype are kept; the names of the classes are not, as they were of the old head.
        """
        config = replace(self.config, num_classes=num_classes)
        if global_pool is not None:
            config = replace(config, global_pool=global_pool, use_fc_norm=config.norm_after_pooling)
        self.config = config
        self.pretrained = replace(self.pretrained, head=Classify(num_classes=num_classes))
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
        self.config = replace(self.config, global_pool=global_pool, use_fc_norm=self.config.norm_after_pooling)

    @torch.inference_mode(False)
    def set_input_size(self, img_size: int | Pair | None = None, patch_size: int | Pair | None = None) -> None:
        """Make the model take images of another size or cut them into other patches.

        Position parameters are fitted to the new grid, the patch projection to the new patch (FlexiViT's
        resampling, timm's code). All are new objects: make an optimizer after this, not before.
        """
        config = override(self.config, img_size=img_size, patch_size=patch_size)
        source, target = self.config.grid_size, config.grid_size
        fitted: dict[nn.Module, nn.Parameter] = {}
        for module in self.modules():
            if isinstance(module, Attention | RelativePositionBias):
                table = module.relative_position_bias_table
                if table is not None and source != target:
                    rows = position.resize_table(table.detach(), source, target, config.resize_rule)
                    fitted[module] = _like(table, rows)
        pos_embed = self.pos_embed
        if pos_embed is not None and source != target:
            pos_embed = _like(pos_embed, position.resize_pos_embed(pos_embed.detach(), source, target))
        if config.patch_size != self.config.patch_size:
            self.patch_embed.resample(config.patch_size)
        # Nothing below can fail, so a model is of one size or of the other.
        for module, parameter in fitted.items():
            module.relative_position_bias_table = parameter
        self.pos_embed = pos_embed
        for module in self.modules():
            if isinstance(module, Beit | PatchEmbed | Attention):
                module.config = config

    @torch.inference_mode(False)
    def set_in_chans(self, in_chans: int) -> None:
        """Make the model take images with another number of channels.

        One channel gets the sum of the weights; more get the old ones in turn, scaled so that an image of equal
        channels looks the same as before (timm's rule). The parameter is a new object.
        """
        config = replace(self.config, in_chans=in_chans)
        weight = self.patch_embed.proj.weight.detach()
        turns = torch.arange(in_chans, device=weight.device) % weight.shape[1]
        fitted = weight.sum(1, keepdim=True) if in_chans == 1 else weight[:, turns] * (weight.shape[1] / in_chans)
        self.patch_embed.proj.weight = _like(self.patch_embed.proj.weight, fitted)
        self.patch_embed.proj.in_channels = in_chans
        self.config = self.patch_embed.config = config

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is not needed for `forward_intermediates` of these blocks; return their indices from the start."""
        chosen = inputs.take_indices(indices, len(self.blocks))
        self.blocks = self.blocks[: max(chosen) + 1]
        last = self.blocks[-1]
        assert isinstance(last, Block)
        self.config = replace(self.config, depth=len(self.blocks), drop_path_rate=last.drop_path.rate)
        if prune_norm:
            self.norm = self.fc_norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def set_grad_checkpointing(self, enable: bool = True, blocks: Collection[int] | None = None) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            enable: Recompute, or keep everything.
            blocks: Only these blocks; all if None.
        """
        chosen = range(len(self.blocks)) if blocks is None else inputs.take_indices(list(blocks), len(self.blocks))
        self.checkpointed_blocks = frozenset(chosen) if enable else frozenset()

    # ---- initialisation -----------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter as the original does for a network to be fine-tuned or trained from scratch.

        Linear weights, tokens and positions are drawn by `initial.normal`, the patch projection is PyTorch's default.
        """
        self.patch_embed.proj.reset_parameters()
        initial.reset(self, self.config.init_values, initial.normal)
        initial.rescale(self.blocks)
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            if token is not None:
                initial.normal(token)
        self._init_head()

    @torch.no_grad()
    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            initial.reset(self.head, self.config.init_values, initial.normal)
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
            "stem": r"^(?:cls_token|mask_token|pos_embed|patch_embed)",
            "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)",
        }

    @property
    def backbone(self) -> "Beit":
        """The network itself; what holds one, such as a `MaskedImageModel`, has it under this name."""
        return self

    @property
    def num_classes(self) -> int:
        """Width of the head; 0 without one."""
        return self.config.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the logits; None where nobody named them."""
        return label_names(self.pretrained.head)

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
    def in_chans(self) -> int:
        """Colour channels of the images."""
        return self.config.in_chans

    @property
    def grad_checkpointing(self) -> bool:
        """Whether any block is recomputed in the backward pass."""
        return bool(self.checkpointed_blocks)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Describe the output of each block as timm does: its module, channels and stride."""
        stride = max(self.config.patch_size)
        channels = self.num_features
        return [{"module": f"blocks.{i}", "num_chs": channels, "reduction": stride} for i in range(len(self.blocks))]

    @property
    def global_pool(self) -> GlobalPool:
        """How tokens become one feature."""
        return self.config.global_pool

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Describe the checkpoint in timm's form, with the size and channels this model has now."""
        return self.pretrained.to_timm(self.config)

    default_cfg = pretrained_cfg


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    """Make the successor of a parameter: one that was frozen stays frozen."""
    return nn.Parameter(new, requires_grad=old.requires_grad)
