"""`optimize`: a copy of a model for inference, with the same outputs and faster.

What a forward pass would compute again every time is put into the weights beforehand, and linears are packed the way
the processor wants to read them. The copy is still a `Beit`, with its blocks replaced; how it runs is said there.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from beitzoo.errors import InvalidValueError, UnsupportedError
from beitzoo.models import choosing, kernels
from beitzoo.models.at_once import at_once
from beitzoo.models.beit import Attention, Beit, Block, DropPath, Mlp
from beitzoo.models.choices import Choices, ImagesLike, dtype_name
from beitzoo.models.inference_block import InferenceBlock, Parts
from beitzoo.models.inference_linear import InferenceLinear
from beitzoo.models.kernels import PositionBias
from beitzoo.models.segmentation import ConvNorm, Neck
from beitzoo.zoo.networks import Pair

Module = TypeVar("Module", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")

# Of biases kept ready, for all blocks together: those of a base network at 384 pixels are 192 MB in float32, and passes
# that need not write them are 1.1 times as fast. Beyond it (large networks at 512 pixels take 1.6 GB) they are written
# into the workspace of each forward pass as in any other network.
READY_BYTES = 192 << 20

_KNOWN = {nn.ModuleList, Block, Attention, Mlp, DropPath, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout}


@torch.inference_mode(False)
@torch.no_grad()
def optimize(
    model: Module,
    dtype: torch.dtype | Literal["int8"] | None = None,
    inplace: bool = False,
    *,
    images_like: ImagesLike | None = None,
    choices: Choices | dict[str, Any] | None = None,
) -> Module:
    """Return an inference copy of a model: the same outputs, faster.

    What its blocks are made of is chosen by measuring on this machine, with the threads that PyTorch has now. On two
    cores that took a second for a base network and one image, 3 for 8 images, 4 for 32, and 4 for a large network at
    512 pixels. `choices` of the copy (of its `backbone`, where a model holds one) says what was taken and how much
    faster that was. Other batches and sizes than were measured give the same outputs, but something else might be
    faster for them: name the batch that will be used.

    A batch is computed in parts at the same time, by threads that have a share of PyTorch's each, where that was
    faster; as a whole while gradients or autocast are on, blocks are hooked, or `torch.get_num_threads()` is another.

    The copy is a snapshot: it can be run, copied and pickled, but neither trained, moved nor saved as weights, and
    what later becomes of the model does not reach it. Compile or export the model itself: on a CPU, `torch.compile`
    leaves a copy as it is. Where convolutions were taken, weights are packed in the first pass of each shape of input,
    which is slower; where shapes keep changing, that ends, and with it most of what is gained.

    Where the system gives huge pages to those who ask for them (`madvise`), `THP_MEM_ALLOC_ENABLE=1` in the environment
    before PyTorch is imported makes passes up to a tenth faster; the commands set it themselves.

    Args:
        model: A `Beit`, or what holds one (`BeitFeatures`, a `Segmenter`), on the device where it shall run, without
            adapters or hooks inside its blocks.
        dtype: Of weights and outputs; the model's own if None. Outputs follow to rounding. `"int8"` is for CPUs
            and changes outputs: by 1.0 to 1.5 % of the largest logit for base and large models of random weights, with
            VNNI or without. Of trained weights, those of `beit_nano_patch4_32.digits` alone were tried: 1.1 % with a
            scale per token and 2.6 % with one per image, and 1 of 1,797 answers changed. Linears of the blocks then
            compute in 8 bits, scaled per token or per image, whichever is faster, and per output channel; attention may
            be computed in bfloat16, the rest stays as it is.
        inplace: Turn the model itself into its inference copy, and free its weights block by block.
        images_like: Batch, channels, height and width of the images that it will get; one image of its size if None.
        choices: Those of another copy (or `choices.to_dict()`), to be repeated without measuring.

    Raises:
        ValueError: There is nothing to optimize, the blocks were changed (adapters, hooks, quantised or pruned
            weights), the dtype cannot be had, or the choices are of another network or dtype.
    """
    backbones = _backbones(model)
    if not backbones:
        raise InvalidValueError(f"Got a {type(model).__name__} without a Beit in it; there is nothing to optimize.")
    for backbone in backbones:
        _check_unchanged(backbone)
    taken = [_choices_for(backbone, dtype, images_like, choices) for backbone in backbones]
    result = model if inplace else copy.deepcopy(model)
    result.eval().requires_grad_(False)
    for backbone, chosen in zip(_backbones(result), taken, strict=True):
        _replace_blocks(backbone, choosing.parts_of(chosen, backbone, _dtype_for(backbone, dtype)))
    _fold_norms(result)
    if isinstance(dtype, torch.dtype):
        result.to(dtype)
    for backbone, chosen in zip(_backbones(result), taken, strict=True):
        backbone.__class__ = InferenceBeit  # not a new object: whoever holds a model optimized in place holds its copy
        assert isinstance(backbone, InferenceBeit)
        backbone.choices = chosen
        backbone.ready_biases()
    return result


def _replace_blocks(backbone: Beit, parts: Parts) -> None:
    """Put an inference block in the place of each block, one after the other, so that its weights are free again."""
    backbone.set_grad_checkpointing(False)
    for index, block in enumerate(backbone.blocks):
        assert isinstance(block, Block)
        backbone.blocks[index] = InferenceBlock(block, parts)


def _backbones(model: nn.Module) -> list[Beit]:
    return [module for module in model.modules() if isinstance(module, Beit)]


def _dtype_for(backbone: Beit, dtype: torch.dtype | Literal["int8"] | None) -> torch.dtype | Literal["int8"]:
    return backbone.cls_token.dtype if dtype is None else dtype


def _choices_for(
    backbone: Beit,
    dtype: torch.dtype | Literal["int8"] | None,
    images_like: ImagesLike | None,
    choices: Choices | dict[str, Any] | None,
) -> Choices:
    """Measure, or check what was given."""
    dtype = _dtype_for(backbone, dtype)
    if choices is None:
        return choosing.choose(backbone, dtype, images_like)
    if images_like is not None:
        raise InvalidValueError("Got images_like and choices; give the one to measure, or the other not to.")
    found = choices if isinstance(choices, Choices) else Choices.from_dict(choices)
    found.check_fits(backbone.config, dtype_name(dtype))
    return found


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
    """A `Beit` made by `optimize`: for inference only, as it was at that moment.

    Attributes:
        choices: What its blocks are made of, and how much faster each part is than a plain one.
    """

    choices: Choices

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

    def run_blocks(self, x: Tensor, bias: PositionBias, blocks: Sequence[int]) -> list[Tensor]:
        """Map a batch, see `Beit.run_blocks`, in as many parts at the same time as were chosen, or fewer if they fit.

        As a whole where the threads are not those that this was measured with, and where somebody would see the parts.
        """
        parts = math.gcd(int(self.choices.batch_parts.taken), len(x)) if self._can_be_cut(x) else 1
        if parts == 1:
            return super().run_blocks(x, bias, blocks)
        run = super().run_blocks
        calls = [functools.partial(run, part, bias.beside(), blocks) for part in x.chunk(parts)]
        outputs = at_once(calls, self.choices.threads // parts)
        return [torch.cat(of_a_block) for of_a_block in zip(*outputs, strict=True)]

    def _can_be_cut(self, x: Tensor) -> bool:
        return (
            self.choices.batch_parts.taken != "1"
            and len(x) > 0
            and torch.get_num_threads() == self.choices.threads
            and kernels.is_plain_inference(x)
            and not torch.is_autocast_enabled("cpu")
            and not kernels.is_any_hooked(self.blocks)
        )

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

    def _blocks(self) -> list[InferenceBlock]:
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
