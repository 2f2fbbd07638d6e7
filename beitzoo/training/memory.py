"""How much memory there is to train in, and how much a network takes of it."""

from pathlib import Path

import torch

from beitzoo.errors import OutOfMemoryError
from beitzoo.zoo.costs import parameters
from beitzoo.zoo.networks import BeitConfig


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where that cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def activation_bytes(config: BeitConfig, precision: str) -> int:
    """Estimate the bytes that training keeps of one image until its backward pass.

    Of each block s h (34 + 5 a s / h) in half precision, for s tokens, width h and a heads (Korthikanti et al. 2022,
    "Reducing Activation Recomputation in Large Transformer Models"); twice that in float32.
    """
    tokens, width = config.num_tokens, config.embed_dim
    block = tokens * (34 * width + 5 * config.num_heads * tokens)
    return config.depth * block * (2 if precision == "fp32" else 1)


def check_weights_fit(config: BeitConfig, device: torch.device) -> None:
    """Refuse a network whose bare weights are more than the free memory: a system may kill what asks for that.

    Raises:
        OutOfMemoryError: Says how much it takes, and how much there is.
    """
    free = free_memory(device)
    # In float32; and of each pair of tokens where it is in the bias tables.
    needed = 4 * parameters(config) + 8 * config.num_tokens**2
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"A network of {parameters(config) / 1e6:,.0f} million parameters for {config.num_tokens:,} tokens takes "
            f"{needed / 1e9:,.0f} GB or more, and {free / 1e9:.1f} GB are free. Choose a smaller model or image size."
        )
