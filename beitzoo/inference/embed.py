"""From images to features: of every image the feature that a network makes of it, or one named failure, in order."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from beitzoo.errors import InvalidOptionError, check
from beitzoo.images.transforms import resolve_data_config
from beitzoo.inference.classify import NOT_FINITE, eval_mode
from beitzoo.inference.fastest import count_ahead, for_many_images
from beitzoo.inference.pipeline import Failure, Job, Loading, View, one_or_many, run_jobs
from beitzoo.models.beit import Beit
from beitzoo.models.inputs import take_indices

Array = np.ndarray[Any, np.dtype[Any]]

# How tokens become the feature of an image.
Pooling = Literal["pooled", "mean", "class", "both", "patches"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

# Images that a warning names.
_MOST_NAMED = 3


@dataclass(frozen=True)
class Reading:
    """What is read off a network as the features of an image.

    Attributes:
        pooling: `pooled`: what the network's head reads, `forward_head(pre_logits=True)`: the mean of the patch tokens
            or the class token, with the trained norm. `mean`: of the patch tokens. `class`: the class token. `both`:
            class token and mean side by side, 2 C numbers, as the linear probe of BEiT reads them. `patches`: all patch
            tokens, row by row.
        blocks: None for the output of the network, `forward_features`: normed, unless the network norms after pooling.
            Else these blocks, counted from 0, negative from the end: raw, as tokens leave them, before any norm. Their
            `pooled` is the mean or the class token, whichever the network pools by.
    """

    pooling: Pooling = "pooled"
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check(
            self.pooling in POOLINGS,
            f"pooling={self.pooling!r}; it can be {', '.join(POOLINGS)}. Leave it out for what the head reads.",
        )

    def numbers(self, model: Beit) -> tuple[int, ...] | None:
        """Return the blocks of a network counted from 0, in order, each once; None for its output.

        Raises:
            InvalidValueError: There is no such block.
        """
        if self.blocks is None:
            return None
        return tuple(sorted(set(take_indices(list(self.blocks), len(model.blocks)))))

    def shape(self, model: Beit) -> tuple[int, ...]:
        """Return the shape of an image's features: ([blocks,] [h w,] C or 2 C)."""
        numbers = self.numbers(model)
        blocks = () if numbers is None else (len(numbers),)
        patches = (model.config.num_tokens - model.num_prefix_tokens,) if self.pooling == "patches" else ()
        return (*blocks, *patches, model.num_features * (2 if self.pooling == "both" else 1))

    def describe(self, model: Beit) -> str:
        """Say in words what the features of a network are."""
        kind = _pooled_by(model) if self.pooling == "pooled" else self.pooling
        words = {
            "mean": "mean of the patch tokens",
            "class": "class token",
            "both": "class token and mean of the patch tokens side by side",
            "patches": "all patch tokens",
        }[kind]
        numbers = self.numbers(model)
        if numbers is not None:
            return f"{words} of block{'s'[: len(numbers) > 1]} {', '.join(map(str, numbers))}, before any norm"
        normed = not isinstance(model.norm, nn.Identity)
        if self.pooling == "pooled":
            normed |= not isinstance(model.fc_norm, nn.Identity)
        return f"{words}, {'with the trained norm' if normed else 'without a norm'}"


@dataclass(frozen=True)
class Embedding:
    """What a network made of one image: its features, or the reason why there are none.

    Attributes:
        path: The image; None if it was given as pixels.
        features: Float32, of the shape `Reading.shape`; None where there are none.
        error: Why there are none, or None.
    """

    path: Path | None
    features: Array | None = None
    error: str | None = None


def embed(
    model: nn.Module,
    images: Any,
    *,
    pooling: Pooling = "pooled",
    blocks: Sequence[int] | None = None,
    batch_size: int = 16,
    workers: int = 2,
    optimize: bool = True,
) -> Array:
    """Return the features of images as an array, a row for each in their order.

    A row of an image that cannot be read is NaN, and a warning names such images. `embed_each` gives rows one by one
    with their reasons.

    Args:
        model: A `Beit` with or without a head, or what holds one: a `MaskedImageModel` (it sees images unmasked), a
            `Segmenter`. Its training mode is as before when this returns.
        images: As `predict` takes them: paths, PIL images, arrays or tensors of uint8, or one of these. They are
            prepared as the model expects, and must not be normalised.
        pooling: What a feature is: `pooled` (what the head reads), `mean`, `class`, `both` or `patches`; see `Reading`.
        blocks: Read these blocks instead of the network's output, negative from the end.
        batch_size: Images per forward pass.
        workers: Threads that decode images.
        optimize: On a CPU, let an inference copy compute more than a handful of images, as `for_many_images` chooses;
            the model stays as it is.

    Returns:
        Float32 (images, C). `both` has 2 C, `patches` (images, h w, C); with `blocks` there is an axis for them behind
        the images.

    Raises:
        InvalidValueError: There is no such block or pooling, or the model takes images that are not in files.
        InvalidOptionError: There is no `Beit` in the model, or an image is none of what is taken.
    """
    backbone, reading, loading = backbone_of(model), Reading(pooling, blocks), Loading(batch_size, workers)
    images = one_or_many(images)
    if optimize:
        count, images = count_ahead(images)
        backbone = for_many_images(backbone, count, batch_size)
    rows = list(embed_each(backbone, images, reading, loading=loading))
    features = np.full((len(rows), *reading.shape(backbone)), np.nan, dtype=np.float32)
    failed = []
    for place, row in enumerate(rows):
        if row.features is None:
            failed.append(f"{place if row.path is None else row.path}: {row.error}")
        else:
            features[place] = row.features
    if failed:
        more = f"; {len(failed) - _MOST_NAMED:,} more" * (len(failed) > _MOST_NAMED)
        named = "; ".join(failed[:_MOST_NAMED])
        warnings.warn(f"{len(failed):,} of {len(rows):,} rows are NaN: {named}{more}", stacklevel=2)
    return features


