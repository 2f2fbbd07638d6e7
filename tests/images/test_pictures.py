"""Pictures: what is where, in which colour."""

import numpy as np
import pytest
from PIL import Image

from beitzoo.images import pictures


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def test_images_are_put_together_without_a_change() -> None:
    one, other = noise(5, 7), noise(4, 3)
    row = pixels(pictures.beside([one, other], gap=2))
    assert row.shape == (7, 11, 3)
    assert (row[:, :5] == pixels(one)).all() and (row[:3, 7:] == pixels(other)).all()
    assert (row[:, 5:7] == 255).all() and (row[3:, 7:] == 255).all()
    column = pixels(pictures.stack([one, other], gap=2))
    assert column.shape == (12, 5, 3)
    assert (column[:7] == pixels(one)).all() and (column[9:, :4] == pixels(other)).all()
    assert (column[7:9] == 255).all() and (column[9:, 4:] == 255).all()
    assert (pixels(pictures.framed(one, 3))[3:-3, 3:-3] == pixels(one)).all()


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((32, 32), (224, 224)),
        ((8, 8), (224, 224)),
        ((224, 224), (224, 224)),
        ((96, 64), (192, 128)),
        ((512, 384), (512, 384)),
    ],
)
def test_small_images_are_enlarged_to_hard_pixels(size: tuple[int, int], shown: tuple[int, int]) -> None:
    image = noise(*size)
    assert pictures.panel_size(image) == shown
    factor = shown[0] // size[0]
    expected = pixels(image).repeat(factor, axis=0).repeat(factor, axis=1)
    assert (pixels(pictures.fit(image, shown)) == expected).all()


def test_masked_patches_are_grey_and_no_others() -> None:
    panel = Image.new("RGB", (40, 24), (10, 200, 30))
    mask = np.array([[True, False, False, False], [False, False, True, True]])
    covered = (pixels(pictures.masked(panel, mask)) == pictures.MASKED).all(axis=-1)
    assert (covered == mask.repeat(12, axis=0).repeat(10, axis=1)).all()
    assert (pixels(pictures.masked(panel, mask))[~covered] == (10, 200, 30)).all()
    with pytest.raises(ValueError, match="has no 3 x 2 patches of one size"):
        pictures.masked(panel, mask[:, :3])


def test_heat_maps_colour_what_has_a_value() -> None:
    panel = Image.new("RGB", (20, 20), (0, 0, 0))
    values = np.array([[0.0, 8.0], [np.nan, 4.0]])
    heat = pixels(pictures.heat_map(panel, values, 8.0))
    ends = (68, 1, 84), (253, 231, 37)
    assert (heat[:10, :10] == ends[0]).all() and (heat[:10, 10:] == ends[1]).all()
    assert (heat[10:, 10:] == (33, 145, 140)).all()
    assert (heat[10:, :10] == 153).all()  # black, faded to 60 % of white
    lightness = pictures.heat_colours(np.linspace(0, 1, 50)) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()


@pytest.mark.parametrize(
    ("most", "ticks"),
    [
        (6.3, [0, 2, 4, 6]),
        (9.01, [0, 2, 4, 6, 8]),
        (0.7, [0, 0.2, 0.4, 0.6]),
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (47, [0, 10, 20, 30, 40]),
    ],
)
def test_scales_have_round_numbers(most: float, ticks: list[float]) -> None:
    assert pictures.round_ticks(most) == pytest.approx(ticks)
    scale = pixels(pictures.heat_scale(most, 200))
    assert (scale[0, 0] == (68, 1, 84)).all() and (scale[0, -1] == (253, 231, 37)).all()
    marked = np.flatnonzero((scale[13] == pictures.INK).all(axis=-1)).tolist()
    assert marked == [min(round(tick / most * 200), 199) for tick in ticks]


def test_text_is_wrapped_and_long_names_are_shortened() -> None:
    line = pictures.text("one two", 400)
    assert line.width == 400
    assert 0 < (pixels(line) < 128).all(axis=-1).sum() < 400
    assert pictures.text("one two " * 20, 200).height > 4 * line.height
    long = pictures.text("x" * 300 + ".png", 200)
    assert long.height == line.height
    assert (pixels(long)[:, 190:] < 255).any()  # it is not cut off: the end of the name is there
    assert (pixels(pictures.text("a\udcff\n\tb", 200)) == pixels(pictures.text("a???b", 200))).all()


def test_codes_that_are_alike_have_colours_that_are_alike() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(200, 3)) * (3.0, 2.0, 1.0)
    colours = pictures.code_colours(np.concatenate([vectors, np.zeros((200, 5))], axis=1))
    assert colours.shape == (200, 3) and colours.dtype == np.uint8
    for channel in range(3):  # the first three axes, as one to one: ranks grow or fall with the coordinate
        order = vectors[:, channel].argsort()
        steps = np.diff(colours[order, channel].astype(int))
        assert np.corrcoef(colours[:, channel], vectors[:, channel])[0, 1] ** 2 > 0.9
        assert np.median(np.abs(steps)) < 8
    assert len(np.unique(colours, axis=0)) == 200
    assert (pictures.code_colours(vectors) == pictures.code_colours(vectors.copy())).all()
    assert pictures.code_colours(vectors[:, :2]).shape == (200, 3)


def test_nearest_patches_of_the_commonest_codes() -> None:
    colours = np.arange(12, dtype=np.uint8).reshape(4, 3)
    shades = np.arange(8, dtype=np.uint8).reshape(2, 2, 2) * 30  # of each patch another
    ids = np.array([[[3, 3], [1, 0]], [[3, 2], [1, 3]]])
    nearness = np.array([[[0.1, 0.9], [0.2, 1.0]], [[0.5, 1.0], [0.3, 0.7]]])
    panels = [Image.fromarray(shade).resize((96, 96), Image.Resampling.NEAREST) for shade in shades]
    images = [pictures.Coded(*image) for image in zip(panels, ids, nearness, strict=True)]
    strips = pictures.code_patches(images, colours, 600)
    assert len(strips) == 2  # codes 3 and 1; of 0 and 2 there is one patch each
    for strip, code in zip(strips, (3, 1), strict=True):
        drawn = pixels(strip)
        assert (drawn[1:-1, 1:49] == colours[code]).all()
        nearest_first = shades[ids == code][np.argsort(-nearness[ids == code])]
        assert drawn.shape == (50, 216 + 58 * (len(nearest_first) - 1) + 50, 3)
        for place, shade in enumerate(nearest_first):
            tile = drawn[:, 216 + 58 * place : 266 + 58 * place]
            assert (tile[1:-1, 1:-1] == shade).all() and (tile[[0, -1]] == 200).all()
    narrow = pictures.code_patches(images, colours, 58 * 6)  # room for two patches
    assert (pixels(narrow[0]) == pixels(strips[0])[:, : 216 + 58 + 50]).all()
    each_once = [pictures.Coded(panels[0], np.arange(4).reshape(2, 2), nearness[0])]
    assert pictures.code_patches(each_once, colours, 600) == []
