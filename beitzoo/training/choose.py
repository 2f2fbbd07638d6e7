"""Which recipe fits a model and some images, where nobody gave one: the rules, each with its reason."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from beitzoo.training.memory import activation_bytes
from beitzoo.training.recipe import Recipe
from beitzoo.training.sections import DataSection
from beitzoo.training.situation import Situation

_STARTS = {"labels": "learned labels before", "masked": "learned from masked images only", "random": "start random"}
# Images that a run looks at, and the fewest and most epochs. unilm trains 30 epochs of ImageNet-1k after labels and
# 100 after masked images; networks that start random take longest (configs/finetune/digits.toml).
_SEEN = {"labels": 40_000, "masked": 100_000, "random": 200_000}
_EPOCHS = {"labels": (10, 40), "masked": (30, 100), "random": (60, 200)}
# Peak learning rate for 32 images per update and the width of a base network.
_RATE = {"labels": 3e-4, "masked": 3e-4, "random": 1e-3}
# Likewise of adapters, which start with no effect and need larger steps (configs/finetune/lora.toml).
_ADAPTERS_RATE = 1.25e-3
# Learning rate of the patch embedding as a share of the head's: unilm's 0.75 and 0.65 per layer of base networks.
_STEM_SHARE = {"labels": 0.75**13, "masked": 0.65**13, "random": 1.0}
# Sides up to which an image is small: it has few patches, and cropping or erasing takes away too much of it.
_SMALL = 64


@dataclass(frozen=True)
class Rule:
    """One value of a recipe, by its dotted name, and the reason for it."""

    name: str
    value: Any
    reason: str


def choose(model: str, data: DataSection, situation: Situation) -> tuple[Recipe, list[Rule]]:
    """Choose a recipe; its network keeps the input size and normalisation that its weights are of.

    Args:
        model: Name of the model.
        data: Where the images are.
        situation: What the rules look at.

    Returns:
        The recipe, and the rules that made it.
    """
    rules = [*_data(situation), *_length(situation), *_rates(situation), *_images(situation), *_machine(situation)]
    document: dict[str, Any] = {
        "model": {"name": model, "pretrained": situation.start != "random", "overrides": {}},
        "data": data.model_dump(exclude_none=True),
        "train": {},
        "run": {},
        "task": {"kind": "finetune", "augment": {"kind": "crop"}},
    }
    for rule in rules:
        *sections, key = rule.name.split(".")
        place = document
        for section in sections:
            place = place[section]
        place[key] = rule.value
    return Recipe.model_validate(document), rules


def _data(at: Situation) -> Iterator[Rule]:
    if at.start == "random" and at.config.in_chans == 1 and at.in_colour:
        yield Rule("model.overrides.in_chans", 3, "the images have colours")
    if at.several_labels:
        yield Rule("task.labels", "many", "the images have any number of labels each: sigmoid, judged by mAP")
    if not at.in_parts:
        drawn = "drawn without a look at labels" if at.several_labels else "drawn evenly from the classes"
        test, val = at.fractions
        yield Rule("data.test_fraction", test, f"of all images, {drawn}; used once, at the end")
        yield Rule("data.val_fraction", val, "of the others; the best model is chosen by them")


def _length(at: Situation) -> Iterator[Rule]:
    yield Rule("train.batch_size", _batch_size(at), "32, more for many images, and 8 updates an epoch of few")
    fewest, most = _EPOCHS[at.start]
    epochs = min(max(round(_SEEN[at.start] / at.to_train), fewest), most)
    yield Rule("train.epochs", epochs, f"{fewest} to {most} for weights that {_STARTS[at.start]}; more of fewer images")
    yield Rule("train.warmup_epochs", round(epochs / 10, 1), "a tenth of the run")
    if at.start != "random":
        yield Rule("train.patience", 10, "pretrained weights are soon as good as they get")


def _batch_size(at: Situation) -> int:
    most = 128 if at.to_train >= 50_000 else 64 if at.to_train >= 5_000 or at.start == "random" else 32
    return 2 ** int(math.log2(min(max(at.to_train / 8, 4), most)))


def _rates(at: Situation) -> Iterator[Rule]:
    config = at.config
    peak = _ADAPTERS_RATE if at.adapters else _RATE[at.start]
    # Adam's steps keep their noise if they grow with the square root of the batch (Malladi et al. 2022), and the
    # best ones shrink with the width (Yang et al. 2022, muP), as unilm's of large networks are below those of base.
    rate = peak * math.sqrt(_batch_size(at) / 32) * min(768 / config.embed_dim, 2.0)
    what = "those of adapters (recipe lora)" if at.adapters else "the start"
    yield Rule("train.lr", float(f"{rate:.2g}"), f"by {what}, the square root of the batch and the width")
    yield Rule("train.min_lr", 1e-6, "as unilm")
    yield Rule("train.clip_grad", 3.0, "a wild update of few images does no harm")
    if at.adapters:
        yield Rule("train.weight_decay", 0.0, "as peft's guide to adapters; these learn at one rate in all blocks")
    elif at.start != "random":
        decay = max(_STEM_SHARE[at.start] ** (1 / (config.depth + 1)), 0.65)
        yield Rule("train.layer_decay", round(decay, 2), f"by {config.depth} blocks; unilm's for base networks")
        if config.depth >= 12:
            drop = 0.2 if config.depth >= 24 else 0.1
            yield Rule("model.overrides.drop_path_rate", drop, "unilm's for networks as deep")
    elif config.use_rel_pos_bias and not config.use_abs_pos_emb:
        yield Rule("train.bias_lr_scale", 10.0, "positions are in the bias tables alone, which must grow first")
        yield Rule("task.bias_init_std", 0.5, "likewise")


def _images(at: Situation) -> Iterator[Rule]:
    if not at.several_labels:  # most images lack a rare label; moving all targets towards 0.5 would drown it
        yield Rule("task.label_smoothing", 0.1, "as unilm")
    if max(at.config.img_size) <= _SMALL:
        yield Rule("task.augment.scale", [0.5, 1.0], "small images lose too much by tighter crops")
        yield Rule("task.augment.color_jitter", 0.2, "mild, as for CIFAR-10")
        return
    many = at.to_train >= 10_000
    reason = "unilm's, as there are many images" if many else "milder crops, as there are few images"
    yield Rule("task.augment.scale", [0.08, 1.0] if many else [0.35, 1.0], reason)
    strong = at.to_train >= 1_000
    policy = "rand-m9-mstd0.5-inc1" if strong else "rand-m5-mstd0.5-inc1"
    yield Rule("task.augment.auto_augment", policy, "unilm's" if strong else "half of unilm's, below 1,000 images")
    if strong:
        yield Rule("task.augment.re_prob", 0.25, "unilm's, from 1,000 images on")
    if at.start == "masked" and at.to_train >= 50_000:
        yield Rule("task.mixup", 0.8, "unilm's after masked images, for many images")
        yield Rule("task.cutmix", 1.0, "likewise")


def _machine(at: Situation) -> Iterator[Rule]:
    if at.workers:
        yield Rule("run.workers", at.workers, "so that the GPU does not wait for images")
    if at.memory is None:
        return
    batch = _batch_size(at)
    parts = 1
    while parts < batch and batch // parts * activation_bytes(at.config, "fp32") > at.memory:
        parts *= 2
    if parts > 1:
        yield Rule("train.accumulation", parts, f"so that activations fit into {at.memory / 1e9:.1f} GB")
