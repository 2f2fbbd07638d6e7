"""Accuracy of a classifier, from logits and labels."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from beitzoo.errors import check

# Of no more classes than this, the right one is always among the five likeliest.
_TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of images.

    Attributes:
        top1: Per cent of images whose likeliest class is the right one.
        top5: Per cent whose right class is among the five likeliest; None where there are no more than five classes.
        loss: Mean cross-entropy, nats.
        count: Images counted.
        failures: Images that were not, as they could not be read or had no finite logits.
    """

    top1: float
    top5: float | None
    loss: float
    count: int
    failures: int = 0


class AccuracySum:
    """What is right among the images so far.

    Attributes:
        sums: Images, right ones, those right among the likeliest five, cross-entropy, failures: a tensor (5,) of
            float64, which several processes can add up.
        num_classes: Outputs of the head.
    """

    def __init__(self, num_classes: int) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)
        self.num_classes = num_classes

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, classes) and labels (B,), on any device; B may be 0."""
        logits = logits.float()
        ranks = logits.topk(min(_TOP, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = torch.tensor(len(labels), device=logits.device)
        sums = torch.stack([count, ranks[:, :1].sum(), ranks.sum(), loss, torch.zeros_like(loss)])
        self.sums += sums.to(self.sums)

    def add_failures(self, number: int = 1) -> None:
        """Count images that have no logits."""
        self.sums[4] += number

    def accuracy(self) -> Accuracy:
        """Return the accuracy over all images so far.

        Raises:
            InvalidValueError: There was no image.
        """
        count, right, among_five, loss, failures = self.sums.tolist()
        check(count > 0, f"There is no readable image to measure accuracy on ({failures:.0f} could not be read).")
        top5 = 100 * among_five / count if self.num_classes > _TOP else None
        return Accuracy(100 * right / count, top5, loss / count, int(count), int(failures))
