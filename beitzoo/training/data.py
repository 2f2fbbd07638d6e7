"""From the data section of a recipe to batches: which images, in which order, how they are augmented.

Order and augmentation are pure functions of the seed, the epoch and the image. So neither the number of workers or
processes nor a restart changes them, and an update needs nothing but its number.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from beitzoo.images.datasets import ImageSet, digits, labelled_folder
from beitzoo.images.files import ImageError, as_image
from beitzoo.images.splits import Split, draw_split
from beitzoo.images.transforms import Transform, create_transform, prepare, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.training.generators import derive_seed, generators_kept, seed_generators
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import RecipeError
from beitzoo.training.sections import AffineAugment, CropAugment, DataSection, TrainSection
from beitzoo.training.signals import ignore_signals

AnyBatch = TypeVar("AnyBatch")


class Sample(NamedTuple):
    """One look at an image; `epoch` is None where nothing is drawn."""

    epoch: int | None
    image: int


class Batch(NamedTuple):
    """Images (B, C, H, W) with labels (B,); and which could not be read, with the reason. B may be 0."""

    images: Tensor
    labels: Tensor
    unreadable: list[tuple[str, str]]


def load_images(data: DataSection) -> ImageSet:
    """Find the images of a recipe."""
    if data.source == "digits":
        return digits()
    if data.path is None:
        raise RecipeError("data.source is 'folder', but data.path is missing; name the folder of class folders.")
    return labelled_folder(data.path)


def split_images(images: ImageSet, data: DataSection, test_fraction: float, val_fraction: float) -> Split:
    """Draw the split of a recipe; the fractions hold where it gives none."""
    test = test_fraction if data.test_fraction is None else data.test_fraction
    val = val_fraction if data.val_fraction is None else data.val_fraction
    return draw_split(images, val, test, data.split_seed)


@dataclass(frozen=True)
class Order:
    """Which images a process sees in which update.

    Attributes:
        indices: The training images.
        train: Epochs, batch size, accumulation and seed.
        processes: Those that share the images of an update.
    """

    indices: Sequence[int]
    train: TrainSection
    processes: Processes

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch; images that do not fill one are left out, unless there is no other."""
        return max(len(self.indices) // self.train.batch_size, 1)

    def parts(self, update: int) -> Iterator[list[Sample]]:
        """Yield this process's part of each update from one on, in `accumulation` pieces."""
        order: list[int] = []
        size, pieces = self.train.batch_size, self.processes.count * self.train.accumulation
        first = self.processes.rank * self.train.accumulation
        for number in range(update, self.train.epochs * self.updates_per_epoch):
            epoch, place = divmod(number, self.updates_per_epoch)
            if not order or not place:
                order = self._shuffled(epoch)
            batch = order[place * size : (place + 1) * size]
            for piece in range(first, first + self.train.accumulation):
                share = batch[len(batch) * piece // pieces : len(batch) * (piece + 1) // pieces]
                yield [Sample(epoch, index) for index in share]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.train.seed, "order", epoch))
        return [self.indices[place] for place in torch.randperm(len(self.indices), generator=generator).tolist()]


class LoadedImages(Dataset[Batch]):
    """The images of a set, opened and transformed, a batch at a time."""

    def __init__(self, images: ImageSet, transform: Transform, shape: tuple[int, int, int], seed: int) -> None:
        self.images = images
        self.transform = transform
        self.shape = shape
        self.seed = seed

    def __getitems__(self, samples: list[Sample]) -> Batch:
        images, labels, unreadable = [], [], []
        with generators_kept():
            for sample in samples:
                try:
                    images.append(self._load(sample))
                    labels.append(self.images.labels[sample.image])
                except ImageError as error:
                    unreadable.append((self.images.identity(sample.image)[0], str(error)))
        stacked = torch.stack(images) if images else torch.empty(0, *self.shape)
        return Batch(stacked, torch.tensor(labels, dtype=torch.int64), unreadable)

    def _load(self, sample: Sample) -> Tensor:
        image = as_image(self.images.images[sample.image], self.shape[0])
        if sample.epoch is not None:
            seed_generators(derive_seed(self.seed, "image", sample.epoch, sample.image))
        return prepare(image, self.transform)


class _Parts:
    """What a loader asks for the samples of its batches, each time it is gone through."""

    def __init__(self, parts: Sequence[list[Sample]] | Iterator[list[Sample]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self._parts)


def load_batches(
    dataset: Dataset[AnyBatch], parts: Sequence[list[Sample]] | Iterator[list[Sample]], workers: int
) -> Iterable[AnyBatch]:
    """Load one batch after the other, ahead of their use where there are workers."""
    as_it_is: Any = _as_it_is  # PyTorch's annotation knows lists of samples only
    return DataLoader(
        dataset,
        batch_sampler=_Parts(parts),
        collate_fn=as_it_is,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else starting to load would draw from the generator of stochastic depth
    )


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


def _as_it_is(batch: AnyBatch) -> AnyBatch:
    return batch
