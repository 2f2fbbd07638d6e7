"""Accuracy as a row: on which images, with which classes, and what is said of those that cannot be read."""

import csv
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

import beitzoo
from beitzoo import Beit
from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.evaluate import COLUMNS, Judging, evaluate, load_data
from beitzoo.evaluation.subjects import Subject
from beitzoo.images.datasets import digits, labelled_folder
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import SPLIT_FILE, Split, draw_split, write_split
from beitzoo.images.transforms import resolve_data_config
from beitzoo.inference.classify import predict
from beitzoo.inference.pipeline import Loading
from beitzoo.zoo.checkpoints import Classify

SHIPPED = "beit_nano_patch4_32.digits"


@pytest.fixture(scope="module")
def shipped() -> Beit:
    return beitzoo.create_model(SHIPPED, pretrained=True)


def write_digits(root: Path, numbers: str, each: int = 2) -> ImageSet:
    """Write some digits to class folders, which are named by the numbers."""
    images = digits()
    for name in numbers:
        (root / name).mkdir(parents=True)
        chosen = [index for index, label in enumerate(images.labels or ()) if str(label) == name][:each]
        for index in chosen:
            image = images.images[index]
            assert isinstance(image, Image.Image)
            image.save(root / name / f"{index}.png")
    return labelled_folder(root)


def test_the_shipped_model_reaches_what_the_results_say(shipped: Beit) -> None:
    evaluation = evaluate(Subject(shipped, SHIPPED), load_data("digits"), "digits", loading=Loading(64))
    row = evaluation.row
    recorded = list(csv.DictReader(Path("results/digits.csv").read_text().splitlines()))
    assert list(row) == COLUMNS == list(recorded[0])
    assert (row["count"], row["failures"], evaluation.failures) == (599, 0, [])
    assert isinstance(row["top1"], float)
    assert row["top1"] == pytest.approx(float(recorded[0]["top1"]), abs=0.2)  # one image is 0.167
    assert row["top1_err"] == pytest.approx(100 - row["top1"])
    assert evaluation.notes == [f"Left out 1,198 of 1,797 images, which {SHIPPED} was trained on or chosen by."]


