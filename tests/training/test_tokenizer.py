"""Tokenizer training: loss and codebook are those of a plain reference; restarts change nothing."""

import csv
import json
from pathlib import Path

import torch
from colours import write_colours

from beitzoo.factory import create_tokenizer
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe
from beitzoo.training.tasks.tokenizer import TokenizerTask, prepare, train_tokenizer

ALONE = Processes(0, 1, torch.device("cpu"))


def tokenizer_recipe(data: Path, task: dict[str, object] | None = None, **train: object) -> Recipe:
    """A run on a folder of colours; keywords change its `train` section."""
    return Recipe.model_validate(
        {
            "model": {"name": "test_vqkd", "overrides": {"vocab_size": 16}},
            "data": {"source": "folder", "path": data, "val_fraction": 0.25},
            "train": {"epochs": 2, "batch_size": 6, "lr": 2e-3, "clip_grad": 1.0, **train},
            "run": {"log_updates": 2},
            "task": {"kind": "tokenizer", "teacher": "pixels", **(task or {})},
        }
    )


def prepared(recipe: Recipe) -> TokenizerTask:
    task, model = prepare(recipe, ALONE)
    model.train()
    return task


def one_update(task: TokenizerTask) -> list[torch.Tensor]:
    """Do what the loop does in the first update, but for the step; return the images."""
    batches = task.batches(0)
    images = []
    for _ in range(task.recipe.train.accumulation):
        batch = next(batches)
        task.loss(task.model, batch)[0].backward()
        images.append(batch.images)
    return images


def test_a_run_learns_and_says_how_well(tmp_path: Path) -> None:
    recipe = tokenizer_recipe(write_colours(tmp_path / "data"), epochs=6)
    metrics = train_tokenizer(recipe, tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as file:
        epochs = [row for row in csv.DictReader(file) if row["line"] == "epoch"]
    losses = [float(row["val_loss"]) for row in epochs]
    assert len(epochs) == 6
    assert losses[-1] < 0.7 * losses[0]
    assert all(1 <= float(row["perplexity"]) <= float(row["codes_used"]) <= 16 for row in epochs)
    assert metrics["val_loss"] == min(losses)
    best = create_tokenizer(tmp_path / "run" / "best", pretrained=True)
    assert best.decodes_to == "pixels"
    decoded = best.decode(best.encode(torch.rand(2, 3, 64, 64)))
    assert decoded.shape == (2, 3, 64, 64)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
