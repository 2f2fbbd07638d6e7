"""Ways from an image file to tensors, timed beside those of timm and torchvision, and how their pixels differ."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beitzoo.images.augment import TwoViews, View
from beitzoo.images.fast import FastTransform, open_tensor
from beitzoo.images.files import open_image
from beitzoo.images.masks import Masking, draw_mask, sample_generator
from beitzoo.images.transforms import create_transform
from beitzoo.measure.options import DATA_MODEL, BenchmarkOptions
from beitzoo.measure.steps import CPU, ratio_columns, time_rounds
from beitzoo.results import Row
from beitzoo.zoo.pretrained import PRETRAINED

# Looks at each photograph in a turn where views are drawn: how much of it they show decides what they cost.
_LOOKS = 8
_LEVEL = 127.5  # from a value that is normalised by 0.5 and 0.5 to one of 255 levels

# A way from an image file to a tensor of values normalised by 0.5 and 0.5; the number is that of the look.
Way = Callable[[Path, int], Tensor]


@dataclass(frozen=True)
class Route:
    """A way from an image file to a tensor.

    Attributes:
        name: In the column `route`.
        beside: The route that its time and its pixels are compared with.
        looks: Times that it goes over each photograph.
    """

    name: str
    beside: str
    looks: int = 1


ROUTES = (
    Route("timm", "timm"),
    Route("exact", "timm"),
    Route("fast", "timm"),
    Route("fast from open_tensor", "timm"),
    Route("two views by torchvision", "two views by torchvision", _LOOKS),
    Route("two views and mask", "two views by torchvision", _LOOKS),
    Route("two views by torchvision, decoded", "two views by torchvision, decoded", _LOOKS),
    Route("two views and mask, decoded", "two views by torchvision, decoded", _LOOKS),
)


def measure_data(options: BenchmarkOptions) -> list[Row]:
    """Time each route with one thread, and compare its pixels with those of the route beside it."""
    torch.set_num_threads(1)
    images = options.images
    ways = dict(zip((route.name for route in ROUTES), [*_evaluation_ways(), *_view_ways(images)], strict=True))
    calls = {route.name: _for_all(ways[route.name], images, route.looks) for route in ROUTES}
    seconds = time_rounds(calls, options.num_bench_iter, CPU, options.seed)
    pixels = statistics.mean(math.prod(open_image(path).size) for path in images)
    rows = []
    for route in ROUTES:
        pairs = zip(calls[route.name](), calls[route.beside](), strict=True)
        levels = [(ours - theirs).abs() * _LEVEL for ours, theirs in pairs]
        rows.append(
            ratio_columns(seconds[route.beside], seconds[route.name])
            | {
                "images_per_sec": round(len(levels) / statistics.median(seconds[route.name]), 1),
                "max_difference": round(max(float(one.max()) for one in levels), 3),
                "mean_difference": round(statistics.mean(float(one.mean()) for one in levels), 4),
                "mean_pixels": round(pixels),
            }
        )
    return rows


def _evaluation_ways() -> list[Way]:
    from timm.data import create_transform as create_timm_transform

    data = PRETRAINED[DATA_MODEL].data
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    options = {name: getattr(data, name) for name in names}
    theirs, exact = create_timm_transform(**options), create_transform(**options)
    fast = FastTransform(exact, options)
    return [
        lambda path, _: theirs(open_image(path)),
        lambda path, _: exact(open_image(path)),
        lambda path, _: fast(open_image(path)),
        lambda path, _: fast(open_tensor(path)),
    ]


def _view_ways(images: Sequence[Path]) -> list[Way]:
    """Return the ways to the two views of pretraining, from files and from what is decoded already."""
    views, masking = TwoViews(), Masking()
    decoded = {path: open_image(path) for path in images}

    def theirs(image: Image.Image, look: int) -> Tensor:
        view = views.draw(*image.size, sample_generator(0, look, 0))
        return _stacked(*torchvision_views(image, views, view))

    def ours(image: Image.Image, look: int) -> Tensor:
        draw_mask(masking, sample_generator(0, look, 0, "mask"))
        return _stacked(*views(image, sample_generator(0, look, 0)))

    return [
        lambda path, look: theirs(open_image(path), look),
        lambda path, look: ours(open_image(path), look),
        lambda path, look: theirs(decoded[path], look),
        lambda path, look: ours(decoded[path], look),
    ]


def torchvision_views(image: Image.Image, views: TwoViews, view: View) -> tuple[Tensor, Tensor]:
    """Make both views by torchvision's functions alone, in the order of the originals' `transforms.py`."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    change = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "saturation": F.adjust_saturation}
    for name, factor in view.jitter:
        image = change[name](image, factor)
    left = image.width - view.left - view.width if view.flip else view.left
    image = F.hflip(image) if view.flip else image
    patch, token = (
        F.to_tensor(
            F.resized_crop(image, view.top, left, view.height, view.width, list(size), InterpolationMode(interpolation))
        )
        for size, interpolation in (
            (views.patch_size, views.patch_interpolation),
            (views.token_size, views.token_interpolation),
        )
    )
    return F.normalize(patch, list(views.mean), list(views.std)), token


def _stacked(patch_view: Tensor, token_view: Tensor) -> Tensor:
    """Return both views as one tensor, the second in the range of the first."""
    return torch.cat([patch_view.flatten(), 2 * token_view.flatten() - 1])


def _for_all(way: Way, images: Sequence[Path], looks: int) -> Callable[[], list[Tensor]]:
    return lambda: [way(path, look) for path in images for look in range(looks)]
