"""What a classifier of several labels answered on labelled images: its mean average precision, and its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.evaluation.average_precision import average_precision
from beitzoo.files import write_text
from beitzoo.images.image_set import ImageSet
from beitzoo.results import Row, csv_text

# The probability from which a label counts as given.
THRESHOLD = 0.5
_OF_CLASSES = ("class", "images", "ap", "precision", "recall")


@dataclass(frozen=True)
class LabelScores:
    """How well a classifier finds all labels of images.

    Attributes:
        map: Mean average precision, per cent: the mean over the classes that an image has; see `average_precision`.
        loss: Binary cross-entropy, nats, the mean over images and classes.
        count: Images counted.
        failures: Images that were not, as they could not be read or had no finite logits.
    """

    map: float
    loss: float
    count: int
    failures: int = 0


@dataclass(frozen=True)
class LabelAnswers:
    """The logits of each image, beside the labels that it has.

    Attributes:
        images: Index of each image in its set, (N,) int64.
        labels: Which labels it has, (N, classes) bool.
        logits: (N, classes) float32.
        failures: Images without logits.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    failures: int = 0

    @classmethod
    def of(cls, images: Sequence[int], labels: Tensor, logits: Tensor) -> "LabelAnswers":
        """Take the answers of a batch: labels, 0 or 1, and logits, both (B, classes) and on any device."""
        return cls(torch.tensor(images, dtype=torch.int64), labels.bool().cpu(), logits.float().cpu())

    @classmethod
    def joined(cls, parts: Sequence["LabelAnswers"], failures: int = 0) -> "LabelAnswers":
        """Put the answers of several batches or processes together, in order of the images.

        Raises:
            InvalidValueError: There is no image.
        """
        check(bool(parts), f"There is no readable image to measure on ({failures} could not be read).")
        columns = [[part.images, part.labels, part.logits] for part in parts]
        images, labels, logits = (torch.cat(column) for column in zip(*columns, strict=True))
        order = images.argsort()
        return cls(images[order], labels[order], logits[order], failures)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def probabilities(self) -> Tensor:
        """Of each label, (N, classes)."""
        return self.logits.sigmoid()

    @property
    def given(self) -> Tensor:
        """Which labels count as given, (N, classes) bool."""
        return self.probabilities >= THRESHOLD

    def scores(self) -> LabelScores:
        """Return the scores over all images.

        Raises:
            InvalidValueError: No image has a label.
        """
        check(
            bool(self.labels.any()),
            f"None of the {len(self):,} readable images to measure on has a label, so there is no average precision.",
        )
        mean = average_precision(self.logits, self.labels).nanmean()
        loss = F.binary_cross_entropy_with_logits(self.logits.double(), self.labels.double())
        return LabelScores(100 * mean.item(), loss.item(), len(self), self.failures)

    def wrong(self) -> Tensor:
        """Tell which images lack a label that they have, or were given one that they have not, (N,) bool."""
        return (self.given != self.labels).any(1)

    def mistakes(self, most: int) -> list[int]:
        """Return the places of images with wrong labels, the most confident first, so many at most."""
        wrong = self.wrong().nonzero().flatten()
        order = self._distance()[wrong].max(1).values.argsort(descending=True, stable=True)
        return wrong[order][:most].tolist()

    def captions(self, place: int, names: Sequence[str]) -> tuple[str, str, float]:
        """Say of an image with a wrong label what it is, its most confident wrong answer, and how probable that is."""
        worst = int(self._distance()[place].argmax())
        probability = float(self.probabilities[place, worst])
        labels = ", ".join(names[label] for label in self.labels[place].nonzero().flatten().tolist())
        missed = bool(self.labels[place, worst])
        return labels or "none of the labels", f"{'not ' * missed}{names[worst]}", abs(missed - probability)

    def _distance(self) -> Tensor:
        """Return how far each probability is from what would be right, (N, classes)."""
        return (self.probabilities.nan_to_num(nan=0.0) - self.labels.float()).abs()


def label_rows(answers: LabelAnswers, names: Sequence[str]) -> list[Row]:
    """Return a row for each class: its images, its average precision, and its precision and recall from 0.5 on.

    All are in per cent, to three places; None where they are of no image.
    """
    precisions = average_precision(answers.logits, answers.labels).tolist()
    right = (answers.given & answers.labels).sum(0).tolist()
    given, there = answers.given.sum(0).tolist(), answers.labels.sum(0).tolist()
    return [
        {
            "class": name,
            "images": there[label],
            "ap": round(100 * precisions[label], 3) if there[label] else None,
            "precision": round(100 * right[label] / given[label], 3) if given[label] else None,
            "recall": round(100 * right[label] / there[label], 3) if there[label] else None,
        }
        for label, name in enumerate(names)
    ]


def write_label_rows(path: Path, answers: LabelAnswers, names: Sequence[str]) -> None:
    """Write `label_rows` as a CSV."""
    write_text(path, csv_text(_OF_CLASSES, label_rows(answers, names)))


def write_label_answers(path: Path, answers: LabelAnswers, images: ImageSet) -> None:
    """Write a row for each image: which it is, its labels, those given from 0.5 on, and the probability of each class.

    Labels are joined by `;`. The probability of a class is in a column `p(NAME)`.
    """
    columns = ("image", "labels", "answers", *(f"p({name})" for name in images.names))
    parts = (answers.images, answers.labels, answers.given, answers.probabilities)
    rows: list[Row] = []
    for index, labels, given, probabilities in zip(*(part.tolist() for part in parts), strict=True):
        cells = (images.identity(index)[0], _joined(labels, images.names), _joined(given, images.names))
        values = [round(probability, 6) for probability in probabilities]
        rows.append(dict(zip(columns, (*cells, *values), strict=True)))
    write_text(path, csv_text(columns, rows))


def _joined(labels: Sequence[bool], names: Sequence[str]) -> str:
    return ";".join(name for name, has in zip(names, labels, strict=True) if has)
