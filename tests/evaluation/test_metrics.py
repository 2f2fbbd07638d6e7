"""Accuracy from logits and labels."""

import math

import pytest
import torch

from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.metrics import AccuracySum


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
