"""Average precision: how far a classifier ranks the images that have a label above those that have not."""

import torch
from torch import Tensor


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of each class, (classes,) float64, 0 to 1; NaN where no image has the label.

    It is the mean, over the images that have the label, of the share of such images among those ranked as high or
    higher. So it is what scikit-learn's `average_precision_score` gives: images of one score share a rank, and nothing
    is interpolated.

    Args:
        scores: (N, classes); only their order counts, so logits will do.
        targets: (N, classes), bool.
    """
    classes = zip(scores.unbind(1), targets.unbind(1), strict=True)
    return torch.stack([_of_class(*one) for one in classes])


def _of_class(scores: Tensor, targets: Tensor) -> Tensor:
    if not targets.any():
        return torch.tensor(torch.nan, dtype=torch.float64)
    order = scores.argsort(descending=True)
    _, groups, sizes = torch.unique_consecutive(scores[order], return_inverse=True, return_counts=True)
    ranked = targets[order].double()
    ends = sizes.cumsum(0)  # images ranked as high or higher
    precision = ranked.cumsum(0)[ends - 1] / ends
    return (precision[groups] * ranked).sum() / ranked.sum()
