"""The README's table of models, from the zoo's own tables."""

import torch

from beitzoo.models.beit import Beit
from beitzoo.zoo import costs
from beitzoo.zoo.config import PretrainedConfig
from beitzoo.zoo.pretrained import PRETRAINED
from beitzoo.zoo.registry import find

_HEADS = {"mim": "visual tokens (backbone)", "segment": "150 of ADE20K (backbone)"}


def model_table() -> str:
    """Return a Markdown table with a row for each checkpoint."""
    lines = ["| model | input | parameters | GMACs | classes |", "| --- | --- | --- | --- | --- |"]
    lines += [_row(name, row) for name, row in PRETRAINED.items()]
    return "\n".join(lines)


def count_parameters(model: torch.nn.Module) -> int:
    """Count the numbers that training can change."""
    return sum(parameter.numel() for parameter in model.parameters())


def _row(name: str, row: PretrainedConfig) -> str:
    config = find(name).config
    with torch.device("meta"):
        parameters = count_parameters(Beit(config)) / 1e6
    classes = _HEADS.get(row.head, f"{row.num_classes:,}")
    size = "x".join(map(str, config.img_size))
    return f"| `{name}` | {size} | {parameters:.1f} M | {costs.macs(config) / 1e9:.2f} | {classes} |"
