"""What a run will cost and whether it can be done: some updates are trained and thrown away, and the disk is tried."""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from beitzoo.errors import FileAccessError, InvalidValueError, OutOfMemoryError, is_out_of_memory
from beitzoo.files import full_path
from beitzoo.training.folder import check_folder
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe
from beitzoo.training.run import Prepare, prepare_task
from beitzoo.training.sections import TrainSection
from beitzoo.training.state import TrainState, start_state
from beitzoo.training.task import Task, compute_loss

# The first update takes longer, since memory is fetched and kernels are chosen; it alone counts if it took so long.
_SHORT = 5.0
# Further updates are measured for this long, but so many at most.
_MEASURED_SECONDS, _MOST_MEASURED = 2.0, 10
# Bytes that are written to learn how fast the disk is.
_TRIED = 2**25


@dataclass(frozen=True)
class UpdateSeconds:
    """What an update takes: to read and augment its images in one process, and to compute with them."""

    loading: float
    computing: float

    def with_workers(self, workers: int) -> float:
        """Return what it takes where so many processes load ahead; with none, one waits for the other."""
        return max(self.loading / workers, self.computing) if workers else self.loading + self.computing


@dataclass(frozen=True)
class Rehearsal:
    """What some updates took, and what follows for the run.

    Attributes:
        task: As the run will have it.
        seconds: Of one update.
        updates: Of the whole run.
        total_seconds: Of the whole run to its last update, with its validations and what it writes.
        may_end_early: Whether the run ends before that once validations find no better model.
        memory: Bytes that were in use at most, with whole weights and moments; None if that is not known.
        disk: Bytes that the folder of the run takes at most, while a state is written.
        shares: Of a run in shards, the bytes of gradients, moments and averages that its processes share out; of
            weights each has all for a while, at the start and in validations.
        processes: That the run has.
    """

    task: Task
    seconds: float
    updates: int
    total_seconds: float
    may_end_early: bool
    memory: int | None
    disk: int
    shares: int = 0
    processes: int = 1

    def describe(self) -> str:
        """Say it in a line."""
        memory = "" if self.memory is None else f", {self.memory / 1e9:.2g} GB of memory{self._less_in_shards()}"
        early = " (less if it ends early, see train.patience)" if self.may_end_early else ""
        return (
            f"An update takes {self.seconds:.2g} s here, so that {self.updates:,} with their validations take about "
            f"{_spelled(self.total_seconds)}{early}{memory} and up to {self.disk / 1e9:.2g} GB of disk."
        )

    def _less_in_shards(self) -> str:
        """Say what a process of a run in shards needs of the memory that was used here by one alone."""
        if not self.shares or self.memory is None:
            return ""
        if self.processes == 1:
            return f" (in shards, {self.shares / 1e9:.2g} of them are shared out among the processes of a run)"
        less = self.shares * (1 - 1 / self.processes)
        return f" here, with all in one process; each of {self.processes} needs {less / 1e9:.2g} GB less"


def rehearse(recipe: Recipe, prepare: Prepare, directory: Path) -> Rehearsal:
    """Train some updates of a run in this process alone; nothing is left, and the run itself begins anew.

    A run in shards is rehearsed with whole weights and moments too: parts can only be computed with where all processes
    do so. What a process of the run needs less is told.

    Args:
        recipe: The run. Of several processes, this one computes its share of an update.
        prepare: Makes the task and its model; all that can be known before a run is checked there.
        directory: The folder that the run would have.

    Raises:
        RecipeError: What the recipe asks for cannot be done.
        RunError: The folder holds another run.
        FileAccessError: Nothing can be written there, or not as much.
        InvalidValueError: No image of these updates can be read.
        OutOfMemoryError: One update does not fit into memory.
    """
    directory = full_path(directory)
    check_folder(directory, recipe)
    task, state, alone = _prepared(recipe, prepare)
    parameters = _bytes(state.model.parameters())
    learned = _bytes(parameter for parameter in state.model.parameters() if parameter.requires_grad)
    saved = parameters * (1 + (state.ema is not None)) + 2 * learned  # a state: with two moments of what is trained
    disk = 2 * (saved + parameters)  # two of them while one is written, `best` and `last`
    in_shards = recipe.run.sharding == "full"
    shares = in_shards * learned * (3 + (state.ema is not None))  # gradients, two moments, the average
    writing = _try_disk(directory, disk)
    update = _measure(task, state, recipe, alone)
    workers, epochs = recipe.run.workers, recipe.train.count_epochs(task.updates_per_epoch)
    # A validation has no backward pass, which takes twice as long as the forward pass.
    forward = UpdateSeconds(update.loading, update.computing / 3).with_workers(workers) / recipe.train.batch_size
    validations, patience = -(-epochs // recipe.train.val_epochs), recipe.train.patience
    measured = validations * len(task.split.val) + len(task.split.test)
    seconds, updates = update.with_workers(workers), state.schedule.updates
    written = (epochs // recipe.run.save_epochs * saved + 2 * epochs * parameters) * writing
    total = updates * seconds + measured * forward + written
    early = 0 < patience < validations - 1  # the first is always the best so far
    count = Processes.join().count
    return Rehearsal(task, seconds, updates, total, early, _memory(alone.device), disk, shares, count)


def measure_update(recipe: Recipe, prepare: Prepare) -> UpdateSeconds:
    """Return how long one update takes here.

    Raises:
        InvalidValueError: None of its images can be read.
        OutOfMemoryError: It does not fit into memory.
    """
    task, state, alone = _prepared(recipe, prepare)
    return _measure(task, state, recipe, alone)


def _prepared(recipe: Recipe, prepare: Prepare) -> tuple[Task, TrainState, Processes]:
    together = Processes.join()
    alone = Processes(0, 1, together.device)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 0})})
    task, model = prepare_task(recipe, Processes(0, together.count, together.device), prepare)
    return task, start_state(task, model, recipe.train, alone), alone


