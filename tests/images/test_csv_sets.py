"""Lists of images: rows of a CSV with path, label and perhaps part; what is wrong is said with its line."""

from pathlib import Path

import pytest
from PIL import Image

from beitzoo.errors import InvalidValueError, MissingFileError
from beitzoo.evaluation.evaluate import load_data
from beitzoo.images.csv_sets import listed_images
from beitzoo.images.datasets import find_images, guess_source


def write(path: Path, text: str) -> Path:
    """Write a CSV, and beside it the images a, b and c."""
    path.parent.mkdir(exist_ok=True)
    for name in "abc":
        Image.new("L", (2, 2)).save(path.parent / f"{name}.png")
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_list(tmp_path: Path) -> None:
    write(tmp_path / "images" / "other.csv", "")
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "mine.CSV"
    path.write_text(f'\ufeffid,image,label\n1,../images/b.png,"cat, big"\n2,{tmp_path}/images/a.png, ant \n')
    assert guess_source(path) == "csv"
    images = find_images("csv", path)
    assert (images.names, images.labels, images.parts) == (("ant", "cat, big"), [1, 0], {})
    assert [images.identity(index)[0] for index in range(2)] == ["images/b.png", "images/a.png"]
    assert load_data(str(path)).describe() == [f"2 images of 2 classes in {tmp_path}: 1 of each"]


@pytest.mark.parametrize(("labels", "names"), [("10,9,9", ("9", "10")), ("10,9,x", ("10", "9", "x"))])
def test_whole_numbers_are_in_their_order(labels: str, names: tuple[str, ...], tmp_path: Path) -> None:
    first, second, third = labels.split(",")
    images = listed_images(write(tmp_path / "x.csv", f"path,label\na.png,{first}\nb.png,{second}\nc.png,{third}\n"))
    assert images.names == names
    assert [images.names[label] for label in images.labels or ()] == [first, second, third]


def test_parts_and_named_numbers(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    text = "file_name,label,part\na.png,1,test\nb.png,cat,Training\nc.png,dog,\nd.png,0,train\n"
    images = listed_images(write(tmp_path / "metadata.csv", text))
    assert (images.names, images.labels) == (("cat", "dog", "owl"), [0, 1, 1])
    assert images.parts == {"train": range(1), "test": range(1, 2)}
    assert images.describe()[2:] == ["Left out 1, named in the CSV, but not there: d.png"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"line 1: the columns are none. Expected path \(or image\), label and perhaps part"),
        ("path,image,label\n", r"line 1: the columns are path, image, label. Expected path \(or image\), label"),
        ("path;label\na.png;x\n", "line 1: the columns are path;label"),
        ("path,label\na.png,x\nb.png,\n", "line 3: there is no label"),
        ("path,label\n,x\n", "line 2: there is no path"),
        ("path,label\na.png,x,y\n", "line 2: there are not 2 fields"),
        ("path,label,part\na.png,x,tset\n", "line 2: there is no part 'tset'"),
        ("path,label\na.png,x\nb.png,x\n./a.png,y\n", "lines 2 and 4: both name ./a.png"),
    ],
)
def test_a_wrong_list_says_in_which_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidValueError, match=reason):
        listed_images(write(tmp_path / "x.csv", text))


def test_labels_that_no_class_has(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for label in ("2", "-1", "Cat"):
        path = write(tmp_path / "x.csv", f"path,label\na.png,1\nb.png,{label}\n")
        expected = (
            rf"line 3: the label '{label}' is no class of .*names 2. Write one of these names, or a number from 0 to 1"
        )
        with pytest.raises(InvalidValueError, match=expected):
            listed_images(path)


def test_a_list_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"No images in .*Left out 1, named in the CSV, but not there: z.png"):
        listed_images(write(tmp_path / "x.csv", "path,label\nz.png,1\n"))
    with pytest.raises(MissingFileError, match="There is no file"):
        listed_images(tmp_path / "absent.csv")
