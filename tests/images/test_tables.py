"""Tables of images: which rows are images of which class, read one by one, in memory or from a copy."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError
from beitzoo.images import tables
from beitzoo.images.datasets import find_images, guess_source
from beitzoo.images.files import Encoded, ImageError, as_image
from beitzoo.images.image_set import ImageSet

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_table(path: Path, images: list[bytes | None], labels: Any = None, names: list[str] | None = None) -> Path:
    """Write a table as the hub's library does, two rows a group."""
    structs = [None if image is None else {"bytes": image, "path": "a.png"} for image in images]
    columns = {"image": pa.array(structs, STRUCT)}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


def shades(images: ImageSet, indices: Any = None) -> list[int]:
    """Return the red of the first pixel of each image."""
    places = range(len(images.images)) if indices is None else indices
    return [np.asarray(as_image(images.images[place]))[0, 0, 0].item() for place in places]


def test_rows_are_images_with_the_classes_that_the_hub_notes(tmp_path: Path) -> None:
    write_table(tmp_path / "b.parquet", [png(30), png(40)], [1, 1], ["cat", "dog"])
    write_table(tmp_path / "a.parquet", [png(0), png(10), png(20)], [1, 0, 1], ["cat", "dog"])
    images = find_images("parquet", tmp_path)
    assert (images.names, images.labels) == (("cat", "dog"), [1, 0, 1, 1, 1])
    assert shades(images) == [0, 10, 20, 30, 40]
    assert images.identity(3) == ("b.parquet:0", str(len(png(30))))
    assert images.describe() == [f"5 images of 2 classes in {tmp_path}: 1 (cat) to 4"]


def test_parts_by_the_names_of_the_files(tmp_path: Path) -> None:
    for name, shade in (("test-00000-of-00001", 3), ("train-00000-of-00002", 1), ("train-00001-of-00002", 2)):
        write_table(tmp_path / "data" / f"{name}.parquet", [png(shade)] * 2, [0, 1])
    images = find_images(guess_source(tmp_path), tmp_path)
    assert images.parts == {"train": range(4), "test": range(4, 6)}
    assert [shades(images, part) for part in images.parts.values()] == [[1, 1, 2, 2], [3, 3]]
    assert images.describe()[1] == "Parts of its own: 4 train, 2 test; only train is for training."
    assert find_images("parquet", tmp_path / "data" / "train-*").parts == {}
    assert shades(find_images("parquet", tmp_path / "data" / "train-{00001..00001}-of-00002.parquet")) == [2, 2]


