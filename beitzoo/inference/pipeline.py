"""One way from inputs to outcomes: decode ahead, batch, run the models, keep the order, list what failed.

It knows nothing of classes: what is done with a batch of images is a function, `Job.run`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from beitzoo.errors import OutOfMemoryError, check, is_out_of_memory
from beitzoo.images.files import ImageError, as_image
from beitzoo.images.transforms import Transform, create_transform, prepare

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Failure:
    """Why an input has no outcome."""

    reason: str


@dataclass(frozen=True)
class View:
    """How a model wants to see images; jobs of the same view share what was prepared.

    Attributes:
        in_chans: 1 for grey, 3 for RGB.
        data: The options of `create_transform`.
    """

    in_chans: int
    data: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Job(Generic[Outcome]):
    """What one model does with every image.

    Attributes:
        view: How images are prepared for it.
        device: Where batches are sent.
        dtype: What they are converted to.
        run: From a batch of images (B, C, H, W) to an outcome, or a failure, for each.
    """

    view: View
    device: torch.device
    dtype: torch.dtype
    run: Callable[[Tensor], Sequence[Outcome | Failure]]


@dataclass(frozen=True)
class Loading:
    """How images are loaded.

    Attributes:
        batch_size: Images per forward pass; fewer where they do not fit into memory.
        workers: Threads that decode the next batch while the models compute.
    """

    batch_size: int = 16
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers"):
            number = getattr(self, name)
            check(number >= 1, f"{name} is {number}; it can be 1 or more. Leave it out for the default.")


def run_jobs(
    inputs: Iterable[Item],
    jobs: Sequence[Job[Outcome]],
    loading: Loading,
    image_of: Callable[[Item], Any] = lambda item: item,
) -> Iterator[tuple[Item, list[Outcome | Failure]]]:
    """Yield each input with the outcome of each job, in the order of both.

    All jobs see an image at the same time, so that it is decoded once. Two batches are in memory at most. A batch that
    does not fit beside the models is halved, and so are all after it.

    Args:
        inputs: Read as needed: the first outcomes come before the second batch is asked for, and from then on inputs
            are read one batch ahead.
        jobs: What is done with each image.
        loading: How images are loaded.
        image_of: The image of an input: whatever `as_image` takes.

    Raises:
        OutOfMemoryError: A single image does not fit beside the models.
    """
    runners = [_Runner(job, loading.batch_size) for job in jobs]
    for batch in _batches(inputs, {job.view for job in jobs}, loading, image_of):
        prepared = [look for _, look in batch]
        columns = [runner.outcomes(prepared) for runner in runners]
        for (item, _), outcomes in zip(batch, zip(*columns, strict=True), strict=True):
            yield item, list(outcomes)


# One image as all views see it, or why it cannot be seen.
_Look = Mapping[View, Tensor] | Failure


class _Runner(Generic[Outcome]):
    """A job in progress, and how many images fit into memory at a time."""

    def __init__(self, job: Job[Outcome], batch_size: int) -> None:
        self.job = job
        self.most = batch_size

    def outcomes(self, looks: Sequence[_Look]) -> list[Outcome | Failure]:
        seen = [look[self.job.view] for look in looks if not isinstance(look, Failure)]
        outcomes = self._run_all(seen)
        return [look if isinstance(look, Failure) else next(outcomes) for look in looks]

    def _run_all(self, images: list[Tensor]) -> Iterator[Outcome | Failure]:
        """Run all images, in halves where the whole does not fit into memory."""
        start = 0
        while start < len(images):
            batch = torch.stack(images[start : start + self.most])
            try:
                outcomes = self._run(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise OutOfMemoryError(
                        f"Not even one image of {tuple(batch.shape[1:])} fits into memory beside the model; take a "
                        "smaller model or another device."
                    ) from error
                self.most = len(batch) // 2
                _logger.warning("%d images do not fit into memory; going on with %d.", len(batch), self.most)
                continue
            start += len(batch)
            yield from outcomes

    @torch.inference_mode()
    def _run(self, batch: Tensor) -> Sequence[Outcome | Failure]:
        return self.job.run(batch.to(device=self.job.device, dtype=self.job.dtype))


def _batches(
    inputs: Iterable[Item], views: Iterable[View], loading: Loading, image_of: Callable[[Item], Any]
) -> Iterator[list[tuple[Item, _Look]]]:
    """Open and prepare images batch by batch, in order; while one is worked on, the next is prepared."""
    transforms = {view: create_transform(**dict(view.data)) for view in views}
    rest = iter(inputs)
    pool = ThreadPoolExecutor(loading.workers)

    def started() -> list[tuple[Item, Future[_Look]]]:
        batch = islice(rest, loading.batch_size)
        return [(item, pool.submit(_look, image_of(item), transforms)) for item in batch]

    try:
        # Inputs may come slowly, from a pipe: what is complete must not wait for them.
        if batch := started():
            yield [(item, look.result()) for item, look in batch]
        batch = started()
        while batch:
            following = started()
            yield [(item, look.result()) for item, look in batch]
            batch = following
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _look(image: Any, transforms: Mapping[View, Transform]) -> _Look:
    try:
        images = {channels: as_image(image, channels) for channels in {view.in_chans for view in transforms}}
        return {view: prepare(images[view.in_chans], transform) for view, transform in transforms.items()}
    except ImageError as error:
        return Failure(str(error))
