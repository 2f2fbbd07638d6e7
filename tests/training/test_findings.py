"""What is said of images before a run is what is in them."""

from pathlib import Path

import pytest
from PIL import Image

from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.training import findings
from beitzoo.training.findings import describe_classes, look_at_images


def test_uneven_classes_are_said_from_five_times_as_many_images_on() -> None:
    images = ImageSet([], [0] * 10 + [1] * 3, ("a", "b"))
    said = describe_classes(images, Split([*range(12)], [], [12, 0]))
    assert said[0] == "Images to train on: a 10, b 2"
    assert said[1].startswith("The classes are uneven: a has 5 times as many images as b. --set task.balance=sampling")
    assert describe_classes(images, Split([*range(4), 10], [], [11]))[1:] == [
        "Without a held-out image, so that nothing is measured of them: a"
    ]


def test_classes_of_mostly_broken_files_are_named(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
    for number in (0, 1, 4):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    images = ImageSet([tmp_path / f"{n}.png" for n in range(8)], [0] * 4 + [1] * 4, ("cat", "dog"), tmp_path)
    said = look_at_images(images, Split([0, 1, 2, 4, 5, 6], [3], [7]))
    assert said[1:] == ["Few images to train on can be read of these classes: cat (1 of 3). Replace the files."]


def test_near_duplicates_and_broken_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "4.png").write_bytes((tmp_path / "1.png").read_bytes()[:100])
    images = ImageSet([tmp_path / f"{number}.png" for number in range(5)], None, (), tmp_path)
    broken, near = look_at_images(images, Split([0, 1], [4], [2, 3]))
    assert broken.startswith("Left out 1, damaged or unreadable") and broken.endswith(": 4.png")
    assert near.startswith("1 of 2 held-out images look almost like one to train on, such as 1.png and 3.png")
    assert look_at_images(images, Split([0, 1], [], [2])) == []
    monkeypatch.setattr(findings, "_MOST_OPENED", 3)
    assert look_at_images(images, Split([0, 1], [4], [2, 3])) == [
        "Of more than 3 images it is not looked beforehand which cannot be read, nor for near duplicates."
    ]
