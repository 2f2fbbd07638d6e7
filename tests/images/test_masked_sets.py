"""Images with masks: what is paired with what, in every form, and what is left out; the check before training."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beitzoo.errors import InvalidValueError, MissingFileError
from beitzoo.images import tables
from beitzoo.images.files import ImageError
from beitzoo.images.label_maps import IGNORE, MaskError, MaskLabels
from beitzoo.images.mask_check import check_masks
from beitzoo.images.masked_sets import (
    LabelOptions,
    MaskedSet,
    find_masked_images,
    guess_masked_source,
    with_held_out_masks,
)
from beitzoo.zoo.labels import ade20k_classes

LABELS = MaskLabels(("sky", "road", "car"))


def image(path: Path, shade: int, size: tuple[int, int] = (3, 2), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path, **options)


def mask(path: Path, number: int, size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, number).save(path)


def pair(root: Path, name: str, number: int, folders: tuple[str, str] = ("images", "annotations")) -> None:
    """Write an image of one shade with a mask of one number; the shade is ten times that."""
    image(root / folders[0] / f"{name}.png", 10 * number)
    mask(root / folders[1] / f"{name}.png", number)


def numbers(masked: MaskedSet, indices: Any = None) -> list[tuple[int, int]]:
    """Return shade and class of the first pixel of each."""
    loaded = [masked.load(index) for index in (range(len(masked)) if indices is None else indices)]
    return [(picture.getpixel((0, 0))[0], int(classes[0, 0])) for picture, classes in loaded]


def test_parts_of_folders(tmp_path: Path) -> None:
    for part, number in (("training/a", 0), ("training/deep/a", 1), ("validation/a", 2), ("test/a", 1)):
        pair(tmp_path, part, number)
    (tmp_path / "classes.txt").write_text("\ufeffsky\r\nroad\r\ncar\r\n\r\n", encoding="utf-8")
    masked = pickle.loads(pickle.dumps(find_masked_images(guess_masked_source(tmp_path), tmp_path)))
    assert masked.labels == LABELS
    assert masked.images.parts == {"train": range(2), "validation": range(2, 3), "test": range(3, 4)}
    assert numbers(masked) == [(0, 0), (10, 1), (20, 2), (10, 1)]
    assert masked.images.identity(1)[0] == "images/training/deep/a.png"
    assert masked.describe() == [
        f"4 images with masks of 3 classes in {tmp_path}",
        "Parts of its own: 2 train, 1 validation, 1 test; only train is for training.",
    ]


@pytest.mark.parametrize("folders", [("images", "masks"), ("images", "labels"), ("img_dir", "ann_dir")])
def test_folders_of_other_names_without_parts(tmp_path: Path, folders: tuple[str, str]) -> None:
    pair(tmp_path, "b.c", 1, folders)
    pair(tmp_path, "b", 2, folders)
    masked = find_masked_images("annotations", tmp_path, LABELS)
    assert masked.images.parts == {}
    assert numbers(masked) == [(20, 2), (10, 1)]


def test_what_has_no_partner_or_several_is_left_out(tmp_path: Path) -> None:
    for name, number in (("train/a", 1), ("train/twice", 2), ("val/b", 2)):
        pair(tmp_path, name, number)
    image(tmp_path / "images/train/twice.jpg", 0)
    image(tmp_path / "images/train/alone.jpg", 0)
    image(tmp_path / "images/train/b.png", 0)  # the mask of that name is another part's
    image(tmp_path / "images/outside.png", 0)
    mask(tmp_path / "annotations/train/lost.png", 0)
    (tmp_path / "annotations/train/notes.txt").write_text("x")
    masked = find_masked_images("annotations", tmp_path, LABELS)
    assert numbers(masked) == [(10, 1), (20, 2)]
    assert masked.images.left_out.counts.total() == 8
    assert masked.describe()[2:] == [
        "Left out 1, outside of the parts of the data set: images/outside.png",
        "Left out 1, not called like images: annotations/train/notes.txt",
        "Left out 2, images without a mask: images/train/alone.jpg, images/train/b.png",
        "Left out 1, masks without an image: annotations/train/lost.png",
        "Left out 3, of one name, so that it is unknown which belong together: images/train/twice.jpg, "
        "images/train/twice.png, annotations/train/twice.png",
    ]


def test_folders_that_are_no_such_set(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no folder images or img_dir of images"):
        find_masked_images("annotations", tmp_path, LABELS)
    image(tmp_path / "images/a.png", 0)
    with pytest.raises(MissingFileError, match="no folder annotations or masks or labels or ann_dir"):
        find_masked_images("annotations", tmp_path, LABELS)
    (tmp_path / "masks").mkdir()
    with pytest.raises(MissingFileError, match=r"No images with masks .*Left out 1, images without a mask: images/a"):
        find_masked_images("annotations", tmp_path, LABELS)
    (tmp_path / "labels").mkdir()
    with pytest.raises(InvalidValueError, match="has masks and labels"):
        find_masked_images("annotations", tmp_path, LABELS)


def test_where_names_of_classes_come_from(tmp_path: Path) -> None:
    pair(tmp_path, "a", 1)

    def names(options: LabelOptions) -> tuple[str, ...]:
        return find_masked_images("annotations", tmp_path, options).labels.names

    with pytest.raises(InvalidValueError, match=r"Nothing names the classes of the masks. Write a name a line to"):
        names(LabelOptions())
    assert names(LabelOptions(colours={"b": (0, 0, 0), "a": (1, 1, 1)})) == ("b", "a")
    assert names(LabelOptions("ade20k", reduce_zero_label=True)) == tuple(name for name, _ in ade20k_classes())
    file = tmp_path / "classes.txt"
    for text, reason in (("", "is empty"), ("a\n\nb\n", "line .2.: there is no name"), ("a\nb\na\n", "lines 1 and 3")):
        file.write_text(text)
        with pytest.raises(InvalidValueError, match=reason):
            names(LabelOptions())
    file.write_text("a\nb\n")
    assert names(LabelOptions()) == names(LabelOptions(("a", "b"))) == ("a", "b")
    assert find_masked_images("annotations", tmp_path, MaskLabels(("a", "b"))).labels == MaskLabels(("a", "b"))
    for other, reason in (
        (("a", "c"), "'b' as class 1, where 'c' is expected"),
        (("a", "b", "c"), "2 classes, where 3"),
    ):
        with pytest.raises(InvalidValueError, match=reason):
            names(LabelOptions(other))


def test_pairs_of_a_csv(tmp_path: Path) -> None:
    for name, number in (("a", 0), ("b", 1), ("c", 2)):
        pair(tmp_path, name, number, ("in", "elsewhere"))
    rows = ["id,image,mask,part", "1,in/c.png,elsewhere/c.png,test", '2,"in/b.png",elsewhere/b.png,Training']
    path = tmp_path / "lists" / "pairs.csv"
    path.parent.mkdir()
    path.write_text(
        "\n".join([*rows, "3,in/a.png,elsewhere/a.png,train"]).replace("in/", "../in/").replace("else", "../else")
    )
    masked = find_masked_images(guess_masked_source(path), path, LABELS)
    assert numbers(masked) == [(10, 1), (0, 0), (20, 2)]
    assert masked.images.parts == {"train": range(2), "test": range(2, 3)}
    assert [masked.images.identity(index)[0] for index in range(3)] == ["in/b.png", "in/a.png", "in/c.png"]


def test_a_csv_lists_what_is_not_there(tmp_path: Path) -> None:
    pair(tmp_path, "a", 1)
    path = tmp_path / "pairs.csv"
    path.write_text("image,mask\nimages/a.png,annotations/a.png\nimages/b.png,annotations/a.png\n")
    masked = find_masked_images("pairs", path, LABELS)
    assert numbers(masked) == [(10, 1)]
    assert masked.describe()[1:] == ["Left out 1, named in the CSV, but not there: images/b.png"]
    path.write_text("image,mask\nimages/b.png,annotations/a.png\n")
    with pytest.raises(MissingFileError, match=r"but not there: images/b\.png"):
        find_masked_images("pairs", path, LABELS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1: the columns are none"),
        ("image;mask\na;b\n", "line 1: the columns are image;mask. Expected image, mask"),
        ("image,mask\na.png,b.png\n,b.png\n", "line 3: there is no image"),
        ("image,mask\na.png,b,c.png\n", "line 2: there are not 2 fields"),
        ("image,mask\na.png\n", "line 2: there are not 2 fields"),
        ("image,mask,part\na.png,b.png,tset\n", "line 2: there is no part 'tset'. Parts are train, validation, test"),
        ("image,mask\na.png,b.png\nc.png,b.png\n./a.png,c.png\n", "lines 2 and 4: both name"),
        ("image,mask\na.png,a.png\n", "line 2: image and mask are the same file"),
        ('image,mask\n"a.png,b.png\n', "line 2: unexpected end of data"),
    ],
)
def test_a_wrong_csv_says_in_which_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(InvalidValueError, match=reason):
        find_masked_images("pairs", path, LABELS)


def write_masked_table(path: Path, rows: list[tuple[int | None, int | None]], column: str = "annotation") -> Path:
    """Write a table of images and masks as the hub's library does, the masks first."""
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    encoded: dict[str, list[dict[str, Any] | None]] = {column: [], "pixels": []}
    for shade, number in rows:
        image(path.parent / "i.png", shade or 0)
        mask(path.parent / "m.png", number or 0)
        for name, value, file in (("pixels", shade, "i.png"), (column, number, "m.png")):
            content = (path.parent / file).read_bytes()
            encoded[name].append(None if value is None else {"bytes": content, "path": None})
    table = pa.table({name: pa.array(values, kinds) for name, values in encoded.items()})
    features = {name: {"_type": "Image"} for name in encoded}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("column", ["annotation", "label", "mask", "segmentation_mask"])
