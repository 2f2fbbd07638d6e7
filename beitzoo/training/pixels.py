"""From the data section of a recipe to batches of images with their masks, augmented together.

What is drawn for an image is a pure function of the seed, the epoch and the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from beitzoo.errors import InvalidValueError
from beitzoo.images.augment_pixels import PixelViews
from beitzoo.images.loading import Sample, Unreadable, load_each
from beitzoo.images.masked_sets import LabelOptions, MaskedSet, find_masked_images, with_held_out_masks
from beitzoo.images.masks import sample_generator
from beitzoo.training.recipe import RecipeError
from beitzoo.training.sections import DataSection
from beitzoo.training.segment_sections import LabelSection


class PixelBatch(NamedTuple):
    """Images with the classes of their pixels; B may be 0.

    Attributes:
        images: (B, C, H, W), normalised.
        masks: (B, H, W), int64: the class of each pixel, 255 where it has none.
        unreadable: Which images or masks could not be read, and why.
    """

    images: Tensor
    masks: Tensor
    unreadable: Unreadable


class AugmentedPixels:
    """The images of a set with their masks, augmented, a batch at a time.

    One that cannot be read is left out of its batch; no other takes its place.

    Args:
        masked: The set.
        views: How crops are drawn.
        seed: Of crops, flips and colours.
    """

    def __init__(self, masked: MaskedSet, views: PixelViews, seed: int) -> None:
        self.masked = masked
        self.views = views
        self.seed = seed
        self._channels = len(views.mean)

    def __getitems__(self, samples: list[Sample]) -> PixelBatch:
        loaded, unreadable = load_each(self.masked.images, samples, self._load)
        if not loaded:
            size = self.views.size
            nothing = torch.empty(0, *size, dtype=torch.int64)
            return PixelBatch(torch.empty(0, self._channels, *size), nothing, unreadable)
        images, masks = (torch.stack(tensors) for tensors in zip(*(one for _, one in loaded), strict=True))
        return PixelBatch(images, masks, unreadable)

    def _load(self, sample: Sample) -> tuple[Tensor, Tensor]:
        assert sample.epoch is not None  # what a network is measured on is not augmented
        image, mask = self.masked.load(sample.image, self._channels)
        return self.views.draw_and_apply(image, mask, sample_generator(self.seed, sample.epoch, sample.image))


def load_masked_images(data: DataSection, section: LabelSection) -> MaskedSet:
    """Find the images of a recipe with their masks; those of `test_path` become the part `test` of the set.

    Raises:
        RecipeError: The recipe does not say where they are, or names images without masks.
    """
    source = data.source
    if source != "annotations" and source != "pairs" and source != "parquet":
        raise RecipeError(
            f"data.source is {source!r}, images without masks; a segmentation model is trained on 'annotations', "
            "'pairs' or 'parquet'."
        )
    if data.path is None:
        raise RecipeError(f"data.source is {source!r}, but data.path is missing; say where the images are.")
    if data.train_per_class:
        raise RecipeError("data.train_per_class counts images of one class each; leave it out, masks have several.")
    options = LabelOptions(**section.model_dump())
    masked = find_masked_images(source, data.path, options)
    if data.test_path is None:
        return masked
    try:
        return with_held_out_masks(masked, find_masked_images(source, data.test_path, options))
    except InvalidValueError as error:
        raise RecipeError(f"data.test_path does not fit data.path: {error}") from error
