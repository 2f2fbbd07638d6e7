"""From images to the class of each of their pixels, by a sliding window or whole, at one scale or several.

As mmsegmentation tests, by which the originals are measured: an image is resized, a window is moved over it, logits are
resized to the image. With several scales or flips the probabilities are averaged. `BEiT/semantic_segmentation` and
`mmseg/models/segmentors/encoder_decoder.py`.

Shapes: B images, C channels, K classes, height and width of an image or of what it was resized to.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.errors import check
from beitzoo.images.files import as_image
from beitzoo.images.transforms import prepare, resolve_data_config
from beitzoo.inference.classify import NOT_FINITE, eval_mode
from beitzoo.inference.fastest import WINDOWS, count_ahead, for_many_images
from beitzoo.inference.pipeline import Failure, Fitting, Loading, PartsJob, one_or_many, run_jobs
from beitzoo.models.segmentation import Segmenter
from beitzoo.models.windows import NotFiniteError, Sliding, SlidingLogits, resize_rows, window_bytes
from beitzoo.zoo.networks import Pair

Mode = Literal["slide", "whole"]

_LONGEST = 4  # times the short side, as 2048 x 512 of the original
_MOST_CLASSES = 255  # the last number of a uint8 is a pixel of no class
# Logits at the size of an image are made in bands of rows, of which there are several copies at a time: averaged,
# resized, as probabilities. On a CPU, bands of 128 MiB take twice as long as those of 16.
_BANDS_IN_BUDGET = 8
_MOST_BAND_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """How a segmentation model looks at an image. The defaults are how the originals are measured at a single scale.

    Attributes:
        mode: Window by window, or the whole image at once, whose attention takes memory by the square of its pixels.
        crop: Side of the window in pixels; the network's size if None.
        stride: Pixels from one window to the next; two thirds of the crop if None.
        short_side: The shorter side that images are resized to. If None it is the network's, and the longer side is
            at most 4 times that, as 2048 x 512 in the original; 0 leaves images as they are.
        scales: Factors of that size, whose probabilities are averaged. With others than 1 the short side is never
            smaller than the window, as in the original, whose scales are 0.5 to 1.75 by steps of 0.25.
        flip: Look at the mirrored image too.
        budget: Bytes for windows in a forward pass and for logits at the size of the image, beside the model; one
            window and one row are always taken. It changes the speed and not the result. What is kept of windows until
            their rows are complete comes on top: at each scale and flip two to three rows of windows, of a sixteenth
            of their pixels.
    """

    mode: Mode = "slide"
    crop: int | None = None
    stride: int | None = None
    short_side: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    budget: int = 1 << 30

    def __post_init__(self) -> None:
        check(self.mode in get_args(Mode), f"mode={self.mode!r}; there are {' and '.join(map(repr, get_args(Mode)))}.")
        for name, least in (("crop", 1), ("stride", 1), ("short_side", 0), ("budget", 1)):
            number = getattr(self, name)
            check(
                number is None or number >= least,
                f"{name} is {number}; it can be {least} or more. Leave it out for the default.",
            )
        check(
            bool(self.scales) and all(scale > 0 and math.isfinite(scale) for scale in self.scales),
            f"scales={self.scales}; they must be positive numbers, such as (0.5, 1.0, 1.5). Leave them out for one.",
        )


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The classes of the pixels of one image, or the reason why there are none.

    Attributes:
        path: The image; None if it was given as pixels.
        labels: Classes by number, in the order of the logits, uint8 (height, width) of the upright image; None if
            there are none.
        error: Why there are none, or None.
    """

    path: Path | None
    labels: np.ndarray | None
    error: str | None = None


@dataclass(frozen=True)
class ScaledImage:
    """An image as a segmentation model looks at it.

    Attributes:
        size: Height and width of the image itself, upright.
        pixels: At each scale, uint8 (C, height, width).
    """

    size: Pair
    pixels: tuple[Tensor, ...]