def test_classes_have_names_of_a_file_or_numbers_or_are_words(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.parquet", [png(0)] * 3, [2, 0, 2])
    assert find_images("parquet", path).names == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    assert find_images("parquet", path).names == ("ant", "bee", "cow")
    words = find_images("parquet", write_table(path, [png(0)] * 3, ["tiger", None, "ape"]))
    assert (words.names, words.labels) == (("ape", "tiger"), [1, 0])


def test_rows_without_one_of_the_classes_are_left_out_and_counted(tmp_path: Path) -> None:
    shown = [png(shade) for shade in range(5)]
    images = find_images("parquet", write_table(tmp_path / "t.parquet", shown, [0, None, None, -1, 1], ["cat", "dog"]))
    assert (images.labels, shades(images)) == ([0, 1], [0, 4])
    assert [images.identity(index)[0] for index in (0, 1)] == ["t.parquet:0", "t.parquet:4"]
    assert images.describe()[1:] == ["Left out 3, without one of the classes: t.parquet:1, t.parquet:2, t.parquet:3"]


@pytest.mark.parametrize("note", [{"_type": "List", "feature": {}}, {"_type": "Sequence", "feature": {}}, [{}]])
def test_several_labels_as_the_hub_notes_them(note: Any, tmp_path: Path) -> None:
    """By datasets 4 and later, before, and long before; a row that nobody labelled is left out."""
    of_one = {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}
    feature = [of_one] if isinstance(note, list) else {**note, "feature": of_one}
    features = {"image": {"_type": "Image"}, "tags": feature}
    structs = [{"bytes": png(shade), "path": "a.png"} for shade in range(4)]
    labels = pa.array([[2, 0], [], None, [1]], pa.list_(pa.int64()))
    table = pa.table({"image": pa.array(structs, STRUCT), "tags": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    images = find_images("parquet", tmp_path)
    assert (images.names, images.labels, images.label_sets) == (("ant", "bee", "cat"), None, [(0, 2), (), (1,)])
    assert shades(images) == [0, 1, 3]
    assert images.describe()[1:] == ["Left out 1, without one of the classes: t.parquet:2"]


def test_several_labels_in_words_or_numbers_of_several_files(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", [png(0)] * 3, [["b", "a"], ["b"], []])
    write_table(tmp_path / "test.parquet", [png(0)] * 2, [["c"], ["a"]])
    images = find_images("parquet", tmp_path)
    assert (images.names, images.label_sets) == (("a", "b", "c"), [(0, 1), (1,), (), (2,), (0,)])
    assert images.parts == {"train": range(3), "test": range(3, 5)}
    write_table(tmp_path / "test.parquet", [png(0)] * 2, ["c", "a"])
    with pytest.raises(InvalidValueError, match="have one class of each image, others lists of several"):
        find_images("parquet", tmp_path)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([[0], [1, 1]], "row 1: among the labels in the column label is 1 twice"),
        ([[0, None]], "row 0: among the labels in the column label is an empty one"),
        ([[0, -1]], "row 0: among the labels in the column label is a negative one"),
        ([[0, 2]], r"the class number 2, but only 2 classes are named"),
        ([[0.5]], r"holds list<.*double>, not one class per image. Expected whole numbers or words, or lists"),
    ],
)
def test_wrong_lists_of_labels(labels: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    path = write_table(tmp_path / "t.parquet", [png(0)] * len(labels), labels)
    with pytest.raises(InvalidValueError, match=reason):
        find_images("parquet", path)


def test_numbers_without_a_name_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.parquet", [png(0)] * 3, [0, 2, 1], ["cat", "dog"])
    with pytest.raises(InvalidValueError, match=r"the class number 2, but only 2 classes are named.*classes\.txt"):
        find_images("parquet", path)


@pytest.mark.parametrize("labels", [None, [-1, -1], [None, None]])
def test_tables_without_classes(labels: Any, tmp_path: Path) -> None:
    images = find_images("parquet", write_table(tmp_path / "t.parquet", [png(1), png(2)], labels, ["cat", "dog"]))
    assert (images.labels, images.names, shades(images)) == (None, (), [1, 2])
    assert images.describe() == [f"2 images without classes in {tmp_path}"]


def test_a_row_without_a_readable_image_says_why(tmp_path: Path) -> None:
    images = find_images("parquet", write_table(tmp_path / "t.parquet", [png(1)[:40], None, b"", b"text", png(5)]))
    reasons = []
    for image in images.images[:4]:
        with pytest.raises(ImageError) as caught:
            as_image(image)
        reasons.append(str(caught.value).split(":")[0])
    assert reasons[1:3] == ["the table has no bytes in this row", "it is empty"]
    assert reasons[3].startswith("not an image that can be read")
    assert [images.identity(index)[1] for index in range(4)] == ["40", "", "0", "4"]
    assert shades(images, [4]) == [5]


def test_bytes_alone_and_another_name_are_images_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": pa.array([png(7)], pa.large_binary())}), tmp_path / "t.parquet")
    assert shades(find_images("parquet", tmp_path)) == [7]


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())])
def test_bytes_and_words_may_be_stored_in_any_way(kind: Any, tmp_path: Path) -> None:
    shown = pa.array([png(7), png(8), png(7)]).cast(kind)
    words = pa.array(["b", "a", "b"]).cast(pa.string_view())
    pq.write_table(pa.table({"image": shown, "label": words}), tmp_path / "t.parquet", row_group_size=2)
    images = find_images("parquet", tmp_path)
    assert (shades(images), images.labels, images.names) == ([7, 8, 7], [1, 0, 1], ("a", "b"))


