"""Tokenizer training: VQ-KD, which learns codes from a teacher's features or from pixels.

BEiT v2 (https://arxiv.org/abs/2208.06366), section 2.2; `modeling_vqkd.py` and `engine_for_vqkd.py` of the original.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.factory import create_tokenizer, look_up_tokenizer
from beitzoo.images.augment import TwoViews
from beitzoo.images.image_set import ImageSet
from beitzoo.images.loading import Sample, load_batches
from beitzoo.images.splits import Split
from beitzoo.models.quantizer import perplexity
from beitzoo.models.tokenizers import Tokenized, Vqkd
from beitzoo.saving import save_tokenizer
from beitzoo.training.data import Order, UnreadableImages, check_any_read, load_images, split_images
from beitzoo.training.generators import derive_seed, seed_generators
from beitzoo.training.optim import groups_without_layers
from beitzoo.training.pretrain_sections import TrainTokenizer
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError
from beitzoo.training.run import run
from beitzoo.training.task import Metrics
from beitzoo.training.teachers import Teacher, load_teacher
from beitzoo.training.viewed_images import ViewBatch, ViewedImages
from beitzoo.zoo.networks import VqkdConfig
from beitzoo.zoo.tokenizers import override_tokenizer

PIXELS = "pixels"

_LEAST_VARIANCE = 1e-12  # of targets, of which predictions explain a share


def train_tokenizer(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Train a tokenizer and measure it once on the held-out images, if there are any; see `run`."""
    return run(recipe, directory, prepare)


def prepare(recipe: Recipe, processes: Processes) -> tuple["TokenizerTask", Vqkd]:
    """Make the task of a recipe and its tokenizer; all that can be known before a run is checked here.

    Raises:
        RecipeError: Says what cannot be done, and what to do.
    """
    section = recipe.task
    assert isinstance(section, TrainTokenizer)
    _check(recipe)
    images = load_images(recipe.data)
    split = split_images(images, recipe.data, test_fraction=0.0, val_fraction=0.0)
    teacher = _load_teacher(recipe)
    target = {"target": PIXELS} if teacher is None else {"target": "features", "teacher_dim": teacher.dim}
    seed_generators(derive_seed(recipe.train.seed, "weights"))
    model = _make_tokenizer(recipe, target)
    return TokenizerTask(recipe, images, split, model, teacher, processes), model


