"""Near duplicates: training images that look almost like held-out ones, found by a hash of 64 bits and a second look.

The hash alone takes pictures of one kind, such as hands on a plain wall, for one picture: what it finds is compared as
small images then.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beitzoo.images.files import ImageError, as_image
from beitzoo.images.folders import LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split

Array = NDArray[Any]

# Bits in which near duplicates differ at most; of two photographs that have nothing in common about 32 do.
LIMIT = 4
_SIDE = 8
# Of CIFAR-10's pairs within that limit all from here on are of one picture; of 1,127 pairs of hand signs of different
# people the highest is 0.88.
_LEAST_CORRELATION = 0.9
_SECOND_SIDE = 32
_LEAST_PIXELS = 16  # sides of smaller images hold too little to tell two of a kind from one
# Pairs whose bits are counted at a time, 64 MiB.
_BLOCK = 2**23


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits that say, for each of 8 x 8 places, whether the image gets brighter to the right (dHash)."""
    small = image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.int16)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


def hash_images(images: ImageSet, indices: Sequence[int], left_out: LeftOut) -> dict[int, int]:
    """Hash the images that have a shape: of plain areas, and of less than 16 pixels a side, it is noise or nothing.

    Args:
        images: The set.
        indices: Of these images.
        left_out: Receives those that cannot be read, with the reasons.
    """
    hashes = {}
    for index in indices:
        try:
            image = as_image(images.images[index], 1)
        except ImageError as error:
            left_out.add(str(error), images.identity(index)[0])
            continue
        value = difference_hash(image)
        if min(image.size) >= _LEAST_PIXELS and 8 <= value.bit_count() <= 56:
            hashes[index] = value
    return hashes


def near_duplicates(
    images: ImageSet, hashes: Mapping[int, int], split: Split, limit: int = LIMIT
) -> list[tuple[int, int]]:
    """Find the pairs of a training image and a held-out one that look the same.

    They may differ in size, compression, brightness and contrast, not in the part of the picture that is shown.

    Args:
        images: The set.
        hashes: From `hash_images`; others are passed over.
        split: Its `train` and `test` are compared.
        limit: Bits of the hash in which two images differ at most.

    Returns:
        Pairs (index of the training image, index of the held-out image), in order of the held-out images. A held-out
        image may have several.
    """
    train, test = ([index for index in part if index in hashes] for part in (split.train, split.test))
    ours, theirs = (np.array([hashes[index] for index in part], dtype=np.uint64) for part in (train, test))
    pairs = [(train[column], test[row]) for row, column in zip(*close_pairs(theirs, ours, limit), strict=True)]
    return sorted((pair for pair in pairs if _looks_alike(images, *pair)), key=lambda pair: pair[::-1])


def close_pairs(first: Array, second: Array, limit: int) -> tuple[list[int], list[int]]:
    """Return the places in both of hashes, uint64, that differ in `limit` bits at most: 5e8 pairs take seconds."""
    rows: list[int] = []
    columns: list[int] = []
    step = max(1, _BLOCK // max(1, len(second)))
    for start in range(0, len(first), step):
        bits = np.bitwise_count(first[start : start + step, None] ^ second[None])
        near = np.argwhere(bits <= limit)
        rows += (near[:, 0] + start).tolist()
        columns += near[:, 1].tolist()
    return rows, columns


def _looks_alike(images: ImageSet, *pair: int) -> bool:
    """Compare two images in colour, at a size that shows more than the hash."""
    try:
        small = [_pixels(as_image(images.images[index])) for index in pair]
    except ImageError:  # gone since it was hashed
        return False
    return bool(np.corrcoef(np.stack(small))[0, 1] >= _LEAST_CORRELATION)


def _pixels(image: Image.Image) -> Array:
    small = image.resize((_SECOND_SIDE, _SECOND_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel()
