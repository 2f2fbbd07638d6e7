"""The loop asks any task; here one of a few numbers, whose results can be computed by hand."""

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from beitzoo.images.datasets import ImageSet
from beitzoo.images.splits import Split
from beitzoo.training import loop
from beitzoo.training.loop import Run, fit
from beitzoo.training.processes import Processes
from beitzoo.training.sections import RunSection, TrainSection
from beitzoo.training.state import TrainState, restore_state, start_state
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
        return (distances**2).mean(), len(batch), {"distance": distances.mean()}

    def count_images(self, batch: Tensor) -> int:
        return 2 * len(batch)

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


Lines = list[dict[str, str]]


def fitted(
    parts: list[list[float]], directory: Path, update: int = 0, kind: type[Numbers] = Numbers, **train: object
) -> tuple[Numbers, TrainState, Lines]:
    length = {} if "updates" in train else {"epochs": 1}
    section = TrainSection(**{"batch_size": 4, "lr": 0.5, **length, **train})
    task = kind(parts, section)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    state = start_state(task, model, section, ALONE)
    state.update = update
    directory.mkdir(exist_ok=True)
    fit(task, state, Run(directory, section, RunSection(log_updates=1), ALONE))
    with (directory / "log.csv").open() as file:
        return task, state, list(csv.DictReader(file))


def test_items_weigh_the_same_wherever_they_are(tmp_path: Path) -> None:
    """In parts of an update, in the updates of a line, in the lines of an epoch; computed by hand."""
    parts = [[1.0], [2.0, 3.0, 6.0], [5.0, 5.0], [1.0, 1.0]]
    _, state, lines = fitted(parts, tmp_path, accumulation=2, weight_decay=0.5, weight_decay_end=0.1, lr=0.25)
    first, second, epoch = lines
    numbers = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert float(first["loss"]) == pytest.approx((numbers**2).mean().item())
    assert float(first["distance"]) == pytest.approx(-3)
    assert float(first["grad_norm"]) == pytest.approx(6)  # of the mean square: twice the mean distance
    weight = float(first["lr"])  # the first step of AdamW is one learning rate
    numbers = weight - torch.tensor([5.0, 5.0, 1.0, 1.0])
    assert float(second["loss"]) == pytest.approx((numbers**2).mean().item())
    assert float(second["grad_norm"]) == pytest.approx(2 * numbers.mean().abs().item())
    for name in ("loss", "grad_norm"):
        assert float(epoch[name]) == pytest.approx((float(first[name]) + float(second[name])) / 2)
    assert [float(line["weight_decay"]) for line in lines] == pytest.approx([0.5, 0.3, 0.3])
    assert float(second["lr"]) == pytest.approx(0.125)
    assert next(state.model.parameters()).item() > weight


