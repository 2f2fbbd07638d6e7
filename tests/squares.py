"""A data set of coloured squares with masks, which a tiny segmentation model learns in seconds."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beitzoo.training.recipe import Recipe

CLASSES = ("ground", "green square", "red square")
_SIZE = (56, 72)  # height, width
_UNLABELLED = 3
TRAIN, VAL, TEST = 12, 4, 4


def write_squares(root: Path, broken: bool = False) -> Path:
    """Write images with masks in ADE20K's layout; if asked, the first one to train on is broken."""
    draw = random.Random(0)
    for part, count in (("training", TRAIN), ("validation", VAL), ("test", TEST)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            image, mask = _draw_squares(draw)
            Image.fromarray(image).save(root / "images" / part / f"{number}.png")
            Image.fromarray(mask).save(root / "annotations" / part / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    if broken:
        (root / "images" / "training" / "0.png").write_bytes(b"broken")
    return root


def _draw_squares(draw: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Draw a square of each colour on grey ground, one in each half, and a strip of no class."""
    image = np.full((*_SIZE, 3), draw.randrange(90, 160), dtype=np.uint8)
    mask = np.zeros(_SIZE, dtype=np.uint8)
    halves = draw.sample([0, 36], 2)
    for label, colour, start in zip((1, 2), ((40, 200, 40), (200, 40, 40)), halves, strict=True):
        side = draw.randrange(26, 34)
        top, left = draw.randrange(_SIZE[0] - side), start + draw.randrange(36 - side)
        image[top : top + side, left : left + side] = colour
        mask[top : top + side, left : left + side] = label
    mask[:4] = _UNLABELLED
    return image, mask


def squares_recipe(
    data: Path,
    *,
    model: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    **train: Any,
) -> Recipe:
    """A run on such a folder; keywords change its sections, those without a name its `train` section."""
    small = {"embed_dim": 32, "patch_size": 8, "img_size": 48, "auxiliary_channels": 16}
    return Recipe.model_validate(
        {
            "model": {"name": "test_beit", "overrides": small, **(model or {})},
            "data": {"source": "annotations", "path": data},
            "train": {"epochs": 2, "batch_size": 4, "lr": 3e-3, "schedule": "poly", "clip_grad": 1.0, **train},
            "run": {"log_updates": 1, "pictures": False, **(run or {})},
            "task": {
                "kind": "segment",
                "labels": {"ignore": [_UNLABELLED]},
                "augment": {"ratio": [1.0, 1.5], "max_share": 0.9},
                "inference": {"mode": "whole"},
                **(task or {}),
            },
        }
    )
