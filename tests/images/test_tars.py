"""WebDataset tars: samples and their classes, read one by one from where they are in the tar."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError
from beitzoo.images.datasets import find_images
from beitzoo.images.files import Encoded, ImageError, as_image
from beitzoo.images.image_set import ImageSet


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "w:gz" if path.name.endswith(".gz") else "w"
    with tarfile.open(path, mode, format=form) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shades(images: ImageSet) -> list[int]:
    """Return the red of the first pixel of each image."""
    return [np.asarray(as_image(image))[0, 0, 0].item() for image in images.images]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_one_name_are_a_sample(form: int, tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "e" * 120
    members = {
        "a/1.2.json": b'{"label": 9}',  # the name ends at the first dot
        "a/1.png": png(10),
        "a/1.cls": b"1\n",
        f"{long}.cls": b"0",
        f"{long}.PNG": png(20),
        f"{long}.seg.png": png(99),
        "./b.jpg": png(30),
        "./b.json": b'{"label": 1, "width": 3}',
        "._c.jpg": png(99),
        "d.txt": b"no image",
    }
    images = find_images("webdataset", write_tar(tmp_path / "t.tar", members, form))
    assert (images.labels, images.names, shades(images)) == ([1, 0, 1], ("0", "1"), [10, 20, 30])
    assert images.identity(1) == (f"t.tar:{long}.PNG", str(len(png(20))))
    assert images.describe() == [
        f"3 images of 2 classes in {tmp_path}: 1 (0) to 2",
        "Left out 1, samples without an image: t.tar:d",
    ]


def test_tars_of_a_folder_with_names_of_classes_and_parts(tmp_path: Path) -> None:
    for name, shade, label in (("x-train-0001", 2, b"1"), ("x-train-0000", 1, b"0"), ("x-val-0000", 3, b"1")):
        write_tar(tmp_path / f"{name}.tar", {"1.png": png(shade), "1.cls": label})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "again").symlink_to(tmp_path)
    write_tar(tmp_path / ".cache" / "x.tar", {"1.png": png(9)})
    images = find_images("webdataset", tmp_path)
    assert (images.names, images.labels, shades(images)) == (("cat", "dog"), [0, 1, 1], [1, 2, 3])
    assert images.parts == {"train": range(2), "validation": range(2, 3)}
    assert shades(find_images("webdataset", tmp_path / "x-train-{0000..0001}.tar")) == [1, 2]
    assert shades(find_images("webdataset", tmp_path / "x-{train,val}-0000.tar")) == [1, 3]
    assert shades(find_images("webdataset", tmp_path / "x-train-000[1].tar")) == [2]


def test_classes_may_be_words_or_not_be_there(tmp_path: Path) -> None:
    words = {"1.png": png(1), "1.cls": b"dog", "2.png": png(2), "2.cls": b"cat", "3.png": png(3)}
    images = find_images("webdataset", write_tar(tmp_path / "w.tar", words))
    assert (images.names, images.labels, shades(images)) == (("cat", "dog"), [1, 0], [1, 2])
    assert images.describe()[1:] == ["Left out 1, without one of the classes: w.tar:3.png"]
    none = {"1.png": png(1), "1.json": b"{}", "2.png": png(2), "2.json": b"{broken", "3.png": png(3)}
    none["3.json"] = b"[" * 10**5
    images = find_images("webdataset", write_tar(tmp_path / "n.tar", none))
    assert (images.names, images.labels, shades(images)) == ((), None, [1, 2, 3])


def test_an_image_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    members = {"1.png": b"text", "2.png": b"", "3.png": png(3), "4.png": png(4)}
    images = find_images("webdataset", write_tar(tmp_path / "t.tar", members))
    for place, reason in ((0, "not an image that can be read"), (1, "it is empty")):
        with pytest.raises(ImageError, match=reason):
            as_image(images.images[place])
    last = images.images[3]
    assert np.asarray(as_image(last))[0, 0, 0] == 4
    content = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(content[: content.rindex(b"IEND")])
    with pytest.raises(ImageError, match="the tar ends before the image does"):
        as_image(last)
    (tmp_path / "t.tar").unlink()
    with pytest.raises(ImageError, match="there is no such file"):
        as_image(last)


def test_a_second_image_of_one_name_is_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, shade in (("1.png", 1), ("2.png", 2), ("1.png", 3)):
            info = tarfile.TarInfo(name)
            info.size = len(png(shade))
            tar.addfile(info, io.BytesIO(png(shade)))
    images = find_images("webdataset", tmp_path)
    assert shades(images) == [1, 2]
    assert images.describe()[1:] == ["Left out 1, images of a name that is there already: t.tar:1.png"]


def test_what_is_no_plain_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="No tars at"):
        find_images("webdataset", tmp_path)
    packed = write_tar(tmp_path / "a.tar.gz", {"1.png": png(1)})
    with pytest.raises(InvalidValueError, match=r"a.tar.gz is compressed \(gzip\).*Unpack it to a plain"):
        find_images("webdataset", tmp_path)
    packed.unlink()
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(FileAccessError, match="is a folder, a pipe or a link to nothing"):
        find_images("webdataset", tmp_path)
    (tmp_path / "a.tar").unlink()
    whole = write_tar(tmp_path / "a.tar", {"1.png": png(1), "2.png": bytes(9999), "3.png": png(3)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:4000])
    with pytest.raises(InvalidValueError, match="no tar, or is cut short"):
        find_images("webdataset", tmp_path)
    second = whole.index(b"2.png")
    damaged = whole[:second] + b"3" + whole[second + 1 :]  # Python's reader would end there without a word
    (tmp_path / "a.tar").write_bytes(damaged)
    with pytest.raises(InvalidValueError, match=f"no header at byte {second}"):
        find_images("webdataset", tmp_path)
    (tmp_path / "a.tar").write_bytes(b"text" * 1000)
    with pytest.raises(InvalidValueError, match="no tar, or is cut short"):
        find_images("webdataset", tmp_path)
    write_tar(tmp_path / "a.tar", {"1.txt": b"1"})
    with pytest.raises(MissingFileError, match=r"No images in the files at .*Left out 1, samples without an image"):
        find_images("webdataset", tmp_path)


def test_a_member_is_sent_by_its_place(tmp_path: Path) -> None:
    images = find_images("webdataset", write_tar(tmp_path / "t.tar", {"1.png": bytes(10**5)}))
    sent = pickle.dumps(images.images[0])
    assert len(sent) < 400
    received = pickle.loads(sent)
    assert isinstance(received, Encoded)
    assert received.read() == bytes(10**5)


def test_several_labels_of_each_image(tmp_path: Path) -> None:
    """By lists in json or separated in cls, of which one alone is a list too; what states nothing is left out."""
    lists = {
        "1.json": b'{"labels": ["b", "a"]}',
        "1.png": png(1),
        "2.json": b'{"label": []}',
        "2.png": png(2),
        "3.png": png(3),
        "4.json": b'{"label": "c; d"}',
        "4.png": png(4),
    }
    images = find_images("webdataset", write_tar(tmp_path / "lists" / "t.tar", lists))
    assert (images.names, images.labels) == (("a", "b", "c; d"), None)
    assert (images.label_sets, shades(images)) == ([(0, 1), (), (2,)], [1, 2, 4])
    assert images.describe()[1:] == ["Left out 1, without one of the classes: t.tar:3.png"]
    words = {b"2 ; 0\n": "train", b"": "train", b"1": "train", b"-1": "test", b"0;1": "test"}
    for number, (text, part) in enumerate(words.items()):
        write_tar(tmp_path / "words" / f"{part}-{number}.tar", {f"{number}.cls": text, f"{number}.png": png(number)})
    (tmp_path / "words" / "classes.txt").write_text("ant\nbee\ncat\n")
    images = find_images("webdataset", tmp_path / "words")
    assert (images.names, images.label_sets) == (("ant", "bee", "cat"), [(0, 2), (), (1,), (0, 1)])
    assert images.parts == {"train": range(3), "test": range(3, 4)}
    one = {"1.cls": b"a", "1.png": png(1), "2.cls": b"", "2.png": png(2), "2.txt": b"a; b"}
    images = find_images("webdataset", write_tar(tmp_path / "one.tar", one))
    assert (images.names, images.labels, images.label_sets) == (("a",), [0], None)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("2.cls", b"a;;b", "t.tar:2.png: among the labels is an empty one"),
        ("2.cls", b"a;a", "t.tar:2.png: among the labels is 'a' twice"),
        ("2.cls", b"0;-1", "t.tar:2.png: among the labels is a negative one"),
        ("2.cls", b"a|b", r"separated in two ways: that of .*t.tar:1.png by ';' and that of .*t.tar:2.png by '\|'"),
        ("2.cls", b"a;b|c", "separated in two ways"),
        ("2.json", b'{"label": [1, 0.5]}', "t.tar:2.json: among the labels is 0.5, which is no whole number and no wo"),
        ("2.json", b'{"label": [true]}', "t.tar:2.json: among the labels is True, which is no whole number"),
        ("2.json", b'{"label": [null]}', "t.tar:2.json: among the labels is an empty one"),
    ],
)
def test_wrong_labels_name_the_sample(name: str, text: bytes, reason: str, tmp_path: Path) -> None:
    members = {"1.cls": b"x;y", "1.png": png(1), name: text, "2.png": png(2)}
    with pytest.raises(InvalidValueError, match=reason):
        find_images("webdataset", write_tar(tmp_path / "t.tar", members))


def test_label_numbers_without_a_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    path = write_tar(tmp_path / "t.tar", {"1.json": b'{"labels": [0, 2]}', "1.png": png(1)})
    with pytest.raises(InvalidValueError, match="the class number 2, but only 2 classes are named"):
        find_images("webdataset", path)
