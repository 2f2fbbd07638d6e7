"""From a recipe to a finished run."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from beitzoo.evaluation.metrics import measure_accuracy
from beitzoo.factory import create_model
from beitzoo.files import write_text
from beitzoo.images.splits import SPLIT_FILE, draw_split, write_split
from beitzoo.models.beit import Beit
from beitzoo.saving import save_pretrained
from beitzoo.training.data import evaluation_loader, load_images, training_loader
from beitzoo.training.loop import Run, fit, process_state
from beitzoo.training.optim import spread_bias_tables
from beitzoo.training.recipe import Recipe, dump_recipe
from beitzoo.zoo.checkpoints import Classify


def finetune(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Train a classifier and measure it once on the held-out images.

    Args:
        recipe: The run.
        directory: Receives `recipe.json`, `split.csv`, `log.jsonl`, `best/`, `last/` and, at the end, `metrics.json`.

    Returns:
        The content of `metrics.json`: `test_top1` and `test_top5` in per cent, of the best checkpoint. Empty on
        all processes but the first.

    Raises:
        FileExistsError: The folder holds a run, finished or not.
        RecipeError: The data cannot be found or split as the recipe says.
    """
    if (directory / "log.jsonl").exists():
        raise FileExistsError(f"{directory} holds a run; choose another folder with --out, or remove it.")
    images = load_images(recipe.data)
    split = draw_split(images, recipe.data.val_fraction, recipe.data.test_fraction, recipe.data.split_seed)
    set_seed(recipe.train.seed)
    model = _make_model(recipe, images.names)
    state = process_state()
    if state.is_main_process:
        write_text(directory / "recipe.json", dump_recipe(recipe))
        write_split(directory / SPLIT_FILE, images, split)

    started = time.perf_counter()
    loaders = (
        training_loader(model, images, split.train, recipe),
        evaluation_loader(model, images, split.val, recipe.data.workers),
    )
    best = fit(model, loaders, recipe.train, Run(directory, save_pretrained))
    seconds = time.perf_counter() - started

    if not state.is_main_process:
        return {}
    chosen = create_model(f"local-dir:{directory / 'best'}", pretrained=True, device=model.cls_token.device)
    loader = evaluation_loader(chosen, images, split.test, recipe.data.workers)
    test = measure_accuracy(chosen, loader, chosen.cls_token.device)
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
    write_text(directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _make_model(recipe: Recipe, names: tuple[str, ...]) -> Beit:
    section = recipe.model
    overrides: dict[str, Any] = {**section.overrides, "num_classes": len(names)}
    model = create_model(section.name, section.pretrained, **overrides)
    if section.pretrained and model.class_names != names:
        model.reset_classifier(len(names))  # as many classes, but others
    model.pretrained = replace(model.pretrained, sources=(), head=Classify(num_classes=len(names), labels=names))
    if recipe.train.bias_init_std:
        spread_bias_tables(model, recipe.train.bias_init_std)
    return model
