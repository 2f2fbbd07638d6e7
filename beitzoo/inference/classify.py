"""Images in, labels out: from every model one answer or one named failure for each image, in order."""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beitzoo.images.files import ImageError, open_image
from beitzoo.images.transforms import Transform, create_transform, resolve_data_config
from beitzoo.models.beit import Beit

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One class of one image.

    Attributes:
        index: Output of the head.
        label: Its name, or its number as text where the checkpoint has no names.
        probability: Softmax of the logits, 0 to 1.
    """

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What one model made of one image: the likeliest classes, or the reason why there are none.

    Attributes:
        path: The image.
        answers: Likeliest first.
        error: Why there are none, or None.
        model: Name of the model, where there are several.
    """

    path: Path
    answers: tuple[Answer, ...] = ()
    error: str | None = None
    model: str | None = None


class Tally:
    """Passes predictions on and counts them.

    Attributes:
        rows: Predictions so far.
        failed: Those without an answer.
    """

    def __init__(self, predictions: Iterable[Prediction]) -> None:
        self.predictions = predictions
        self.rows = self.failed = 0

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self.predictions:
            self.rows += 1
            self.failed += prediction.error is not None
            yield prediction


def predict(
    models: Beit | Mapping[str, Beit],
    paths: Iterable[Path],
    *,
    topk: int = 3,
    batch_size: int = 16,
    workers: int = 2,
) -> Iterator[Prediction]:
    """Classify image files; for each path comes one prediction by each model, in the order of both.

    All models see an image at the same time, so that it is decoded once. However many paths there are, three batches
    are in memory at most. A batch that does not fit beside the models is halved.

    Args:
        models: A classifier, or several by name; they are put in eval mode.
        paths: Files; read as far as needed, so they may come from a pipe. The first row waits for three batches of
            them, or their end.
        topk: Classes per image, likeliest first; no more than there are.
        batch_size: Images per forward pass.
        workers: Threads that decode the next batches while a model computes.

    Raises:
        ValueError: At the call: there is no model, one has no head or takes images that are not in files, or a number
            is not positive.
        MemoryError: While the rows are computed: a single image does not fit beside the models.
    """
    for name, number in (("topk", topk), ("batch_size", batch_size), ("workers", workers)):
        if number < 1:
            raise ValueError(f"{name} is {number}; it can be 1 or more. Leave it out for the default.")
    named = {None: models} if isinstance(models, Beit) else models
    if not named:
        raise ValueError("There are no models; one or more can look at the images. Give a model, or some by name.")
    classifiers = [_Classifier(name, model, topk, batch_size) for name, model in named.items()]
    return _rows(classifiers, _batches(paths, [classifier.view for classifier in classifiers], batch_size, workers))


def _rows(classifiers: Sequence["_Classifier"], batches: Iterable[list[tuple[Path, "_Look"]]]) -> Iterator[Prediction]:
    for looks in batches:
        columns = [classifier.classify([images for _, images in looks]) for classifier in classifiers]
        for (path, _), outcomes in zip(looks, zip(*columns, strict=True), strict=True):
            for classifier, outcome in zip(classifiers, outcomes, strict=True):
                answers, error = ((), outcome) if isinstance(outcome, str) else (outcome, None)
                yield Prediction(path, answers, error, classifier.name)


@dataclass(frozen=True)
class _View:
    """How a model wants to see images; models that agree share what was prepared."""

    in_chans: int
    data: tuple[tuple[str, Any], ...]


# What Pillow raises at a resize for the shape of one image, such as a side that would have no pixels left, or more than
# there is memory for. All else, torch's RuntimeError too, means that the transform is wrong, and for every image.
_ODD_IMAGE = (ValueError, OSError, MemoryError, ZeroDivisionError)

# One image as all models see it, or why none does.
_Look = dict[_View, Tensor] | str


class _Classifier:
    """A model in use: what it sees, what its outputs are called, and how many images fit at a time."""

    def __init__(self, name: str | None, model: Beit, topk: int, batch_size: int) -> None:
        which = "This model" if name is None else name
        channels = model.config.in_chans
        if not model.num_classes or not model.config.global_pool:
            raise ValueError(f"{which} has no head to predict with; create it with num_classes > 0 and a global_pool.")
        if channels not in (1, 3):
            raise ValueError(f"{which} takes {channels} channels; image files have 1 (grey) or 3 (RGB).")
        self.name = name
        self.model = model.eval()
        self.topk = min(topk, model.num_classes)
        self.most = batch_size
        self.labels = model.class_names
        self.view = _View(channels, tuple(resolve_data_config(model).items()))

    def classify(self, looks: Sequence[_Look]) -> list[tuple[Answer, ...] | str]:
        """Return the answers of each image, or why it has none."""
        seen = [look[self.view] for look in looks if not isinstance(look, str)]
        outcomes = itertools.chain.from_iterable(map(self._answers, self._logits(seen)))
        return [look if isinstance(look, str) else next(outcomes) for look in looks]

    @torch.inference_mode()
    def _logits(self, images: list[Tensor]) -> Iterator[Tensor]:
        """Run the model, in halves where the whole does not fit into memory; yields (B, classes) on the CPU."""
        like = self.model.cls_token
        start = 0
        while start < len(images):
            batch = torch.stack(images[start : start + self.most])
            try:
                logits = self.model(batch.to(device=like.device, dtype=like.dtype)).float().cpu()
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise MemoryError(
                        f"Not even one image of {tuple(batch.shape[1:])} fits into memory beside the model; take a "
                        "smaller model or another device."
                    ) from error
                self.most = len(batch) // 2
                _logger.warning("%d images do not fit into memory; going on with %d.", len(batch), self.most)
                continue
            start += len(batch)
            yield logits

    def _answers(self, logits: Tensor) -> list[tuple[Answer, ...] | str]:
        top = logits.softmax(dim=-1).topk(self.topk)
        rows = zip(logits.isfinite().all(dim=-1).tolist(), top.values.tolist(), top.indices.tolist(), strict=True)
        return [
            tuple(Answer(i, self.labels[i] if self.labels else str(i), p) for p, i in zip(values, indices, strict=True))
            if finite
            else "the model's output for it is not finite"
            for finite, values, indices in rows
        ]


def _out_of_memory(error: RuntimeError) -> bool:
    # On the CPU there is no class for it.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _batches(
    paths: Iterable[Path], views: Sequence[_View], batch_size: int, workers: int
) -> Iterator[list[tuple[Path, _Look]]]:
    """Open and prepare images batch by batch, in order, and meanwhile up to two batches more."""
    transforms = {view: create_transform(**dict(view.data)) for view in views}
    waiting: deque[tuple[Path, Future[_Look]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for path in paths:
            waiting.append((path, pool.submit(_look, path, transforms)))
            if len(waiting) == 3 * batch_size:
                yield [_finished(waiting.popleft()) for _ in range(batch_size)]
        while waiting:
            yield [_finished(waiting.popleft()) for _ in range(min(batch_size, len(waiting)))]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finished(item: tuple[Path, "Future[_Look]"]) -> tuple[Path, _Look]:
    path, future = item
    return path, future.result()


def _look(path: Path, transforms: Mapping[_View, Transform]) -> _Look:
    try:
        images = {channels: open_image(path, channels) for channels in {view.in_chans for view in transforms}}
    except ImageError as error:
        return str(error)
    try:
        return {view: transform(images[view.in_chans]) for view, transform in transforms.items()}
    except _ODD_IMAGE as error:
        return f"cannot be prepared: {error or type(error).__name__}"
