"""Accuracy from logits and labels."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.metrics import AccuracySum, CalibrationSum


def test_accuracy_counts_what_is_right() -> None:
    logits = torch.eye(8)[:6] * 4
    sums = AccuracySum(8)
    sums.add(logits[:4], torch.tensor([0, 1, 2, 7]))
    sums.add(torch.empty(0, 8), torch.empty(0, dtype=torch.int64))
    sums.add(logits[4:], torch.tensor([4, 0]))
    sums.add_failures(2)
    accuracy = sums.accuracy()
    right = math.log(math.exp(4) + 7) - 4
    assert (accuracy.count, accuracy.failures) == (6, 2)
    assert accuracy.top1 == pytest.approx(100 * 4 / 6)
    assert accuracy.top5 == pytest.approx(100 * 5 / 6)
    assert accuracy.loss == pytest.approx(right + 4 * 2 / 6)


def test_several_processes_add_up_what_they_counted() -> None:
    logits, labels = torch.randn(10, 6), torch.randint(6, (10,))
    parts = [AccuracySum(6), AccuracySum(6), AccuracySum(6)]
    parts[0].add(logits[:4], labels[:4])
    parts[1].add(logits[4:], labels[4:])
    parts[2].add(logits, labels)
    parts[0].sums += parts[1].sums
    assert parts[0].accuracy().count == 10
    assert parts[0].accuracy().top1 == parts[2].accuracy().top1
    assert parts[0].accuracy().loss == pytest.approx(parts[2].accuracy().loss)


def test_five_of_five_classes_say_nothing() -> None:
    for classes, expected in ((4, None), (5, None), (6, 100.0)):
        sums = AccuracySum(classes)
        sums.add(torch.eye(classes)[:1].bfloat16(), torch.tensor([0]))
        assert sums.accuracy().top5 == expected


def test_without_an_image_there_is_no_accuracy() -> None:
    sums = AccuracySum(3)
    sums.add_failures(2)
    with pytest.raises(InvalidValueError, match=r"no readable image to measure accuracy on \(2 could not be read\)"):
        sums.accuracy()


def slow_calibration_error(confidences: Tensor, right: Tensor, bins: int) -> float:
    """Bin after bin, as in Guo et al., equation 3."""
    total = 0.0
    for lower in range(bins):
        inside = [
            place for place, value in enumerate(confidences.tolist()) if lower / bins < value <= (lower + 1) / bins
        ]
        if inside:
            gap = confidences[inside].double().mean() - right[inside].double().mean()
            total += len(inside) / len(confidences) * abs(gap.item())
    return 100 * total


def test_calibration_error_is_that_of_torchmetrics_and_of_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(500, 7, generator=generator) * 2).softmax(1)
    labels = torch.randint(7, (500,), generator=generator)
    confidences, given = probabilities.max(1)
    calibration = CalibrationSum()
    for part in (slice(0, 300), slice(300, 500)):
        calibration.add(confidences[part], (given == labels)[part])
    theirs = MulticlassCalibrationError(7, n_bins=15, norm="l1")(probabilities, labels)
    assert calibration.error() == pytest.approx(100 * theirs.item(), rel=1e-5)
    assert calibration.error() == pytest.approx(slow_calibration_error(confidences, given == labels, 15), rel=1e-9)


def test_certain_answers_that_are_right_have_no_calibration_error() -> None:
    calibration = CalibrationSum()
    calibration.add(torch.ones(4), torch.ones(4, dtype=torch.bool))
    assert calibration.error() == 0
    calibration.add(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    assert calibration.error() == 50


def test_one_of_several_right_classes_suffices() -> None:
    logits = torch.arange(8.0).repeat(3, 1)
    right = torch.zeros(3, 8, dtype=torch.bool)
    right[0, [1, 7]] = right[1, [4, 5]] = right[2, [0]] = True
    sums = AccuracySum(8)
    sums.add_several(logits, right)
    accuracy = sums.accuracy()
    assert (accuracy.top1, accuracy.top5) == (pytest.approx(100 / 3), pytest.approx(200 / 3))
    probabilities = logits[0].softmax(0)
    expected = [probabilities[[1, 7]].sum(), probabilities[[4, 5]].sum(), probabilities[0]]
    assert accuracy.loss == pytest.approx(sum(-math.log(one) for one in expected) / 3, rel=1e-6)


def test_one_right_class_is_what_several_are_counted_as() -> None:
    logits, labels = torch.randn(20, 9), torch.randint(9, (20,))
    one, several = AccuracySum(9), AccuracySum(9)
    one.add(logits, labels)
    several.add_several(logits, torch.nn.functional.one_hot(labels, 9).bool())
    assert torch.allclose(one.sums, several.sums)
