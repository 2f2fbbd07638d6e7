"""Linears in the form in which a processor wants to read them; what `optimize` puts into its twins."""

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.models.linear import token_linear

MOST_LAYOUTS = 16  # of a convolution's weight

_ONE_BY_ONE = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation and groups

Prepare = Callable[[Tensor, Tensor | None], "PreparedLinear"]


def prepare_for(like: Tensor, dtype: torch.dtype | Literal["int8"] | None) -> Prepare:
    """Choose the kind of linear for a dtype and the device and width of `like`, and say so if they cannot be had."""
    on_cpu = like.device.type == "cpu"
    if dtype == "int8":
        if not (on_cpu and "onednn" in torch.backends.quantized.supported_engines):
            raise ValueError(
                f"Got dtype='int8' on {like.device} here; it needs a CPU and a PyTorch with oneDNN. "
                "Move the model to the CPU first, or use torch.bfloat16."
            )
        return lambda weight, bias: Int8Linear(weight.float(), None if bias is None else bias.float())
    wanted = like.dtype if dtype is None else dtype
    if wanted not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"Got dtype={dtype!r}; use torch.bfloat16, float16, float32, float64, 'int8', or None.")
    assert isinstance(wanted, torch.dtype)
    kind = _fastest(wanted, like.shape[-1]) if on_cpu else PreparedLinear
    if on_cpu and wanted in (torch.bfloat16, torch.float16) and not _has_bfloat16():
        warnings.warn(f"This CPU has no arithmetic in {wanted}; torch.float32 is faster on it.", stacklevel=3)
    return lambda weight, bias: kind(weight.to(wanted), None if bias is None else bias.to(wanted))


class PreparedLinear(nn.Module):
    """A linear, and what a block does behind it."""

    most_inputs: ClassVar[int] = sys.maxsize  # more of them are better mapped in parts, and the outputs added up

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        return token_linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU."""
        return F.gelu(self(x))

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """Apply the linear and add a residual."""
        return residual + self(x)


class OneDnnLinear(PreparedLinear):
    """A linear of oneDNN's. Compiled models call it from outside their graph: inside it cannot be had."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the kinds below out of graphs before there is one: done at import it would import the compiler."""
        _keep_out_of_graphs()
        return super().__new__(cls)


class PackedLinear(OneDnnLinear):
    """A linear whose weight lies in oneDNN's blocks; GELU and addition happen while its output is in the cache.

    The operators are those that torch.compile uses for frozen weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "gelu", [], "none")

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """Apply the linear and add a residual."""
        x, residual = x.to(self.weight.dtype), residual.to(self.weight.dtype)  # autocast does not know this operator
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "weight": torch.ops.mkldnn._reorder_linear_weight(state["weight"])})


class ConvolutionLinear(OneDnnLinear):
    """A float32 linear as a 1x1 convolution, for which oneDNN has better kernels where registers are of 256 bits.

    The weight lies in blocks that suit one shape of input and one number of threads. For others it is laid out anew,
    which takes about as long as a forward pass; oneDNN itself would do so in every call, and much slower. Where they
    keep changing, this ends after `MOST_LAYOUTS`: from then on it is a plain linear.
    """

    most_inputs = 2048

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.layout = Layout(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        x = x.float()  # autocast does not know these operators
        weight = self._weight_for(x)
        if not weight.is_mkldnn:
            return self._plain(x, weight)
        convolve = torch.ops.mkldnn._convolution_pointwise
        return _as_tokens(convolve(_as_image(x), weight, self.bias, *_ONE_BY_ONE, "none", [], ""))

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU; oneDNN's own, behind the product, is slower."""
        return torch.ops.aten.gelu_(self(x))

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """Apply the linear and add a residual."""
        x, residual = x.float(), residual.float()
        weight = self._weight_for(x)
        if not weight.is_mkldnn:
            return residual + self._plain(x, weight)
        convolve = torch.ops.mkldnn._convolution_pointwise.binary
        operands = _as_image(x), _as_image(residual), weight, self.bias
        return _as_tokens(convolve(*operands, *_ONE_BY_ONE, "add", None, None, [], None))

    def _weight_for(self, x: Tensor) -> Tensor:
        conditions = (*x.shape, torch.get_num_threads())
        layout = self.layout
        if layout.conditions != conditions and layout.count <= MOST_LAYOUTS:
            layout = self.layout = layout.anew(conditions)
        return layout.weight

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # as above
            return token_linear(x, weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        weight = self.layout.dense().clone()  # of a part of a weight, pickle would write the whole
        return {**self.__dict__, "layout": Layout(weight)}


@dataclass(frozen=True, eq=False)
class Layout:
    """A weight, dense or laid out for inputs under some conditions. It never changes, as threads may share a twin."""

    weight: Tensor
    conditions: tuple[int, ...] = ()  # batch, tokens, inputs and threads
    count: int = 0  # of layouts so far

    def dense(self) -> Tensor:
        """Return the weight as (outputs, inputs)."""
        return self.weight.to_dense().flatten(1) if self.weight.is_mkldnn else self.weight

    @torch.inference_mode(False)
    @torch.no_grad()
    def anew(self, conditions: tuple[int, ...]) -> "Layout":
        """Lay the weight out for other conditions, or leave it dense for good if that was done too often."""
        weight, count = self.dense(), self.count + 1
        if count <= MOST_LAYOUTS:
            batch, tokens, inputs, _ = conditions
            image = [batch, inputs, 1, tokens]
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], *_ONE_BY_ONE, image)
        return Layout(weight, conditions, count)


