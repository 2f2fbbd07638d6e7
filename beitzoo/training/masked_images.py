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
from beitzoo.images.token_views import TokenViews

# Stands for the epoch where nothing may change from epoch to epoch: images to validate on.
FIXED = -1


class MaskedBatch(NamedTuple):
    """Images with their masks; B may be 0.

    Attributes:
        images: What the network sees, (B, C, H, W), normalised.
        token_images: What the tokenizer sees, (B, C, H', W') with values in [0, 1]; None if it need not look.
        codes: Visual tokens that were computed before, (B, h, w); else None.
        masks: (B, h, w), True where a patch is masked.
        unreadable: Which images could not be read, and why.
    """

    images: Tensor
    token_images: Tensor | None
    codes: Tensor | None
    masks: Tensor
    unreadable: Unreadable


class MaskedImages:
    """The images of a set in two views and masked, a batch at a time.

    One that cannot be read is left out of its batch; no other takes its place.

    Args:
        images: The set.
        views: How both views are drawn.
        masking: How patches are masked.
        seed: Of masks and views.
        tokens: Views and visual tokens that were computed before; view e modulo their number is that of epoch e.
    """

    def __init__(
        self, images: ImageSet, views: TwoViews, masking: Masking, seed: int, tokens: TokenViews | None = None
    ) -> None:
        self.images = images
        self.views = views
        self.masking = masking
        self.seed = seed
        self.tokens = tokens
        self._channels = len(views.mean)

    def __getitems__(self, samples: list[Sample]) -> MaskedBatch:
        loaded, unreadable = load_each(self.images, samples, self._load)
        if not loaded:
            size = (0, self._channels, *self.views.patch_size)
            nothing = torch.empty(0, *self.masking.grid, dtype=torch.bool)
            return MaskedBatch(torch.empty(size), None, None, nothing, unreadable)
        parts = zip(*(one for _, one in loaded), strict=True)
        images, targets, masks = (torch.stack(tensors) for tensors in parts)
        token_images, codes = (targets, None) if self.tokens is None else (None, targets)
        return MaskedBatch(images, token_images, codes, masks, unreadable)

    def _load(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Return the network's view, the tokenizer's view or its codes, and the mask."""
        image = as_image(self.images.images[sample.image], self._channels)
        epoch = FIXED if sample.epoch is None else sample.epoch
        mask = draw_mask(self.masking, sample_generator(self.seed, epoch, sample.image, "mask"))
        if self.tokens is None:
            return *self.views(image, sample_generator(self.seed, epoch, sample.image)), mask
        view, codes = self.tokens.view(sample.image, epoch)
        return self.views.apply_patch(image, view), codes, mask
