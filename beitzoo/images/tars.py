"""WebDataset tars: image files read one by one, by their place in the tar."""

import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beitzoo.errors import FileAccessError, InvalidValueError
from beitzoo.images.classes import Numbers, classes_of, images_of
from beitzoo.images.files import Encoded, ImageError
from beitzoo.images.folders import SUFFIXES, LeftOut
from beitzoo.images.image_set import ImageSet
from beitzoo.images.shards import find_shards
from beitzoo.images.tar_labels import Stated, found_labels, stated_label

_logger = logging.getLogger(__name__)

NO_IMAGE = "samples without an image"
TWICE = "images of a name that is there already"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "Zstandard"}
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# The key of a sample, and which of its files this is: all up to the first dot of the last name, and all behind it.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
# Above, an index takes long enough to say so.
_MANY_BYTES = 2**31


@dataclass(frozen=True)
class TarMember(Encoded):
    """An image file in a tar.

    Attributes:
        offset: Where its bytes begin in the tar.
    """

    container: Path
    place: str
    offset: int
    length: int

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.length

    def read(self) -> bytes:
        """Return the bytes of the image file. The tar is opened each time: so any process and thread may read."""
        with self.container.open("rb", buffering=0) as file:
            file.seek(self.offset)
            content = file.read(self.length)
        if len(content) < self.length:
            raise ImageError("the tar ends before the image does")
        return content


@dataclass(frozen=True)
class Tar:
    """Where the image files of one tar are.

    Attributes:
        path: The tar; not compressed, since what lies in a compressed one can only be read in its order.
        names: Of the members that are images, in order.
        offsets: Where each begins.
        sizes: How many bytes each has.
    """

    path: Path
    names: list[str]
    offsets: Numbers
    sizes: Numbers

    def __getitem__(self, place: int) -> TarMember:
        return TarMember(self.path, self.names[place], int(self.offsets[place]), int(self.sizes[place]))


def find_tars(path: Path) -> ImageSet:
    """Return the images of WebDataset tars, and their classes if they have any.

    Members of one name up to the first dot are a sample. Its image is the first member that has an image's suffix and
    no other; its class is the number or word in `cls`, or else `label` or `labels` in `json`. A `classes.txt` beside
    the tars names classes that are numbers. Samples without a class are left out, unless none has one.

    An image may have any number of labels (`ImageSet.label_sets`): `json` then has a list of them, `cls` separates them
    by `;` or `|` and is empty where an image has none. A `txt` is a caption, as img2dataset writes it, and not read.

    Raises:
        MissingFileError: There are no such files, or no images in them.
        InvalidValueError: A file is no tar, is compressed or cut short; or labels are not as they should be.
    """
    shards = find_shards(path, (".tar", *_COMPRESSED_SUFFIXES), "tars")
    if sum(file.stat().st_size for file in shards.files) > _MANY_BYTES:
        _logger.warning("Looking through %d tars for where each image is.", len(shards.files))
    left_out = LeftOut()
    tars, stated = zip(*(_indexed(file, shards.root, left_out) for file in shards.files), strict=True)
    labels = found_labels([(tar.path, own, tar.names) for tar, own in zip(tars, stated, strict=True)])
    return images_of(shards, tars, classes_of(shards, labels, ()), left_out)


def _indexed(path: Path, root: Path, left_out: LeftOut) -> tuple[Tar, list[Stated]]:
    """Look through a tar once, without reading the images."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    labels: list[Stated] = []
    seen: set[str] = set()
    for key, image, label in _samples(path):
        if image is None or image.name in seen:
            shown = f"{path.relative_to(root).as_posix()}:{key if image is None else image.name}"
            left_out.add(NO_IMAGE if image is None else TWICE, shown)
            continue
        seen.add(image.name)
        names.append(image.name)
        places.append((image.offset_data, image.size))
        labels.append(label)
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return Tar(path, names, offsets, sizes), labels


def _samples(path: Path) -> Iterator[tuple[str, tarfile.TarInfo | None, Stated]]:
    """Yield the key, the image and the stated class of each sample."""
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in groupby(_members(tar), key=lambda member: member.key):
                fields = {member.suffix: member.info for member in reversed(list(members))}
                images = [info for suffix, info in fields.items() if f".{suffix}" in SUFFIXES]
                yield key, images[-1] if images else None, stated_label(tar, fields)
    except tarfile.TarError as error:
        raise InvalidValueError(_what_is_wrong(path, error)) from error
    except OSError as error:
        raise FileAccessError(f"Cannot read {path}: {error.strerror or error}. Check its permissions.") from error


class _Member(NamedTuple):
    """One file of a sample."""

    key: str
    suffix: str
    info: tarfile.TarInfo


def _members(tar: Any) -> Iterator[_Member]:
    while (info := tar.next()) is not None:
        tar.members = []  # else the headers of all would stay in memory
        if info.size < 0:
            raise tarfile.ReadError(f"a size below 0 at byte {info.offset}")
        if info.isreg() and (match := _NAME.fullmatch(info.name)):
            yield _Member(match[1], match[2].lower(), info)
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # `next` takes a damaged header for the end
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _what_is_wrong(path: Path, error: tarfile.TarError) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start in _COMPRESSED:
        return (
            f"{path} is compressed ({_COMPRESSED[start]}): its images could not be read one by one. Unpack it to a "
            "plain .tar; images are compressed already."
        )
    return f"{path} is no tar, or is cut short ({error}). Get it again, or remove it."
