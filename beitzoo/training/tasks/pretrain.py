"""Pretraining by masked image modelling: BEiT and BEiT v2, from a recipe to a network that can be fine-tuned.

BEiT (https://arxiv.org/abs/2106.08254), section 2; BEiT v2 (https://arxiv.org/abs/2208.06366), section 2.3;
`engine_for_pretraining.py` of both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.probe import probe_backbone
from beitzoo.factory import Tokenizer, check_tokenizer, create_model, create_tokenizer
from beitzoo.images.augment import TwoViews
from beitzoo.images.image_set import ImageSet
from beitzoo.images.loading import Sample, load_batches
from beitzoo.images.masks import Masking
from beitzoo.images.splits import Split
from beitzoo.images.token_views import TokenViews
from beitzoo.inference.reconstruct import write_reconstructions
from beitzoo.inference.tokenize import weights_checksum
from beitzoo.models.mim import MaskedImageModel, mim_loss
from beitzoo.saving import save_pretrained
from beitzoo.training.data import Order, UnreadableImages, check_any_read, load_images, split_images
from beitzoo.training.generators import derive_seed, seed_generators
from beitzoo.training.masked_images import MaskedBatch, MaskedImages
from beitzoo.training.optim import groups_without_layers, spread_bias_tables
from beitzoo.training.pretrain_sections import Pretrain, ProbeSection
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError
from beitzoo.training.run import run
from beitzoo.training.task import Metrics
from beitzoo.zoo.checkpoints import DataConfig, Mim
from beitzoo.zoo.networks import BeitConfig, MimConfig

# Logged besides the sum of the losses; of patch aggregation both heads are.
_ONE_HEAD = ("token_accuracy",)
_TWO_HEADS = ("token_accuracy", "token_loss", "aggregation_accuracy", "aggregation_loss")
# Logged at the end of an epoch.
_COUNTED = ("codes_used", "code_perplexity", "unreadable")
_PROBED = ("probe_linear", "probe_knn")

PICTURES = "pictures"
_DRAWN = 6  # images of a picture


def pretrain(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Pretrain a network on images without labels; see `run`."""
    return run(recipe, directory, prepare)


def prepare(recipe: Recipe, processes: Processes) -> tuple["PretrainTask", MaskedImageModel]:
    """Make the task of a recipe and its model; all that can be known before a run is checked here.

    Raises:
        RecipeError: Says what cannot be done, and what to do.
    """
    assert isinstance(recipe.task, Pretrain)
    images = load_images(recipe.data)
    split = split_images(images, recipe.data, test_fraction=0.0, val_fraction=0.0)
    _check_counts(recipe, split)
    tokenizer = create_tokenizer(recipe.task.tokenizer, pretrained=True, device=processes.device)
    seed_generators(derive_seed(recipe.train.seed, "weights"))
    model = _make_model(recipe, tokenizer)
    probe = _load_probe(recipe.task.probe)
    return PretrainTask(recipe, images, split, model.backbone.config, model.config, tokenizer, processes, probe), model


