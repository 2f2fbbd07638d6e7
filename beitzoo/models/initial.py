"""Initial weights, as the originals draw them: for fine-tuning or training from scratch, and for pretraining."""

import math
from collections.abc import Callable

from torch import Tensor, nn

STD = 0.02

_ZERO = {"q_bias", "v_bias", "relative_position_bias_table"}
_SCALES = {"gamma_1", "gamma_2"}


def normal(parameter: Tensor) -> None:
    """Draw from a normal distribution of std 0.02, cut at 2 (`modeling_finetune.py`)."""
    nn.init.trunc_normal_(parameter, std=STD)


def cut_normal(parameter: Tensor) -> None:
    """Draw from a normal distribution of std 0.02, cut at one std (`modeling_pretrain.py`)."""
    nn.init.trunc_normal_(parameter, std=STD, a=-STD, b=STD)


def reset(network: nn.Module, init_values: float, draw: Callable[[Tensor], None]) -> None:
    """Set norms, linears, attention biases, bias tables and layer scales.

    Args:
        network: A BEiT, or a part of one.
        init_values: Of the layer scales.
        draw: Fills the weight of a linear; biases are 0.
    """
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in _ZERO:
            nn.init.zeros_(parameter)
        elif kind in _SCALES:
            nn.init.constant_(parameter, init_values)


def rescale(blocks: nn.ModuleList, first: int = 1) -> None:
    """Divide the last linear of each branch by sqrt(2 * layer), so that the residual does not grow with depth.

    BEiT, section 2.5.

    Args:
        blocks: Blocks, one after the other.
        first: Number of the first one's layer.
    """
    for name, parameter in blocks.named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            parameter.div_(math.sqrt(2 * (first + int(name.partition(".")[0]))))
