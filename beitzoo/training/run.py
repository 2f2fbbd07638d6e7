"""A run: from a recipe and a folder to the metrics of the best model; the same for every task."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beitzoo.errors import OutOfMemoryError, UserError, is_out_of_memory
from beitzoo.factory import look_up
from beitzoo.files import full_path, write_text
from beitzoo.images.splits import SPLIT_FILE, read_split, write_split
from beitzoo.results import environment
from beitzoo.training.failure import FAILED
from beitzoo.training.folder import BEST, METRICS, RECIPE, RunError, claimed, saved_states
from beitzoo.training.loop import Run, fit
from beitzoo.training.memory import check_weights_fit
from beitzoo.training.norms import has_batch_norms
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError, dump_recipe
from beitzoo.training.report import can_draw, describe_pictures, draw_run
from beitzoo.training.sections import ModelSection, TrainSection
from beitzoo.training.state import TrainState, restore_state, start_state
from beitzoo.training.task import Answering, Task
from beitzoo.zoo.networks import BeitConfig, override

# How many times as long as its moving average a run should be, at least.
_FEWEST_AVERAGES = 2

Prepare = Callable[[Recipe, Processes], tuple[Task, nn.Module]]


def run(recipe: Recipe, directory: Path, prepare: Prepare) -> dict[str, Any]:
    """Train by a recipe, and measure the best model once at the end.

    A run that was interrupted goes on where its last state was saved, if the folder and the recipe are the same.

    Args:
        recipe: The run.
        directory: Receives `recipe.toml`, `split.csv`, `log.csv`, `tensorboard/`, `best/`, `last/` and, at the end,
            `metrics.json` and pictures, see `report`. Without a validation there is no `last/`; the last model is the
            best then.
        prepare: Makes the task and its model; all that can be known before a run is checked there.

    Returns:
        The content of `metrics.json`. Empty on all processes but the first.

    Raises:
        RunError: The folder holds a finished run, or one of another recipe or other images.
        RecipeError: What the recipe asks for cannot be done. Nothing has been written then.
        Interrupted: A signal asked the run to stop; its state was saved.
        OutOfMemoryError: A part of an update does not fit into memory.
        NonFiniteError: The loss is not finite any more. What is needed to do its update again is in `failed/`.
    """
    directory = full_path(directory)
    processes = Processes.join()
    task, model = prepare_task(recipe, processes, prepare)
    with claimed(directory, recipe, processes):
        state = start_state(task, model, recipe.train, processes, recipe.run.sharding == "full")
        goes_on = restore_state(state, directory, processes, recipe.train.seed)
        if goes_on and read_split(directory / SPLIT_FILE, task.images) != task.split:
            raise RunError(f"The images are not those of the run in {directory}; choose another folder with --out.")
        if processes.is_main:
            shutil.rmtree(directory / FAILED, ignore_errors=True)
            pictures = describe_pictures(directory) if recipe.run.pictures else []
            print("\n".join([*task.describe(), *_describe(recipe, task, state, processes), *pictures]), file=sys.stderr)
            write_text(directory / RECIPE, dump_recipe(recipe))
            write_split(directory / SPLIT_FILE, task.images, task.split)
        with _memory_explained(directory, recipe.train, processes):
            fit(task, state, Run(directory, recipe.train, recipe.run, processes))
            if state.update < state.schedule.updates and processes.is_main:
                end = f"Ended after {state.update:,} updates: no better model in {state.stale} validations."
                print(end, file=sys.stderr)
            processes.wait()  # for the process that wrote the best model
            measured = task.measure_best(directory / BEST)
        if not processes.is_main:
            return {}
        metrics = {**measured, **(state.best or {}), **_facts(recipe, task, state, processes)}
        _finish(recipe, directory, task, metrics)
        return metrics


def _finish(recipe: Recipe, directory: Path, task: Task, metrics: dict[str, Any]) -> None:
    """Write what a finished run leaves, its metrics last: a run that is killed before goes on at its end."""
    if isinstance(task, Answering):
        task.write_answers(directory)
    if recipe.run.pictures and can_draw():
        draw_run(directory, metrics)
    write_text(directory / METRICS, json.dumps(metrics, indent=2) + "\n")
    for folder in saved_states(directory):
        shutil.rmtree(folder)


@contextmanager
def _memory_explained(directory: Path, train: TrainSection, processes: Processes) -> Iterator[None]:
    """Let an error of a full memory be one that says what takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        images = train.batch_size // (processes.count * train.accumulation)
        fewer = f"train.accumulation={2 * train.accumulation} (fewer at a time, as many in an update), " * (images > 1)
        place = f", in another folder: what {directory} holds is kept" if saved_states(directory) else ""
        raise OutOfMemoryError(
            f"Training {images} images at a time does not fit into the memory of the {processes.device.type}. Set "
            f"{fewer}train.grad_checkpointing=true (slower), or a smaller train.batch_size, image size or "
            f"model{place}."
        ) from error


