"""How right a classifier is."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of images.

    Attributes:
        top1: Per cent of images whose likeliest class is the right one.
        top5: Per cent whose right class is among the five likeliest.
        loss: Mean cross-entropy, nats.
        count: Images counted.
    """

    top1: float
    top5: float
    loss: float
    count: int


@torch.inference_mode()
def measure_accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor] | None], device: torch.device) -> Accuracy:
    """Classify batches of images (B, C, H, W) with labels (B,); the model's mode is kept.

    Raises:
        ValueError: There was no image.
    """
    was_training = model.training
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        if batch is None:
            continue
        images, labels = (t.to(device) for t in batch)
        logits = model(images).float()
        ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([ranks[:, 0].sum(), ranks.sum(), loss]).double().cpu()
        count += len(labels)
    model.train(was_training)
    if not count:
        raise ValueError("There is no readable image to measure accuracy on.")
    top1, top5, loss = (sums / count).tolist()
    return Accuracy(100 * top1, 100 * top5, loss, count)
