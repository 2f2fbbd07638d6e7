"""The loop asks any task; here one of a few numbers, whose results can be computed by hand."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beitzoo.images.datasets import ImageSet
from beitzoo.images.splits import Split
from beitzoo.training.loop import Run, fit
from beitzoo.training.processes import Processes
from beitzoo.training.sections import RunSection, TrainSection
from beitzoo.training.state import TrainState, start_state
from beitzoo.training.task import Metrics

ALONE = Processes(0, 1, torch.device("cpu"))


class Numbers:
    """Pulls one weight to numbers; each epoch is two updates."""

    images: ImageSet
    split: Split
    updates_per_epoch = 2
    log_names: tuple[str, ...] = ("distance",)
    metric_names: tuple[str, ...] = ()
    epoch_names: tuple[str, ...] = ("weight", "drawn")

    def __init__(self, parts: list[list[float]], train: TrainSection) -> None:
        self.parts, self.train = parts, train
        self.saved: list[str] = []
        self.epochs: list[int] = []

    def describe(self) -> list[str]:
        return []

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]

    def batches(self, update: int) -> Iterator[Tensor]:
        for part in self.parts[update * self.train.accumulation :]:
            yield torch.tensor(part)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
        distances = model(torch.ones(1, 1)).squeeze() - batch
        return (distances**2).sum() / max(len(batch), 1), len(batch), {"distance": distances.mean()}

    def validate(self, model: nn.Module) -> Metrics:
        return {}

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        raise AssertionError("there is nothing to compare")

    def save(self, model: nn.Module, directory: Path) -> None:
        self.saved.append(directory.name)

    def measure_best(self, directory: Path) -> Metrics:
        return {}

    def end_epoch(self, model: nn.Module, epoch: int, directory: Path) -> Metrics:
        assert not model.training
        self.epochs.append(epoch)
        weight = {"weight": next(model.parameters()).item()}
        return {**weight, "drawn": torch.rand(1).item()} if epoch == 2 else weight


def fitted(
    parts: list[list[float]], directory: Path, **train: object
) -> tuple[Numbers, TrainState, list[dict[str, str]]]:
    section = TrainSection(**{"batch_size": 4, "epochs": 1, "lr": 0.5, **train})
    task = Numbers(parts, section)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    state = start_state(task, model, section, ALONE)
    directory.mkdir(exist_ok=True)
    fit(task, state, Run(directory, section, RunSection(log_updates=1), ALONE))
    with (directory / "log.csv").open() as file:
        return task, state, list(csv.DictReader(file))


def test_the_end_of_an_epoch_is_looked_at(tmp_path: Path) -> None:
    """What is not due leaves its cell empty; without metrics there is one model."""
    task, state, lines = fitted([[1.0]] * 4, tmp_path, epochs=2)
    assert task.epochs == [1, 2]
    assert task.saved == ["best", "best"]
    assert state.best == {}
    epochs = [line for line in lines if line["line"] == "epoch"]
    assert float(epochs[1]["weight"]) == next(state.model.parameters()).item()
    assert epochs[0]["drawn"] == "" != epochs[1]["drawn"]


def test_looking_draws_nothing_from_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted([[1.0]] * 4, tmp_path / "looked", epochs=2)
    after = torch.rand(1)
    monkeypatch.setattr(Numbers, "end_epoch", lambda *_: {})
    fitted([[1.0]] * 4, tmp_path / "not", epochs=2)
    assert torch.equal(after, torch.rand(1))


def test_a_compiled_model_is_saved_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile
    compiled: list[Any] = []

    def compile_by(model: nn.Module) -> Any:
        compiled.append(plain(model, backend="eager"))
        return compiled[-1]

    monkeypatch.setattr(torch, "compile", compile_by)
    _, state, _ = fitted([[1.0]] * 2, tmp_path / "compiled", compile=True)
    _, expected, _ = fitted([[1.0]] * 2, tmp_path / "plain")
    assert len(compiled) == 1
    assert list(state.model.state_dict()) == ["weight"]
    assert torch.equal(state.model.state_dict()["weight"], expected.model.state_dict()["weight"])
