"""A run that is killed and started again ends bit-equal to one that was not."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from colours import colour_recipe, mim_recipe, tokenizer_recipe, write_colours
from squares import squares_recipe, write_squares

from beitzoo.factory import create_tokenizer
from beitzoo.saving import save_tokenizer
from beitzoo.training.recipe import Recipe, dump_recipe

_PROGRAM = Path(__file__).parents[1] / "killed_runs.py"
_OF_TIME = ("seconds", "images_per_sec", "wait_share")


def check_that_kills_change_nothing(recipes: Recipe | list[Recipe], out: Path, *options: object) -> None:
    """Train in one go and with kills, see `killed_runs`, and compare what is left; each run has a folder `run-N`."""
    recipes = recipes if isinstance(recipes, list) else [recipes]
    folders = [out / f"run-{number}" for number in range(len(recipes))]
    for folder, recipe in zip(folders, recipes, strict=True):
        folder.mkdir()
        (folder / "recipe.toml").write_text(dump_recipe(recipe))
    command = [sys.executable, str(_PROGRAM), *map(str, options), *(str(folder / "recipe.toml") for folder in folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    assert result.returncode == 0, result.stderr
    for folder in folders:
        killed = list(folder.glob("killed-*"))
        assert killed
        for run in killed:
            assert outcome(run) == outcome(folder / "whole")


def outcome(out: Path) -> dict[str, object]:
    """All that a run left, but for what it took in time."""
    with (out / "log.csv").open() as file:
        log = [{name: cell for name, cell in row.items() if name not in _OF_TIME} for row in csv.DictReader(file)]
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["train_seconds"], metrics["date"]
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    kept = ("answers", "best", "last", "mistakes", "per_class", "pictures", "recipe", "split")
    names = [name for name in files if name.startswith(kept)]
    assert len(names) >= 6
    return {**{name: files[name].read_bytes() for name in names}, "log": log, "metrics": metrics}


@pytest.mark.slow  # those below go through the same loop
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    """At drawn events: before updates, while the state or a model is written, while an old state is removed."""
    data = write_colours(tmp_path / "data")
    recipe = colour_recipe(data, {"save_updates": 2}, epochs=4, ema_decay=0.9, accumulation=2)
    check_that_kills_change_nothing(recipe, tmp_path, 1, 1, "events", 80, 10)


def _with_everything(data: Path, task: dict[str, Any] | None = None, **train: object) -> Recipe:
    """A run with all that is drawn, counted or averaged, on classes of unlike size."""
    write_colours(data, per_class=8)
    for number in (5, 6, 7):
        (data / "blue" / f"{number}.png").unlink()
    recipe = colour_recipe(data, {"save_updates": 2}, ema_decay=0.9, accumulation=2, patience=2, **train)
    options = {"mixup": 0.8, "cutmix": 1.0, "balance": "sampling", "freeze_blocks": 1, **(task or {})}
    return Recipe.model_validate({**recipe.model_dump(), "task": {**recipe.task.model_dump(), **options}})


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    """At drawn events, and at drawn times."""
    recipe = _with_everything(tmp_path / "data", epochs=4, batch_size=4)
    check_that_kills_change_nothing(recipe, tmp_path, 3, 1, "events,time", "60,0.7", 50)


def test_kills_change_nothing(tmp_path: Path) -> None:
    """Fine-tuning with mixup and CutMix, moving average, parts, balanced classes, a frozen block and patience.

    Pretraining: what was counted in an epoch is kept, too, and pictures are drawn again. The run is counted in updates
    and ends within its third epoch; it validates in its second, and at the end.

    Segmentation: the statistics of batch norms, those of averaged weights too, and what could not be read.
    """
    length = {"epochs": None, "updates": 5, "val_epochs": 2, "schedule": "poly"}
    squares = write_squares(tmp_path / "squares", broken=True)
    recipes = [
        _with_everything(tmp_path / "unlike", epochs=2, batch_size=4),
        _pretraining(tmp_path, run={"save_updates": 2}, task={"picture_epochs": 2}, **length),
        squares_recipe(squares, run={"save_updates": 2}, ema_decay=0.9, val_epochs=2),
    ]
    check_that_kills_change_nothing(recipes, tmp_path, 1, 1, "events", 60, 1)
    pretrained = tmp_path / "run-1" / "whole"
    with (pretrained / "log.csv").open() as file:
        epochs = [line for line in csv.DictReader(file) if line["line"] == "epoch"]
    assert [line["update"] for line in epochs] == ["2", "4", "5"]
    assert [bool(line["val_loss"]) for line in epochs] == [False, True, True]
    assert all(int(line["codes_used"]) for line in epochs)
    assert sorted(path.name for path in pretrained.rglob("*.png")) == ["epoch-0002.png", "epoch-0003.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "sharding"),
    [
        ({"balance": "loss"}, "none"),
        ({"balance": "sampling"}, "full"),
        ({"balance": "loss", "lora": {"rank": 2, "dropout": 0.2, "besides": "all"}}, "full"),
    ],
)
def test_two_processes_with_everything_go_on_together(tmp_path: Path, task: dict[str, Any], sharding: str) -> None:
    recipe = _with_everything(tmp_path / "data", task, epochs=3, batch_size=8)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"sharding": sharding})})
    check_that_kills_change_nothing(recipe, tmp_path, 1, 2, "events", 100, 2)


@pytest.mark.slow  # the loop is that of the others
def test_kills_of_tokenizer_training_change_nothing(tmp_path: Path) -> None:
    """The codebook, how often codes were used, and which restart, are those of a run without kills.

    The last epoch is cut short, and codes are counted in it as in the others.
    """
    data = write_colours(tmp_path / "data", per_class=6)
    length = {"epochs": None, "updates": 8, "val_epochs": 2}
    recipe = tokenizer_recipe(data, {"restart_codes": 2}, accumulation=2, batch_size=4, **length)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"save_updates": 2})})
    check_that_kills_change_nothing(recipe, tmp_path, 1, 1, "events", 60, 3)


@pytest.mark.slow
def test_two_processes_of_pretraining_go_on_together(tmp_path: Path) -> None:
    """One of them meets a batch of a broken image only; codes are counted in both."""
    recipe = _pretraining(tmp_path, run={"save_updates": 2}, batch_size=4, accumulation=2)
    check_that_kills_change_nothing(recipe, tmp_path, 1, 2, "events", 100, 2)


def _pretraining(tmp_path: Path, **options: Any) -> Recipe:
    tokenizer = tmp_path / "tokenizer"
    save_tokenizer(create_tokenizer("test_dvae"), tokenizer)
    return mim_recipe(
        write_colours(tmp_path / "data", per_class=6),
        tokenizer,
        model={"overrides": {"drop_path_rate": 0.2, "early_layers": 1, "head_layers": 1}},
        split={"val_fraction": 0.2},
        **{"epochs": 4, "ema_decay": 0.9, **options},
    )


@pytest.mark.slow
def test_two_processes_go_on_together(tmp_path: Path) -> None:
    """One of them meets a batch of a broken image only."""
    recipe = colour_recipe(write_colours(tmp_path / "data"), epochs=2, batch_size=2)
    check_that_kills_change_nothing(recipe, tmp_path, 1, 2, "events", 100, 2)
    metrics = json.loads((tmp_path / "run-0" / "killed-1" / "metrics.json").read_text())
    assert metrics["test_count"] + metrics["test_failures"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_any_time_change_nothing(tmp_path: Path, processes: int, workers: int) -> None:
    data = write_colours(tmp_path / "data", per_class=24)
    recipe = colour_recipe(data, {"save_updates": 3, "workers": workers}, epochs=8, batch_size=8)
    check_that_kills_change_nothing(recipe, tmp_path, 2, processes, "time", 0.7, 10)