def test_reading_sooner_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in long lines, since what updates start from is kept until they are read."""
    _, _, lines = fitted([[1.0], [2.0]], tmp_path / "line")
    monkeypatch.setattr(loop, "_UNREAD", 1)
    _, _, sooner = fitted([[1.0], [2.0]], tmp_path / "sooner")
    names = ("line", "update", "loss", "grad_norm", "distance", "weight")
    assert [[line[name] for name in names] for line in sooner] == [[line[name] for name in names] for line in lines]


def test_the_norm_is_that_before_clipping(tmp_path: Path) -> None:
    _, _, lines = fitted([[4.0], [4.0]], tmp_path, clip_grad=1.0)
    assert float(lines[0]["grad_norm"]) == pytest.approx(8)


def test_the_log_says_how_long_it_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Numbers.batches

    def slow(self: Numbers, update: int) -> Iterator[Tensor]:
        for batch in plain(self, update):
            time.sleep(0.3)
            yield batch

    monkeypatch.setattr(Numbers, "batches", slow)
    _, _, lines = fitted([[1.0]] * 2, tmp_path)
    assert 0.5 < float(lines[1]["wait_share"]) < 1
    assert 2 / 0.3 * 0.5 < float(lines[1]["images_per_sec"]) < 2 / 0.3


@pytest.mark.parametrize("later", [0, -1, 1])
def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int) -> None:
    """Of a run that goes on, no step twice: the updates after its last state are done again.

    So it is if it goes on within the same second, which names of event files do not order, and if the clock is behind.
    """
    for turn, update in enumerate((0, 1, 3, 2)):
        monkeypatch.setattr(time, "time", lambda turn=turn: 2e9 + later * turn)
        _, _, lines = fitted([[1.0]] * 4, tmp_path, update=update, epochs=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lr", "weight_decay", "grad_norm", "distance", "wait_share"):
        points = events.Scalars(f"updates/{name}")
        assert [point.step for point in points] == [1, 2, 3, 4]
        expected = [float(line[name]) for line in lines if line["line"] == "updates"]
        assert [point.value for point in points] == pytest.approx(expected, abs=1e-6)
    assert [point.step for point in events.Scalars("epoch/weight")] == [2, 4]
    assert [point.step for point in events.Scalars("epoch/drawn")] == [4]


def test_the_end_of_an_epoch_is_looked_at(tmp_path: Path) -> None:
    """What is not due leaves its cell empty; without metrics there is one model."""
    task, state, lines = fitted([[1.0]] * 4, tmp_path, epochs=2)
    assert task.epochs == [1, 2]
    assert task.saved == ["best", "best"]
    assert state.best == {}
    epochs = [line for line in lines if line["line"] == "epoch"]
    assert float(epochs[1]["weight"]) == next(state.model.parameters()).item()
    assert epochs[0]["drawn"] == "" != epochs[1]["drawn"]


class Measured(Numbers):
    """Also has validations, each worse than the one before, and counts its updates."""

    metric_names = ("val_number",)

    def __init__(self, parts: list[list[float]], train: TrainSection) -> None:
        super().__init__(parts, train)
        self.counts = {"updates": torch.zeros((), dtype=torch.int64)}
        self.taken: list[int] = []
        self.validations = 0

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
        self.counts["updates"] += 1
        return super().loss(model, batch)

    def take_counts(self) -> None:
        self.taken.append(int(self.counts["updates"]))
        self.counts["updates"].zero_()

    def validate(self, model: nn.Module) -> Metrics:
        self.validations += 1
        return {"val_number": float(self.validations)}

    def better(self, metrics: Metrics, best: Metrics) -> bool:
        return metrics["val_number"] < best["val_number"]


def test_a_run_of_updates_ends_within_an_epoch(tmp_path: Path) -> None:
    """Its end is that of an epoch: a line, the models, a validation, a state; rates go over all updates."""
    task, state, lines = fitted([[1.0]] * 9, tmp_path, updates=5, kind=Measured, lr=0.25, schedule="poly", min_lr=0.05)
    assert state.update == 5
    assert [(line["line"][0], line["epoch"], line["update"]) for line in lines] == [
        *(("u", "1", "1"), ("u", "1", "2"), ("e", "1", "2"), ("u", "2", "3"), ("u", "2", "4"), ("e", "2", "4")),
        *(("u", "3", "5"), ("e", "3", "5")),
    ]
    assert [float(line["lr"]) for line in lines if line["line"] == "updates"] == pytest.approx(
        [0.25, 0.21, 0.17, 0.13, 0.09]
    )
    assert lines[-1]["loss"] == lines[-2]["loss"] != ""
    assert [line["val_number"] for line in lines if line["line"] == "epoch"] == ["1.0", "2.0", "3.0"]
    assert task.epochs == [1, 2, 3]
    assert task.saved == ["best", "last", "last", "last"]
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-5"]


@pytest.mark.parametrize("length", [{"epochs": 5}, {"updates": 9}])
def test_validations_are_only_those_that_are_due(tmp_path: Path, length: dict[str, int]) -> None:
    """Those in between leave their cells empty and write the last model; all else is done each epoch."""
    task, state, lines = fitted([[1.0]] * 10, tmp_path, kind=Measured, val_epochs=2, **length)
    assert isinstance(task, Measured)
    epochs = [line for line in lines if line["line"] == "epoch"]
    assert [line["val_number"] for line in epochs] == ["", "1.0", "", "2.0", "3.0"]
    assert all(line["loss"] and line["weight"] for line in epochs)
    assert task.saved == ["last", "best", "last", "last", "last", "last"]
    assert state.best == {"val_number": 1.0}
    assert task.epochs == [1, 2, 3, 4, 5]
    assert task.taken == [2, 2, 2, 2, 2 if "epochs" in length else 1]


class Scored(Measured):
    """Whose validations give these numbers; smaller ones are better."""

    scores = (3.0, 2.0, 2.0, 1.0, 1.0, 4.0, 0.0, 0.0)

    def validate(self, model: nn.Module) -> Metrics:
        self.validations += 1
        return {"val_number": self.scores[self.validations - 1]}


@pytest.mark.parametrize(("patience", "last"), [(2, 6), (0, 8)])
def test_a_run_ends_when_patience_does(tmp_path: Path, patience: int, last: int) -> None:
    """Its best model is what it was, its end is saved, and its rates are those of a run to the end."""
    task, state, lines = fitted([[1.0]] * 16, tmp_path, kind=Scored, epochs=8, patience=patience)
    epochs = [line for line in lines if line["line"] == "epoch"]
    assert [line["val_number"] for line in epochs] == [str(score) for score in Scored.scores[:last]]
    assert state.best == {"val_number": min(Scored.scores[:last])}
    assert state.update == 2 * last
    assert task.saved.count("best") == len(set(np.minimum.accumulate(Scored.scores[:last])))
    assert [path.name for path in tmp_path.glob("state-*")] == [f"state-{2 * last}"]
    rates = [float(line["lr"]) for line in lines if line["line"] == "updates"]
    _, _, whole = fitted([[1.0]] * 16, tmp_path / "whole", epochs=8)
    assert rates == [float(line["lr"]) for line in whole if line["line"] == "updates"][: 2 * last]


def test_patience_counts_validations_only(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": Scored, "epochs": 8, "val_epochs": 2, "patience": 1}
    _, state, lines = fitted([[1.0]] * 16, tmp_path / "out", **options)
    assert [line["val_number"] for line in lines if line["line"] == "epoch"] == ["", "3.0", "", "2.0", "", "2.0"]
    assert (state.update, state.stale) == (12, 1)


def test_patience_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was broken off, and of one whose patience is at its end."""
    section = TrainSection(batch_size=4, lr=0.5, epochs=8, patience=3)
    run = Run(tmp_path, section, RunSection(log_updates=1), ALONE)

    def gone_on(*scores: float) -> TrainState:
        monkeypatch.setattr(Scored, "scores", scores)
        task = Scored([[1.0]] * 16, section)
        state = start_state(task, nn.Linear(1, 1, bias=False), section, ALONE)
        restore_state(state, tmp_path, ALONE, section.seed)
        fit(task, state, run)
        return state

    with pytest.raises(IndexError):  # there is no fourth score
        gone_on(3.0, 4.0, 4.0)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-6"]
    state = gone_on(3.0, 0.0)
    assert (state.update, state.stale, state.best) == (8, 3, {"val_number": 3.0})
    again = gone_on()
    assert (again.update, again.stale, again.best) == (8, 3, {"val_number": 3.0})


def test_without_metrics_each_last_model_is_the_best(tmp_path: Path) -> None:
    task, state, _ = fitted([[1.0]] * 6, tmp_path, updates=5, val_epochs=4)
    assert task.saved == ["best", "best", "best"]
    assert state.best == {}


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
