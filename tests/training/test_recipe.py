"""Recipes are closed records; those of the repository describe runs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

import beitzoo
from beitzoo.files import write_text
from beitzoo.training.data import training_transform
from beitzoo.training.optim import parameter_groups
from beitzoo.training.recipe import Recipe, RecipeError, change_recipe, dump_recipe, load_recipe, read_resolved
from beitzoo.training.sections import Finetune, Section

RECIPES = sorted(Path("configs").rglob("*.toml"))
FINETUNE = [path for path in RECIPES if path.parent.name == "finetune"]
DIGITS = Path("configs/finetune/digits.toml").absolute()
DIGITS_TEXT = DIGITS.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_is_of_the_task_whose_folder_it_is_in(path: Path) -> None:
    load_recipe(path, kind=path.parent.name)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_what_is_written_is_read_again(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, kind=path.parent.name)
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert (
        load_recipe(tmp_path / "recipe.toml", kind=path.parent.name)
        == read_resolved(tmp_path / "recipe.toml")
        == recipe
    )


def test_odd_names_are_written_and_read(tmp_path: Path) -> None:
    odd = os.fsdecode(b'a"b\\c\n\x7f\xff \xf0\x9f\x98\x80#')
    recipe = change_recipe(load_recipe(DIGITS), ["data.label_seed=3"])
    data = {**recipe.data.model_dump(), "source": "folder", "path": Path("/") / odd}
    recipe = Recipe.model_validate({**recipe.model_dump(), "data": data})
    write_text(tmp_path / "recipe.toml", dump_recipe(recipe))
    assert read_resolved(tmp_path / "recipe.toml") == recipe
    assert "[train]\nbatch_size = 64\n" in re.sub("epochs = 75\n", "", dump_recipe(recipe))


def test_what_may_be_none_is_so_by_default() -> None:
    """As TOML has no null, a value that is left out must mean it."""
    left, seen = [Recipe], set()
    while left:
        section = left.pop()
        for name, field in section.model_fields.items():
            parts = list(_parts_of(field.annotation))
            assert type(None) not in parts or field.default is None, f"{section.__name__}.{name}"
            left += [
                part for part in parts if isinstance(part, type) and issubclass(part, Section) and part not in seen
            ]
        seen.add(section)
    assert len(seen) > 10


def _parts_of(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _parts_of(part)


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


def test_a_setting_replaces_what_it_excludes() -> None:
    assert load_recipe(DIGITS, ["train.updates=7"]).train.epochs is None
    assert change_recipe(load_recipe(DIGITS, ["train.updates=7"]), ["train.epochs=2"]).train.updates is None
    with pytest.raises(RecipeError, match="train: give either epochs or updates"):
        load_recipe(DIGITS, ["train.updates=7", "train.epochs=2"])


def test_crops_are_what_augments_where_nothing_is_said() -> None:
    recipe = load_recipe("beit_base_in22k_ft_in1k")
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    assert recipe.task == Finetune.model_validate({**recipe.task.model_dump(), "augment": augment})
    with pytest.raises(RecipeError, match=r"task\.augment\.scale: \[1\.0, 0\.5\] is no range; write the smaller"):
        change_recipe(recipe, ["task.augment.scale=[1.0, 0.5]"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.warmup_epoch=1", "train: there is no key 'warmup_epoch'; did you mean 'warmup_epochs' or"),
        ("train.lr=fast", "train.lr: Input should be a valid number"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1"),
        ("task.augment.kind=none", "task.augment: Input tag 'none'"),
        ("task.augment.rotate=far", "task.augment.rotate: Input should be a valid number"),
        ("task.freeze_blocks=few", "task.freeze_blocks: Input should be a valid integer, unable to parse string as"),
        ("task.freeze_blocks=few", " as an integer or Input should be 'all'"),
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
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(RecipeError, match=r"recipe\.toml is not the recipe of a run: model: Field required"):
        read_resolved(tmp_path / "recipe.toml")
    (tmp_path / "recipe.toml").write_text("{")
    with pytest.raises(RecipeError, match=r"recipe\.toml is not the recipe of a run: not TOML \("):
        read_resolved(tmp_path / "recipe.toml")


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
