"""From the data section of a recipe to batches: which images, in which order, how they are augmented.

Order and augmentation are pure functions of the seed, the epoch and the image. So neither the number of workers or
processes nor a restart changes them, and an update needs nothing but its number.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from beitzoo.errors import InvalidValueError, check
from beitzoo.images.datasets import find_images
from beitzoo.images.files import as_image
from beitzoo.images.image_set import ImageSet, with_held_out
from beitzoo.images.loading import Sample, Unreadable, load_each
from beitzoo.images.splits import Split, choose_per_class, draw_split
from beitzoo.images.transforms import Transform, create_transform, prepare, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.training.balance import balanced_order
from beitzoo.training.generators import derive_seed, generators_kept, seed_generators
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import RecipeError
from beitzoo.training.sections import AffineAugment, CropAugment, DataSection, TrainSection

_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (B, C, H, W) with targets, see `targets_of`; and which could not be read, with the reason. B may be 0.

    What is drawn for all of a batch together is a pure function of `seed`.
    """

    images: Tensor
    labels: Tensor
    unreadable: Unreadable
    seed: int = 0


def load_images(data: DataSection) -> ImageSet:
    """Find the images of a recipe; those of `test_path` become the part `test` of the set.

    Raises:
        RecipeError: The recipe does not say where they are, or has images both to train on and to hold out.
    """
    if data.source == "digits":
        if data.path is not None or data.test_path is not None:
            raise RecipeError("The digits are in no place; leave out data.path and data.test_path, or set data.source.")
        return find_images(data.source)
    if data.source == "annotations" or data.source == "pairs":
        raise RecipeError(f"data.source is {data.source!r}, images with masks, for segmentation models only.")
    if data.path is None:
        raise RecipeError(f"data.source is {data.source!r}, but data.path is missing; say where the images are.")
    images = find_images(data.source, data.path)
    if data.test_path is None:
        return images
    try:
        return with_held_out(images, find_images(data.source, data.test_path))
    except InvalidValueError as error:
        raise RecipeError(f"data.test_path does not fit data.path: {error}") from error


def split_images(images: ImageSet, data: DataSection, test_fraction: float, val_fraction: float) -> Split:
    """Make the split of a recipe: parts that the images come in are kept, and the others drawn.

    Where there are own parts, only `train` is trained on, `test` is held out, and `validation` chooses; without a
    `test`, `validation` is what is held out.

    Args:
        images: As `load_images` returns them.
        data: Its fractions and its seed.
        test_fraction: Where the recipe gives none.
        val_fraction: Where the recipe gives none.

    Raises:
        RecipeError: It gives a fraction of a part that is there.
        InvalidValueError: A class has too few images.
    """
    own = {name: list(part) for name, part in images.parts.items()}
    train = own.pop("train", None)
    test = own.pop("test", None) or own.pop("validation", None)
    val = own.pop("validation", None)
    for name, part, fraction in (("test", test, data.test_fraction), ("val", val, data.val_fraction)):
        if part is not None and fraction:
            raise RecipeError(
                f"data.{name}_fraction is {fraction}, but the images come in parts of which one is for that already "
                f"({', '.join(images.parts)}); leave it out, or give data.path the files of one part."
            )
    drawn = draw_split(
        images,
        0 if val is not None else val_fraction if data.val_fraction is None else data.val_fraction,
        0 if test is not None else test_fraction if data.test_fraction is None else data.test_fraction,
        data.split_seed,
        train,
    )
    few, seed = data.train_per_class, data.split_seed if data.label_seed is None else data.label_seed
    chosen = choose_per_class(images, drawn.train, few, seed) if few else drawn.train
    return Split(chosen, drawn.val if val is None else val, drawn.test if test is None else test)


