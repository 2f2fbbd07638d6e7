"""Folders: which files are images, which subfolders are classes, and what is said of the others."""

import os
import re
from pathlib import Path

import pytest
from PIL import Image

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError
from beitzoo.images.datasets import find_images as find_image_set
from beitzoo.images.datasets import guess_source, labelled_folder
from beitzoo.images.folders import LeftOut, find_images, images_below
from beitzoo.images.image_set import ImageSet


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_every_suffix_of_an_image_is_one(tmp_path: Path) -> None:
    names = [f"a.{suffix}" for suffix in ("JFIF", "avif", "gif", "jpe", "jpeg", "jpg", "pgm", "png", "tif", "webp")]
    assert [path.name for path in images_below(fill(tmp_path, *names))] == sorted(names)


def test_what_is_no_image_is_left_out_by_its_reason(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "._a.png", ".cache/b.png", "__MACOSX/._c.png", "@eaDir/d.png", "1.HEIC", "2.heif", "n.txt")
    for number in range(4):
        fill(tmp_path, f"sub/{number}.csv")
    left_out = LeftOut()
    assert list(find_images([str(tmp_path)], left_out)) == [tmp_path / "a.png"]
    assert left_out.describe() == [
        "Left out 4, hidden, or left by a tool: ._a.png, .cache, @eaDir, ...",
        "Left out 2, HEIC, which is not decoded here (convert them to JPEG or PNG): 1.HEIC, 2.heif",
        "Left out 5, not called like images: n.txt, sub/0.csv, sub/1.csv, ...",
    ]
    assert left_out.counts.total() == 11


def test_a_hidden_folder_that_is_named_is_searched(tmp_path: Path) -> None:
    fill(tmp_path, ".cache/a.png", ".b.png")
    assert [path.name for path in find_images([str(tmp_path / ".cache"), str(tmp_path / ".b.png")])] == [
        "a.png",
        ".b.png",
    ]


def test_folders_without_an_image_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.png", "cat/more/2.png", "dog/1.png", ".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png")
    fill(tmp_path, "iphone/IMG_1.HEIC", "cat/notes.txt", "top.png", "README.md")
    (tmp_path / "empty").mkdir()
    images = labelled_folder(tmp_path)
    assert (images.names, images.labels) == (("cat", "dog"), [0, 0, 1])
    assert [images.identity(index)[0] for index in range(3)] == ["cat/1.png", "cat/more/2.png", "dog/1.png"]
    assert images.describe() == [
        f"3 images of 2 classes in {tmp_path}: 1 (dog) to 2",
        "Left out 2, hidden, or left by a tool: .ipynb_checkpoints, __MACOSX",
        "Left out 2, not called like images: README.md, cat/notes.txt",
        "Left out 1, outside of class folders: top.png",
        "Left out 1, HEIC, which is not decoded here (convert them to JPEG or PNG): iphone/IMG_1.HEIC",
        "Left out 2, class folders without an image: empty, iphone",
    ]


def test_a_set_says_what_it_holds() -> None:
    image = Image.new("L", (1, 1))
    assert ImageSet([image] * 4, [0, 0, 1, 1], ("a", "b")).describe() == ["4 images of 2 classes: 2 of each"]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("test/cat/1.png", "val/cat/1.png"), "test, val"),
        (("test/cat/1.png", "train/cat/1.png", "training/cat/1.png"), "test, train, training"),
        (("Training/cat/1.png", "validation/cat/1.png", "other/1.png"), "Training, validation"),
        (("train/cat/1.png",), "train"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(names: tuple[str, ...], parts: str, tmp_path: Path) -> None:
    fill(tmp_path, *names)
    with pytest.raises(InvalidValueError, match=rf"has {parts}, which are parts of a data set .*such as {tmp_path}/"):
        labelled_folder(tmp_path)


def test_parts_may_be_above_the_classes(tmp_path: Path) -> None:
    """As ImageNet and many others are laid out; each class has one number in all parts."""
    fill(tmp_path, "val/dog/3.png", "train/cat/1.png", "train/dog/2.png", "test/cat/4.png", "train/owl/notes.txt")
    fill(tmp_path, "test/dog/.hidden.png", "readme.txt")
    images = labelled_folder(tmp_path)
    assert (images.names, images.labels) == (("cat", "dog"), [0, 1, 1, 0])
    assert images.parts == {"train": range(2), "validation": range(2, 3), "test": range(3, 4)}
    assert [images.identity(index)[0] for index in range(4)] == [
        "train/cat/1.png",
        "train/dog/2.png",
        "val/dog/3.png",
        "test/cat/4.png",
    ]
    assert images.describe()[2:] == [
        "Left out 2, not called like images: readme.txt, train/owl/notes.txt",
        "Left out 1, hidden, or left by a tool: test/dog/.hidden.png",
        "Left out 2, class folders without an image: train/owl, test/dog",
    ]
    fill(tmp_path, "val/fox/5.png")
    with pytest.raises(InvalidValueError, match=r"val/fox is of the part validation, but fox is no class .*cat, dog"):
        labelled_folder(tmp_path)


def test_parts_without_class_folders_have_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "test/1.png")
    with pytest.raises(MissingFileError, match=r"Left out 2, outside of class folders: train/1.png, test/1.png"):
        labelled_folder(tmp_path)