@pytest.mark.parametrize("name", [SHIPPED, "beit_nano_patch4_32"])
def test_a_model_is_not_measured_on_images_it_was_trained_on(
    name: str, shipped: Beit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The architecture alone stands for its checkpoint, and no file of the current folder changes that."""
    images = digits()
    write_split(tmp_path / SPLIT_FILE, images, Split([], [], list(range(1797))))
    (tmp_path / "recipe.toml").write_text("[data]\nsplit_seed = 7\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidValueError, match="trained on images that split_seed 7 holds out; leave --split-seed"):
        evaluate(Subject(shipped, name), images, "digits", Judging(split_seed=7))


@pytest.fixture
def run(shipped: Beit, tmp_path: Path) -> tuple[Subject, ImageSet]:
    """A run as it is on disk, with its images beside it."""
    images = write_digits(tmp_path / "data", "0123456789", each=3)
    write_split(tmp_path / "run" / SPLIT_FILE, images, draw_split(images, 1 / 2, 1 / 3, seed=3))
    beitzoo.save_pretrained(shipped, tmp_path / "run" / "best")
    name = f"local-dir:{tmp_path / 'run' / 'best'}"
    return Subject(beitzoo.create_model(name, pretrained=True), name), images


def test_only_images_that_the_run_held_out_are_used(run: tuple[Subject, ImageSet], tmp_path: Path) -> None:
    subject, images = run
    evaluation = evaluate(subject, images, "data")
    assert evaluation.row["count"] == 10
    assert evaluation.notes == [f"Left out 20 of 30 images, which {subject.name} was trained on or chosen by."]
    named = Subject(subject.model, "beit_nano_patch4_32", tmp_path / "run" / "best" / "model.safetensors")
    assert evaluate(named, images, "data").row["count"] == 10
    assert evaluate(named, images, "data").row["model"] == str(named.checkpoint)


def test_a_run_that_saw_all_images_is_refused(run: tuple[Subject, ImageSet], tmp_path: Path) -> None:
    subject, images = run
    write_split(tmp_path / "run" / SPLIT_FILE, images, Split(list(range(29)), [29], []))
    with pytest.raises(InvalidValueError, match="was trained on all 30 images; evaluate it on others"):
        evaluate(subject, images, "data")


def test_a_seed_splits_the_digits_only(run: tuple[Subject, ImageSet]) -> None:
    with pytest.raises(InvalidValueError, match="--split-seed draws a part of the digits, and this is a folder"):
        evaluate(*run, "data", Judging(split_seed=0))


def test_a_masked_image_model_is_not_measured(run: tuple[Subject, ImageSet]) -> None:
    subject = Subject(beitzoo.create_model("test_beit", head="mim"), "a.mim", None)
    with pytest.raises(InvalidValueError, match="mim has no head to predict with"):
        evaluate(subject, run[1], "data")


def test_some_of_the_classes_are_enough_and_all_outputs_compete(shipped: Beit, tmp_path: Path) -> None:
    images = write_digits(tmp_path, "853", each=4)
    evaluation = evaluate(Subject(shipped, SHIPPED), images, "data")
    expected = [Path(image).parent.name for image in images.images]  # type: ignore[arg-type]
    right = [row.answers[0].label == name for row, name in zip(predict(shipped, images.images), expected, strict=True)]
    assert evaluation.row["top1"] == round(100 * sum(right) / 12, 3)
    assert sum(right) > 8
    assert evaluation.notes == [
        f"{SHIPPED} tells 10 classes apart, the data has 3 of them; all its outputs compete, as in timm."
    ]


def test_imagenet_goes_by_synsets_or_names(tmp_path: Path) -> None:
    """Ten folders as Imagenette has them: labels are mapped to the outputs of all 1,000 classes."""
    synsets = timm.data.ImageNetInfo("imagenet-1k").label_names()
    model = beitzoo.create_model("test_beit", num_classes=1000)
    model.pretrained = replace(model.pretrained, head=Classify(num_classes=1000, labels="imagenet-1k"))
    names = model.class_names
    assert names is not None
    chosen = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    logits = model.eval()(beitzoo.create_transform(**resolve_data_config(model))(image)[None])[0]
    model.head.bias.data[217] += 100  # the likeliest for every image now
    for folders in ([synsets[i] for i in chosen], [names[i].replace("/", "") for i in chosen]):
        images = ImageSet([image] * 10, list(range(10)), tuple(folders), tmp_path)
        row = evaluate(Subject(model, "test_beit"), images, "imagenette").row
        assert (row["top1"], row["count"]) == (10.0, 10)
    assert logits.argmax() != 217
    unknown = ImageSet([image] * 2, [0, 1], (synsets[0], "n00000000"), tmp_path)
    with pytest.raises(InvalidValueError, match=r"was not trained on 1 of the 2 classes of the data \(n00000000\)"):
        evaluate(Subject(model, "test_beit"), unknown, "imagenette")


def test_other_classes_are_refused(shipped: Beit, tmp_path: Path) -> None:
    images = ImageSet([Image.new("L", (8, 8))] * 2, [0, 1], ("cat", "dog"), tmp_path)
    with pytest.raises(InvalidValueError, match=r"not trained on 2 of the 2 classes of the data \(cat, dog\), but"):
        evaluate(Subject(shipped, SHIPPED), images, "data")
    nameless = beitzoo.create_model("test_beit", num_classes=3)
    with pytest.raises(InvalidValueError, match="tells 3 classes apart and nobody named them, the data has 2"):
        evaluate(Subject(nameless, "test_beit"), images, "data")


def test_what_predict_lists_evaluate_lists(tmp_path: Path) -> None:
    """One unreadable image, one that cannot be prepared, one of which the output is not finite."""
    for name, size in (("cat/1.png", (40, 40)), ("cat/2.png", (41, 41)), ("dog/1.png", (3000, 1))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, "white" if "2" in name else "black").save(tmp_path / name)
    (tmp_path / "dog" / "broken.png").write_bytes(b"no image")
    model = beitzoo.create_model("test_beit", num_classes=2).bfloat16()
    model.pretrained = replace(model.pretrained, data=replace(model.pretrained.data, crop_mode="border"))

    def spoil(_: torch.nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        return torch.where(inputs[0].amax(dim=(1, 2, 3))[:, None] > 0, float("nan"), logits)

    model.register_forward_hook(spoil)
    images = labelled_folder(tmp_path)
    evaluation = evaluate(Subject(model, "test_beit"), images, "data")
    predicted = [(images.identity(i)[0], row.error) for i, row in enumerate(predict(model, images.images)) if row.error]
    assert evaluation.failures == predicted
    assert [name for name, _ in predicted] == ["cat/2.png", "dog/1.png", "dog/broken.png"]
    assert [reason.split(":")[0].split(" (")[0] for _, reason in evaluation.failures] == [
        "the model's output for it is not finite",
        "cannot be prepared",
        "not an image that can be read",
    ]
    row = evaluation.row
    assert (row["count"], row["failures"], row["top5"], row["top5_err"]) == (1, 3, None, None)
    assert model.training


def test_of_tables_the_parts_that_are_held_out_are_measured(shipped: Beit, tmp_path: Path) -> None:
    files = sorted(path for path in write_digits(tmp_path / "digits", "345", each=4).images if isinstance(path, Path))
    for name, those in (("train", files), ("test", files[:3])):
        table = {"image": [file.read_bytes() for file in those], "label": [file.parent.name for file in those]}
        pq.write_table(pa.table(table), tmp_path / f"{name}-00000-of-00001.parquet")
    images = load_data(str(tmp_path))
    evaluation = evaluate(Subject(shipped, SHIPPED), images, "tables")
    assert evaluation.row["count"] == 3
    assert evaluation.notes[0] == "The data has parts; only the 3 images that are held out by their names count."


def test_images_without_classes_are_not_measured(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "t.parquet")
    with pytest.raises(InvalidValueError, match="have no classes, so no answer is right"):
        load_data(str(tmp_path / "t.parquet"))
