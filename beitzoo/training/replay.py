"""What a run failed by, done again alone: whether it fails again, and where numbers end to be finite.

It is an update, or the validation of the state after one.
"""

import math
import pickle
import pydoc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.files import full_path
from beitzoo.training.failure import FAILED, Start, moved_names
from beitzoo.training.folder import RECIPE, RunError
from beitzoo.training.generators import restore_generators
from beitzoo.training.norms import has_batch_norms
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import read_resolved
from beitzoo.training.run import Prepare, prepare_task
from beitzoo.training.sections import TrainSection
from beitzoo.training.state import TrainState, read_generators, restore_state, start_state
from beitzoo.training.task import Metrics, Task, compute_loss


@dataclass(frozen=True)
class Replay:
    """What an update gave when it was done again.

    Attributes:
        update: Its number, from 1.
        loss: Mean over all items of all processes.
        items: How many these were.
        module: The first module whose output was not finite, with the process and the batch; None if there was none.
        gradients: Names of the parameters whose gradient is not finite.
        apart: Whether batch norms went over each process's images alone; in the run they went over those of all.
    """

    update: int
    loss: float
    items: float
    module: str | None
    gradients: tuple[str, ...]
    apart: bool = False

    @property
    def failed(self) -> bool:
        """Whether it failed again."""
        return bool(self.gradients) or not torch.tensor(self.loss).isfinite()

    def describe(self) -> list[str]:
        """Say it in lines."""
        first = f", the first of {self.gradients[0]}" if self.gradients else ""
        return [
            f"Update {self.update:,}: a loss of {self.loss:.6g} over {self.items:,.0f} items.",
            f"The first output that is not finite: {self.module or 'none'}.",
            f"Gradients that are not finite: those of {len(self.gradients):,} parameters{first}.",
            *(["Batch norms went over the images of each process alone, not over all as in the run."] * self.apart),
            _verdict(self.failed),
        ]


@dataclass(frozen=True)
class Remeasured:
    """What the validation of a state gave when it was done again.

    Attributes:
        update: Updates the state has had.
        metrics: Of the validation.
        module: The first module whose output was not finite; None if there was none.
        weights: Names of the parameters that are not finite.
    """

    update: int
    metrics: Metrics
    module: str | None
    weights: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether it failed again."""
        return bool(self.weights) or not all(map(math.isfinite, self.metrics.values()))

    def describe(self) -> list[str]:
        """Say it in lines."""
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items())
        first = f", the first of them {self.weights[0]}" if self.weights else ""
        return [
            f"Validation after update {self.update:,}: {metrics or 'nothing is measured'}.",
            f"The first output that is not finite: {self.module or 'none'}.",
            f"Weights that are not finite: those of {len(self.weights):,} parameters{first}.",
            _verdict(self.failed),
        ]


def _verdict(failed: bool) -> str:
    return "It fails again." if failed else "It does not fail here; the machine or the versions are others."


def replay(directory: Path, prepare: Prepare) -> Replay | Remeasured:
    """Do the update or the validation again by which a run failed, by one process for all; nothing is written.

    Args:
        directory: The folder of the run, with `failed/`.
        prepare: Makes the task of the run and its model.

    Raises:
        RunError: The run did not fail, or what it left cannot be read.
    """
    directory = full_path(directory)
    failed = directory / FAILED
    if not failed.is_dir():
        raise RunError(f"{directory} holds no {FAILED}/, which a run leaves whose loss is not finite; name such a run.")
    recipe = read_resolved(directory / RECIPE)
    processes = Processes.join()
    if processes.count > 1:
        raise RunError("An update is done again by one process, whatever the run had; start the command by itself.")
    task, model = prepare_task(recipe, processes, prepare)
    state = start_state(task, model, recipe.train, processes)
    if not restore_state(state, failed, processes, recipe.train.seed):
        raise RunError(f"{failed} holds no state; it was not written to its end. Run the recipe again.")
    state.schedule.set(state.optimizer, state.update)
    if _read_batches(failed / "batches-0.pt") is None:
        return _remeasure(task, state)
    return _replay(task, state, recipe.train, failed, processes.device)


def _remeasure(task: Task, state: TrainState) -> Remeasured:
    model = state.evaluated.eval()
    outputs = _Outputs(model)
    outputs.where = "validation"
    metrics = task.validate(model)
    weights = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    return Remeasured(state.update, metrics, outputs.found, tuple(weights))


def _replay(task: Task, state: TrainState, train: TrainSection, failed: Path, device: torch.device) -> Replay:
    outputs = _Outputs(state.model)
    model: Any = torch.compile(state.model.train()) if train.compile else state.model.train()
    items = total = 0.0
    start = Start.of(state.model, moved_names(state.model), device)
    by_rank = read_generators(failed)
    for rank, generators in enumerate(by_rank):
        start.restore(state.model)  # each process began with the same
        restore_generators(generators, device)
        for number, batch in enumerate(_read_batches(failed / f"batches-{rank}.pt") or [], 1):
            outputs.where = f"process {rank}, batch {number}"
            loss, count, _ = compute_loss(task, model, batch, train.precision, device)
            (loss * count).backward()
            items += float(count)
            total += float(loss.detach().float() * count)
    parameters = state.model.named_parameters()
    gradients = [name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
    apart = len(by_rank) > 1 and has_batch_norms(state.model)
    return Replay(state.update + 1, total / max(items, 1.0), items, outputs.found, tuple(gradients), apart)


class _Outputs:
    """Looks at the output of every module until one is not finite; a compiled model does not tell."""

    def __init__(self, model: nn.Module) -> None:
        self.where = ""
        self.found: str | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _module, _inputs, output, name=name: self._look(name, output))

    def _look(self, name: str, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if self.found is None and any(isinstance(one, Tensor) and not one.isfinite().all() for one in tensors):
            self.found = f"{name or 'the whole network'} ({self.where})"


def _read_batches(path: Path) -> list[Any] | None:
    """Read the batches of a process, or None if it was a validation that failed.

    Of beitzoo's own types only those are made that are plain tuples.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        types = [pydoc.locate(name) for name in names if name.startswith("beitzoo.")]
        tuples: list[Any] = [kind for kind in types if isinstance(kind, type) and issubclass(kind, tuple)]
        with torch.serialization.safe_globals(tuples):
            return torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} cannot be read ({error}). Run the recipe again.") from error
