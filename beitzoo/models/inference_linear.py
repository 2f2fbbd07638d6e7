"""What every linear of an inference copy can do."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MakeLinear = Callable[[Tensor, Tensor | None], "InferenceLinear"]


class InferenceLinear(nn.Module):
    """A linear, and what a block does behind it."""

    in_graphs: ClassVar[bool] = True  # whether PyTorch can compile, export and trace it
    returns: torch.dtype | None = None  # the dtype of its outputs, where that is not its inputs'

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the linear and an exact GELU."""
        return F.gelu(self(x))

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """Apply the linear and add a residual."""
        return residual + self(x)
