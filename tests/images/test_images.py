"""From files to tensors: the right pixels, or an error with the file's name on it."""

import inspect
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

import beitzoo
from beitzoo.errors import InvalidOptionError
from beitzoo.images import files
from beitzoo.images.files import ImageError, as_image, open_image
from beitzoo.images.folders import find_images, images_at
from beitzoo.zoo.pretrained import PRETRAINED

PHOTO = Path("beitzoo/assets/samples/chelsea.jpg")


@pytest.mark.parametrize("name", PRETRAINED)
def test_transform_is_timms(name: str) -> None:
    model = beitzoo.create_model(name, device="meta", num_classes=0)
    image = open_image(PHOTO, model.config.in_chans)
    ours = beitzoo.create_transform(**beitzoo.resolve_data_config(model))(image)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)
    assert torch.equal(ours, theirs)
    assert ours.shape == model.pretrained_cfg["input_size"]


def test_transform_resizes_as_published() -> None:
    """Sizes from timm: 224 at 0.9 resizes to 248, 384 at 1.0 to 384, 224 at 0.95 to 235."""
    sizes = {"beit_base_patch16_224": 248, "beit_base_patch16_384": 384, "beitv2_large_patch16_224": 235}
    for name, size in sizes.items():
        config = beitzoo.resolve_data_config(beitzoo.create_model(name, device="meta"))
        assert f"size={size}" in repr(beitzoo.create_transform(**config))


def test_transform_follows_the_size_of_the_model() -> None:
    model = beitzoo.create_model("test_beit", img_size=(48, 80))
    assert beitzoo.create_transform(**beitzoo.resolve_data_config(model))(open_image(PHOTO)).shape == (3, 48, 80)
    model.set_input_size(32)
    assert beitzoo.create_transform(**beitzoo.resolve_data_config(model))(open_image(PHOTO)).shape == (3, 32, 32)


def test_training_transform_is_random() -> None:
    config = beitzoo.resolve_data_config(beitzoo.create_model("test_beit", device="meta"))
    transform = beitzoo.create_transform(is_training=True, **config)
    image = open_image(PHOTO)
    assert not torch.equal(transform(image), transform(image))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "v0", "augmix-m10"])
def test_augmentation_at_its_strongest_keeps_no_bits_of_a_colour(policy: str) -> None:
    """Pillow 12 made such images black, and Pillow 13 an error, which is no fault of the image."""
    config = beitzoo.resolve_data_config(beitzoo.create_model("test_beit", device="meta"))
    transform = beitzoo.create_transform(is_training=True, **config, auto_augment=policy)
    (step,) = [step for step in transform.transforms if hasattr(step, "ops") or hasattr(step, "policy")]
    operations = step.ops if hasattr(step, "ops") else [each for pair in step.policy for each in pair]
    (posterize, *_) = [operation for operation in operations if operation.name.startswith("Posterize")]
    photo = open_image(PHOTO)
    posterize.prob = 1.0
    blackest = 10 if "Increasing" in posterize.name else 0
    posterize.magnitude, posterize.magnitude_std = blackest, 0
    assert posterize(photo).getextrema() == ((0, 0),) * 3
    posterize.magnitude = abs(blackest - 5)  # 2 bits
    assert np.array_equal(np.asarray(posterize(photo)), np.asarray(photo) & 0b11000000)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B"])
def test_every_mode_opens_as_grey_or_rgb(mode: str, tmp_path: Path) -> None:
    value = {"I;16": 128 * 256, "I;16B": 128 * 256, "1": 255}.get(mode, 128)
    wide = {"I;16": "<u2", "I;16B": ">u2"}.get(mode)
    image = Image.fromarray(np.full((4, 6), value, wide)) if wide else Image.new("L", (6, 4), value)
    if mode == "P":
        image = image.quantize()
    elif not wide:
        image = (image if mode == "LA" else image.convert("RGB")).convert(mode)
    path = tmp_path / ("image.tiff" if mode in ("CMYK", "I;16B") else "image.png")
    image.save(path)
    grey, colour = open_image(path, 1), open_image(path, 3)
    assert (grey.mode, colour.mode, grey.size) == ("L", "RGB", (6, 4))
    assert grey.getpixel((0, 0)) == pytest.approx(255 if mode == "1" else 128, abs=2)


