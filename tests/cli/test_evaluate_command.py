"""evaluate: what it prints, and what it takes."""

import csv
import json
import sys
from pathlib import Path

import pytest
from colours import COLOURS, write_mixtures
from commands import SAMPLES, run

import beitzoo
from beitzoo.cli.networks import names_with_weights
from beitzoo.evaluation.subjects import Origin
from beitzoo.inference import fastest
from beitzoo.inference.fastest import OPTIMIZED
from beitzoo.results import csv_text
from beitzoo.zoo.checkpoints import Classify

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
    names = (MODEL, "beit_nano_patch4_32", MODEL)
    result = run("evaluate", *names, "--data", str(data), "--results-file", str(table))
    assert result.exit_code == 0
    assert "±" not in result.stdout  # nothing says that they are draws of one experiment
    assert result.stderr.count(f"{MODEL} tells 10 classes apart, the data has 3 of them") == 1
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
    refused = run("evaluate", MODEL, "test_beit", "--data", str(data), "--checkpoint", str(weights))
    assert (refused.exit_code, "name the one model that it is of" in refused.stderr) == (2, True)


def test_evaluate_and_predict_take_models_of_several_labels(tmp_path: Path) -> None:
    labels = write_mixtures(tmp_path / "data", rounds=1)
    model = beitzoo.create_model("test_beit", num_classes=3)
    head = Classify(num_classes=3, labels=COLOURS, activation="sigmoid")
    model.pretrained = beitzoo.PretrainedConfig(head=head)
    beitzoo.save_pretrained(model, tmp_path / "model")
    name, table = str(tmp_path / "model"), tmp_path / "r.csv"
    result = run("evaluate", name, "--data", str(labels), "--results-file", str(table))
    assert result.exit_code == 1  # one image is broken
    assert "8 images with up to 3 of 3 labels each" in result.stderr
    assert result.stdout.split()[:5] == ["model", "dtype", "map", "images", "failures"]
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert 0 < float(row["map"]) <= 100
    assert (row["top1"], row["count"], row["failures"]) == ("", "7", "1")
    several = run("evaluate", name, "--data", str(labels), "--sizes", "32,48", "--dtype", "float32,int8", "--json")
    assert [0 < one["map"] <= 100 for one in json.loads(several.stdout)] == [True] * 2, several.stderr
    unnamed = run("evaluate", name, "--data", str(labels), "--real-labels", "timm")
    assert (unnamed.exit_code, "is none of the 50,000 validation images" in unnamed.stderr) == (2, True)
    refused = run("evaluate", name, "--data", str(labels), "--confusion", str(tmp_path / "c.png"))
    assert (refused.exit_code, "may have several labels each" in refused.stderr) == (2, True)
    (answer,) = json.loads(run("predict", str(labels.parent / "7.png"), "-m", name, "--format", "json").stdout)
    assert sum(one["probability"] for one in answer["answers"]) == pytest.approx(1.5, abs=0.2)  # each about a half


def test_evaluate_of_the_digits_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = run("evaluate", MODEL, "--data", "digits")
    assert (result.exit_code, "pip install 'beitzoo[train]'" in result.stderr) == (2, True)


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


def test_a_sweep_goes_on_where_it_was_and_measures_changed_data_anew(data: Path, tmp_path: Path) -> None:
    (data / "3" / "broken.png").unlink()
    (tmp_path / "models.txt").write_text(f"{MODEL}  # the shipped one\n")
    table = tmp_path / "r.csv"
    asked = ("evaluate", "--model-list", str(tmp_path / "models.txt"), "--data", str(data))
    asked += ("--results-file", str(table))
    assert run(*asked).exit_code == 0
    (first,) = rows_of(table)
    assert (first["dtype"], first["crop"], first["flip"], first["outputs"]) == ("float32", "timm", "False", "all")
    both = run(*asked, "--dtype", "float32,bfloat16")
    assert f"{MODEL} float32: top1 100.0 in {table} already" in both.stderr
    assert [row["dtype"] for row in rows_of(table)] == ["float32", "bfloat16"]
    (data / "7" / "b.png").write_bytes((SAMPLES / "digit_1.png").read_bytes())
    assert run(*asked).exit_code == 0
    assert [(row["dtype"], row["count"], row["top1"]) for row in rows_of(table)] == [
        ("float32", "3", "100.0"),
        ("bfloat16", "3", "100.0"),
        ("float32", "4", "75.0"),
    ]
    (data / "7" / "b.png").write_bytes((SAMPLES / "digit_7.png").read_bytes())  # as many images as before
    assert [run(*asked).exit_code for _ in range(2)] == [0, 0]
    assert [row["top1"] for row in rows_of(table)] == ["100.0", "100.0", "75.0", "100.0"]


