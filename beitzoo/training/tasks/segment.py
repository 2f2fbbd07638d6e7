"""Semantic segmentation: training a network that names the class of each pixel, from a recipe to its measured mIoU.

`semantic_segmentation/` of BEiT and BEiT v2, which trains by mmsegmentation.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.evaluation.confusion import ConfusionMatrix
from beitzoo.evaluation.segmentation import count_measured, measure_segmenter
from beitzoo.factory import create_model
from beitzoo.images.augment_pixels import PixelViews
from beitzoo.images.image_set import ImageSet
from beitzoo.images.label_maps import IGNORE
from beitzoo.images.loading import load_batches
from beitzoo.images.mask_check import MaskCheck, check_masks, sample_masks
from beitzoo.images.masked_sets import MaskedSet
from beitzoo.images.splits import Split
from beitzoo.inference.classify import NOT_FINITE
from beitzoo.inference.segment import SegmentOptions, segmentation
from beitzoo.models.segmentation import Segmenter
from beitzoo.saving import save_pretrained
from beitzoo.training.data import Order, UnreadableImages, split_images
from beitzoo.training.generators import derive_seed, seed_generators
from beitzoo.training.optim import parameter_groups, spread_bias_tables
from beitzoo.training.pixels import AugmentedPixels, PixelBatch, load_masked_images
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError
from beitzoo.training.run import run
from beitzoo.training.segment_sections import PixelInference, TrainSegmenter
from beitzoo.training.task import Metrics
from beitzoo.zoo.checkpoints import Segment
from beitzoo.zoo.labels import accepts

# Logged besides the sum of the losses where there is an auxiliary head.
_TWO_HEADS = ("decode_loss", "auxiliary_loss")
_SCORES = ("miou", "macc", "aacc")


def train_segmenter(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Train a segmentation model and measure it once on the held-out images; see `run`."""
    return run(recipe, directory, prepare)


def prepare(recipe: Recipe, processes: Processes) -> tuple["SegmentTask", Segmenter]:
    """Make the task of a recipe and its model; all that can be known before a run is checked here.

    Raises:
        RecipeError: Says what cannot be done, and what to do.
    """
    assert isinstance(recipe.task, TrainSegmenter)
    masked = load_masked_images(recipe.data, recipe.task.labels)
    names = masked.labels.names
    split = split_images(masked.images, recipe.data, test_fraction=0.0, val_fraction=0.0)
    sample = _check_parts(masked, split)
    seed_generators(derive_seed(recipe.train.seed, "weights"))
    model = _make_model(recipe, names)
    task = SegmentTask(recipe, masked, split, model, processes, tuple(sample.describe()))
    task.check(model)
    return task, model


def _check_parts(masked: MaskedSet, split: Split) -> MaskCheck:
    """Look at masks of each part, so that a run does not end at those it is measured by; return what is trained on."""
    training = check_masks(masked, split.train)
    for name, sample in {
        "train on": training,
        "choose by": sample_masks(masked, split.val),
        "hold out": sample_masks(masked, split.test),
    }.items():
        if sample.count and not any(sample.pixels):
            raise RecipeError(
                f"In {sample.count:,} masks of {masked.images.root} to {name} no pixel has a class, as in "
                f"{sample.empty[0]}; say in task.labels what their numbers or colours stand for."
            )
    return training


