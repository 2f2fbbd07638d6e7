"""What the outputs of a head are called."""

import csv
import importlib.util
from functools import cache
from pathlib import Path

from beitzoo.zoo.config import PretrainedConfig

_SYNSETS = {"imagenet-1k": "imagenet_synsets.txt", "imagenet-22k": "imagenet22k_synsets.txt"}


def label_names(pretrained: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the class names of a checkpoint's head, in the order of its outputs; None if nobody named them."""
    labels = pretrained.labels
    if labels is None or not isinstance(labels, str):
        return labels
    return tuple("0123456789") if labels == "digits" else _imagenet(_SYNSETS[labels])


@cache
def _imagenet(synsets: str) -> tuple[str, ...]:
    # timm ships the lists; finding its folder does not import it, which would cost seconds.
    spec = importlib.util.find_spec("timm")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "data" / "_info"
    with (folder / "imagenet_synset_to_lemma.txt").open(encoding="utf-8", newline="") as file:
        lemmas = dict(csv.reader(file, delimiter="\t"))
    return tuple(lemmas[synset] for synset in (folder / synsets).read_text("utf-8").split())