@dataclass
class TokenizerTask:
    """How well the decoder predicts its targets from the codes, and how near features are to their codes.

    Codes learn once in an update from all its images, whatever the number of processes and of passes.

    Attributes:
        recipe: The run.
        images: All images.
        split: Which are for what.
        model: The tokenizer, not wrapped for several processes.
        teacher: Whose features are predicted; None for pixels.
        processes: Those that train together.
    """

    recipe: Recipe
    images: ImageSet
    split: Split
    model: Vqkd
    teacher: Teacher | None
    processes: Processes
    _parts: list[Tokenized] = field(default_factory=list)
    _update: int = 0
    _started: bool = False

    def __post_init__(self) -> None:
        assert isinstance(self.recipe.task, TrainTokenizer)
        self.section = self.recipe.task
        self.order = Order(self.split.train, self.recipe.train, self.processes)
        self.updates_per_epoch = self.order.updates_per_epoch
        self._unreadable = UnreadableImages(self.processes)
        self.quality: tuple[str, ...] = ("error", "explained") if self.teacher is None else ("cosine",)
        if self.teacher is not None:
            self.teacher.to(self.processes.device)
        self.log_names: tuple[str, ...] = (*self.quality, "commitment")
        self.metric_names: tuple[str, ...] = ()
        if self.split.val:
            self.metric_names = ("val_loss", *(f"val_{name}" for name in self.quality))
        self.epoch_names: tuple[str, ...] = ("codes_used", "perplexity")
        views, size = self.section.views, self.model.img_size
        self._dataset = ViewedImages(
            self.images,
            TwoViews(
                patch_size=size,
                token_size=size,
                scale=views.scale,
                ratio=views.ratio,
                jitter=views.jitter,
                hflip=views.hflip,
                token_interpolation=views.interpolation,
            ),
            self.model.in_chans,
            self.recipe.train.seed,
        )

    def describe(self) -> list[str]:
        """Say which images are for what, and what codes are to tell."""
        split, model = self.split, self.model
        rows, columns = model.grid_size
        what = PIXELS if self.teacher is None else f"features of {self.section.teacher}"
        return [
            *self.images.describe(),
            f"{len(split.train):,} images to train on, {len(split.val):,} to choose by, {len(split.test):,} held out.",
            f"{rows} x {columns} tokens of {model.vocab_size:,} codes, to predict {what} from.",
        ]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Group parameters by weight decay."""
        return groups_without_layers(model, self.recipe.train)

    def batches(self, update: int) -> Iterator[ViewBatch]:
        """Yield random views."""
        self._update = update
        self._parts.clear()
        for batch in load_batches(self._dataset, self.order.parts(update), self.recipe.run.workers):
            self._unreadable.add(batch.unreadable)
            yield batch

    def loss(self, model: nn.Module, batch: ViewBatch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Return the loss of a batch; after the last one of an update the codes learn."""
        quantizer = self.model.quantize
        if not self._started:
            self._start_codebook()
        if not self._parts and self._update % self.updates_per_epoch == 0:
            quantizer.reset_uses()
        images = batch.images.to(self.processes.device, non_blocking=True)
        found: Tokenized = model(images)
        self._parts.append(found)
        if len(self._parts) == self.recipe.train.accumulation:
            self._learn_codes()
        if not len(images):
            nothing = found.prediction.float().sum() + found.features.sum()
            return nothing, 0, dict.fromkeys(self.log_names, nothing.detach())
        loss, logs = self._compare(found, self._targets(images))
        return loss, len(images), logs

    def count_images(self, batch: ViewBatch) -> int:
        """Tell how many images a batch has."""
        return len(batch.images)

    @torch.no_grad()
    def _targets(self, images: Tensor) -> Tensor:
        """Return what is to be predicted from the codes, (B, h w, prediction_dim)."""
        targets: Tensor = self.model.pixel_targets(images) if self.teacher is None else self.teacher(images)
        return targets.float()

    def _compare(self, found: Tokenized, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of predictions, and what the log tells of it.

        Pixels are compared by their squared error, and features by their angle, as in the original.
        """
        if self.teacher is None:
            error = F.mse_loss(found.prediction.float(), targets)
            explained = 1 - error / targets.var(correction=0).clamp(min=_LEAST_VARIANCE)
            logs = {"error": error, "explained": explained}
        else:
            cosine = F.cosine_similarity(found.prediction.float(), targets, dim=-1).mean()
            error, logs = 1 - cosine, {"cosine": cosine}
        return error + self.section.commitment * found.commitment, {**logs, "commitment": found.commitment}

    def _start_codebook(self) -> None:
        """Give a fresh codebook its start from all images of this update, whichever process sees them.

        One process does it and the others get the result. (In the original each starts with its own codes, and
        they are moved by the same sums from then on.)
        """
        quantizer = self.model.quantize
        if not quantizer.embedding.initted.item():
            features = self._features_of_update() if self.processes.is_main else None
            if features is not None and len(features):
                seed = derive_seed(self.recipe.train.seed, "k-means")
                generator = torch.Generator().manual_seed(seed) if self.section.kmeans_init else None
                quantizer.start(features, generator)
            for tensor in quantizer.state_dict().values():
                self.processes.sum(tensor if self.processes.is_main else tensor.zero_())
        self._started = bool(quantizer.embedding.initted.item())

    @torch.no_grad()
    def _features_of_update(self) -> Tensor:
        """Return the features of all images of this update, (N, D), as far as they can be read."""
        train, processes = self.recipe.train, self.processes
        whole = Order(self.split.train, train, replace(processes, rank=0, count=1)).parts(self._update)
        samples = list(itertools.chain.from_iterable(itertools.islice(whole, train.accumulation)))
        size = -(-len(samples) // (processes.count * train.accumulation))
        features = []
        for batch in load_batches(self._dataset, _chunks(samples, size), self.recipe.run.workers):
            features.append(self.model.features(batch.images.to(processes.device)).flatten(0, 1))
        return torch.cat(features)

    def _learn_codes(self) -> None:
        """Let codes learn from all features of this update, of all processes."""
        quantizer, section = self.model.quantize, self.section
        tally = sum(quantizer.tally(part.features.detach(), part.codes) for part in self._parts)
        assert isinstance(tally, Tensor)
        quantizer.learn(self.processes.sum(tally), section.codebook_decay)
        if section.restart_codes:
            codes = quantizer.dead(section.restart_codes, section.codebook_decay)
            if len(codes):
                quantizer.restart(codes, self._draw_features(len(codes)))
        self._parts.clear()
        self._update += 1

    def _draw_features(self, count: int) -> Tensor:
        """Draw some of all features of this update, of all processes."""
        features = torch.cat([part.features.detach().flatten(0, 1) for part in self._parts])
        counts = self.processes.gather(len(features))
        generator = torch.Generator().manual_seed(derive_seed(self.recipe.train.seed, "restart", self._update))
        drawn = torch.randint(sum(counts), (count,), generator=generator) - sum(counts[: self.processes.rank])
        ours = (drawn >= 0) & (drawn < len(features))
        vectors = features.new_zeros(count, features.shape[1])
        vectors[ours] = features[drawn[ours]]
        return self.processes.sum(vectors)

    def validate(self, model: nn.Module) -> Metrics:
        """Measure the validation images, if there are any."""
        self._unreadable.report()
        if not self.split.val:
            return {}
        measured = self.measure(model, self.split.val)
        return {name: measured[name.removeprefix("val_")] for name in self.metric_names}

    def end_epoch(self, model: nn.Module, epoch: int, directory: Path) -> Metrics:
        """Count the codes that were used in the epoch."""
        uses = self.model.quantize.cluster_size
        return {"codes_used": int((uses > 0).sum()), "perplexity": perplexity(uses)}

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether the validation loss is lower."""
        return metrics["val_loss"] < best["val_loss"]

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write a folder that `create_tokenizer` reads."""
        assert isinstance(model, Vqkd)
        save_tokenizer(model, directory)

    def measure_best(self, directory: Path) -> Metrics:
        """Measure the held-out images, if there are any."""
        if not self.split.test:
            return {}
        best = create_tokenizer(directory, pretrained=True, device=self.processes.device)
        return {f"test_{name}": value for name, value in self.measure(best.eval(), self.split.test).items()}

    def measure(self, model: nn.Module, indices: Sequence[int]) -> Metrics:
        """Measure a tokenizer on some images; each process takes its share, and all get the same values.

        Raises:
            InvalidValueError: None of the images can be read.
        """
        assert isinstance(model, Vqkd)
        sums, uses = self._measure_share(model, indices[self.processes.rank :: self.processes.count])
        items, *totals = self.processes.sum(sums).tolist()
        check_any_read(items, len(indices))
        loss, quality, mean, square = (total / items for total in totals)
        uses = self.processes.sum(uses)
        metrics = {"loss": loss, self.quality[0]: quality}
        if self.teacher is None:
            metrics["explained"] = 1 - quality / max(square - mean**2, _LEAST_VARIANCE)
        return {**metrics, "codes_used": float((uses > 0).sum()), "perplexity": perplexity(uses)}

    @torch.inference_mode()
    def _measure_share(self, model: Vqkd, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return sums over images, and how often each code was used."""
        device = self.processes.device
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        uses = torch.zeros(model.vocab_size, dtype=torch.int64, device=device)
        samples = [Sample(None, index) for index in indices]
        size = max(self.recipe.train.batch_size // self.processes.count, 1)
        for batch in load_batches(self._dataset, _chunks(samples, size), self.recipe.run.workers):
            self._unreadable.add(batch.unreadable)
            if not len(batch.images):
                continue
            images = batch.images.to(device, non_blocking=True)
            found = model(images)
            targets = self._targets(images)
            loss, logs = self._compare(found, targets)
            values = [loss, logs[self.quality[0]], targets.mean(), targets.square().mean()]
            sums += torch.stack([torch.ones_like(loss), *values]).double() * len(images)
            uses += torch.bincount(found.codes.flatten(), minlength=model.vocab_size)
        return sums, uses


def _chunks(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]


def _check(recipe: Recipe) -> None:
    """Refuse what has no meaning for a tokenizer."""
    if {"target", "teacher_dim"} & recipe.model.overrides.keys():
        raise RecipeError("What is predicted follows from task.teacher; leave target and teacher_dim out of overrides.")
    if recipe.train.ema_decay:
        raise RecipeError("Codes are moving averages already; leave out train.ema_decay.")
    if recipe.train.layer_decay != 1:
        raise RecipeError("A tokenizer's two networks have no common order of layers; leave out train.layer_decay.")
    if recipe.run.sharding != "none":
        raise RecipeError("Codes learn from features that one process makes alone; leave out run.sharding.")


def _load_teacher(recipe: Recipe) -> Teacher | None:
    """Load the teacher of a recipe, on the grid of its tokenizer; None if pixels are to be predicted."""
    section = recipe.task
    assert isinstance(section, TrainTokenizer)
    config = override_tokenizer(look_up_tokenizer(recipe.model.name).config, recipe.model.overrides)
    if not isinstance(config, VqkdConfig):
        raise RecipeError(f"{recipe.model.name} is not trained here; name a VQ-KD, such as vqkd_nano_patch4_32.")
    if section.teacher == PIXELS:
        return None
    return load_teacher(section.teacher, config.encoder.grid_size, config.encoder.in_chans, section.projection)


def _make_tokenizer(recipe: Recipe, target: dict[str, Any]) -> Vqkd:
    """Make the tokenizer to start from; a fresh one has a codebook that waits for its start."""
    section = recipe.model
    overrides: dict[str, Any] = {**section.overrides, **target}
    model = create_tokenizer(section.name, section.pretrained, checkpoint_path=section.checkpoint, **overrides)
    assert isinstance(model, Vqkd)
    if not (section.pretrained or section.checkpoint):
        model.quantize.embedding.initted.zero_()
    return model
