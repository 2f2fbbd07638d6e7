"""What the outputs of a head are called."""

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from beitzoo.zoo.checkpoints import Head, Mim

_SYNSETS = {"imagenet-1k": "imagenet_synsets.txt", "imagenet-22k": "imagenet22k_synsets.txt"}
# Test sets of 200 of the classes of ImageNet-1k.
_SUBSETS = {"ImageNet-A": "imagenet_a_synsets.txt", "ImageNet-R": "imagenet_r_synsets.txt"}


def accepts(head: Head, names: tuple[str, ...]) -> bool:
    """Tell whether classes of these names, in this order, are those of a head.

    ImageNet's may go by their names or by their synsets (n01440764), as its folders do, and ADE20K's as elsewhere; see
    `is_ade20k`. A head that nobody named takes any.
    """
    own = label_names(head)
    if own is None or own == names or (is_ade20k(own) and is_ade20k(names)):
        return True
    return any(names == _synsets(file) and own == _imagenet(file) for file in _SYNSETS.values())


def outputs_of(head: Head, names: tuple[str, ...]) -> tuple[int | None, ...]:
    """Return for each class the output of a head that stands for it, by its name or, in ImageNet, by its synset.

    None stands where the head has no such class, or two of that name. A head that nobody named has them in the order
    of its outputs. Classes of ImageNet-1k may also go by the numbers of its outputs, as the folders of ImageNet-V2 do.
    """
    own = label_names(head)
    if own is None or accepts(head, names):
        return tuple(range(len(names)))
    synsets = next((_synsets(file) for file in _SYNSETS.values() if own == _imagenet(file)), ())
    outputs = {synset: index for index, synset in enumerate(synsets)}
    outputs |= {name: index for index, name in enumerate(own) if own.count(name) == 1}
    if own == _imagenet(_SYNSETS["imagenet-1k"]) and all(name.isdecimal() and int(name) < len(own) for name in names):
        return tuple(map(int, names))
    return tuple(outputs.get(name) for name in names)


def label_names(head: Head) -> tuple[str, ...] | None:
    """Return the class names of a head, in the order of its outputs; None if nobody named them."""
    labels = None if isinstance(head, Mim) else head.labels
    if labels is None or not isinstance(labels, str):
        return labels
    if labels == "ade20k":
        return tuple(name for name, _ in ade20k_classes())
    return tuple("0123456789") if labels == "digits" else _imagenet(_SYNSETS[labels])


def imagenet_1k_synsets() -> tuple[str, ...]:
    """Return the 1,000 synsets of ImageNet-1k in the order of its outputs."""
    return _synsets(_SYNSETS["imagenet-1k"])


def imagenet_subset(names: Sequence[str]) -> str | None:
    """Tell whether classes are, by their synsets, the 200 of ImageNet-A or of ImageNet-R: of which; else None."""
    return next((name for name, file in _SUBSETS.items() if set(names) == set(_synsets(file))), None)


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """Return the reassessed labels (ReaL, https://arxiv.org/abs/2006.07159) of ImageNet's 50,000 validation images.

    Of each image, in the order of the numbers in their names, all outputs of ImageNet-1k that are right; of some none.
    """
    return tuple(map(tuple, json.loads((_metadata() / "imagenet_real_labels.json").read_text(encoding="utf-8"))))


@cache
def ade20k_classes() -> tuple[tuple[str, tuple[int, int, int]], ...]:
    """Return the 150 classes of ADE20K's scene parsing benchmark, with the colours of its published palette.

    Names, order and colours are mmsegmentation's (`mmseg/datasets/ade.py`). The names are also those of
    huggingface/label-files (`ade20k-id2label.json`), and each is a name that the benchmark's own table has for that
    class (`objectInfo150.txt`). Road and skyscraper share a colour there.
    """
    with Path(__file__).with_name("ade20k.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return tuple((row["name"], (int(row["red"]), int(row["green"]), int(row["blue"]))) for row in rows)


def is_ade20k(names: Sequence[str]) -> bool:
    """Tell whether names are those of ADE20K, in its order; elsewhere a bed is a "bed ", with a space behind it."""
    return [name.strip() for name in names] == [name for name, _ in ade20k_classes()]


def is_misnumbered_22k(names: Mapping[str, str]) -> bool:
    """Tell whether names by output are those of ImageNet-22k in the numbering of a longer list.

    The 21,841 outputs of a released head are in the order of `imagenet22k_synsets.txt`. Google's list of 21,843 has
    two more: n03931044 at 9205 and n09859684 at 15027. transformers' converter removes these two from the dict and
    leaves all later ones their old numbers; where the longer list was merely cut, they are as wrong.
    """
    longer = {str(index) for index in range(21_843)}
    if names.keys() == longer - {"9205", "15027"}:
        return True
    cut = names.keys() == longer - {"21841", "21842"}
    return cut and _first_name(names["9205"]) == "picture" and _first_name(names["9206"]) == "picture frame"


def _first_name(names: str) -> str:
    return names.partition(",")[0].strip().replace("_", " ").lower()


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
