"""What a classifier learns and is judged by: the one class of each image, or any number of labels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from beitzoo.evaluation.answers import Answers
from beitzoo.evaluation.label_answers import LabelAnswers
from beitzoo.evaluation.metrics import AccuracySum
from beitzoo.images.image_set import ImageSet
from beitzoo.training.balance import class_weights, positive_weights
from beitzoo.training.sections import Finetune
from beitzoo.training.task import Metrics
from beitzoo.zoo.checkpoints import Activation


class Measurement(Protocol):
    """What a classifier answered on some images; several processes put theirs together."""

    def add(self, images: Sequence[int], targets: Tensor, logits: Tensor) -> None:
        """Take in a batch: indices of its images, and on any device what is right and what the network gave."""

    def add_failures(self, number: int) -> None:
        """Count images that have no logits."""

    def join(self, parts: Sequence[Any]) -> Self:
        """Return one measurement of all images that the measurements of its kind are of."""

    def metrics(self) -> dict[str, Any]:
        """Return the metrics over all images, `loss`, `count` and `failures` among them.

        Raises:
            InvalidValueError: There was no image.
        """

    @property
    def answers(self) -> Answers | LabelAnswers:
        """What was answered, image by image."""


class Objective(Protocol):
    """A loss, and the metrics by which the better of two models is found.

    Attributes:
        activation: What makes probabilities of logits.
        metric_names: What validation gives, from `Measurement.metrics`, with `val_` before it.
    """

    activation: Activation
    metric_names: tuple[str, ...]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over images: logits (B, classes), and targets as of the batch or as mixing makes them.

        Logits are in float32 or more.
        """

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether a model of these metrics is better than the best so far."""

    def measurement(self) -> Measurement:
        """Begin a measurement."""


def make_objective(section: Finetune, images: ImageSet, indices: Sequence[int]) -> Objective:
    """Make what a recipe learns of images with classes, one each or several; `indices` are those to train on."""
    classes = len(images.names)
    if images.labels is not None:
        return OneClass(section, [images.labels[index] for index in indices], classes)
    sizes = images.class_sizes(indices)
    return ManyLabels(section, torch.tensor([float(sizes[label]) for label in range(classes)]), len(indices))


class OneClass:
    """Cross-entropy; the better model is right on more images, and of equally accurate ones has the lower loss.

    Args:
        section: Smoothing and balance.
        labels: Class of each image to train on.
        num_classes: Outputs of the head.
    """

    activation: Activation = "softmax"

    def __init__(self, section: Finetune, labels: Sequence[int], num_classes: int) -> None:
        # Of five classes, the right one is always among the five likeliest.
        self.metric_names = ("val_top1", *(("val_top5",) * (num_classes > 5)), "val_loss")
        self._num_classes = num_classes
        self._smoothing = section.label_smoothing
        self._weights = class_weights(labels, num_classes) if section.balance == "loss" else None

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over images; targets are classes (B,), or the share of each in an image (B, classes)."""
        if targets.ndim == 2:
            targets = targets.to(logits.dtype)
        if self._weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self._smoothing)
        weights = self._weights.to(logits.device)
        losses = F.cross_entropy(logits, targets, label_smoothing=self._smoothing, reduction="none")
        return (losses * (weights[targets] if targets.ndim == 1 else targets @ weights.to(targets.dtype))).mean()

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether more images are right; of equally accurate models the one with the lower loss is better."""
        return (metrics["val_top1"], -metrics["val_loss"]) > (best["val_top1"], -best["val_loss"])

    def measurement(self) -> "OneClassMeasurement":
        """Begin a measurement."""
        return OneClassMeasurement(AccuracySum(self._num_classes))


@dataclass
class OneClassMeasurement:
    """Top-1, top-5 and cross-entropy.

    Attributes:
        sums: What is right so far.
        parts: The answers of each batch.
    """

    sums: AccuracySum
    parts: list[Answers] = field(default_factory=list)

    def add(self, images: Sequence[int], targets: Tensor, logits: Tensor) -> None:
        """Take in a batch."""
        self.sums.add(logits, targets)
        self.parts.append(Answers.of(images, targets, logits))

    def add_failures(self, number: int) -> None:
        """Count images that have no logits."""
        self.sums.add_failures(number)

    def join(self, parts: Sequence["OneClassMeasurement"]) -> "OneClassMeasurement":
        """Return one measurement of the images of all."""
        both = OneClassMeasurement(AccuracySum(self.sums.num_classes))
        both.sums.sums = torch.stack([part.sums.sums for part in parts]).sum(0)
        both.parts = [answers for part in parts for answers in part.parts]
        return both

    def metrics(self) -> dict[str, Any]:
        """Return `top1`, `top5` (None of no more than five classes), `loss`, `count` and `failures`."""
        return asdict(self.sums.accuracy())

    @property
    def answers(self) -> Answers:
        """What was answered, image by image."""
        return Answers.joined(self.parts)


class ManyLabels:
    """Binary cross-entropy; the better model has the higher mean average precision, of equal ones the lower loss.

    The loss is timm's, with its smoothing of labels that are independent of each other: targets of mixed images are
    smoothed too. `balance = "loss"` weighs the images that have a label by `positive_weights`.

    Args:
        section: Smoothing and balance.
        positive: How many of the images to train on have each class, (classes,) float32.
        images: How many there are.
    """

    activation: Activation = "sigmoid"
    metric_names: tuple[str, ...] = ("val_map", "val_loss")

    def __init__(self, section: Finetune, positive: Tensor, images: int) -> None:
        weights = positive_weights(positive, images) if section.balance == "loss" else None
        self._loss = BinaryCrossEntropy(section.label_smoothing, smooth_dense=True, pos_weight=weights)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over images and classes; targets (B, classes), 0 to 1."""
        loss: Tensor = self._loss.to(logits.device, logits.dtype)(logits, targets.to(logits.dtype))
        return loss

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether labels are ranked better; of models that rank as well the one with the lower loss is better."""
        return (metrics["val_map"], -metrics["val_loss"]) > (best["val_map"], -best["val_loss"])

    def measurement(self) -> "ManyLabelsMeasurement":
        """Begin a measurement."""
        return ManyLabelsMeasurement()


@dataclass
class ManyLabelsMeasurement:
    """Mean average precision and binary cross-entropy, which is not smoothed here.

    Attributes:
        parts: The answers of each batch.
    """

    parts: list[LabelAnswers] = field(default_factory=list)
    failures: int = 0

    def add(self, images: Sequence[int], targets: Tensor, logits: Tensor) -> None:
        """Take in a batch."""
        self.parts.append(LabelAnswers.of(images, targets, logits))

    def add_failures(self, number: int) -> None:
        """Count images that have no logits."""
        self.failures += number

    def join(self, parts: Sequence["ManyLabelsMeasurement"]) -> "ManyLabelsMeasurement":
        """Return one measurement of the images of all."""
        answers = [answers for part in parts for answers in part.parts]
        return ManyLabelsMeasurement(answers, sum(part.failures for part in parts))

    def metrics(self) -> dict[str, Any]:
        """Return `map`, `loss`, `count` and `failures`."""
        return asdict(self.answers.scores())

    @property
    def answers(self) -> LabelAnswers:
        """What was answered, image by image."""
        return LabelAnswers.joined(self.parts, self.failures)
