"""Batches of images, loaded ahead of their use by other processes; the same for everything that reads image sets."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from beitzoo.images.files import ImageError
from beitzoo.images.image_set import ImageSet

Batch = TypeVar("Batch")
BatchOut = TypeVar("BatchOut", covariant=True)
Loaded = TypeVar("Loaded")

# Images that could not be read: which (`ImageSet.identity`), and why.
Unreadable = list[tuple[str, str]]


class Sample(NamedTuple):
    """One look at an image; `epoch` is None where nothing is drawn."""

    epoch: int | None
    image: int


class Batches(Protocol[BatchOut]):
    """Makes batches of samples. It is sent to the processes that load, so it must pickle."""

    def __getitems__(self, samples: list[Sample]) -> BatchOut:
        """Return a batch of what can be read of these samples; what a sample becomes depends on nothing else."""


class _Parts:
    """What a loader asks for the samples of its batches, each time it is gone through."""

    def __init__(self, parts: Iterable[list[Sample]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self._parts)


def load_batches(dataset: Batches[Batch], parts: Iterable[list[Sample]], workers: int) -> Iterable[Batch]:
    """Load one batch after the other, in order, ahead of their use where there are workers.

    Args:
        dataset: Makes a batch of samples: a tensor, a named tuple, a list or a dict of such.
        parts: The samples of each batch. An iterator is read a few batches ahead of their use.
        workers: Processes that load; 0 loads in this one. Their number changes nothing.
    """
    as_it_is: Any = _as_it_is
    source: Any = dataset  # PyTorch's annotation knows lists of samples only
    return DataLoader(
        source,
        batch_sampler=_Parts(parts),
        collate_fn=as_it_is,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else starting to load would draw from the generator of stochastic depth
    )


def load_each(
    images: ImageSet, samples: Sequence[Sample], load: Callable[[Sample], Loaded]
) -> tuple[list[tuple[Sample, Loaded]], Unreadable]:
    """Load samples one by one; return those that could be, with what they became, and which images could not be read.

    Args:
        images: The set that the samples are of.
        samples: In the order of the result.
        load: Opens the image of a sample (`as_image`) and makes something of it.
    """
    loaded: list[tuple[Sample, Loaded]] = []
    unreadable: Unreadable = []
    for sample in samples:
        try:
            loaded.append((sample, load(sample)))
        except ImageError as error:
            unreadable.append((images.identity(sample.image)[0], str(error)))
    return loaded, unreadable


def ignore_signals(worker: int) -> None:
    """Leave stopping to the process that uses the images: a signal to the whole group must not end its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Batch) -> Batch:
    return batch
