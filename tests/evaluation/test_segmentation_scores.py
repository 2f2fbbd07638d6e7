"""Segmentation models measured on images with masks: rows, classes by name, failures, and what a picture shows."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image

import beitzoo
from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.confusion import ConfusionMatrix
from beitzoo.evaluation.confusion_picture import draw_confusion, most_confused, row_shares, write_confusion
from beitzoo.evaluation.segmentation import _outputs, evaluate_segmenter, measure_segmenter
from beitzoo.evaluation.subjects import Subject
from beitzoo.images.image_set import ImageSet
from beitzoo.images.label_maps import MaskLabels
from beitzoo.images.masked_sets import MaskedSet, find_masked_images
from beitzoo.images.splits import SPLIT_FILE, Split, write_split
from beitzoo.inference import fastest
from beitzoo.inference.fastest import OPTIMIZED
from beitzoo.inference.segment import SegmentOptions, label_pixels
from beitzoo.models.segmentation import Segmenter
from beitzoo.zoo.checkpoints import Segment
from beitzoo.zoo.labels import ade20k_classes

NAMES = ("sky", "road", "car")


def write_pairs(root: Path, names: tuple[str, ...] = NAMES, count: int = 4) -> MaskedSet:
    """Write images of two sizes with masks of all classes and pixels of none."""
    draw = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    (root / "classes.txt").write_text("\n".join(names))
    for number in range(count):
        size = (24, 40) if number % 2 else (36, 30)
        Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / "images" / f"{number}.png")
        mask = draw.choice([*range(len(names)), 255], size).astype(np.uint8)
        Image.fromarray(mask).save(root / "annotations" / f"{number}.png")
    return find_masked_images("annotations", root)


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    made: object = beitzoo.create_model("test_beit", head="segment", num_classes=3, img_size=32, decoder="linear")
    assert isinstance(made, Segmenter)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    head = made.pretrained.head
    assert isinstance(head, Segment)
    made.backbone.pretrained = replace(made.pretrained, head=replace(head, labels=NAMES))
    return made


def by_hand(model: Segmenter, masked: MaskedSet, indices: list[int], options: SegmentOptions) -> ConfusionMatrix:
    matrix = ConfusionMatrix(3)
    for index in indices:
        image, mask = masked.load(index)
        labels = label_pixels(model, image, options).flatten().tolist()
        for given, truth in zip(labels, mask.flatten().tolist(), strict=True):
            if truth != 255:
                matrix.counts[truth, given] += 1
    return matrix


def test_measuring_counts_each_pixel_once_and_keeps_the_mode(model: Segmenter, tmp_path: Path) -> None:
    masked = write_pairs(tmp_path)
    model.train()
    options = SegmentOptions(scales=(1.0, 1.5), flip=True)
    matrix, failures = measure_segmenter(model, masked, [3, 0, 1], options, workers=3)
    assert failures == []
    assert torch.equal(matrix.counts, by_hand(model, masked, [3, 0, 1], options).counts)
    assert (matrix.counts.sum(0) > 0).sum() > 1  # the network does not give all pixels one class
    assert all(module.training for module in model.modules())


def test_classes_are_matched_by_name(model: Segmenter, tmp_path: Path) -> None:
    masked = write_pairs(tmp_path / "a")
    reordered = ("car", "sky", "road")
    # The same masks, of which number 0 is now called car: the third output of the model.
    other = replace(masked, labels=replace(masked.labels, names=reordered))
    outputs = [NAMES.index(name) for name in reordered]
    evaluation = evaluate_segmenter(Subject(model, "test_beit"), other, "data")
    expected = by_hand(model, masked, [0, 1, 2, 3], SegmentOptions()).counts
    assert torch.equal(evaluation.matrix.counts[outputs], expected)
    assert evaluation.names == NAMES
    foreign = replace(masked, labels=replace(masked.labels, names=("sky", "road", "boat")))
    with pytest.raises(InvalidValueError, match=r"none of its own \(boat\) and 1 of its 3 .* not in the masks \(car\)"):
        evaluate_segmenter(Subject(model, "test_beit"), foreign, "data")


def test_names_of_ade20k_may_be_those_of_elsewhere() -> None:
    """A bed is a "bed " there."""
    names = tuple(name for name, _ in ade20k_classes())
    others = tuple("bed " if name == "bed" else name for name in names)
    model: object = beitzoo.create_model("test_beit", head="segment", num_classes=150, img_size=32, decoder="linear")
    assert isinstance(model, Segmenter)
    head = model.pretrained.head
    assert isinstance(head, Segment)
    model.backbone.pretrained = replace(model.pretrained, head=replace(head, labels=others))
    masked = MaskedSet(ImageSet([], None, ()), [], MaskLabels(names, reduce_zero_label=True))
    assert _outputs(Subject(model, "test_beit"), masked) == list(range(150))


def test_a_model_without_names_needs_as_many_classes(tmp_path: Path) -> None:
    model: object = beitzoo.create_model("test_beit", head="segment", num_classes=2, img_size=32, decoder="linear")
    assert isinstance(model, Segmenter)
    with pytest.raises(InvalidValueError, match="tells 2 classes apart and nobody named them, the data has 3"):
        evaluate_segmenter(Subject(model, "test_beit"), write_pairs(tmp_path), "data")


@pytest.fixture
def saved(model: Segmenter, tmp_path: Path) -> Path:
    beitzoo.save_pretrained(model, tmp_path / "run" / "best")
    return tmp_path / "run" / "best"


def test_the_command_prints_rows_and_writes_classes_and_a_picture(saved: Path, tmp_path: Path) -> None:
    masked = write_pairs(tmp_path / "data")
    write_split(tmp_path / "run" / SPLIT_FILE, masked.images, Split([0], [2], [1, 3]))
    files = {name: tmp_path / f"out.{name}" for name in ("rows.csv", "classes.csv", "png")}
    options = ("--data", str(tmp_path / "data"), "--scales", "1,1.5", "--results-file", str(files["rows.csv"]))
    details = ("--per-class", str(files["classes.csv"]), "--confusion", str(files["png"]))
    result = run("evaluate", f"local-dir:{saved}", *options, *details)
    assert result.exit_code == 0, result.stderr
    model: object = beitzoo.create_model(f"local-dir:{saved}", pretrained=True)
    assert isinstance(model, Segmenter)
    expected = by_hand(model, masked, [1, 3], SegmentOptions(scales=(1.0, 1.5)))
    scores = expected.scores()
    (row,) = csv.DictReader(files["rows.csv"].read_text().splitlines())
    asked = {"count": "2", "failures": "0", "mode": "slide", "scales": "1 1.5", "flip": "False", "img_size": "32"}
    assert {name: row[name] for name in asked} == asked
    for name in ("miou", "macc", "aacc"):
        assert float(row[name]) == pytest.approx(getattr(scores, name), abs=1e-3)
    assert float(row["param_count"]) == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    classes = list(csv.DictReader(files["classes.csv"].read_text().splitlines()))
    assert [one["class"] for one in classes] == list(NAMES)
    assert [int(one["pixels"]) for one in classes] == expected.counts.sum(1).tolist()
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert f"mIoU {scores.miou:.2f}" in result.stdout and "predicted" in result.stdout
    assert "Left out 2 of 4 images" in result.stderr


def test_a_sweep_goes_on_and_measures_what_changed_anew(saved: Path, tmp_path: Path) -> None:
    """Other masks, other numbers of no class, another way to look; and what failed stays a row."""
    root, table = tmp_path / "data", tmp_path / "r.csv"
    write_pairs(root, count=1)
    torch.manual_seed(0)
    foreign: object = beitzoo.create_model("test_beit", head="segment", num_classes=2, img_size=32, decoder="linear")
    assert isinstance(foreign, Segmenter)
    beitzoo.save_pretrained(foreign, tmp_path / "foreign")
    models = [str(saved), str(tmp_path / "foreign")]

    def rows(*options: str) -> list[dict[str, str]]:
        result = run("evaluate", *models, "--data", str(root), "--results-file", str(table), *options)
        assert result.exit_code == 1, result.stderr
        assert "foreign: failed: " in result.stderr and "tells 2 classes apart" in result.stderr
        return list(csv.DictReader(table.read_text().splitlines()))

    first = rows()
    assert [(row["miou"] == "", row["error"] == "") for row in first] == [(False, True), (True, False)]
    assert "" != first[0]["weights"] != first[1]["weights"] != ""
    assert rows() == first
    assert rows("--retry-failed") == first
    assert len(rows("--scales", "1,1.5")) == 4
    mask = root / "annotations" / "0.png"
    mask.write_bytes(mask.read_bytes())  # of as many bytes, and written later
    assert len(rows()) == 6
    again = rows("--classes", ",".join(NAMES), "--ignore", "9")
    assert (len(again), again[-1]["ignore"], len({row["data_version"] for row in again})) == (8, "9", 3)


def test_many_images_are_measured_by_the_optimized_copy(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What computed is in the rows and part of their key; what is counted is the same."""
    monkeypatch.setattr(fastest, "HANDFUL", 3)
    write_pairs(tmp_path / "data")
    asked = ("evaluate", str(saved), "--data", str(tmp_path / "data"), "--results-file", str(tmp_path / "r.csv"))
    copied, plain = run(*asked), run(*asked, "--no-optimize")
    assert (copied.stderr.count(OPTIMIZED), plain.stderr.count(OPTIMIZED)) == (1, 0)
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [row["computed_by"] for row in rows] == ["inference copy", "plain network"]
    assert float(rows[0]["miou"]) == pytest.approx(float(rows[1]["miou"]), abs=0.5)
    assert rows[0]["param_count"] == rows[1]["param_count"]
    assert all("already" in run(*asked, option).stdout for option in ("--optimize", "--no-optimize"))


