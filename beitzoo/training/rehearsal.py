"""What a run will cost and whether it can be done: one update is trained and thrown away, and the disk is looked at."""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from beitzoo.errors import FileAccessError, OutOfMemoryError, is_out_of_memory
from beitzoo.files import full_path
from beitzoo.training.folder import check_folder
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe
from beitzoo.training.run import Prepare, prepare_task
from beitzoo.training.state import TrainState, start_state
from beitzoo.training.task import Task, compute_loss

# The first update takes longer, since memory is fetched and kernels are chosen; it is done again if that is not long.
_SHORT = 5.0


@dataclass(frozen=True)
class Rehearsal:
    """What one update took, and what follows for the run.

    Attributes:
        seconds: Of one update, with reading and augmenting its images in this process.
        updates: Of the whole run.
        total_seconds: Of the whole run, with its validations; early stopping may make it shorter.
        memory: Bytes that were in use at most; None if that is not known.
        disk: Bytes that the folder of the run takes at most, while a state is written.
    """

    seconds: float
    updates: int
    total_seconds: float
    memory: int | None
    disk: int

    def describe(self) -> str:
        """Say it in a line."""
        memory = "" if self.memory is None else f", {self.memory / 1e9:.2g} GB of memory"
        return (
            f"An update takes {self.seconds:.2g} s here, so that {self.updates:,} with their validations take about "
            f"{_spelled(self.total_seconds)}{memory} and up to {self.disk / 1e9:.2g} GB of disk."
        )


def rehearse(recipe: Recipe, prepare: Prepare, directory: Path) -> Rehearsal:
    """Train one update of a run in this process alone; nothing is written, and the run itself begins anew.

    Args:
        recipe: The run.
        prepare: Makes the task and its model; all that can be known before a run is checked there.
        directory: The folder that the run would have.

    Raises:
        RecipeError: What the recipe asks for cannot be done.
        RunError: The folder holds another run.
        FileAccessError: Nothing can be written there, or not as much.
        OutOfMemoryError: One update does not fit into memory.
    """
    directory = full_path(directory)
    check_folder(directory, recipe)
    task, state, alone = _prepared(recipe, prepare)
    disk = _check_disk(directory, state)
    seconds = _seconds(task, state, recipe, alone)
    updates, train = state.schedule.updates, recipe.train
    # A validation has no backward pass, which takes twice as long as the forward pass.
    image = seconds / train.batch_size / 3
    validations = -(-train.count_epochs(task.updates_per_epoch) // train.val_epochs)
    measured = (validations * len(task.split.val) + len(task.split.test)) * image
    return Rehearsal(seconds, updates, updates * seconds + measured, _memory(alone.device), disk)


def update_seconds(recipe: Recipe, prepare: Prepare) -> float:
    """Return how long one update takes here, with reading and augmenting its images in this process.

    Raises:
        OutOfMemoryError: It does not fit into memory.
    """
    task, state, alone = _prepared(recipe, prepare)
    return _seconds(task, state, recipe, alone)


def _prepared(recipe: Recipe, prepare: Prepare) -> tuple[Task, TrainState, Processes]:
    alone = Processes(0, 1, Processes.join().device)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 0})})
    task, model = prepare_task(recipe, alone, prepare)
    return task, start_state(task, model, recipe.train, alone), alone


def _seconds(task: Task, state: TrainState, recipe: Recipe, processes: Processes) -> float:
    train = recipe.train
    try:
        seconds = _update(task, state, recipe, processes)
        return seconds if seconds > _SHORT else min(seconds, _update(task, state, recipe, processes))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"One update of {train.batch_size} images does not fit into memory. Set train.accumulation to "
            f"{train.accumulation * 2}, which does it in parts, or train.grad_checkpointing to true."
        ) from error


def _update(task: Task, state: TrainState, recipe: Recipe, processes: Processes) -> float:
    train = recipe.train
    model = state.model.train()
    started = time.perf_counter()
    batches = task.batches(0)
    for _ in range(train.accumulation):
        loss, _, _ = compute_loss(task, model, next(batches), train.precision, processes.device)
        state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _check_disk(directory: Path, state: TrainState) -> int:
    """Return how much disk a run takes at most: `best`, `last`, and two states with two moments of each parameter."""
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in state.model.parameters())
    needed = parameters * (2 + 2 * (3 + (state.ema is not None)))
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise FileAccessError(f"Nothing can be written in {there}. Choose another folder with --out.")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise FileAccessError(
            f"{there} has {free / 1e9:.2g} GB of free space, and the run takes up to {needed / 1e9:.2g}. Free some, or "
            "choose another folder with --out."
        )
    return needed


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource  # where there is none, as on Windows, it is not known
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _spelled(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
