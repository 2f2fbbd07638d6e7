"""Logits by a sliding window: those of the whole image where one covers it, of a slow loop elsewhere."""

import pytest
import torch
from oracles import randomise, relative_error, vary_classes
from torch import Tensor
from torch.nn import functional as F

import beitzoo
from beitzoo.errors import InvalidValueError
from beitzoo.models.segmentation import Segmenter
from beitzoo.models.windows import (
    NotFiniteError,
    Sliding,
    SlidingLogits,
    Window,
    of_any_size,
    resize_rows,
    slide,
    window_bytes,
    window_places,
)
from beitzoo.zoo.networks import Pair


def build(**fields: object) -> Segmenter:
    model = beitzoo.create_model("test_beit", head="segment", num_classes=5, embed_dim=32, **fields)
    assert isinstance(model, Segmenter)
    torch.manual_seed(0)
    randomise(model)
    vary_classes(model, model.backbone.config.img_size)
    return model


MODEL = build()


def picture(height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


@torch.inference_mode()
def reference(model: Segmenter, image: Tensor, crop: Pair, stride: Pair) -> Tensor:
    """Return (K, height, width): windows one by one, padded with zeros, resized, cut, summed and counted."""
    dynamic = beitzoo.create_model("test_beit", head="segment", num_classes=5, embed_dim=32, dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    dynamic.eval()
    _, height, width = image.shape
    total = torch.zeros(5, height, width, dtype=torch.float64)
    count = torch.zeros(height, width)
    tops, lefts = [0], [0]
    while tops[-1] + crop[0] < height:
        tops.append(tops[-1] + stride[0])
    while lefts[-1] + crop[1] < width:
        lefts.append(lefts[-1] + stride[1])
    for top in tops:
        for left in lefts:
            bottom, right = min(top + crop[0], height), min(left + crop[1], width)
            y, x = max(bottom - crop[0], 0), max(right - crop[1], 0)
            part = image[:, y:bottom, x:right]
            tall, wide = (max(-(-side // 16), 2) * 16 for side in part.shape[1:])
            padded = torch.zeros(1, image.shape[0], tall, wide)
            padded[0, :, : part.shape[1], : part.shape[2]] = part
            logits = F.interpolate(dynamic(padded), size=(tall, wide), mode="bilinear", align_corners=False)
            total[:, y:bottom, x:right] += logits[0, :, : bottom - y, : right - x]
            count[y:bottom, x:right] += 1
    return total / count


@torch.inference_mode()
def sliding(image: Tensor, crop: Pair, stride: Pair, most: int = 1, model: Segmenter = MODEL) -> Tensor:
    return slide(model, image, Sliding(crop, stride, most))


def test_windows_are_placed_as_in_mmsegmentation() -> None:
    # 2560 x 640 at 640 by 426, from `slide_inference` by hand: (2560 - 640 + 425) // 426 + 1 = 6 columns.
    lefts = [0, 426, 852, 1278, 1704, 1920]
    assert window_places((640, 2560), (640, 640), (426, 426)) == [Window(0, x, 640, x + 640) for x in lefts]
    assert window_places((700, 640), (640, 640), (426, 426)) == [Window(0, 0, 640, 640), Window(60, 0, 700, 640)]
    # No window begins where the one before ends with the image.
    assert window_places((64, 128), (64, 64), (64, 64)) == [Window(0, 0, 64, 64), Window(0, 64, 64, 128)]
    assert window_places((30, 90), (64, 64), (42, 42)) == [Window(0, 0, 30, 64), Window(0, 26, 30, 90)]
    assert window_places((10, 20), (64, 64), (42, 42)) == [Window(0, 0, 10, 20)]


@pytest.mark.parametrize("size", [(64, 64), (40, 57)])
def test_a_window_that_covers_the_image_gives_the_whole_image(size: Pair) -> None:
    image = picture(*size)
    with torch.inference_mode():
        padded = F.pad(image, (0, -size[1] % 16, 0, -size[0] % 16))[None]
        logits = of_any_size(MODEL)(padded)
        whole = F.interpolate(logits, size=padded.shape[2:], mode="bilinear", align_corners=False)
    expected = whole[0, :, : size[0], : size[1]]
    assert relative_error(sliding(image, (64, 64), (42, 42)), expected) < 1e-5
    assert relative_error(sliding(image, size, size), expected) < 1e-5


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [((101, 150), (64, 64), (42, 42)), ((64, 133), (64, 64), (9, 50)), ((20, 100), (64, 64), (42, 42))],
)
@pytest.mark.parametrize("most", [1, 4])
def test_overlapping_windows_are_averaged_as_by_a_slow_loop(size: Pair, crop: Pair, stride: Pair, most: int) -> None:
    image = picture(*size)
    expected = reference(MODEL, image, crop, stride)
    ours = sliding(image, crop, stride, most)
    assert relative_error(ours, expected) < 1e-5
    # It could fail: other windows differ by far more than that.
    assert relative_error(reference(MODEL, image, crop, (stride[0], stride[1] - 10)), expected) > 1e-2


def test_any_size_works_however_small_or_oblong() -> None:
    for size in [(1, 1), (1, 70), (65, 3), (17, 33)]:
        assert sliding(picture(*size), (64, 64), (42, 42)).shape == (5, *size)
    linear = build(decoder="linear")
    assert sliding(picture(3, 70), (64, 64), (42, 42), 2, linear).isfinite().all()


def test_rows_from_the_top_are_those_of_the_whole_and_windows_are_forgotten() -> None:
    image = picture(200, 80)
    whole = sliding(image, (64, 64), (42, 42))
    logits = SlidingLogits(MODEL, image, Sliding((64, 64), (42, 42), 3))
    held = 0
    with torch.inference_mode():
        for top in range(0, 200, 7):
            rows = logits.rows(max(top - 1, 0), min(top + 7, 200))
            assert relative_error(rows.permute(2, 0, 1), whole[:, max(top - 1, 0) : top + 7]) < 1e-5
            held = max(held, len(logits._held))
    assert held <= 2 * 2 + 3  # two rows of two windows, and a pass ahead; ten in all


@pytest.mark.parametrize("target", [(37, 50), (11, 23), (24, 9), (3, 2), (1, 1)])
def test_rows_are_resized_as_by_interpolate(target: Pair) -> None:
    image = picture(11, 23)
    expected = F.interpolate(image[None], size=target, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    lines = image.permute(1, 2, 0).contiguous()
    for step in (1, 4, 99):
        bands = [
            resize_rows(lambda first, last: lines[first:last], (11, 23), target, top, min(top + step, target[0]))
            for top in range(0, target[0], step)
        ]
        torch.testing.assert_close(torch.cat(bands), expected, rtol=1e-5, atol=1e-5)
        assert all(band.is_contiguous() for band in bands)  # classes last, or all that follows is slow


def test_the_model_stays_of_its_own_size() -> None:
    sliding(picture(20, 100), (32, 32), (32, 32))
    assert not MODEL.backbone.config.dynamic_img_size
    with pytest.raises(InvalidValueError, match="this model takes"):
        MODEL(torch.zeros(1, 3, 32, 32))
    free = of_any_size(MODEL)
    assert [p.data_ptr() for p in free.parameters()] == [p.data_ptr() for p in MODEL.parameters()]


def test_strides_and_logits_are_checked() -> None:
    with pytest.raises(InvalidValueError, match=r"The stride is \(65, 64\) with windows of \(64, 64\) pixels"):
        Sliding((64, 64), (65, 64))
    image = picture(64, 64)
    image[0, 5, 5] = float("nan")
    with pytest.raises(NotFiniteError, match="not finite"):
        sliding(image, (64, 64), (42, 42))


def test_larger_networks_and_windows_take_more() -> None:
    assert (
        window_bytes(MODEL, (64, 64))
        == 4 * window_bytes(MODEL, (32, 32))
        > 5 * window_bytes(build(decoder="linear"), (32, 32))
    )
