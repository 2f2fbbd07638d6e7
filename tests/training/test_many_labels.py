"""Fine-tuning on images with several labels each: what a run leaves, and what is refused before it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colours import COLOURS, colour_recipe, mixture_recipe, write_colours, write_mixtures
from PIL import Image
from pydantic import ValidationError
from sklearn.metrics import average_precision_score

import beitzoo
from beitzoo.errors import UserError
from beitzoo.images.csv_sets import listed_images
from beitzoo.images.splits import read_split
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError
from beitzoo.training.report import draw_run
from beitzoo.training.tasks.finetune import FinetuneTask, finetune, prepare
from beitzoo.zoo.checkpoints import Classify

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtures(tmp_path_factory.mktemp("data") / "mixtures")


@pytest.fixture(scope="module")
def run(labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    finetune(mixture_recipe(labels, epochs=8), out)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    document = recipe.model_dump()
    document[section].update(values)
    return Recipe.model_validate(document)


def test_a_run_says_how_well_each_label_is_found(run: Path, labels: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    images = listed_images(labels)
    split = read_split(run / "split.csv", images)
    answers = rows_of(run / "answers.csv")
    assert metrics["test_count"] == len(answers) == len(split.test) - metrics["test_failures"]
    assert "test_top1" not in metrics
    found = np.array([[float(row[f"p({name})"]) for name in COLOURS] for row in answers])
    truth = np.array([[name in row["labels"].split(";") for name in COLOURS] for row in answers])
    assert truth.tolist() == [[label in images.classes_of(i) for label in range(3)] for i in sorted(split.test)]
    assert metrics["test_map"] == pytest.approx(100 * average_precision_score(truth, found, average="macro"))
    assert metrics["test_map"] > 90
    assert [row["class"] for row in rows_of(run / "per_class.csv")] == list(COLOURS)
    epochs = [line for line in rows_of(run / "log.csv") if line["line"] == "epoch"]
    best = max(epochs, key=lambda line: (float(line["val_map"]), -float(line["val_loss"])))
    assert metrics["val_map"] == float(best["val_map"])
    assert (run / "mistakes.png").is_file()


def test_there_is_no_confusion_of_several_labels(run: Path) -> None:
    assert [path.name for path in draw_run(run)] == ["curves.png"]


def test_the_trained_model_answers_by_sigmoid(run: Path, labels: Path) -> None:
    """What `answers.csv` has is what `predict` gives for the same file."""
    model = beitzoo.create_model(f"local-dir:{run / 'best'}", pretrained=True)
    assert model.pretrained.head == Classify(num_classes=3, labels=COLOURS, activation="sigmoid")
    row = rows_of(run / "answers.csv")[-1]
    (prediction,) = beitzoo.predict(model, labels.parent / row["image"], topk=3)
    assert {answer.label: answer.probability for answer in prediction.answers} == pytest.approx(
        {name: float(row[f"p({name})"]) for name in COLOURS}, abs=2e-3
    )


def test_a_run_on_several_labels_goes_on_from_its_own_head(run: Path, labels: Path) -> None:
    start = beitzoo.create_model(f"local-dir:{run / 'best'}", pretrained=True)
    recipe = changed(mixture_recipe(labels), "model", name=f"local-dir:{run / 'best'}", pretrained=True, overrides={})
    _, kept = prepare(recipe, ALONE)
    assert torch.equal(kept.head.weight, start.head.weight)


def test_what_a_process_measures_adds_up(labels: Path) -> None:
    """Two processes, one after the other: their shares joined are what one measures alone."""
    task, model = prepare(mixture_recipe(labels), ALONE)
    both = []
    for rank in range(2):
        task.processes = Processes(rank, 2, torch.device("cpu"))
        both.append(task._measure_share(model.eval(), task.split.val[rank::2]))
    task.processes = ALONE
    alone = task.measure(model, task.split.val).metrics()
    joined = both[0].join(both).metrics()
    assert joined == {**alone, "loss": pytest.approx(alone["loss"], rel=1e-6), "map": pytest.approx(alone["map"])}


def test_the_better_model_ranks_better(labels: Path) -> None:
    task: FinetuneTask = prepare(mixture_recipe(labels), ALONE)[0]
    assert task.better({"val_map": 50.1, "val_loss": 9.0}, {"val_map": 50.0, "val_loss": 0.1})
    assert task.better({"val_map": 50.0, "val_loss": 0.1}, {"val_map": 50.0, "val_loss": 0.2})
    assert not task.better({"val_map": 50.0, "val_loss": 0.1}, {"val_map": 50.0, "val_loss": 0.1})


def test_one_class_and_several_labels_are_not_mixed_up(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"may have several labels each, and task\.labels is 'one'\. Set task\.labels"
    ):
        prepare(changed(mixture_recipe(labels), "task", labels="one"), ALONE)
    one = changed(colour_recipe(write_colours(tmp_path / "one")), "task", labels="many")
    with pytest.raises(RecipeError, match=r"have one class each, and task\.labels is 'many'\. Leave it out, or give"):
        prepare(one, ALONE)
    with pytest.raises(ValidationError, match="balance can be 'loss' or 'none'"):
        changed(one, "task", balance="sampling")


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (["{}.png,x"] * 9 + ["{}.png,y"] * 9, {}, "Each image has exactly one label, and task.labels is 'many'"),
        (["{}.png,"] * 18, {}, "No image has a label"),
        (["{}.png,x;y,train"] * 9 + ["{}.png,x;z,test"] * 9, {}, "Labels that no image to train on has: z. Add images"),
        (["{}.png,x;y,train"] * 9 + ["{}.png,,test"] * 9, {}, "None of 9 images held out has a label"),
        (["{}.png,x;y,"] * 18, {"train_per_class": 2}, "a choice of 2 images of each class needs one class of each"),
    ],
)
def test_labels_that_teach_nothing_are_refused(
    tmp_path: Path, rows: list[str], data: dict[str, Any], message: str
) -> None:
    for number in range(len(rows)):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{number}.png")
    header = "path,labels" + ",part" * (rows[0].count(",") == 2)
    lines = [row.format(number) for number, row in enumerate(rows)]
    (tmp_path / "labels.csv").write_text("\n".join([header, *lines]) + "\n")
    with pytest.raises(UserError, match=message):
        prepare(changed(mixture_recipe(tmp_path / "labels.csv"), "data", **data), ALONE)


def test_rare_labels_that_are_not_measured_are_named(labels: Path) -> None:
    task, _ = prepare(mixture_recipe(labels), ALONE)
    assert "They are drawn evenly from all images, without a look at their labels." in task.describe()
    task.images.label_sets[:] = [own if i in task.split.train else () for i, own in enumerate(task.images.label_sets)]  # type: ignore[index]
    said = "\n".join(task.describe())
    assert "No image to choose by has blue, green, red: the mean average precision there is of the others." in said