def prepare_task(recipe: Recipe, processes: Processes, prepare: Prepare) -> tuple[Task, nn.Module]:
    """Make the task of a recipe and its model, as these processes train it.

    Raises:
        RecipeError: What the recipe asks for cannot be done.
    """
    _check(recipe, processes)
    if recipe.task.kind != "tokenizer":
        check_weights_fit(_config(recipe.model), processes.device)
    task, model = prepare(recipe, processes)
    if recipe.train.patience and not task.metric_names:
        raise RecipeError("train.patience waits for better validations, but there are none; give data.val_fraction.")
    if recipe.train.grad_checkpointing:
        _checkpoint(model)
    return task, model


def _config(section: ModelSection) -> BeitConfig:
    """Return what the network of a recipe will be, as far as that is known before the images are."""
    names = {field.name for field in fields(BeitConfig)}
    overrides = {name: value for name, value in section.overrides.items() if name in names}
    return override(look_up(section.name).config, **overrides)


def _check(recipe: Recipe, processes: Processes) -> None:
    train = recipe.train
    if train.batch_size % (processes.count * train.accumulation):
        raise RecipeError(
            f"{train.batch_size} images per update cannot be shared evenly by {processes.count} processes in "
            f"{train.accumulation} parts each; change train.batch_size, train.accumulation or the number of processes."
        )
    if train.compile and recipe.run.sharding == "full" and processes.count > 1:
        raise RecipeError(
            "Whether a compiled network can have its weights in shards has not been tried; leave out train.compile or "
            "run.sharding."
        )
    if train.precision == "bf16" and processes.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise RecipeError("This GPU has no bfloat16; set train.precision to fp16 or fp32.")


def _checkpoint(model: nn.Module) -> None:
    enable: Any = getattr(model, "set_grad_checkpointing", None)
    if enable is None:
        name = type(model).__name__
        raise RecipeError(f"The network ({name}) has no gradient checkpointing; leave out train.grad_checkpointing.")
    enable()


def _describe(recipe: Recipe, task: Task, state: TrainState, processes: Processes) -> list[str]:
    train = recipe.train
    length = _describe_length(train, task.updates_per_epoch)
    start = f"Going on after update {state.update:,}." if state.update else "Starting."
    warning = "The warm-up is not shorter than the run: the learning rate is below what the recipe says to the end."
    slow = "train.compile: the first update takes a minute or more, while the network is compiled."
    shards = "" if state.empty is None else ", which have the weights in shards"
    rare = f"It is validated every {train.val_epochs} epochs and in the last; the best of these models is kept."
    return [
        *([warning] if state.schedule.warmup >= state.schedule.updates else []),
        *([slow] if train.compile else []),
        *_describe_average(train, state.schedule.updates),
        *(_describe_norms(recipe.train, processes) if has_batch_norms(state.model) else []),
        *([rare] if train.val_epochs > 1 and task.metric_names else []),
        _describe_parameters(state.model),
        f"{length}, in {train.precision} on {processes.count} x {processes.device.type}{shards}. {start}",
    ]


def _describe_parameters(model: nn.Module) -> str:
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"Trains {trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters."


def _describe_average(train: TrainSection, updates: int) -> list[str]:
    """Warn of a moving average that goes over so many updates that little of the run would be in it."""
    if not train.ema_decay or (1 - train.ema_decay) * updates >= _FEWEST_AVERAGES:
        return []
    return [
        f"train.ema_decay: the moving average goes over about {1 / (1 - train.ema_decay):,.0f} updates, and the run "
        f"has {updates:,}, so it stays near where it starts. Lower it."
    ]


def _describe_norms(train: TrainSection, processes: Processes) -> list[str]:
    """Say over which images batch norms go, where that is not an update of one process."""
    lines = []
    if processes.count > 1:
        lines.append(f"Batch norms go over the images of all {processes.count} processes.")
    if train.accumulation > 1:
        lines.append(
            f"Batch norms see one of the {train.accumulation} parts of an update at a time: with another "
            "train.accumulation the run is another."
        )
    return lines


def _describe_length(train: TrainSection, updates_per_epoch: int) -> str:
    """Say how long a run is, in what the recipe counts it first."""
    updates, epoch = train.count_updates(updates_per_epoch), f"epochs of {updates_per_epoch} updates"
    if train.updates is None:
        return f"{train.epochs} {epoch} of {train.batch_size} images"
    return f"{updates:,} updates of {train.batch_size} images, {updates / updates_per_epoch:.4g} {epoch}"


def _facts(recipe: Recipe, task: Task, state: TrainState, processes: Processes) -> dict[str, Any]:
    """Say what the run took, and what it was trained with."""
    return {
        "seed": recipe.train.seed,
        "split_seed": recipe.data.split_seed,
        "train_images": len(task.split.train),
        "updates": state.update,
        "train_seconds": round(state.seconds, 3),
        "processes": processes.count,
        **environment(processes.device),
        # Decoding, augmentation and optimizer are theirs.
        "packages": {name: version(name) for name in ("accelerate", "numpy", "pillow", "timm", "torchvision")},
    }
