"""Probes against scikit-learn, and what training notices of them: nothing."""

import copy
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import beitzoo
from beitzoo.errors import InvalidValueError
from beitzoo.evaluation import probe
from beitzoo.evaluation.joint_probe import JointTraining, joint_answers
from beitzoo.evaluation.probe import (
    knn_answers,
    knn_probe,
    linear_answers,
    linear_probe,
    probe_backbone,
    ridge_answers,
)
from beitzoo.images.datasets import digits
from beitzoo.images.splits import Split
from beitzoo.inference.embed import Array


@pytest.fixture(scope="module")
def pixels() -> tuple[Array, Array, Array, Array]:
    """Digits as features: few enough labels that not all answers are right."""
    data = load_digits()
    features = data.data.astype(np.float32)
    return features[:200], data.target[:200], features[200:900], data.target[200:900]


def test_the_linear_probe_is_logistic_regression_at_its_minimum(pixels: tuple[Array, ...]) -> None:
    """Against scikit-learn's Newton solver in double precision, on features standardised by hand."""
    train, labels, test, test_labels = pixels
    mean, deviation = train.astype(float).mean(0), train.astype(float).std(0)
    scaled = [(x - mean) / np.where(deviation > 0, deviation, 1) for x in (train, test)]
    reference = LogisticRegression(C=1.0, solver="newton-cg", tol=1e-10).fit(scaled[0], labels)
    expected = reference.predict(scaled[1])
    assert (linear_answers(train, labels, test) == expected).mean() > 0.998
    assert linear_probe(train, labels, test, test_labels) == pytest.approx(
        100 * (expected == test_labels).mean(), abs=0.2
    )
    shifted = linear_answers(train * 1000 + 7, labels, test * 1000 + 7)
    assert (shifted == expected).mean() > 0.998


def test_the_closed_form_probe_is_least_squares_with_the_penalty_that_predicts_images_left_out_best(
    pixels: tuple[Array, ...],
) -> None:
    """Against NumPy's least squares, fitted anew without each image for each penalty."""
    train, labels, test = pixels[0][:40], pixels[1][:40], pixels[2]
    train, test = train[:, 20:40], test[:, 20:40]
    mean, deviation = train.astype(float).mean(0), train.astype(float).std(0)
    x, asked = ((features - mean) / np.where(deviation > 0, deviation, 1) for features in (train, test))
    y = np.where(labels[:, None] == np.arange(10), 1.0, -1.0)

    def fit(x: Array, y: Array, penalty: float) -> tuple[Array, Array]:
        middle, level = x.mean(0), y.mean(0)
        rows = np.vstack([x - middle, np.sqrt(penalty) * np.eye(x.shape[1])])
        targets = np.vstack([y - level, np.zeros((x.shape[1], y.shape[1]))])
        weights = np.linalg.lstsq(rows, targets, rcond=None)[0]
        return weights, level - middle @ weights

    def error(penalty: float) -> float:
        found = 0.0
        for left_out in range(len(x)):
            others = np.arange(len(x)) != left_out
            weights, offset = fit(x[others], y[others], penalty)
            found += np.square(x[left_out] @ weights + offset - y[left_out]).sum()
        return found

    penalties = [len(x) * 10.0**power for power in range(-5, 2)]
    best = min(penalties, key=error)
    assert best not in (penalties[0], penalties[-1])
    weights, offset = fit(x, y, best)
    expected = (asked @ weights + offset).argmax(1)
    assert (ridge_answers(train, labels, test) == expected).mean() > 0.998
    assert 0.3 < (expected == pixels[3]).mean() < 0.95


def test_classifiers_trained_together_are_those_trained_alone(pixels: tuple[Array, ...]) -> None:
    """Against a plain loop over one linear at a time; and the settings are the original's."""
    train, labels, test, test_labels = pixels
    blocks = [(train / 16, test / 16), (np.sqrt(train), np.sqrt(test))]
    training = JointTraining(epochs=10, batch_size=64, lr=0.02)
    state = torch.get_rng_state()
    with torch.inference_mode():
        answers = joint_answers([known for known, _ in blocks], labels, [asked for _, asked in blocks], training)
    assert torch.equal(state, torch.get_rng_state())
    start = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0)) * 0.01
    for (known, asked), weight, given in zip(blocks, start, answers, strict=True):
        linear = torch.nn.Linear(64, 10)
        with torch.no_grad():
            linear.weight.copy_(weight.T)
            linear.bias.zero_()
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.02, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for epoch in range(10):
            for places in training.order(epoch, len(known)):
                loss = torch.nn.functional.cross_entropy(
                    linear(torch.from_numpy(known)[places]), torch.from_numpy(labels)[places]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
        expected = linear(torch.from_numpy(asked)).argmax(1).numpy()
        assert (given == expected).mean() > 0.995
        assert 60 < 100 * (given == test_labels).mean() < 97
    assert JointTraining() == JointTraining(epochs=100, batch_size=256, lr=1e-3, weight_decay=1e-4)
    orders = [torch.cat(list(training.order(epoch, 200))).tolist() for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(200))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("neighbours", [1, 20, 500])
def test_the_knn_probe_is_scikit_learns_with_dinos_weights(
    neighbours: int, pixels: tuple[Array, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels, test, test_labels = pixels
    monkeypatch.setattr(probe, "_CHUNK", 9 * len(train))  # 700 images do not fill the last part of nine
    reference = KNeighborsClassifier(
        min(neighbours, len(train)), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.astype(float), labels)
    expected = reference.predict(test.astype(float))
    answers = knn_answers(train, labels, test, neighbours)
    assert (answers == expected).all()
    right = 100 * (expected == test_labels).mean()
    assert knn_probe(train, labels, test, test_labels, neighbours) == pytest.approx(right)
    assert 70 < right < 97


def test_what_cannot_be_probed_is_said(pixels: tuple[Array, ...]) -> None:
    train, labels, test, test_labels = pixels
    with pytest.raises(InvalidValueError, match="no readable image to fit a probe on"):
        linear_probe(train[:0], labels[:0], test, test_labels)
    for measure in (linear_probe, knn_probe):
        with pytest.raises(InvalidValueError, match="no readable image to measure a probe on"):
            measure(train, labels, test[:0], test_labels[:0])
    with pytest.raises(InvalidValueError, match="are of one class"):
        linear_probe(train, np.zeros_like(labels), test, test_labels)


def test_a_probed_network_goes_on_as_if_nobody_had_looked() -> None:
    """Two updates with stochastic depth, bit for bit the same with a probe between them and without."""

    def train(probed: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        trained, values = copy.deepcopy(model), {}
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for _ in range(2):
            if probed:
                values = probe_backbone(trained.backbone, images, split)
            trained(torch.rand(4, *shape)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(())])
        return {**trained.state_dict(), "drawn": drawn}, values

    model = beitzoo.create_model("beit_nano_patch4_32.digits", pretrained=True, drop_path_rate=0.3)
    shape = (model.config.in_chans, *model.config.img_size)
    images, split = digits(), Split(list(range(60)), [], list(range(60, 120)))
    (with_probe, values), (without, _) = train(True), train(False)
    assert with_probe.keys() == without.keys()
    assert all(torch.equal(with_probe[name], without[name]) for name in without)
    assert values.keys() == {"probe_linear", "probe_knn"}
    assert values["probe_linear"] > 90
    assert values["probe_knn"] > 80
