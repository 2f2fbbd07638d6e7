"""The fast way to pixels: how far from the exact one it is, and what it leaves to that one."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

import beitzoo
from beitzoo.images import fast
from beitzoo.images.fast import open_tensor
from beitzoo.images.files import ImageError, open_image
from beitzoo.zoo.checkpoints import IMAGENET_MEAN, IMAGENET_STD

PHOTO = Path("beitzoo/assets/samples/chelsea.jpg")
DATA: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
}


def levels(options: dict[str, Any], image: Image.Image | torch.Tensor) -> torch.Tensor:
    """Return how many of 255 levels the fast transform is off."""
    exact = image if isinstance(image, Image.Image) else to_pil_image(image)
    std = torch.tensor(options["std"]).view(3, 1, 1)
    difference = beitzoo.create_transform(**options, fast=True)(image) - beitzoo.create_transform(**options)(exact)
    return difference.abs() * 255 * std


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [193, 224, 384, 512])
def test_photographs_are_two_levels_off_at_most(side: int, interpolation: str) -> None:
    for crop in ({}, {"crop_mode": "squash"}, {"crop_mode": "center_floor"}):
        options = {**DATA, "input_size": (3, side, side), "interpolation": interpolation, **crop}
        for name in ("chelsea.jpg", "coffee.jpg"):
            difference = levels(options, open_image(PHOTO.with_name(name)))
            assert difference.max() < 2.01
            assert difference.mean() < 0.05


def test_any_image_is_two_levels_off_at_most_where_that_is_promised() -> None:
    """Bilinear always; bicubic where the height grows. Noise in black and white is the worst there is."""
    draw = random.Random(0)
    for _ in range(12):
        height, width = draw.randrange(20, 300), draw.randrange(20, 300)
        noise = 255 * torch.randint(2, (3, height, width), dtype=torch.uint8)
        for interpolation in ("bilinear", "bicubic"):
            sides = draw.randrange(2, 20) * 16, draw.randrange(2, 20) * 16
            if interpolation == "bicubic" and sides[0] < height:
                continue
            options = {**DATA, "input_size": (3, *sides), "crop_mode": "squash", "crop_pct": 1.0}
            assert levels({**options, "interpolation": interpolation}, noise).max() < 2.01


def test_the_fast_transform_of_a_very_long_image_is_the_exact_one() -> None:
    image = Image.effect_noise((4000, 5), 50).convert("RGB")
    assert torch.equal(beitzoo.create_transform(**DATA, fast=True)(image), beitzoo.create_transform(**DATA)(image))


def test_what_has_no_fast_transform_says_so() -> None:
    with pytest.raises(ValueError, match="no fast transform with the steps ResizeKeepRatio"):
        beitzoo.create_transform(**(DATA | {"input_size": (3, 224, 160)}), fast=True)
    with pytest.raises(ValueError, match="for training"):
        beitzoo.create_transform(is_training=True, fast=True, **DATA)
    for name in ("nearest", "box", "hamming", "lanczos"):
        with pytest.raises(ValueError, match=f"no fast transform with interpolation='{name}'"):
            beitzoo.create_transform(**(DATA | {"interpolation": name}), fast=True)


def test_what_is_no_image_is_told_what_to_do() -> None:
    transform: Any = beitzoo.create_transform(**DATA, fast=True)
    for wrong in (str(PHOTO), torch.zeros(3, 8, 8)):
        with pytest.raises(TypeError, match=r"takes a PIL image or a tensor of uint8, .* beitzoo.open_image"):
            transform(wrong)


@pytest.mark.parametrize("decoder", ["simplejpeg", None])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_the_same_from_both_decoders(
    orientation: int, decoder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder is None:
        monkeypatch.setattr(fast, "find_spec", lambda name: None)
    exif = Image.Exif()
    exif[274] = orientation
    with Image.open(PHOTO) as photo:
        photo.save(tmp_path / "a.jpg", exif=exif, quality=90)
    assert torch.equal(open_tensor(tmp_path / "a.jpg"), pil_to_tensor(open_image(tmp_path / "a.jpg")))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_what_is_no_colour_jpeg_pillow_decodes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{'png' if mode == 'RGBA' else 'jpg'}"
    Image.effect_noise((20, 30), 50).convert(mode).save(path)
    for channels in (1, 3):
        assert torch.equal(open_tensor(path, channels), pil_to_tensor(open_image(path, channels)))


def test_a_cut_jpeg_is_an_error_from_both_decoders(tmp_path: Path) -> None:
    content = PHOTO.read_bytes()
    for size in (len(content) // 2, 700, 10, 0):
        (tmp_path / "a.jpg").write_bytes(content[:size])
        with pytest.raises(ImageError):
            open_tensor(tmp_path / "a.jpg")
