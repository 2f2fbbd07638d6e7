"""Average precision is scikit-learn's and torchmetrics'; the answers of a run with several labels say what is right."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import write_mixtures
from PIL import Image
from sklearn.metrics import average_precision_score, precision_score, recall_score
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_average_precision

import beitzoo
from beitzoo import Beit
from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.average_precision import average_precision
from beitzoo.evaluation.evaluate import Judging, evaluate, load_data
from beitzoo.evaluation.label_answers import LabelAnswers, label_rows, write_label_answers, write_label_rows
from beitzoo.evaluation.looks import Looks
from beitzoo.evaluation.mistakes import draw_mistakes
from beitzoo.evaluation.subjects import Subject
from beitzoo.images.files import open_image
from beitzoo.images.image_set import ImageSet
from beitzoo.zoo.checkpoints import Classify, PretrainedConfig

NAMES = ("cat", "dog", "owl", "emu", "yak")


def drawn(images: int = 60) -> LabelAnswers:
    """Answers of which many share a score; no image is a yak."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(images, len(NAMES), generator=generator) < torch.tensor([0.5, 0.2, 0.05, 0.9, 0.0])
    logits = (torch.randn(images, len(NAMES), generator=generator) * 3 + labels).round() / 2
    return LabelAnswers(torch.arange(images), labels, logits)


def test_it_is_that_of_others() -> None:
    answers = drawn()
    assert len(answers.logits[:, 0].unique()) < 30
    ours = average_precision(answers.logits, answers.labels)
    assert ours[4].isnan()
    for label in range(4):
        theirs = average_precision_score(answers.labels[:, label].numpy(), answers.logits[:, label].numpy())
        assert ours[label].item() == pytest.approx(theirs, abs=1e-12)
    those = multilabel_average_precision(answers.probabilities[:, :4], answers.labels[:, :4].long(), 4, average=None)
    assert torch.allclose(ours[:4].float(), those, atol=1e-6)


def test_scores_are_over_the_classes_that_there_are() -> None:
    answers = drawn()
    scores = answers.scores()
    labels, logits = answers.labels.numpy(), answers.logits.numpy()
    assert scores.map == pytest.approx(100 * average_precision_score(labels[:, :4], logits[:, :4], average="macro"))
    expected = F.binary_cross_entropy_with_logits(answers.logits, answers.labels.float()).item()
    assert (scores.loss, scores.count) == (pytest.approx(expected, rel=1e-6), 60)
    with pytest.raises(InvalidValueError, match="None of the 60 readable images to measure on has a label"):
        LabelAnswers(answers.images, torch.zeros_like(answers.labels), answers.logits).scores()


def test_answers_of_batches_come_together_in_order() -> None:
    whole = drawn()
    odd, even = (
        LabelAnswers.of(range(start, 60, 2), whole.labels[start::2].float(), whole.logits[start::2]) for start in (1, 0)
    )
    both = LabelAnswers.joined([odd, even], failures=3)
    assert torch.equal(both.images, whole.images)
    assert torch.equal(both.labels, whole.labels) and torch.equal(both.logits, whole.logits)
    assert both.scores().failures == 3
    with pytest.raises(InvalidValueError, match=r"no readable image to measure on \(4 could not be read\)"):
        LabelAnswers.joined([], failures=4)


def test_a_row_for_each_class(tmp_path: Path) -> None:
    answers = drawn()
    write_label_rows(tmp_path / "rows.csv", answers, NAMES)
    with (tmp_path / "rows.csv").open() as file:
        written = list(csv.DictReader(file))
    rows = label_rows(answers, NAMES)
    assert [row["class"] for row in written] == list(NAMES)
    assert {name: "" if value is None else str(value) for name, value in rows[4].items()} == written[4]
    assert (rows[4]["images"], rows[4]["ap"], rows[4]["recall"], rows[4]["precision"]) == (0, None, None, 0.0)
    for label in range(4):
        truth, given = answers.labels[:, label].numpy(), answers.probabilities[:, label].numpy() >= 0.5
        assert rows[label]["images"] == truth.sum()
        assert rows[label]["precision"] == round(100 * precision_score(truth, given), 3)
        assert rows[label]["recall"] == round(100 * recall_score(truth, given), 3)


