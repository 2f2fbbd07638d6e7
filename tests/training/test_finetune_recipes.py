"""The recipes of the published classifiers say what the original's commands do, and build its networks."""

from pathlib import Path

import pytest

import beitzoo
from beitzoo.models.beit import Beit
from beitzoo.training.optim import freeze_up_to, parameter_groups
from beitzoo.training.recipe import Recipe, load_recipe
from beitzoo.training.sections import CropAugment, Finetune
from beitzoo.zoo.accuracy import published
from beitzoo.zoo.checkpoints import HALF, IMAGENET_MEAN, IMAGENET_STD

FOLDER = Path("configs/finetune")
MIXED = (0.8, 1.0)
# Images per update, learning rate, epochs of warm-up and of all, layer decay, drop path rate, weight decay, mixup and
# cutmix, largest norm: `get_started_for_image_classification.md` of both versions and the README of the first.
BASE, LARGE = (512, 2e-5, 5, 30, 0.85, 0.1, 1e-8, (0, 0), 0), (512, 2e-5, 5, 30, 0.9, 0.4, 1e-8, (0, 0), 0)
PUBLISHED = {
    "beit_base_in22k_ft_in22k_in1k": BASE,
    "beit_base_384_in22k_ft_in22k_in1k": BASE,
    "beit_large_in22k_ft_in22k_in1k": LARGE,
    "beit_large_384_in22k_ft_in22k_in1k": LARGE,
    "beit_large_512_in22k_ft_in22k_in1k": LARGE,
    "beit_base_in22k_ft_in1k": (1024, 4e-3, 20, 100, 0.65, 0.1, 0.05, MIXED, 0),
    "beit_large_in22k_ft_in1k": (1024, 1e-3, 5, 50, 0.75, 0.2, 0.05, MIXED, 0),
    "beit_base_in22k_ft_in22k": (4096, 3e-3, 5, 90, 0.65, 0.2, 0.05, (0, 0), 3),
    "beit_large_in22k_ft_in22k": (2048, 2e-3, 5, 90, 0.75, 0.2, 0.05, (0, 0), 1),
    "beitv2_base_in1k_ft_in1k": (1024, 5e-4, 20, 100, 0.6, 0.2, 0.05, MIXED, 0),
    "beitv2_base_in1k_300e_ft_in1k": (1024, 5e-4, 20, 100, 0.65, 0.1, 0.05, MIXED, 0),
    "beitv2_base_in1k_ft_in22k_in1k": (1024, 5e-5, 20, 30, 0.75, 0.1, 0.05, (0, 0), 0),
    "beitv2_large_in1k_ft_in1k": (1024, 2e-4, 5, 50, 0.8, 0.2, 0.05, MIXED, 0),
    "beitv2_large_in1k_300e_ft_in1k": (1024, 5e-4, 5, 50, 0.8, 0.2, 0.05, MIXED, 0),
    "beitv2_large_in1k_ft_in22k_in1k": (1024, 7e-5, 5, 20, 0.8, 0.25, 0.05, (0, 0), 0),
    "beitv2_base_in1k_ft_in22k": (4096, 6e-4, 20, 90, 0.75, 0.1, 0.05, MIXED, 0),
    "beitv2_large_in1k_ft_in22k": (4096, 6e-4, 20, 90, 0.75, 0.2, 0.05, MIXED, 0),
}
# Parameters of the released networks with 1,000 classes, in which sizes differ by their tables.
PARAMETERS = {
    ("base", 224): 86_530_984,
    ("base", 384): 86_744_104,
    ("large", 224): 304_430_568,
    ("large", 384): 304_998_888,
    ("large", 512): 305_674_728,
}


def load(name: str) -> tuple[Recipe, Finetune]:
    recipe = load_recipe(FOLDER / f"{name}.toml")
    assert isinstance(recipe.task, Finetune)
    return recipe, recipe.task


def side(name: str) -> int:
    size = name.split("_")[2]
    return int(size) if size.isdigit() else 224


def build(name: str) -> Beit:
    recipe, _ = load(name)
    classes = 1000 if name.endswith("in1k") else 21_841
    model: object = beitzoo.create_model(
        recipe.model.name, device="meta", num_classes=classes, **recipe.model.overrides
    )
    assert isinstance(model, Beit)
    return model


def test_all_published_fine_tunings_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("beit*.toml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_the_original_does(name: str) -> None:
    recipe, task = load(name)
    train = recipe.train
    found = (train.batch_size, train.lr, train.warmup_epochs, train.epochs, train.layer_decay)
    mixed = (task.mixup, task.cutmix)
    assert (*found, recipe.model.overrides["drop_path_rate"], train.weight_decay, mixed, train.clip_grad) == (
        PUBLISHED[name]
    )
    assert (train.min_lr, train.betas, train.ema_decay, train.precision) == (1e-6, (0.9, 0.999), 0, "fp16")
    assert (train.layer_rule, train.decay_bias_tables) == ("unilm", True)
    assert (task.label_smoothing, task.mixup_prob, task.mixup_switch_prob) == (0.1, 1, 0.5)
    assert task.augment == CropAugment(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")
    assert task.crop_pct == (0.875 if side(name) == 224 else 1)
    # The name says where it starts.
    start, tuned = name.replace(f"_{side(name)}", "").split("_ft_", 1)
    family = "_".join(start.split("_")[:2])
    before = start.removeprefix(f"{family}_")
    tag = f"{before}_ft_in22k" if tuned == "in22k_in1k" else f"mim_{before}"
    assert recipe.model.pretrained
    assert recipe.model.name == f"{family}_patch16_224.{tag}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_to_expect(name: str) -> None:
    """The figure is the original's for the weights that came out of it."""
    text = (FOLDER / f"{name}.toml").read_text()
    assert text.count(f" {name} ") == 1  # the command trains by this recipe
    expected = text.partition("expected  ")[2].partition("source")[0]
    family, size, tag = "_".join(name.split("_")[:2]), side(name), name.replace(f"_{side(name)}", "").split("_", 2)[2]
    if not name.endswith("in1k"):
        assert "not published" in expected
        tag += "_in1k"
    rows = published(f"{family}_patch16_{size}.{tag}", "imagenet")
    figures = [row.top1 for row in rows if row.source.startswith("microsoft/unilm") and row.top1]
    assert any(f"{round(figure, digits):g}" in expected for figure in figures for digits in (1, 2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_builds_the_originals_network(name: str) -> None:
    model = build(name)
    classes = model.num_classes
    family, size = name.split("_")[1], side(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[family, size] + (classes - 1000) * (model.num_features + 1)
    assert model.config.img_size == (size, size)
    data = model.pretrained.data
    assert (data.mean, data.std) == ((IMAGENET_MEAN, IMAGENET_STD) if "beitv2" in name else (HALF, HALF))


@pytest.mark.parametrize("name", ["few_images", "linear_probe"])
def test_a_recipe_for_own_images_trains_what_it_says(name: str) -> None:
    recipe, task = load(name)
    model: object = beitzoo.create_model(recipe.model.name, device="meta", num_classes=3, **recipe.model.overrides)
    assert isinstance(model, Beit)
    if task.freeze_blocks == "all":
        freeze_up_to(model, model.config.depth)
    learning = sum(p.numel() for group in parameter_groups(model, recipe.train) for p in group["params"])
    assert learning == (2 * 768 + 3 * 769 if name == "linear_probe" else sum(p.numel() for p in model.parameters()))
    assert recipe.train.patience
