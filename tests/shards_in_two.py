"""A program in which two processes train a small classifier, with whole weights in each and with a part in each.

`python shards_in_two.py OUT [all]` fills `OUT/RUN` with what each of these runs leaves, and `OUT/RANK.pt` with the
weights after its last update, their average and the metrics of the best model, by run. The model is in float64, its
first block is frozen, and nothing is dropped, so that one process can do the same.
"""

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from forks import run_together
from torch import Tensor, nn
from torch.nn import functional as F

import beitzoo
from beitzoo.models.beit import Beit
from beitzoo.training.loop import Run, fit
from beitzoo.training.optim import freeze_up_to, parameter_groups
from beitzoo.training.processes import Processes
from beitzoo.training.sections import RunSection, TrainSection
from beitzoo.training.state import TrainState, restore_state, start_state

ALONE = Processes(0, 1, torch.device("cpu"))
_BATCH = 4
_TRAIN: dict[str, Any] = {
    **{"batch_size": _BATCH, "updates": 4, "lr": 1e-2, "layer_decay": 0.7, "clip_grad": 0.1},
    **{"ema_decay": 0.8, "accumulation": 2},
}
_SAVED = 2  # updates before the state that runs go on from


class Stopped(Exception):
    """A run that was broken off."""


class Drawn:
    """Images and classes that are drawn for each update."""

    images: Any = None
    split: Any = None
    updates_per_epoch = 2
    log_names: tuple[str, ...] = ()
    metric_names = ("val_loss",)

    def __init__(self, train: TrainSection, processes: Processes, last: int) -> None:
        self.train, self.processes, self.last = train, processes, last

    def describe(self) -> list[str]:
        return []

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return parameter_groups(model, self.train)

    def batches(self, update: int) -> Iterator[tuple[Tensor, Tensor]]:
        parts = self.processes.count * self.train.accumulation
        for number in range(update, self.last):
            images, labels = _draw(number)
            for part in range(self.processes.rank, parts, self.processes.count):
                yield images[part::parts], labels[part::parts]
        raise Stopped

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        images, labels = batch
        return F.cross_entropy(model(images).double(), labels), len(images), {}

    def count_images(self, batch: tuple[Tensor, Tensor]) -> int:
        return len(batch[0])

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Each process looks at other images, and not at as many."""
        images, labels = _draw(100)
        ours = slice(0, 3) if self.processes.is_main else slice(3, 4)
        ours = ours if self.processes.count == 2 else slice(0, 4)
        loss = F.cross_entropy(model(images[ours]), labels[ours], reduction="sum")
        return {"val_loss": float(self.processes.sum(loss)) / _BATCH}

    def better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        return metrics["val_loss"] < best["val_loss"]

    def save(self, model: nn.Module, directory: Path) -> None:
        assert isinstance(model, Beit)
        beitzoo.save_pretrained(copy.deepcopy(model).float(), directory)

    def measure_best(self, directory: Path) -> dict[str, float]:
        return {}


def _draw(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number)
    return (
        torch.randn(_BATCH, 3, 32, 32, generator=draw, dtype=torch.float64),
        torch.randint(3, (_BATCH,), generator=draw),
    )


def train(out: Path, processes: Processes, in_shards: bool = False, last: int = _TRAIN["updates"]) -> dict[str, Any]:
    """Train to the end or until it is broken off before the update after the last; go on if there is a state."""
    section = TrainSection(**_TRAIN)
    torch.manual_seed(0)
    model = beitzoo.create_model("test_beit", img_size=32, depth=3, num_classes=3).double()
    freeze_up_to(model, 1)
    task = Drawn(section, processes, last)
    state = start_state(task, model, section, processes, in_shards)
    out.mkdir(exist_ok=True)
    restore_state(state, out, processes, section.seed)
    settings = RunSection(log_updates=1, save_updates=_SAVED, tensorboard=False)
    try:
        fit(task, state, Run(out, section, settings, processes))
    except Stopped:
        return {}
    return _result(state)


def _result(state: TrainState) -> dict[str, Any]:
    assert state.ema is not None
    with state.whole() as average:
        tensors = {"average": copy.deepcopy(average.state_dict())}
    state.ema.module.load_state_dict(state.model.state_dict())
    with state.whole() as model:
        tensors["model"] = copy.deepcopy(model.state_dict())
    moments = sum(
        value.to_local().numel() if hasattr(value, "to_local") else value.numel()
        for values in state.optimizer.state.values()
        for value in values.values()
    )
    return {**tensors, "best": state.best, "moments": moments}


def _train_in_many_ways(out: Path, all_ways: bool) -> None:
    together = Processes.join()
    runs: dict[str, dict[str, Any]] = {"whole": train(out / "whole", together)}
    runs["sharded"] = train(out / "sharded", together, in_shards=True)
    for name, in_shards in {"stopped sharded": True, "stopped whole": False}.items() if all_ways else ():
        train(out / name, together, in_shards, last=_SAVED)
        if together.is_main:
            for way in ("whole", "sharded", "alone"):
                shutil.copytree(out / name, out / f"{name}, {way}")
        together.wait()
        runs[f"{name}, whole"] = train(out / f"{name}, whole", together)
        runs[f"{name}, sharded"] = train(out / f"{name}, sharded", together, in_shards=True)
    if together.is_main:
        runs["alone"] = train(out / "alone", ALONE)
        if all_ways:
            runs["stopped sharded, alone"] = train(out / "stopped sharded, alone", ALONE)
    torch.save(runs, out / f"{together.rank}.pt")


def main(out: str, ways: str = "some") -> None:
    sys.exit(run_together(lambda: _train_in_many_ways(Path(out), ways == "all"), 2))


if __name__ == "__main__":
    main(*sys.argv[1:])
