"""probe: what it prints, and the rows that it appends or finds."""

import csv
import json
from pathlib import Path

import pytest
import torch
from commands import SAMPLES, run
from PIL import Image

import beitzoo
from beitzoo.evaluation import probe_rows
from beitzoo.images.datasets import digits, labelled_folder
from beitzoo.images.splits import SPLIT_FILE, Split, write_split

MODEL = "beit_nano_patch4_32.digits"


def test_probes_of_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of the last block tell the digits apart as well as its head does; what the table has is kept."""
    table = tmp_path / "r.csv"
    arguments = ["probe", MODEL, "--data", "digits", "--blocks=-1,0", "--train-per-class", "20"]
    result = run(*arguments, "--results-file", str(table))
    assert result.exit_code == 0, result.stderr
    assert "200 images to fit probes on, 120 to choose a block by, 599 to measure them on." in result.stderr
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0]) == list(probe_rows.COLUMNS)
    assert [(row["block"], row["pooling"], row["probe"]) for row in rows] == [
        (block, pooling, probe) for block in "03" for pooling in ("mean", "class") for probe in ("linear", "knn")
    ]
    top1 = {(row["block"], row["pooling"], row["probe"]): float(row["top1"]) for row in rows}
    assert top1["3", "mean", "linear"] > 98
    assert top1["3", "mean", "knn"] > 98
    assert top1["0", "class", "knn"] < 80
    assert {(row["count"], row["train_count"], row["val_count"], row["failures"]) for row in rows} == {
        ("599", "200", "120", "0")
    }
    assert (
        f"Best linear probe, chosen by 120 other images: block 3, mean: {top1['3', 'mean', 'linear']:.2f}"
        in result.stdout
    )
    assert max(map(len, result.stdout.splitlines())) <= 80

    monkeypatch.setattr(probe_rows, "probe_features", None)
    again = run(*arguments, "--results-file", str(table), "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (0, rows)
    assert len(table.read_text().splitlines()) == 9


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Thirty digits to fit on, thirty to measure on, in two classes: even and odd."""
    images = digits()
    assert images.labels is not None
    for part, first in (("fit", 0), ("measure", 100)):
        for index in range(first, first + 30):
            folder = tmp_path / part / str(images.labels[index] % 2)
            folder.mkdir(parents=True, exist_ok=True)
            images.images[index].save(folder / f"{index}.png")  # type: ignore[union-attr]
    return ["--data", str(tmp_path / "fit"), "--test-data", str(tmp_path / "measure"), "--blocks", "3", "--json"]


def test_draws_of_few_labels_are_measured_on_the_same_images(data: list[str], tmp_path: Path) -> None:
    rows = []
    for few in (["--train-images", "9"], ["--train-per-class", "5"]):
        for seed in "12":
            result = run("probe", MODEL, *data, *few, "--label-seed", seed, "--results-file", str(tmp_path / "r.csv"))
            rows.append(json.loads(result.stdout)[2])
    assert [(row["count"], row["train_count"], row["label_seed"]) for row in rows] == [
        (30, 9, 1),
        (30, 9, 2),
        (30, 10, 1),
        (30, 10, 2),
    ]
    assert len({row["top1"] for row in rows}) > 1


