"""Mixup and CutMix: of each pair of images in a batch both become a mixture, and so do their targets; timm's code.

mixup: https://arxiv.org/abs/1710.09412. CutMix: https://arxiv.org/abs/1905.04899.
"""

import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional as F

from beitzoo.training.generators import generators_kept, seed_generators
from beitzoo.training.sections import Finetune


def make_mixup(section: Finetune, num_classes: int) -> Mixup | None:
    """Build what a recipe asks for; None if it asks for neither. Labels are smoothed by the loss, and not here."""
    if not section.mixup and not section.cutmix:
        return None
    return Mixup(
        mixup_alpha=section.mixup,
        cutmix_alpha=section.cutmix,
        prob=section.mixup_prob,
        switch_prob=section.mixup_switch_prob,
        label_smoothing=0.0,
        num_classes=num_classes,
        multi_label=section.labels == "many",
    )


def mix(mixup: Mixup, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mix a batch: the first image with the last, and so on, all by the same share or rectangle.

    timm takes even batches only, but an image that cannot be read leaves an odd one: its last image stays as it is.

    Args:
        mixup: From `make_mixup`.
        images: (B, C, height, width); changed in place.
        labels: Classes, (B,); or 1 for each that an image has, else 0, (B, num_classes).
        seed: All that is drawn is a pure function of it; the global generators are left as they were.

    Returns:
        The images, and the share of each class in them, (B, num_classes).
    """
    shares = (labels if labels.ndim == 2 else F.one_hot(labels, mixup.num_classes)).float()
    paired = len(images) // 2 * 2
    if paired:
        with generators_kept():
            seed_generators(seed)
            _, mixed = mixup(images[:paired], labels[:paired])
        shares = torch.cat([mixed, shares[paired:]])
    return images, shares
