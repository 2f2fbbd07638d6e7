"""Fine-tuning: training a classifier on labelled images, from a recipe to its measured accuracy."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.evaluation.metrics import Accuracy, AccuracySum
from beitzoo.factory import create_model
from beitzoo.files import full_path, write_text
from beitzoo.images.datasets import ImageSet
from beitzoo.images.splits import SPLIT_FILE, Split, draw_split, read_split, write_split
from beitzoo.images.transforms import create_transform, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.saving import save_pretrained
from beitzoo.training.data import Batch, LoadedImages, Order, Sample, load_batches, load_images, training_transform
from beitzoo.training.folder import BEST, METRICS, RECIPE, RunError, claimed
from beitzoo.training.generators import derive_seed, seed_generators
from beitzoo.training.loop import Run, fit
from beitzoo.training.optim import parameter_groups, spread_bias_tables
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError, dump_recipe
from beitzoo.training.state import TrainState, restore_state, saved_states, start_state
from beitzoo.training.task import Metrics
from beitzoo.zoo.checkpoints import Classify, Head, Labels
from beitzoo.zoo.labels import accepts

_logger = logging.getLogger(__name__)


def finetune(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Train a classifier and measure it once on the held-out images.

    A run that was interrupted goes on where its last state was saved, if the folder and the recipe are the same.

    Args:
        recipe: The run.
        directory: Receives `recipe.json`, `split.csv`, `log.csv`, `best/`, `last/` and, at the end, `metrics.json`.

    Returns:
        The content of `metrics.json`: `test_top1` and `test_top5` in per cent, of the best checkpoint. Empty on
        all processes but the first.

    Raises:
        RunError: The folder holds a finished run, or one of another recipe or other images.
        RecipeError: What the recipe asks for cannot be done. Nothing has been written then.
        Interrupted: A signal asked the run to stop; its state was saved.
        NonFiniteError: The loss is not finite any more.
    """
    directory = full_path(directory)
    processes = Processes.join()
    task, model = prepare(recipe, processes)
    with claimed(directory, recipe, processes):
        state = start_state(task, model, recipe.train, processes)
        goes_on = restore_state(state, directory, processes, recipe.train.seed)
        if goes_on and read_split(directory / SPLIT_FILE, task.images) != task.split:
            raise RunError(f"The images are not those of the run in {directory}; choose another folder with --out.")
        if processes.is_main:
            print("\n".join(task.describe(state)), file=sys.stderr)
            write_text(directory / RECIPE, dump_recipe(recipe))
            write_split(directory / SPLIT_FILE, task.images, task.split)
        fit(task, state, Run(directory, recipe.train, recipe.run, processes))
        metrics = _measure(task, state, directory)
        if not processes.is_main:
            return {}
        write_text(directory / METRICS, json.dumps(metrics, indent=2) + "\n")
        for folder in saved_states(directory):
            shutil.rmtree(folder)
        return metrics


def prepare(recipe: Recipe, processes: Processes) -> tuple["FinetuneTask", Beit]:
    """Make the task of a recipe and its model; all that can be known before a run is checked here.

    Raises:
        RecipeError: Says what cannot be done, and what to do.
    """
    train = recipe.train
    if train.batch_size % (processes.count * train.accumulation):
        raise RecipeError(
            f"{train.batch_size} images per update cannot be shared evenly by {processes.count} processes in "
            f"{train.accumulation} parts each; change train.batch_size, train.accumulation or the number of processes."
        )
    if train.precision == "bf16" and processes.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise RecipeError("This GPU has no bfloat16; set train.precision to fp16 or fp32.")
    images = load_images(recipe.data)
    if len(images.names) < 2:
        raise RecipeError(f"There is one class only, {images.names[0]}; a classifier needs at least two class folders.")
    odd = [name for name in images.names if not _is_text(name)]
    if odd:
        raise RecipeError(f"The name of the class folder {odd[0]!r} is not UTF-8, so no file could hold it; rename it.")
    split = draw_split(images, recipe.data.val_fraction, recipe.data.test_fraction, recipe.data.split_seed)
    seed_generators(derive_seed(train.seed, "weights"))
    model = _make_model(recipe, images.names)
    task = FinetuneTask(recipe, images, split, model, processes)
    task.check(model)
    return task, model


def _is_text(name: str) -> bool:
    return name == name.encode("utf-8", "replace").decode()


