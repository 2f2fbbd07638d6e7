"""The samples of masked image modelling: two views of an image and a mask of patches.

All that is drawn for an image is a pure function of the seed, the epoch and the image. Mask and view come from
generators of their own, so that neither depends on how the other is drawn, or on where visual tokens come from.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from beitzoo.images.augment import TwoViews
from beitzoo.images.files import as_image
from beitzoo.images.image_set import ImageSet
from beitzoo.images.loading import Sample, Unreadable, load_each
from beitzoo.images.masks import Masking, draw_mask, sample_generator

# Stands for the epoch where nothing may change from epoch to epoch: images to validate on.
FIXED = -1


class MaskedBatch(NamedTuple):
    """Images with their masks; B may be 0.

    Attributes:
        images: What the network sees, (B, C, H, W), normalised.
        token_images: What the tokenizer sees, (B, C, H', W') with values in [0, 1].
        masks: (B, h, w), True where a patch is masked.
        unreadable: Which images could not be read, and why.
    """

    images: Tensor
    token_images: Tensor
    masks: Tensor
    unreadable: Unreadable


class MaskedImages:
    """The images of a set in two views and masked, a batch at a time.

    One that cannot be read is left out of its batch; no other takes its place.
    """

    def __init__(self, images: ImageSet, views: TwoViews, masking: Masking, seed: int) -> None:
        self.images = images
        self.views = views
        self.masking = masking
        self.seed = seed
        self._channels = len(views.mean)

    def __getitems__(self, samples: list[Sample]) -> MaskedBatch:
        loaded, unreadable = load_each(self.images, samples, self._load)
        if not loaded:
            channels, masking = self._channels, self.masking
            sizes = (channels, *self.views.patch_size), (channels, *self.views.token_size)
            images, token_images = (torch.empty(0, *size) for size in sizes)
            return MaskedBatch(images, token_images, torch.empty(0, *masking.grid, dtype=torch.bool), unreadable)
        images, token_images, masks = (
            torch.stack(tensors) for tensors in zip(*(one for _, one in loaded), strict=True)
        )
        return MaskedBatch(images, token_images, masks, unreadable)

    def _load(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        image = as_image(self.images.images[sample.image], self._channels)
        epoch = FIXED if sample.epoch is None else sample.epoch
        mask = draw_mask(self.masking, sample_generator(self.seed, epoch, sample.image, "mask"))
        return *self.views(image, sample_generator(self.seed, epoch, sample.image)), mask