def test_the_command_lists_bad_images_and_masks(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_pairs(root, count=5)
    (root / "images" / "0.png").write_bytes(b"no image")
    Image.new("L", (7, 9)).save(root / "annotations" / "1.png")
    Image.new("L", (30, 36), 7).save(root / "annotations" / "2.png")
    Image.new("L", (40, 24), 255).save(root / "annotations" / "3.png")
    result = run("evaluate", str(saved), "--data", str(root), "--json")
    (row,) = json.loads(result.stdout)
    assert (result.exit_code, row["count"], row["failures"]) == (1, 1, 4)
    listed = [line for line in result.stderr.splitlines() if line.startswith("Not counted: ")]
    assert [line.split(": ")[1] for line in listed] == [f"images/{number}.png" for number in range(4)]
    assert "its mask annotations/1.png" in listed[1] and "7 x 9" in listed[1]
    assert "7" in listed[2] and "1,080 pixels" in listed[2]
    assert "no pixel has a class" in listed[3]


def test_numbers_that_are_no_class_are_said(saved: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", names=(*NAMES, "unlabelled"))
    (tmp_path / "data" / "classes.txt").unlink()
    options = ("--data", str(tmp_path / "data"), "--classes", "sky,road,car", "--ignore", "3", "--json")
    (row,) = json.loads(run("evaluate", str(saved), *options).stdout)
    assert (row["count"], row["failures"]) == (4, 0)


def test_masks_in_colour_are_measured_as_a_recipe_says(saved: Path, tmp_path: Path) -> None:
    masked = write_pairs(tmp_path / "data")
    palette = np.array([(9, 9, 9), (200, 0, 0), (0, 0, 200), (77, 77, 77)], dtype=np.uint8)
    plain = run("evaluate", str(saved), "--data", str(tmp_path / "data"), "--json")
    for index, path in enumerate(masked.masks):
        assert isinstance(path, Path)
        numbers = np.minimum(masked.load(index)[1], 3)
        Image.fromarray(palette[numbers]).save(path)
    recipe = tmp_path / "recipe.toml"
    colours = "\n".join(f"{name} = {list(map(int, rgb))}" for name, rgb in zip(NAMES, palette, strict=False))
    recipe.write_text(
        f"[model]\nname = 'test_beit'\n[data]\nsource = 'annotations'\npath = '{tmp_path / 'data'}'\n"
        f"[task]\nkind = 'segment'\n[task.labels.colours]\n{colours}\n"
        "[train]\nbatch_size = 2\nlr = 1e-3\nepochs = 1\nwarmup_epochs = 0\n"
    )
    result = run("evaluate", str(saved), "--data", str(tmp_path / "data"), "--recipe", str(recipe), "--json")
    assert result.exit_code == 0, result.stderr
    (row,), (other,) = (json.loads(one.stdout) for one in (result, plain))
    assert row.pop("data_version") != other.pop("data_version")
    assert row == other
    refused = run("evaluate", str(saved), "--data", "x", "--recipe", str(recipe), "--ignore", "3")
    assert (refused.exit_code, "leave --classes" in refused.stderr) == (2, True)


def test_options_of_the_other_kind_are_refused(saved: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "data")
    shutil.copytree(saved, tmp_path / "another")
    for arguments, message in {
        ("beit_nano_patch4_32.digits", "--scales", "1,2"): "is no segmentation model",
        ("beit_nano_patch4_32.digits", str(saved)): "Only some of these are segmentation models",
        (str(saved), "--split-seed", "1"): "are for classifiers",
        (str(saved), "--confusion", "a.jpg"): "is no picture's name",
        (str(saved), str(tmp_path / "another"), "--per-class", "a.csv"): "are of one model",
    }.items():
        result = run("evaluate", *arguments, "--data", str(tmp_path / "data"))
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_shares_and_pairs() -> None:
    counts = np.array([[8, 1, 1], [0, 0, 0], [30, 10, 60]])
    shares = row_shares(counts)
    np.testing.assert_allclose(shares[[0, 2]], [[80, 10, 10], [30, 10, 60]])
    assert np.isnan(shares[1]).all()
    assert most_confused(counts, 3) == [(2, 0, 30.0), (2, 1, 10.0), (0, 1, 10.0)]


@pytest.mark.parametrize(("classes", "numbers", "labels"), [(3, 3, 3), (20, 0, 20), (60, 1, 12)])
def test_a_picture_has_numbers_of_few_classes_and_pairs_of_many(
    classes: int, numbers: int, labels: int, tmp_path: Path
) -> None:
    counts = np.diag(np.full(classes, 5))
    names = [f"class {number}" for number in range(classes)]
    axes = draw_confusion(counts, names).axes[0]
    assert (len(axes.texts), len(axes.get_yticks())) == (numbers, labels)
    if classes == 3:
        pictures = [tmp_path / "a.svg", tmp_path / "b.svg"]
        for path in pictures:
            write_confusion(path, counts, names)
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