def check_network(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that does not fit the network of a recipe; the network gets no values for that.

    Raises:
        UserError: Grids, channels or visual tokens differ; says how, and what to do.
    """
    unloaded = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
    with torch.device("meta"):
        _make_model(recipe.model_copy(update={"model": unloaded}), tokenizer)


@dataclass
class PretrainTask:
    """Cross-entropy of the visual tokens of masked patches; of two models the better predicts validation images better.

    The items of a loss are masked patches: images may have more or fewer of them (BEiT's blocks end short now and
    then), and however an update is shared out, each patch weighs the same. Accuracies are per cent.

    Attributes:
        recipe: The run.
        images: All images; labels are not used.
        split: Which are for what.
        network: The backbone that is trained.
        head: What predicts visual tokens from it.
        tokenizer: Gives the targets. It computes in the precision of the run, as the network does.
        processes: Those that train together.
        probe: Labelled images and their split, on which features are probed now and then.
        samples: What is trained on, masked.
    """

    recipe: Recipe
    images: ImageSet
    split: Split
    network: BeitConfig
    head: MimConfig
    tokenizer: Tokenizer
    processes: Processes
    probe: tuple[ImageSet, Split] | None = None

    def __post_init__(self) -> None:
        assert isinstance(self.recipe.task, Pretrain)
        self.section = self.recipe.task
        self.log_names: tuple[str, ...] = _TWO_HEADS if self.head.early_layers else _ONE_HEAD
        self.metric_names: tuple[str, ...] = (
            tuple(f"val_{name}" for name in ("loss", *self.log_names)) if self.split.val else ()
        )
        self.epoch_names: tuple[str, ...] = (*_COUNTED, *(_PROBED if self.probe else ()))
        self.order = Order(self.split.train, self.recipe.train, self.processes)
        self.updates_per_epoch = self.order.updates_per_epoch
        self._unreadable = UnreadableImages(self.processes)
        self.tokenizer.to(self.processes.device).eval().requires_grad_(False)
        self.counts = {
            "codes": torch.zeros(self.tokenizer.vocab_size, dtype=torch.int64, device=self.processes.device),
            "unreadable": torch.zeros((), dtype=torch.int64, device=self.processes.device),
        }
        drawn = self._views(), self._masking(), self.recipe.train.seed
        self._fixed = MaskedImages(self.images, *drawn)
        self.samples = MaskedImages(self.images, *drawn, self._open_tokens(drawn[0]))

    def describe(self) -> list[str]:
        """Say which images are for what."""
        split, grid, mask = self.split, self.network.grid_size, self.section.mask
        masked = "All" if mask.kind == "all" else f"{mask.count}"
        return [
            *self.images.describe(),
            f"{len(split.train):,} images to train on, {len(split.val):,} to choose by, {len(split.test):,} held out.",
            f"{masked} of {grid[0]} x {grid[1]} patches are masked; {self.tokenizer.vocab_size:,} visual tokens of "
            f"{self.section.tokenizer}{'' if self.section.tokens is None else f', computed in {self.section.tokens}'}.",
        ]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Group parameters by weight decay, as the originals do."""
        return groups_without_layers(model, self.recipe.train)

    def batches(self, update: int) -> Iterator[MaskedBatch]:
        """Yield images in two views with masks."""
        for batch in load_batches(self.samples, self.order.parts(update), self.recipe.run.workers):
            self._unreadable.add(batch.unreadable)
            yield batch

    def loss(self, model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Return the cross-entropy of the visual tokens of masked patches; with patch aggregation, that of both heads.

        A batch without a masked patch, since no image could be read, gives a loss of 0 that depends on all parameters.
        """
        targets = self._targets(batch)
        self.counts["codes"].index_add_(0, targets, torch.ones_like(targets))
        self.counts["unreadable"] += len(batch.unreadable)
        return self._loss(model, batch, targets)

    def _targets(self, batch: MaskedBatch) -> Tensor:
        """Return the visual tokens of all masked patches, (M,)."""
        device = self.processes.device
        if batch.codes is not None:
            return batch.codes[batch.masks].to(device, non_blocking=True)
        if batch.token_images is None:  # no image could be read
            return torch.empty(0, dtype=torch.int64, device=device)
        codes = self.tokenizer.encode(batch.token_images.to(device, non_blocking=True))
        return codes[batch.masks.to(device, non_blocking=True)]

    def _loss(self, model: nn.Module, batch: MaskedBatch, targets: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
        images, masks = (tensor.to(self.processes.device, non_blocking=True) for tensor in (batch.images, batch.masks))
        if not len(targets):
            logits = _heads(model(images[:0], masks[:0], all_patches=True))
            nothing = torch.stack([one.float().sum() for one in logits]).sum()
            return nothing, 0, {name: nothing.detach() for name in self.log_names}
        logits = _heads(model(images, masks))
        losses = [mim_loss(one, targets) for one in logits]
        accuracies = [100 * (one.detach().argmax(-1) == targets).float().mean() for one in logits]
        values = [value for pair in zip(accuracies, losses, strict=True) for value in pair]
        return torch.stack(losses).sum(), len(targets), dict(zip(self.log_names, values, strict=False))

    def count_images(self, batch: MaskedBatch) -> int:
        """Tell how many images a batch has."""
        return len(batch.images)

    def take_counts(self) -> None:
        """Add up the codes that were targets in the epoch, and the images that could not be read; begin anew."""
        self._counted = {name: self.processes.sum(count.clone()) for name, count in self.counts.items()}
        for count in self.counts.values():
            count.zero_()

    def validate(self, model: nn.Module) -> Metrics:
        """Measure the loss and the accuracy on the validation images, whose views and masks never change."""
        metrics = self.measure(model, self.split.val, "val_") if self.split.val else {}
        self._unreadable.report()
        return metrics

    def end_epoch(self, model: nn.Module, epoch: int, directory: Path) -> Metrics:
        """Say what was counted in the epoch; draw reconstructions and probe features if they are due."""
        assert isinstance(model, MaskedImageModel)
        used, perplexity = code_use(self._counted["codes"])
        values = dict(zip(_COUNTED, (used, perplexity, int(self._counted["unreadable"])), strict=True))
        if self._is_due(epoch, self.section.picture_epochs):
            self._draw(model, directory / PICTURES / f"epoch-{epoch:04d}.png")
        if self.probe and self.section.probe and self._is_due(epoch, self.section.probe.epochs):
            images, split = self.probe
            values |= probe_backbone(model.backbone, images, split, self.section.probe.neighbours)
        return values

    def _is_due(self, epoch: int, every: int) -> bool:
        """Tell whether something is done in this epoch; it is in the last one, unless it never is."""
        return every > 0 and (epoch % every == 0 or epoch == self.recipe.train.count_epochs(self.updates_per_epoch))

    def _draw(self, model: MaskedImageModel, path: Path) -> None:
        """Draw reconstructions of a few images, of those to choose by if there are any; never of what is held out."""
        chosen = (self.split.val or self.split.train)[:_DRAWN]
        images = [self.images.images[index] for index in chosen]
        write_reconstructions(model, self.tokenizer, images, path, masking=self.samples.masking)

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        """Tell whether the loss on the validation images is lower."""
        return metrics["val_loss"] < best["val_loss"]

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write a folder that `create_model` reads, to go on with, to probe or to fine-tune."""
        save_pretrained(model, directory)

    def measure_best(self, directory: Path) -> Metrics:
        """Measure loss and accuracy on the held-out images, if there are any."""
        if not self.split.test:
            return {}
        best = create_model(directory.absolute(), pretrained=True, device=self.processes.device)
        return self.measure(best.eval(), self.split.test, "test_")

    @torch.inference_mode()
    def measure(self, model: nn.Module, indices: Sequence[int], prefix: str) -> Metrics:
        """Return the loss and what is logged besides, over all masked patches of some images.

        Each process takes its share of the images, and all get the same values.

        Raises:
            InvalidValueError: None of the images can be read.
        """
        share = indices[self.processes.rank :: self.processes.count]
        size = max(self.recipe.train.batch_size // self.processes.count, 1)
        parts = [[Sample(None, i) for i in share[start : start + size]] for start in range(0, len(share), size)]
        names = ("loss", *self.log_names)
        totals = torch.zeros(1 + len(names), dtype=torch.float64)
        for batch in load_batches(self._fixed, parts, self.recipe.run.workers):
            self._unreadable.add(batch.unreadable)
            loss, count, logs = self._loss(model, batch, self._targets(batch))
            means = torch.stack([loss, *(logs[name] for name in self.log_names)]).double().cpu()
            totals += count * torch.cat([torch.ones(1, dtype=torch.float64), means])
        items, *sums = torch.stack(self.processes.gather(totals)).sum(0).tolist()
        check_any_read(items, len(indices))
        return {prefix + name: value / items for name, value in zip(names, sums, strict=True)}

    def _views(self) -> TwoViews:
        views = self.section.views
        data = _data_config(self.section, DataConfig(), self.network)
        return TwoViews(
            patch_size=self.network.img_size,
            token_size=self.tokenizer.img_size,
            mean=data.mean,
            std=data.std,
            scale=views.scale,
            ratio=views.ratio,
            jitter=views.jitter,
            hflip=views.hflip,
            patch_interpolation=views.interpolation,
            token_interpolation=self.tokenizer.interpolation,
        )

    def _open_tokens(self, views: TwoViews) -> TokenViews | None:
        """Open the tokens of the recipe, if they are those that would be computed in this run.

        Raises:
            UserError: They are of other images, views or weights.
        """
        if self.section.tokens is None:
            return None
        tokens = TokenViews.open(self.section.tokens)
        tokens.check(self.images, self.split.train, views, self.tokenizer.vocab_size)
        if tokens.request.weights != weights_checksum(self.tokenizer):
            raise RecipeError(
                f"The tokens in {self.section.tokens} are of {tokens.request.tokenizer} with other weights than those "
                f"of {self.section.tokenizer}; set the same tokenizer, or make them again with `beitzoo tokenize`."
            )
        return tokens

    def _masking(self) -> Masking:
        try:
            return Masking(grid=self.network.grid_size, **self.section.mask.model_dump())
        except InvalidValueError as error:
            raise RecipeError(f"task.mask.{error}") from error


def code_use(counts: Tensor) -> tuple[int, float]:
    """Tell how many codes are in use, given how often each is (V,), and their perplexity.

    The perplexity is the number of equally frequent codes that would be as hard to guess.
    """
    shares = counts.double() / counts.sum().clamp(min=1)
    return int((counts > 0).sum()), float(torch.special.entr(shares).sum().exp())


def _heads(logits: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [logits] if isinstance(logits, Tensor) else list(logits)


def _check_counts(recipe: Recipe, split: Split) -> None:
    train = recipe.train
    if len(split.train) < train.batch_size:
        raise RecipeError(
            f"There are {len(split.train):,} images to train on, less than one update of {train.batch_size:,}; lower "
            "train.batch_size, or give more images."
        )
    if train.layer_decay != 1:
        raise RecipeError("All layers learn equally fast in pretraining; leave train.layer_decay out.")


def _load_probe(section: ProbeSection | None) -> tuple[ImageSet, Split] | None:
    if section is None:
        return None
    images = load_images(section.data)
    try:
        images.one_label_each("task.probe")
    except InvalidValueError as error:
        raise RecipeError(str(error)) from error
    split = split_images(images, section.data, test_fraction=1 / 3, val_fraction=0.0)
    if not split.train or not split.test:
        raise RecipeError("task.probe.data needs images to fit the probes on and others to measure them.")
    return images, split


def _make_model(recipe: Recipe, tokenizer: Tokenizer) -> MaskedImageModel:
    """Make the network to start from, with a head for the codes of a tokenizer."""
    section = recipe.model
    assert isinstance(recipe.task, Pretrain)
    if "vocab_size" in section.overrides:
        raise RecipeError("model.overrides.vocab_size comes from task.tokenizer; leave it out.")
    options: dict[str, Any] = {**section.overrides, "head": "mim", "vocab_size": tokenizer.vocab_size}
    model: object = create_model(section.name, section.pretrained, checkpoint_path=section.checkpoint, **options)
    assert isinstance(model, MaskedImageModel)
    network = model.backbone.config
    try:
        check_tokenizer(model, tokenizer)
    except InvalidValueError as error:
        raise RecipeError(f"model and task.tokenizer: {error}") from error
    if network.in_chans != tokenizer.in_chans:
        raise RecipeError(
            f"The network has in_chans={network.in_chans}, and the tokenizer {recipe.task.tokenizer} has "
            f"{tokenizer.in_chans}; both see the same images. Choose model.overrides.in_chans={tokenizer.in_chans}, or "
            "another task.tokenizer."
        )
    if network.in_chans not in (1, 3):
        raise RecipeError(
            f"The network takes {network.in_chans} channels, but images are read as grey (1) or colour (3); set "
            "model.overrides.in_chans, and a tokenizer of as many."
        )
    head = Mim(network=model.config, tokenizer=recipe.task.tokenizer)
    data = _data_config(recipe.task, model.pretrained.data, network)
    model.backbone.pretrained = replace(model.pretrained, sources=(), tag=None, head=head, data=data)
    if recipe.task.bias_init_std and section.is_random:
        spread_bias_tables(model, recipe.task.bias_init_std)
    return model


def _data_config(section: Pretrain, data: DataConfig, network: BeitConfig) -> DataConfig:
    """Say how images are prepared for the network: normalised and resized as in pretraining, cropped as it was."""
    views = section.views
    size = (len(views.mean), *network.img_size)
    chosen = replace(data, input_size=size, mean=views.mean, std=views.std, interpolation=views.interpolation)
    return chosen.fitted_to(network)
