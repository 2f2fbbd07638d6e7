"""Logits of images of any size, by a sliding window, in bounded memory.

A window is moved over the image, and logits are averaged where windows overlap, as `slide_inference` of mmsegmentation
does. Logits at the size of an image are large: 2048 x 1024 pixels of 150 classes are 1.26 GB. So they are never made
whole. Of a window those are kept that the model gives, a sixteenth of the pixels, and rows of the image are asked for
from the top to the bottom. In them the classes are the last dimension: resizing and finding the largest then go through
memory in order, which on a CPU takes a quarter of the time.

Shapes: B windows in a batch, C channels of the image, K classes.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import InvalidValueError, check
from beitzoo.models.beit import Beit
from beitzoo.models.segmentation import Segmenter
from beitzoo.zoo.networks import Pair

Module = TypeVar("Module", bound=nn.Module)

# Values for each patch and channel at the height of a forward pass, as measured of base networks. Most are UPerNet's,
# whose largest maps have 16 pixels for each patch and are four together before its last convolution.
_VALUES_OF_UPERNET = 230
_VALUES_OF_LINEAR = 20

# From a first row to one behind the last: these rows of a map, (rows, width, K).
Rows = Callable[[int, int], Tensor]


class NotFiniteError(InvalidValueError):
    """Logits of which no class can be chosen: infinite, or no numbers."""


class Window(NamedTuple):
    """A part of an image in pixels, without the bottom row and the right column that are named."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class Sliding:
    """How a window is moved over images.

    Attributes:
        crop: Height and width of the window.
        stride: Pixels from one window to the next, down and to the right.
        most: Windows per forward pass.
    """

    crop: Pair
    stride: Pair
    most: int = 1

    def __post_init__(self) -> None:
        check(
            all(0 < step <= side for step, side in zip(self.stride, self.crop, strict=True)),
            f"The stride is {self.stride} with windows of {self.crop} pixels; it can be from 1 to the window's sides, "
            "as pixels between windows would have no class. Give a smaller stride, or leave it out for two thirds.",
        )

    def places(self, image: Tensor) -> list[Window]:
        """Return the windows of an image (C, height, width)."""
        return window_places((image.shape[1], image.shape[2]), self.crop, self.stride)


def window_places(size: Pair, crop: Pair, stride: Pair) -> list[Window]:
    """Return the windows that cover an image, row by row, all of one size.

    The last of each row and column are shifted back to the border. Where the image is smaller than the crop, so are the
    windows.

    Args:
        size: Height and width of the image.
        crop: Height and width of the window.
        stride: Pixels from one window to the next, down and to the right.
    """
    height, width = (min(sides) for sides in zip(size, crop, strict=True))
    tops, lefts = (_starts(*sides) for sides in zip(size, (height, width), stride, strict=True))
    return [Window(top, left, top + height, left + width) for top in tops for left in lefts]


def slide(model: Segmenter, image: Tensor, sliding: Sliding) -> Tensor:
    """Return the logits of an image at its size, (K, height, width), in float32.

    Args:
        model: In evaluation mode.
        image: Normalised, (C, height, width), of any size.
        sliding: How the window moves.

    Raises:
        NotFiniteError: A logit is not a finite number.
    """
    return SlidingLogits(model, image, sliding).rows(0, image.shape[1]).permute(2, 0, 1)