def test_tables_of_the_hub(tmp_path: Path, column: str) -> None:
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    rows: list[tuple[int | None, int | None]] = [(10, 1), (0, None), (None, 1), (20, 2)]
    write_masked_table(tmp_path / "train-0.parquet", rows, column)
    write_masked_table(tmp_path / "validation-0.parquet", [(0, 0)], column)
    masked = find_masked_images(guess_masked_source(tmp_path), tmp_path)
    masked = pickle.loads(pickle.dumps(masked))
    assert masked.labels == LABELS
    assert masked.images.parts == {"train": range(2), "validation": range(2, 3)}
    assert numbers(masked) == [(10, 1), (20, 2), (0, 0)]
    assert masked.mask_name(1) == "train-0.parquet:3"
    assert masked.describe()[2:] == [
        "Left out 1, masks without an image: train-0.parquet:2",
        "Left out 1, images without a mask: train-0.parquet:1",
    ]


def test_a_table_needs_one_column_of_masks(tmp_path: Path) -> None:
    path = write_masked_table(tmp_path / "t.parquet", [(10, 1)], "other")
    with pytest.raises(InvalidValueError, match="no column of masks"):
        find_masked_images("parquet", path, LABELS)
    table = pq.read_table(path)
    both = pa.table({"image": table["pixels"], "mask": table["other"], "label": table["other"]})
    pq.write_table(both, path)
    with pytest.raises(InvalidValueError, match="several columns of masks, label, mask"):
        find_masked_images("parquet", path, LABELS)


