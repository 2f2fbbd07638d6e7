"""Probes: how well simple classifiers tell classes apart by the frozen features of a network."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn import functional as F

from beitzoo.errors import UnsupportedError, check
from beitzoo.evaluation.features import POOLINGS, Features, extract_features
from beitzoo.evaluation.joint_probe import joint_answers
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.inference.embed import Array, Pooling
from beitzoo.inference.pipeline import Loading
from beitzoo.models.beit import Beit

# Logistic regression at its minimum (L-BFGS), ridge regression (closed form), the original's linear probe, neighbours.
Probe = Literal["linear", "ridge", "joint", "knn"]
PROBES: tuple[Probe, ...] = get_args(Probe)
# What is probed with if nobody says: they have nothing to choose but the neighbours, and take no long time.
USUAL_PROBES: tuple[Probe, ...] = ("linear", "knn")

# kNN as in DINO (https://arxiv.org/abs/2104.14294, `eval_knn.py`): a neighbour counts exp(cosine / 0.07).
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Where L-BFGS stops. On 20,000 correlated features 3 of 10,000 answers are then not those of the minimum; at
# scikit-learn's own 1e-4 there are 41. It takes some tens to some hundreds of updates.
_TOLERANCE, _MOST_UPDATES = 1e-5, 5000
_NONE_TO_MEASURE = "There is no readable image to measure a probe on; check the data and its split."
# What the ridge probe may choose: the penalty for each image, in the units of the standardised features.
_PENALTIES = np.logspace(-5, 1, 7)
# Cosines that are in memory at a time: 64 MB.
_CHUNK = 2**24


def linear_probe(train: Array, train_labels: Array, test: Array, test_labels: Array) -> float:
    """Return the accuracy of multinomial logistic regression on standardised features, in per cent.

    Args:
        train: Features (images, C) that it is fitted on.
        train_labels: Their classes.
        test: Features (images, C) that it is measured on.
        test_labels: Their classes.

    Raises:
        InvalidValueError: There is no image, or one class only.
    """
    return accuracy(linear_answers(train, train_labels, test), test_labels)


def knn_probe(
    train: Array, train_labels: Array, test: Array, test_labels: Array, neighbours: int = NEIGHBOURS
) -> float:
    """Return the accuracy of DINO's weighted nearest neighbours, in per cent; see `knn_answers`.

    Args:
        train: Features (images, C) among which neighbours are looked for.
        train_labels: Their classes.
        test: Features (images, C) that it is measured on.
        test_labels: Their classes.
        neighbours: How many count.

    Raises:
        InvalidValueError: There is no image.
    """
    return accuracy(knn_answers(train, train_labels, test, neighbours), test_labels)


def linear_answers(train: Array, labels: Array, test: Array) -> Array:
    """Fit multinomial logistic regression to features (images, C) and return the class of each of others.

    Each channel is brought to mean 0 and deviation 1 over the training features. The loss is the sum of the
    cross-entropies plus half the squared norm of the weights (scikit-learn's `C=1`), taken to its minimum by L-BFGS:
    no learning rate, no epochs, nothing drawn.
    """
    _check(train, test, labels)
    from sklearn.linear_model import LogisticRegression

    return _standardised_answers(LogisticRegression(tol=_TOLERANCE, max_iter=_MOST_UPDATES), train, labels, test)


def ridge_answers(train: Array, labels: Array, test: Array) -> Array:
    """Fit ridge regression of the classes (1 and -1) in closed form and return the class of each of other features.

    Features are standardised as for `linear_answers`. The penalty is the one of seven, 1e-5 to 10 times the number of
    images, that predicts best each training image from all others, which the closed form gives as well.
    """
    _check(train, test, labels)
    from sklearn.linear_model import RidgeClassifierCV

    return _standardised_answers(RidgeClassifierCV(alphas=len(train) * _PENALTIES), train, labels, test)


def _standardised_answers(probe: Any, train: Array, labels: Array, test: Array) -> Array:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    answers: Array = make_pipeline(StandardScaler(), probe).fit(train.astype(float), labels).predict(test)
    return answers


def knn_answers(train: Array, labels: Array, test: Array, neighbours: int = NEIGHBOURS) -> Array:
    """Return the class of each test feature (images, C) by its nearest training features (images, C) by cosine.

    Each of the `neighbours` nearest, or of all if there are fewer, adds exp(cosine / 0.07) to its class.
    """
    _check(train, test)
    known, classes = F.normalize(torch.from_numpy(train)), torch.from_numpy(labels)
    num_classes = int(classes.max()) + 1
    answers = []
    for part in F.normalize(torch.from_numpy(test)).split(max(_CHUNK // len(known), 1)):
        nearest = (part @ known.T).topk(min(neighbours, len(known)))
        # Less the largest exponent: no weight leaves the range of floats, and their ratios stay.
        weights = ((nearest.values - nearest.values[:, :1]) / TEMPERATURE).exp()
        votes = torch.zeros(len(part), num_classes).scatter_add_(1, classes[nearest.indices], weights)
        answers.append(votes.argmax(1))
    return torch.cat(answers).numpy()


def accuracy(answers: Array, labels: Array) -> float:
    """Return the share of answers that are right, in per cent.

    Raises:
        InvalidValueError: There is none.
    """
    check(len(labels) > 0, _NONE_TO_MEASURE)
    return 100 * float(np.mean(answers == labels))


def _check(train: Array, test: Array, labels: Array | None = None) -> None:
    """Refuse features that no probe can be fitted to or measured on; with labels, those that need scikit-learn."""
    check(len(train) > 0, "There is no readable image to fit a probe on; check the data and its split.")
    check(len(test) > 0, _NONE_TO_MEASURE)
    if labels is None:
        return
    check(len(np.unique(labels)) > 1, "All images to fit a probe on are of one class; give it images of two or more.")
    if importlib.util.find_spec("sklearn") is None:
        raise UnsupportedError("The linear probe needs scikit-learn; install it with: pip install 'beitzoo[train]'")


@dataclass(frozen=True)
class Finding:
    """What one probe found of one feature.

    Attributes:
        block: Whose output it is, counted from 0; None is the network.
        pooling: How its tokens became one feature.
        probe: Which probe.
        top1: Per cent of the test images whose class is right.
        val_top1: The same of validation images, by which a block may be chosen; None without any.
    """

    block: int | None
    pooling: Pooling
    probe: Probe
    top1: float
    val_top1: float | None


@dataclass(frozen=True)
class Findings:
    """What all probes found of a network.

    Attributes:
        found: In order of blocks, poolings and probes.
        counts: Readable images of each part of the split.
        failures: Images that were left out, with the reason.
    """

    found: list[Finding]
    counts: dict[str, int]
    failures: list[tuple[str, str]]

    def best(self, probe: Probe) -> Finding:
        """Return the finding of a probe on the block and pooling that validation images, or else test images, choose.

        Of equally good ones it is the first. What test images choose is a little too good.
        """
        return max(
            (one for one in self.found if one.probe == probe),
            key=lambda one: one.top1 if one.val_top1 is None else one.val_top1,
        )


@dataclass(frozen=True)
class Probing:
    """How a network is probed.

    Attributes:
        blocks: Which blocks, counted from 0, negative from the end; all if None.
        poolings: Which features of each. If None, mean and class token, and for the joint probe, as in the original,
            both together; of features in a file that are neither, those.
        neighbours: Of the kNN probe.
        loading: Batch size and threads.
        probes: Which probes.
    """

    blocks: Sequence[int] | None = None
    poolings: tuple[Pooling, ...] | None = None
    neighbours: int = NEIGHBOURS
    loading: Loading = field(default_factory=Loading)
    probes: tuple[Probe, ...] = USUAL_PROBES

    def pairs(self, there: Sequence[Pooling]) -> list[tuple[Pooling, Probe]]:
        """Return each pooling with the probes of it, where `there` are such features."""
        if self.poolings is not None or "both" not in there:
            return [(pooling, probe) for pooling in self.poolings or there for probe in self.probes]
        alone = [(pooling, probe) for pooling in POOLINGS for probe in self.probes if probe != "joint"]
        return [*alone, *((pooling, probe) for pooling in ("both",) for probe in self.probes if probe == "joint")]


def probe_blocks(model: Beit, images: ImageSet, split: Split, probing: Probing | None = None) -> Findings:
    """Probe each block of a network.

    Args:
        model: The network, or the backbone of a masked image model; its training mode is kept.
        images: A set with classes.
        split: Its `train` part fits the probes, its `test` part measures them, and so does its `val` part by itself.
        probing: What is probed, and how.

    Raises:
        InvalidValueError: Images have no class or several, a part has no readable image, or there is no such block.
    """
    labels = images.one_label_each("a probe")
    probing = probing or Probing()
    used = [*split.train, *split.val, *split.test]
    features = extract_features(model, images, used, probing.blocks, probing.loading)
    return probe_features(features, np.asarray(labels), split, probing)


def probe_features(features: Features, labels: Array, split: Split, probing: Probing) -> Findings:
    """Probe features that are there already.

    Args:
        features: Of all blocks that are probed.
        labels: Class of each image of the set.
        split: As of `probe_blocks`.
        probing: What is probed, and how; blocks and loading are those of the features.

    Raises:
        InvalidValueError: A part has no readable image, or there are no features of such a pooling.
    """
    train, other = features.part(split.train), features.part([*split.val, *split.test])
    is_val = np.isin(other.indices, split.val)
    known, right = labels[train.indices], labels[other.indices]
    pairs = probing.pairs(features.poolings)
    answers = {pair: _answers(*pair, train, known, other, probing.neighbours) for pair in pairs}
    found = []
    for place, block in enumerate(features.blocks):
        for pooling, probe in pairs:
            given = answers[pooling, probe][place]
            val = accuracy(given[is_val], right[is_val]) if is_val.any() else None
            found.append(Finding(block, pooling, probe, accuracy(given[~is_val], right[~is_val]), val))
    counts = {"train": len(known), "val": int(is_val.sum()), "test": int((~is_val).sum())}
    return Findings(found, counts, features.failures)


def _answers(
    pooling: Pooling, probe: Probe, train: Features, labels: Array, other: Features, neighbours: int
) -> Sequence[Array]:
    """Return the answers of one probe for each block."""
    pairs = [(train.of(block, pooling), other.of(block, pooling)) for block in train.blocks]
    match probe:
        case "joint":
            for known, asked in pairs:
                _check(known, asked)
            return joint_answers([known for known, _ in pairs], labels, [asked for _, asked in pairs])
        case "linear":
            return [linear_answers(known, labels, asked) for known, asked in pairs]
        case "ridge":
            return [ridge_answers(known, labels, asked) for known, asked in pairs]
        case "knn":
            return [knn_answers(known, labels, asked, neighbours) for known, asked in pairs]


def probe_backbone(
    model: Beit, images: ImageSet, split: Split, neighbours: int = NEIGHBOURS, loading: Loading | None = None
) -> dict[str, float]:
    """Probe a network while it is trained: the accuracy of its best block by each probe, in per cent.

    Features are the mean of the patch tokens, since pretraining gives the class token no task of its own (BEiT v2
    apart). The best block is not the last, which is bent on predicting visual tokens, and it changes while training
    goes on; see `Findings.best`.

    The model's training mode is kept and no random number is drawn, so training goes on as if nobody had looked.

    Args:
        model: The network, or the backbone of a masked image model.
        images: The labelled set.
        split: Its `train` part fits the probes, its `test` part measures them; `val`, if there is any, chooses
            the block.
        neighbours: Of the kNN probe.
        loading: Batch size and threads.

    Returns:
        `probe_linear` and `probe_knn`.
    """
    probing = Probing(None, ("mean",), neighbours, loading or Loading())
    findings = probe_blocks(model, images, split, probing)
    return {f"probe_{probe}": findings.best(probe).top1 for probe in USUAL_PROBES}
