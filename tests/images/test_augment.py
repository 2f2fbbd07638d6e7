"""Both views show the same part of the image, drawn, cut and resized as by torchvision's transforms."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from beitzoo.images.augment import COLOURS, TwoViews, View
from beitzoo.images.masks import sample_generator


def photograph(mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((120, 90), Image.Resampling.BICUBIC).convert(mode)


def reference(image: Image.Image, views: TwoViews, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a view by torchvision alone, in the original's order."""
    change = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "saturation": F.adjust_saturation}
    for name, factor in view.jitter:
        image = change[name](image, factor)
    left = image.width - view.left - view.width if view.flip else view.left
    image = F.hflip(image) if view.flip else image
    box = view.top, left, view.height, view.width
    patch = F.to_tensor(F.resized_crop(image, *box, list(views.patch_size), InterpolationMode.BICUBIC))
    token = F.to_tensor(F.resized_crop(image, *box, list(views.token_size), InterpolationMode.LANCZOS))
    channels = len(patch)
    return F.normalize(patch, list(views.mean[:channels]), list(views.std[:channels])), token


@pytest.mark.parametrize("name", ["chelsea.jpg", "coffee.jpg"])
def test_views_of_photographs_are_torchvisions_to_a_level(name: str) -> None:
    image = Image.open(files("beitzoo") / "assets/samples" / name)
    views, differences = TwoViews(mean=(0.1, 0.2, 0.3)), []
    for sample in range(8):
        view = views.draw(*image.size, sample_generator(0, 0, sample))
        ours, theirs = views.apply(image, view), reference(image, views, view)
        for one, other, level in zip(ours, theirs, (2 / 255, 1 / 255), strict=True):
            assert one.shape == other.shape and one.std() > 0.02
            differences.append(((one - other).abs() / level).flatten())
        assert torch.equal(views.apply_patch(image, view), ours[0])
        assert torch.equal(views.apply_token(image, view), ours[1])
    levels = torch.cat(differences).round()
    assert (levels > 0).float().mean() < 0.05
    assert (levels > 1).float().mean() < 0.001
    assert levels.max() <= 20


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_without_resizing_views_are_torchvisions(mode: str) -> None:
    image, jitter = photograph(mode), list(itertools.permutations(zip(COLOURS, (1.3, 0.7, 1.4), strict=True)))
    for number, changes in enumerate(jitter):
        view = View(10, 20, 64, 48, flip=number % 2 == 1, jitter=changes)
        views = TwoViews(patch_size=(64, 48), token_size=(64, 48), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
        if mode == "L":
            views = replace(views, mean=(0.4,), std=(0.2,))
        for ours, theirs in zip(views.apply(image, view), reference(image, views, view), strict=True):
            assert torch.allclose(ours, theirs, atol=2e-6)


def test_digits_of_eight_pixels_are_cropped_and_resized() -> None:
    image = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))
    views = TwoViews(patch_size=(32, 32), token_size=(32, 32), token_interpolation="bicubic")
    patch_view, token_view = views(image, random.Random(0))
    assert patch_view.shape == token_view.shape == (1, 32, 32)
    assert torch.allclose(patch_view * 0.5 + 0.5, token_view, atol=1e-6)


def test_crop_boxes_are_distributed_as_torchvisions() -> None:
    views, width, height, count = TwoViews(scale=(0.2, 1.0)), 120, 90, 4000
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    drawn = [views.draw(width, height, sample_generator(1, 0, sample)) for sample in range(count)]
    ours = np.array([(view.top, view.left, view.height, view.width) for view in drawn])
    for a, b in ((ours, theirs), (features(ours), features(theirs))):
        error = np.sqrt(a.var(0) / count + b.var(0) / count)
        assert (abs(a.mean(0) - b.mean(0)) < 4 * error).all()
        assert np.allclose(a.std(0), b.std(0), rtol=0.06)
    assert abs(np.mean([view.flip for view in drawn]) - 0.5) < 4 * 0.5 / math.sqrt(count)


def features(boxes: np.ndarray) -> np.ndarray:
    _, _, height, width = boxes.T
    return np.stack([height * width, np.log(width / height)], axis=1)


@pytest.mark.parametrize("size", [(100, 3), (3, 100), (1, 1), (30, 40)])
def test_where_no_box_fits_the_middle_is_taken_as_by_torchvision(size: tuple[int, int]) -> None:
    views = TwoViews(scale=(40.0, 50.0))
    top, left, height, width = RandomResizedCrop.get_params(Image.new("L", size), [40.0, 50.0], [3 / 4, 4 / 3])
    view = views.draw(*size, random.Random(0))
    assert (view.top, view.left, view.height, view.width) == (top, left, height, width)


def test_jitter_is_distributed_as_torchvisions() -> None:
    count = 4000
    drawn = [TwoViews(jitter=0.3).draw(50, 50, sample_generator(0, 1, sample)).jitter for sample in range(count)]
    orders = Counter(tuple(name for name, _ in jitter) for jitter in drawn)
    assert len(orders) == 6 and all(abs(n - count / 6) < 4 * math.sqrt(count / 6) for n in orders.values())
    bounds = ColorJitter(0.3, 0.3, 0.3).brightness
    for name in COLOURS:
        factors = [dict(jitter)[name] for jitter in drawn]
        assert bounds[0] <= min(factors) < 0.701 and 1.299 < max(factors) <= bounds[1]
        assert abs(np.mean(factors) - 1) < 4 * 0.6 / math.sqrt(12 * count)
    assert min(factor for _, factor in TwoViews(jitter=3.0).draw(9, 9, random.Random(0)).jitter) >= 0
    assert TwoViews(jitter=0.0).draw(9, 9, random.Random(0)).jitter == ()


def test_views_are_a_function_of_the_generator() -> None:
    views, image = TwoViews(), photograph()
    first, second = (views(image, sample_generator(3, 5, 7)) for _ in range(2))
    assert first[0].shape == (3, 224, 224) and first[1].shape == (3, 112, 112)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], views(image, sample_generator(3, 6, 7))[0])


@pytest.mark.parametrize(
    "field",
    [{"scale": (1.0, 0.5)}, {"ratio": (0.0, 1.0)}, {"jitter": -1.0}, {"std": (0.0,)}, {"patch_interpolation": "box"}],
)
def test_values_that_cannot_be_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        TwoViews(**field)
