"""Linears for inference, with their weights in the form in which a processor reads them fastest.

They know nothing of networks: `optimize` puts them into its inference copies. What they call is oneDNN's, through
operators that PyTorch uses itself but does not promise to keep; without them there are plain linears.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import InvalidValueError
from beitzoo.models.inference_linear import InferenceLinear, MakeLinear
from beitzoo.models.int8 import GELU_LEAST, Int8ImageLinear, Int8Linear

MOST_REPACKS = 16  # of a convolution's weight

_ONE_BY_ONE = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation and groups


def linears_for(
    like: Tensor,
    dtype: torch.dtype | Literal["int8"] | None,
    tokens: int | None = None,
    behind_gelu: bool = False,
    returns: torch.dtype | None = None,
) -> dict[str, MakeLinear]:
    """Return every kind of linear that can be had for a dtype and the device of `like`, by name, the plainest first.

    Args:
        like: A parameter of the network: its device, and its dtype if none is named.
        dtype: Of weights and outputs.
        tokens: Of one call, if they are known.
        behind_gelu: Whether the input is what GELU returns.
        returns: The dtype of the outputs of 8-bit linears, where that is not their inputs'.

    Raises:
        ValueError: There is none for this dtype.
    """
    on_cpu = like.device.type == "cpu"
    if dtype == "int8":
        if not (on_cpu and "onednn" in torch.backends.quantized.supported_engines):
            raise InvalidValueError(
                f"Got dtype='int8' on {like.device} here; it needs a CPU and a PyTorch with oneDNN. "
                "Move the model to the CPU first, or use torch.bfloat16."
            )
        by_token = functools.partial(Int8Linear, least=GELU_LEAST if behind_gelu else None, returns=returns)
        by_image = functools.partial(Int8ImageLinear, returns=returns)
        return {
            "int8": functools.partial(_make, by_token, torch.float32),
            "int8_image": functools.partial(_make, by_image, torch.float32),
        }
    wanted = like.dtype if dtype is None else dtype
    if wanted not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise InvalidValueError(f"Got dtype={dtype!r}; use torch.bfloat16, float16, float32, float64, 'int8', or None.")
    assert isinstance(wanted, torch.dtype)
    if on_cpu and wanted in (torch.bfloat16, torch.float16) and not has_bfloat16():
        warnings.warn(f"This CPU has no arithmetic in {wanted}; torch.float32 is faster on it.", stacklevel=3)
    kinds = _kinds(wanted, tokens) if on_cpu else {"plain": InferenceLinear}
    return {name: functools.partial(_make, kind, wanted) for name, kind in kinds.items()}


def _kinds(dtype: torch.dtype, tokens: int | None) -> dict[str, MakeLinear]:
    """Return the kinds of linear that a CPU and this PyTorch have for a dtype."""
    kinds: dict[str, MakeLinear] = {"plain": InferenceLinear}
    if dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16()):
        if _has_operators("_reorder_linear_weight", "_linear_pointwise"):
            kinds["packed"] = PackedLinear
            kinds["packed_gelu_behind"] = PackedGeluBehind
            if tokens is not None:
                kinds["packed_for_tokens"] = functools.partial(PackedLinear, tokens=tokens)
        if dtype == torch.float32 and _has_operators("_reorder_convolution_weight", "_convolution_pointwise"):
            kinds["convolution"] = ConvolutionLinear
    return kinds


def _make(kind: MakeLinear, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> InferenceLinear:
    return kind(weight.to(dtype), None if bias is None else bias.to(dtype))


class PackedLinear(InferenceLinear):
    """A linear with its weight in oneDNN's blocks; GELU and addition happen while its output is in the cache.

    The operators are those that torch.compile uses for frozen weights. A weight that was packed for a number of tokens
    maps other numbers of them too; oneDNN then repacks it in the call, where its kernels want that.
    """

    in_graphs = False

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: int | None = None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), tokens), bias)
        self.tokens = tokens

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
        weight = torch.ops.mkldnn._reorder_linear_weight(state["weight"], state["tokens"])
        super().__setstate__({**state, "weight": weight})


class PackedGeluBehind(PackedLinear):
    """The same with its GELU behind the product, for processors on which oneDNN's own is slower."""

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU."""
        return torch.ops.aten.gelu_(self(x))


class ConvolutionLinear(InferenceLinear):
    """A float32 linear as a 1x1 convolution, for which oneDNN has better kernels where registers are of 256 bits.

    The weight is packed for one shape of input and one number of threads. For others it is repacked, which takes
    about as long as a forward pass; oneDNN itself would do so in every call, and much slower. Where they keep
    changing, this ends after `MOST_REPACKS`: from then on it is a plain linear.
    """

    in_graphs = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.packing = Packing(weight)
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
        packing = self.packing = self.packing.fitted_to((*x.shape, torch.get_num_threads()))
        return packing.weight

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # as above
            return F.linear(x, weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        weight = self.packing.dense().clone()  # of a part of a weight, pickle would write the whole
        return {**self.__dict__, "packing": Packing(weight)}


@dataclass(frozen=True, eq=False)
class Packing:
    """A weight, dense or packed for inputs under some conditions. It never changes, as threads may share a copy."""

    weight: Tensor
    conditions: tuple[int, ...] = ()  # batch, tokens, inputs and threads
    count: int = 0  # of packings so far

    def dense(self) -> Tensor:
        """Return the weight as (outputs, inputs)."""
        return self.weight.to_dense().flatten(1) if self.weight.is_mkldnn else self.weight

    def fitted_to(self, conditions: tuple[int, ...]) -> "Packing":
        """Return itself, or where it was packed for others, a packing for these conditions."""
        if self.conditions == conditions or self.count > MOST_REPACKS:
            return self
        with torch.inference_mode(False), torch.no_grad():
            weight, count = self.dense(), self.count + 1
            if count <= MOST_REPACKS:  # else it stays dense for good
                batch, tokens, inputs, _ = conditions
                image = [batch, inputs, 1, tokens]
                weight = torch.ops.mkldnn._reorder_convolution_weight(weight[:, :, None, None], *_ONE_BY_ONE, image)
        return Packing(weight, conditions, count)


def _as_image(x: Tensor) -> Tensor:
    """See tokens (B, N, C) as images (B, C, 1, N) with their channels side by side."""
    return x.transpose(1, 2).unsqueeze(2)


def _as_tokens(x: Tensor) -> Tensor:
    return x.squeeze(2).transpose(1, 2)


def _has_operators(*names: str) -> bool:
    """Say whether this PyTorch has operators of oneDNN that it does not promise to keep."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def has_bfloat16() -> bool:
    """Say whether this CPU has arithmetic in bfloat16, and this PyTorch uses it."""
    return _has_operators("_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
