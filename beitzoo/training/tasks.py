"""From a recipe to a model, its data and a finished run."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from beitzoo.factory import create_model, save_pretrained
from beitzoo.images.datasets import ImageSet, LabelledImages, collate, digits, labelled_folder
from beitzoo.images.transforms import Transform, create_transform, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.training.evaluate import Accuracy, measure_accuracy
from beitzoo.training.loop import Run, fit
from beitzoo.training.optim import spread_bias_tables
from beitzoo.training.recipe import AffineAugment, DataSection, Recipe, RecipeError, dump_recipe
from beitzoo.weights.checkpoint import write_atomically


@dataclass(frozen=True)
class Split:
    """Indices into an `ImageSet`; every class has the same share in each."""

    train: list[int]
    val: list[int]
    test: list[int]


def finetune(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Train a classifier and measure it once on the held-out images.

    Args:
        recipe: The run.
        directory: Receives `recipe.json`, `log.jsonl`, `best/`, `last/` and, at the end, `metrics.json`.

    Returns:
        The content of `metrics.json`: `test_top1` and `test_top5` in per cent, of the best checkpoint.

    Raises:
        FileExistsError: The folder holds a finished run.
    """
    if (directory / "metrics.json").exists():
        raise FileExistsError(f"{directory} holds a finished run; choose another folder with --out.")
    images = load_images(recipe.data)
    split = split_images(images, recipe.data)
    set_seed(recipe.train.seed)
    model = _make_model(recipe, images.names)
    write_atomically(directory / "recipe.json", lambda path: path.write_text(dump_recipe(recipe), encoding="utf-8"))

    started = time.perf_counter()
    train = LabelledImages(images, split.train, _train_transform(model, recipe), model.config.in_chans)
    loaders = (
        DataLoader(
            train,
            recipe.train.batch_size,
            shuffle=True,
            drop_last=len(train) > recipe.train.batch_size,
            num_workers=recipe.data.workers,
            collate_fn=collate,
        ),
        evaluation_loader(model, images, split.val, recipe.data.workers),
    )
    best = fit(model, loaders, recipe.train, Run(directory, save_pretrained))
    seconds = time.perf_counter() - started

    chosen = create_model(f"local-dir:{directory / 'best'}", pretrained=True, device=model.cls_token.device)
    test = evaluate(chosen, images, split.test, recipe.data.workers)
    metrics = {
        "test_top1": test.top1,
        "test_top5": test.top5,
        "test_loss": test.loss,
        "test_count": test.count,
        "val_top1": best.top1,
        "seed": recipe.train.seed,
        "split_seed": recipe.data.split_seed,
        "train_seconds": seconds,
    }
    text = json.dumps(metrics, indent=2) + "\n"
    write_atomically(directory / "metrics.json", lambda path: path.write_text(text, encoding="utf-8"))
    return metrics


def evaluate(model: Beit, images: ImageSet, indices: list[int], workers: int = 0) -> Accuracy:
    """Measure the accuracy of a classifier on some images of a set, in the model's precision."""
    return measure_accuracy(model, evaluation_loader(model, images, indices, workers), model.cls_token.device)


def evaluation_loader(model: Beit, images: ImageSet, indices: list[int], workers: int = 0) -> DataLoader[Any]:
    """Load images in order, prepared as the model expects them."""
    transform = create_transform(**resolve_data_config(model))
    dataset = LabelledImages(images, indices, transform, model.config.in_chans)
    return DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=collate)


def load_images(data: DataSection) -> ImageSet:
    """Find the images of a recipe."""
    if data.source == "digits":
        return digits()
    if data.path is None:
        raise RecipeError("data.source is 'folder', but data.path is missing; name the folder of class folders.")
    return labelled_folder(data.path)


def split_images(images: ImageSet, data: DataSection) -> Split:
    """Draw the held-out and the validation images, evenly from all classes."""
    labels = torch.tensor(images.labels)
    everything = list(range(len(labels)))
    rest, test = _draw(everything, labels, data.test_fraction, data.split_seed)
    train, val = _draw(rest, labels[rest], data.val_fraction, data.split_seed)
    return Split(train, val, test)


def _draw(indices: list[int], labels: torch.Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    count = round(len(indices) * fraction)
    try:
        kept, drawn = train_test_split(indices, test_size=count, stratify=labels.numpy(), random_state=seed)
    except ValueError as error:
        raise RecipeError(f"{len(indices)} images cannot be split with a fraction of {fraction}: {error}") from error
    return kept, drawn


def _make_model(recipe: Recipe, names: tuple[str, ...]) -> Beit:
    section = recipe.model
    model = create_model(section.name, section.pretrained, **{**section.overrides, "num_classes": len(names)})
    model.pretrained = replace(model.pretrained, sources=(), num_classes=len(names), labels=names)
    if recipe.train.bias_init_std:
        spread_bias_tables(model, recipe.train.bias_init_std)
    return model


def _train_transform(model: Beit, recipe: Recipe) -> Transform:
    config, augment = resolve_data_config(model), recipe.augment
    if not isinstance(augment, AffineAugment):
        options = augment.model_dump(exclude={"kind"})
        return create_transform(is_training=True, **{**config, **options, "auto_augment": augment.auto_augment or None})
    affine = v2.RandomAffine(
        degrees=augment.rotate,
        translate=(augment.translate, augment.translate),
        scale=(1 - augment.scale, 1 + augment.scale),
        shear=(-augment.shear, augment.shear, -augment.shear, augment.shear),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    resize, *crop_to_tensor = create_transform(**config).transforms  # type: ignore[attr-defined]
    return v2.Compose([resize, affine, *crop_to_tensor])
