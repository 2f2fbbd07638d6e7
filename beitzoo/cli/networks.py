"""From the options --model, --checkpoint and --device to networks with weights."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beitzoo.errors import InvalidValueError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from beitzoo.inference.fastest import Network
    from beitzoo.models.beit import Beit
    from beitzoo.models.segmentation import Segmenter


def load_networks(names: Sequence[str], checkpoint: Path | None, device: "torch.device") -> dict[str, "Beit"]:
    """Create each named model, or the one whose weights are in a file; by name, in order, each once.

    Raises:
        InvalidValueError: There are several models for one file.
    """
    if len(names) > 1 and checkpoint is not None:
        raise InvalidValueError(
            f"--checkpoint is one file, and {len(names)} models are named ({', '.join(names)}); name the one that the "
            "file is of."
        )
    # A file alone says itself what network it is of, by what is beside it.
    wanted = list(dict.fromkeys(names)) or [str(checkpoint)]
    return _for_images({name: _create(name, checkpoint if names else None, device) for name in wanted})


def load_segmenter(name: str | None, checkpoint: Path | None, device: "torch.device") -> tuple[str, "Segmenter"]:
    """Create the segmentation model of that name, or the one whose weights are in a file; return its name too.

    Raises:
        InvalidValueError: Neither is given, or it is no segmentation model.
    """
    from beitzoo.factory import look_up
    from beitzoo.models.segmentation import Segmenter
    from beitzoo.zoo.checkpoints import Segment

    if name is None and checkpoint is None:
        raise InvalidValueError(f"No model is named. {_HOW_TO_SEGMENT}")
    wanted = str(checkpoint) if name is None else name
    # An architecture alone stands for its first checkpoint, but may also be that of a file.
    pretrained = look_up(wanted, head=None if checkpoint is None else Segment).pretrained
    if pretrained is not None and not isinstance(pretrained.head, Segment):  # known before anything is downloaded
        raise InvalidValueError(_names_no_pixels(wanted))
    model: object = _create(wanted, None if name is None else checkpoint, device)
    if not isinstance(model, Segmenter):
        raise InvalidValueError(_names_no_pixels(wanted))
    return wanted, model


def load_backbone(name: str, checkpoint: Path | None, device: "torch.device") -> "Beit":
    """Create a model of any kind and return its network: of a masked image or segmentation model, its backbone."""
    from beitzoo.inference.embed import backbone_of

    return backbone_of(_create(name, checkpoint, device))


def fastest(networks: "Iterable[Network]", count: int, batch_size: int, optimized: bool) -> "list[Network]":
    """Return what computes so many images fastest in the place of each network, and say so on stderr.

    It is the network itself where --no-optimize was given. The networks are not to be used again.
    """
    from beitzoo.inference.fastest import COPY, OPTIMIZED, computed_by, for_many_images

    if not optimized:
        return list(networks)
    chosen = [for_many_images(network, count, batch_size, inplace=True) for network in networks]
    if any(computed_by(network) == COPY for network in chosen):
        print(OPTIMIZED, file=sys.stderr)
    return chosen


def names_with_weights(given: Sequence[str], list_file: Path | None) -> list[str]:
    """Return the models that are named, by globs and in a file too, each once and in order.

    A glob stands for all checkpoints of classifiers that match it; where there is none, for those of segmentation
    models.

    Raises:
        InvalidValueError: None is named.
        UnknownModelError: A glob matches nothing.
    """
    from beitzoo.measure.names import names_for, words_asked_for

    words = words_asked_for(given, list_file)
    if not words:
        raise InvalidValueError("No model is named; give names, globs such as 'beit_*_224', or --model-list FILE.")
    return list(dict.fromkeys(name for word in words for name in _of_one_kind(word, names_for(word, pretrained=True))))


def _of_one_kind(word: str, names: list[str]) -> list[str]:
    from beitzoo.zoo.checkpoints import Classify, Segment
    from beitzoo.zoo.registry import find

    if names == [word]:
        return names
    heads = {name: row.head for name in names if (row := find(name).pretrained)}
    classifiers = [name for name, head in heads.items() if isinstance(head, Classify) and head.num_classes]
    segmenters = [name for name, head in heads.items() if isinstance(head, Segment)]
    if not classifiers + segmenters:
        raise InvalidValueError(f"{word} stands for {', '.join(names)}, none of which tells classes apart.")
    return classifiers or segmenters


_HOW_TO_SEGMENT = (
    "Name a segmentation model with --model: one of `beitzoo list '*ade20k*' --pretrained`, or the folder of your own, "
    'which `beitzoo finetune` trains from any BEiT by a recipe with task.kind = "segment".'
)


def _names_no_pixels(name: str) -> str:
    return f"{name} is no segmentation model: it tells nothing of single pixels. {_HOW_TO_SEGMENT}"


def _create(name: str, checkpoint: Path | None, device: "torch.device") -> Any:
    from beitzoo.factory import create_model

    if checkpoint is None:
        return create_model(name, pretrained=True, device=device)
    return create_model(name, checkpoint_path=checkpoint, device=device)


def _for_images(networks: dict[str, "Beit"]) -> dict[str, "Beit"]:
    """Refuse segmentation models: what is asked here is said of whole images."""
    from beitzoo.models.segmentation import Segmenter

    found: dict[str, object] = {**networks}
    for name, network in found.items():
        if isinstance(network, Segmenter):
            raise UnsupportedError(
                f"{name} is a segmentation model, and this command is for whole images. Name a classifier (`beitzoo "
                "list --pretrained`), label pixels with `beitzoo segment`, or use its backbone in Python: "
                "create_model(..., num_classes=0)."
            )
    return networks
