"""A run whose loss is not finite leaves the update that gave it, and a command does it again."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from colours import colour_recipe, tokenizer_recipe, write_colours
from commands import run

from beitzoo.training.failure import NonFiniteError
from beitzoo.training.folder import RunError, saved_states
from beitzoo.training.recipe import Recipe
from beitzoo.training.replay import replay
from beitzoo.training.tasks.finetune import FinetuneTask, finetune, prepare
from beitzoo.training.tasks.tokenizer import prepare as prepare_tokenizer
from beitzoo.training.tasks.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A rate that grows until the numbers end, within a line of the log, with stochastic depth and parts."""
    data = write_colours(tmp_path_factory.mktemp("data") / "colours", per_class=24)
    train = {"epochs": 4, "batch_size": 4, "lr": 1e20, "warmup_epochs": 4, "clip_grad": 0, "accumulation": 2}
    return colour_recipe(data, {"log_updates": 9}, **train)


@pytest.fixture(scope="module")
def failed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("a run")
    with pytest.raises(NonFiniteError) as error:
        finetune(recipe, directory)
    return directory, str(error.value)


def test_the_command_in_the_message_does_it_again(failed: tuple[Path, str]) -> None:
    directory, message = failed
    command = shlex.split(message.partition("`")[2].partition("`")[0])
    assert command == ["beitzoo", "replay", str(directory)]
    result = run(*command[1:])
    update = message.partition("at update ")[2].partition(" ")[0]
    assert result.stdout.startswith(f"Update {update}: a loss of ")
    assert "It fails again." in result.stdout
    assert "(process 0, batch " in result.stdout


def test_the_state_is_the_one_before_the_update(failed: tuple[Path, str], recipe: Recipe, tmp_path: Path) -> None:
    """Though more updates followed before it was known: weights, moments and generators of a run that saved there."""
    (state,) = saved_states(failed[0] / "failed")
    update = int(state.name.removeprefix("state-"))
    assert 0 < update < 8
    each = Recipe.model_validate({**recipe.model_dump(), "run": {"save_updates": update, "log_updates": 9}})
    with pytest.raises(NonFiniteError):
        finetune(each, tmp_path)
    ours, theirs = (torch.load(path / "tensors.pt") for path in (state, tmp_path / state.name))
    for document in (ours, theirs):
        del document["optimizer"]["param_groups"]  # rates are functions of the update
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    ours, theirs = (torch.load(path / "generators.pt")["by_rank"] for path in (state, tmp_path / state.name))
    assert torch.equal(ours[0]["torch"], theirs[0]["torch"])


def test_codes_are_those_before_the_update(tmp_path: Path) -> None:
    """They learn in the forward pass, without gradients; later updates of the line must not show in them."""
    data = write_colours(tmp_path / "data")
    train = {"lr": 1e20, "warmup_epochs": 2, "clip_grad": 0}
    recipe = tokenizer_recipe(data, **train).model_dump() | {"run": {"log_updates": 8}}
    with pytest.raises(NonFiniteError):
        train_tokenizer(Recipe.model_validate(recipe), tmp_path / "run")
    (state,) = saved_states(tmp_path / "run" / "failed")
    update = int(state.name.removeprefix("state-"))
    assert 0 < update < 7
    with pytest.raises(NonFiniteError):
        train_tokenizer(Recipe.model_validate(recipe | {"run": {"save_updates": update}}), tmp_path / "each")
    ours, theirs = (torch.load(path / "tensors.pt")["model"] for path in (state, tmp_path / "each" / state.name))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert replay(tmp_path / "run", prepare_tokenizer).failed


def test_an_update_of_two_processes_is_done_again_by_one(failed: tuple[Path, str], tmp_path: Path) -> None:
    """With the generators and the batches of both; here a second process that did the same as the first."""
    shutil.copytree(failed[0], tmp_path / "run")
    kept = tmp_path / "run" / "failed"
    shutil.copy(kept / "batches-0.pt", kept / "batches-1.pt")
    (state,) = saved_states(kept)
    (generators,) = torch.load(state / "generators.pt")["by_rank"]
    torch.save({"by_rank": [generators] * 2}, state / "generators.pt")
    alone, both = replay(failed[0], prepare), replay(tmp_path / "run", prepare)
    assert (both.update, both.items) == (alone.update, 2 * alone.items)
    assert both.failed
    assert both.module == alone.module


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_validation_that_fails_is_done_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    """Its last update is a finite one, and its weights too large to be computed with; nothing of it is a model."""
    train = {**recipe.train.model_dump(), "epochs": 1, "batch_size": 54, "warmup_epochs": 0, "ema_decay": ema}
    changed = Recipe.model_validate({**recipe.model_dump(), "train": train})
    with pytest.raises(
        NonFiniteError, match=r"metric val_loss \(nan\) is not finite any more at update 1 .* measures"
    ) as e:
        finetune(changed, tmp_path)
    assert f"`beitzoo replay {tmp_path}`" in str(e.value)
    assert not (tmp_path / "best").exists()
    (state,) = saved_states(tmp_path / "failed")
    assert state.name == "state-1"
    result = run("replay", str(tmp_path))
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Validation after update 1: val_top1 ")
    assert lines[0].endswith("val_loss nan.")
    assert "(validation)" in lines[1]
    assert lines[2:] == ["Weights that are not finite: those of 0 parameters.", "It fails again."]
    metrics = {"val_top1": 1.0, "val_loss": 2.0}
    monkeypatch.setattr(FinetuneTask, "validate", lambda *_: metrics)
    result = run("replay", str(tmp_path))
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == "Validation after update 1: val_top1 1, val_loss 2."


def test_an_update_that_does_not_fail_is_told(failed: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(failed[0], tmp_path / "run")
    (state,) = saved_states(tmp_path / "run" / "failed")
    tensors = torch.load(state / "tensors.pt")
    tensors["model"] = {name: tensor.clamp(-0.1, 0.1) for name, tensor in tensors["model"].items()}
    torch.save(tensors, state / "tensors.pt")
    result = run("replay", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert "The first output that is not finite: none." in result.stdout
    assert "It does not fail here" in result.stdout


def test_what_is_no_failed_run_is_refused(failed: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no failed/"):
        replay(tmp_path, prepare)
    shutil.copytree(failed[0], tmp_path / "run")
    torch.save([Path("a")], tmp_path / "run" / "failed" / "batches-0.pt")  # a type that is not of a batch
    with pytest.raises(RunError, match=r"batches-0\.pt cannot be read"):
        replay(tmp_path / "run", prepare)


def test_another_run_in_the_folder_removes_what_failed(
    failed: tuple[Path, str], recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(failed[0], tmp_path / "run")
    train = {**recipe.train.model_dump(), "lr": 1e-3, "epochs": 1, "warmup_epochs": 0}
    finetune(Recipe.model_validate({**recipe.model_dump(), "train": train}), tmp_path / "run")
    assert not (tmp_path / "run" / "failed").exists()