def test_a_path_is_a_path_or_a_str_from_home_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (3, 2)).save("a.png")
    for path in ("a.png", Path("a.png"), "~/a.png", Path("~/a.png")):
        assert beitzoo.open_image(path).size == (3, 2)
    Image.new("RGB", (5, 4)).save("~root.png")
    assert beitzoo.open_image("~root.png").size == (5, 4)
    with pytest.raises(InvalidOptionError, match=r"takes a path, and this is a ndarray of shape \(2, 2\) and uint8"):
        beitzoo.open_image(np.zeros((2, 2), np.uint8))  # type: ignore[arg-type]


def test_decoded_images_become_what_open_image_makes_of_their_files(tmp_path: Path) -> None:
    for name, mode in (("a.tiff", "RGB"), ("a.jpg", "RGB"), ("a.png", "LA")):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.effect_noise((6, 4), 60).convert(mode).save(tmp_path / name, exif=exif)
        for channels in (1, 3):
            opened = open_image(tmp_path / name, channels)
            with Image.open(tmp_path / name) as given:
                assert np.array_equal(np.asarray(as_image(given, channels)), np.asarray(opened))
                # The image of the caller is left as it was; Pillow itself turns a TIFF on loading it.
                assert given.mode == mode
                assert name == "a.tiff" or given.getexif()[0x0112] == 6
            assert opened.size == (4, 6)
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for source in (pixels, torch.tensor(pixels).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(as_image(source)), pixels)
    for grey in (pixels[:, :, 0], pixels[:, :, :1], torch.tensor(pixels[:, :, 0])[None]):
        assert np.array_equal(np.asarray(as_image(grey, 1)), pixels[:, :, 0])


@pytest.mark.parametrize(
    "wrong",
    [3, None, b"x", np.zeros((2, 2, 3)), torch.zeros(3, 2, 2), np.zeros((2, 2, 2), np.uint8), np.zeros(3, np.uint8)],
    ids=repr,
)
def test_what_is_no_image_is_told_what_would_be_one(wrong: object) -> None:
    with pytest.raises(InvalidOptionError, match=r"cannot be made of a .* Give a path, a PIL image, an array"):
        as_image(wrong)


def test_the_pixels_of_a_broken_file_are_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(PHOTO.read_bytes()[:3000])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(ImageError, match="truncated"):
        as_image(image)


@pytest.mark.skipif(not files.READS_AVIF, reason="Pillow was built without a decoder for AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.avif")
    assert open_image(tmp_path / "a.avif").size == (8, 6)
    (tmp_path / "cut.avif").write_bytes((tmp_path / "a.avif").read_bytes()[:-20])
    with pytest.raises(ImageError, match="damaged"):
        open_image(tmp_path / "cut.avif")


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(kind: type, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 1, kind)).save(tmp_path / "a.tiff")
    with pytest.raises(ImageError, match="32-bit numbers of unknown range"):
        open_image(tmp_path / "a.tiff")


def test_damaged_exif_leaves_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image, in_place: bool = False) -> Image.Image:
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert open_image(PHOTO).size == (448, 298)


