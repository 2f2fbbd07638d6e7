"""`optimize`: a copy of a model for inference, with the same outputs and faster.

What a forward pass would compute again every time is put into the weights beforehand, and linears are packed the way
the processor wants to read them. The copy is still a `Beit`, with its blocks replaced; how it runs is said there.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from beitzoo.errors import InvalidValueError, UnsupportedError
from beitzoo.models import inputs, kernels
from beitzoo.models.beit import Attention, Beit, Block, DropPath, Mlp
from beitzoo.models.kernels import PositionBias
from beitzoo.models.packed import InferenceLinear, MakeLinear, linears_for
from beitzoo.models.segmentation import ConvNorm, Neck
from beitzoo.zoo.networks import Pair

Module = TypeVar("Module", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")

# Of biases kept ready, for all blocks together; beyond it (large networks at 512 pixels take 1.6 GB) they are written
# into the workspace of each forward pass as in any other network.
READY_BYTES = 64 << 20

_KNOWN = {nn.ModuleList, Block, Attention, Mlp, DropPath, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout}


@torch.inference_mode(False)
@torch.no_grad()
def optimize(model: Module, dtype: torch.dtype | Literal["int8"] | None = None, inplace: bool = False) -> Module:
    """Return an inference copy of a model: the same outputs, faster.

    The copy is a snapshot: it can be run, copied and pickled, but neither trained, moved nor saved as weights, and
    what later becomes of the model does not reach it. Compile or export the model itself: on a CPU, `torch.compile`
    leaves a copy as it is. On a CPU without AVX-512, weights are packed in the first pass of each shape of input, which
    is slower; where shapes keep changing, that ends, and with it most of what is gained.

    Args:
        model: A `Beit`, or what holds one (`BeitFeatures`, a `Segmenter`), on the device where it shall run, without
            adapters or hooks inside its blocks.
        dtype: Of weights and outputs; the model's own if None. Outputs follow to rounding. `"int8"` is for CPUs
            and changes outputs: by 1.3 % of the largest logit for a base model of random weights on a processor
            without VNNI; it was not validated on trained weights. Linears of the blocks then compute in 8 bits, scaled
            per token and per output channel; the rest stays as it is.
        inplace: Turn the model itself into its inference copy, and free its weights block by block.

    Raises:
        ValueError: There is nothing to optimize, the blocks were changed (adapters, hooks, quantised or pruned
            weights), or the dtype cannot be had.
    """
    backbones = [module for module in model.modules() if isinstance(module, Beit)]
    if not backbones:
        raise InvalidValueError(f"Got a {type(model).__name__} without a Beit in it; there is nothing to optimize.")
    make = linears_for(backbones[0].cls_token, dtype)
    for backbone in backbones:
        _check_unchanged(backbone)
    result = model if inplace else copy.deepcopy(model)
    result.eval().requires_grad_(False)
    backbones = [module for module in result.modules() if isinstance(module, Beit)]
    for backbone in backbones:
        backbone.set_grad_checkpointing(False)
        for index, block in enumerate(backbone.blocks):
            assert isinstance(block, Block)
            backbone.blocks[index] = InferenceBlock(block, make)
    _fold_norms(result)
    if isinstance(dtype, torch.dtype):
        result.to(dtype)
    for backbone in backbones:
        backbone.__class__ = InferenceBeit  # not a new object: whoever holds a model optimized in place holds its copy
        assert isinstance(backbone, InferenceBeit)
        backbone.ready_biases()
    return result


def _as_it_is(
    method: Callable[Concatenate["InferenceBeit", P], R],
) -> Callable[Concatenate["InferenceBeit", P], R]:
    """Keep a method outside of compiled graphs, in one piece, where the linears call what no graph can hold.

    Decided in the call: marking methods beforehand would import the compiler, which takes more than a second.
    """

    @functools.wraps(method)
    def call(self: "InferenceBeit", *args: P.args, **kwargs: P.kwargs) -> R:
        if self.in_graphs or not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return method(self, *args, **kwargs)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            _refuse("be exported or traced: its linears are oneDNN's own")
        return torch.compiler.disable(method, reason="compile the model itself")(self, *args, **kwargs)

    return call


class InferenceBeit(Beit):
    """A `Beit` made by `optimize`: for inference only, as it was at that moment."""

    @_as_it_is
    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits, or features without a head."""
        return super().forward(images)

    @_as_it_is
    def forward_features(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Map images to tokens."""
        return super().forward_features(images, bool_masked_pos)

    @_as_it_is
    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Return what comes out of chosen blocks."""
        return super().forward_intermediates(*args, **kwargs)

    @_as_it_is
    def attention_maps(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the attention weights of chosen blocks."""
        return super().attention_maps(*args, **kwargs)

    def position_bias(self, grid: Pair) -> PositionBias:
        """Return what blocks need to know about positions; nothing more than the grid if their biases are ready."""
        # What a masked image model has behind the blocks needs the shared bias itself.
        if self.rel_pos_bias is None and all(
            block.attn.ready is not None and block.attn.ready[0] == grid for block in self._blocks()
        ):
            return PositionBias(grid, self.config.grid_size, self.config.resize_rule)
        return super().position_bias(grid)

    def train(self, mode: bool = True) -> "InferenceBeit":
        """Refuse training."""
        return _refuse("be trained") if mode else super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "InferenceBeit":
        """Refuse gradients."""
        return _refuse("give gradients") if requires_grad else super().requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: packed weights are of no other network."""
        _refuse("be saved as weights (but pickled)")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the weights of other networks are not packed."""
        _refuse("load weights")

    def init_weights(self) -> None:
        """Refuse training from scratch."""
        _refuse("be initialised")

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Make the copy take images of another size, as `Beit.set_input_size` does."""
        super().set_input_size(*args, **kwargs)
        self.ready_biases()

    @property
    def in_graphs(self) -> bool:
        """Whether PyTorch can compile, export and trace this copy."""
        return all(module.in_graphs for module in self.blocks.modules() if isinstance(module, InferenceLinear))

    @torch.inference_mode(False)
    @torch.no_grad()
    def ready_biases(self) -> None:
        """Look up the biases of all blocks for the grid of the config, if they take less than `READY_BYTES`."""
        config, like = self.config, self.cls_token
        size = config.depth * config.num_heads * config.num_tokens**2 * like.element_size()
        for block in self._blocks():
            block.attn.ready = None
        if size <= READY_BYTES:
            for block in self._blocks():  # with a record for each, as each has one workspace
                block.attn.make_ready(super().position_bias(config.grid_size), like)

    def _blocks(self) -> list["InferenceBlock"]:
        return [block for block in self.blocks if isinstance(block, InferenceBlock)]

    def embed(self, images: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, PositionBias]:
        """Map images of any precision to the tokens that enter the first block, as `Beit.embed` does."""
        if isinstance(images, Tensor) and images.is_floating_point():
            images = images.to(self.cls_token.dtype)
        tokens, bias = super().embed(images, bool_masked_pos)
        if tokens.requires_grad:
            _refuse("give gradients")
        return tokens, bias

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _refuse("load weights")  # asked by a module around it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InferenceBeit":
        here = self.cls_token
        there = fn(here)
        if (there.device, there.dtype) != (here.device, here.dtype):
            _refuse("change its device or dtype")
        return self


class InferenceAttention(Attention):
    """Attention whose queries and values get their bias in the product, up to the projection."""

    def __init__(self, attn: Attention, make: MakeLinear) -> None:
        nn.Module.__init__(self)  # the parts are given, none is to be made
        self.config, self.num_heads, self.head_dim = attn.config, attn.num_heads, attn.head_dim
        bias = None
        if attn.q_bias is not None and attn.v_bias is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        assert isinstance(attn.qkv, nn.Linear)
        self.qkv = make(attn.qkv.weight.detach(), bias)
        self.q_bias = self.v_bias = None
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.ready: tuple[Pair, Tensor | None] | None = None

    def make_ready(self, bias: PositionBias, like: Tensor) -> None:
        """Keep the bias of this block for one grid."""
        self.ready = bias.grid, bias.of(self.relative_position_bias_table, like)

    def forward(self, x: Tensor, bias: PositionBias | None = None) -> Tensor:
        """Map tokens (B, N, C) to mixed values (B, N, C), not yet projected."""
        qkv = self._project(x)
        return kernels.attend(qkv, self._bias_of(bias, x, qkv)).transpose(1, 2).flatten(2)

    def weights(self, x: Tensor, bias: PositionBias | None = None) -> Tensor:
        """Return how much each token (query, rows) takes from each (key, columns), (B, H, N, N)."""
        q, k, _ = self._project(x)
        return kernels.attention_weights(q, k, self._bias_of(bias, x, q))

    def _bias_of(self, bias: PositionBias | None, x: Tensor, q: Tensor) -> Tensor | None:
        grid = inputs.own_grid(x, self.config) if bias is None else bias.grid
        if self.ready is not None and self.ready[0] == grid:
            return self.ready[1]
        bias = bias or kernels.position_bias(grid, self.config, like=x)
        return bias.of(self.relative_position_bias_table, q)


class InferenceBlock(Block):
    """A block with layer scale folded into the last linear of each branch, its MLP in parts where that is faster."""

    def __init__(self, block: Block, make: MakeLinear) -> None:
        nn.Module.__init__(self)
        self.norm1, self.norm2, self.drop_path = block.norm1, block.norm2, block.drop_path
        self.attn: InferenceAttention = InferenceAttention(block.attn, make)
        self.proj = make(*_scaled(block.attn.proj, block.gamma_1))
        fc1, (weight, bias) = block.mlp.fc1, _scaled(block.mlp.fc2, block.gamma_2)
        parts = math.ceil(weight.shape[1] / self.proj.most_inputs)  # all linears are of one kind
        biases = [bias, *[None] * (parts - 1)]
        self.fc1 = nn.ModuleList(map(make, fc1.weight.detach().chunk(parts), fc1.bias.detach().chunk(parts)))
        self.fc2 = nn.ModuleList(map(make, weight.chunk(parts, dim=1), biases))

    def forward(self, x: Tensor, bias: PositionBias | None = None, kept: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C), or only those that are kept to (B, K, C)."""
        x = self.proj.add(x, self.attn(self.norm1(x), bias))
        if kept is not None:
            x = x.take_along_dim(kept[..., None], dim=1)
        y = self.norm2(x)
        for fc1, fc2 in zip(self.fc1, self.fc2, strict=True):
            assert isinstance(fc1, InferenceLinear) and isinstance(fc2, InferenceLinear)
            x = fc2.add(x, fc1.gelu(y))
        return x


def _scaled(linear: nn.Linear, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear whose outputs are scaled by gamma; halves are multiplied as float32."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if gamma is None:
        return weight, bias
    gamma = gamma.to(torch.promote_types(gamma.dtype, torch.float32))
    return weight * gamma[:, None], bias * gamma


def _fold_norms(model: nn.Module) -> None:
    """Put the batch norms of segmentation models into the convolutions before them."""
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.conv, module.bn = _folded(module.conv, module.bn)
        elif isinstance(module, Neck):
            module.fpn1[0], module.fpn1[1] = _folded(module.fpn1[0], module.fpn1[1])


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a convolution with its norm in it and nothing behind; as they are, if anything else is done there."""
    watched = kernels.is_hooked(conv) or kernels.is_hooked(norm)
    if watched or type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or norm.running_mean is None:
        return conv, norm
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    if isinstance(conv, nn.Conv2d) and type(conv) is nn.Conv2d:
        return fuse_conv_bn_eval(conv, norm), nn.Identity()
    if isinstance(conv, nn.ConvTranspose2d) and type(conv) is nn.ConvTranspose2d:
        return fuse_conv_bn_eval(conv, norm, transpose=True), nn.Identity()
    return conv, norm


def _check_unchanged(model: Beit) -> None:
    """Refuse blocks in which something was replaced, hooked or quantised that the copy would leave out."""
    if isinstance(model, InferenceBeit):
        raise InvalidValueError("Got a model that optimize() made; give it the model that one was made from.")
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if not _is_ours(name, module):
            raise InvalidValueError(
                f"Got {name!r}, a {type(module).__name__}, that is not of the plain network: replaced, hooked, pruned "
                "or quantised. An inference copy would run without that. Merge adapters, remove hooks, and optimize "
                "the model as it was before it was quantised."
            )


def _is_ours(name: str, module: nn.Module) -> bool:
    plain = all(
        type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.is_floating_point()
        for parameter in module.parameters(recurse=False)
    )
    exact = type(module) in _KNOWN and (type(module) is not nn.Linear or _has_our_bias(name, module))
    exact = exact and getattr(module, "approximate", "none") == "none"  # of GELU
    return exact and plain and not kernels.is_hooked(module)


def _has_our_bias(name: str, linear: nn.Linear) -> bool:
    """Say whether a linear has a bias just where the plain network has one: not in queries, keys and values."""
    return (linear.bias is None) == name.endswith("attn.qkv")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"A model made by optimize() cannot {what}: it is an inference snapshot. Use the model it was made from "
        "(optimize(model) without inplace=True leaves it as it was), and make a new snapshot."
    )
