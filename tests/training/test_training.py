"""Recipes are closed records; parameters learn as fast as they say; a run leaves what it promises."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import beitzoo
from beitzoo.training.data import load_images, training_transform
from beitzoo.training.optim import make_optimizer, make_schedule, parameter_groups, spread_bias_tables
from beitzoo.training.recipe import (
    AffineAugment,
    CropAugment,
    DataSection,
    Recipe,
    RecipeError,
    TrainSection,
    dump_recipe,
    load_recipe,
)
from beitzoo.training.tasks.finetune import finetune

RECIPES = sorted(Path("configs").rglob("*.toml"))
CPU = torch.device("cpu")
DIGITS = Path("configs/finetune/digits.toml")


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_describes_a_run(path: Path) -> None:
    recipe = load_recipe(path)
    assert Recipe.model_validate_json(dump_recipe(recipe)) == recipe
    model = beitzoo.create_model(recipe.model.name, **recipe.model.overrides)
    assert make_optimizer(model, recipe.train).param_groups
    assert training_transform(model, recipe.augment)(Image.new("L", (8, 8))).shape == (1, 32, 32)


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
        ("augment.kind=none", "augment: Input tag 'none'"),
        ("train.lr", "'train.lr' sets nothing; write section.key=value"),
        ("lr=1", "'lr=1' sets nothing"),
        ("model.overrides.num_classes=3", "the number of classes comes from the data"),
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
    with pytest.raises(RecipeError, match=r"There is no recipe .*b\.toml"):
        load_recipe(tmp_path / "b.toml")


def test_bias_tables_learn_at_their_own_rate() -> None:
    model = beitzoo.create_model("test_beit")
    recipe = TrainSection(epochs=1, batch_size=1, lr=1.0, layer_decay=0.5, bias_lr_scale=10, weight_decay=0.1)
    scales = {id(p): (g["lr_scale"], g["weight_decay"]) for g in parameter_groups(model, recipe) for p in g["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert by_name["blocks.1.attn.relative_position_bias_table"] == (5, 0)
    assert by_name["blocks.0.attn.relative_position_bias_table"] == (2.5, 0)
    assert by_name["blocks.1.attn.qkv.weight"] == (0.5, 0.1)
    assert by_name["head.weight"] == (1, 0.1)
    assert by_name["cls_token"] == (0.125, 0)


def test_bias_tables_are_spread_and_nothing_else() -> None:
    model = beitzoo.create_model("beit_nano_patch4_32")
    before = {name: p.clone() for name, p in model.named_parameters()}
    spread_bias_tables(model, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            assert parameter.detach().std() == pytest.approx(0.5, rel=0.15)
        else:
            assert torch.equal(parameter, before[name])


def test_schedule_rises_then_falls_to_its_end() -> None:
    recipe = TrainSection(epochs=10, batch_size=1, lr=2.0, min_lr=0.5, warmup_epochs=2)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr)
    schedule = make_schedule(optimizer, recipe, steps_per_epoch=5)
    rates = []
    for update in range(50):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    cosine = [0.5 + 0.75 * (1 + math.cos(math.pi * t / 40)) for t in range(40)]
    assert rates == pytest.approx([0.5 * r for r in [*(0.2 * t for t in range(10)), *cosine]], rel=1e-6)


def test_digits_are_sixteen_levels_of_ink() -> None:
    image = load_images(DataSection(source="digits")).images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (8, 8)
    assert set(image.tobytes()) <= {round(level * 255 / 16) for level in range(17)}


def test_a_folder_without_a_path_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.path is missing"):
        load_images(DataSection(source="folder"))


def test_crop_augmentation_passes_its_options_on() -> None:
    model = beitzoo.create_model("test_beit")
    transform = training_transform(model, CropAugment(hflip=0, re_prob=0.25, auto_augment="rand-m9-mstd0.5-inc1"))
    text = repr(transform)
    assert "RandAugment" in text
    assert "RandomErasing(p=0.25" in text
    assert "HorizontalFlip" not in text


def test_affine_augmentation_without_range_is_the_evaluation_transform() -> None:
    model = beitzoo.create_model("beit_nano_patch4_32")
    image = load_images(DataSection(source="digits")).images[3]
    plain = beitzoo.create_transform(**beitzoo.resolve_data_config(model))(image)
    assert torch.equal(training_transform(model, AffineAugment(kind="affine"))(image), plain)
    assert not torch.equal(training_transform(model, AffineAugment(kind="affine", rotate=30))(image), plain)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a folder of three colours with one broken image in it."""
    root = tmp_path_factory.mktemp("run")
    data = root / "colours"
    for index, colour in enumerate(("blue", "green", "red")):
        (data / colour).mkdir(parents=True)
        for number in range(12):
            shade = [40 + 5 * number] * 3
            shade[2 - index] = 255
            Image.new("RGB", (40, 40), tuple(shade)).save(data / colour / f"{number}.png")
    (data / "red" / "0.png").write_bytes(b"broken")
    (root / "recipe.toml").write_text(
        '[model]\nname="test_beit"\n[data]\nsource="folder"\nval_fraction=0.25\n'
        '[augment]\nkind="crop"\nscale=[0.5, 1.0]\ncolor_jitter=0.0\n'
        "[train]\nepochs=5\nbatch_size=6\nlr=2e-3\nwarmup_epochs=1\nclip_grad=1.0\n"
    )
    recipe = load_recipe(root / "recipe.toml", [f"data.path={data}"])
    finetune(recipe, root / "out")
    return root / "out"


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "best",
        "last",
        "log.jsonl",
        "metrics.json",
        "recipe.json",
        "split.csv",
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_count"] in (11, 12)
    assert metrics["test_top1"] > 90
    assert metrics["seed"] == metrics["split_seed"] == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2, 3, 4, 5]
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    best = max(log, key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert metrics["val_top1"] == best["val_top1"]


def test_a_trained_model_knows_its_classes(run: Path) -> None:
    model = beitzoo.create_model(f"local-dir:{run / 'best'}", pretrained=True)
    assert model.class_names == ("blue", "green", "red")
    assert model.num_classes == 3


def test_a_finished_run_is_not_overwritten(run: Path) -> None:
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    with pytest.raises(FileExistsError, match="holds a run"):
        finetune(recipe, run)


def test_the_same_seed_gives_the_same_run(run: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    metrics = finetune(recipe, tmp_path / "again")
    first = json.loads((run / "metrics.json").read_text())
    assert {k: v for k, v in metrics.items() if k != "train_seconds"} == {
        k: v for k, v in first.items() if k != "train_seconds"
    }


def test_two_processes_train_together(run: Path, tmp_path: Path) -> None:
    """One of them meets a batch of broken images only; both go on, and one writes."""
    recipe = Recipe.model_validate_json((run / "recipe.json").read_text())
    train = recipe.train.model_copy(update={"epochs": 2, "batch_size": 1})
    (tmp_path / "recipe.json").write_text(dump_recipe(recipe.model_copy(update={"train": train})))
    code = (
        "import sys; from pathlib import Path; from beitzoo.training.recipe import Recipe; "
        "from beitzoo.training.tasks.finetune import finetune; "
        "print(finetune(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))"
    )
    (tmp_path / "run.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "run.py"), str(tmp_path / "recipe.json"), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("test_top1") == 1
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
