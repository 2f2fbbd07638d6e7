"""Probes: how well simple classifiers tell classes apart by the frozen features of a network."""

import numpy as np
import torch
from torch.nn import functional as F

from beitzoo.errors import UnsupportedError, check
from beitzoo.evaluation.features import Array, extract_features
from beitzoo.images.datasets import ImageSet
from beitzoo.images.splits import Split
from beitzoo.inference.pipeline import Loading
from beitzoo.models.beit import Beit

# kNN as in DINO (https://arxiv.org/abs/2104.14294, `eval_knn.py`): a neighbour counts exp(cosine / 0.07).
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Where L-BFGS stops. On 20,000 correlated features 3 of 10,000 answers are then not those of the minimum; at
# scikit-learn's own 1e-4 there are 41. It takes some tens to some hundreds of updates.
_TOLERANCE, _MOST_UPDATES = 1e-5, 5000
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
    """Return the share of answers that are right, in per cent."""
    return 100 * float(np.mean(answers == labels))


def _check(train: Array, test: Array) -> None:
    for name, features in (("fit a probe on", train), ("measure a probe on", test)):
        check(len(features) > 0, f"There is no readable image to {name}; check the data and its split.")


def probe_backbone(
    model: Beit, images: ImageSet, split: Split, neighbours: int = NEIGHBOURS, loading: Loading | None = None
) -> dict[str, float]:
    """Probe a network while it is trained: the accuracy of its best block by each probe, in per cent.

    Features are the mean of the patch tokens, since pretraining gives the class token no task of its own (BEiT v2
    apart). Which block is best changes, and the last one is bent on predicting visual tokens. The best of several on
    the same images is a little too good: a curve to follow, and no result; `beitzoo probe` chooses by other images.

    The model's training mode is kept and no random number is drawn, so training goes on as if nobody had looked.

    Args:
        model: The network, or the backbone of a masked image model.
        images: The labelled set.
        split: Its `train` part fits the probes, its `test` part measures them.
        neighbours: Of the kNN probe.
        loading: Batch size and threads.

    Returns:
        `probe_linear` and `probe_knn`.
    """
    labels = np.asarray(images.labels)
    train = extract_features(model, images, split.train, loading=loading)
    test = extract_features(model, images, split.test, loading=loading)
    best = {"probe_linear": 0.0, "probe_knn": 0.0}
    for block in train.blocks:
        known, unknown = train.of(block, "mean"), test.of(block, "mean")
        given = (known, labels[train.indices], unknown, labels[test.indices])
        best["probe_linear"] = max(best["probe_linear"], linear_probe(*given))
        best["probe_knn"] = max(best["probe_knn"], knn_probe(*given, neighbours=neighbours))
    return best