def test_many_images_are_measured_by_the_optimized_copy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What computed is in the rows and part of their key."""
    monkeypatch.setattr(fastest, "HANDFUL", 5)
    for place in range(5):
        (data / "1" / f"{place}.png").write_bytes((SAMPLES / "digit_1.png").read_bytes())
    (data / "3" / "broken.png").unlink()
    asked = ("evaluate", MODEL, "--data", str(data), "--json", "--results-file", str(tmp_path / "r.csv"))
    copied, plain = run(*asked), run(*asked, "--no-optimize")
    assert (copied.stderr.count(OPTIMIZED), plain.stderr.count(OPTIMIZED)) == (1, 0)
    (by_copy,), (by_itself,) = json.loads(copied.stdout), json.loads(plain.stdout)
    assert (by_copy.pop("computed_by"), by_itself.pop("computed_by")) == ("inference copy", "plain network")
    assert by_copy == by_itself
    half = run(*asked, "--dtype", "bfloat16", "--no-optimize")
    (row,) = json.loads(half.stdout)
    assert (row["dtype"], row["top1"], OPTIMIZED in half.stderr) == ("bfloat16", 100.0, False)
    for option in ("--optimize", "--no-optimize"):
        assert f"{MODEL} float32: top1 100.0 in {tmp_path}/r.csv already" in run(*asked, option).stderr
    monkeypatch.setattr(fastest, "HANDFUL", 100)  # then bfloat16 alone is of the copy
    assert "already" in run(*asked, "--optimize").stderr
    run(*asked, "--dtype", "bfloat16")
    assert [(row["dtype"], row["computed_by"]) for row in rows_of(tmp_path / "r.csv")] == [
        ("float32", "inference copy"),
        ("float32", "plain network"),
        ("bfloat16", "plain network"),
        ("bfloat16", "inference copy"),
    ]


def test_rows_of_before_it_was_told_what_computed_stay_and_are_measured_anew(data: Path, tmp_path: Path) -> None:
    (data / "3" / "broken.png").unlink()
    asked = ("evaluate", MODEL, "--data", str(data), "--results-file", str(tmp_path / "r.csv"))
    run(*asked)
    (row,) = rows_of(tmp_path / "r.csv")
    del row["computed_by"]
    (tmp_path / "r.csv").write_text(csv_text([*row], [row]))
    run(*asked)
    assert [row["computed_by"] for row in rows_of(tmp_path / "r.csv")] == ["", "plain network"]


def test_rows_of_other_weights_or_transforms_are_measured_anew(data: Path, tmp_path: Path) -> None:
    """A run that was trained on, a transform that was changed, weights that are of another network by their name."""
    model = beitzoo.create_model("beit_nano_patch4_32", pretrained=True, num_classes=3)
    (data / "3" / "broken.png").unlink()
    counts = []
    for bias in (0.0, 0.0, 100.0):
        model.head.bias.data[0] += bias
        beitzoo.save_pretrained(model, tmp_path / "run")
        run("evaluate", str(tmp_path / "run"), "--data", str(data), "--results-file", str(tmp_path / "r.csv"))
        counts.append(len(rows_of(tmp_path / "r.csv")))
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"crop_pct": 1.0', '"crop_pct": 0.5'))
    run("evaluate", str(tmp_path / "run"), "--data", str(data), "--results-file", str(tmp_path / "r.csv"))
    first, _, last = rows_of(tmp_path / "r.csv")
    assert (counts, first["crop_pct"], last["crop_pct"]) == ([1, 1, 2], "1.0", "0.5")
    weights = tmp_path / "run" / "model.safetensors"
    names = ["beit_nano_patch4_32", str(tmp_path / "run")]
    origins = [Origin(name, checkpoint) for checkpoint in (weights, None) for name in names]
    assert len({origin.fingerprint() for origin in origins}) == 3
    assert origins[0].fingerprint() == Origin(names[0], weights).fingerprint()
    assert Origin(MODEL).fingerprint() is None


def test_a_model_that_fails_in_a_sweep_is_a_row_with_an_error(data: Path, tmp_path: Path) -> None:
    (data / "3" / "broken.png").unlink()
    table = tmp_path / "r.csv"
    beitzoo.save_pretrained(beitzoo.create_model("test_beit", num_classes=5), tmp_path / "other")
    asked = ("evaluate", str(tmp_path / "other"), MODEL, "--data", str(data), "--results-file", str(table))
    result = run(*asked)
    assert (result.exit_code, "float32: failed: " in result.stderr) == (1, True)
    failed, measured = rows_of(table)
    assert "tells 5 classes apart and nobody named them, the data has 3" in failed["error"]
    assert (measured["error"], measured["top1"]) == ("", "100.0")
    assert run(*asked).exit_code == 1
    assert rows_of(table) == [failed, measured]
    assert run(*asked, "--retry-failed").exit_code == 1
    assert rows_of(table) == [measured, failed]


def test_a_glob_stands_for_classifiers() -> None:
    assert names_with_weights(["beit_nano_patch4_32*"], None) == [MODEL]
    names = names_with_weights(["beit_base_patch16_224.*"], None)
    assert [name for name in names if "_ft_" in name] == names
    assert names_with_weights(["*ade20k*"], None) == beitzoo.list_models("*ade20k*", pretrained=True)
    result = run("evaluate", "--data", "digits")
    assert (result.exit_code, "No model is named; give names, globs" in result.stderr) == (2, True)


def test_the_confusion_of_a_classifier_is_drawn(data: Path, tmp_path: Path) -> None:
    picture = tmp_path / "c.svg"
    (data / "3" / "broken.png").unlink()
    (data / "7" / "b.png").write_bytes((SAMPLES / "digit_1.png").read_bytes())
    asked = ("evaluate", MODEL, "--data", str(data), "--confusion", str(picture))
    assert run(*asked, "--flip").exit_code == 0
    drawn = picture.read_text()
    assert f"{MODEL}: top-1 " in drawn
    assert ">1<" in drawn and ">7<" in drawn
    refused = run(*asked, "--dtype", "float32,bfloat16")
    assert (refused.exit_code, "is of one model in one --dtype" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float16"], "--dtype float16: there are float32, bfloat16, int8"),
        (["--dtype", "int8", "--no-optimize"], "int8 is of the optimized copy alone; leave --no-optimize out"),
        (["--sizes", "big"], "--sizes big: these are no numbers"),
        (["--stride", "3"], "is no segmentation model: --mode"),
        (["--confusion", "x.png", "--real-labels", "timm"], "With --real-labels an image has several classes"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(options: list[str], message: str, data: Path) -> None:
    result = run("evaluate", MODEL, "--data", str(data), *options)
    assert (result.exit_code, message in result.stderr) == (2, True)
