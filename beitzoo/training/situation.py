"""What the rules that choose a recipe look at: a model, some images and the machine."""

import os
from dataclasses import dataclass
from typing import Literal

from beitzoo.images.files import ImageError, as_image
from beitzoo.images.image_set import ImageSet
from beitzoo.training.memory import free_memory
from beitzoo.training.processes import Processes
from beitzoo.zoo.checkpoints import Mim
from beitzoo.zoo.networks import BeitConfig
from beitzoo.zoo.registry import Entry

# What training starts from: weights that learned labels, weights of masked image modelling, or random ones.
Start = Literal["labels", "masked", "random"]

# Share that is held out, and share of the others that chooses the best model.
_HELD_OUT = 0.2
_LOOKED_AT = 16
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Situation:
    """What the rules look at.

    Attributes:
        config: The network.
        start: What its weights learned before.
        images: How many there are; where they come in parts, to train on.
        classes: How many they are of.
        in_parts: Whether the data set comes in parts, so that nothing is held out by drawing.
        in_colour: Whether its images have colours.
        memory: Bytes that activations may take; None if that is not known.
        several_labels: Whether an image may have several labels.
        adapters: Whether adapters are trained instead of the whole network.
        workers: Processes that can load images beside the one that trains; none where it needs all cores itself.
    """

    config: BeitConfig
    start: Start
    images: int
    classes: int
    in_parts: bool
    in_colour: bool
    memory: int | None
    several_labels: bool = False
    adapters: bool = False
    workers: int = 0

    @property
    def fractions(self) -> tuple[float, float]:
        """Share of images to hold out, and share of the others that chooses: an image of each class at least."""
        least = 1 if self.several_labels else self.classes
        test = max(_HELD_OUT, least / self.images)
        val = max(_HELD_OUT, least / (self.images - round(test * self.images)))
        return round(test, 4), round(val, 4)

    @property
    def to_train(self) -> int:
        """How many images are trained on, after those that are drawn."""
        if self.in_parts:
            return self.images
        test, val = self.fractions
        return max(round(self.images * (1 - test) * (1 - val)), 1)


def find_situation(entry: Entry, images: ImageSet, processes: Processes) -> Situation:
    """Look at a model, at images with classes, and at the machine."""
    head = None if entry.pretrained is None else entry.pretrained.head
    memory = free_memory(processes.device)
    cores = (os.cpu_count() or 1) // processes.count
    return Situation(
        config=entry.config,
        start="random" if head is None else "masked" if isinstance(head, Mim) else "labels",
        images=len(images.parts.get("train", images.images)),
        classes=len(images.names),
        in_parts=bool(images.parts),
        in_colour=_in_colour(images),
        several_labels=images.label_sets is not None,
        memory=None if memory is None else memory // 2,
        workers=0 if processes.device.type == "cpu" else min(cores, _MOST_WORKERS),
    )


def _in_colour(images: ImageSet) -> bool:
    """Tell whether any of some images, evenly drawn, has a pixel that is not grey."""
    step = max(len(images.images) // _LOOKED_AT, 1)
    for index in range(0, len(images.images), step):
        try:
            channels = as_image(images.images[index], 3).split()
        except ImageError:
            continue
        if len({channel.tobytes() for channel in channels}) > 1:
            return True
    return False
