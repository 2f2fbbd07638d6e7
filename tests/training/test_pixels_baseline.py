"""Classifiers of pixels are measured on the images that a network is measured on, and people are in one part only."""

from pathlib import Path

import numpy as np
import pytest
from baselines import pixels, sign_digits_parts
from colours import write_colours
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from beitzoo.results import read_rows
from beitzoo.training.collect import COLUMNS


def test_they_are_fitted_and_measured_as_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbour = {"KNeighborsClassifier(1)": KNeighborsClassifier(1)}
    monkeypatch.setattr(pixels, "classifiers", lambda seed: neighbour)
    table = tmp_path / "rows.csv"
    (row,) = pixels.main(["digits", "--results-file", str(table), "--set", "data.split_seed=3"])
    digits = load_digits()
    rest, test = train_test_split(np.arange(1797), test_size=599, stratify=digits.target, random_state=3)
    train, _ = train_test_split(rest, test_size=120, stratify=digits.target[rest], random_state=3)
    fitted = KNeighborsClassifier(1).fit(digits.data[train], digits.target[train])
    assert row["top1"] == pytest.approx(100 * fitted.score(digits.data[test], digits.target[test]), abs=1e-4)
    assert (row["train_images"], row["count"], row["start"]) == (1078, 599, "pixels")
    assert [(kept["run"], tuple(kept)) for kept in read_rows(table)] == [(row["run"], COLUMNS)]


@pytest.mark.slow
def test_all_of_them_tell_colours_apart(tmp_path: Path) -> None:
    (write_colours(tmp_path / "colours", 20) / "red" / "0.png").unlink()
    recipe = tmp_path / "colours.toml"
    recipe.write_text(
        f'[model]\nname = "test_beit"\n[data]\nsource = "folder"\npath = "{tmp_path / "colours"}"\n'
        "[train]\nepochs = 1\nbatch_size = 4\nlr = 1e-3\n"
    )
    rows = pixels.main([str(recipe)])
    assert [row["model"] for row in rows] == list(pixels.classifiers(0))
    assert {row["top1"] for row in rows} == {100.0}


def test_photographs_of_hands_are_in_parts_by_their_numbers(tmp_path: Path) -> None:
    numbers = {1118: "train", 5230: "train", 5231: None, 5260: None, 5261: "val", 5420: "val", 5421: None, 5451: "test"}
    for number in numbers:
        folder = tmp_path / "data" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / f"IMG_{number}.JPG", "JPEG")
    for _ in range(2):
        assert sign_digits_parts.link_parts(tmp_path / "data", tmp_path / "parts") == {"train": 2, "val": 2, "test": 1}
    links = {path.name: path.parts[-3] for path in (tmp_path / "parts").rglob("*.JPG") if path.exists()}
    assert links == {f"IMG_{number}.JPG": part for number, part in numbers.items() if part}
