"""Probes: how well simple classifiers tell classes apart by the frozen features of a network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch.nn import functional as F

from beitzoo.errors import UnsupportedError, check
from beitzoo.evaluation.features import POOLINGS, Array, Pooling, extract_features
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.inference.pipeline import Loading
from beitzoo.models.beit import Beit

Probe = Literal["linear", "knn"]
PROBES: tuple[Probe, ...] = get_args(Probe)

# kNN as in DINO (https://arxiv.org/abs/2104.14294, `eval_knn.py`): a neighbour counts exp(cosine / 0.07).
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Where L-BFGS stops. On 20,000 correlated features 3 of 10,000 answers are then not those of the minimum; at
# scikit-learn's own 1e-4 there are 41. It takes some tens to some hundreds of updates.
_TOLERANCE, _MOST_UPDATES = 1e-5, 5000
_NONE_TO_MEASURE = "There is no readable image to measure a probe on; check the data and its split."
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
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "The linear probe needs scikit-learn; install it with: pip install 'beitzoo[train]'"
        ) from error
    _check(train, test)
    check(len(np.unique(labels)) > 1, "All images to fit a probe on are of one class; give it images of two or more.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(tol=_TOLERANCE, max_iter=_MOST_UPDATES))
    answers: Array = probe.fit(train.astype(float), labels).predict(test)
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


def _check(train: Array, test: Array) -> None:
    check(len(train) > 0, "There is no readable image to fit a probe on; check the data and its split.")
    check(len(test) > 0, _NONE_TO_MEASURE)


@dataclass(frozen=True)
class Finding:
    """What one probe found of one feature.

    Attributes:
        block: Whose output it is, counted from 0.
        pooling: How its tokens became one feature.
        probe: Which probe.
        top1: Per cent of the test images whose class is right.
        val_top1: The same of validation images, by which a block may be chosen; None without any.
    """

    block: int
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
        poolings: Which features of each.
        neighbours: Of the kNN probe.
        loading: Batch size and threads.
    """

    blocks: Sequence[int] | None = None
    poolings: tuple[Pooling, ...] = POOLINGS
    neighbours: int = NEIGHBOURS
    loading: Loading = field(default_factory=Loading)


def probe_blocks(model: Beit, images: ImageSet, split: Split, probing: Probing | None = None) -> Findings:
    """Probe each block of a network.

    Args:
        model: The network, or the backbone of a masked image model; its training mode is kept.
        images: A set with classes.
        split: Its `train` part fits the probes, its `test` part measures them, and so does its `val` part by itself.
        probing: What is probed, and how.

    Raises:
        InvalidValueError: The images have no classes, a part has no readable image, or there is no such block.
    """
    check(images.labels is not None, "The images have no classes, which a probe tells apart; give labelled ones.")
    probing = probing or Probing()
    labels = np.asarray(images.labels)
    train = extract_features(model, images, split.train, probing.blocks, probing.loading)
    other = extract_features(model, images, [*split.val, *split.test], probing.blocks, probing.loading)
    is_val = np.isin(other.indices, split.val)
    known, right = labels[train.indices], labels[other.indices]
    found = []
    for block in train.blocks:
        for pooling in probing.poolings:
            features = train.of(block, pooling), known, other.of(block, pooling)
            for probe in PROBES:
                answers = linear_answers(*features) if probe == "linear" else knn_answers(*features, probing.neighbours)
                val = accuracy(answers[is_val], right[is_val]) if is_val.any() else None
                found.append(Finding(block, pooling, probe, accuracy(answers[~is_val], right[~is_val]), val))
    counts = {"train": len(known), "val": int(is_val.sum()), "test": int((~is_val).sum())}
    return Findings(found, counts, [*train.failures, *other.failures])


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
    return {f"probe_{probe}": findings.best(probe).top1 for probe in PROBES}
