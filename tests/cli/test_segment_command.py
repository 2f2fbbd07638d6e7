"""segment: what it writes, and how it fails."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SAMPLES, run
from PIL import Image
from typer.testing import CliRunner

import beitzoo
from beitzoo.cli import app
from beitzoo.inference import fastest
from beitzoo.inference.fastest import OPTIMIZED


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("segmenter")
    network = beitzoo.create_model("test_beit", head="segment", num_classes=5)
    beitzoo.save_pretrained(network, folder)
    return f"local-dir:{folder}"


def _rows(out: Path) -> list[dict[str, str]]:
    with (out / "shares.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_segment_writes_label_maps_overlays_and_shares(model: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    cat = SAMPLES / "chelsea.jpg"
    result = run("segment", str(cat), str(SAMPLES / "digit_3.png"), "-m", model, "--out", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"2 images in {out}. Most pixels: ")
    with Image.open(out / "labels" / "chelsea.png") as image:
        labels = np.array(image)
        assert image.mode == "P"
    network = beitzoo.create_model(model, pretrained=True)
    (expected,) = beitzoo.segment(network, cat)
    assert (labels == expected.labels).all()
    rows = [row for row in _rows(out) if row["path"] == str(cat)]
    assert {int(row["index"]): int(row["pixels"]) for row in rows} == {
        number: count for number, count in enumerate(np.bincount(labels.ravel()).tolist()) if count
    }
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    assert {row["label_map"] for row in rows} == {"labels/chelsea.png"}
    assert [row["label"] for row in rows] == [row["index"] for row in rows]  # nobody named them
    with Image.open(out / "overlays" / "chelsea.jpg") as overlay:
        assert (overlay.format, overlay.width > 896) == ("JPEG", True)
    assert sorted(path.name for path in out.iterdir()) == ["labels", "overlays", "shares.csv"]


def test_many_images_are_segmented_by_the_optimized_copy(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "HANDFUL", 1)
    images = [str(SAMPLES / f"digit_{digit}.png") for digit in "37"]
    asked = ("segment", *images, "-m", model, "--no-overlays", "--out")
    copied, plain = run(*asked, str(tmp_path / "a")), run(*asked, str(tmp_path / "b"), "--no-optimize")
    assert (copied.stderr, plain.stderr) == (f"{OPTIMIZED}\n", "")
    for name in ("digit_3.png", "digit_7.png"):
        ours, theirs = (np.array(Image.open(tmp_path / out / "labels" / name)) for out in "ab")
        assert np.mean(ours == theirs) > 0.99  # but for ties
    network = beitzoo.create_model(model, pretrained=True)
    made: list[object] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(beitzoo.optimize(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(fastest, "optimize", noted)
    _, by_itself = beitzoo.segment(network, images, optimize=False)
    assert not made
    _, by_copy = beitzoo.segment(network, images)
    assert (len(made), type(network.backbone)) == (1, beitzoo.Beit)
    assert by_itself.labels is not None
    assert (by_itself.labels == theirs).all()
    assert np.mean(by_copy.labels == theirs) > 0.99


def test_segment_takes_its_options(model: str, tmp_path: Path) -> None:
    image = str(SAMPLES / "coffee.jpg")
    options = ["--mode", "whole", "--short-side", "64", "--scales", "0.5,1", "--flip", "--no-overlays"]
    assert run("segment", image, "-m", model, "--out", str(tmp_path), *options).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "shares.csv"]
    network = beitzoo.create_model(model, pretrained=True)
    wanted = beitzoo.SegmentOptions(mode="whole", short_side=64, scales=(0.5, 1), flip=True)
    (expected,) = beitzoo.segment(network, image, wanted)
    with Image.open(tmp_path / "labels" / "coffee.png") as labels:
        assert (np.array(labels) == expected.labels).all()
    refused = run("segment", image, "-m", model, "--out", str(tmp_path / "b"), "--scales", "big")
    assert (refused.exit_code, "these are no numbers; give factors" in refused.stderr) == (2, True)


def test_a_bad_image_is_one_listed_failure(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "text.png").write_text("no image")
    places = [str(SAMPLES / "digit_1.png"), str(tmp_path / "text.png"), str(tmp_path / "absent.png")]
    result = run("segment", *places, "-m", model, "--out", str(out))
    assert result.exit_code == 1
    assert f"{tmp_path}/text.png: not an image that can be read" in result.stderr
    assert "No label map of 2 of 3 images." in result.stderr
    failed = {row["path"]: row for row in _rows(out) if row["error"]}
    assert list(failed) == places[1:]
    assert failed[places[2]]["error"] == "there is no such file"
    assert failed[places[2]]["label_map"] == failed[places[2]]["share"] == ""
    assert [path.name for path in (out / "labels").iterdir()] == ["digit_1.png"]


def test_no_image_takes_the_place_of_another(model: str, tmp_path: Path) -> None:
    digit = (SAMPLES / "digit_1.png").read_bytes()
    for name in ("a/1.png", "a/b/1.png", "a/1.PNG", "c/1.png", "c/1_2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(digit)
    out = tmp_path / "out"
    places = [str(tmp_path / "a"), str(tmp_path / "c" / "1.png"), str(tmp_path / "c" / "*_2.png"), "-"]
    listed = f"{tmp_path}/c\n{tmp_path}/a/../c/1.png\n"
    arguments = ["segment", *places, "-m", model, "--out", str(out), "--no-overlays"]
    result = CliRunner().invoke(app, arguments, input=listed)
    assert result.exit_code == 0
    maps = dict.fromkeys((row["path"], row["label_map"]) for row in _rows(out))
    assert [label_map for _, label_map in maps] == [
        f"labels/{name}.png" for name in ("1", "1_2", "b/1", "1_3", "1_2_2", "1_4", "1_2_3", "1_5")
    ]
    assert len(list((out / "labels").rglob("*.png"))) == 8


def test_a_folder_with_results_is_left_alone(model: str, tmp_path: Path) -> None:
    digit = str(SAMPLES / "digit_1.png")
    (tmp_path / "out").mkdir()
    assert run("segment", digit, "-m", model, "--out", str(tmp_path / "out")).exit_code == 0
    again = run("segment", digit, "-m", model, "--out", str(tmp_path / "out"))
    assert (again.exit_code, "has files in it already, which are not overwritten" in again.stderr) == (2, True)
    file = run("segment", digit, "-m", model, "--out", digit)
    assert (file.exit_code, "is a file; give the name of a new folder" in file.stderr) == (2, True)
    below = run("segment", digit, "-m", model, "--out", f"{digit}/out")
    assert (below.exit_code, "give another folder" in below.stderr) == (2, True)


def test_segment_says_how_to_get_a_model(tmp_path: Path) -> None:
    digit, out = str(SAMPLES / "digit_1.png"), tmp_path / "out"
    for arguments, told in (
        ([], "No model is named. Name a segmentation model"),
        (["-m", "beit_nano_patch4_32.digits"], "beit_nano_patch4_32.digits is no segmentation model"),
        (["-m", "beit_base_patch16_224"], "beit_base_patch16_224 is no segmentation model"),
        (["-m", "beit_base_patch16_640.in22k_ft_in22k_ade"], "it has in22k_ft_in22k_ade20k"),
    ):
        result = run("segment", digit, *arguments, "--out", str(out))
        assert (result.exit_code, told in result.stderr) == (2, True), result.stderr
    assert not out.exists()


def test_nothing_to_segment(model: str, tmp_path: Path) -> None:
    nothing = run("segment", "-", "-m", model, "--out", str(tmp_path / "a"))
    assert (nothing.exit_code, "nothing was listed on stdin" in nothing.stderr) == (1, True)
    (tmp_path / "empty").mkdir()
    empty = run("segment", str(tmp_path / "empty"), "-m", model, "--out", str(tmp_path / "b"))
    assert (empty.exit_code, "a folder, not an image" in empty.stderr) == (1, True)


def test_weights_of_ones_own(model: str, tmp_path: Path) -> None:
    folder = Path(model.removeprefix("local-dir:"))
    shutil.copytree(folder, tmp_path / "model")
    weights = str(tmp_path / "model" / "model.safetensors")
    result = run("segment", str(SAMPLES / "digit_1.png"), "--checkpoint", weights, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
