"""Loss and every weight after some updates are those of a plain loop of timm's parts."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from colours import write_colours
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from beitzoo.training.data import Batch
from beitzoo.training.generators import derive_seed, seed_generators
from beitzoo.training.loop import Run, fit
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe
from beitzoo.training.state import start_state
from beitzoo.training.tasks.finetune import FinetuneTask, prepare

ALONE = Processes(0, 1, torch.device("cpu"))
PLAIN = {"train": {}, "task": {}}
ALL = {
    "train": {"accumulation": 2, "ema_decay": 0.9, "clip_grad": 0.5},
    "task": {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.9},
}


def recipe_of(data: Path, options: dict[str, dict[str, Any]]) -> Recipe:
    lengths = {"epochs": 2, "warmup_updates": 2, "batch_size": 4, "lr": 1e-2, "min_lr": 1e-5}
    return Recipe.model_validate(
        {
            "model": {"name": "test_beit", "overrides": {"drop_path_rate": 0.3}},
            "data": {"source": "folder", "path": data, "val_fraction": 0.25},
            "train": {**lengths, "weight_decay": 0.05, "layer_decay": 0.65, "betas": [0.9, 0.98], **options["train"]},
            "run": {"log_updates": 1, "tensorboard": False},
            "task": {"kind": "finetune", "label_smoothing": 0.1, **options["task"]},
        }
    )


def rates(recipe: Recipe, updates: int) -> Iterator[float]:
    """Those of the original, `cosine_scheduler` of `utils.py`."""
    peak, end, warmup = recipe.train.lr, recipe.train.min_lr, recipe.train.warmup_updates
    yield from np.linspace(0, peak, warmup)
    for t in range(updates - warmup):
        yield end + 0.5 * (peak - end) * (1 + np.cos(np.pi * t / (updates - warmup)))


def train_by_timm(
    recipe: Recipe, model: nn.Module, batches: Iterator[Batch], updates: int
) -> tuple[list[float], nn.Module, nn.Module]:
    """Return the losses, the model and its moving average."""
    train, task = recipe.train, recipe.task.model_dump()
    optimizer = create_optimizer_v2(
        model, "adamw", lr=train.lr, weight_decay=0.05, betas=train.betas, layer_decay=train.layer_decay
    )
    average = ModelEmaV3(model, decay=train.ema_decay)
    alphas = {f"{name}_alpha": task[name] for name in ("mixup", "cutmix")}
    mixup = (
        Mixup(**alphas, prob=task["mixup_prob"], label_smoothing=0.1, num_classes=3) if any(alphas.values()) else None
    )
    criterion: nn.Module = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)
    losses = []
    for rate in rates(recipe, updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        parts = []
        for _ in range(train.accumulation):
            batch = next(batches)
            images, targets = batch.images.double(), batch.labels
            if mixup:
                np.random.seed(batch.seed % 2**32)
                images, targets = mixup(images, targets)
            loss: Tensor = criterion(model(images), targets)
            (loss / train.accumulation).backward()
            parts.append(loss.item())
        if train.clip_grad:
            dispatch_clip_grad(model.parameters(), train.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model)
        losses.append(sum(parts) / len(parts))
    return losses, model, average.module


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_training_is_that_of_a_loop_of_timm(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision, with stochastic depth; same weights, images, order, rates and groups."""
    data = write_colours(tmp_path / "data", per_class=12)
    (data / "red" / "0.png").unlink()  # timm takes no batch that a broken image made odd
    recipe = recipe_of(data, options)
    task, model = prepare(recipe, ALONE)
    monkeypatch.setattr(FinetuneTask, "_on_device", lambda _, batch: (batch.images.double(), batch.labels))
    sizes = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    theirs = timm.create_model("beit_base_patch16_224", **sizes, init_values=0.1, drop_path_rate=0.3).double()
    theirs.load_state_dict(model.double().state_dict())

    state = start_state(task, model, recipe.train, ALONE)
    (tmp_path / "out").mkdir()
    fit(task, state, Run(tmp_path / "out", recipe.train, recipe.run, ALONE))
    seed_generators(derive_seed(recipe.train.seed, "process", 0, 0))  # from which stochastic depth draws
    losses, trained, average = train_by_timm(recipe, theirs.train(), task.batches(0), state.update)

    with (tmp_path / "out" / "log.csv").open() as file:
        logged = [float(line["loss"]) for line in csv.DictReader(file) if line["line"] == "updates"]
    assert len(losses) == 8
    assert logged == pytest.approx(losses, rel=1e-6)
    start = prepare(recipe, ALONE)[1].state_dict()
    for name, weight in trained.state_dict().items():
        torch.testing.assert_close(state.model.state_dict()[name], weight, rtol=0, atol=1e-7, msg=name)
        assert not torch.equal(weight.float(), start[name])
        if recipe.train.ema_decay:
            torch.testing.assert_close(
                state.evaluated.state_dict()[name], average.state_dict()[name], rtol=0, atol=1e-7
            )
