"""The confusion matrix of pixels and its scores, against torchmetrics and slow loops."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.confusion import ConfusionMatrix, class_rows

CLASSES = 7


def maps(seed: int, size: tuple[int, int] = (23, 31), classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    """What was predicted, and the truth with a tenth of its pixels in no class."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, classes, size)
    predicted = np.where(draw.random(size) < 0.6, truth, draw.integers(0, classes, size))
    truth[draw.random(size) < 0.1] = 255
    return torch.from_numpy(predicted), torch.from_numpy(truth.astype(np.uint8))


def test_counts_and_scores_are_torchmetrics() -> None:
    matrix = ConfusionMatrix(CLASSES)
    pairs = [maps(seed, (20 + seed, 30)) for seed in range(3)]
    for predicted, truth in pairs:
        matrix.add(predicted.to(torch.uint8), truth)
    flat = [torch.cat([one.flatten().long() for one in column]) for column in zip(*pairs, strict=True)]
    theirs = MulticlassConfusionMatrix(CLASSES, ignore_index=255)(*flat)
    assert torch.equal(matrix.counts, theirs)
    scores = matrix.scores()
    by_hand = {
        "miou": MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=255),
        "macc": MulticlassAccuracy(CLASSES, average="macro", ignore_index=255),
        "aacc": MulticlassAccuracy(CLASSES, average="micro", ignore_index=255),
        "iou": MulticlassJaccardIndex(CLASSES, average="none", ignore_index=255),
        "acc": MulticlassAccuracy(CLASSES, average="none", ignore_index=255),
    }
    for name, metric in by_hand.items():
        torch.testing.assert_close(torch.tensor(getattr(scores, name)), 100 * metric(*flat), msg=name)


def test_counts_and_scores_are_those_of_a_loop_over_pixels() -> None:
    """Class 5 is nowhere, class 6 predicted but not there: as in mmsegmentation, only the first is left out."""
    truth = [0, 0, 1, 1, 2, 2, 3, 4, 255, 255]
    given = [0, 1, 1, 1, 2, 6, 3, 3, 5, 0]
    matrix = ConfusionMatrix(CLASSES)
    matrix.add(torch.tensor(given), torch.tensor(truth, dtype=torch.uint8))
    seen = [(t, g) for t, g in zip(truth, given, strict=True) if t != 255]
    iou, acc = [], []
    for one in range(CLASSES):
        both = sum(t == g == one for t, g in seen)
        either = sum(one in pair for pair in seen)
        has = sum(t == one for t, _ in seen)
        iou.append(100 * both / either if either else math.nan)
        acc.append(100 * both / has if has else math.nan)
    scores = matrix.scores()
    assert scores.iou == pytest.approx(iou, nan_ok=True)
    assert scores.acc == pytest.approx(acc, nan_ok=True)
    assert [math.isnan(value) for value in scores.iou] == [False] * 5 + [True, False]
    assert (scores.iou[6], math.isnan(scores.acc[6])) == (0, True)
    assert scores.miou == pytest.approx(sum(v for v in iou if v == v) / 6)
    assert scores.macc == pytest.approx(sum(v for v in acc if v == v) / 5)
    assert scores.aacc == pytest.approx(100 * 5 / 8)


def test_the_share_of_each_process_adds_up() -> None:
    whole, shares = ConfusionMatrix(CLASSES), [ConfusionMatrix(CLASSES) for _ in range(2)]
    for seed in range(4):
        whole.add(*maps(seed))
        shares[seed % 2].add(*maps(seed))
    assert torch.equal(shares[0].counts + shares[1].counts, whole.counts)


def test_255_classes_are_told_from_pixels_of_no_class() -> None:
    matrix = ConfusionMatrix(255)
    matrix.add(torch.tensor([254, 254, 0]), torch.tensor([254, 255, 254], dtype=torch.uint8))
    assert (int(matrix.counts.sum()), int(matrix.counts[254, 254]), int(matrix.counts[254, 0])) == (2, 1, 1)


@pytest.mark.parametrize(("given", "truth"), [(CLASSES, 0), (-1, 0), (0, CLASSES), (0, -1), (255, 255)])
def test_numbers_out_of_range_are_faults_of_our_own(given: int, truth: int) -> None:
    matrix = ConfusionMatrix(CLASSES)
    with pytest.raises(AssertionError, match="a class number is out of range"):
        matrix.add(torch.tensor([given]), torch.tensor([truth]))
    assert int(matrix.counts.sum()) == 0


def test_masks_without_any_class_have_no_scores() -> None:
    matrix = ConfusionMatrix(CLASSES)
    matrix.add(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 255, dtype=torch.uint8))
    with pytest.raises(InvalidValueError, match="No pixel of the images has a class"):
        matrix.scores()


def test_rows_of_classes() -> None:
    matrix = ConfusionMatrix(3)
    matrix.add(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    assert class_rows(matrix, ("sky", "road", "car")) == [
        {"class": "sky", "iou": 50.0, "acc": 50.0, "pixels": 2, "predicted_pixels": 1},
        {"class": "road", "iou": 50.0, "acc": 100.0, "pixels": 1, "predicted_pixels": 2},
        {"class": "car", "iou": None, "acc": None, "pixels": 0, "predicted_pixels": 0},
    ]