@dataclass(frozen=True)
class Order:
    """Which images a process sees in which update.

    Attributes:
        indices: The training images.
        train: Epochs, batch size, accumulation and seed.
        processes: Those that share the images of an update.
        balanced: Classes of these images, if an epoch is to have as many of each.
    """

    indices: Sequence[int]
    train: TrainSection
    processes: Processes
    balanced: Sequence[int] | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch; images that do not fill one are left out, unless there is no other."""
        return max(len(self.indices) // self.train.batch_size, 1)

    def parts(self, update: int) -> Iterator[list[Sample]]:
        """Yield this process's part of each update from one on, in `accumulation` pieces."""
        order = torch.empty(0, dtype=torch.int64)
        size, pieces = self.train.batch_size, self.processes.count * self.train.accumulation
        for number in range(update, self.train.count_updates(self.updates_per_epoch)):
            epoch, place = divmod(number, self.updates_per_epoch)
            if not len(order) or not place:
                order = self._shuffled(epoch)
            batch = order[place * size : (place + 1) * size]
            for piece in self._pieces:
                share = batch[len(batch) * piece // pieces : len(batch) * (piece + 1) // pieces]
                yield [Sample(epoch, self.indices[index]) for index in share.tolist()]

    def seeds(self, update: int) -> Iterator[int]:
        """Yield a seed for each of these pieces, without an end; it is the same whichever process has the piece."""
        for number in count(update):
            for piece in self._pieces:
                yield derive_seed(self.train.seed, "piece", number, piece)

    @property
    def _pieces(self) -> range:
        """Return which pieces of an update are this process's, of those of all."""
        first = self.processes.rank * self.train.accumulation
        return range(first, first + self.train.accumulation)

    def _shuffled(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.train.seed, "order", epoch))
        if self.balanced is not None:
            return balanced_order(torch.tensor(self.balanced), generator)
        return torch.randperm(len(self.indices), generator=generator)


def targets_of(images: ImageSet, indices: Sequence[int]) -> Tensor:
    """Return the class of images, (N,) int64; of such that may have several, 1 for each, (N, classes) float32."""
    if images.labels is not None:
        return torch.tensor([images.labels[index] for index in indices], dtype=torch.int64)
    targets = torch.zeros(len(indices), len(images.names))
    for row, index in zip(targets, indices, strict=True):
        row[list(images.classes_of(index))] = 1
    return targets


class LoadedImages:
    """The images of a set, opened and transformed, a batch at a time."""

    def __init__(self, images: ImageSet, transform: Transform, shape: tuple[int, int, int], seed: int) -> None:
        self.images = images
        self.transform = transform
        self.shape = shape
        self.seed = seed

    def __getitems__(self, samples: list[Sample]) -> Batch:
        with generators_kept():
            loaded, unreadable = load_each(self.images, samples, self._load)
        images = [image for _, image in loaded]
        stacked = torch.stack(images) if images else torch.empty(0, *self.shape)
        return Batch(stacked, targets_of(self.images, [sample.image for sample, _ in loaded]), unreadable)

    def _load(self, sample: Sample) -> Tensor:
        image = as_image(self.images.images[sample.image], self.shape[0])
        if sample.epoch is not None:
            seed_generators(derive_seed(self.seed, "image", sample.epoch, sample.image))
        return prepare(image, self.transform)


def check_any_read(items: float, images: int) -> None:
    """Refuse a measurement of images none of which could be read.

    Args:
        items: How many items were measured.
        images: How many images they should have been of.

    Raises:
        InvalidValueError: None could be.
    """
    check(items > 0, f"None of {images:,} images to measure the model on could be read; replace them.")


class UnreadableImages:
    """The images of a run that could not be read so far, with the reasons; each is named once.

    Args:
        processes: Those that train together; each notes what it meets.
    """

    def __init__(self, processes: Processes) -> None:
        self.found: dict[str, str] = {}
        self._processes = processes
        self._reported: set[str] = set()

    def add(self, unreadable: Unreadable) -> None:
        """Note those of a batch."""
        self.found.update(unreadable)

    def report(self) -> None:
        """Name those that are new, of all processes; all of them call this."""
        for found in self._processes.gather(self.found):
            self.found |= found
        for path in sorted(self.found.keys() - self._reported):
            if self._processes.is_main:
                _logger.warning("Left out %s: %s.", path, self.found[path])
        self._reported |= self.found.keys()


def training_transform(model: Beit, augment: AffineAugment | CropAugment) -> Transform:
    """Build the augmentation of a recipe, ending in the model's own size and normalisation.

    Raises:
        RecipeError: timm does not know the policy.
    """
    config = resolve_data_config(model)
    if isinstance(augment, CropAugment):
        options = augment.model_dump(exclude={"kind"})
        options["auto_augment"] = augment.auto_augment or None
        try:
            return create_transform(is_training=True, **{**config, **options})
        except Exception as error:  # timm asserts, or stumbles over what is not there
            raise RecipeError(
                f"task.augment.auto_augment={augment.auto_augment!r} is no policy of timm ({error}); write one such as "
                "rand-m9-mstd0.5-inc1, or leave it empty."
            ) from error
    affine = v2.RandomAffine(
        degrees=augment.rotate,
        translate=(augment.translate, augment.translate),
        scale=(1 - augment.scale, 1 + augment.scale),
        shear=(-augment.shear, augment.shear, -augment.shear, augment.shear),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    evaluation: Any = create_transform(**config)
    resize, *crop_and_normalise = evaluation.transforms
    return v2.Compose([resize, affine, *crop_and_normalise])
