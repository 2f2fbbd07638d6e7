"""Label maps as files: names that never meet or lead out of the folder, and rows that say what is in each."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beitzoo.images.label_maps import IGNORE, MaskLabels, read_label_map
from beitzoo.images.overlays import PixelClasses
from beitzoo.inference.label_files import LabelFiles, Labelled, Names, open_shares
from beitzoo.inference.segment import Segmentation

CLASSES = PixelClasses(("sky, clear", "Straße\n"), ((0, 0, 255), (255, 0, 0)))


@pytest.mark.parametrize(
    ("path", "place", "name"),
    [
        ("photos/a/1.v2.jpg", "photos", "a/1.v2"),
        ("photos/a/1.jpg", "photos/", "a/1"),
        ("photos/a/1.jpg", "photos/*/1.jpg", "a/1"),
        ("photos/a/1.jpg", "photos/a/1.jpg", "1"),
        ("../1.jpg", "../1.jpg", "1"),
        ("photos/../../1.jpg", "photos/*", "1"),
        ("/etc/1.jpg", "*", "1"),
        ("a\0b", "a\0b", "a\0b"),
        ("/", "/", "image"),
    ],
)
def test_a_name_is_the_path_below_what_was_named(path: str, place: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for file in ("photos/a/1.jpg", "1.jpg"):
        (tmp_path / file).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "photos" if path.startswith("..") else tmp_path)
        assert Names().take(Path(path), place) == Path(name)


def test_names_differ_beyond_capitals() -> None:
    names = Names()
    taken = [str(names.take(Path(name), name)) for name in ("a.png", "A.jpg", "a_2.png", "a.gif")]
    assert taken == ["a", "A_2", "a_2_2", "a_3"]


def test_rows_say_what_is_in_each_label_map(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "in.png")
    labels = np.array([[1, 1, 1], [0, IGNORE, 1]], dtype=np.uint8)
    segmentations = [
        (Segmentation(tmp_path / "in.png", labels), Path("in")),
        (Segmentation(tmp_path / "gone.png", labels), Path("gone")),
        (Segmentation(tmp_path / "bad.png", None, "the file is empty"), Path("bad")),
    ]
    out = tmp_path / "out"
    with open_shares(out) as shares:
        labelled = list(LabelFiles(out, CLASSES, shares).write_all(segmentations))
    assert labelled[0] == Labelled(tmp_path / "in.png", None, Path("labels/in.png"), ((1, 4), (0, 1), (IGNORE, 1)))
    with (out / "shares.csv").open(newline="") as file:
        rows = [tuple(row.values())[1:] for row in csv.DictReader(file)]
    assert rows == [
        ("", "labels/in.png", "Straße\n", "1", "4", "0.666667"),
        ("", "labels/in.png", "sky, clear", "0", "1", "0.166667"),
        ("", "labels/in.png", "", "255", "1", "0.166667"),
        ("there is no such file", "", "", "", "", ""),
        ("the file is empty", "", "", "", "", ""),
    ]
    # What is written is a mask that can be trained on.
    assert (read_label_map(out / "labels" / "in.png", MaskLabels(CLASSES.names), (3, 2)) == labels).all()


def test_rows_of_a_run_that_ends_early_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), open_shares(tmp_path) as shares:
        writer = LabelFiles(tmp_path, CLASSES, shares, overlays=False)
        next(writer.write_all([(Segmentation(Path("a.png"), np.zeros((1, 1), dtype=np.uint8)), Path("a"))]))
        raise KeyboardInterrupt
    assert (tmp_path / "shares.csv.partial").read_text().splitlines()[1] == 'a.png,,labels/a.png,"sky, clear",0,1,1'
    assert "The rows so far are in" in capsys.readouterr().err