@dataclass
class SegmentTask:
    """Cross-entropy of the classes of pixels; the better of two models has the higher mIoU on the validation images.

    The items of a loss are pixels that have a class. However an update is shared out, each of them weighs the same.
    mmsegmentation divides the sum by all pixels, so that an image with few labelled pixels counts less there.
    Scores are per cent.

    Attributes:
        recipe: The run.
        masked: All images with their masks.
        split: Which are for what.
        model: Says how its images are prepared, and which heads it has.
        processes: Those that train together.
        found: What the masks hold, in lines.
    """

    recipe: Recipe
    masked: MaskedSet
    split: Split
    model: Segmenter
    processes: Processes
    found: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert isinstance(self.recipe.task, TrainSegmenter)
        self.section = self.recipe.task
        self.images: ImageSet = self.masked.images
        self.log_names: tuple[str, ...] = _TWO_HEADS if self.model.config.has_auxiliary else ()
        self.metric_names: tuple[str, ...] = tuple(f"val_{name}" for name in _SCORES) if self.split.val else ()
        self.order = Order(self.split.train, self.recipe.train, self.processes)
        self.updates_per_epoch = self.order.updates_per_epoch
        self.epoch_names: tuple[str, ...] = ("unreadable",)
        self._unreadable = UnreadableImages(self.processes)
        self.counts = {"unreadable": torch.zeros((), dtype=torch.int64, device=self.processes.device)}
        self.samples = AugmentedPixels(self.masked, _views(self.section, self.model), self.recipe.train.seed)

    def check(self, model: Segmenter) -> None:
        """Take one made-up image through augmentation and network, so that what cannot work fails before the run."""
        channels = model.backbone.config.in_chans
        if channels not in (1, 3):
            raise RecipeError(
                f"The network takes {channels} channels, but images are read as grey (1) or colour (3); set "
                "model.overrides.in_chans."
            )
        self._check_batch()
        image = Image.new("L" if channels == 1 else "RGB", (64, 48), 128)
        pixels, _ = self.samples.views.draw_and_apply(image, np.zeros((48, 64), np.uint8), random.Random(0))
        segmentation(model, _options(self.section.inference))
        with torch.inference_mode():
            model.eval()(pixels[None])

    @property
    def _needs_two(self) -> bool:
        """Whether a batch norm of the training network has one value per image only: of one image it has no spread."""
        config = self.model.config
        return config.decoder == "upernet" and 1 in config.pool_scales

    def _check_batch(self) -> None:
        """Refuse a recipe that has too few images in a pass for the network's batch norms."""
        train = self.recipe.train
        parts = self.processes.count * train.accumulation
        together = self.processes.count * (min(train.batch_size, len(self.split.train)) // parts)
        if self._needs_two and together < 2:
            raise RecipeError(
                "UPerNet pools a map to a single value per channel and image, and its batch norm needs two or more of "
                f"them, but a pass is over {together} image; raise train.batch_size, lower train.accumulation, or set "
                "model.overrides.pool_scales to [2, 3, 6]."
            )

    def describe(self) -> list[str]:
        """Say which images are for what."""
        split = self.split
        best = "" if split.val else " The last model is kept; data.val_fraction gives images to choose by."
        return [
            *self.masked.describe(),
            *self.found,
            f"{len(split.train):,} images to train on, {len(split.val):,} to choose by, {len(split.test):,} held out."
            f"{best}",
        ]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Group parameters by layer-wise learning rate and weight decay; those that are frozen are in no group."""
        return parameter_groups(model, self.recipe.train)

    def batches(self, update: int) -> Iterator[PixelBatch]:
        """Yield augmented images with their masks."""
        for batch in load_batches(self.samples, self.order.parts(update), self.recipe.run.workers):
            self._unreadable.add(batch.unreadable)
            yield batch

    def loss(self, model: nn.Module, batch: PixelBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the mean cross-entropy of the labelled pixels, and that of the auxiliary head by its weight."""
        device = self.processes.device
        self.counts["unreadable"] += len(batch.unreadable)
        images, masks = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.masks))
        labelled = (masks != IGNORE).sum()
        if not len(images):
            return self._nothing(model, images)
        if len(images) == 1 and self.processes.count == 1 and self._needs_two:
            # Others of the batch could not be read. Twice the same image has the same means, and a spread.
            images, masks = images.expand(2, -1, -1, -1), masks.expand(2, -1, -1)
        logits = model(images)
        if not isinstance(logits, tuple):
            return pixel_loss(logits, masks), labelled, {}
        losses = [pixel_loss(one, masks) for one in logits]
        logs = dict(zip(self.log_names, (one.detach() for one in losses), strict=True))
        return losses[0] + self.section.auxiliary_weight * losses[1], labelled, logs

    def _nothing(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of a batch of which no image could be read: 0, and its gradients are 0."""
        if self.processes.count == 1:
            outputs = [parameter for parameter in model.parameters() if parameter.requires_grad]
        else:  # all processes take part in the norms of the others
            logits = model(images)
            outputs = list(logits if isinstance(logits, tuple) else (logits,))
        nothing = torch.stack([0 * one.float().sum() for one in outputs]).sum()
        count = torch.zeros((), dtype=torch.int64, device=images.device)
        return nothing, count, dict.fromkeys(self.log_names, nothing.detach())

    def count_images(self, batch: PixelBatch) -> int:
        """Tell how many images a batch has."""
        return len(batch.images)

    def take_counts(self) -> None:
        """Add up the images that could not be read in the epoch, and begin anew."""
        self._lost = int(self.processes.sum(self.counts["unreadable"].clone()))
        self.counts["unreadable"].zero_()

    def end_epoch(self, model: nn.Module, epoch: int, directory: Path) -> Metrics:
        """Say what was counted in the epoch."""
        return {"unreadable": self._lost}

    def validate(self, model: nn.Module) -> Metrics:
        """Measure mIoU, mAcc and aAcc on the validation images; they are NaN if a model's output is not finite."""
        if not self.split.val:
            self._unreadable.report()
            return {}
        matrix, failures = self.measure(model, self.split.val)
        if any(reason == NOT_FINITE for _, reason in failures):
            return dict.fromkeys(self.metric_names, math.nan)
        count_measured(len(self.split.val), failures)
        scores = matrix.scores()
        return {f"val_{name}": getattr(scores, name) for name in _SCORES}

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether the mean IoU is higher; of equal ones that with more right pixels is better."""
        return (metrics["val_miou"], metrics["val_aacc"]) > (best["val_miou"], best["val_aacc"])

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write a folder that `create_model('local-dir:...')` reads."""
        assert isinstance(model, Segmenter)
        save_pretrained(model, directory)

    def measure_best(self, directory: Path) -> Metrics:
        """Measure mIoU, mAcc, aAcc and the IoU of each class on the held-out images, if there are any."""
        if not self.split.test:
            return {}
        best = create_model(directory.absolute(), pretrained=True, device=self.processes.device)
        return self.measure_test(best.eval())

    def measure_test(self, model: nn.Module) -> Metrics:
        """Measure a model on the held-out images; a class that is nowhere has no IoU.

        Raises:
            InvalidValueError: None of the images can be measured.
        """
        matrix, failures = self.measure(model, self.split.test)
        count = count_measured(len(self.split.test), failures)
        scores = matrix.scores()
        classes = zip(self.masked.labels.names, scores.iou, strict=True)
        return {
            **{f"test_{name}": getattr(scores, name) for name in _SCORES},
            "test_count": count,
            "test_failures": len(failures),
            **{f"test_iou_{name}": value for name, value in classes if not math.isnan(value)},
        }

    def measure(self, model: nn.Module, indices: Sequence[int]) -> tuple[ConfusionMatrix, list[tuple[str, str]]]:
        """Count the pixels of some images, and say which could not be measured, and why.

        Each process takes its share of the images, and all get the same.
        """
        assert isinstance(model, Segmenter)
        share = indices[self.processes.rank :: self.processes.count]
        options, workers = _options(self.section.inference), max(self.recipe.run.workers, 1)
        matrix, failures = measure_segmenter(model, self.masked, share, options, workers=workers)
        matrix.counts = self.processes.sum(matrix.counts)
        failures = list(itertools.chain.from_iterable(self.processes.gather(failures)))
        self._unreadable.add(failures)
        self._unreadable.report()
        return matrix, failures


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean cross-entropy of the pixels that have a class; 0 if none has.

    Logits are resized to the masks, as in `decode_head.py` of mmsegmentation.

    Args:
        logits: (B, K, h, w).
        masks: (B, H, W), int64: the class of each pixel, 255 where it has none.
    """
    resized = F.interpolate(logits.float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(resized, masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp(min=1)


def _views(section: TrainSegmenter, model: Segmenter) -> PixelViews:
    """Return how crops are drawn; they are of the network's size."""
    config = model.backbone.config
    data = model.pretrained.data.fitted_to(config)
    options = section.augment.model_dump() | {"mean": data.mean, "std": data.std}
    return PixelViews(size=config.img_size, **options)


def _options(inference: PixelInference) -> SegmentOptions:
    return SegmentOptions(mode=inference.mode, short_side=inference.short_side, stride=inference.stride)


def _make_model(recipe: Recipe, names: tuple[str, ...]) -> Segmenter:
    """Make the network to start from. Its heads stay if they tell the same classes apart, else they are fresh."""
    section, task = recipe.model, recipe.task
    assert isinstance(task, TrainSegmenter)
    overrides: dict[str, Any] = {**section.overrides, "num_classes": len(names), "head": "segment"}
    model: object = create_model(section.name, section.pretrained, checkpoint_path=section.checkpoint, **overrides)
    assert isinstance(model, Segmenter)
    trained = model.pretrained
    if not accepts(trained.head, names):
        model.reset_classifier(len(names))
    augment, data = task.augment, trained.data.fitted_to(model.backbone.config)
    data = replace(data, mean=augment.mean or data.mean, std=augment.std or data.std)
    model.backbone.pretrained = replace(
        trained,
        sources=(),
        tag=None,
        head=Segment(network=model.config, labels=names),
        data=replace(data, reduce_zero_label=task.labels.reduce_zero_label),
    )
    if task.bias_init_std and section.is_random:
        spread_bias_tables(model, task.bias_init_std)
    if task.frozen:
        model.backbone.requires_grad_(False)
    return model