def test_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 6)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "I;16"])
def test_a_turned_tiff_keeps_its_pixels(mode: str, tmp_path: Path) -> None:
    """Pillow maps uncompressed files by their name, and then takes the sides for each other."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.effect_noise((60, 40), 60)
    image = Image.fromarray(np.asarray(noise).astype("<u2") * 256) if mode == "I;16" else noise.convert(mode)
    image.save(tmp_path / "plain.tiff")
    image.save(tmp_path / "turned.tiff", exif=exif)
    upright = open_image(tmp_path / "plain.tiff").transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.tiff")), np.asarray(upright))


def test_unreadable_files_are_named_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PHOTO.read_bytes()
    cases = {
        "empty.jpg": (b"", "the file is empty"),
        "text.png": (b"hello", "not an image"),
        "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(50), "a HEIC image, which is not decoded; convert it to JPEG"),
        "cut.jpg": (whole[:2000], "damaged or unreadable"),
        "disguised.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "absent.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"too large: .*pixels"):
        open_image(PHOTO)
    monkeypatch.undo()
    monkeypatch.setattr(files, "MAX_BYTES", 8 * 448 * 298 - 1)
    with pytest.raises(ImageError, match=r"too large: 448 x 298 are 133,504 pixels, and 133,503 of this kind"):
        open_image(PHOTO)


def test_places_become_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "notes.txt", "sub/c.webp"):
        (tmp_path / name).touch()
    a, b, c = tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "sub" / "c.webp"
    assert list(find_images([str(tmp_path)])) == [a, b, c]
    assert list(find_images([str(tmp_path / "*.png"), str(tmp_path / "notes.txt")])) == [b, tmp_path / "notes.txt"]
    assert list(find_images([str(tmp_path / "*")])) == [a, b, tmp_path / "notes.txt", c]
    assert list(find_images([str(tmp_path / "absent.png")])) == [tmp_path / "absent.png"]


def test_what_is_no_file_is_found_and_then_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "gone.png").symlink_to("absent")
    (tmp_path / "round").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "sub" / "pipe.jpg")
    found = [tmp_path / "gone.png", tmp_path / "sub" / "pipe.jpg"]
    assert list(find_images([str(tmp_path)])) == found
    assert list(find_images([str(found[0]), str(tmp_path / "folder.png"), "~nosuchuser/x", "a\0b", "x" * 5000])) == [
        found[0],
        tmp_path / "folder.png",  # an empty one
        Path("~nosuchuser/x"),
        Path("a\0b"),
        Path("x" * 5000),
    ]
    reasons = {
        found[0]: "no such file",
        found[1]: "not a regular file",
        tmp_path: "a folder",
        Path("a\0b"): "null (byte|character)",
    }
    for path, reason in reasons.items():
        with pytest.raises(ImageError, match=reason):
            open_image(path)
    with pytest.raises(ImageError, match="cannot be opened: File name too long"):
        open_image(Path("x" * 5000))


def test_a_listed_name_is_no_pattern(tmp_path: Path) -> None:
    for name in ("img1.png", "img2.png", "photos1/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    absent = [str(tmp_path / name) for name in ("img[1].png", "img*.png", "photos[1]", "\0/*.png", "[a]\0")]
    assert [list(images_at(name)) for name in absent] == [[Path(name)] for name in absent]
    assert list(find_images(absent[:3])) == [
        tmp_path / n for n in ("img1.png", "img1.png", "img2.png", "photos1/a.png")
    ]
    strange = ["~a\0b", "\0/*.png", "[a]\0", *absent[3:]]
    assert list(find_images(strange)) == list(map(Path, strange))
    assert list(images_at(str(tmp_path / "photos1"))) == [tmp_path / "photos1" / "a.png"]


def test_linked_folders_are_searched_and_circles_left(tmp_path: Path) -> None:
    for name in ("photos/a/1.png", "photos/b/2.png", "elsewhere/3.png", "elsewhere/deep/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    photos = tmp_path / "photos"
    (photos / "linked").symlink_to("../elsewhere")
    (photos / "a" / "up").symlink_to(photos)
    (tmp_path / "elsewhere" / "deep" / "home").symlink_to(photos)  # from photos/linked/deep it is a circle
    (photos / "self.png").symlink_to("self.png")
    expected = ["a/1.png", "b/2.png", "linked/3.png", "linked/deep/4.png", "self.png"]
    assert [str(path.relative_to(photos)) for path in find_images([str(photos)])] == expected
    with pytest.raises(ImageError, match="symbolic links"):
        open_image(photos / "self.png")
    (tmp_path / "to_photos").symlink_to(photos)
    assert len(list(find_images([str(tmp_path / "to_photos")]))) == 5


def test_folders_may_be_deep(tmp_path: Path) -> None:
    """Deeper than calls of Python, of which few are allowed here."""
    folder = tmp_path / "/".join("d" * 200)
    folder.mkdir(parents=True)
    (folder / "a.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert list(find_images([str(tmp_path)])) == [folder / "a.png"]
    finally:
        sys.setrecursionlimit(limit)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(find_images([str(tmp_path)])) == [tmp_path / "locked"]
