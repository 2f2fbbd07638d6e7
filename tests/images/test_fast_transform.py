"""The fast way to pixels: how far from the exact one it is, and what it leaves to that one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

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


@pytest.mark.parametrize("options", [{}, {"crop_mode": "squash", "crop_pct": 1.0}, {"interpolation": "bilinear"}])
@pytest.mark.parametrize("size", [(451, 300), (300, 451), (224, 224), (31, 40)])
def test_the_fast_transform_is_one_level_off_at_most(options: dict[str, Any], size: tuple[int, int]) -> None:
    data = DATA | options
    with Image.open(PHOTO) as photo:
        image = photo.resize(size)
    level = torch.tensor(DATA["std"]).view(3, 1, 1) * 255
    exact = beitzoo.create_transform(**data)(image)
    quick = beitzoo.create_transform(**data, fast=True)
    for pixels in (image, pil_to_tensor(image)):
        difference = (quick(pixels) - exact).abs() * level
        assert difference.max() < 1.01
        assert difference.mean() < 0.2


def test_the_fast_transform_of_a_very_long_image_is_the_exact_one() -> None:
    image = Image.effect_noise((4000, 5), 50).convert("RGB")
    assert torch.equal(beitzoo.create_transform(**DATA, fast=True)(image), beitzoo.create_transform(**DATA)(image))


def test_what_has_no_fast_transform_says_so() -> None:
    with pytest.raises(ValueError, match="no fast transform with the steps ResizeKeepRatio"):
        beitzoo.create_transform(**(DATA | {"input_size": (3, 224, 160)}), fast=True)
    with pytest.raises(ValueError, match="for training"):
        beitzoo.create_transform(is_training=True, fast=True, **DATA)


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