def test_masks_held_out_in_a_place_of_their_own(tmp_path: Path) -> None:
    pair(tmp_path / "one", "a", 1)
    pair(tmp_path / "two", "a", 2)
    one, two = (find_masked_images("annotations", tmp_path / name, LABELS) for name in ("one", "two"))
    both = with_held_out_masks(one, two)
    assert both.images.parts == {"train": range(1), "test": range(1, 2)}
    assert numbers(both) == [(10, 1), (20, 2)]
    other = find_masked_images("annotations", tmp_path / "two", MaskLabels(("road", "sky", "car")))
    with pytest.raises(InvalidValueError, match="stand for other classes"):
        with_held_out_masks(one, other)
    with pytest.raises(InvalidValueError, match="both trained on and held out"):
        with_held_out_masks(one, one)


def test_a_mask_must_fit_the_upright_photograph(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("upright", (2, 3)), ("before", (3, 2))):
        image(tmp_path / f"images/{name}.jpg", 0, (3, 2), exif=exif)
        mask(tmp_path / f"annotations/{name}.png", 1, size)
    masked = find_masked_images("annotations", tmp_path, LABELS)
    picture, classes = masked.load(1)
    assert (picture.size, classes.shape) == ((2, 3), (3, 2))
    with pytest.raises(MaskError, match=r"its mask annotations/before.png: it has 3 x 2 .* before it was turned"):
        masked.load(0)
    assert check_masks(masked, [1]).pixels == (0, 6, 0)
    with pytest.raises(InvalidValueError, match=r"images/before\.jpg: its mask annotations/before\.png: it has 3 x 2"):
        check_masks(masked)


