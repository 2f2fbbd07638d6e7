"""From images and a tokenizer to a folder of views with visual tokens, which pretraining reads instead of computing."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from beitzoo.errors import check
from beitzoo.factory import Tokenizer
from beitzoo.images.augment import TwoViews, View
from beitzoo.images.files import as_image
from beitzoo.images.image_set import ImageSet
from beitzoo.images.loading import Sample, Unreadable, load_batches, load_each
from beitzoo.images.masks import sample_generator
from beitzoo.images.token_views import (
    TokenRequest,
    TokenViews,
    TokenWriter,
    UnreadableImage,
    ViewSettings,
    digest_of,
    to_record,
)
from beitzoo.progress import watch

# Views of a file: about 4 MB at 14 x 14 patches. What was computed since the last one is lost when a command stops.
_VIEWS_OF_FILE = 8192


@dataclass(frozen=True, kw_only=True)
class TokenJob:
    """What is tokenized.

    Attributes:
        tokenizer: Gives the ids, on any device, in float32.
        name: Of the tokenizer.
        images: The data set.
        samples: Numbers of the images in it that get tokens.
        views: How their views are drawn; only the tokenizer's is made.
        seed: Of the views.
        count: Views of each image.
        chunk: Images of a file; None for as many as make a few megabytes.
    """

    tokenizer: Tokenizer
    name: str
    images: ImageSet
    samples: Sequence[int]
    views: TwoViews
    seed: int
    count: int
    chunk: int | None = None

    def request(self) -> TokenRequest:
        """Describe the tokens for the folder that receives them."""
        return TokenRequest(
            tokenizer=self.name,
            weights=weights_checksum(self.tokenizer),
            vocab_size=self.tokenizer.vocab_size,
            grid=self.tokenizer.grid_size,
            settings=ViewSettings.of(self.views),
            seed=self.seed,
            views=self.count,
            images=len(self.samples),
            identities=digest_of(self.images, sorted(self.samples)),
            chunk=self.chunk or max(1, _VIEWS_OF_FILE // self.count),
        )


def tokenize(job: TokenJob, folder: str | Path, batch_size: int = 64, workers: int = 0) -> TokenViews:
    """Compute the visual tokens of seeded views of images, and write them; what the folder has already is kept.

    Args:
        job: What is tokenized.
        folder: Receives the files that `TokenViews` reads.
        batch_size: Views of a forward pass.
        workers: Processes that open images; 0 opens them in this one.

    Raises:
        InvalidValueError: There are no images, or the folder holds other tokens.
    """
    check(
        len(job.samples) > 0 and job.count >= 1, "There is nothing to tokenize; give at least one image and one view."
    )
    writer = TokenWriter(folder, job.request(), sorted(job.samples))
    missing = list(writer.missing())
    samples = [sample for _, part in missing for sample in part]
    tokenized = watch(_tokenized(job, samples, batch_size, workers), "image", len(samples))
    for name, part in missing:
        records = np.zeros((len(part), job.count), dtype=writer.request.record_type)
        unreadable = []
        for row, one in enumerate(itertools.islice(tokenized, len(part))):
            if isinstance(one, UnreadableImage):
                unreadable.append(one)
            else:
                records[row] = one
        writer.write(name, records, unreadable)
    return TokenViews.open(folder)


def weights_checksum(network: nn.Module) -> str:
    """Return the sha256 of all parameters and buffers of a network with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Look(NamedTuple):
    """Views of one image, K of them, as the tokenizer sees them: (K, C, H, W)."""

    views: list[View]
    pixels: Tensor


class _Looks(NamedTuple):
    """The readable ones of some samples, and why the others are not."""

    looks: dict[int, _Look]
    unreadable: Unreadable


class _LoadedLooks:
    """The images of a job in their views, some images at a time."""

    def __init__(self, job: TokenJob) -> None:
        self.images, self.views = job.images, job.views
        self.seed, self.count, self.channels = job.seed, job.count, job.tokenizer.in_chans

    def __getitems__(self, samples: list[Sample]) -> _Looks:
        loaded, unreadable = load_each(self.images, samples, self._load)
        return _Looks({sample.image: look for sample, look in loaded}, unreadable)

    def _load(self, sample: Sample) -> _Look:
        image = as_image(self.images.images[sample.image], self.channels)
        generators = [sample_generator(self.seed, number, sample.image) for number in range(self.count)]
        views = [self.views.draw(image.width, image.height, generator) for generator in generators]
        return _Look(views, torch.stack([self.views.apply_token(image, view) for view in views]))


@torch.inference_mode()
def _tokenized(
    job: TokenJob, samples: Sequence[int], batch_size: int, workers: int
) -> Iterator[list[Any] | UnreadableImage]:
    """Yield the records of each sample, in order, or why it has none."""
    size = max(1, batch_size // job.count)
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    loaded = load_batches(_LoadedLooks(job), [[Sample(None, sample) for sample in part] for part in parts], workers)
    for part, (looks, unreadable) in zip(parts, loaded, strict=True):
        ids = iter(_encoded(job.tokenizer, [look.pixels for look in looks.values()], batch_size))
        failures = iter(unreadable)
        for sample in part:
            if sample in looks:
                yield [to_record(view, one) for view, one in zip(looks[sample].views, next(ids), strict=True)]
            else:
                name, reason = next(failures)
                yield UnreadableImage(sample=sample, name=name, reason=reason)


def _encoded(tokenizer: Tokenizer, pixels: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Return the ids (K, h, w) of each of some stacks of views (K, C, H, W)."""
    if not pixels:
        return []
    device = next(itertools.chain(tokenizer.parameters(), tokenizer.buffers())).device
    batches = torch.cat(list(pixels)).split(batch_size)
    ids = torch.cat([tokenizer.encode(batch.to(device, non_blocking=True)).cpu() for batch in batches])
    return list(ids.split([len(one) for one in pixels]))
