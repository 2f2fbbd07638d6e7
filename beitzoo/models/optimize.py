"""`optimize`: the same network, prepared once for inference.

What a forward pass would compute again every time is put into the weights beforehand, and linears are stored the way
the processor wants to read them. The network is still `Beit`, with its blocks replaced; how it runs is said there.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from beitzoo.models.beit import Attention, Beit, Block, DropPath, Mlp, QkvLinear
from beitzoo.models.kernels import attend
from beitzoo.models.linear import TokenLinear
from beitzoo.models.position import PositionBias
from beitzoo.models.prepared import Prepare, PreparedLinear, prepare_for
from beitzoo.zoo.networks import Pair

Module = TypeVar("Module", bound=nn.Module)

# Of biases kept ready, for all blocks together; beyond it (large networks at 512 pixels take 1.6 GB) they are written
# into the workspace of each forward pass as in any other network.
READY_BYTES = 64 << 20

_KNOWN = {nn.ModuleList, Block, Attention, QkvLinear, Mlp, DropPath, nn.LayerNorm, nn.GELU, nn.Dropout}
_KNOWN |= {TokenLinear, nn.Linear}


@torch.inference_mode(False)
@torch.no_grad()
def optimize(model: Module, dtype: torch.dtype | Literal["int8"] | None = None, inplace: bool = False) -> Module:
    """Return an inference twin of a model: the same outputs, sooner.

    The twin is a snapshot: it can be run, copied and pickled, but neither trained, moved nor saved as weights, and
    what later becomes of the model does not reach it. Compile or export the model itself, not its twin. On a CPU
    without AVX-512, weights are laid out in the first pass of each shape of input, which is slower; where shapes keep
    changing, that ends, and with it most of what is gained.

    Args:
        model: A `Beit`, or what holds one (`BeitFeatures`), on the device where it shall run, without adapters or
            hooks inside its blocks.
        dtype: Of weights and outputs; the model's own if None. Outputs follow to rounding. `"int8"` is for CPUs
            and changes outputs: by 1.3 % of the largest logit for a base model of random weights on a processor
            without VNNI; it was not validated on trained weights. Linears of the blocks then compute in 8 bits, scaled
            per token and per output channel; the rest stays as it is.
        inplace: Turn the model itself into its twin, and free its weights block by block, rather than copy it.

    Raises:
        ValueError: There is nothing to prepare, something was added to the blocks, or the dtype cannot be had.
    """
    backbones = [module for module in model.modules() if isinstance(module, Beit)]
    if not backbones:
        raise ValueError(f"Got a {type(model).__name__} without a Beit in it; there is nothing to prepare.")
    prepare = prepare_for(backbones[0].cls_token, dtype)
    for backbone in backbones:
        _check_untouched(backbone)
    twin = model if inplace else copy.deepcopy(model)
    twin.eval().requires_grad_(False)
    backbones = [module for module in twin.modules() if isinstance(module, Beit)]
    for backbone in backbones:
        backbone.set_grad_checkpointing(False)
        for index, block in enumerate(backbone.blocks):
            assert isinstance(block, Block)
            backbone.blocks[index] = PreparedBlock(block, prepare)
    if isinstance(dtype, torch.dtype):
        twin.to(dtype)
    for backbone in backbones:
        backbone.__class__ = PreparedBeit  # not a new object: whoever holds a model prepared in place holds its twin
        assert isinstance(backbone, PreparedBeit)
        backbone.ready_biases()
    return twin


class PreparedBeit(Beit):
    """A `Beit` made by `optimize`: for inference only, as it was at that moment."""

    def train(self, mode: bool = True) -> "PreparedBeit":
        """Refuse training."""
        return _refuse("be trained") if mode else super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "PreparedBeit":
        """Refuse gradients."""
        return _refuse("give gradients") if requires_grad else super().requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: prepared weights are of no other network."""
        _refuse("be saved as weights (but pickled)")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the weights of other networks are not prepared."""
        _refuse("load weights")

    def init_weights(self) -> None:
        """Refuse training from scratch."""
        _refuse("be initialised")

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Make the twin take images of another size, as `Beit.set_input_size` does."""
        super().set_input_size(*args, **kwargs)
        self.ready_biases()

    @torch.inference_mode(False)
    @torch.no_grad()
    def ready_biases(self) -> None:
        """Look up the biases of all blocks for the grid of the config, if they take less than `READY_BYTES`."""
        config = self.config
        size = config.depth * config.num_heads * config.num_tokens**2 * self.cls_token.element_size()
        for block in self.blocks:
            assert isinstance(block, PreparedBlock)
            bias = self.position_bias(config.grid_size)  # one for each block, as each has one workspace
            block.attn.keep(bias, self.cls_token.dtype if size <= READY_BYTES else None)

    def _embed(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, PositionBias]:
        images = images.to(self.cls_token.dtype) if images.is_floating_point() else images
        tokens, bias = super()._embed(images, bool_masked_pos)
        if tokens.requires_grad:
            _refuse("give gradients")
        return tokens, bias

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _refuse("load weights")  # asked by a module around it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PreparedBeit":
        here = self.cls_token
        there = fn(here)
        if (there.device, there.dtype) != (here.device, here.dtype):
            _refuse("change its device or dtype")
        return self


