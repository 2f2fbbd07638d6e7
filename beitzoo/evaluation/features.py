"""Frozen features: what each block of a network says of an image, pooled, for probes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from beitzoo.errors import check
from beitzoo.images.image_set import ImageSet
from beitzoo.images.transforms import resolve_data_config
from beitzoo.inference.classify import NOT_FINITE, eval_mode
from beitzoo.inference.pipeline import Failure, Job, Loading, View, run_jobs
from beitzoo.models.beit import Beit
from beitzoo.models.inputs import take_indices

Array = np.ndarray[Any, np.dtype[Any]]
# How the tokens of a block become one feature: the mean of its patch tokens, or its class token.
Pooling = Literal["mean", "class"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class Features:
    """Pooled features of some images, as they leave each block: raw, without the network's last norm.

    The linear probe of BEiT reads them so too (`run_linear_eval.py`).

    Attributes:
        indices: Which images of the set, in order; those that could not be read are not among them.
        blocks: The blocks, counted from 0, in order.
        values: For each pooling float32 (blocks, images, C).
        failures: Images without features, with the reason.
    """

    indices: list[int]
    blocks: list[int]
    values: dict[Pooling, Array]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def of(self, block: int, pooling: Pooling) -> Array:
        """Return the features (images, C) that leave one block."""
        return self.values[pooling][self.blocks.index(block)]


def extract_features(
    model: Beit,
    images: ImageSet,
    indices: Sequence[int],
    blocks: Sequence[int] | None = None,
    loading: Loading | None = None,
) -> Features:
    """Compute the features of some images of a set, without gradient, dropout or stochastic depth.

    All are kept in memory: 8 bytes for each image, block and channel. No random number is drawn, and the model's
    training mode is as before when this returns.

    Args:
        model: Any network; of a masked image model its `backbone`. It sees images by its own transform, unmasked.
        images: The set.
        indices: Which of its images.
        blocks: Blocks whose output is kept, counted from 0, negative from the end; all if None.
        loading: Batch size and threads.

    Raises:
        InvalidValueError: There is no such block, or the model takes images that are not in files.
    """
    chosen = sorted(set(take_indices(blocks, len(model.blocks))))
    found: list[int] = []
    failures: list[tuple[str, str]] = []
    rows = np.empty((len(POOLINGS), len(chosen), len(indices), model.num_features), dtype=np.float32)
    with eval_mode([model]):
        job = _pooling(model, chosen)
        for index, (outcome,) in run_jobs(indices, [job], loading or Loading(), lambda index: images.images[index]):
            if isinstance(outcome, Failure):
                failures.append((images.identity(index)[0], outcome.reason))
            else:
                rows[:, :, len(found)] = outcome.numpy()
                found.append(index)
    values = {pooling: rows[place, :, : len(found)] for place, pooling in enumerate(POOLINGS)}
    return Features(found, chosen, values, failures)


def _pooling(model: Beit, blocks: list[int]) -> Job[Tensor]:
    """Make the job that maps an image to its features (poolings, blocks, C)."""
    channels = model.config.in_chans
    check(
        channels in (1, 3), f"This model takes {channels} channels; image files have 1 (grey) or 3 (RGB). Take another."
    )

    def run(images: Tensor) -> list[Tensor | Failure]:
        pairs = model.forward_intermediates(
            images, blocks, True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        pooled = [torch.stack([patches.float().mean(1), prefix[:, 0].float()], 1) for patches, prefix in pairs]
        features = torch.stack(pooled, 2).cpu()
        finite = features.isfinite().flatten(1).all(1).tolist()
        return [one if fine else Failure(NOT_FINITE) for one, fine in zip(features, finite, strict=True)]

    like = model.cls_token
    return Job(View(channels, tuple(resolve_data_config(model).items())), like.device, like.dtype, run)
