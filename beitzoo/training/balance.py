"""What is done for rare classes: weights of the loss, or an order in which all classes are as frequent."""

from collections.abc import Sequence

import torch
from torch import Tensor


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return a weight for each class, (num_classes,): the inverse of how many images it has.

    Their mean over the images is 1, so the learning rate need not change. A class without images has 0.
    """
    counts = torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=num_classes)
    weights = len(labels) / (counts.count_nonzero() * counts)
    return torch.where(counts > 0, weights, 0.0)


def positive_weights(positive: Tensor, images: int) -> Tensor:
    """Return for each class how many images lack it for each that has it, (classes,); 1 where none or all have it.

    So both weigh the same in binary cross-entropy, as `pos_weight` of PyTorch's documentation.

    Args:
        positive: How many images have each class, (classes,) float32.
        images: How many there are.
    """
    return torch.where((positive > 0) & (positive < images), (images - positive) / positive, 1.0)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as many places as there are labels, (N,), of each class equally many, or one more, in a random order.

    All images of a rare class are shown before one is shown again, and of a frequent one none twice.

    Args:
        labels: Class of each image, (N,).
        generator: Is all that the order depends on.
    """
    counts = torch.bincount(labels)
    members = [places for places in labels.argsort(stable=True).split(counts.tolist()) if len(places)]
    share = -(-len(labels) // len(members))
    drawn = torch.stack([_in_turns(places, share, generator) for places in members])  # (classes, share)
    # Which classes have one more is drawn, too: those that come first.
    ranked = drawn[torch.randperm(len(members), generator=generator)]
    chosen = ranked.T.flatten()[: len(labels)]
    return chosen[torch.randperm(len(chosen), generator=generator)]


def _in_turns(places: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Go through places in random order, and through them again in another, until there are as many as wanted."""
    turns = -(-count // len(places))
    return torch.cat([places[torch.randperm(len(places), generator=generator)] for _ in range(turns)])[:count]