def test_many_images_are_probed_by_the_optimized_copy(data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beitzoo.inference.fastest.HANDFUL", 50)
    copied, plain = (run("probe", MODEL, *data, "--probes", "knn", *more) for more in ([], ["--no-optimize"]))
    assert ("optimized copy" in copied.stderr, "optimized copy" in plain.stderr) == (True, False)
    for one, other in zip(json.loads(copied.stdout), json.loads(plain.stdout), strict=True):
        assert one["top1"] == pytest.approx(other["top1"], abs=4)  # one image is 3.3


def test_unreadable_images_are_listed_and_the_exit_code_is_one(data: list[str], tmp_path: Path) -> None:
    (tmp_path / "measure" / "0" / "broken.png").write_bytes(b"no image")
    result = run("probe", MODEL, *data)
    assert result.exit_code == 1
    assert "broken.png: not an image that can be read" in result.stderr
    row = json.loads(result.stdout)[0]
    assert (row["count"], row["train_count"], row["val_count"], row["failures"]) == (30, 27, 3, 1)
    rows = ["--results-file", str(tmp_path / "r.csv")]
    assert [run("probe", MODEL, *data, *rows).exit_code for _ in range(2)] == [1, 1]  # also of rows that are there


def test_a_network_that_was_trained_on_the_images_is_told(data: list[str], tmp_path: Path) -> None:
    images = labelled_folder(tmp_path / "fit")
    write_split(tmp_path / SPLIT_FILE, images, Split(list(range(30)), [], []))
    beitzoo.save_pretrained(beitzoo.create_model(MODEL, pretrained=True), tmp_path / "best")
    result = run("probe", f"local-dir:{tmp_path / 'best'}", *data[:2], "--blocks", "3")
    assert "was itself trained on 10 of the 10 images that it is measured on" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "first"], "--blocks 'first' are no numbers; write some such as 2,5,-1."),
        (["--blocks", "4"], "there are 4 blocks, 0 to 3 or -4 to -1"),
        (["--probes", "linear,svm"], "--probes linear,svm: there is no 'svm'; there are joint, knn, linear, ridge."),
        (["--pooling", "max"], "--pooling max: there is no 'max'"),
        (["--picture", "p.gif"], "p.gif does not end in .png, .svg, .pdf"),
        (["--keep-features", "f.npy"], "f.npy: .npy has no classes"),
        (["--features", "f.npz"], "Give models with --data, or a file of --features without models"),
        (["--train-images", "2000"], "there are 1078 images to fit on; leave it out for all."),
        (["--train-per-class", "500"], "There are not 500 images of each class"),
    ],
)
def test_what_cannot_be_probed_is_one_message(arguments: list[str], message: str) -> None:
    result = run("probe", MODEL, "--data", "digits", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_kept_features_are_probed_as_those_of_the_network(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows from a file, of the same images, by every probe; and the picture of them."""
    (tmp_path / "measure" / "0" / "broken.png").write_bytes(b"no image")
    kept, picture = tmp_path / "f.parquet", tmp_path / "p.png"
    probes = ["--probes", "linear,ridge,joint,knn", "--json"]
    first = run(
        "probe", MODEL, *data[:4], "--blocks", "0,3", *probes, "--keep-features", str(kept), "--picture",
        str(picture),
    )  # fmt: skip
    again = run("probe", "--features", str(kept), *probes)
    assert (first.exit_code, again.exit_code) == (1, 1), first.stderr + again.stderr
    assert "broken.png: not an image that can be read" in again.stderr
    columns = ("model", "img_size", "block", "pooling", "probe", "top1", "val_top1", "count", "failures")
    rows, others = ([[row[name] for name in columns] for row in json.loads(one.stdout)] for one in (first, again))
    assert rows == others
    top1 = {tuple(row[2:5]): row[5] for row in rows}
    assert {(pooling, probe) for _, pooling, probe in top1} == {
        *((pooling, probe) for pooling in ("mean", "class") for probe in ("linear", "ridge", "knn")),
        ("both", "joint"),
    }
    assert top1[3, "both", "joint"] > 85
    with Image.open(picture) as image:
        assert image.size == (1120, 544)
    monkeypatch.setattr(probe_rows, "extract_features", None)
    (tmp_path / "folder.npz").mkdir()
    failed = run("probe", MODEL, *data, "--keep-features", str(tmp_path / "folder.npz"))
    assert (failed.exit_code, "it is a folder" in failed.stderr) == (2, True)


def test_rows_of_other_weights_or_images_are_measured_anew(data: list[str], tmp_path: Path) -> None:
    """A run that was trained on, a folder that got another image, a file of features that was written again."""
    model, table, kept = beitzoo.create_model(MODEL, pretrained=True), tmp_path / "r.csv", tmp_path / "f.npz"
    own = str(tmp_path / "run")

    def count(*arguments: str) -> int:
        result = run("probe", *arguments, "--probes", "knn", "--pooling", "mean", "--results-file", str(table))
        assert result.exit_code == 0, result.stderr
        return len(table.read_text().splitlines()) - 1

    beitzoo.save_pretrained(model, Path(own))
    assert [count(own, *data, "--keep-features", str(kept)), count(own, *data), count("--features", str(kept))] == [
        1, 1, 2,
    ]  # fmt: skip
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias.add_(0.1)
    beitzoo.save_pretrained(model, Path(own))
    assert [count(own, *data, "--keep-features", str(kept)), count("--features", str(kept))] == [3, 4]
    assert count("--features", str(kept)) == 4
    digits().images[5].save(tmp_path / "measure" / "1" / "other.png")  # type: ignore[union-attr]
    assert count(own, *data) == 5
    digits().images[7].save(tmp_path / "measure" / "1" / "other.png")  # type: ignore[union-attr]
    assert [count(own, *data), count(own, *data)] == [6, 6]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["count"] for row in rows] == ["30"] * 4 + ["31"] * 2
    assert len({row["weights"] for row in rows}) == 4


def test_few_images_are_enough_and_none_is_there_twice(tmp_path: Path) -> None:
    """Six of each of five classes: a tenth of them would not be one of each."""
    images = digits()
    assert images.labels is not None
    for label in range(5):
        (tmp_path / str(label)).mkdir()
        for index in [place for place, own in enumerate(images.labels) if own == label][:6]:
            images.images[index].save(tmp_path / str(label) / f"{index}.png")  # type: ignore[union-attr]
    out = str(tmp_path / "f.npz")
    assert run("embed", str(tmp_path), "-m", MODEL, "--out", out).exit_code == 0
    for arguments in ([MODEL, "--data", str(tmp_path), "--blocks", "3"], ["--features", out]):
        result = run("probe", *arguments, "--probes", "knn")
        assert "15 images to fit probes on, 5 to choose a block by, 10 to measure them on." in result.stderr
    run("embed", *[str(tmp_path)] * 2, "-m", MODEL, "--out", out)
    failed = run("probe", "--features", out)
    assert (failed.exit_code, "f.npz has 30 images more than once" in failed.stderr) == (2, True)


def test_features_that_embed_wrote_are_probed_by_their_folders(data: list[str], tmp_path: Path) -> None:
    (tmp_path / "fit").rename(tmp_path / "train")
    (tmp_path / "measure").rename(tmp_path / "test")
    folders = [str(tmp_path / "train"), str(tmp_path / "test")]
    assert run("embed", *folders, "-m", MODEL, "--out", str(tmp_path / "f.npz")).exit_code == 0
    result = run("probe", "--features", str(tmp_path / "f.npz"), "--probes", "ridge,knn", "--json")
    rows = json.loads(result.stdout)
    assert [(row["block"], row["pooling"], row["probe"], row["count"], row["train_count"]) for row in rows] == [
        (None, "pooled", "ridge", 30, 27),
        (None, "pooled", "knn", 30, 27),
    ]
    assert rows[0]["top1"] > 90
    table = run("probe", "--features", str(tmp_path / "f.npz"))
    assert "output" in table.stdout
    assert "Best linear probe, chosen by 3 other images: output, pooled" in table.stdout
    for arguments, message in (
        (["--blocks", "2"], "The file has no features of block [2]; it has the network's output alone"),
        (["--pooling", "mean"], "There are no features 'mean' of block None; there are pooled"),
        (["--data", "digits"], "--features has its images already; leave out --data."),
    ):
        failed = run("probe", "--features", str(tmp_path / "f.npz"), *arguments)
        assert (failed.exit_code, message in failed.stderr) == (2, True), failed.stderr
    run("embed", *folders, "-m", MODEL, "--out", str(tmp_path / "g.npz"), "--pooling", "patches")
    assert "features of single patches" in run("probe", "--features", str(tmp_path / "g.npz")).stderr
    run("embed", str(SAMPLES / "digit_1.png"), "-m", MODEL, "--out", str(tmp_path / "h.npz"))
    assert "have no classes; embed class folders" in run("probe", "--features", str(tmp_path / "h.npz")).stderr
