"""Image and mask are augmented together as mmsegmentation does it; compared with its steps written out one by one."""

import colorsys
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from beitzoo.errors import InvalidValueError
from beitzoo.images.augment_pixels import Distortion, PixelView, PixelViews
from beitzoo.images.label_maps import IGNORE
from beitzoo.images.masks import sample_generator
from beitzoo.zoo.checkpoints import IMAGENET_MEAN, IMAGENET_STD

VIEWS = PixelViews(size=(24, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD)
RAW = replace(VIEWS, mean=(0.0,) * 3, std=(1 / 255,) * 3)  # what comes out are levels


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def mask(width: int, height: int) -> np.ndarray:
    """Blocks of classes of numbers that are far apart, some of them of no class."""
    coarse = np.random.default_rng(1).choice([0, 40, 149, IGNORE], (height // 6 + 1, width // 6 + 1))
    return np.kron(coarse, np.ones((6, 6), dtype=int))[:height, :width].astype(np.uint8)


def draws(views: PixelViews, labels: np.ndarray, count: int) -> list[PixelView]:
    return [views.draw(labels, sample_generator(0, 0, sample)) for sample in range(count)]


# ---- one view, against its description --------------------------------------------------------------------------


def slow_labels(labels: np.ndarray, views: PixelViews, view: PixelView) -> np.ndarray:
    """Resize the whole mask pixel by pixel, each with the label at its centre; crop, mirror and pad it."""
    height, width = view.scaled
    whole = [
        [
            labels[
                math.floor(Fraction(2 * y + 1, 2 * height) * labels.shape[0]),
                math.floor(Fraction(2 * x + 1, 2 * width) * labels.shape[1]),
            ]
            for x in range(width)
        ]
        for y in range(height)
    ]
    crop = np.array(whole)[view.top : view.top + views.size[0], view.left : view.left + views.size[1]]
    crop = np.fliplr(crop) if view.flip else crop
    padded = np.full(views.size, IGNORE)
    padded[: crop.shape[0], : crop.shape[1]] = crop
    return padded


def slow_levels(image: Image.Image, views: PixelViews, view: PixelView) -> np.ndarray:
    """Resize the whole image, crop, mirror and pad it."""
    whole = np.array(image.resize(view.scaled[::-1], Image.Resampling.BILINEAR))
    crop = whole[view.top : view.top + views.size[0], view.left : view.left + views.size[1]]
    crop = np.fliplr(crop) if view.flip else crop
    padded = np.zeros((*views.size, *crop.shape[2:]))
    padded[: crop.shape[0], : crop.shape[1]] = crop
    return padded


@pytest.mark.parametrize("size", [(50, 37), (33, 90), (20, 20), (200, 7)], ids=str)
def test_a_view_is_a_crop_of_the_resized_image_and_mask(size: tuple[int, int]) -> None:
    image, labels = photograph(*size), mask(*size)
    views = replace(RAW, distort=False)
    for view in draws(views, labels, 12):
        levels, classes = views.apply(image, labels, view)
        assert (levels.dtype, classes.dtype) == (torch.float32, torch.int64)
        assert (levels.shape, classes.shape) == ((3, 24, 32), (24, 32))
        np.testing.assert_array_equal(classes, slow_labels(labels, views, view))
        np.testing.assert_allclose(levels.permute(1, 2, 0), slow_levels(image, views, view), atol=1.001)


def test_padding_is_zero_after_normalisation_and_of_no_class() -> None:
    view = PixelView(scaled=(10, 40), top=0, left=4)
    levels, classes = VIEWS.apply(Image.new("RGB", (80, 20), (255, 0, 51)), np.ones((20, 80), np.uint8), view)
    assert torch.equal(levels[:, 10:], torch.zeros(3, 14, 32))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(levels[:, :10], expected[:, None, None].expand(3, 10, 32))
    assert torch.equal(classes, torch.tensor([1] * 10 + [IGNORE] * 14)[:, None].expand(24, 32))


def test_image_and_mask_stay_aligned() -> None:
    """An image whose colour says the class: away from borders, where colours mix, both must agree."""
    labels = np.kron(np.random.default_rng(2).integers(0, 5, (4, 6)), np.ones((40, 40), int)).astype(np.uint8)
    image = Image.fromarray(labels * 50)
    views = PixelViews(size=(96, 128), mean=(0.0,), std=(50 / 255,), distort=False)
    agreeing = []
    for view in draws(views, labels, 30):
        levels, classes = views.apply(image, labels, view)
        inside = classes != IGNORE
        agreeing.append((levels[0].round() == classes)[inside].double().mean())
        assert (levels[0] == 0)[~inside].all()
    assert min(agreeing) > 0.9
    # Of an image as it is, all of it.
    levels, classes = views.apply(image, labels, PixelView((160, 240), 33, 71, flip=True))
    assert torch.equal(levels[0], classes.float())
    np.testing.assert_array_equal(classes, labels[33:129, 71:199][:, ::-1])


def test_a_mask_has_no_other_class_than_before() -> None:
    labels = mask(61, 47)
    seen = Counter[int]()
    for view in draws(VIEWS, labels, 40):
        seen.update(VIEWS.apply(photograph(61, 47), labels, view)[1].flatten().tolist())
    assert seen.keys() == set(np.unique(labels))


def test_grey_images_have_no_colour_to_change() -> None:
    image, labels = photograph(50, 40, "L"), mask(50, 40)
    views = PixelViews(size=(24, 32), mean=(0.0,), std=(1 / 255,))
    view = PixelView((48, 60), 3, 5)
    plain, _ = views.apply(image, labels, view)
    assert plain.shape == (1, 24, 32)
    coloured, _ = views.apply(image, labels, replace(view, distortion=Distortion(saturation=0.5, hue=30)))
    assert torch.equal(coloured, plain)
    brighter, _ = views.apply(image, labels, replace(view, distortion=Distortion(brightness=20.5)))
    assert torch.equal(brighter, (plain + 20).clamp(max=255))


# ---- photometric distortion -------------------------------------------------------------------------------------


def slow_colour(pixel: np.ndarray, distortion: Distortion) -> list[float]:
    """Change one pixel step by step, in the original's order, without rounding."""

    def contrast(levels: list[float]) -> list[float]:
        return [min(max(level * distortion.contrast, 0.0), 255.0) for level in levels]

    levels = [min(max(float(level) + distortion.brightness, 0.0), 255.0) for level in pixel]
    levels = contrast(levels) if distortion.contrast_first else levels
    hue, saturation, value = colorsys.rgb_to_hsv(*levels)
    saturation = min(saturation * distortion.saturation, 1.0)
    levels = list(colorsys.hsv_to_rgb((hue + distortion.hue / 360) % 1, saturation, value))
    return levels if distortion.contrast_first else contrast(levels)


@pytest.mark.parametrize(
    "distortion",
    [
        Distortion(),
        Distortion(brightness=-31.7),
        Distortion(contrast=1.49),
        Distortion(saturation=0.5),
        Distortion(saturation=1.5),
        Distortion(hue=34),
        Distortion(hue=-36),
        Distortion(brightness=30, contrast=0.5, saturation=1.3, hue=10),
        Distortion(brightness=30, contrast=1.4, contrast_first=False, saturation=0.6, hue=-20),
    ],
    ids=str,
)
def test_colours_change_as_described(distortion: Distortion) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    changed = np.array(distortion.apply(Image.fromarray(pixels))).astype(float)
    expected = [[slow_colour(pixel, distortion) for pixel in row] for row in pixels]
    difference = np.abs(changed - expected)
    hsv = distortion.hue or distortion.saturation != 1  # a step of hue is 6 levels where colours are strong
    assert difference.max() < (10 if hsv else 2.5)
    assert difference.mean() < (2 if hsv else 1.2)
    if distortion == Distortion():
        np.testing.assert_array_equal(changed, pixels)


def test_order_of_contrast_matters() -> None:
    """Cut off at 255 first, or after the colours have changed."""
    image = Image.new("RGB", (1, 1), (240, 200, 40))
    blues = [
        Distortion(contrast=1.5, contrast_first=first, saturation=0.5).apply(image).getpixel((0, 0))[2]
        for first in (True, False)
    ]
    np.testing.assert_allclose(blues, [255 - (255 - 60) / 2, 1.5 * (240 - (240 - 40) / 2)], atol=2)


# ---- what is drawn ----------------------------------------------------------------------------------------------


def test_a_view_is_a_pure_function_of_its_generator() -> None:
    image, labels = photograph(50, 40), mask(50, 40)
    one, other, third = (VIEWS.draw_and_apply(image, labels, sample_generator(7, epoch, 3)) for epoch in (1, 1, 2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not torch.equal(one[0], third[0])
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(VIEWS.draw_and_apply(image, labels, sample_generator(7, 1, 3))[0], one[0])


def test_sizes_are_the_originals() -> None:
    """`mmcv.imrescale` to (2048, 512) times a factor: the shorter side decides, but for images longer than 4 to 1."""
    views = PixelViews(size=(512, 512), mean=(0.5,), std=(0.5,), ratio=(1, 1), max_share=1, distort=False)

    def scaled(height: int, width: int, views: PixelViews = views) -> tuple[int, int]:
        return views.draw(np.zeros((height, width), np.uint8), random.Random(0)).scaled

    assert scaled(512, 683) == (512, 683)
    assert scaled(683, 512) == (683, 512)
    assert scaled(1000, 1500) == (512, 768)
    assert scaled(100, 1000) == (205, 2048)
    assert scaled(1, 10_000) == (1, 2048)
    assert scaled(512, 683, replace(views, ratio=(0.5, 0.5))) == (256, 342)
    assert scaled(500, 500, replace(views, fit=(300, 200))) == (200, 200)
    assert scaled(500, 500, replace(views, size=(640, 640))) == (640, 640)


def test_draws_are_spread_as_described() -> None:
    labels = mask(64, 48)
    views = PixelViews(size=(48, 48), fit=(192, 48), mean=(0.5,), std=(0.5,))
    drawn = draws(views, labels, 4000)
    factors = np.array([view.scaled[0] / 48 for view in drawn])
    np.testing.assert_allclose(np.quantile(factors, [0, 0.25, 0.5, 0.75, 1]), [0.5, 0.875, 1.25, 1.625, 2], atol=0.05)
    halves = {
        "flip": [view.flip for view in drawn],
        "brightness": [view.distortion.brightness != 0 for view in drawn],
        "contrast": [view.distortion.contrast != 1 for view in drawn],
        "contrast_first": [view.distortion.contrast_first for view in drawn],
        "saturation": [view.distortion.saturation != 1 for view in drawn],
    }
    assert {name: round(np.mean(values), 1) for name, values in halves.items()} == dict.fromkeys(halves, 0.5)
    assert abs(np.mean([view.distortion.hue != 0 for view in drawn]) - 0.5 * 35 / 36) < 0.03
    assert {view.distortion.hue for view in drawn} == set(range(-36, 36, 2))
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5)):
        values = [getattr(view.distortion, name) for view in drawn]
        changed = [value for value in values if value != getattr(Distortion(), name)]
        np.testing.assert_allclose([min(changed), max(changed)], [low, high], atol=(high - low) / 100)
    # Corners are spread evenly over the places there are, both ends included.
    places = np.array(
        [[view.top / (view.scaled[0] - 48), view.left / (view.scaled[1] - 48)] for view in drawn if view.scaled[0] > 60]
    )
    np.testing.assert_allclose(places.mean(axis=0), 0.5, atol=0.03)
    assert (places.min(), places.max()) == (0, 1)
    assert all(view.top == 0 for view in drawn if view.scaled[0] <= 48)
    assert all(view.distortion == Distortion() for view in draws(replace(views, distort=False), labels, 20))


def shares(labels: np.ndarray) -> list[float]:
    """The share of each class among the labelled pixels, largest first."""
    counts = Counter(labels[labels != IGNORE].tolist())
    return sorted((count / counts.total() for count in counts.values()), reverse=True)


def test_crops_of_one_class_are_drawn_again() -> None:
    """Of a mask with one class on the left and two on the right, hardly a crop shows one class alone."""
    labels = np.zeros((100, 400), np.uint8)
    labels[:50, 250:], labels[:, 240:250] = 1, IGNORE
    views = PixelViews(size=(50, 50), fit=(400, 100), ratio=(1, 1), mean=(0.5,), std=(0.5,))

    def share_of_varied(views: PixelViews) -> float:
        crops = [labels[v.top : v.top + 50, v.left : v.left + 50] for v in draws(views, labels, 300)]
        return float(np.mean([len(found := shares(crop)) > 1 and found[0] < 0.75 for crop in crops]))

    alone = share_of_varied(replace(views, max_share=1.0))
    assert 0.1 < alone < 0.4
    assert share_of_varied(views) == pytest.approx(1 - (1 - alone) ** 11, abs=0.03)


def test_a_share_is_of_the_labelled_pixels_and_below_the_bound() -> None:
    labels = np.full((8, 8), IGNORE, np.uint8)
    labels[0, :3], labels[0, 3] = 5, 9  # 3 to 1
    views = PixelViews(size=(8, 8), fit=(8, 8), ratio=(1, 1), mean=(0.5,), std=(0.5,))

    class Counted(random.Random):
        corners = 0

        def randint(self, a: int, b: int) -> int:
            self.corners += 1
            return super().randint(a, b)

    def tries(labels: np.ndarray, max_share: float) -> int:
        generator = Counted(0)
        replace(views, max_share=max_share, distort=False).draw(labels, generator)
        return generator.corners // 2

    assert tries(labels, 0.76) == 1
    assert tries(labels, 0.75) == 11  # it must be smaller; the last one is taken as it is
    assert tries(np.where(labels == 9, 5, labels), 0.99) == 11  # one class
    assert tries(np.full((8, 8), IGNORE, np.uint8), 0.99) == 11  # none
    assert tries(np.full((8, 8), IGNORE, np.uint8), 1.0) == 1


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": (0, 1)}, "ratio=.0, 1.; give a range of positive numbers"),
        ({"ratio": (2, 1)}, "ratio=.2, 1."),
        ({"size": (0, 4)}, "size=.0, 4."),
        ({"fit": (0, 4)}, "fit=.0, 4."),
        ({"max_share": 0}, "max_share=0"),
        ({"std": (1, 0, 1)}, "std="),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        replace(VIEWS, **fields)


def test_the_mask_of_another_image_is_refused() -> None:
    view = PixelView((24, 32), 0, 0)
    with pytest.raises(InvalidValueError, match="The image has 50 x 40 pixels, and its mask 40 x 50"):
        VIEWS.apply(photograph(50, 40), mask(40, 50), view)
    with pytest.raises(InvalidValueError, match="The image has 1 channels, mean 3 and std 3"):
        VIEWS.apply(photograph(50, 40, "L"), mask(50, 40), view)
