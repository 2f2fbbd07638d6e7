"""Linears for few tokens on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# One image at 224 pixels has 197 tokens. MKL makes less of so few rows than of a batch of four narrower products, which
# need not be shared out between threads. On AMD cores with 256-bit registers those ran 1.1 to 1.3 times as fast for all
# linears of base and large at 50 to 200 rows with two threads, 1.03 to 1.07 times with one; at 394 rows, or for the
# narrower linears of tiny and small, nothing was gained or something lost.
PARTS = 4
MOST_TOKENS = 256
LEAST_WIDTH = 768  # of inputs and of outputs


class TokenLinear(nn.Linear):
    """`torch.nn.Linear`, sooner in inference on a CPU when tokens are few: the linears of the blocks.

    What looks for `nn.Linear` by exact type, as `torch.ao.quantization.quantize_dynamic` does, passes it by;
    `optimize(model, dtype="int8")` is the way to 8 bits here.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, inputs) to (B, N, outputs)."""
        return token_linear(x, self.weight, self.bias)


def token_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map (..., inputs) to (..., outputs), as `torch.nn.functional.linear` does."""
    if not _parts_pay(x, weight):
        return F.linear(x, weight, bias)
    tokens = x.flatten(0, -2).expand(PARTS, -1, -1)
    weights = weight.unflatten(0, (PARTS, -1)).transpose(1, 2)  # (parts, inputs, outputs / parts)
    y = torch.bmm(tokens, weights) if bias is None else torch.baddbmm(bias.view(PARTS, 1, -1), tokens, weights)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def _parts_pay(x: Tensor, weight: Tensor) -> bool:
    """Say whether this is float32 inference in eager mode on a CPU with MKL, with few tokens and wide layers."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if min(weight.shape) < LEAST_WIDTH or weight.shape[0] % PARTS != 0 or x.device.type != "cpu":
        return False
    return (
        _is_plain(weight)
        and x.dtype == weight.dtype == torch.float32
        and x.ndim > 1
        and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
        and torch.backends.mkl.is_available()
        and PARTS % torch.get_num_threads() == 0
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(weight: Tensor) -> bool:
    """Say whether a weight has no product of its own, as quantised and sparse ones have."""
    ordinary = type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided
    return ordinary and weight.device.type == "cpu" and weight.ndim == 2
