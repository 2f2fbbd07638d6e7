"""The linear probe of BEiT: a linear classifier for each block, all trained together on frozen features.

`run_linear_eval.py` of BEiT: raw tokens of every block, class token and mean of the patch tokens side by side; weights
drawn with deviation 0.01; the sum of all cross-entropies; AdamW, the rate by cosine over the epochs to 0. It has random
crops and mirror images, for which every image goes through the network in every epoch; here each has one feature.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.inference.embed import Array

_DEVIATION = 0.01


@dataclass(frozen=True)
class JointTraining:
    """How the classifiers are trained; the original's, at its rate for 256 images.

    Attributes:
        epochs: Passes over the features.
        batch_size: Images per update; the last of an epoch may be fewer.
        lr: Rate of the first epoch.
        weight_decay: AdamW's.
        seed: Draws weights and the order of the images.
    """

    epochs: int = 100
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    seed: int = 0

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def order(self, epoch: int, count: int) -> Sequence[Tensor]:
        """Return the places of the images of each update of an epoch; seed and epoch say which."""
        order = np.random.default_rng([self.seed, epoch]).permutation(count)
        return torch.from_numpy(order).split(self.batch_size)


def joint_answers(
    train: Sequence[Array], labels: Array, test: Sequence[Array], training: JointTraining | None = None
) -> list[Array]:
    """Train a linear classifier for each block, and return the classes that it gives other features.

    No global random number is drawn, and gradients are recorded whatever the caller's mode.

    Args:
        train: For each block the features (images, C) to fit on.
        labels: Their classes.
        test: For each block the features (images, C) to answer for.
        training: How.
    """
    training = training or JointTraining()
    features, classes = torch.from_numpy(np.stack(train)), torch.from_numpy(labels)
    with torch.inference_mode(False), torch.enable_grad():
        weight, bias = _fit(features, classes, training)
    return [
        torch.addmm(offset, torch.from_numpy(asked), matrix).argmax(1).numpy()
        for asked, matrix, offset in zip(test, weight, bias, strict=True)
    ]


def _fit(features: Tensor, classes: Tensor, training: JointTraining) -> tuple[Tensor, Tensor]:
    """Return weights (blocks, C, classes) and biases (blocks, classes) of classifiers of features (blocks, N, C)."""
    blocks, count, channels = features.shape
    generator = torch.Generator().manual_seed(training.seed)
    num_classes = int(classes.max()) + 1
    weight = nn.Parameter(torch.randn(blocks, channels, num_classes, generator=generator) * _DEVIATION)
    bias = nn.Parameter(torch.zeros(blocks, num_classes))
    optimizer = torch.optim.AdamW([weight, bias], lr=training.lr, weight_decay=training.weight_decay)
    for epoch in range(training.epochs):
        optimizer.param_groups[0]["lr"] = training.rate(epoch)
        for places in training.order(epoch, count):
            logits = torch.baddbmm(bias[:, None], features[:, places], weight)
            loss = F.cross_entropy(logits.flatten(0, 1), classes[places].repeat(blocks), reduction="sum")
            optimizer.zero_grad()
            (loss / len(places)).backward()
            optimizer.step()
    return weight.detach(), bias.detach()
