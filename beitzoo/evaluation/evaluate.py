"""How right a classifier is."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.factory import create_model
from beitzoo.images.datasets import ImageSet
from beitzoo.images.transforms import resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.results import ENVIRONMENT, Row, environment
from beitzoo.training.data import evaluation_loader, load_images, split_images
from beitzoo.training.recipe import DataSection, Recipe
from beitzoo.zoo import costs
from beitzoo.zoo.labels import accepts
from beitzoo.zoo.registry import DEFAULT_MODEL

_OWN_COLUMNS = (
    "model",
    "img_size",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "crop_pct",
    "interpolation",
    "data",
    "split_seed",
    "count",
)
COLUMNS = [*_OWN_COLUMNS, *ENVIRONMENT]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of images.

    Attributes:
        top1: Per cent of images whose likeliest class is the right one.
        top5: Per cent whose right class is among the five likeliest.
        loss: Mean cross-entropy, nats.
        count: Images counted.
    """

    top1: float
    top5: float
    loss: float
    count: int


@torch.inference_mode()
def measure_accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Accuracy:
    """Classify batches of images (B, C, H, W) with labels (B,); the model's mode is kept.

    Raises:
        ValueError: There was no image.
    """
    was_training = model.training
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        images, labels = (t.to(device) for t in batch)
        if not len(labels):
            continue
        logits = model(images).float()
        ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([ranks[:, 0].sum(), ranks.sum(), loss]).double().cpu()
        count += len(labels)
    model.train(was_training)
    if not count:
        raise ValueError("There is no readable image to measure accuracy on.")
    top1, top5, loss = (sums / count).tolist()
    return Accuracy(100 * top1, 100 * top5, loss, count)


def evaluate(model: Beit, images: ImageSet, indices: list[int], workers: int = 0) -> Accuracy:
    """Measure the accuracy of a classifier on some images of a set, in the model's precision."""
    return measure_accuracy(model, evaluation_loader(model, images, indices, workers), model.cls_token.device)


def accuracy_row(name: str, data: str, split_seed: int | None, device: torch.device) -> Row:
    """Measure a model by name and make its row, in timm's columns and with its environment.

    Args:
        name: As in `create_model`.
        data: `digits`, of which the held-out third is used, or a folder of class folders, all of which is.
        split_seed: Draws the held-out third; None is that of the model's own run.
        device: Where the model runs.

    Raises:
        ValueError: The data has other classes than the model, or the model was trained on another split and so has
            seen images that this one holds out.
    """
    model = create_model(name, pretrained=True, device=device)
    if data == "digits":
        section = DataSection(source="digits", split_seed=_held_out(name, split_seed))
        images = load_images(section)
        indices = split_images(images, section).test
    else:
        section = DataSection(source="folder", path=Path(data))
        images = load_images(section)
        indices = list(range(len(images.labels)))
    _check_classes(model, name, images)
    accuracy = evaluate(model, images, indices)
    config = resolve_data_config(model)
    return {
        "model": name,
        "img_size": config["input_size"][2],
        "top1": round(accuracy.top1, 3),
        "top1_err": round(100 - accuracy.top1, 3),
        "top5": round(accuracy.top5, 3),
        "top5_err": round(100 - accuracy.top5, 3),
        "param_count": round(costs.parameters(model.config) / 1e6, 2),
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "data": data,
        "split_seed": section.split_seed if data == "digits" else None,
        "count": accuracy.count,
        **environment(model.cls_token.device),
    }


def _held_out(name: str, split_seed: int | None) -> int:
    """Find out which split a model must be measured on: that of the recipe beside it, 0 for the shipped one."""
    recipe = Path(name.removeprefix("local-dir:")).expanduser().parent / "recipe.json"
    own = Recipe.model_validate_json(recipe.read_bytes()).data.split_seed if recipe.is_file() else None
    if own is None and name == DEFAULT_MODEL:
        own = 0
    if None not in (own, split_seed) and own != split_seed:
        raise ValueError(
            f"{name} was trained with split_seed {own}; the third that split_seed {split_seed} holds out has images it "
            f"was trained on. Use --split-seed {own} or leave it out."
        )
    return own or split_seed or 0


def summarise(rows: Sequence[Row]) -> str:
    """Say mean and sample standard deviation of top-1 over several rows."""
    values = [float(row["top1"]) for row in rows if row["top1"] is not None]
    return f"top1 {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} (mean ± sd of {len(values)})"


def _check_classes(model: Beit, name: str, images: ImageSet) -> None:
    """Refuse data whose classes are not the model's: its numbers would mean something else."""
    if len(images.names) != model.num_classes:
        raise ValueError(
            f"{name} tells {model.num_classes} classes apart, the data has {len(images.names)}; "
            "evaluate a model that was trained on these classes."
        )
    if not accepts(model.pretrained.head, images.names):
        names = model.class_names or ()
        raise ValueError(
            f"{name} was trained on other classes ({', '.join(names[:3])}, ...) than the data has "
            f"({', '.join(images.names[:3])}, ...); name the class folders after the model's classes."
        )
