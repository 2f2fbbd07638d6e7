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
from beitzoo.measure.results import Row, environment
from beitzoo.models.beit import Beit
from beitzoo.training.data import evaluation_loader, load_images, split_images
from beitzoo.training.recipe import DataSection
from beitzoo.zoo.labels import label_names


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


def accuracy_row(name: str, data: str, split_seed: int, device: str) -> Row:
    """Measure a model by name and make its row, in timm's columns and with its environment.

    Args:
        name: As in `create_model`.
        data: `digits`, of which the held-out third is used, or a folder of class folders, all of which is.
        split_seed: Draws the held-out third.
        device: Where the model runs.

    Raises:
        ValueError: The data has more classes than the model, or names them otherwise.
    """
    model = create_model(name, pretrained=True, device=device)
    if data == "digits":
        section = DataSection(source="digits", split_seed=split_seed)
        images = load_images(section)
        indices = split_images(images, section).test
    else:
        images = load_images(DataSection(source="folder", path=Path(data)))
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
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "data": data,
        "split_seed": split_seed if data == "digits" else None,
        "count": accuracy.count,
        **environment(model.cls_token.device),
    }


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
    names = label_names(model.pretrained)
    if isinstance(model.pretrained.labels, tuple) and names != images.names:
        raise ValueError(f"{name} was trained on the classes {names}, the data has {images.names}.")