@dataclass(frozen=True)
class ScaledView:
    """How images are resized for a segmentation model.

    Attributes:
        in_chans: 1 for grey, 3 for RGB.
        short_side: The shorter side; 0 for the image's own.
        least: Short side below which scales do not go.
        scales: Factors.
        interpolation: Filter of the resize.
    """

    in_chans: int
    short_side: int
    least: int
    scales: tuple[float, ...]
    interpolation: str

    def transform(self) -> Callable[[Image], ScaledImage]:
        """Return what resizes an image."""
        return self._scaled

    def _scaled(self, image: Image) -> ScaledImage:
        size = (image.height, image.width)
        sizes = [self.size_at(size, scale) for scale in self.scales]
        return ScaledImage(size, tuple(self._pixels(image, one) for one in sizes))

    def size_at(self, size: Pair, scale: float) -> Pair:
        """Return height and width to which an image of this size is resized at a scale."""
        short, long = sorted(size)
        side = self.short_side or short
        wanted = side * scale
        if self.scales != (1.0,):
            wanted = max(wanted, min(self.least, side))
        factor = wanted / short
        if self.short_side:
            factor = min(factor, _LONGEST * wanted / long)
        height, width = (max(int(one * factor + 0.5), 1) for one in size)
        return height, width

    def _pixels(self, image: Image, size: Pair) -> Tensor:
        filtered = Resampling[self.interpolation.upper()]
        resized = image if (image.height, image.width) == size else image.resize(size[::-1], filtered)
        pixels = torch.from_numpy(np.array(resized))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def segment(
    model: Segmenter, images: Any, options: SegmentOptions | None = None, *, workers: int = 2, optimize: bool = True
) -> list[Segmentation]:
    """Segment images: return for each a map of the classes of its pixels, in order.

    An image that cannot be read is a segmentation with an error. All are made before this returns; `segment_each`
    makes them one by one, for more images than fit into memory.

    Args:
        model: A `Segmenter` or its inference copy (`optimize`). Its training mode is as before when this returns.
        images: Paths (str or Path), PIL images, arrays (height, width, channels) of uint8 or tensors (channels, height,
            width) of uint8, of any sizes, or one of these. They are resized and normalised as the model expects.
        options: How the model looks at images.
        workers: Threads that decode and resize images ahead.
        optimize: On a CPU, let an inference copy compute more than a handful of images, as `for_many_images` chooses;
            the model stays as it is.

    Raises:
        InvalidValueError: The model tells no classes of pixels apart, has more than 255 of them, or takes images that
            are not in files; or the stride is larger than the window.
        InvalidOptionError: An image is none of these.
        OutOfMemoryError: A single window does not fit beside the model.
    """
    images = one_or_many(images)
    if optimize and isinstance(model, Segmenter):
        count, images = count_ahead(images)
        model = for_many_images(model, count, WINDOWS)
    return list(segment_each(model, images, options, workers=workers))


def segment_each(
    model: Segmenter, images: Iterable[Any], options: SegmentOptions | None = None, *, workers: int = 2
) -> Iterator[Segmentation]:
    """Segment images one by one, as `segment`, of any number of images in constant memory.

    Args:
        model: A `Segmenter`.
        images: Read as needed, so they may come from a pipe.
        options: How the model looks at images.
        workers: Threads that decode and resize as many images ahead.
    """
    job = segmentation(model, options)
    return _segmentations(model, job, images, Loading(workers, workers))


def _segmentations(
    model: Segmenter, job: PartsJob[Tensor], images: Iterable[Any], loading: Loading
) -> Iterator[Segmentation]:
    with eval_mode([model]):
        for image, (outcome,) in run_jobs(images, [job], loading):
            path = Path(image) if isinstance(image, str | Path) else None
            if isinstance(outcome, Failure):
                yield Segmentation(path, None, outcome.reason)
            else:
                yield Segmentation(path, outcome.numpy(force=True))


def segmentation(model: Segmenter, options: SegmentOptions | None = None, name: str = "This model") -> PartsJob[Tensor]:
    """Make the job of a segmentation model: from an image to its label map, on the model's device.

    A label map is uint8 (height, width). An image whose logits are not finite is a failure. Evaluation mode is up to
    the caller (`eval_mode`).

    Args:
        model: The segmentation model.
        options: How it looks at images.
        name: What errors call it.

    Raises:
        InvalidValueError: As `segment`.
    """
    options = options or SegmentOptions()
    check_segmenter(model, name)
    work = _Labelling(model, options)

    def run(image: ScaledImage, most: int) -> Tensor | Failure:
        try:
            return work.labels(image, most)
        except NotFiniteError:
            return Failure(NOT_FINITE)

    return PartsJob(work.view, run, work.count, work.most, work.part, work.advice)


def label_pixels(model: Segmenter, image: Any, options: SegmentOptions | None = None) -> Tensor:
    """Return the class of each pixel of one image, uint8 (height, width), on the model's device.

    Args:
        model: The segmentation model; its training mode is kept.
        image: A path, a PIL image, or pixels as `segment` takes them.
        options: How the model looks at it.

    Raises:
        ImageError: The image cannot be read.
        NotFiniteError: The model's logits are not finite.
        InvalidValueError: As `segment`.
    """
    options = options or SegmentOptions()
    check_segmenter(model, "This model")
    work = _Labelling(model, options)
    scaled = prepare(as_image(image, work.view.in_chans), work.view.transform())
    with eval_mode([model]), torch.inference_mode():
        return Fitting(work.part, work.most, work.advice).run(
            lambda most: work.labels(scaled, most), work.count(scaled)
        )


