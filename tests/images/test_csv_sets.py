"""Lists of images: rows of a CSV with path, label and perhaps part; what is wrong is said with its line."""

from pathlib import Path

import pytest
from PIL import Image

from beitzoo.errors import InvalidValueError, MissingFileError
from beitzoo.evaluation.evaluate import load_data
from beitzoo.images.csv_sets import listed_images
from beitzoo.images.datasets import find_images, guess_source
from beitzoo.images.image_set import with_held_out
from beitzoo.images.splits import choose_per_class, draw_split, read_split, write_split


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
        ("", r"line 1: the columns are none. Expected path \(or image\), label \(or labels\) and perhaps part"),
        (
            "path,image,label\n",
            r"line 1: the columns are path, image, label. Expected path \(or image\), label \(or labels\)",
        ),
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


@pytest.mark.parametrize("text", ["a.png, dog; cat\nb.png,\nc.png,cat\n", "a.png,cat|dog\nb.png,\nc.png,cat\n"])
def test_several_labels(tmp_path: Path, text: str) -> None:
    images = listed_images(write(tmp_path / "x.csv", f"path,labels\n{text}"))
    assert (images.names, images.labels, images.label_sets) == (("cat", "dog"), None, [(0, 1), (), (0,)])
    assert images.describe() == [
        f"3 images with up to 2 of 2 labels each in {tmp_path}: 1 (dog) to 2, 1 without any",
    ]
    assert [images.classes_of(index) for index in range(3)] == [(0, 1), (), (0,)]


def test_a_column_of_0_and_1_for_each_class(tmp_path: Path) -> None:
    """Classes are in the order of the columns, or of a file beside; also those that no image has."""
    text = "path,owl,dog,part,cat\na.png,0,1,test,1\nb.png,0,0,train,0\nc.png,0,1,train,0\n"
    path = write(tmp_path / "x.csv", text)
    images = listed_images(path)
    assert (images.names, images.label_sets) == (("owl", "dog", "cat"), [(), (1,), (1, 2)])
    assert images.parts == {"train": range(2), "test": range(2, 3)}
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\nowl\n")
    images = listed_images(path)
    assert (images.names, images.label_sets) == (("cat", "dog", "emu", "owl"), [(), (1,), (0, 1)])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(InvalidValueError, match="line 1: the label 'owl' is no class of"):
        listed_images(path)


def test_several_labels_by_name_or_number(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog, big\nowl\n")
    images = listed_images(write(tmp_path / "x.csv", 'path,labels\na.png,2;0\nb.png,"dog, big;cat"\nc.png,owl\n'))
    assert images.label_sets == [(0, 2), (0, 1), (2,)]
    for labels, reason in (
        ("owl;2", "'2' is there twice"),
        ("3", "'3' is no class of"),
        ("1;emu", "'emu' is no class"),
    ):
        with pytest.raises(InvalidValueError, match=f"line 2: the label {reason}"):
            listed_images(write(tmp_path / "x.csv", f"path,labels\na.png,{labels}\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,labels,label\n", "line 1: the columns are path, labels, label. Expected"),
        ("path,labels\na.png,x;;y\n", "line 2: 'x;;y' has an empty label"),
        ("path,labels\na.png,x;y;\n", "line 2: 'x;y;' has an empty label"),
        ("path,labels\na.png,x\nb.png,x;y;x\n", "line 3: the label 'x' is there twice"),
        ("path,labels\na.png,x\nb.png,x|y\nc.png,y;x\n", r"line 4 has ';' and line 3 has '\|'. Separate labels by one"),
        ('path,labels\na.png,"x,y"\n', "line 2: the labels 'x,y' have a comma, but labels are separated by ';' or"),
        ("path,x,y\na.png,1,0\nb.png,1,-1\n", "line 3: the column 'y' has '-1'. Without a column label or labels"),
        ("path,id,x\na.png,17,0\n", "line 2: the column 'id' has '17'"),
    ],
)
def test_wrong_labels_say_in_which_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InvalidValueError, match=reason):
        listed_images(write(tmp_path / "x.csv", text))


def test_what_needs_one_class_refuses_several_labels(tmp_path: Path) -> None:
    several = listed_images(write(tmp_path / "x.csv", "path,labels\na.png,x;y\nb.png,y\n"))
    with pytest.raises(InvalidValueError, match="may have several labels each, and a probe needs one class of each"):
        several.one_label_each("a probe")
    assert listed_images(write(tmp_path / "y.csv", "path,label\na.png,x\n")).one_label_each("a probe") == [0]


def test_held_out_images_with_several_labels(tmp_path: Path) -> None:
    """They are numbered as those to train on, wherever their names stand in the other list."""
    train = listed_images(write(tmp_path / "x.csv", "path,labels\na.png,b;c\nb.png,a\n"))
    test = listed_images(write(tmp_path / "test" / "x.csv", "path,c,a\na.png,1,1\nb.png,0,0\n"))
    both = with_held_out(train, test)
    assert both.label_sets == [(1, 2), (0,), (0, 2), ()]
    assert (both.labels, both.parts) == (None, {"train": range(2), "test": range(2, 4)})
    one = listed_images(write(tmp_path / "one" / "x.csv", "path,label\na.png,a\n"))
    with pytest.raises(InvalidValueError, match=r"one have one class each, and those of .* may have several labels"):
        with_held_out(train, one)
    foreign = listed_images(write(tmp_path / "new" / "x.csv", "path,labels\na.png,a;emu\n"))
    with pytest.raises(InvalidValueError, match=f"emu is a class of {tmp_path}/new, but none of {tmp_path}"):
        with_held_out(train, foreign)


def test_a_split_of_several_labels_is_drawn_and_read_back(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,{'x;y' if number % 2 else ''}\n" for number in range(20))
    for number in range(20):
        Image.new("L", (2, 2)).save(tmp_path / f"{number}.png")
    (tmp_path / "x.csv").write_text(f"path,labels\n{rows}")
    images = listed_images(tmp_path / "x.csv")
    split = draw_split(images, 0.25, 0.2, seed=0)
    assert [len(part) for part in (split.train, split.val, split.test)] == [12, 4, 4]
    assert sorted([*split.train, *split.val, *split.test]) == list(range(20))
    assert split == draw_split(images, 0.25, 0.2, seed=0) != draw_split(images, 0.25, 0.2, seed=1)
    write_split(tmp_path / "split.csv", images, split)
    assert read_split(tmp_path / "split.csv", images) == split
    assert '"1.png","' in (tmp_path / "split.csv").read_text() and '"x;y"' in (tmp_path / "split.csv").read_text()
    with pytest.raises(InvalidValueError, match="a choice of 2 images of each class needs one class of each"):
        choose_per_class(images, split.train, 2, seed=0)
