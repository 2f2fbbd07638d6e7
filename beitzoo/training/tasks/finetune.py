"""Fine-tuning: training a classifier on labelled images, from a recipe to its measured accuracy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from beitzoo.errors import InvalidValueError
from beitzoo.factory import create_model
from beitzoo.images.image_set import ImageSet
from beitzoo.images.loading import Sample, load_batches
from beitzoo.images.splits import Split
from beitzoo.images.transforms import create_transform, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.saving import save_pretrained
from beitzoo.training.data import (
    Batch,
    LoadedImages,
    Order,
    UnreadableImages,
    load_images,
    split_images,
    training_transform,
)
from beitzoo.training.findings import describe_classes, look_at_images
from beitzoo.training.generators import derive_seed, seed_generators
from beitzoo.training.label_checks import check_labels, check_parts, describe_rare_labels
from beitzoo.training.lora import add_adapters, describe_adapters, merged
from beitzoo.training.mixing import make_mixup, mix
from beitzoo.training.objectives import Measurement, make_objective
from beitzoo.training.optim import freeze_up_to, parameter_groups, spread_bias_tables
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError
from beitzoo.training.report import write_findings
from beitzoo.training.run import run
from beitzoo.training.sections import Finetune
from beitzoo.training.task import Metrics
from beitzoo.zoo.checkpoints import Activation, Classify, Head, Labels
from beitzoo.zoo.labels import accepts


def finetune(recipe: Recipe, directory: Path, told: bool = False) -> dict[str, Any]:
    """Train a classifier and measure it once on the held-out images; see `run`.

    Args:
        recipe: The run.
        directory: Its folder.
        told: Whether `describe_images` has been printed; else the run does it.
    """
    return run(recipe, directory, partial(prepare, told=told))


def prepare(recipe: Recipe, processes: Processes, told: bool = False) -> tuple["FinetuneTask", Beit]:
    """Make the task of a recipe and its model; all that can be known before a run is checked here.

    Raises:
        RecipeError: Says what cannot be done, and what to do.
    """
    assert isinstance(recipe.task, Finetune)
    images = load_images(recipe.data)
    check_labels(images, recipe.task.labels)
    odd = [name for name in images.names if not _is_text(name)]
    if odd:
        raise RecipeError(f"The name of the class folder {odd[0]!r} is not UTF-8, so no file could hold it; rename it.")
    split = split_images(images, recipe.data, test_fraction=1 / 3, val_fraction=0.1)
    if not split.val or not split.test:
        raise RecipeError(
            f"There are {len(split.val)} images to choose the best model by and {len(split.test)} held out to measure "
            "it; raise data.val_fraction and data.test_fraction, or name held-out images with data.test_path."
        )
    if images.label_sets is not None:
        check_parts(images, split)
    seed_generators(derive_seed(recipe.train.seed, "weights"))
    model = _make_model(recipe, images.names)
    task = FinetuneTask(recipe, images, split, model, processes, told)
    task.check(model)
    return task, model


def _is_text(name: str) -> bool:
    return name == name.encode("utf-8", "replace").decode()


def describe_images(images: ImageSet, split: Split) -> list[str]:
    """Say in lines what was found, which images are for what, and which of these should not be."""
    return [
        *images.describe(),
        *describe_classes(images, split),
        f"{len(split.train):,} images to train on, {len(split.val):,} to choose by, {len(split.test):,} held out.",
        *describe_rare_labels(images, split),
        *look_at_images(images, split),
    ]


@dataclass
class FinetuneTask:
    """A loss on labelled images, and the better of two models by the validation images; see `training.objectives`.

    Attributes:
        recipe: The run.
        images: All images.
        split: Which are for what.
        model: Says how its images are prepared.
        processes: Those that train together.
        told: Whether people know what the images are.
    """

    recipe: Recipe
    images: ImageSet
    split: Split
    model: Beit
    processes: Processes
    told: bool = False

    def __post_init__(self) -> None:
        self.log_names: tuple[str, ...] = ()
        assert isinstance(self.recipe.task, Finetune)
        self.section = self.recipe.task
        self.objective = make_objective(self.section, self.images, self.split.train)
        self.metric_names: tuple[str, ...] = self.objective.metric_names
        labels = self.images.labels if self.section.balance == "sampling" else None
        balanced = None if labels is None else [labels[index] for index in self.split.train]
        self.order = Order(self.split.train, self.recipe.train, self.processes, balanced)
        self.updates_per_epoch = self.order.updates_per_epoch
        self._shape = (self.model.config.in_chans, *self.model.config.img_size)
        self._augment = training_transform(self.model, self.section.augment)
        self._prepare = create_transform(**resolve_data_config(self.model))
        self._unreadable = UnreadableImages(self.processes)
        self._mixup = make_mixup(self.section, len(self.images.names))

    def check(self, model: Beit) -> None:
        """Take one made-up image through augmentation and network, so that what cannot work fails before the run."""
        if self._shape[0] not in (1, 3):
            raise RecipeError(
                f"The network takes {self._shape[0]} channels, but images are read as grey (1) or colour (3); set "
                "model.overrides.in_chans."
            )
        if self._mixup is not None:
            self._check_pairs()
        image = Image.new("L" if self._shape[0] == 1 else "RGB", (64, 48), 128)
        try:
            shape = tuple(self._augment(image).shape)
        except Exception as error:  # libraries of augmentations raise what they please
            raise RecipeError(f"task.augment cannot be done on this network's images: {error}.") from error
        if shape != self._shape:
            raise RecipeError(f"task.augment makes images of {shape}, the network takes {self._shape}.")
        with torch.inference_mode():
            logits = model.eval()(torch.zeros(1, *self._shape))
        if logits.shape != (1, len(self.images.names)):
            raise RecipeError(
                f"The network gives an output of {tuple(logits.shape)} where one logit for each of "
                f"{len(self.images.names)} classes is needed; leave out model.overrides.global_pool."
            )

    def _check_pairs(self) -> None:
        train = self.recipe.train
        if train.batch_size == self.processes.count * train.accumulation:
            raise RecipeError(
                f"task.mixup and task.cutmix mix pairs of images, but {train.batch_size} per update in as many parts "
                "leave one to each; raise train.batch_size, or lower train.accumulation."
            )

    def describe(self) -> list[str]:
        """Say which images are for what, and what of the network is not trained."""
        images = [] if self.told else describe_images(self.images, self.split)
        return [*images, *self._describe_frozen()]

    def _describe_frozen(self) -> list[str]:
        section = self.section
        if section.lora is None and section.freeze_blocks is None:
            return []
        random = "Frozen weights start random and stay so; set model.pretrained=true, or name a model.checkpoint."
        decay = self.recipe.train.layer_decay
        adapters = [] if section.lora is None else describe_adapters(self.model, section.lora, decay)
        return [*adapters, *([random] * self.recipe.model.is_random)]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Group parameters by layer-wise learning rate and weight decay."""
        return parameter_groups(model, self.recipe.train)

    def batches(self, update: int) -> Iterator[Batch]:
        """Yield augmented images."""
        dataset = LoadedImages(self.images, self._augment, self._shape, self.recipe.train.seed)
        loaded = load_batches(dataset, self.order.parts(update), self.recipe.run.workers)
        for batch, seed in zip(loaded, self.order.seeds(update), strict=False):
            self._unreadable.add(batch.unreadable)
            yield batch._replace(seed=seed)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Return the mean loss of a batch: mixed, smoothed and weighted as the recipe says."""
        images, targets = self._on_device(batch)
        if self._mixup is not None:
            images, targets = mix(self._mixup, images, targets, batch.seed)
        logits = model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not len(images):
            return logits.sum(), 0, {}
        return self.objective.loss(logits, targets), len(images), {}

    def count_images(self, batch: Batch) -> int:
        """Tell how many images a batch has."""
        return len(batch.images)

    def validate(self, model: nn.Module) -> Metrics:
        """Measure the model on the validation images."""
        metrics = self.measure(model, self.split.val).metrics()
        self._unreadable.report()
        return {name: float(metrics[name.removeprefix("val_")]) for name in self.metric_names}

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether a model of these metrics is better than the best so far."""
        return self.objective.better(metrics, best)

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write a folder that `create_model('local-dir:...')` reads; adapters are merged into the weights."""
        assert isinstance(model, Beit)
        save_pretrained(merged(model) if self.section.lora else model, directory)

    def measure_best(self, directory: Path) -> Metrics:
        """Measure the best model on the held-out images."""
        best = create_model(f"local-dir:{directory.absolute()}", pretrained=True, device=self.processes.device)
        test = self.measure(best.eval(), self.split.test)
        metrics = test.metrics()
        self._answers = test.answers
        return {f"test_{name}": value for name, value in metrics.items()}

    def write_answers(self, directory: Path) -> None:
        """Write what the best model answered on the held-out images."""
        write_findings(directory, self._answers, self.images)

    def measure(self, model: nn.Module, indices: Sequence[int]) -> Measurement:
        """Measure a model on some images; each process takes its share, and all get the same measurement.

        Args:
            model: In evaluation mode.
            indices: Of the images.
        """
        mine = self._measure_share(model, indices[self.processes.rank :: self.processes.count])
        return mine.join(self.processes.gather(mine))

    @torch.inference_mode()
    def _measure_share(self, model: nn.Module, indices: Sequence[int]) -> Measurement:
        size = max(self.recipe.train.batch_size // self.processes.count, 1)
        parts = [[Sample(None, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
        dataset = LoadedImages(self.images, self._prepare, self._shape, seed=0)
        measurement = self.objective.measurement()
        for part, batch in zip(parts, load_batches(dataset, parts, self.recipe.run.workers), strict=True):
            self._unreadable.add(batch.unreadable)
            measurement.add_failures(len(batch.unreadable))
            if len(batch.labels):
                images, targets = self._on_device(batch)
                measurement.add(self._readable(part, batch), targets, model(images))
        return measurement

    def _readable(self, part: Sequence[Sample], batch: Batch) -> list[int]:
        """Return which images of a part are in the batch that was made of it."""
        lost = {name for name, _ in batch.unreadable}
        return [sample.image for sample in part if not lost or self.images.identity(sample.image)[0] not in lost]

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        return batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)


def _make_model(recipe: Recipe, names: tuple[str, ...]) -> Beit:
    """Make the network to start from. Its head stays if it tells the same classes apart, else it is a fresh one."""
    section = recipe.model
    overrides: dict[str, Any] = {**section.overrides, "num_classes": len(names)}
    model: object = create_model(section.name, section.pretrained, checkpoint_path=section.checkpoint, **overrides)
    if not isinstance(model, Beit):
        raise InvalidValueError(
            f"{section.name} is a segmentation model, and this task trains a classifier of images. Save its backbone, "
            "create_model(..., num_classes=0), with save_pretrained and name that folder."
        )
    task = recipe.task
    assert isinstance(task, Finetune)
    activation: Activation = "sigmoid" if task.labels == "many" else "softmax"
    labels = _labels_of_same_classes(model.pretrained.head, names, activation)
    if labels is None:
        model.reset_classifier(len(names))
    head = Classify(num_classes=len(names), labels=labels or names, activation=activation)
    data = model.pretrained.data
    data = data if task.crop_pct is None else replace(data, crop_pct=task.crop_pct)
    model.pretrained = replace(model.pretrained, sources=(), tag=None, head=head, data=data)
    if task.bias_init_std and section.is_random:
        spread_bias_tables(model, task.bias_init_std)
    _freeze(model, task)
    return model


def _freeze(model: Beit, task: Finetune) -> None:
    """Freeze what the recipe says, and add adapters to the other blocks if it wants them."""
    depth = model.config.depth
    blocks = depth if task.freeze_blocks == "all" else task.freeze_blocks
    if blocks is not None and blocks > depth:
        raise RecipeError(
            f"task.freeze_blocks is {blocks}, but the network has {depth} blocks; give at most {depth}, or 'all'."
        )
    if blocks is not None:
        freeze_up_to(model, blocks)
    if task.lora is not None:
        add_adapters(model, task.lora, blocks or 0)


def _labels_of_same_classes(head: Head, names: tuple[str, ...], activation: Activation) -> Labels | None:
    """Return the labels of a head that tells these classes apart; of one that nobody named that is not known."""
    if not isinstance(head, Classify) or head.activation != activation or head.num_classes != len(names):
        return None
    return head.labels if accepts(head, names) else None
