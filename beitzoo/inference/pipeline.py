"""One way from inputs to outcomes: decode ahead, batch, run the models, keep the order, list what failed.

It knows nothing of classes: what is done with a batch of images is a function, `Job.run`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from beitzoo.errors import InvalidOptionError, OutOfMemoryError, check, is_out_of_memory
from beitzoo.images.files import ImageError, as_image
from beitzoo.images.transforms import Transform, create_transform, prepare

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why an input has no outcome."""

    reason: str


class AnyView(Protocol):
    """How a model wants to see images, as a key: jobs of equal views share what was prepared."""

    @property
    def in_chans(self) -> int:
        """1 for grey, 3 for RGB."""

    def transform(self) -> Callable[[Image], Any]:
        """Make what prepares an image."""


@dataclass(frozen=True)
class View:
    """Images as `create_transform` prepares them, all of one size.

    Attributes:
        in_chans: 1 for grey, 3 for RGB.
        data: The options of `create_transform`.
    """

    in_chans: int
    data: tuple[tuple[str, Any], ...]

    def transform(self) -> Transform:
        """Make the transform."""
        return create_transform(**dict(self.data))


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
class PartsJob(Generic[Outcome]):
    """What one model does with every image where images are of any size: one at a time, and each in parts.

    Attributes:
        view: How images are prepared for it.
        run: From a prepared image, and how many of its parts may be in a forward pass, to its outcome or a failure.
        count: How many parts a prepared image has.
        most: Parts in a forward pass; fewer where they do not fit into memory.
        part: What a part is.
        advice: What to do where not even one fits.
    """

    view: AnyView
    run: Callable[[Any, int], Outcome | Failure]
    count: Callable[[Any], int]
    most: int
    part: str
    advice: str


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


def one_or_many(images: Any) -> Iterable[Any]:
    """Return images as they are, or a list of the one that was given alone; of an array of several, each.

    Raises:
        InvalidOptionError: They are neither one nor many.
    """
    if isinstance(images, str | bytes | Path | Image) or getattr(images, "ndim", None) in (0, 2, 3):
        return [images]
    if not isinstance(images, Iterable):
        raise InvalidOptionError(
            f"Got a {type(images).__name__}; images are a list of paths, PIL images, arrays or tensors, or one of "
            "these."
        )
    return images


def run_jobs(
    inputs: Iterable[Item],
    jobs: Sequence[Job[Outcome] | PartsJob[Outcome]],
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
    runners = [_PartsRunner(job) if isinstance(job, PartsJob) else _Runner(job, loading.batch_size) for job in jobs]
    for batch in _batches(inputs, {job.view for job in jobs}, loading, image_of):
        columns = [
            _with_failures([look if isinstance(look, Failure) else look[job.view] for _, look in batch], runner.run)
            for job, runner in zip(jobs, runners, strict=True)
        ]
        for (item, _), outcomes in zip(batch, zip(*columns, strict=True), strict=True):
            yield item, list(outcomes)


# One image as all views see it, or why it cannot be seen.
_Look = Mapping[AnyView, Any] | Failure


def _with_failures(
    looks: Sequence[Any], run: Callable[[list[Any]], Iterator[Outcome | Failure]]
) -> list[Outcome | Failure]:
    outcomes = run([look for look in looks if not isinstance(look, Failure)])
    return [look if isinstance(look, Failure) else next(outcomes) for look in looks]


class _Runner(Generic[Outcome]):
    """A job in progress, and how many images fit into memory at a time."""

    def __init__(self, job: Job[Outcome], batch_size: int) -> None:
        self.job = job
        self.fitting = Fitting("image", batch_size, "take a smaller model or another device")

    def run(self, images: list[Tensor]) -> Iterator[Outcome | Failure]:
        """Run all images, in halves where the whole does not fit into memory."""
        start = 0
        while start < len(images):
            rest = images[start:]
            outcomes = self.fitting.run(partial(self._run, rest), len(rest), f" of {tuple(rest[0].shape)}")
            start += len(outcomes)
            yield from outcomes

    @torch.inference_mode()
    def _run(self, images: list[Tensor], count: int) -> Sequence[Outcome | Failure]:
        batch = torch.stack(images[:count])
        return self.job.run(batch.to(device=self.job.device, dtype=self.job.dtype))


class _PartsRunner(Generic[Outcome]):
    """A job in progress that takes images in parts, and how many of these fit into memory at a time."""

    def __init__(self, job: PartsJob[Outcome]) -> None:
        self.job = job
        self.fitting = Fitting(job.part, job.most, job.advice)

    def run(self, images: list[Any]) -> Iterator[Outcome | Failure]:
        """Run all images, one after the other."""
        for image in images:
            yield self.fitting.run(partial(self._run, image), self.job.count(image))

    @torch.inference_mode()
    def _run(self, image: Any, most: int) -> Outcome | Failure:
        return self.job.run(image, most)


class Fitting:
    """How many parts of the work fit into memory at a time.

    Args:
        part: What a part is.
        most: Parts to begin with; halved whenever they do not fit.
        advice: What to do where not even one fits.
    """

    def __init__(self, part: str, most: int, advice: str) -> None:
        self.part = part
        self.most = most
        self.advice = advice

    def run(self, work: Callable[[int], Result], count: int, shape: str = "") -> Result:
        """Return what the work gives for the largest number of parts, up to `count`, that fits.

        Args:
            work: From a number of parts to a result.
            count: Parts that there are.
            shape: Of a part, for the error.

        Raises:
            OutOfMemoryError: Not even one fits.
        """
        while True:
            number = min(self.most, count)
            try:
                return work(number)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if number == 1:
                    raise OutOfMemoryError(
                        f"Not even one {self.part}{shape} fits into memory beside the model; {self.advice}."
                    ) from error
                self.most = number // 2
                _logger.warning("%d %ss do not fit into memory; going on with %d.", number, self.part, self.most)


def _batches(
    inputs: Iterable[Item], views: Iterable[AnyView], loading: Loading, image_of: Callable[[Item], Any]
) -> Iterator[list[tuple[Item, _Look]]]:
    """Open and prepare images batch by batch, in order; while one is worked on, the next is prepared."""
    transforms = {view: view.transform() for view in views}
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


def _look(image: Any, transforms: Mapping[AnyView, Callable[[Image], Any]]) -> _Look:
    try:
        images = {channels: as_image(image, channels) for channels in {view.in_chans for view in transforms}}
        return {view: prepare(images[view.in_chans], transform) for view, transform in transforms.items()}
    except ImageError as error:
        return Failure(str(error))