def _measure(task: Task, state: TrainState, recipe: Recipe, processes: Processes) -> UpdateSeconds:
    train = recipe.train
    try:
        taken = list(_updates(task, state, recipe, processes))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        whole = (
            " It was tried with all weights and moments in one process; in shards each has a part of the moments, so "
            "that the run itself may fit: train by the recipe without --dry-run."
        ) * (recipe.run.sharding == "full")
        raise OutOfMemoryError(
            f"One update of {train.batch_size} images does not fit into memory. Set train.accumulation to "
            f"{train.accumulation * 2}, which does it in parts, or train.grad_checkpointing to true.{whole}"
        ) from error
    later = taken[1:] or taken
    return UpdateSeconds(
        statistics.median(each.loading for each in later), statistics.median(each.computing for each in later)
    )


def _updates(task: Task, state: TrainState, recipe: Recipe, processes: Processes) -> Iterator[UpdateSeconds]:
    """Train updates until they tell enough, and yield what each took."""
    started = time.perf_counter()
    for number in range(min(_MOST_MEASURED, state.schedule.updates)):
        yield _update(task, state, recipe, processes, number)
        passed = time.perf_counter() - started
        if passed > _SHORT or (number and passed > _MEASURED_SECONDS):
            return


def _update(task: Task, state: TrainState, recipe: Recipe, processes: Processes, number: int) -> UpdateSeconds:
    train = recipe.train
    model = state.model.train()
    started = time.perf_counter()
    batches = task.batches(number)
    state.schedule.set(state.optimizer, number)
    loading, items = 0.0, 0.0
    for _ in range(train.accumulation):
        before = time.perf_counter()
        batch = next(batches)
        loading += time.perf_counter() - before
        loss, count, _ = compute_loss(task, model, batch, train.precision, processes.device)
        items += float(count)
        if not loss.isfinite():
            raise InvalidValueError(f"The loss is {loss.item()} {_why_not_finite(state, train, number)}")
        state.scaler.scale(loss).backward()
    if not items:
        raise InvalidValueError(
            f"None of {train.batch_size} images to train on can be read; replace them, or leave them out."
        )
    state.scaler.unscale_(state.optimizer)
    if train.clip_grad:
        nn.utils.clip_grad_norm_(state.model.parameters(), train.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    return UpdateSeconds(loading, time.perf_counter() - started - loading)


def _why_not_finite(state: TrainState, train: TrainSection, number: int) -> str:
    """Say when the loss was no number, and what to do."""
    if number == 0:
        return (
            f"before anything is trained, in {train.precision}. Look at the weights that it starts from, or set "
            "train.precision to fp32."
        )
    return (
        f"after {number} of the updates that were tried, with a learning rate of {state.schedule.lr(number - 1):.3g}, "
        f"in {train.precision}. Lower train.lr, or set a longer warm-up, train.clip_grad=1, or train.precision=fp32."
    )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _try_disk(directory: Path, needed: int) -> float:
    """Write something where a run will be, which is gone again; return the seconds that a byte takes."""
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise FileAccessError(
            f"{there} has {free / 1e9:.2g} GB of free space, and the run takes up to {needed / 1e9:.2g}. Free some, or "
            "choose another folder with --out."
        )
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            started = time.perf_counter()
            size = file.write(bytes(min(_TRIED, needed)))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    except OSError as error:
        raise FileAccessError(
            f"Nothing can be written in {there}: {error.strerror or error}. Choose another folder with --out."
        ) from error
    return seconds / size


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
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
