"""What the outputs of a head are called."""

import csv
import importlib.util
from functools import cache
from pathlib import Path

from beitzoo.zoo.config import PretrainedConfig

_SYNSETS = {"imagenet-1k": "imagenet_synsets.txt", "imagenet-22k": "imagenet22k_synsets.txt"}


def accepts(pretrained: PretrainedConfig, names: tuple[str, ...]) -> bool:
    """Tell whether classes of these names, in this order, are those of a checkpoint's head.

    ImageNet's may go by their names or by their synsets (n01440764), as its folders do. A head that nobody named
    takes any.
    """
    own = label_names(pretrained)
    if own is None or own == names:
        return True
    return any(names == _synsets(file) and own == _imagenet(file) for file in _SYNSETS.values())


def label_names(pretrained: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the class names of a checkpoint's head, in the order of its outputs; None if nobody named them."""
    labels = pretrained.labels
    if labels is None or not isinstance(labels, str):
        return labels
    return tuple("0123456789") if labels == "digits" else _imagenet(_SYNSETS[labels])


@cache
def _imagenet(file: str) -> tuple[str, ...]:
    with (_metadata() / "imagenet_synset_to_lemma.txt").open(encoding="utf-8", newline="") as lines:
        lemmas = dict(csv.reader(lines, delimiter="\t"))
    return tuple(lemmas[synset] for synset in _synsets(file))


@cache
def _synsets(file: str) -> tuple[str, ...]:
    return tuple((_metadata() / file).read_text(encoding="utf-8").split())


def _metadata() -> Path:
    # timm ships the lists; finding its folder does not import it, which would cost seconds.
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data" / "_info"
