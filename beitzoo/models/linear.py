"""Linears for few tokens on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# One image at 224 pixels has 197 tokens. So few rows MKL shares out badly between threads, while a batch of small
# products keeps every thread at its own: 1.1 to 1.3 times the speed at 50 to 200 rows for all linears of base and
# large on two cores with 256-bit registers, 1.03 to 1.07 on one; from 577 rows on nothing is sure to be gained.
PARTS = 4
MOST_TOKENS = 512
LEAST_WIDTH = 128  # of a part


class Linear(nn.Linear):
    """`torch.nn.Linear`; sooner in inference on a CPU when the tokens are few."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map (..., inputs) to (..., outputs), as `torch.nn.functional.linear` does."""
    if not _parts_pay(x, weight):
        return F.linear(x, weight, bias)
    tokens = x.flatten(0, -2).expand(PARTS, -1, -1)
    weights = weight.unflatten(0, (PARTS, -1)).transpose(1, 2)  # (parts, inputs, outputs / parts)
    y = torch.bmm(tokens, weights) if bias is None else torch.baddbmm(bias.view(PARTS, 1, -1), tokens, weights)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def _parts_pay(x: Tensor, weight: Tensor) -> bool:
    """Say whether this is float32 inference in eager mode on a CPU with MKL, with few tokens and a wide output.

    Weights of another class than a plain parameter, such as quantised ones, bring a product of their own.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    plain = type(weight) in (Tensor, nn.Parameter) and x.dtype == weight.dtype == torch.float32
    on_cpu = x.device.type == weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    shared = torch.backends.mkl.is_available() and PARTS % torch.get_num_threads() == 0
    few = 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
    wide = weight.shape[0] >= PARTS * LEAST_WIDTH and weight.shape[0] % PARTS == 0
    return plain and on_cpu and shared and few and wide
