"""evaluate: what it prints, and what it takes."""

import csv
import json
import sys
from pathlib import Path

import pytest
from commands import SAMPLES, run

import beitzoo

MODEL = "beit_nano_patch4_32.digits"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three of the ten classes, an unreadable image, and something that is no image."""
    for digit in "137":
        (tmp_path / "data" / digit).mkdir(parents=True)
        (tmp_path / "data" / digit / "a.png").write_bytes((SAMPLES / f"digit_{digit}.png").read_bytes())
    (tmp_path / "data" / "3" / "broken.png").write_bytes(b"no image")
    (tmp_path / "data" / "notes.txt").write_text("notes")
    return tmp_path / "data"


def test_evaluate_prints_and_appends_rows(data: Path, tmp_path: Path) -> None:
    table = tmp_path / "r.csv"
    (data / "3" / "broken.png").unlink()
    result = run("evaluate", MODEL, MODEL, "--data", str(data), "--results-file", str(table))
    assert result.exit_code == 0
    assert "top1 100.00 ± 0.00 (mean ± sd of 2)" in result.stdout
    assert result.stderr.count("the data has 3 of them") == 1
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["count"], row["failures"], row["top1"]) for row in rows] == [("3", "0", "100.0")] * 2


def test_evaluate_lists_what_cannot_be_read_and_exits_with_one(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything that only training needs."""
    for extra in ("sklearn", "accelerate"):
        monkeypatch.setitem(sys.modules, extra, None)
    result = run("evaluate", MODEL, "--data", str(data), "--workers", "1", "--batch-size", "2", "--json")
    (row,) = json.loads(result.stdout)
    assert (result.exit_code, row["top1"], row["count"], row["failures"]) == (1, 100.0, 3, 1)
    assert result.stderr.splitlines()[0].startswith("4 images of 3 classes in")
    assert "Left out 1, not called like images: notes.txt" in result.stderr
    assert f"{MODEL} tells 10 classes apart, the data has 3 of them; all its outputs compete" in result.stderr
    assert "Not counted: 3/broken.png: not an image that can be read" in result.stderr


def test_evaluate_takes_weights_of_ones_own_and_leaves_top5_of_three_classes_out(data: Path, tmp_path: Path) -> None:
    model = beitzoo.create_model("beit_nano_patch4_32", pretrained=True, num_classes=3)
    beitzoo.save_pretrained(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    result = run("evaluate", "beit_nano_patch4_32", "--data", str(data), "--checkpoint", str(weights), "--json")
    (row,) = json.loads(result.stdout)
    assert (row["model"], row["top5"], row["top5_err"], row["count"]) == (str(weights), None, None, 3)
    refused = run("evaluate", MODEL, MODEL, "--data", str(data), "--checkpoint", str(weights))
    assert (refused.exit_code, "name the one model that it is of" in refused.stderr) == (2, True)


def test_evaluate_of_the_digits_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = run("evaluate", MODEL, "--data", "digits")
    assert (result.exit_code, "pip install 'beitzoo[train]'" in result.stderr) == (2, True)
