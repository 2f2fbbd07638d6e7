"""How right a classifier is."""

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from beitzoo.errors import check
from beitzoo.factory import create_model, look_up
from beitzoo.images.datasets import ImageSet, LabelledImages, collate, digits, labelled_folder
from beitzoo.images.splits import SPLIT_FILE, Split, draw_split, read_split
from beitzoo.images.transforms import create_transform, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.results import ENVIRONMENT, Row, environment
from beitzoo.zoo import costs
from beitzoo.zoo.checkpoints import LocalFile
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


def evaluation_loader(model: Beit, images: ImageSet, indices: list[int], workers: int = 0) -> DataLoader[Any]:
    """Load images in order, prepared as the model expects them."""
    transform = create_transform(**resolve_data_config(model))
    dataset = LabelledImages(images, indices, transform, model.config.in_chans)
    shape = (model.config.in_chans, *model.config.img_size)
    return DataLoader(dataset, 64, num_workers=workers, collate_fn=functools.partial(collate, shape=shape))


def evaluate(model: Beit, images: ImageSet, indices: list[int], workers: int = 0) -> Accuracy:
    """Measure the accuracy of a classifier on some images of a set, in the model's precision."""
    return measure_accuracy(model, evaluation_loader(model, images, indices, workers), model.cls_token.device)


def accuracy_row(name: str, data: str, split_seed: int | None, device: torch.device) -> Row:
    """Measure a model by name and make its row, in timm's columns and with its environment.

    Args:
        name: As in `create_model`.
        data: `digits` or a folder of class folders. Images that the model's own run trained on are left out; of the
            digits, where no run of this model is known, the third that seed 0 holds out is used.
        split_seed: Use the third of the digits that this seed holds out.
        device: Where the model runs.

    Raises:
        ValueError: The data has other classes than the model, or the model was trained on another split and so has
            seen images that this one holds out.
    """
    model = create_model(name, pretrained=True, device=device)
    images = digits() if data == "digits" else labelled_folder(Path(data).expanduser())
    indices = _unseen_images(name, images, split_seed)
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
        "split_seed": split_seed,
        "count": accuracy.count,
        **environment(model.cls_token.device),
    }


def _unseen_images(name: str, images: ImageSet, split_seed: int | None) -> list[int]:
    """Choose the images that the model was not trained on, nor chosen by."""
    own = _split_of_run(name, images)
    seen = set() if own is None else {*own.train, *own.val}
    if split_seed is None and (own is not None or images.root is not None):
        unseen = [index for index in range(len(images.labels)) if index not in seen]
        check(bool(unseen), f"{name} was trained on all {len(images.labels)} images; evaluate it on others.")
        return unseen
    held_out = _split_of_digits(images, split_seed or 0).test
    check(
        not seen & set(held_out),
        f"{name} was trained on images that split_seed {split_seed} holds out; leave --split-seed out to measure it on "
        "those that its own run held out.",
    )
    return sorted(held_out)


def _split_of_run(name: str, images: ImageSet) -> Split | None:
    """Find the split that a model was trained with: in the file that its run wrote; seed 0 for the shipped model."""
    entry = look_up(name)
    if entry.name == DEFAULT_MODEL:
        return None if images.root is not None else _split_of_digits(images, 0)
    sources = () if entry.pretrained is None else entry.pretrained.sources
    files = [source.path for source in sources if isinstance(source, LocalFile)]
    splits = [folder / SPLIT_FILE for file in files for folder in file.absolute().parents[:2]]
    return next((read_split(path, images) for path in splits if path.is_file()), None)


def _split_of_digits(images: ImageSet, seed: int) -> Split:
    check(images.root is None, "--split-seed draws a part of the digits, and this is a folder. Leave it out.")
    return draw_split(images, val_fraction=0.1, test_fraction=1 / 3, seed=seed)


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
