"""Splits of a data set: the same images in every run, and in the file that says which they were."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from beitzoo.errors import InvalidValueError
from beitzoo.images.datasets import digits, labelled_folder
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split, choose_per_class, draw_split, read_split, write_split


def test_the_digits_are_split_as_they_were_for_the_shipped_model() -> None:
    """Its weights were trained on these images, so another draw would measure it on what it has seen."""
    split = draw_split(digits(), val_fraction=0.1, test_fraction=1 / 3, seed=0)
    assert (split.train[:3], split.val[:3], split.test[:3]) == ([747, 596, 884], [1651, 319, 924], [1400, 1566, 364])
    text = ",".join(map(str, split.train + split.val + split.test))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "b29947f013befb7c"


def test_splits_are_even_disjoint_and_drawn_by_the_seed() -> None:
    labels = [number % 10 for number in range(600)]
    images = ImageSet([Image.new("L", (1, 1))] * 600, labels, tuple("0123456789"))
    split = draw_split(images, 0.1, 1 / 3, seed=0)
    assert sorted(split.train + split.val + split.test) == list(range(600))
    assert Counter(labels[i] for i in split.test) == dict.fromkeys(range(10), 20)
    assert Counter(labels[i] for i in split.val) == dict.fromkeys(range(10), 4)
    assert draw_split(images, 0.1, 1 / 3, seed=0) == split
    assert set(draw_split(images, 0.1, 1 / 3, seed=7).test) != set(split.test)


def test_classes_of_one_image_are_trained_on() -> None:
    """Of two images one is left when the other is held out, and none is then drawn to choose by."""
    labels = [0] * 4 + [1] + [2] * 2 + [3] + [0] * 4
    images = ImageSet([Image.new("L", (1, 1))] * 12, labels, ("a", "b", "c", "d"))
    split = draw_split(images, val_fraction=0.25, test_fraction=0.25, seed=0)
    assert Counter(labels[i] for i in split.test) == {0: 2, 2: 1}
    assert Counter(labels[i] for i in split.val) == {0: 2}
    assert Counter(labels[i] for i in split.train) == {0: 4, 1: 1, 2: 1, 3: 1}
    assert draw_split(images, 0, 0, seed=0).train == list(range(12))


def test_a_fraction_that_leaves_a_class_out_is_refused() -> None:
    with pytest.raises(
        InvalidValueError, match=r"A fraction of 0.001 of 1797 images is 2.*least 10, one of each class"
    ):
        draw_split(digits(), val_fraction=0.1, test_fraction=0.001, seed=0)


def make_folder(root: Path, sizes: dict[str, int]) -> ImageSet:
    for name, size in sizes.items():
        path = root / os.fsdecode(name.encode("latin-1"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return labelled_folder(root)


def test_a_split_of_files_is_read_as_it_was_written_wherever_the_folder_lies(tmp_path: Path) -> None:
    names = {"cat/1.png": 1, "cat/2.png": 2, "cat/a\n,\"'.png": 3, "d\xf6g/\xe4 \r.png": 4, "d\xf6g/3.png": 5}
    images = make_folder(tmp_path / "here", names)
    split = Split(train=[4, 0], val=[3], test=[2, 1])
    write_split(tmp_path / "split.csv", images, split)
    assert (tmp_path / "split.csv").read_bytes().splitlines()[0] == b'"image","bytes","class","split"'
    assert read_split(tmp_path / "split.csv", images) == split
    (tmp_path / "here").rename(tmp_path / "there")
    assert read_split(tmp_path / "split.csv", labelled_folder(tmp_path / "there")) == split


def test_other_images_of_the_same_names_are_in_no_part(tmp_path: Path) -> None:
    trained = make_folder(tmp_path / "train", {"cat/1.png": 1, "cat/2.png": 2, "dog/1.png": 3})
    write_split(tmp_path / "split.csv", trained, Split([0, 1], [], [2]))
    others = make_folder(tmp_path / "test", {"cat/1.png": 7, "cat/2.png": 2, "dog/0.png": 8})
    assert read_split(tmp_path / "split.csv", others) == Split([1], [], [])


def test_digits_are_named_by_their_place(tmp_path: Path) -> None:
    images = digits()
    split = draw_split(images, 0.1, 1 / 3, seed=0)
    write_split(tmp_path / "split.csv", images, split)
    assert (tmp_path / "split.csv").read_text().splitlines()[1] == f'"digits:747","","{images.labels[747]}","train"'
    assert read_split(tmp_path / "split.csv", images) == split


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", '"image","bytes","class","split"\n"a","1","cat","holdout"\n'])
def test_what_is_no_split_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(InvalidValueError, match="is not a split: it must have the columns image, bytes, class, split"):
        read_split(tmp_path / "split.csv", digits())


def test_images_without_classes_are_split_and_written_without(tmp_path: Path) -> None:
    images = ImageSet([Image.new("L", (1, 1))] * 50, None, ())
    split = draw_split(images, 0.1, 0.2, seed=0)
    assert sorted(split.train + split.val + split.test) == list(range(50))
    assert (len(split.test), len(split.val)) == (10, 4)
    assert draw_split(images, 0, 0, seed=0) == Split(list(range(50)), [], [])
    write_split(tmp_path / "split.csv", images, split)
    assert (tmp_path / "split.csv").read_text().splitlines()[1] == f'"digits:{split.train[0]}","","","train"'
    assert read_split(tmp_path / "split.csv", images) == split


def test_the_same_number_is_chosen_of_each_class() -> None:
    images = digits()
    few, more = (choose_per_class(images, range(1000), count, seed=3) for count in (5, 20))
    labels = images.labels
    assert labels is not None
    assert Counter(labels[index] for index in few) == dict.fromkeys(range(10), 5)
    assert set(few) < set(more) < set(range(1000))
    assert set(choose_per_class(images, range(1000), 5, seed=4)) != set(few)
    with pytest.raises(InvalidValueError, match=r"not 3 images of each class to train on: \d has [0-2]"):
        choose_per_class(images, range(20), 3, seed=0)
    with pytest.raises(
        InvalidValueError, match="have no classes, and a choice of 3 images of each class needs one class of each"
    ):
        choose_per_class(ImageSet(images.images, None, ()), range(20), 3, seed=0)


def test_a_part_without_an_image_is_refused() -> None:
    few = ImageSet([Image.new("L", (1, 1))] * 3, None, ())
    with pytest.raises(InvalidValueError, match="of 3 images is 0, and both parts of a split need at least 1"):
        draw_split(few, val_fraction=0.1, test_fraction=0.0, seed=0)
