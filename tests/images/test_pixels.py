"""Which pixels a network sees: stored values for every kind of image, and timm's own transforms."""

import io
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import beitzoo
from beitzoo.errors import InvalidOptionError
from beitzoo.images import steps
from beitzoo.images.files import open_image

PHOTO = Path("beitzoo/assets/samples/chelsea.jpg")
HALF = (0.5, 0.5, 0.5)
EVAL: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": HALF,
    "std": HALF,
}


def two_pixels(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (2, 1), left)
    image.putpixel((1, 0), right)
    return image


def palette(**info: object) -> Image.Image:
    image = two_pixels("P", 0, 1)
    image.putpalette([200, 100, 50, 10, 20, 30])
    image.info.update(info)
    return image


def sixteen(order: str) -> Image.Image:
    return Image.fromarray(np.array([[0x1234, 0xFFFF]], f"{order}u2"))


# An image of two pixels, the format it is stored in, and its two pixels in RGB.
KINDS = {
    "1": (two_pixels("1", 1, 0), "PNG", [(255, 255, 255), (0, 0, 0)]),
    "L": (two_pixels("L", 7, 200), "PNG", [(7, 7, 7), (200, 200, 200)]),
    "LA": (two_pixels("LA", (7, 0), (200, 128)), "PNG", [(7, 7, 7), (200, 200, 200)]),
    "RGB": (two_pixels("RGB", (1, 2, 3), (250, 251, 252)), "PNG", [(1, 2, 3), (250, 251, 252)]),
    "RGBA": (two_pixels("RGBA", (1, 2, 3, 0), (250, 251, 252, 9)), "PNG", [(1, 2, 3), (250, 251, 252)]),
    "CMYK": (two_pixels("CMYK", (0, 255, 0, 0), (9, 0, 0, 100)), "TIFF", [(255, 0, 255), (150, 155, 155)]),
    "P": (palette(), "PNG", [(200, 100, 50), (10, 20, 30)]),
    "P and one colour clear": (palette(transparency=1), "PNG", [(200, 100, 50), (10, 20, 30)]),
    "P and all colours faint": (palette(transparency=b"\5\6"), "PNG", [(200, 100, 50), (10, 20, 30)]),
    "16 bits": (sixteen("<"), "PNG", [(0x12, 0x12, 0x12), (255, 255, 255)]),
    "16 bits, big end first": (sixteen(">"), "TIFF", [(0x12, 0x12, 0x12), (255, 255, 255)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel(kind: str, tmp_path: Path) -> None:
    image, form, expected = KINDS[kind]
    image.save(tmp_path / "image", format=form)
    opened = open_image(tmp_path / "image")
    assert (opened.mode, opened.size) == ("RGB", (2, 1))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == expected
    grey = open_image(tmp_path / "image", 1)
    assert (grey.mode, grey.getpixel((1, 0))) == (
        "L",
        Image.new("RGB", (1, 1), expected[1]).convert("L").getpixel((0, 0)),
    )


# Where the pixels a b c / d e f come to lie for each orientation of EXIF.
UPRIGHT = {
    1: "abc/def",
    2: "cba/fed",
    3: "fed/cba",
    4: "def/abc",
    5: "ad/be/cf",
    6: "da/eb/fc",
    7: "fc/eb/da",
    8: "cf/be/ad",
    9: "abc/def",
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation(orientation: int, form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    letters = np.frombuffer(b"abcdef", np.uint8).reshape(2, 3)
    Image.fromarray(np.stack([letters] * 3, axis=-1)).save(
        tmp_path / "image", format=form, exif=exif, **({"lossless": True} if form == "WEBP" else {})
    )
    rows = np.asarray(open_image(tmp_path / "image"))[..., 0]
    assert "/".join(row.tobytes().decode() for row in rows) == UPRIGHT[orientation]


def slopes(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 7 + y, x * y, y * 5 + 40], axis=-1).astype(np.uint8))


def levels(x: Tensor) -> int:
    """Checksum the 8-bit levels from which a tensor normalised by halves was made."""
    return zlib.crc32((x * 127.5 + 127.5).round().to(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1, 1, 87620799),
        (1, 33, 2441680241),
        (33, 1, 658087516),
        (2, 3, 3160752805),
        (32, 32, 3412440819),
        (35, 35, 1568368508),
        (47, 211, 2207777845),
        (640, 427, 1713655307),
        (1200, 800, 2784278689),
        (3, 2000, 2152665037),
    ],
)
def test_every_shape(width: int, height: int, expected: int) -> None:
    image = slopes(width, height)
    ours = beitzoo.create_transform(**EVAL)(image)
    assert ours.shape == (3, 32, 32)
    assert torch.equal(ours, timm.data.create_transform(**EVAL)(image))
    assert levels(ours) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"crop_mode": "squash"},
        {"crop_mode": "border"},
        {"crop_pct": 1.0},
        {"interpolation": "bilinear"},
        {"interpolation": "lanczos"},
        {"input_size": (3, 32, 48)},
        {"input_size": (3, 48, 32), "crop_mode": "squash"},
        {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        {"crop_border_pixels": 3},
        {"normalize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(47, 211), (50, 31), (33, 34)])
def test_evaluation_takes_timms_options(options: dict[str, Any], size: tuple[int, int]) -> None:
    options, image = {**EVAL, **options}, slopes(*size)
    ours = beitzoo.create_transform(**options)(image)
    assert torch.equal(ours, timm.data.create_transform(**options)(image))
    if options["normalize" if "normalize" in options else "mean"] == HALF:
        default = beitzoo.create_transform(**EVAL)(image)
        assert ours.shape != default.shape or not torch.equal(ours, default)


TRAIN: list[dict[str, Any]] = [
    {},
    {"no_aug": True},
    {"scale": (0.2, 0.3)},
    {"ratio": (0.5, 0.6)},
    {"train_crop_mode": "rkrc"},
    {"train_crop_mode": "rkrr"},
    {"hflip": 1.0},
    {"vflip": 1.0},
    {"color_jitter": (0.9, 0.9, 0.9, 0.3)},
    {"color_jitter_prob": 1.0},
    {"grayscale_prob": 1.0},
    {"gaussian_blur_prob": 1.0},
    {"auto_augment": "rand-m9-mstd0.5-inc1"},
    {"auto_augment": "augmix-m5-w4-d2"},
    {"auto_augment": "3a"},
    {"interpolation": "random"},
    {"re_prob": 1.0, "re_mode": "pixel", "re_count": 2},
    {"normalize": False},
]


@pytest.mark.parametrize("options", TRAIN, ids=str)
def test_training_takes_timms_options(options: dict[str, Any]) -> None:
    def drawn(create: Any, options: dict[str, Any]) -> Tensor:
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        transform = create(is_training=True, **{**EVAL, **options})
        return torch.stack([transform(image) for _ in range(3)])

    image = open_image(PHOTO)
    ours = drawn(beitzoo.create_transform, options)
    assert torch.equal(ours, drawn(timm.data.create_transform, options))
    assert not options or not torch.equal(ours, drawn(beitzoo.create_transform, {}))


def test_timms_stages_come_apart() -> None:
    stages: Any = beitzoo.create_transform(is_training=True, separate=True, **EVAL)
    assert len(stages) == 3


@pytest.mark.parametrize("short", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("pct", [0.9, 1.0])
def test_long_images_lose_only_what_the_crop_does_not_show(
    short: int, pct: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly timm's pixels where the short side divides the long one."""
    monkeypatch.setattr(steps, "_MAX_RESIZED", 2**15)
    options = {**EVAL, "crop_pct": pct}
    transform: Any = beitzoo.create_transform(**options)
    for times in (33, 50, 51, 52, 53, 120):
        image = slopes(short * times, short)
        for view in (image, image.transpose(Image.Transpose.ROTATE_90)):
            assert max(transform.transforms[0]._without_ends(view).size) < max(view.size)
            assert torch.equal(transform(view), timm.data.create_transform(**options)(view))


@pytest.mark.parametrize("size", [(5, 333), (777, 6), (7, 1001), (12, 1366)])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 32, 48)])
def test_long_images_of_odd_ratio_differ_by_two_levels_at_most(
    size: tuple[int, int], input_size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_MAX_RESIZED", 2**15)
    options = {**EVAL, "input_size": input_size}
    image = slopes(*size)
    difference = beitzoo.create_transform(**options)(image) - timm.data.create_transform(**options)(image)
    assert difference.abs().max() * 127.5 < 2.01


def test_an_image_as_long_as_a_street() -> None:
    """timm would resize it to 14,880,000 x 248 pixels, 15 gigabytes."""
    options = {**EVAL, "input_size": (3, 224, 224)}
    image = Image.new("RGB", (60_000, 1), "white")
    image.paste("red", (30_000, 0, 60_000, 1))
    seen = beitzoo.create_transform(**options)(image)
    assert seen.shape == (3, 224, 224)
    assert seen[0].min() == 1
    assert (seen[1, :, 0].mean(), seen[1, :, -1].mean()) == (pytest.approx(1, abs=0.1), pytest.approx(-1, abs=0.1))
    short = image.crop((29_000, 0, 31_000, 1)).convert("RGB")
    assert torch.equal(seen, beitzoo.create_transform(**options)(short))


@pytest.mark.parametrize("is_training", [False, True])
def test_what_is_no_image_is_told_what_to_do(is_training: bool) -> None:
    transform: Any = beitzoo.create_transform(is_training, **EVAL)
    for wrong in (PHOTO, str(PHOTO), np.zeros((8, 8, 3), np.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(InvalidOptionError, match=r"takes a PIL image, and this is a .*beitzoo.open_image\(path\)"):
            transform(wrong)


def test_tensors_go_through_as_in_timm() -> None:
    image = torch.rand(3, 40, 50)
    assert torch.equal(beitzoo.create_transform(**EVAL)(image), timm.data.create_transform(**EVAL)(image))  # type: ignore[arg-type]


def test_a_model_is_no_option() -> None:
    model: Any = beitzoo.create_model("test_beit", device="meta")
    with pytest.raises(InvalidOptionError, match=r"this is a Beit; .*create_transform\(\*\*resolve_data_config\(model"):
        beitzoo.create_transform(model)


def test_jpeg_is_decoded_at_full_size(tmp_path: Path) -> None:
    """Decoding at a fraction, which Pillow offers, would be faster and give other pixels."""
    file = io.BytesIO()
    slopes(1600, 1200).save(file, format="JPEG", quality=90)
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    with Image.open(file) as image:
        assert torch.equal(
            beitzoo.create_transform(**EVAL)(open_image(tmp_path / "a.jpg")),
            timm.data.create_transform(**EVAL)(image.convert("RGB")),
        )
