"""The version of a data set: the same wherever it lies, and another when images, masks, classes or parts change."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from beitzoo.images.datasets import find_images, labelled_folder
from beitzoo.images.image_set import ImageSet
from beitzoo.images.masked_sets import LabelOptions, find_masked_images

NOON = 1_700_000_000


def write(path: Path, value: int, seconds: int = NOON) -> None:
    """Write an image that is as large as others, with its time of change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path.with_suffix(".bmp"))
    path.with_suffix(".bmp").rename(path)
    os.utime(path, (seconds, seconds))


def make(root: Path) -> ImageSet:
    for place in range(4):
        write(root / "ab"[place // 2] / f"{place}.png", place)
    return labelled_folder(root)


def test_the_same_images_elsewhere_are_the_same_version(tmp_path: Path) -> None:
    images, again = make(tmp_path / "x"), make(tmp_path / "y")
    assert images.version == again.version
    assert images.version_of([0, 2]) == again.version_of(iter([0, 2])) != images.version_of([0, 3])


@pytest.mark.parametrize(("name", "value", "seconds"), [("a/0.png", 9, NOON + 1), ("a/7.png", 9, NOON)])
def test_an_image_that_was_exchanged_makes_another_version(name: str, value: int, seconds: int, tmp_path: Path) -> None:
    images = make(tmp_path)
    version = images.version
    (tmp_path / "a" / "0.png").unlink()
    write(tmp_path / name, value, seconds)
    changed = labelled_folder(tmp_path)
    assert len(changed.images) == len(images.images)
    assert changed.version != version


def test_other_classes_or_parts_of_the_same_images_make_another_version(tmp_path: Path) -> None:
    make(tmp_path)
    names = ["ab"[place // 2] + f"/{place}.png" for place in range(4)]
    versions = set()
    for header, ends in (
        ("path,label", ["a", "a", "b", "b"]),
        ("path,label", ["a", "b", "b", "b"]),
        ("path,label", ["a", "a", "c", "c"]),
        ("path,labels", ["a", "a;b", "b", "b"]),
        ("path,label,part", ["a,train", "a,train", "b,train", "b,test"]),
        ("path,label,part", ["a,train", "a,train", "b,test", "b,test"]),
    ):
        rows = [f"{name},{end}" for name, end in zip(names, ends, strict=True)]
        (tmp_path / "list.csv").write_text("\n".join([header, *rows]) + "\n")
        versions.add(find_images("csv", tmp_path / "list.csv").version)
    assert len(versions) == 6


def test_masks_and_what_they_stand_for_are_in_the_version(tmp_path: Path) -> None:
    for place in range(2):
        write(tmp_path / "images" / f"{place}.png", place)
        write(tmp_path / "masks" / f"{place}.png", place)
    found = find_masked_images("annotations", tmp_path, LabelOptions(classes=("sky", "road")))
    labels = [
        replace(found.labels, **changed)
        for changed in (
            {"names": ("road", "sky")},
            {"reduce_zero_label": True},
            {"ignore": frozenset({5})},
            {"colours": {"sky": (0, 0, 9), "road": (9, 9, 9)}},
        )
    ]
    versions = {found.version, *(replace(found, labels=one).version for one in labels)}
    write(tmp_path / "masks" / "1.png", 0, NOON + 1)
    versions.add(find_masked_images("annotations", tmp_path, found.labels).version)
    assert len(versions) == 6
