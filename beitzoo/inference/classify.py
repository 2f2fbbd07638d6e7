"""From images to classes: from every model one answer or one named failure for each image, in order."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from beitzoo.errors import check
from beitzoo.images.transforms import resolve_data_config
from beitzoo.inference.fastest import count_ahead, for_many_images
from beitzoo.inference.pipeline import Failure, Job, Loading, View, one_or_many, run_jobs
from beitzoo.models.beit import Beit
from beitzoo.zoo.checkpoints import Classify

Outcome = TypeVar("Outcome")

NOT_FINITE = "the model's output for it is not finite"


@dataclass(frozen=True)
class Answer:
    """One class of one image.

    Attributes:
        index: Output of the head.
        label: Its name, or its number as text where the checkpoint has no names.
        probability: 0 to 1; of all classes together 1, unless the head tells several labels of one image (sigmoid).
    """

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What one model made of one image: the likeliest classes, or the reason why there are none.

    Attributes:
        path: The image; None if it was given as pixels.
        answers: Likeliest first.
        error: Why there are none, or None.
        model: Name of the model, where there are several.
    """

    path: Path | None
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
    images: Any,
    *,
    topk: int = 3,
    batch_size: int = 16,
    workers: int = 2,
    optimize: bool = True,
) -> list[Prediction]:
    """Classify images; return one prediction by each model for each image, in the order of both.

    An image that cannot be read is a prediction with an error. All predictions are made before this returns;
    `predict_each` makes them one by one, for more images than one wants to wait for.

    Args:
        models: A classifier, or several by name. Their training mode is as before when this returns.
        images: Paths (str or Path), PIL images, arrays (height, width, channels) of uint8 or tensors (channels, height,
            width) of uint8, or one of these; or an array or tensor of several. They are prepared as each model expects:
            what is normalised already goes to the model itself.
        topk: Classes per image, likeliest first; no more than there are.
        batch_size: Images per forward pass.
        workers: Threads that decode images.
        optimize: On a CPU, let an inference copy compute more than a handful of images, as `for_many_images` chooses;
            the models stay as they are.

    Raises:
        InvalidValueError: There is no model, one has no head or takes images that are not in files, or a number is not
            positive.
        InvalidOptionError: An image is none of these.
    """
    named, images, loading = _classifiers(models), one_or_many(images), Loading(batch_size, workers)
    if optimize:
        count, images = count_ahead(images)
        named = {name: for_many_images(model, count, batch_size) for name, model in named.items()}
    return list(_predictions(named, images, topk, loading))


def predict_each(
    models: Beit | Mapping[str, Beit], images: Iterable[Any], *, topk: int = 3, loading: Loading | None = None
) -> Iterator[Prediction]:
    """Classify images one batch after the other, as `predict`, of any number of images in constant memory.

    Args:
        models: A classifier, or several by name.
        images: Read as needed, so they may come from a pipe.
        topk: Classes per image.
        loading: Batch size and threads.
    """
    return _predictions(_classifiers(models), images, topk, loading or Loading())


def _classifiers(models: Beit | Mapping[str, Beit]) -> dict[str | None, Beit]:
    """Return models by name, each of which can tell classes apart; a single one has none."""
    named: dict[str | None, Beit] = {None: models} if isinstance(models, nn.Module) else dict(models.items())
    check(bool(named), "There are no models; one or more can look at the images. Give a model, or some by name.")
    for name, model in named.items():
        check_classifier(model, name or "This model")
    return named


def _predictions(
    models: Mapping[str | None, Beit], images: Iterable[Any], topk: int, loading: Loading
) -> Iterator[Prediction]:
    """Make the jobs at once, so that what is wrong is said before the first image is asked for."""
    check(topk >= 1, f"topk is {topk}; it can be 1 or more. Leave it out for the default.")
    jobs = [classification(model, _answers(model, topk), name or "This model") for name, model in models.items()]
    return _run(models, jobs, images, loading)


def _run(
    models: Mapping[str | None, Beit], jobs: Sequence[Job[tuple[Answer, ...]]], images: Iterable[Any], loading: Loading
) -> Iterator[Prediction]:
    with eval_mode(models.values()):
        for image, outcomes in run_jobs(images, jobs, loading):
            path = Path(image) if isinstance(image, str | Path) else None
            for name, outcome in zip(models, outcomes, strict=True):
                if isinstance(outcome, Failure):
                    yield Prediction(path, (), outcome.reason, name)
                else:
                    yield Prediction(path, outcome, None, name)


def classification(
    model: Beit,
    read: Callable[[Tensor], Sequence[Outcome]],
    name: str = "This model",
    *,
    data: Mapping[str, Any] | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Job[Outcome]:
    """Make the job of a classifier: an image whose logits are not finite is a failure.

    Args:
        model: The classifier.
        read: From logits (B, ..., classes), finite, in float32 and on the CPU, to an outcome for each image.
        name: What errors call the model.
        data: How images are prepared, as `resolve_data_config` says it; as the model expects if None.
        forward: From images to logits; the model if None.

    Raises:
        InvalidValueError: The model has no head, or takes images that are not in files.
    """
    check_classifier(model, name)
    channels = model.config.in_chans
    check(channels in (1, 3), f"{name} takes {channels} channels; image files have 1 (grey) or 3 (RGB).")

    def run(images: Tensor) -> list[Outcome | Failure]:
        logits = (forward or model)(images).float().cpu()
        finite = logits.isfinite().flatten(1).all(dim=1)
        outcomes = iter(read(logits[finite]))
        return [next(outcomes) if fine else Failure(NOT_FINITE) for fine in finite.tolist()]

    like = model.cls_token
    options = resolve_data_config(model) if data is None else data
    return Job(View(channels, tuple(options.items())), like.device, like.dtype, run)


def check_classifier(model: nn.Module, name: str) -> None:
    """Refuse a network that tells no classes apart, such as a masked image model.

    Raises:
        InvalidValueError: It has no head for classes.
    """
    check(
        isinstance(model, Beit) and bool(model.num_classes and model.config.global_pool),
        f"{name} has no head to predict with; create it with num_classes > 0 and a global_pool.",
    )


@contextmanager
def eval_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Switch dropout and stochastic depth off for a while; afterwards every module is in the mode it was in."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def probabilities_of(model: Beit, logits: Tensor) -> Tensor:
    """Turn logits (..., classes) into probabilities: by softmax, or sigmoid where an image can have several labels."""
    return logits.sigmoid() if tells_several(model) else logits.softmax(dim=-1)


def tells_several(model: Beit) -> bool:
    """Tell whether a model gives an image any number of labels (sigmoid), or one class (softmax)."""
    head = model.pretrained.head
    return isinstance(head, Classify) and head.activation == "sigmoid"


def _answers(model: Beit, topk: int) -> Callable[[Tensor], list[tuple[Answer, ...]]]:
    names = model.class_names

    def answers(logits: Tensor) -> list[tuple[Answer, ...]]:
        top = probabilities_of(model, logits).topk(min(topk, model.num_classes))
        return [
            tuple(Answer(i, names[i] if names else str(i), p) for p, i in zip(values, indices, strict=True))
            for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]

    return answers
