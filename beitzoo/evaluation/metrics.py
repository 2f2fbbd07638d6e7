"""Accuracy of a classifier, from logits and labels, and how far its probabilities are to be believed."""

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
        self._add(_likeliest(logits) == labels[:, None], F.cross_entropy(logits, labels, reduction="sum"))

    def add_several(self, logits: Tensor, right: Tensor) -> None:
        """Count a batch of images of which several classes may be right: logits and which are, bool (B, classes).

        As in ReaL (https://arxiv.org/abs/2006.07159) one of them suffices; cross-entropy is that of all together.
        """
        logits = logits.float()
        loss = -logits.log_softmax(1).masked_fill(~right, -torch.inf).logsumexp(1).sum()
        self._add(right.gather(1, _likeliest(logits)), loss)

    def _add(self, right: Tensor, loss: Tensor) -> None:
        """Add whether each of the likeliest classes is right, (B, at most 5), and the summed loss."""
        count = torch.tensor(len(right), device=right.device)
        among = right.any(1).sum()
        self.sums += torch.stack([count, right[:, :1].sum(), among, loss, torch.zeros_like(loss)]).to(self.sums)

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


class CalibrationSum:
    """How far the probabilities of a classifier are from how often it is right: expected calibration error, ECE.

    As in Guo et al. (https://arxiv.org/abs/1706.04599): images are put into bins of equal width by the probability of
    their likeliest class, lower edges excluded, and ECE is the mean distance of confidence and accuracy over the bins,
    each weighted by its images.

    Attributes:
        sums: For each bin its images, the sum of their probabilities, and those that are right: (3, bins), float64.
    """

    def __init__(self, bins: int = 15) -> None:
        self.sums = torch.zeros(3, bins, dtype=torch.float64)

    def add(self, confidences: Tensor, right: Tensor) -> None:
        """Count a batch: probabilities of the likeliest classes, and whether these are right, both (B,), on the CPU."""
        bins = self.sums.shape[1]
        values = confidences.double()
        place = ((values * bins).ceil().long() - 1).clamp(0, bins - 1)
        for row, amount in zip(self.sums, (torch.ones_like(values), values, right.double()), strict=True):
            row.index_add_(0, place, amount)

    def error(self) -> float:
        """Return ECE over all images so far, in per cent; NaN if there were none."""
        count, confidence, right = self.sums
        return float(100 * (confidence - right).abs().sum() / count.sum())


def _likeliest(logits: Tensor) -> Tensor:
    return logits.topk(min(_TOP, logits.shape[1])).indices