def test_a_row_for_each_image_and_the_most_confident_mistakes(tmp_path: Path) -> None:
    pixels = [Image.fromarray(np.full((8, 8), 50 * number, np.uint8)) for number in range(4)]
    images = ImageSet(pixels, None, ("cat", "dog"), label_sets=[(0,), (0, 1), (), (1,)])
    labels = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]])
    logits = torch.tensor([[4.0, -4.0], [-5.0, 0.0], [2.0, -1.0], [-3.0, 3.0]])
    answers = LabelAnswers.of(range(4), labels, logits)
    write_label_answers(tmp_path / "answers.csv", answers, images)
    with (tmp_path / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["labels"], row["answers"]) for row in rows] == [
        ("digits:0", "cat", "cat"),
        ("digits:1", "cat;dog", "dog"),
        ("digits:2", "", "cat"),
        ("digits:3", "dog", "dog"),
    ]
    assert [float(row["p(cat)"]) for row in rows] == pytest.approx(logits[:, 0].sigmoid().tolist(), abs=1e-6)
    assert answers.mistakes(9) == [1, 2]
    missed, false = (answers.captions(place, images.names) for place in (1, 2))
    assert missed == ("cat, dog", "not cat", pytest.approx(1 - torch.tensor(-5.0).sigmoid().item()))
    assert false == ("none of the labels", "cat", pytest.approx(torch.tensor(2.0).sigmoid().item()))
    assert draw_mistakes(answers, images).height > draw_mistakes(answers, images, most=0).height


def several_labels_model(tmp_path: Path) -> tuple[str, Beit]:
    """A model of four labels whose logits differ from image to image."""
    torch.manual_seed(0)
    model = beitzoo.create_model("test_beit", num_classes=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    labels = ("blue", "green", "pink", "red")
    model.pretrained = PretrainedConfig(head=Classify(num_classes=4, labels=labels, activation="sigmoid"))
    beitzoo.save_pretrained(model, tmp_path / "model")
    return f"local-dir:{tmp_path / 'model'}", model


def test_evaluate_measures_several_labels(tmp_path: Path) -> None:
    """In one look and averaged over two; outputs that the data does not have are passed over."""
    path = write_mixtures(tmp_path / "data", rounds=2)
    name, model = several_labels_model(tmp_path)
    images = load_data(str(path))
    evaluation = evaluate(Subject(model, name), images, "mine")
    readable = range(1, 16)
    outputs = [0, 1, 3]
    transform = beitzoo.create_transform(**beitzoo.resolve_data_config(model))
    pixels = torch.stack([transform(open_image(images.images[index])) for index in readable])
    with torch.inference_mode():
        probabilities = [model(view).sigmoid()[:, outputs] for view in (pixels, pixels.flip(-1))]
    truth = np.array([[label in images.classes_of(index) for label in range(3)] for index in readable])
    for row, found in (
        (evaluation.row, probabilities[0]),
        (evaluate(Subject(model, name), images, "mine", Judging(Looks(flip=True))).row, sum(probabilities) / 2),
    ):
        assert row["map"] == pytest.approx(
            100 * average_precision_score(truth, found.numpy(), average="macro"), abs=0.01
        )
        assert (row["count"], row["failures"], row["top1"], row["ece"]) == (15, 1, None, None)
    assert evaluation.answers == []
    assert evaluation.notes == [
        f"{name} tells 4 classes apart, the data has 3 of them; only their outputs are measured."
    ]


def test_evaluate_refuses_what_does_not_fit_several_labels(tmp_path: Path) -> None:
    path = write_mixtures(tmp_path / "data", rounds=1)
    name, model = several_labels_model(tmp_path)
    one = beitzoo.create_model("test_beit", num_classes=3)
    one.pretrained = PretrainedConfig(head=Classify(num_classes=3, labels=("blue", "green", "red")))
    with pytest.raises(
        InvalidValueError, match=r"test_beit tells one class of each image \(softmax\), and the images may have"
    ):
        evaluate(Subject(one, "test_beit"), load_data(str(path)), "mine")
    (tmp_path / "data" / "other.csv").write_text("path,labels\n1.png,blue;beige\n2.png,\n")
    with pytest.raises(InvalidValueError, match=r"was not trained on 1 of the 2 classes of the data \(beige\)"):
        evaluate(Subject(model, name), load_data(str(tmp_path / "data" / "other.csv")), "mine")
