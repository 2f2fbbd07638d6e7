"""One loop: updates, a validation after each epoch, a log, and the best and the last checkpoint."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from beitzoo.evaluation.metrics import Accuracy, measure_accuracy
from beitzoo.training.optim import make_optimizer, make_schedule
from beitzoo.training.recipe import TrainSection

Loaders = tuple[DataLoader[Any], DataLoader[Any]]


@dataclass(frozen=True)
class Run:
    """Where a run writes.

    Attributes:
        directory: Receives `log.jsonl`, `best/` and `last/`.
        save: Writes the model to a folder.
    """

    directory: Path
    save: Callable[[Any, Path], None]


def fit(model: nn.Module, loaders: Loaders, recipe: TrainSection, run: Run) -> Accuracy:
    """Train on the first loader, choose the best epoch by the second; return its validation accuracy.

    Of equally accurate epochs the one with the lower loss is better. Order and augmentation are drawn from
    `recipe.seed`; on several processes (`accelerate launch`) each trains on its share of every epoch.
    """
    process_state()
    accelerator = Accelerator(mixed_precision="no")  # whatever its launcher says, the recipe decides
    set_seed(recipe.seed, device_specific=True)
    training, validation = accelerator.prepare(loaders[0]), loaders[1]
    optimizer = make_optimizer(model, recipe)
    schedule = make_schedule(optimizer, recipe, steps_per_epoch=len(training))
    prepared, optimizer = accelerator.prepare(model, optimizer)

    best: Accuracy | None = None
    update, started = 0, time.perf_counter()
    with (
        (run.directory / "log.jsonl" if accelerator.is_main_process else Path(os.devnull)).open("w") as log,
        tqdm(total=recipe.epochs, unit="epoch", disable=None if accelerator.is_main_process else True) as bar,
    ):
        for epoch in range(1, recipe.epochs + 1):
            total, images = 0.0, 0
            prepared.train()
            for batch in training:
                schedule.step_update(update)
                update += 1
                total += len(batch[1]) * _update(accelerator, prepared, optimizer, batch, recipe)
                images += len(batch[1])
            accuracy = measure_accuracy(prepared, validation, accelerator.device)
            better = best is None or (accuracy.top1, -accuracy.loss) > (best.top1, -best.loss)
            best = accuracy if better else best
            if accelerator.is_main_process:
                row = {"epoch": epoch, "update": update, "train_loss": total / max(images, 1)}
                row |= {f"val_{name}": value for name, value in asdict(accuracy).items()}
                row["seconds"] = time.perf_counter() - started
                print(json.dumps(row), file=log, flush=True)
                for name in ("best", "last") if better else ("last",):
                    run.save(accelerator.unwrap_model(prepared), run.directory / name)
            bar.set_postfix(train_loss=f"{total / max(images, 1):.3f}", val_top1=f"{accuracy.top1:.2f}")
            bar.update()
    accelerator.wait_for_everyone()
    assert best is not None
    return best


def process_state() -> PartialState:
    """Join the processes of a launcher. On a machine without a GPU Accelerate must be told that CPUs are meant."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    recipe: TrainSection,
) -> float:
    """Take one step down the gradient of a batch; return its loss.

    A batch without a readable image takes part with a loss of 0: other processes wait for its gradients.
    """
    # Not Accelerate's autocast, which is one setting for the life of the process and holds in validation too.
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits = model(batch[0])
    if len(batch[1]):
        loss = F.cross_entropy(logits.float(), batch[1], label_smoothing=recipe.label_smoothing)
    else:
        loss = logits.sum()
    accelerator.backward(loss)
    if recipe.clip_grad:
        accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