def embed_each(
    model: nn.Module, images: Iterable[Any], reading: Reading | None = None, *, loading: Loading | None = None
) -> Iterator[Embedding]:
    """Embed images one batch after the other, as `embed`, of any number of images in constant memory.

    Args:
        model: A network, or what holds one.
        images: Read as needed.
        reading: What is read off the network.
        loading: Batch size and threads.
    """
    backbone = backbone_of(model)
    job = embedding(backbone, reading or Reading())
    return _embeddings(backbone, job, images, loading or Loading())


def _embeddings(model: Beit, job: Job[Array], images: Iterable[Any], loading: Loading) -> Iterator[Embedding]:
    with eval_mode([model]):
        for image, (outcome,) in run_jobs(images, [job], loading):
            path = Path(image) if isinstance(image, str | Path) else None
            if isinstance(outcome, Failure):
                yield Embedding(path, None, outcome.reason)
            else:
                yield Embedding(path, outcome)


def embedding(model: Beit, reading: Reading) -> Job[Array]:
    """Make the job that maps an image to its features; an image whose features are not finite is a failure.

    Args:
        model: The network, in evaluation mode while the job runs.
        reading: What is read off it.

    Raises:
        InvalidValueError: There is no such block, or the model takes images that are not in files.
    """
    channels, numbers = model.config.in_chans, reading.numbers(model)
    check(
        channels in (1, 3), f"This model takes {channels} channels; image files have 1 (grey) or 3 (RGB). Take another."
    )

    def run(images: Tensor) -> list[Array | Failure]:
        features = _features(model, images, reading.pooling, numbers).float().cpu()
        finite = features.isfinite().flatten(1).all(1).tolist()
        return [one if fine else Failure(NOT_FINITE) for one, fine in zip(features.numpy(), finite, strict=True)]

    like = model.cls_token
    return Job(View(channels, tuple(resolve_data_config(model).items())), like.device, like.dtype, run)


def backbone_of(model: nn.Module) -> Beit:
    """Return the network of a model: itself, or what a masked image model or a segmentation model holds.

    Raises:
        InvalidOptionError: It has none that makes tokens of whole images.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Beit):
        raise InvalidOptionError(
            f"Got a {type(model).__name__}; features are those of a Beit, a MaskedImageModel or a Segmenter. Make one "
            "with create_model(name)."
        )
    return backbone


def _features(model: Beit, images: Tensor, pooling: Pooling, numbers: tuple[int, ...] | None) -> Tensor:
    """Map images (B, in_chans, height, width) to features (B, [blocks,] [h w,] C or 2 C)."""
    prefix = model.num_prefix_tokens
    if numbers is not None:
        pairs = model.forward_intermediates(
            images, numbers, True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        kind = _pooled_by(model) if pooling == "pooled" else pooling
        return torch.stack([_pool(prefix_tokens, patches, kind) for patches, prefix_tokens in pairs], 1)
    tokens = model.forward_features(images)
    if pooling == "pooled" and model.global_pool:
        return model.forward_head(tokens, pre_logits=True)
    kind = "mean" if pooling == "pooled" else pooling
    return _pool(tokens[:, :prefix], tokens[:, prefix:], kind)


def _pool(prefix_tokens: Tensor, patches: Tensor, pooling: Pooling) -> Tensor:
    """Make one feature of the class token (B, 1, C) and the patch tokens (B, h w, C) of some images."""
    if pooling == "patches":
        return patches
    token, mean = prefix_tokens[:, 0].float(), patches.float().mean(1)
    return {"mean": mean, "class": token, "both": torch.cat([token, mean], 1)}[pooling]


def _pooled_by(model: Beit) -> Pooling:
    """Return how a network pools; one that pools nothing, such as that of a segmentation model, by the mean."""
    return "class" if model.global_pool == "token" else "mean"