class PreparedAttention(Attention):
    """Attention whose queries and values get their bias in the product, up to the projection."""

    def __init__(self, attn: Attention, prepare: Prepare) -> None:
        nn.Module.__init__(self)  # the parts are given, none is to be made
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        qkv = attn.qkv
        assert isinstance(qkv, nn.Linear)
        bias = None
        if attn.q_bias is not None and attn.v_bias is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        self.qkv = prepare(qkv.weight.detach(), bias)
        self.q_bias = self.v_bias = None
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.ready: tuple[Pair, Tensor | None] | None = None

    def keep(self, bias: PositionBias, dtype: torch.dtype | None) -> None:
        """Keep the bias of this block ready for one grid, or with no dtype let go of it."""
        self.ready = None if dtype is None else (bias.grid, bias.of(self.relative_position_bias_table, dtype))

    def forward(self, x: Tensor, bias: PositionBias) -> Tensor:
        """Map tokens (B, N, C) to mixed values (B, N, C), not yet projected."""
        q, k, v = self._project(x)
        if self.ready is not None and self.ready[0] == bias.grid:
            of_block = self.ready[1]
        else:
            of_block = bias.of(self.relative_position_bias_table, q.dtype)
        return attend(q, k, v, of_block).transpose(1, 2).flatten(2)


class PreparedBlock(Block):
    """A block with layer scale folded into the last linear of each branch, its MLP in parts where that is faster."""

    def __init__(self, block: Block, prepare: Prepare) -> None:
        nn.Module.__init__(self)
        self.norm1, self.norm2, self.drop_path = block.norm1, block.norm2, block.drop_path
        self.attn: PreparedAttention = PreparedAttention(block.attn, prepare)
        self.proj = prepare(*_scaled(block.attn.proj, block.gamma_1))
        fc1, (weight, bias) = block.mlp.fc1, _scaled(block.mlp.fc2, block.gamma_2)
        parts = math.ceil(weight.shape[1] / self.proj.most_inputs)  # all linears are of one kind
        biases = [bias, *[None] * (parts - 1)]
        self.fc1 = nn.ModuleList(map(prepare, fc1.weight.detach().chunk(parts), fc1.bias.detach().chunk(parts)))
        self.fc2 = nn.ModuleList(map(prepare, weight.chunk(parts, dim=1), biases))

    def forward(self, x: Tensor, bias: PositionBias) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        x = self.proj.add(x, self.attn(self.norm1(x), bias))
        y = self.norm2(x)
        for fc1, fc2 in zip(self.fc1, self.fc2, strict=True):
            assert isinstance(fc1, PreparedLinear) and isinstance(fc2, PreparedLinear)
            x = fc2.add(x, fc1.gelu(y))
        return x


def _scaled(linear: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear whose outputs are scaled by gamma; halves are multiplied as float32."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if gamma is None:
        return weight, bias
    gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
    return weight * gamma[:, None], bias * gamma


def _check_untouched(model: Beit) -> None:
    """Refuse blocks in which something was replaced or hooked that the twin would leave out."""
    if isinstance(model, PreparedBeit):
        raise ValueError("Got a model that optimize() made; give it the model that one was made from.")
    for name, module in model.blocks.named_modules(prefix="blocks"):
        known = type(module) in _KNOWN and (type(module) is QkvLinear) == name.endswith("qkv")
        known = known and getattr(module, "approximate", "none") == "none"  # of GELU
        if not known or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise ValueError(
                f"Got {name!r}, a {type(module).__name__}, not of the plain network or with hooks; a twin would "
                "run without them. Merge adapters and remove hooks first."
            )


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"A model made by optimize() cannot {what}: it is an inference snapshot. Use the model it was made from "
        "(optimize(model) without inplace=True leaves it as it was), and make a new snapshot."
    )