def test_numbers_that_are_no_classes(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": pa.array([2**64 - 1, 0], pa.uint64())}), path)
    assert shades(find_images("parquet", path)) == [2]
    write_table(path, [png(1), png(2)], [10**12, 0])
    with pytest.raises(InvalidValueError, match=r"class number of 1,000,000 or more\. Number the classes from 0"):
        find_images("parquet", path)


def test_a_table_without_images_lists_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "image": [1]}), tmp_path / "t.parquet")
    expected = r"has no column of images, but text \(string\), image \(int64\). Expected a column 'image' of bytes"
    with pytest.raises(InvalidValueError, match=expected):
        find_images("parquet", tmp_path)


def test_what_is_no_data_set_of_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"No Parquet files at .* or a pattern such as"):
        find_images("parquet", tmp_path)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InvalidValueError, match=r"cannot be read as Parquet: .*Get it again"):
        find_images("parquet", tmp_path)
    write_table(tmp_path / "t.parquet", [png(0)] * 9)
    damaged = bytearray((tmp_path / "t.parquet").read_bytes())
    damaged[4:60] = bytes(56)  # the head of the first page of images
    (tmp_path / "t.parquet").write_bytes(damaged)
    with pytest.raises(InvalidValueError, match=r"cannot be read as Parquet: .*Get it again"):
        find_images("parquet", tmp_path)
    odd = Path(os.fsdecode(bytes(tmp_path / "t") + b"\xff.parquet"))
    (tmp_path / "t.parquet").rename(odd)
    with pytest.raises(FileAccessError, match="it is not text"):
        find_images("parquet", tmp_path)
    odd.unlink()
    write_table(tmp_path / "t.parquet", [])
    with pytest.raises(MissingFileError, match="No images in the files at"):
        find_images("parquet", tmp_path)
    write_table(tmp_path / "t.parquet", [png(0)], [0], ["cat"])
    write_table(tmp_path / "u.parquet", [png(0)], [0], ["dog"])
    with pytest.raises(InvalidValueError, match="different classes"):
        find_images("parquet", tmp_path)


def test_large_tables_are_copied_once_and_anew_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tables, "_MOST_IN_MEMORY", 10)
    monkeypatch.setattr(tables.constants, "HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "beitzoo" / "tables"
    path = write_table(tmp_path / "data" / "t.parquet", [png(shade) for shade in range(5)])
    images = find_images("parquet", path)
    assert shades(images) == list(range(5))
    assert f"Copying the images of 1 tables (0.0 GB) once to {folder}" in caplog.text
    (copy,) = folder.glob("*.arrow")
    before = copy.stat().st_mtime_ns
    caplog.clear()
    assert shades(find_images("parquet", path)) == list(range(5))
    assert (copy.stat().st_mtime_ns, caplog.text) == (before, "")
    write_table(path, [png(shade) for shade in range(90, 95)])
    os.utime(path, ns=(before + 10**9, before + 10**9))
    copy.unlink()
    with pytest.raises(InvalidValueError, match="is another file than it was"):
        pickle.loads(pickle.dumps(images.images))[0].size  # noqa: B018
    assert shades(find_images("parquet", path)) == list(range(90, 95))
    assert copy not in folder.glob("*.arrow")
    assert len(list(folder.glob("*.arrow"))) == 1


def test_images_are_sent_by_the_name_of_their_table(tmp_path: Path) -> None:
    images = find_images("parquet", write_table(tmp_path / "t.parquet", [os.urandom(10**5) for _ in range(3)]))
    assert isinstance(images.images[1], Encoded)
    content = images.images[1].read()
    sent = pickle.dumps(images.images)
    assert len(sent) < 2000
    assert len(pickle.dumps(images.images[1])) < 500
    assert pickle.loads(sent)[1].read() == content


def test_the_fine_one_of_two_labels_is_taken(tmp_path: Path) -> None:
    """As CIFAR-100 has them on the hub; a column `label` goes before both."""
    columns = {"img": pa.array([{"bytes": png(0), "path": "a.png"}] * 2, STRUCT), "fine_label": [7, 9]}
    pq.write_table(pa.table({"coarse_label": [1, 0], **columns}), tmp_path / "a.parquet")
    assert find_images("parquet", tmp_path).labels == [7, 9]
    pq.write_table(pa.table({**columns, "label": [0, 1]}), tmp_path / "a.parquet")
    assert find_images("parquet", tmp_path).labels == [0, 1]
