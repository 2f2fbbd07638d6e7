"""Fields of the train section that trade time, memory and precision change the result by rounding at most."""

import csv
from pathlib import Path

import pytest
import torch
from colours import colour_recipe, mim_recipe, write_colours
from safetensors.torch import load_file

from beitzoo.factory import create_tokenizer
from beitzoo.models.beit import Beit
from beitzoo.saving import save_tokenizer
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError
from beitzoo.training.run import prepare_task
from beitzoo.training.tasks.finetune import finetune, prepare
from beitzoo.training.tasks.pretrain import pretrain

TASKS = {"finetune": finetune, "pretrain": pretrain}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """With stochastic depth, whose draws a second forward pass must repeat; BEiT v2's second head, too."""
    directory = tmp_path_factory.mktemp("data")
    save_tokenizer(create_tokenizer("test_dvae"), directory / "tokenizer")
    data = write_colours(directory / "data", per_class=6)
    overrides = {"drop_path_rate": 0.2, "early_layers": 1, "head_layers": 1}
    options = {"model": {"overrides": overrides}, "run": {"log_updates": 1}, "epochs": 1, "batch_size": 4}
    return {
        "pretrain": mim_recipe(data, directory / "tokenizer", **options),
        "finetune": colour_recipe(data, {"log_updates": 1}, epochs=1, batch_size=3),
    }


def trained(recipe: Recipe, out: Path, **train: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights."""
    changed = Recipe.model_validate({**recipe.model_dump(), "train": {**recipe.train.model_dump(), **train}})
    TASKS[recipe.task.kind](changed, out)
    with (out / "log.csv").open() as file:
        losses = [float(line["loss"]) for line in csv.DictReader(file)]
    return losses, load_file(out / "best" / "model.safetensors")


@pytest.mark.parametrize("task", TASKS)
def test_checkpointing_changes_not_a_bit(
    recipes: dict[str, Recipe], tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(recipes[task], tmp_path / "plain")
    asked: list[bool] = []
    enable = Beit.set_grad_checkpointing

    def counted(self: Beit, on: bool = True) -> None:
        asked.append(on)
        enable(self, on)

    monkeypatch.setattr(Beit, "set_grad_checkpointing", counted)
    losses, weights = trained(recipes[task], tmp_path / "checkpointed", grad_checkpointing=True)
    assert asked == [True]
    assert losses == plain[0]
    torch.testing.assert_close(weights, plain[1], rtol=0, atol=0)


def test_a_network_without_checkpointing_is_named(
    recipes: dict[str, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Beit, "set_grad_checkpointing")
    with pytest.raises(RecipeError, match=r"The network \(Beit\) has no gradient checkpointing"):
        trained(recipes["finetune"], tmp_path / "out", grad_checkpointing=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(recipes: dict[str, Recipe], tmp_path: Path, precision: str) -> None:
    """The loss scale of fp16 begins too large for some update and is none of what the log says."""
    exact, _ = trained(recipes["pretrain"], tmp_path / "fp32", lr=1e-6)
    near, _ = trained(recipes["pretrain"], tmp_path / precision, lr=1e-6, precision=precision)
    assert near == pytest.approx(exact, rel=5e-3)
    assert near != exact


def test_compiling_with_weights_in_shards_is_refused(recipes: dict[str, Recipe]) -> None:
    document = recipes["finetune"].model_dump()
    changed = {"train": {**document["train"], "compile": True, "batch_size": 4}, "run": {"sharding": "full"}}
    recipe = Recipe.model_validate({**document, **changed})
    with pytest.raises(RecipeError, match=r"in shards has not been tried; leave out train\.compile or run\.sharding"):
        prepare_task(recipe, Processes(0, 2, torch.device("cpu")), prepare)
    prepare_task(recipe, Processes(0, 1, torch.device("cpu")), prepare)  # alone it has them whole


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what compiles
@pytest.mark.parametrize("task", TASKS)
def test_compiling_changes_rounding_only(recipes: dict[str, Recipe], tmp_path: Path, task: str) -> None:
    losses, weights = trained(recipes[task], tmp_path / "plain", lr=1e-4)
    compiled, ours = trained(recipes[task], tmp_path / "compiled", lr=1e-4, compile=True)
    assert compiled == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(ours, weights, rtol=1e-3, atol=1e-4)