def test_a_train_is_something_to_ride_on(tmp_path: Path) -> None:
    fill(tmp_path, "bus/1.png", "car/1.png", "train/1.png")
    assert labelled_folder(tmp_path).names == ("bus", "car", "train")


def test_a_folder_without_images_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match=r"There is no folder .*CLASS/IMAGE"):
        labelled_folder(tmp_path / "absent")
    fill(tmp_path, "cat/1.heic")
    with pytest.raises(MissingFileError, match=r"expected .*CLASS/IMAGE. Left out 1, HEIC"):
        labelled_folder(tmp_path)
    with pytest.raises(FileAccessError, match=r"1\.heic is a file, and no CSV"):
        labelled_folder(tmp_path / "cat" / "1.heic")
    monkeypatch.setenv("HOME", str(fill(tmp_path / "home", "data/cat/1.png").parent / "home"))
    assert labelled_folder(Path("~/data")).names == ("cat",)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_class_names_need_not_be_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"d\xf6g")
    assert labelled_folder(fill(tmp_path, f"{name}/1.png")).names == (name,)


def test_a_folder_of_any_images_has_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, "b.png", "deep/er/a.jpg", "deep/._a.jpg", ".cache/c.png", "@eaDir/d.png", "notes.txt")
    images = find_image_set("images", tmp_path)
    assert (images.labels, images.names) == (None, ())
    assert [images.identity(index) for index in range(2)] == [("b.png", "1"), ("deep/er/a.jpg", "1")]
    assert images.describe() == [
        f"2 images without classes in {tmp_path}",
        "Left out 3, hidden, or left by a tool: .cache, @eaDir, deep/._a.jpg",
        "Left out 1, not called like images: notes.txt",
    ]


def test_a_folder_of_any_images_with_a_held_out_part_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "train/1.png", "test/1.png")
    with pytest.raises(InvalidValueError, match=r"has test, train, which are parts of a data set"):
        find_image_set("images", tmp_path)
    assert len(find_image_set("images", tmp_path / "train").images) == 1


def test_a_folder_without_any_image_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "notes.txt")
    with pytest.raises(MissingFileError, match=r"No images below .*Left out 1, not called like images: notes.txt"):
        find_image_set("images", tmp_path)
    with pytest.raises(MissingFileError, match=r"There is no folder .*absent"):
        find_image_set("images", tmp_path / "absent")
    with pytest.raises(InvalidValueError, match="The source 'images' needs a path"):
        find_image_set("images")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("ethz/food101", "ethz/food101"),
        ("hf:ethz/food101", "ethz/food101"),
        ("https://huggingface.co/datasets/ethz/food101", "ethz/food101"),
        ("food101", "food101"),
    ],
)
def test_who_names_a_data_set_of_the_hub_is_told_how_to_get_it(
    place: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"`hf download {name} --repo-type dataset --local-dir food101`"
    with pytest.raises(MissingFileError, match=re.escape(command)):
        find_image_set(guess_source(Path(place)), Path(place))
    with pytest.raises(MissingFileError, match=r"CLASS/IMAGE\.$"):
        find_image_set("folder", Path("my/own/photos"))


def test_what_was_downloaded_from_the_hub_is_known_by_its_files(tmp_path: Path) -> None:
    """Its tables are in a folder `data`, or one called like the configuration."""
    (tmp_path / "set" / "plain_text").mkdir(parents=True)
    (tmp_path / "set" / "README.md").touch()
    (tmp_path / "set" / "plain_text" / "train-00000-of-00001.parquet").touch()
    assert guess_source(tmp_path / "set") == "parquet"
    assert guess_source(tmp_path / "set" / "plain_text") == "parquet"
    assert guess_source(tmp_path) == "folder"