def test_a_check_counts_pixels_and_lists_what_is_odd(tmp_path: Path) -> None:
    for number in (0, 1, IGNORE):
        image(tmp_path / f"images/{number}.png", 0)
        mask(tmp_path / f"annotations/{number}.png", number)
    for name in ("cut", "lost"):
        pair(tmp_path, name, 1)
    (tmp_path / "annotations/cut.png").write_bytes(b"x")
    masked = find_masked_images("annotations", tmp_path, LABELS)
    (tmp_path / "images/lost.png").unlink()
    found = check_masks(masked)
    assert (found.pixels, found.ignored, found.count) == ((6, 6, 0), 6, 3)
    assert (found.absent, found.empty) == (("car",), (f"annotations/{IGNORE}.png",))
    assert [name for name, _ in found.unreadable] == ["images/cut.png", "images/lost.png"]
    assert found.describe() == [
        "In 3 masks: road 33.3%, sky 33.3%; no class 33.3%.",
        "Classes that never appear, 1: car",
        "Left out as no pixel of the mask has a class, 1: annotations/255.png",
        "Cannot be read, 2: images/cut.png: its mask annotations/cut.png: not an image that can be read (JPEG, PNG, "
        "WEBP, AVIF, BMP, GIF, PPM, TIFF), images/lost.png: there is no such file",
    ]
    with pytest.raises(ImageError, match=r"its mask annotations/cut\.png"):
        masked.load_mask(3)
    assert check_masks(masked, [2]).shares == (0, 0, 0)
    with pytest.raises(InvalidValueError, match=r"None of 2 masks can be read.*images/cut\.png: its mask"):
        check_masks(masked, [3, 4])
    assert check_masks(masked, []).describe() == ["In 0 masks: no class at all; no class 0.0%."]
    assert check_masks(masked, [0, 0, 1, 1], limit=2).pixels == (6, 6, 0)


def test_a_check_finds_black_and_white_masks(tmp_path: Path) -> None:
    for number in (0, 255):
        image(tmp_path / f"images/{number}.png", 0)
        mask(tmp_path / f"annotations/{number}.png", number)
    with pytest.raises(InvalidValueError, match=r"All pixels of 2 masks are ground or of no class.*black \(0\) and wh"):
        check_masks(find_masked_images("annotations", tmp_path, MaskLabels(("ground", "road"))))


def test_a_check_counts_unknown_colours(tmp_path: Path) -> None:
    colours = {"sky": (0, 0, 0), "road": (1, 1, 1)}
    for name, shade in (("a", 0), ("b", 1), ("c", 2)):
        for folder in ("images", "annotations"):
            image(tmp_path / folder / f"{name}.png", shade)
    found = check_masks(find_masked_images("annotations", tmp_path, LabelOptions(colours=colours)))
    assert (found.pixels, found.ignored, found.unknown) == ((6, 6), 6, {(2, 2, 2): 6})
    line = "33.3% of the pixels have colours that are not in the colour table: (2, 2, 2) (6 pixels)"
    assert line in found.describe()


def test_a_check_reads_as_many_masks_as_it_may(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8)
    image(tmp_path / "images/a.png", 0, (64, 64))
    (tmp_path / "annotations").mkdir()
    Image.fromarray(pixels).save(tmp_path / "annotations/a.png")
    masked = find_masked_images("annotations", tmp_path, LABELS)
    found = check_masks(masked, [0] * 30, limit=20)
    assert found.pixels == tuple(20 * np.bincount(pixels.ravel()).astype(int))


def test_images_and_masks_of_large_tables_are_copied_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_MOST_IN_MEMORY", 10)
    monkeypatch.setattr(tables.constants, "HF_HOME", str(tmp_path / "cache"))
    path = write_masked_table(tmp_path / "t.parquet", [(10, 1), (20, 2)])
    for _ in range(2):
        assert numbers(find_masked_images("parquet", path, LABELS)) == [(10, 1), (20, 2)]
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2
