"""Near duplicates are found, whatever was done to the file, and images of a kind are not taken for one."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from beitzoo.images.duplicates import close_pairs, difference_hash, hash_images, near_duplicates
from beitzoo.images.folders import LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split


def photograph(seed: int, side: int = 96) -> Image.Image:
    """Smooth random patches of colour, as different from each other as photographs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_the_hash_says_where_an_image_gets_brighter() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    bits = [pixels[y, x + 1] > pixels[y, x] for y in range(8) for x in range(8)]
    assert difference_hash(Image.fromarray(pixels)) == int("".join(str(int(bit)) for bit in bits), 2)


def test_close_pairs_are_those_of_a_slow_loop() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.integers(0, 2**12, size, dtype=np.uint64) for size in (40, 30))
    expected = [
        (i, j) for i, a in enumerate(first.tolist()) for j, b in enumerate(second.tolist()) if (a ^ b).bit_count() <= 3
    ]
    assert list(zip(*close_pairs(first, second, 3), strict=True)) == expected
    assert expected


def test_copies_are_found_and_others_are_not(tmp_path: Path) -> None:
    """Held out are a smaller JPEG and a darker copy of training images, another image, a plain one and a broken one."""
    train = [photograph(seed) for seed in range(8)] + [Image.new("RGB", (96, 96), "blue")]
    smaller = as_jpeg(train[2].resize((64, 64)), 60)
    darker = ImageEnhance.Brightness(train[5]).enhance(0.7)
    (tmp_path / "broken.png").write_bytes(b"broken")
    test = [smaller, photograph(100), darker, Image.new("RGB", (96, 96), "blue")]
    paths = []
    for number, image in enumerate([*train, *test]):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    images = ImageSet([*paths, tmp_path / "broken.png"], None, (), tmp_path)
    unreadable = LeftOut()
    hashes = hash_images(images, range(14), unreadable)
    assert near_duplicates(images, hashes, Split([*range(9)], [], [*range(9, 14)])) == [(2, 9), (5, 11)]
    assert near_duplicates(images, hashes, Split([0], [], [])) == near_duplicates(images, {}, Split([], [], [9])) == []
    assert list(unreadable.examples.values()) == [["broken.png"]]


@pytest.mark.parametrize("change", ["colour", "tiny"])
def test_what_has_the_same_hash_is_looked_at_again(change: str) -> None:
    """Inverted colours of one lightness, and images too small to tell."""
    image = photograph(3)
    other = image
    if change == "tiny":
        image = other = image.resize((12, 12))
    else:
        grey = np.asarray(image.convert("L"), dtype=float)
        red, blue = np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96, 3), np.uint8)
        red[..., 0], blue[..., 1] = grey, (grey * 0.299 / 0.587).round()
        image, other = Image.fromarray(red), Image.fromarray(blue)
        assert (difference_hash(image) ^ difference_hash(other)).bit_count() <= 4
    images = ImageSet([image, other], None, ())
    assert near_duplicates(images, hash_images(images, [0, 1], LeftOut()), Split([0], [], [1])) == []
