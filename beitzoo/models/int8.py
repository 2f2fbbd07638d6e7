"""Linears for inference that multiply 8-bit integers.

Weights have one scale per output channel, activations one per token, found as it comes: the output for an image does
not depend on what else is in its batch. The product is oneDNN's, of unsigned activations and signed weights.
"""

from typing import Any

import torch
from torch import Tensor

from beitzoo.models import kernels
from beitzoo.models.inference_linear import InferenceLinear

WEIGHT_LEVELS = 127  # to each side of zero
SMALLEST = 1e-12  # of all largest values, so that nothing is divided by zero
GELU_LEAST = -0.17  # just below what GELU returns at the least, -0.16997


class Int8Linear(InferenceLinear):
    """A linear that rounds its weight to 8 bits once, and activations in each call.

    Args:
        weight: (outputs, inputs), float32.
        bias: (outputs,), float32.
        least: What no activation is below, where that is known and near zero, as it is behind GELU. Their rounding then
            uses no levels for what never comes: it is about twice as fine.
    """

    in_graphs = False

    def __init__(self, weight: Tensor, bias: Tensor | None, least: float | None = None) -> None:
        scale = weight.abs().amax(1).clamp_min(SMALLEST) / WEIGHT_LEVELS
        rounded = (weight / scale[:, None]).round()
        if least is not None:  # activations are rounded from there; what it adds to each output is put into the bias
            start = least * (rounded.double().sum(1) * scale).float()
            bias = start if bias is None else bias + start
        super().__init__(_pack(rounded.to(torch.int8)), bias)
        self.scale = scale
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        return self._scaled(x).to(x.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU."""
        return torch.ops.aten.gelu_(self._scaled(x)).to(x.dtype)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """Apply the linear and add a residual."""
        y, scale = self._product(x.float())
        torch.addcmul(residual.float(), y, scale, out=y)
        return (y if self.bias is None else y.add_(self.bias)).to(residual.dtype)

    def _scaled(self, x: Tensor) -> Tensor:
        y, scale = self._product(x.float())
        return y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale, out=y)

    def _product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (B, N, outputs) that are yet to be multiplied by a scale per token, (B, N, 1), and that."""
        rounded, scale, zero = self._rounded(x)
        weight = (self.weight, self.scale, self.zero_points)
        to_float32: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        y = torch.ops.onednn.qlinear_pointwise(rounded.flatten(0, -2), 1.0, zero, *weight, *to_float32)
        return y.unflatten(0, x.shape[:-1]), scale

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return x / scale + zero in unsigned 8 bits, a scale per token, and zero.

        By way of signed ones: PyTorch's own conversion to unsigned ones takes seven times as long. Each step is one
        that PyTorch does for many numbers at a time; `addcmul` does not where its first operand is to be expanded.
        """
        levels = activation_levels()
        if self.least is None:
            scale = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
            scale = scale.clamp_min_(SMALLEST).div_(levels)
            steps, zero = x * scale.reciprocal(), levels + 1
            return steps.round_().to(torch.int8).view(torch.uint8).add_(zero), scale, zero
        scale = x.amax(-1, keepdim=True).sub_(self.least).clamp_min_(SMALLEST).div_(2 * levels + 1)
        steps = (x * scale.reciprocal()).add_(-self.least / scale - 128)  # from -128 on, as signed ones have no more
        return steps.round_().to(torch.int8).view(torch.uint8).add_(128), scale, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": self.weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "weight": _pack(state["weight"].t())})


def activation_levels() -> int:
    """Say how far activations are rounded, to each side of zero.

    Without VNNI, products of 8 bits are added in pairs in 16 bits, which overflow if the activations use all 8.
    """
    return 127 if kernels.cpu_has("vnni") else 63


def _pack(rounded: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(rounded.contiguous(), None)