@dataclass
class FinetuneTask:
    """Cross-entropy on labelled images; the better of two models is the more accurate on the validation images.

    Attributes:
        recipe: The run.
        images: All images.
        split: Which are for what.
        model: Says how its images are prepared.
        processes: Those that train together.
        unreadable: Files that could not be read so far, with the reason.
    """

    recipe: Recipe
    images: ImageSet
    split: Split
    model: Beit
    processes: Processes
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log_names: tuple[str, ...] = ()
        # Of five classes, the right one is always among the five likeliest.
        top5 = ("val_top5",) * (len(self.images.names) > 5)
        self.metric_names: tuple[str, ...] = ("val_top1", *top5, "val_loss")
        self.order = Order(self.split.train, self.recipe.train, self.processes)
        self.updates_per_epoch = self.order.updates_per_epoch
        self._shape = (self.model.config.in_chans, *self.model.config.img_size)
        self._augment = training_transform(self.model, self.recipe.task.augment)
        self._prepare = create_transform(**resolve_data_config(self.model))
        self._reported: set[str] = set()

    def check(self, model: Beit) -> None:
        """Take one made-up image through augmentation and network, so that what cannot work fails before the run."""
        if self._shape[0] not in (1, 3):
            raise RecipeError(
                f"The network takes {self._shape[0]} channels, but images are read as grey (1) or colour (3); set "
                "model.overrides.in_chans."
            )
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

    def describe(self, state: TrainState) -> list[str]:
        """Say in lines what the run found and will do."""
        split, train = self.split, self.recipe.train
        epochs = f"{train.epochs} epochs of {self.updates_per_epoch} updates of {train.batch_size} images"
        start = f"Going on after update {state.update:,}." if state.update else "Starting."
        warning = "train.warmup_epochs is not shorter than the run: the learning rate never reaches train.lr."
        return [
            *([warning] if train.warmup_epochs >= train.epochs else []),
            *self.images.describe(),
            f"{len(split.train):,} images to train on, {len(split.val):,} to choose by, {len(split.test):,} held out.",
            f"{epochs}, in {train.precision} on {self.processes.count} x {self.processes.device.type}. {start}",
        ]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Group parameters by layer-wise learning rate and weight decay."""
        return parameter_groups(model, self.recipe.train)

    def batches(self, update: int) -> Iterator[Batch]:
        """Yield augmented images."""
        dataset = LoadedImages(self.images, self._augment, self._shape, self.recipe.train.seed)
        for batch in load_batches(dataset, self.order.parts(update), self.recipe.run.workers):
            self.unreadable.update(batch.unreadable)
            yield batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Return the mean cross-entropy of a batch, with smoothed labels."""
        images, labels = self._on_device(batch)
        logits = model(images)
        if not len(labels):
            return logits.float().sum(), 0, {}
        return (
            F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.task.label_smoothing),
            len(labels),
            {},
        )

    def validate(self, model: nn.Module) -> Metrics:
        """Measure top-1, top-5 and loss on the validation images."""
        accuracy = self.measure(model, self.split.val)
        self._report_unreadable()
        values = {name: getattr(accuracy, name.removeprefix("val_")) for name in self.metric_names}
        return {name: float(value) for name, value in values.items()}

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether more images are right; of equally accurate models the one with the lower loss is better."""
        return (metrics["val_top1"], -metrics["val_loss"]) > (best["val_top1"], -best["val_loss"])

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write a folder that `create_model('local-dir:...')` reads."""
        assert isinstance(model, Beit)
        save_pretrained(model, directory)

    def measure(self, model: nn.Module, indices: Sequence[int]) -> Accuracy:
        """Measure a model on some images; each process takes its share, and all get the same values."""
        sums = self._measure_share(model, indices[self.processes.rank :: self.processes.count])
        sums.sums = torch.stack(self.processes.gather(sums.sums)).sum(0)
        return sums.accuracy()

    @torch.inference_mode()
    def _measure_share(self, model: nn.Module, indices: Sequence[int]) -> AccuracySum:
        size = max(self.recipe.train.batch_size // self.processes.count, 1)
        parts = [[Sample(None, i) for i in indices[start : start + size]] for start in range(0, len(indices), size)]
        dataset = LoadedImages(self.images, self._prepare, self._shape, seed=0)
        sums = AccuracySum(len(self.images.names))
        for batch in load_batches(dataset, parts, self.recipe.run.workers):
            self.unreadable.update(batch.unreadable)
            sums.add_failures(len(batch.unreadable))
            if len(batch.labels):
                images, labels = self._on_device(batch)
                sums.add(model(images), labels)
        return sums

    def _report_unreadable(self) -> None:
        """Name the files that could not be read, each once in a run."""
        for found in self.processes.gather(self.unreadable):
            self.unreadable |= found
        for path in sorted(self.unreadable.keys() - self._reported):
            if self.processes.is_main:
                _logger.warning("Left out %s: %s.", path, self.unreadable[path])
        self._reported |= self.unreadable.keys()

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        return batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)


def _measure(task: FinetuneTask, state: TrainState, directory: Path) -> dict[str, Any]:
    """Measure the best checkpoint, read back from its folder, on the held-out images."""
    task.processes.wait()  # for the process that wrote it
    best = create_model(f"local-dir:{(directory / BEST).absolute()}", pretrained=True, device=task.processes.device)
    test = task.measure(best.eval(), task.split.test)
    return {
        **{f"test_{name}": value for name, value in asdict(test).items()},
        **(state.best or {}),
        "seed": task.recipe.train.seed,
        "split_seed": task.recipe.data.split_seed,
        "train_seconds": round(state.seconds, 3),
    }


def _make_model(recipe: Recipe, names: tuple[str, ...]) -> Beit:
    """Make the network to start from. Its head stays if it tells the same classes apart, else it is a fresh one."""
    section = recipe.model
    overrides: dict[str, Any] = {**section.overrides, "num_classes": len(names)}
    model = create_model(section.name, section.pretrained, checkpoint_path=section.checkpoint, **overrides)
    labels = _labels_of_same_classes(model.pretrained.head, names)
    if labels is None:
        model.reset_classifier(len(names))
    head = Classify(num_classes=len(names), labels=labels or names)
    model.pretrained = replace(model.pretrained, sources=(), tag=None, head=head)
    if recipe.task.bias_init_std:
        spread_bias_tables(model, recipe.task.bias_init_std)
    return model


def _labels_of_same_classes(head: Head, names: tuple[str, ...]) -> Labels | None:
    """Return the labels of a head that tells these classes apart; of one that nobody named that is not known."""
    if not isinstance(head, Classify) or head.activation != "softmax" or head.num_classes != len(names):
        return None
    return head.labels if accepts(head, names) else None
