"""Confusion matrices: which class pixels, or the images of a classifier, have and which they were given.

Scores of pixels are those of mmsegmentation's `mean_iou`, which the published figures are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beitzoo.errors import check
from beitzoo.images.label_maps import IGNORE
from beitzoo.results import Row

CLASS_COLUMNS = ("class", "iou", "acc", "pixels", "predicted_pixels")


@dataclass(frozen=True)
class PixelScores:
    """How right a segmentation model is, in per cent.

    Attributes:
        miou: Mean of `iou` over the classes that are anywhere, in the truth or in what was predicted.
        macc: Mean of `acc` over the classes that the truth has.
        aacc: Pixels of all classes that were given the right one.
        iou: Of each class: pixels that have it and were given it, of those that have it or were given it. NaN of a
            class that is nowhere.
        acc: Of each class: pixels that were given it, of those that have it. NaN of a class that the truth has not.
    """

    miou: float
    macc: float
    aacc: float
    iou: tuple[float, ...]
    acc: tuple[float, ...]


class ConfusionMatrix:
    """Pixels by the class that they have and the class that they were given.

    Attributes:
        counts: (K, K) int64 on a device, rows are the truth. Nothing but `add` changes it, so several processes may
            each count a share of the images and add theirs up.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    @property
    def num_classes(self) -> int:
        """Classes of a pixel, K."""
        return len(self.counts)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count pixels: class numbers of one shape, whole numbers of any type and on any device.

        Pixels whose truth is 255 are of no class; what was predicted of them does not count.
        """
        classes, device = self.num_classes, self.counts.device
        assert predicted.shape == truth.shape, (predicted.shape, truth.shape)
        given = predicted.to(device, torch.int64).flatten()
        known = truth.to(device, torch.int64).flatten()
        # Pixels of no class make a row of their own, which is left out: choosing the others first would be slower.
        row = known.masked_fill(known == IGNORE, -1)
        if given.numel():
            # Out of range is a fault of whoever made the label map: all that users give is checked there.
            low, high = given.aminmax()
            fine = (low >= 0) & (high < classes) & (known.min() >= 0) & (row.max() < classes)
            assert bool(fine), "a class number is out of range"
        cells = torch.bincount((row + 1) * classes + given, minlength=(classes + 1) * classes)
        self.counts += cells.view(classes + 1, classes)[1:]

    def scores(self) -> PixelScores:
        """Return the scores over all pixels so far.

        Raises:
            InvalidValueError: No pixel has a class.
        """
        counts = self.counts.cpu().double()
        labelled = float(counts.sum())
        check(labelled > 0, "No pixel of the images has a class, so there is nothing to measure on; give other masks.")
        right, truth, given = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou = 100 * right / (truth + given - right)  # 0 / 0 of a class that is nowhere: NaN
        acc = 100 * right / truth
        means = float(iou.nanmean()), float(acc.nanmean()), 100 * float(right.sum()) / labelled
        return PixelScores(*means, tuple(iou.tolist()), tuple(acc.tolist()))


def class_rows(matrix: ConfusionMatrix, names: Sequence[str]) -> list[Row]:
    """Return a row for each class: its name, IoU and accuracy, and the pixels that have it and were given it.

    IoU and accuracy are in per cent, to three places; None where there is no such pixel.
    """
    scores, counts = matrix.scores(), matrix.counts
    columns = zip(names, scores.iou, scores.acc, counts.sum(1).tolist(), counts.sum(0).tolist(), strict=True)
    return [
        {
            "class": name,
            "iou": _rounded(iou),
            "acc": _rounded(acc),
            "pixels": pixels,
            "predicted_pixels": predicted,
        }
        for name, iou, acc, pixels, predicted in columns
    ]


def count_answers(answers: Sequence[tuple[int, int]], names: Sequence[str]) -> tuple[NDArray[Any], list[str]]:
    """Count the answers of a classifier: a confusion matrix of the classes that are anywhere, and their names.

    Args:
        answers: Of each image the right output and the one that was given.
        names: Of all outputs.

    Returns:
        Counts (K, K), rows are the truth, and K names, in the order of the outputs.
    """
    numbers = sorted({output for pair in answers for output in pair})
    place = {output: place for place, output in enumerate(numbers)}
    counts = np.zeros((len(numbers), len(numbers)), dtype=np.int64)
    for truth, given in answers:
        counts[place[truth], place[given]] += 1
    return counts, [names[output] for output in numbers]


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)
