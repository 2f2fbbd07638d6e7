"""All that a run needs to go on after it was killed, and its folder on disk."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from beitzoo.errors import UserError
from beitzoo.files import read_text, write_folder, write_text
from beitzoo.training.folder import saved_states
from beitzoo.training.generators import derive_seed, generator_states, restore_generators, seed_generators
from beitzoo.training.norms import share_norms
from beitzoo.training.optim import Schedule, freeze_unused, make_optimizer
from beitzoo.training.processes import Processes
from beitzoo.training.sections import TrainSection
from beitzoo.training.sharding import filled, gathered, outline, parted, shard
from beitzoo.training.tally import Means
from beitzoo.training.task import CountsItems, Metrics, Task
from beitzoo.weights.checkpoint import save_pickle

_TENSORS, _GENERATORS, _PROGRESS = "tensors.pt", "generators.pt", "progress.json"


class StateError(UserError, ValueError):
    """A saved state that cannot be gone on from."""


@dataclass
class TrainState:
    """A run between two updates.

    The learning rate, the order of the images and their augmentation are pure functions of `update`, so it is all that
    is needed of them. Stochastic depth draws from the global generators, whose states are saved.

    Attributes:
        model: The network, not wrapped for several processes.
        optimizer: Over the parameters of the model.
        schedule: Of its learning rates and weight decays.
        scaler: Of the loss, for fp16; otherwise it does nothing.
        ema: Moving average of the weights, if the recipe wants one.
        update: Updates done.
        best: Metrics of the best model so far.
        stale: Validations since then, none of which was better.
        line: Means since the last line of the log.
        epoch: Means since the start of the epoch.
        seconds: Time spent on the updates done.
        counts: What the task has counted in this process.
        empty: The model without weights, if the processes have them in shards.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    update: int = 0
    best: Metrics | None = None
    stale: int = 0
    line: Means = field(default_factory=Means)
    epoch: Means = field(default_factory=Means)
    seconds: float = 0.0
    counts: dict[str, Tensor] = field(default_factory=dict)
    empty: nn.Module | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The model to validate and save; of one in shards the parts, see `whole`."""
        return self.model if self.ema is None else self.ema.module

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """While it is entered, give the model to validate and save with all its weights; all processes call this."""
        if self.empty is None:
            yield self.evaluated
            return
        with filled(self.empty, self.evaluated) as model:
            yield model


def start_state(
    task: Task, model: nn.Module, train: TrainSection, processes: Processes, in_shards: bool = False
) -> TrainState:
    """Make the state before the first update, and seed the global generators, differently in each process.

    Args:
        task: What is trained.
        model: Its network, which is changed in place.
        train: How it is trained.
        processes: Those that train together.
        in_shards: Let several processes share weights, gradients, moments and averages out among them.
    """
    model.to(processes.device)
    freeze_unused(model)
    share_norms(model, processes)
    in_shards = in_shards and processes.count > 1
    empty = outline(model) if in_shards else None
    # Averages in shards are moved one by one, as PyTorch moves no list of which some are in shards and some are not.
    ema = ModelEmaV3(model, decay=train.ema_decay, foreach=not in_shards) if train.ema_decay else None
    if in_shards:
        for network in (model, *([] if ema is None else [ema.module])):
            shard(network, processes)
    optimizer = make_optimizer(task.parameter_groups(model), train)
    _seed_process(train.seed, processes, update=0)
    return TrainState(
        model=model,
        optimizer=optimizer,
        schedule=Schedule(train, task.updates_per_epoch),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=train.precision == "fp16"),
        ema=ema,
        counts=task.counts if isinstance(task, CountsItems) else {},
        empty=empty,
    )


def _seed_process(seed: int, processes: Processes, update: int) -> None:
    """Seed the generators of this process, from which stochastic depth is drawn."""
    seed_generators(derive_seed(seed, "process", processes.rank, update))
    if processes.device.type != "cpu":
        module = torch.get_device_module(processes.device)
        module.manual_seed(derive_seed(seed, "device", processes.rank, update))


def save_state(
    state: TrainState, directory: Path, processes: Processes, generators: dict[str, Any] | None = None
) -> None:
    """Save a state as a new folder; older ones stay until it is on disk. All processes call this.

    Args:
        state: Is the same in all processes.
        directory: Receives `state-N` for N updates.
        processes: Those that train together.
        generators: States of this process's generators, if they are not the present ones.
    """
    by_rank = processes.gather(generators or generator_states(processes.device))
    counts = {name: processes.sum(count.clone()) for name, count in state.counts.items()}
    tensors = gathered(_tensors(state), processes.is_main)
    if not processes.is_main:
        return

    def write(folder: Path) -> None:
        save_pickle({**tensors, "counts": counts}, folder / _TENSORS)
        save_pickle({"by_rank": by_rank}, folder / _GENERATORS)
        write_text(folder / _PROGRESS, json.dumps(_progress(state), indent=2) + "\n")

    *older, last = [*saved_states(directory), directory / f"state-{state.update}"]
    if last not in older:
        write_folder(last, write)
    for folder in older:
        if folder != last:
            shutil.rmtree(folder)


def restore_state(state: TrainState, directory: Path, processes: Processes, seed: int) -> bool:
    """Set a state to the last one that was saved; False if there is none.

    The generators are those of each process, unless there are more or fewer processes than before: then they are
    seeded anew, and only stochastic depth is drawn otherwise than it would have been.

    Raises:
        StateError: It is damaged, or some of the processes do not see it.
    """
    found = saved_states(directory)
    names = processes.gather(found[-1].name if found else None)
    if len(set(names)) > 1:
        raise StateError(f"Not all processes see the same {directory}; give --out a folder that all machines share.")
    if not found:
        return False
    try:
        progress = json.loads(read_text(found[-1] / _PROGRESS))
        tensors = torch.load(found[-1] / _TENSORS, map_location="cpu", weights_only=True)
        generators = read_generators(directory)
    except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
        raise StateError(f"{found[-1]} is damaged ({error}); remove it and start again.") from error
    _restore_tensors(state, tensors)
    for name, count in state.counts.items():
        count.copy_(tensors["counts"][name] * processes.is_main)
    state.update, state.best, state.seconds = progress["update"], progress["best"], progress["seconds"]
    state.stale = progress.get("stale", 0)
    state.line, state.epoch = Means(**progress["line"]), Means(**progress["epoch"])
    if len(generators) == processes.count:
        restore_generators(generators[processes.rank], processes.device)
    else:
        _seed_process(seed, processes, state.update)
    return True


def read_generators(directory: Path) -> list[dict[str, Any]]:
    """Read the states of the generators of each process, by rank, from the last saved state."""
    return torch.load(saved_states(directory)[-1] / _GENERATORS, weights_only=True)["by_rank"]


def _tensors(state: TrainState) -> dict[str, Any]:
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": None if state.ema is None else state.ema.module.state_dict(),
    }


def _restore_tensors(state: TrainState, tensors: dict[str, Any]) -> None:
    _restore_weights(state.model, tensors["model"])
    _restore_optimizer(state.optimizer, tensors["optimizer"])
    state.scaler.load_state_dict(tensors["scaler"])
    if state.ema is not None:
        _restore_weights(state.ema.module, tensors["ema"])


def _restore_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict({name: parted(tensor, own.get(name)) for name, tensor in tensors.items()})


def _restore_optimizer(optimizer: torch.optim.Optimizer, document: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: parted(tensor, parameters[index]) for name, tensor in state.items()}
        for index, state in document["state"].items()
    }
    optimizer.load_state_dict({**document, "state": moments})


def _progress(state: TrainState) -> dict[str, Any]:
    values = {"update": state.update, "best": state.best, "stale": state.stale, "seconds": state.seconds}
    return {**values, "line": asdict(state.line), "epoch": asdict(state.epoch)}
