"""How a classifier looks at images when it is measured: which part, at which sizes, mirrored too; and their mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.images.transforms import resolve_data_config
from beitzoo.inference.classify import classification, probabilities_of, tells_several
from beitzoo.inference.pipeline import Job
from beitzoo.models.beit import Beit
from beitzoo.models.windows import backbone_of_any_size

Crop = Literal["timm", "unilm"]


@dataclass(frozen=True)
class Looks:
    """What a classifier sees of an image. With several looks, the mean of their probabilities is its answer.

    Attributes:
        crop: `timm`: as the checkpoint's transform says, by `crop_pct` of its row. `unilm`: as the authors measured
            (`beit/datasets.py`): the shorter side is resized to 256/224 of the input below 384 pixels and to the input
            from 384 on, bicubic, and the middle is cut out; inputs of up to 32 pixels see the whole shorter side.
        sizes: Sides of the input in pixels; the model's own if there are none. Positions are fitted to others.
        flip: See the mirrored image too.
    """

    crop: Crop = "timm"
    sizes: tuple[int, ...] = ()
    flip: bool = False

    def __post_init__(self) -> None:
        check(self.crop in get_args(Crop), f"crop is {self.crop!r}; it can be {' or '.join(get_args(Crop))}.")
        check(
            all(size >= 1 for size in self.sizes) and len(set(self.sizes)) == len(self.sizes),
            f"sizes are {self.sizes}; they can be different numbers of pixels, such as 224,256.",
        )

    def data_configs(self, model: Beit) -> list[dict[str, Any]]:
        """Return the options of the transform of each size, as `resolve_data_config` returns them.

        Raises:
            InvalidValueError: A size cannot be cut into patches.
        """
        own = resolve_data_config(model)
        patch = model.config.patch_size
        for size in self.sizes:
            check(
                size % patch[0] == 0 and size % patch[1] == 0,
                f"Images of {size} pixels cannot be cut into patches of {patch[0]} x {patch[1]}; give multiples.",
            )
        inputs = [(own["input_size"][0], size, size) for size in self.sizes] or [own["input_size"]]
        configs = [{**own, "input_size": size} for size in inputs]
        if self.crop == "timm":
            return configs
        return [{**config, **_unilm_crop(max(config["input_size"][1:]))} for config in configs]

    def jobs(self, model: Beit, name: str) -> list[Job[Tensor]]:
        """Make a job for each size: from an image to its logits, (looks, outputs), float32 on the CPU."""
        able = backbone_of_any_size(model) if self.sizes else model

        def forward(images: Tensor) -> Tensor:
            views = (images, images.flip(-1)) if self.flip else (images,)
            return torch.stack([able(view) for view in views], 1)

        return [classification(able, list, name, data=config, forward=forward) for config in self.data_configs(model)]


def _unilm_crop(size: int) -> dict[str, Any]:
    crop_pct = 224 / 256 if 32 < size < 384 else 1.0
    return {"crop_pct": crop_pct, "crop_mode": "center", "interpolation": "bicubic"}


def answer(model: Beit, looks: Sequence[Tensor], competing: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits and probabilities (outputs,) of an image from what each job says of it, (looks, all outputs).

    Of several looks the probabilities are averaged, and the logits are what gives that.

    Args:
        model: Says what turns logits into probabilities.
        looks: The outcomes of `Looks.jobs`.
        competing: The outputs that compete; None if all do.
    """
    logits = torch.cat(list(looks))
    if competing is not None:
        logits = logits[:, competing]
    probabilities = probabilities_of(model, logits).mean(0)
    if len(logits) == 1:
        return logits[0], probabilities
    # Not from the probabilities: of very sure answers they are 0 or 1, which would all be equal.
    if tells_several(model):
        return F.logsigmoid(logits).logsumexp(0) - F.logsigmoid(-logits).logsumexp(0), probabilities
    return F.log_softmax(logits, 1).logsumexp(0) - math.log(len(logits)), probabilities
