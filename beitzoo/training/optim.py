"""Which parameter learns how fast, and when; timm underneath."""

from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from beitzoo.training.sections import TrainSection

_TABLE = "relative_position_bias_table"


def make_optimizer(groups: list[dict[str, Any]], train: TrainSection) -> torch.optim.AdamW:
    """Build AdamW on parameter groups."""
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)


def parameter_groups(model: nn.Module, train: TrainSection) -> list[dict[str, Any]]:
    """Group parameters by layer-wise learning rate and weight decay; bias tables get groups of their own.

    `lr_scale` of a group is what the schedule multiplies its learning rate by: `layer_decay` to the power of
    the layers above it, and for bias tables `bias_lr_scale` in addition.
    """
    groups = param_groups_layer_decay(
        model,
        weight_decay=train.weight_decay,
        no_weight_decay_list=model.no_weight_decay(),  # type: ignore[operator]
        layer_decay=train.layer_decay,
    )
    tables = {id(p) for name, p in model.named_parameters() if name.endswith(_TABLE)}
    split = []
    for group in groups:
        for is_table, scale in ((False, 1.0), (True, train.bias_lr_scale)):
            members = [p for p in group["params"] if (id(p) in tables) == is_table]
            if members:
                split.append({**group, "params": members, "lr_scale": group["lr_scale"] * scale})
    return split


def spread_bias_tables(model: nn.Module, std: float) -> None:
    """Start the relative position bias tables from normal noise."""
    for name, parameter in model.named_parameters():
        if name.endswith(_TABLE):
            nn.init.normal_(parameter, std=std)


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainSection, updates_per_epoch: int) -> CosineLRScheduler:
    """Rise linearly from 0, then fall along a cosine to `min_lr`, counted in updates."""
    warmup = round(train.warmup_epochs * updates_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(train.epochs * updates_per_epoch - warmup, 2),  # of 1, timm says that it has no effect
        lr_min=train.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