class Int8Linear(OneDnnLinear):
    """A linear that multiplies 8-bit integers: weights scaled per output channel, activations per token.

    A scale per token, found as it comes, makes the output for an image independent of its batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        super().__init__(torch.ops.onednn.qlinear_prepack(rounded.contiguous(), None), bias)
        self.scale = scale
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        levels = _levels()
        tokens = x.flatten(0, -2).float()
        scale = tokens.abs().amax(1, keepdim=True).clamp_min(1e-12) / levels
        rounded = (tokens / scale).round_().add_(levels + 1).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1.0,
            levels + 1,
            self.weight,
            self.scale,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        ).mul_(scale)
        y = y if self.bias is None else y.add_(self.bias)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(
            {**state, "weight": torch.ops.onednn.qlinear_prepack(state["weight"].t().contiguous(), None)}
        )


@functools.cache
def _keep_out_of_graphs() -> None:
    reason = "optimize() prepared this linear for oneDNN; compile the model itself instead."
    for kind in (PackedLinear, ConvolutionLinear, Int8Linear):
        for name in {"forward", "gelu", "add"} & vars(kind).keys():
            setattr(kind, name, torch.compiler.disable(getattr(kind, name), reason=reason))


def _as_image(x: Tensor) -> Tensor:
    """See tokens (B, N, C) as images (B, C, 1, N) with their channels side by side."""
    return x.transpose(1, 2).unsqueeze(2)


def _as_tokens(x: Tensor) -> Tensor:
    return x.squeeze(2).transpose(1, 2)


def _fastest(dtype: torch.dtype, width: int) -> type[PreparedLinear]:
    """Choose the kind of linear that is the fastest on this CPU for a network of this width.

    Measured on two AMD cores: with 512-bit registers packed linears ran 1.3 times as fast as plain ones for one image.
    With 256-bit ones they lost a tenth, and convolutions won 1.04 to 1.16 times over plain linears with their parts
    for small (384 wide), base and large; tiny and nano (192 and 64 wide) were slower.
    """
    if torch.cpu._is_avx512_supported():
        packs = dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16())
        packs = packs and _has_operators("_reorder_linear_weight", "_linear_pointwise")
        return PackedLinear if packs else PreparedLinear
    convolves = torch.cpu._is_avx2_supported() and dtype == torch.float32 and width >= 384
    convolves = convolves and _has_operators("_reorder_convolution_weight", "_convolution_pointwise")
    return ConvolutionLinear if convolves else PreparedLinear


def _has_operators(*names: str) -> bool:
    """Say whether this PyTorch has operators of oneDNN that it does not promise to keep."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _levels() -> int:
    """Say how far activations are rounded, to each side of zero.

    Without VNNI, products of 8 bits are added in pairs in 16 bits, which overflow if the activations use all 8.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63