def check_segmenter(model: nn.Module, name: str) -> None:
    """Refuse a network that does not name pixels, or not so that a label map holds them.

    Raises:
        InvalidValueError: It is no `Segmenter`, has too many classes, or takes images that are not in files.
    """
    check(
        isinstance(model, Segmenter),
        f"{name} is a {type(model).__name__}, which names no pixels; create one by the name of a segmentation model, "
        'or of any other with head="segment" and num_classes=N.',
    )
    assert isinstance(model, Segmenter)
    classes, channels = model.num_classes, model.backbone.in_chans
    check(
        classes <= _MOST_CLASSES,
        f"{name} has {classes} classes; a label map has bytes, of which {_MOST_CLASSES} stand for classes and the last "
        "for none. Take fewer classes, or the logits of beitzoo.models.windows.slide.",
    )
    check(channels in (1, 3), f"{name} takes {channels} channels; image files have 1 (grey) or 3 (RGB).")


def post_process(logits: Tensor, target_sizes: Sequence[Pair] | Tensor | None = None) -> list[Tensor]:
    """Turn logits into label maps as transformers' `BeitImageProcessor.post_process_semantic_segmentation` does.

    It takes memory for all logits at the size of an image; `label_pixels` does not.

    Args:
        logits: (B, K, h, w), as a `Segmenter` gives them.
        target_sizes: Height and width of each image, to which logits are resized before the class is chosen; if None,
            label maps are of the size of the logits.

    Returns:
        Of each image the classes by number, int64 (height, width).

    Raises:
        InvalidValueError: There are not as many sizes as images.
    """
    if target_sizes is None:
        return list(logits.argmax(dim=1))
    sizes = [(int(height), int(width)) for height, width in target_sizes]
    check(
        len(sizes) == len(logits),
        f"Got logits of {len(logits)} images and {len(sizes)} target sizes; give one (height, width) for each image.",
    )
    return [
        F.interpolate(one[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
        for one, size in zip(logits, sizes, strict=True)
    ]


class _Labelling:
    """How one model labels images: what is the same for all of them.

    Attributes:
        view: How images are resized.
        most: Windows in a forward pass.
        part: What errors call what is in a forward pass.
        advice: What to do where that does not fit into memory.
    """

    def __init__(self, model: Segmenter, options: SegmentOptions) -> None:
        data = resolve_data_config(model)
        height, width = model.backbone.config.img_size if options.crop is None else (options.crop, options.crop)
        stride = (height * 2 // 3, width * 2 // 3) if options.stride is None else (options.stride, options.stride)
        self.model = model
        self.options = options
        self.sliding = Sliding((height, width), (max(stride[0], 1), max(stride[1], 1)))
        if options.mode == "slide":
            self.most = max(options.budget // window_bytes(model, (height, width)), 1)
            self.part, self.advice = "window", "take a smaller model, a smaller crop or another device"
        else:
            self.most = 1
            self.part, self.advice = "whole image", 'take mode="slide", a smaller short side or another device'
        side = min(model.backbone.config.img_size) if options.short_side is None else options.short_side
        self.view = ScaledView(model.backbone.in_chans, side, min(height, width), options.scales, data["interpolation"])
        device = model.backbone.cls_token.device
        self.mean, self.std = (torch.tensor(data[name], device=device)[:, None, None] for name in ("mean", "std"))

    def count(self, image: ScaledImage) -> int:
        """Return the windows of an image at the scale that has most of them."""
        return max(len(self._sliding(one).places(one)) for one in image.pixels)

    def labels(self, image: ScaledImage, most: int) -> Tensor:
        """Return the label map of an image, uint8 (height, width), with so many windows in a forward pass."""
        flips = (False, True) if self.options.flip else (False,)
        views = [(self._logits(one, flip, most), flip) for one in image.pixels for flip in flips]
        height, width = image.size
        result = self.mean.new_empty(image.size, dtype=torch.uint8)
        pixels = max(height * width, *(math.prod(view.size) for view, _ in views))
        row_bytes = 4 * self.model.num_classes * pixels / height
        step = max(int(min(self.options.budget / _BANDS_IN_BUDGET, _MOST_BAND_BYTES) / row_bytes), 1)
        for top in range(0, height, step):
            bottom = min(top + step, height)
            result[top:bottom] = self._scores(views, image.size, (top, bottom)).argmax(dim=2)
        return result

    def _logits(self, pixels: Tensor, flip: bool, most: int) -> SlidingLogits:
        normalised = pixels.to(self.mean.device).float().div_(255).sub_(self.mean).div_(self.std)
        sliding = replace(self._sliding(pixels), most=most)
        return SlidingLogits(self.model, normalised.flip(2) if flip else normalised, sliding)

    def _sliding(self, pixels: Tensor) -> Sliding:
        if self.options.mode == "slide":
            return self.sliding
        size = (pixels.shape[1], pixels.shape[2])
        return Sliding(size, size)

    def _scores(self, views: Sequence[tuple[SlidingLogits, bool]], size: Pair, band: Pair) -> Tensor:
        """Return rows of the logits, (rows, width, K), or of the sum of probabilities if there are several views."""
        total = torch.zeros((), device=self.mean.device)
        for view, flip in views:
            scores = resize_rows(view.rows, view.size, size, *band)
            if len(views) == 1:
                return scores
            probabilities = scores.softmax(dim=2)
            total = total + (probabilities.flip(1) if flip else probabilities)
        return total
