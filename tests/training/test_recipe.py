"""Recipes are closed records; those of the repository describe runs."""

import re
from pathlib import Path

import pytest
from PIL import Image

import beitzoo
from beitzoo.training.data import training_transform
from beitzoo.training.optim import parameter_groups
from beitzoo.training.recipe import Recipe, RecipeError, dump_recipe, load_recipe, read_resolved
from beitzoo.training.sections import Finetune

RECIPES = sorted(Path("configs").rglob("*.toml"))
FINETUNE = [path for path in RECIPES if path.parent.name == "finetune"]
DIGITS = Path("configs/finetune/digits.toml").absolute()
DIGITS_TEXT = DIGITS.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_is_of_the_task_whose_folder_it_is_in(path: Path) -> None:
    recipe = load_recipe(path, kind=path.parent.name)
    assert Recipe.model_validate_json(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("path", FINETUNE, ids=str)
def test_every_fine_tuning_recipe_describes_a_run(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe.task, Finetune)
    model = beitzoo.create_model(recipe.model.name, device="meta", num_classes=3, **recipe.model.overrides)
    assert sum(len(group["params"]) for group in parameter_groups(model, recipe.train)) == len([*model.parameters()])
    image = Image.new("L" if model.in_chans == 1 else "RGB", (8, 8))
    assert training_transform(model, recipe.task.augment)(image).shape == (model.in_chans, *model.config.img_size)


def test_settings_change_a_recipe() -> None:
    recipe = load_recipe(DIGITS, ["data.split_seed=7", "train.lr=1e-3", "model.overrides.drop_path_rate=0.1"])
    assert recipe.data.split_seed == 7
    assert recipe.train.lr == 1e-3
    assert recipe.model.overrides == {"drop_path_rate": 0.1}
    assert load_recipe(DIGITS, ["data.source=folder"]).data.source == "folder"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.leraning_rate=1", "train.leraning_rate: Extra inputs are not permitted"),
        ("train.lr=fast", "train.lr: Input should be a valid number"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1"),
        ("task.augment.kind=none", "task.augment: Input tag 'none'"),
        ("task.augment.rotate=far", "task.augment.rotate: Input should be a valid number"),
        ("train.lr", "'train.lr' sets nothing; write section.key=value"),
        ("lr=1", "'lr=1' sets nothing"),
        ("model.overrides.num_classes=3", "the number of classes comes from the data"),
        ("model.overrides.device=cpu", "device is no field of the network"),
        ("train.lr.max=1", "'train.lr.max=1': lr is a value, not a section"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(DIGITS, [setting])


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[model\n")
    with pytest.raises(RecipeError, match=r"a\.toml is not TOML"):
        load_recipe(tmp_path / "a.toml")
    with pytest.raises(RecipeError, match=r"There is no recipe .*b\.toml: no such file"):
        load_recipe(tmp_path / "b.toml")
    with pytest.raises(RecipeError, match=r"There is no recipe dgits.*did you mean 'digits'"):
        load_recipe("dgits")
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"recipe\.json is not the recipe of a run: model: Field required"):
        read_resolved(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(RecipeError, match=r"recipe\.json is not the recipe of a run: not JSON \(Expecting"):
        read_resolved(tmp_path / "recipe.json")


def test_packaged_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe("digits") == load_recipe(DIGITS)
    assert len({path.stem for path in FINETUNE}) == len(FINETUNE)
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text(DIGITS_TEXT.replace("epochs = 75", "epochs = 2"))
    assert load_recipe("digits").train.epochs == 2  # a file of that name comes first


def test_the_first_difference_is_named() -> None:
    recipe = load_recipe(DIGITS)
    assert recipe.first_difference(load_recipe(DIGITS, ["run.workers=3", "run.log_updates=1"])) is None
    other = load_recipe(DIGITS, ["train.lr=1", "task.augment.rotate=2"])
    assert recipe.first_difference(other) == "train.lr is 1.0 there and 0.004 here"
    overridden = load_recipe(DIGITS, ["model.overrides.depth=2"])
    assert recipe.first_difference(overridden) == "model.overrides.depth is 2 there and None here"


def test_paths_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.toml").write_text(DIGITS_TEXT)
    recipe = load_recipe("~/digits.toml", ["data.path=photos"]).starting_from(Path("~/weights.pth"))
    assert recipe.data.path == tmp_path / "photos"
    assert recipe.model.checkpoint == tmp_path / "weights.pth"
    (tmp_path / "run").mkdir()
    names = {name: load_recipe(DIGITS, [f"model.name={name}"]).model.name for name in ("run", "local-dir:run", "none")}
    assert names == {"run": f"{tmp_path}/run", "local-dir:run": f"local-dir:{tmp_path}/run", "none": "none"}
