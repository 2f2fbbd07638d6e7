"""Which outputs of a classifier are right for an image, and which compete: classes by name, synset, number; ReaL."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from beitzoo.errors import InvalidValueError, check, some_of
from beitzoo.evaluation.subjects import check_unnamed
from beitzoo.files import full_path, read_text
from beitzoo.images.image_set import ImageSet, digest_of
from beitzoo.inference.classify import tells_several
from beitzoo.models.beit import Beit
from beitzoo.zoo.labels import imagenet_1k_synsets, imagenet_subset, outputs_of, real_labels

# Which outputs compete: all of the model, or those of the classes that the data has. `auto` is all, but of the data's
# classes where these are the 200 of ImageNet-A or -R, as the published figures on them are.
Outputs = Literal["auto", "all", "data"]
# The labels that timm ships.
SHIPPED = "timm"

_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Labelling:
    """What counts as right.

    Attributes:
        outputs: Which outputs compete.
        real_labels: Count an image as right by the reassessed labels of ImageNet's validation images (ReaL), not by
            its class: `timm` for the list that timm ships, or a file of that form, `real.json`.
    """

    outputs: Outputs = "auto"
    real_labels: str | None = None

    def __post_init__(self) -> None:
        check(
            self.outputs in get_args(Outputs), f"outputs is {self.outputs!r}; it can be {', '.join(get_args(Outputs))}."
        )

    def competing(self, images: ImageSet) -> Literal["all", "data"]:
        """Say which outputs compete on this data."""
        if self.outputs != "auto":
            return self.outputs
        return "data" if self.real_labels is None and imagenet_subset(images.names) else "all"

    def version(self, images: ImageSet, indices: Sequence[int]) -> str:
        """Return the first digits of a sha256 that is another where there are other images or labels."""
        own = images.version_of(indices)
        return own if self.real_labels in (None, SHIPPED) else digest_of([own, read_text(full_path(self.real_labels))])


@dataclass(frozen=True)
class Truth:
    """What a model is measured by.

    Attributes:
        right: For each index of an image that is measured, the model's outputs that are right: one, several of which
            one suffices, or, of images with several labels or none, all that are to be found.
        competing: The outputs that compete, in order; None if all do.
        notes: What a reader of the row must know.
        all_labels: Whether all right outputs of an image are to be found.
    """

    right: dict[int, tuple[int, ...]]
    competing: tuple[int, ...] | None
    notes: list[str]
    all_labels: bool = False


def truth_of(model: Beit, name: str, images: ImageSet, indices: Sequence[int], labelling: Labelling) -> Truth:
    """Say which outputs of a model are right for the images of these indices, and which compete.

    Raises:
        InvalidValueError: The data has classes that the model has not, or several labels of an image and the model one.
    """
    is_real = labelling.real_labels is not None
    classes = imagenet_1k_synsets() if is_real else images.names
    outputs = _outputs(model, name, classes)
    if is_real:
        real = real_labels_of(images, indices, labelling)
        right = {index: tuple(outputs[label] for label in labels) for index, labels in real.items()}
    else:
        check(
            images.label_sets is None or tells_several(model),
            f"{name} tells one class of each image (softmax), and the images may have several labels each. Evaluate a "
            "model of several labels (finetune with task.labels = 'many'), or give images with one class each.",
        )
        right = {index: tuple(outputs[label] for label in images.classes_of(index)) for index in indices}
    several = images.label_sets is not None and not is_real
    notes = []
    if left_out := len(indices) - len(right):
        notes.append(f"{left_out:,} of {len(indices):,} images have no ReaL label, and do not count.")
    competing = None
    if len(outputs) < model.num_classes:
        if several or labelling.competing(images) == "data":
            competing = tuple(sorted(set(outputs)))
        which, verb = imagenet_subset(images.names), "are measured" if several else "compete"
        notes.append(
            f"{name} tells {model.num_classes:,} classes apart, the data has {len(outputs):,} of them"
            + (f", those of {which}; " if which else "; ")
            + ("all its outputs compete, as in timm." if competing is None else f"only their outputs {verb}.")
        )
    return Truth(right, competing, notes, several)


def real_labels_of(images: ImageSet, indices: Sequence[int], labelling: Labelling) -> dict[int, tuple[int, ...]]:
    """Return the ReaL labels of images, by the numbers in their names; those that have none are left out.

    Raises:
        InvalidValueError: An image is not named like ImageNet's validation images, or has a number beyond the list.
    """
    labels = _read_real_labels(labelling.real_labels or SHIPPED)
    found = {}
    for index in indices:
        name = images.identity(index)[0]
        number = _VALIDATION_IMAGE.search(name)
        place = int(number[1]) - 1 if number else -1
        check(
            0 <= place < len(labels),
            f"{name} is none of the {len(labels):,} validation images that ReaL labels are of, such as "
            "ILSVRC2012_val_00000001.JPEG. Leave --real-labels out, or give images under these names.",
        )
        found[index] = labels[place]
    return {index: own for index, own in found.items() if own}


def _read_real_labels(source: str) -> Sequence[tuple[int, ...]]:
    if source == SHIPPED:
        return real_labels()
    path, classes = full_path(source), len(imagenet_1k_synsets())
    try:
        labels = [tuple(map(int, own)) for own in json.loads(read_text(path))]
        if not all(0 <= label < classes for own in labels for label in own):
            raise ValueError("a label is out of range")
    except (ValueError, TypeError) as error:
        raise InvalidValueError(
            f"{path} has no ReaL labels ({error}); it must be a JSON list with, for each validation image, the list of "
            f"its labels, 0 to {classes - 1}. Give real.json of google-research/reassessed-imagenet, or {SHIPPED!r}."
        ) from error
    return labels


def _outputs(model: Beit, name: str, classes: tuple[str, ...]) -> list[int]:
    """Find the output of the model that stands for each class of the data."""
    own = model.class_names
    if own is None:
        check_unnamed(name, model.num_classes, classes)
    outputs = outputs_of(model.pretrained.head, classes)
    unknown = [name for name, output in zip(classes, outputs, strict=True) if output is None]
    check(
        not unknown,
        f"{name} was not trained on {len(unknown)} of the {len(classes)} classes of the data "
        f"({some_of(unknown)}), but on {model.num_classes} ({some_of(own or ())}). Name the class folders after the "
        "model's classes, or evaluate a model that was trained on these.",
    )
    return [output for output in outputs if output is not None]
