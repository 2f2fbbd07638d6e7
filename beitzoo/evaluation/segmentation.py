"""How right a segmentation model is: mIoU, mAcc and aAcc on images with masks that it was not trained on, as a row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from beitzoo.errors import InvalidValueError, check, some_of
from beitzoo.evaluation.confusion import ConfusionMatrix
from beitzoo.evaluation.subjects import Evaluation, Origin, Subject, check_unnamed, unseen_images
from beitzoo.images.files import ImageError
from beitzoo.images.label_maps import IGNORE, LabelMap
from beitzoo.images.masked_sets import MaskedSet
from beitzoo.inference.classify import eval_mode
from beitzoo.inference.fastest import COPY, OPTIMIZED, PLAIN, WINDOWS, computed_by, for_many_images, pays
from beitzoo.inference.pipeline import Failure, Loading, run_jobs
from beitzoo.inference.segment import SegmentOptions, segmentation
from beitzoo.models.segmentation import Segmenter
from beitzoo.progress import watch
from beitzoo.results import ENVIRONMENT, Row, environment
from beitzoo.zoo import costs
from beitzoo.zoo.labels import outputs_of

_LOOKS = ("computed_by", "mode", "short_side", "stride", "scales", "flip")
_DATA = ("data", "data_version", "reduce_zero_label", "ignore")
_FOUND = ("miou", "macc", "aacc", "param_count")
COLUMNS = ("model", "img_size", *_LOOKS, *_FOUND, *_DATA, "count", "failures", "weights", *ENVIRONMENT, "error")
# What makes two rows the same measurement: what was asked for, and where; not when.
KEY = ("model", "weights", *_DATA, *_LOOKS, *(name for name in ENVIRONMENT if name != "date"))


@dataclass(kw_only=True)
class SegmenterEvaluation(Evaluation):
    """One measurement of a segmentation model.

    Attributes:
        matrix: What the scores are of, its classes in the order of the names; None of a row that was there already, or
            that failed.
    """

    matrix: ConfusionMatrix | None = None


def evaluate_segmenter(
    subject: Subject[Segmenter],
    masked: MaskedSet,
    data: str,
    options: SegmentOptions | None = None,
    workers: int = 2,
) -> SegmenterEvaluation:
    """Measure a segmentation model on all images that are held out and that its own run was not trained on.

    Args:
        subject: The model.
        masked: Images with masks of the model's classes.
        data: What the row calls them.
        options: How the model looks at images.
        workers: Threads that decode images and masks.

    Raises:
        InvalidValueError: The classes are others, all images were trained on, or none could be measured.
    """
    options = options or SegmentOptions()
    model, images = subject.model, masked.images
    outputs = _outputs(subject, masked)
    indices, notes = unseen_images(subject.name, images, subject.origin.split(images))
    seen = watch(indices, "image", len(indices))
    matrix, failures = measure_segmenter(model, masked, seen, options, workers=workers, outputs=outputs)
    count = count_measured(len(indices), failures)
    scores = matrix.scores()
    row: Row = {
        **environment(matrix.counts.device),
        **asked(subject.origin, masked, data, options, computed_by(model)),
        "img_size": max(model.backbone.config.img_size),
        **{name: round(getattr(scores, name), 3) for name in ("miou", "macc", "aacc")},
        # Of the whole, the auxiliary head too, as the published figures count.
        "param_count": round(costs.parameters(model.backbone.config, model.config) / 1e6, 2),
        "count": count,
        "failures": len(failures),
    }
    names = model.class_names or masked.labels.names
    return SegmenterEvaluation({name: row.get(name) for name in COLUMNS}, failures, notes, names, matrix=matrix)


def asked(origin: Origin, masked: MaskedSet, data: str, options: SegmentOptions, computed: str) -> Row:
    """Return the columns that say what is measured, which are known before it is.

    `weights` is empty where they are those of a name, which do not change.

    Args:
        origin: Of the model.
        masked: Images with masks.
        data: What the row calls them.
        options: How the model looks at images.
        computed: Whether the plain network or its inference copy computes.

    Raises:
        InvalidValueError: The model was trained on all images.
    """
    indices, _ = unseen_images(origin.name, masked.images, origin.split(masked.images))
    return {
        "model": origin.shown,
        "weights": origin.fingerprint(),
        "data": data,
        "data_version": masked.version_of(indices),
        "reduce_zero_label": masked.labels.reduce_zero_label,
        "ignore": " ".join(map(str, sorted(masked.labels.ignore))) or None,
        "computed_by": computed,
        "mode": options.mode,
        "short_side": options.short_side,
        "stride": options.stride,
        "scales": " ".join(f"{scale:g}" for scale in options.scales),
        "flip": options.flip,
    }


@dataclass(frozen=True)
class PlannedSegmenter:
    """The row of a segmentation model in a sweep.

    Attributes:
        origin: Where its weights are from.
        masked: Images with masks of its classes.
        data: What the row calls them.
        options: How the model looks at images.
        workers: Threads that decode images and masks.
        load: Makes the model.
        device: Where it runs.
        optimized: Let the inference copy compute where that is faster.
    """

    origin: Origin
    masked: MaskedSet
    data: str
    options: SegmentOptions
    workers: int
    load: Callable[[], Segmenter]
    device: torch.device
    optimized: bool = True

    @property
    def known(self) -> Row:
        """Columns that are known even where it cannot be measured."""
        return {**environment(self.device), "model": self.origin.shown, "data": self.data}

    def asked(self) -> Row:
        """Return the columns of its key; see the function `asked`."""
        computed = COPY if self.optimized and pays(self._count(), self.device) else PLAIN
        return {**self.known, **asked(self.origin, self.masked, self.data, self.options, computed)}

    def recall(self, row: Row) -> SegmenterEvaluation:
        """Return what a row says that is there already, or that failed."""
        return SegmenterEvaluation(row)

    def measure(self) -> SegmenterEvaluation:
        """Load and measure the model."""
        model = self.load()
        if self.optimized:
            model = for_many_images(model, self._count(), WINDOWS, inplace=True)
        subject = Subject(model, self.origin.name, self.origin.checkpoint)
        evaluation = evaluate_segmenter(subject, self.masked, self.data, self.options, self.workers)
        if computed_by(model) == COPY:
            evaluation.notes.append(OPTIMIZED)
        return evaluation

    def _count(self) -> int:
        """Return how many images the model is measured on."""
        images = self.masked.images
        indices, _ = unseen_images(self.origin.name, images, self.origin.split(images))
        return len(indices)


def measure_segmenter(
    model: Segmenter,
    masked: MaskedSet,
    indices: Iterable[int],
    options: SegmentOptions | None = None,
    *,
    workers: int = 2,
    outputs: Sequence[int] | None = None,
) -> tuple[ConfusionMatrix, list[tuple[str, str]]]:
    """Name the classes of the pixels of some images and count them; images and masks are read ahead.

    In memory are a few images at a time. The matrix stays on the model's device until its scores are asked for, so
    that nothing but label maps moves; processes that share the images out add up their `counts`.

    Args:
        model: The segmentation model; its training mode is kept.
        masked: Images with masks.
        indices: Which of them; read as needed.
        options: How the model looks at images.
        workers: Threads that decode images, and as many that read masks.
        outputs: Of each class of the masks the model's output that stands for it; in the same order if None.

    Returns:
        The counts, and the images that are not in them, with the reason: image or mask cannot be read or do not fit,
        no pixel has a class, or the model's output is not finite.
    """
    device = model.backbone.cls_token.device
    matrix = ConfusionMatrix(model.num_classes, device)
    failures: list[tuple[str, str]] = []
    job = segmentation(model, options)
    to_output = _to_output(outputs, device)
    with eval_mode([model]), _Masks(masked, workers) as masks:
        found = run_jobs(masks.ahead(indices), [job], Loading(workers, workers), lambda i: masked.images.images[i])
        for index, (outcome,) in found:
            image = masked.images.identity(index)[0]
            label_map = masks.take(index, None if isinstance(outcome, Failure) else tuple(outcome.shape))
            if isinstance(outcome, Failure):
                failures.append((image, outcome.reason))
            elif isinstance(label_map, Failure):
                failures.append((image, label_map.reason))
            else:
                truth = torch.from_numpy(label_map).to(device)
                matrix.add(outcome, truth if to_output is None else to_output[truth.int()])
    return matrix, failures


def count_measured(images: int, failures: Sequence[tuple[str, str]]) -> int:
    """Return how many of so many images were measured.

    Raises:
        InvalidValueError: None.
    """
    if images == len(failures):
        image, reason = failures[0]
        raise InvalidValueError(f"None of {images:,} images could be measured; the first: {image}: {reason}.")
    return images - len(failures)


class _Masks:
    """Masks that are read in threads while the model looks at their images."""

    def __init__(self, masked: MaskedSet, workers: int) -> None:
        self.masked = masked
        self.pool = ThreadPoolExecutor(workers)
        self.waiting: dict[int, Future[LabelMap]] = {}

    def __enter__(self) -> "_Masks":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def ahead(self, indices: Iterable[int]) -> Iterator[int]:
        """Pass indices on, and begin to read the mask of each: as far ahead as the images are."""
        for index in indices:
            self.waiting[index] = self.pool.submit(self.masked.load_mask, index)
            yield index

    def take(self, index: int, size: tuple[int, ...] | None) -> LabelMap | Failure:
        """Return the mask of an image of that height and width, or why there is none."""
        try:
            label_map = self.waiting.pop(index).result()
            if size is not None and label_map.shape != size:
                # Read again with the size, it says itself what is wrong.
                label_map = self.masked.load_mask(index, (size[1], size[0]))
        except ImageError as error:
            return Failure(str(error))
        return label_map


def _to_output(outputs: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """Return a table from the numbers in masks to the model's outputs; None if they are the same."""
    if outputs is None or list(outputs) == list(range(len(outputs))):
        return None
    table = torch.full((IGNORE + 1,), IGNORE, dtype=torch.uint8)
    table[: len(outputs)] = torch.tensor(outputs, dtype=torch.uint8)
    return table.to(device)


def _outputs(subject: Subject[Segmenter], masked: MaskedSet) -> list[int]:
    """Find the output of the model that stands for each class of the masks: by name, or where it has none by number."""
    name, model, names = subject.name, subject.model, masked.labels.names
    own = model.class_names
    if own is None:
        check_unnamed(name, model.num_classes, names)
        return list(range(len(names)))
    outputs = outputs_of(model.pretrained.head, names)
    unknown = [one for one, output in zip(names, outputs, strict=True) if output is None]
    missing = [one for output, one in enumerate(own) if output not in outputs]
    differences = [
        f"{len(unknown)} of the {len(names)} classes of the masks are none of its own ({some_of(unknown, 5)})"
        * bool(unknown),
        f"{len(missing)} of its {len(own)} classes are not in the masks ({some_of(missing, 5)})" * bool(missing),
    ]
    check(
        not (unknown or missing),
        f"{name} was trained on other classes: {' and '.join(filter(None, differences))}. Name the classes of the "
        "masks as the model does (in classes.txt or with --classes), or evaluate a model that was trained on these.",
    )
    return [output for output in outputs if output is not None]