class SlidingLogits:
    """The logits of one image, row by row from the top.

    Windows run when rows they cover are asked for, and are forgotten when only rows below them are.

    Args:
        model: In evaluation mode. It stays as it is, whatever the size of its images.
        image: Normalised, (C, height, width).
        sliding: How the window moves.
    """

    def __init__(self, model: Segmenter, image: Tensor, sliding: Sliding) -> None:
        self.model = of_any_size(model)
        self.image = image
        self.size: Pair = (image.shape[1], image.shape[2])
        self.most = sliding.most
        self._waiting = sliding.places(image)
        self._held: list[tuple[Window, Tensor]] = []
        first = self._waiting[0]
        self._padded = _padded_size((first.bottom, first.right), model)
        self._down = _coverage({(one.top, one.bottom) for one in self._waiting}, image)
        self._across = _coverage({(one.left, one.right) for one in self._waiting}, image)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return rows of the logits, (bottom - top, width, K), in float32.

        Args:
            top: The first one, not above the one of the call before.
            bottom: The one behind the last.

        Raises:
            NotFiniteError: A logit is not a finite number.
        """
        self._held = [(window, logits) for window, logits in self._held if window.bottom > top]
        while self._waiting and self._waiting[0].top < bottom:
            self._run_next()
        total = self.image.new_zeros((bottom - top, self.size[1], self.model.num_classes), dtype=torch.float32)
        for window, logits in self._held:
            first, last = max(top, window.top), min(bottom, window.bottom)
            if first < last:
                rows = _resized(logits, self._padded, first - window.top, last - window.top)
                total[first - top : last - top, window.left : window.right] += rows[:, : window.right - window.left]
        return total.div_((self._down[top:bottom, None] * self._across)[:, :, None])

    def _run_next(self) -> None:
        windows, self._waiting = self._waiting[: self.most], self._waiting[self.most :]
        parts = torch.stack([self.image[:, one.top : one.bottom, one.left : one.right] for one in windows])
        (height, width), (to_height, to_width) = parts.shape[2:], self._padded
        parts = F.pad(parts, (0, to_width - width, 0, to_height - height))
        logits = self.model(parts.to(self.model.backbone.cls_token.dtype)).float()
        if not logits.isfinite().all():
            raise NotFiniteError(
                "Got logits that are not finite, of which no class can be chosen. Check the image and the weights, or "
                "take a precision of wider range, such as float32."
            )
        self._held += zip(windows, logits.permute(0, 2, 3, 1).contiguous(), strict=True)


def resize_rows(rows: Rows, source: Pair, target: Pair, top: int, bottom: int) -> Tensor:
    """Return rows of a map as it is when resized, (bottom - top, width, K), without resizing all of it.

    It is bilinear with corners not aligned, as `F.interpolate` is.

    Args:
        rows: The map before.
        source: Its height and width.
        target: Height and width of the resized map.
        top: The first row of the resized map that is wanted.
        bottom: The row behind the last.
    """
    if source == target:
        return rows(top, bottom)
    # In double precision, so that a row has the same weights in whatever part it is made.
    at = torch.arange(top, bottom, dtype=torch.float64).add_(0.5).mul_(source[0] / target[0]).sub_(0.5).clamp_(min=0)
    above = at.long()
    below = (above + 1).clamp_(max=source[0] - 1)
    first, last = int(above[0]), int(below[-1])
    known = rows(first, last + 1)
    above, below, share = (
        part.to(known.device) for part in (above - first, below - first, (at - above).to(known.dtype)[:, None, None])
    )
    narrow = torch.lerp(known.index_select(0, above), known.index_select(0, below), share)
    # The batch comes before the classes are moved, or else PyTorch does not see that they are the last in memory.
    batch, size = narrow[None].permute(0, 3, 1, 2), (bottom - top, target[1])
    return F.interpolate(batch, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def window_bytes(model: Segmenter, size: Pair) -> int:
    """Estimate the bytes that a forward pass takes for each window of this size, beside the weights.

    Args:
        model: The segmentation model.
        size: Height and width of the window.
    """
    height, width = _padded_size(size, model)
    config = model.backbone.config
    patches = height * width // math.prod(config.patch_size)
    values = _VALUES_OF_UPERNET if model.neck is not None else _VALUES_OF_LINEAR
    return patches * config.embed_dim * values * model.backbone.cls_token.element_size()


def of_any_size(model: Segmenter) -> Segmenter:
    """Return the model as one that takes images of any size that patches divide: its parameters, but not its config.

    Positions of another grid than the network's are fitted as in `Beit` with `dynamic_img_size`.
    """
    backbone = backbone_of_any_size(model.backbone)
    if backbone is model.backbone:
        return model
    result = _shallow_copy(model)
    result.backbone = backbone
    return result


def backbone_of_any_size(backbone: Beit) -> Beit:
    """Return a network as one that takes images of any size; see `of_any_size`."""
    if backbone.config.dynamic_img_size or backbone.config.dynamic_img_pad:
        return backbone
    result = _shallow_copy(backbone)
    result.patch_embed = _shallow_copy(backbone.patch_embed)
    result.config = result.patch_embed.config = replace(backbone.config, dynamic_img_size=True)
    return result


def _shallow_copy(module: Module) -> Module:
    """Return a module in which parts can be replaced without replacing them in the original."""
    result = copy.copy(module)
    result._modules = dict(module._modules)
    return result


def _starts(size: int, crop: int, stride: int) -> list[int]:
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [min(place * stride, size - crop) for place in range(count)]


def _coverage(spans: set[tuple[int, int]], image: Tensor) -> Tensor:
    """Say for each pixel of a side in how many spans it is."""
    counts = torch.zeros(max(end for _, end in spans))
    for start, end in spans:
        counts[start:end] += 1
    return counts.to(image.device)


def _padded_size(size: Pair, model: Segmenter) -> Pair:
    """Return the next size that patches divide; the neck needs two of them."""
    least = 1 if model.neck is None else 2
    height, width = (
        max(math.ceil(side / patch), least) * patch
        for side, patch in zip(size, model.backbone.config.patch_size, strict=True)
    )
    return height, width


def _resized(logits: Tensor, size: Pair, top: int, bottom: int) -> Tensor:
    source = (logits.shape[0], logits.shape[1])
    return resize_rows(lambda first, last: logits[first:last], source, size, top, bottom)
