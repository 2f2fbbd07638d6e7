"""Published accuracies of the checkpoints: reads `accuracies.csv`, which is installed with the package.

A cell that a source left open is None here and empty there. The evaluators differ: timm crops as the checkpoint's own
transform says; BEiT's authors keep 0.875 of an image below 384 pixels and all of it from there on
(`run_class_finetuning.py`). `beitzoo report` writes the same figures in timm's columns.
"""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beitzoo.zoo.checkpoints import Interpolation


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One checkpoint on one set of images.

    Attributes:
        model: `architecture.tag`.
        data: The set of images: a key of `DATA_SETS`.
        source: Who measured it, and where that is written.
        img_size: Width of the images, pixels.
        top1: Per cent of images whose likeliest class is the right one; None for a segmentation.
        top5: Per cent whose right class is among the five likeliest.
        crop_pct: Share of the resized image that was kept, per side.
        interpolation: Filter of the resize.
        rank_diff: Places won among all of timm's models against the set that `DATA_SETS` names for comparison.
        miou: Per cent, mean intersection over union of the classes.
        macc: Per cent, mean accuracy of the classes.
        aacc: Per cent of all pixels.
        protocol: How a segmentation was evaluated.
    """

    model: str
    data: str
    source: str
    img_size: int
    top1: float | None = None
    top5: float | None = None
    crop_pct: float | None = None
    interpolation: Interpolation | None = None
    rank_diff: int | None = None
    miou: float | None = None
    macc: float | None = None
    aacc: float | None = None
    protocol: str | None = None


# What each set is compared with in timm's tables, by its own name there; None is a set that others are compared with.
DATA_SETS: dict[str, str | None] = {
    "imagenet": None,
    "imagenet-real": "imagenet",
    "imagenetv2-matched-frequency": "imagenet",
    "sketch": "imagenet",
    "imagenet-a": "imagenet-a-clean",
    "imagenet-r": "imagenet-r-clean",
    "imagenet-a-clean": None,
    "imagenet-r-clean": None,
    "ade20k": None,
    "digits": None,
}

# Fields that are no text.
_NUMBERS = {"img_size": int, "rank_diff": int} | dict.fromkeys(
    ("top1", "top5", "crop_pct", "miou", "macc", "aacc"), float
)


def published(model: str = "", data: str = "") -> list[Accuracy]:
    """List what is published, of one checkpoint and on one set or of all; timm's figures come first."""
    return [row for row in _rows() if model in ("", row.model) and data in ("", row.data)]


def headline(model: str) -> Accuracy | None:
    """Return the one figure to show beside a checkpoint's name: on the set it was made for, timm's if there is one."""
    return next((row for row in published(model) if row.data in ("imagenet", "ade20k", "digits")), None)


@functools.cache
def _rows() -> tuple[Accuracy, ...]:
    with Path(__file__).with_name("accuracies.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Accuracy(**{name: _value(name, text) for name, text in row.items()}) for row in csv.DictReader(file)
        )


def _value(name: str, text: str) -> Any:
    return _NUMBERS.get(name, str)(text) if text else None
