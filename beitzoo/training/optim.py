"""Which parameter learns how fast, and when."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from beitzoo.models.beit import Attention, Beit, DropPath
from beitzoo.training.sections import TrainSection

_TABLE = "relative_position_bias_table"
# Layers as timm's `Beit.group_matcher` has them: what is named by neither pattern is of the last one, and a norm before
# the pooling is of the layer before it.
_TIMM_LAYERS: dict[str, Any] = {
    "stem": r"^(?:backbone\.)?(?:cls_token|pos_embed|patch_embed|rel_pos_bias)",
    "blocks": [(r"^(?:backbone\.)?blocks\.(\d+)", None), (r"^(?:backbone\.)?norm", (99999,))],
}
_BEHIND_STEM = ("blocks", "norm", "fc_norm", "head")
# The share of the regular rate that the warm-up of `poly` begins with, in the original's configurations.
_WARMUP_RATIO = 1e-6


def make_optimizer(groups: list[dict[str, Any]], train: TrainSection) -> torch.optim.AdamW:
    """Build AdamW on parameter groups."""
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)


def parameter_groups(model: nn.Module, train: TrainSection) -> list[dict[str, Any]]:
    """Group parameters by layer-wise learning rate and weight decay; bias tables get groups of their own.

    `lr_scale` of a group is what the schedule multiplies its learning rate by: `layer_decay` to the power of
    the layers above it, and for bias tables `bias_lr_scale` in addition. Vectors and what the model names are not
    decayed. Frozen parameters are in no group, and change no other's layer.
    """
    matcher = _TIMM_LAYERS if train.layer_rule == "timm" else model.group_matcher()  # type: ignore[operator]
    return _groups(model, train, group_parameters(model, matcher, reverse=True))


def groups_without_layers(model: nn.Module, train: TrainSection) -> list[dict[str, Any]]:
    """Group parameters as `parameter_groups`, but all layers alike, as the originals do in pretraining."""
    return _groups(model, train, {name: 0 for name, _ in model.named_parameters()})


def _groups(model: nn.Module, train: TrainSection, layers: dict[str, int]) -> list[dict[str, Any]]:
    last = max(layers.values())
    kept = model.no_weight_decay()  # type: ignore[operator]
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_table = name.endswith(_TABLE)
            decayed = parameter.ndim > 1 and (name not in kept or (is_table and train.decay_bias_tables))
            groups.setdefault((layers[name], decayed, is_table), []).append(parameter)
    return [
        {
            "params": members,
            "weight_decay": train.weight_decay if decayed else 0.0,
            "lr_scale": train.layer_decay ** (last - layer) * (train.bias_lr_scale if is_table else 1.0),
        }
        for (layer, decayed, is_table), members in groups.items()
    ]


def freeze_up_to(model: Beit, blocks: int) -> None:
    """Freeze what comes before the first block, and the first `blocks` of them; nothing is dropped in these any more.

    A bias table that all blocks share is frozen too, since it is part of them.
    """
    for name, parameter in model.named_parameters():
        part, place, *_ = [*name.split("."), ""]
        if part not in _BEHIND_STEM or (part == "blocks" and int(place) < blocks):
            parameter.requires_grad_(False)
    for module in chain(model.pos_drop.modules(), *(block.modules() for block in model.blocks[:blocks])):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.rate = 0.0
        elif isinstance(module, Attention):
            module.attn_drop = 0.0


def freeze_unused(model: nn.Module) -> None:
    """Ask for no gradients of parameters that a model says no output depends on; they are as they were, undecayed.

    Several processes would wait for these gradients in vain, or have to search for them in each update.
    """
    name_unused: Callable[[], set[str]] = getattr(model, "unused_parameters", set)
    unused = name_unused()
    for name, parameter in model.named_parameters():
        if name in unused:
            parameter.requires_grad_(False)


def spread_bias_tables(model: nn.Module, std: float) -> None:
    """Start the relative position bias tables from normal noise."""
    for name, parameter in model.named_parameters():
        if name.endswith(_TABLE):
            nn.init.normal_(parameter, std=std)


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay as pure functions of the update (the first is 0), as the originals have them.

    `cosine` is `cosine_scheduler` of `utils.py` in BEiT and BEiT v2: the first update of the warm-up has a rate of 0,
    its last one the peak, and so has the one after it.

    `poly` is that of their segmentation, mmcv's `PolyLrUpdaterHook` with a power of 1 and `warmup='linear'`: a line
    from the peak at the first update to the end just after the last one. The warm-up is a factor on that line, so the
    peak itself is never reached.

    Attributes:
        train: Peak and end, and how long the warm-up takes.
        updates_per_epoch: Updates in one pass over the training images.
    """

    train: TrainSection
    updates_per_epoch: int

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.train.count_updates(self.updates_per_epoch)

    @property
    def warmup(self) -> int:
        """Updates of the warm-up."""
        return self.train.warmup_updates or round(self.train.warmup_epochs * self.updates_per_epoch)

    def lr(self, update: int) -> float:
        """Rise linearly, then fall along a cosine or a line to `min_lr`."""
        train, warmup = self.train, self.warmup
        if train.schedule == "poly":
            rate = train.min_lr + (train.lr - train.min_lr) * (1 - update / self.updates)
            return rate * (1 - (1 - update / warmup) * (1 - _WARMUP_RATIO)) if update < warmup else rate
        if update < warmup:
            return train.lr * update / max(warmup - 1, 1)
        return _cosine(train.lr, train.min_lr, (update - warmup) / (self.updates - warmup))

    def weight_decay(self, update: int) -> float:
        """Go along a cosine to `weight_decay_end`, without a warm-up; constant if there is none."""
        train = self.train
        if train.weight_decay_end is None:
            return train.weight_decay
        return _cosine(train.weight_decay, train.weight_decay_end, update / self.updates)

    def set(self, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Prepare an optimizer for an update; groups that are not decayed stay so."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(update) * group.get("lr_scale", 1.0)
            if group["weight_decay"] and self.train.weight_decay_end is not None:
                group["weight_decay"] = self.weight_decay(update)


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))
