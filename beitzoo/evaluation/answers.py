"""What a classifier answered on labelled images, one by one: its confusions, and how right it is class by class."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beitzoo.errors import InvalidValueError
from beitzoo.files import read_text, write_text
from beitzoo.images.image_set import ImageSet
from beitzoo.results import Row, csv_text

_COLUMNS = ("image", "label", "class", "answer_label", "answer", "probability")
_OF_CLASSES = ("class", "images", "right", "top1", "mistaken_for", "mistaken_images")


@dataclass(frozen=True)
class Answers:
    """The likeliest class of each image, beside the right one.

    Attributes:
        images: Index of each image in its set, (N,) int64.
        labels: The right class, (N,) int64.
        answers: The likeliest class, (N,) int64.
        probabilities: Of that class, (N,) float32; NaN where the logits were not finite.
    """

    images: Tensor
    labels: Tensor
    answers: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, images: Sequence[int], labels: Tensor, logits: Tensor) -> "Answers":
        """Take the answers of a batch: logits (B, classes) and labels (B,), on any device."""
        likeliest = logits.float().softmax(1).max(1)
        indices = torch.tensor(images, dtype=torch.int64)
        return cls(indices, labels.cpu(), likeliest.indices.cpu(), likeliest.values.cpu())

    @classmethod
    def joined(cls, parts: Sequence["Answers"]) -> "Answers":
        """Put the answers of several batches or processes together, in order of the images."""
        columns = [[part.images, part.labels, part.answers, part.probabilities] for part in parts]
        images, *rest = (torch.cat(column) for column in zip(*columns, strict=True))
        order = images.argsort()
        return cls(images[order], *(column[order] for column in rest))

    def __len__(self) -> int:
        return len(self.images)

    def confusion(self, num_classes: int) -> NDArray[Any]:
        """Count images by their right class, in rows, and by what was answered, in columns: (classes, classes)."""
        cells = torch.bincount(self.labels * num_classes + self.answers, minlength=num_classes**2)
        return cells.view(num_classes, num_classes).numpy()

    def wrong(self) -> Tensor:
        """Tell which answers are wrong, (N,) bool."""
        return self.labels != self.answers

    def captions(self, place: int, names: Sequence[str]) -> tuple[str, str, float]:
        """Say of an image what it is, what was answered, and how probable that is."""
        truth, answer = (names[int(column[place])] for column in (self.labels, self.answers))
        return truth, answer, float(self.probabilities[place])

    def mistakes(self, most: int) -> list[int]:
        """Return the places of wrong answers, the most confident first, so many at most."""
        wrong = self.wrong().nonzero().flatten()
        order = self.probabilities[wrong].nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        return wrong[order][:most].tolist()


def class_rows(answers: Answers, names: Sequence[str]) -> list[Row]:
    """Return a row for each class: its images, how many are right, and which wrong answer they were given most.

    `top1` is in per cent, to three places; None where no image is of the class.
    """
    images = torch.bincount(answers.labels, minlength=len(names)).tolist()
    is_right = answers.labels == answers.answers
    right = torch.bincount(answers.labels[is_right], minlength=len(names)).tolist()
    confused = _most_confused(answers)
    rows: list[Row] = []
    for label, name in enumerate(names):
        given, times = confused.get(label, (None, 0))
        rows.append(
            {
                "class": name,
                "images": images[label],
                "right": right[label],
                "top1": round(100 * right[label] / images[label], 3) if images[label] else None,
                "mistaken_for": None if given is None else names[given],
                "mistaken_images": times,
            }
        )
    return rows


def _most_confused(answers: Answers) -> dict[int, tuple[int, int]]:
    """Return, for each class with wrong answers, the most frequent of them and how often it was given."""
    wrong = answers.labels != answers.answers
    pairs = np.stack([answers.labels[wrong].numpy(), answers.answers[wrong].numpy()], axis=1)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    most: dict[int, tuple[int, int]] = {}
    for (label, given), times in zip(unique.tolist(), counts.tolist(), strict=True):
        if times > most.get(label, (0, 0))[1]:
            most[label] = (given, times)
    return most


def write_class_rows(path: Path, answers: Answers, names: Sequence[str]) -> None:
    """Write `class_rows` as a CSV."""
    write_text(path, csv_text(_OF_CLASSES, class_rows(answers, names)))


def read_class_names(path: Path) -> list[str]:
    """Read the names of the classes, in order, from what `write_class_rows` wrote."""
    return [row["class"] for row in _rows(path, _OF_CLASSES)]


def write_answers(path: Path, answers: Answers, images: ImageSet) -> None:
    """Write a row for each image: which it is (`ImageSet.identity`), its class, the answer, and its probability."""
    columns = (answers.images, answers.labels, answers.answers, answers.probabilities)
    rows: list[Row] = [
        {
            "image": images.identity(index)[0],
            "label": label,
            "class": images.names[label],
            "answer_label": answer,
            "answer": images.names[answer],
            "probability": round(probability, 6),
        }
        for index, label, answer, probability in zip(*(column.tolist() for column in columns), strict=True)
    ]
    write_text(path, csv_text(_COLUMNS, rows))


def read_confusion(path: Path, num_classes: int) -> NDArray[Any]:
    """Read what `write_answers` wrote, as `Answers.confusion` counts it.

    Raises:
        InvalidValueError: It is no such file.
    """
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    try:
        for row in _rows(path, _COLUMNS):
            counts[int(row["label"]), int(row["answer_label"])] += 1
    except (IndexError, ValueError) as error:
        raise InvalidValueError(f"{path} has a row that is none of its classes: {error}. Restore the file.") from error
    return counts


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows = list(reader)
    if tuple(reader.fieldnames or ()) != columns:
        raise InvalidValueError(f"{path} does not have the columns {', '.join(columns)}; restore the file.")
    return rows
