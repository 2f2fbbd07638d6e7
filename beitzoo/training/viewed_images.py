"""The samples of tokenizer training: one view of an image, with values in [0, 1]."""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from beitzoo.images.augment import TwoViews, View
from beitzoo.images.files import as_image
from beitzoo.images.image_set import ImageSet
from beitzoo.images.loading import Sample, Unreadable, load_each
from beitzoo.images.masks import sample_generator


class ViewBatch(NamedTuple):
    """Images (B, C, H, W) with values in [0, 1]; and which could not be read, with the reason. B may be 0."""

    images: Tensor
    unreadable: Unreadable


class ViewedImages:
    """The images of a set as a tokenizer sees them, a batch at a time.

    A sample with an epoch is a random view, a pure function of the seed, the epoch and the image. One without shows
    the middle of the image.
    """

    def __init__(self, images: ImageSet, views: TwoViews, in_chans: int, seed: int) -> None:
        self.images = images
        self.views = views
        self.in_chans = in_chans
        self.seed = seed

    def __getitems__(self, samples: list[Sample]) -> ViewBatch:
        loaded, unreadable = load_each(self.images, samples, self._load)
        empty = torch.empty(0, self.in_chans, *self.views.token_size)
        return ViewBatch(torch.stack([view for _, view in loaded]) if loaded else empty, unreadable)

    def _load(self, sample: Sample) -> Tensor:
        image = as_image(self.images.images[sample.image], self.in_chans)
        if sample.epoch is None:
            view = self._middle(image)
        else:
            generator = sample_generator(self.seed, sample.epoch, sample.image)
            view = self.views.draw(image.width, image.height, generator)
        return self.views.apply_token(image, view)

    def _middle(self, image: Image.Image) -> View:
        """Return the largest box in the middle of an image that has the shape of the tokenizer's images."""
        rows, columns = self.views.token_size
        height = min(image.height, max(round(image.width * rows / columns), 1))
        width = min(image.width, max(round(image.height * columns / rows), 1))
        return View((image.height - height) // 2, (image.width - width) // 2, height, width)
