"""Linears for inference that multiply 8-bit integers.

Weights have one scale per output channel. Activations have one per token or one per image, found as they come: the
output for an image does not depend on what else is in its batch. The product is oneDNN's, of unsigned activations and
signed weights.
"""

import math
from typing import Any

import torch
from torch import Tensor

from beitzoo.models import kernels
from beitzoo.models.inference_linear import InferenceLinear

WEIGHT_LEVELS = 127  # to each side of zero
SMALLEST = 1e-12  # of all largest values, so that nothing is divided by zero
ROUNDED = 1.5 * 2.0**23  # between here and 2^24, float32 has the integers alone
GELU_LEAST = -0.17  # just below what GELU returns at the least, -0.16997


class _RoundedWeight(InferenceLinear):
    """A linear that rounded its weight to 8 bits once.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,), float32.
        least: What no activation is below, where they are rounded from there on; it is put into the bias.
        returns: The dtype of its outputs, where that is not its inputs'.
    """

    in_graphs = False

    def __init__(self, weight: Tensor, bias: Tensor | None, least: float | None, returns: torch.dtype | None) -> None:
        scale = weight.abs().amax(1).clamp_min(SMALLEST) / WEIGHT_LEVELS
        rounded = (weight / scale[:, None]).round()
        if least is not None:
            start = least * (rounded.double().sum(1) * scale).float()
            bias = start if bias is None else bias + start
        super().__init__(_pack(rounded.to(torch.int8)), bias)
        self.scale = scale
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self.returns = returns

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "weight": _pack(state["weight"].t())})


class Int8Linear(_RoundedWeight):
    """A linear whose activations are rounded to 8 bits with one scale per token.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,), float32.
        least: What no activation is below, where that is known and near zero, as it is behind GELU. Their rounding then
            uses no levels for what never comes: it is about twice as fine.
        returns: The dtype of its outputs, where that is not its inputs'.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        least: float | None = None,
        returns: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, bias, least, returns)
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        dtype = self.returns or x.dtype
        return self._scaled(x, dtype).to(dtype)

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU."""
        return torch.ops.aten.gelu_(self._scaled(x, torch.float32)).to(x.dtype)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """Apply the linear and add a residual."""
        y, scale = self._product(x.float(), torch.float32)
        torch.addcmul(residual.float(), y, scale, out=y)
        return (y if self.bias is None else y.add_(self.bias)).to(residual.dtype)

    def _scaled(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the linear maps to, in bfloat16 if that is asked for and in float32 if anything else is."""
        y, scale = self._product(x.float(), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        scale = scale.to(y.dtype)
        return y.mul_(scale) if self.bias is None else torch.addcmul(self.bias.to(y.dtype), y, scale, out=y)

    def _product(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return outputs (B, N, outputs) that are yet to be multiplied by a scale per token, (B, N, 1), and that."""
        rounded, scale, zero = self._rounded(x)
        weight = (self.weight, self.scale, self.zero_points)
        to_floats: tuple[Any, ...] = (None, 1.0, 0, dtype, "none", [], "")
        y = torch.ops.onednn.qlinear_pointwise(rounded.flatten(0, -2), 1.0, zero, *weight, *to_floats)
        return y.unflatten(0, x.shape[:-1]), scale

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return x / scale + zero in unsigned 8 bits, a scale per token, and zero.

        Image by image, in memory for one, so that the steps between stay in the cache.
        """
        levels = activation_levels()
        if self.least is None:
            scale = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
            scale, zero = scale.clamp_min_(SMALLEST).div_(levels), levels + 1
        else:
            scale = x.amax(-1, keepdim=True).sub_(self.least).clamp_min_(SMALLEST).div_(2 * levels + 1)
            zero = 0
        rounded, steps = torch.empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[1:])
        for image, steps_per_unit, to in zip(x, scale.reciprocal(), rounded, strict=True):
            above = image if self.least is None else torch.sub(image, self.least, out=steps)
            _round_to(to, torch.mul(above, steps_per_unit, out=steps), zero)
        return rounded, scale, zero


class Int8ImageLinear(_RoundedWeight):
    """A linear whose activations are rounded to 8 bits with one scale per image, and one image at a time.

    It takes fewer passes than with a scale per token: the product itself applies scale and bias, and GELU or addition
    while its outputs are in the cache. A token with very large activations costs the others of its image precision.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, returns: torch.dtype | None = None) -> None:
        super().__init__(weight, bias, None, returns)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        dtype = self.returns or x.dtype
        return self._map(x, "none", torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).to(dtype)

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU."""
        return self._map(x, "gelu", torch.float32).to(x.dtype)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """Apply the linear and add a residual."""
        behind: tuple[Any, ...] = (1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], "")
        images = [
            torch.ops.onednn.qlinear_pointwise.binary(*self._operands(image), other, self.bias, *behind)
            for image, other in zip(_images(x), _images(residual), strict=True)
        ]
        return _together(images, x, len(self.scale)).to(residual.dtype)

    def _map(self, x: Tensor, behind: str, dtype: torch.dtype) -> Tensor:
        post: tuple[Any, ...] = (self.bias, 1.0, 0, dtype, behind, [], "none")
        images = [torch.ops.onednn.qlinear_pointwise(*self._operands(image), *post) for image in _images(x)]
        return _together(images, x, len(self.scale))

    def _operands(self, x: Tensor) -> tuple[Any, ...]:
        """Return the activations of an image, (N, inputs), in unsigned 8 bits, their scale and zero, and the weight."""
        least, largest = (float(end) for end in x.aminmax())
        least, largest = min(least, 0.0), max(largest, 0.0)
        scale = max(largest - least, SMALLEST) / (2 * activation_levels() + 1)
        zero = round(-least / scale) if math.isfinite(least / scale) else 0  # what is not finite stays so by the scale
        rounded = torch.empty(x.shape, dtype=torch.uint8)
        return _round_to(rounded, x * (1 / scale), zero), scale, zero, self.weight, self.scale, self.zero_points


def _images(x: Tensor) -> tuple[Tensor, ...]:
    """Return each image of tokens, (N, C), in float32."""
    return x.float().unbind(0)


def _together(images: list[Tensor], x: Tensor, outputs: int) -> Tensor:
    """Return images (N, outputs) of tokens x as (B, N, outputs)."""
    if len(images) == 1:
        return images[0].unsqueeze(0)
    return torch.stack(images) if images else x.new_empty((*x.shape[:-1], outputs), dtype=torch.float32)


def _round_to(rounded: Tensor, steps: Tensor, zero: int) -> Tensor:
    """Write steps + zero, rounded, to unsigned 8 bits; the steps are overwritten.

    In two passes that PyTorch does for many numbers at a time: a sum as large as this has no bits for fractions, and
    its last byte is the integer. Its own conversion of floats to unsigned integers takes six times as long.
    """
    return rounded.copy_(steps.add_(ROUNDED + zero).view(torch.int32))


def activation_levels() -> int:
    """Say how far activations are rounded, to each side of zero.

    Without VNNI, products of 8 bits are added in pairs in 16 bits, which overflow if the activations use all 8.
    """
    return 127 if kernels.cpu_has("vnni") else 63


def _pack(rounded: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(rounded.contiguous(), None)
