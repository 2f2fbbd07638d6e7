"""The recipes of the published segmentation models say what the original's do, and build its networks."""

from pathlib import Path

import pytest

import beitzoo
from beitzoo.images.augment_pixels import PixelViews
from beitzoo.models.segmentation import Segmenter
from beitzoo.training.optim import parameter_groups
from beitzoo.training.recipe import Recipe, load_recipe
from beitzoo.training.segment_sections import TrainSegmenter
from beitzoo.zoo.checkpoints import IMAGENET_MEAN, IMAGENET_STD, Segment
from beitzoo.zoo.labels import label_names

# Peak learning rate, layer decay, drop path rate: `semantic_segmentation/configs/beit/upernet` of both versions.
PUBLISHED = {
    "beit_base_512_in22k_ade20k": (7e-4, 0.65, 0.1),
    "beit_base_512_in22k_ft_in22k_ade20k": (3e-5, 0.9, 0.1),
    "beit_base_640_in22k_ft_in22k_ade20k": (3e-5, 0.9, 0.1),
    "beit_large_512_in22k_ft_in22k_ade20k": (2e-5, 0.95, 0.2),
    "beit_large_640_in22k_ft_in22k_ade20k": (2e-5, 0.95, 0.2),
    "beitv2_base_512_in1k_ade20k": (5e-5, 0.75, 0.15),
    "beitv2_base_512_in1k_ft_in22k_ade20k": (5e-5, 0.85, 0.15),
    "beitv2_large_512_in1k_ade20k": (4e-5, 0.9, 0.2),
    "beitv2_large_512_in1k_ft_in22k_ade20k": (3e-5, 0.9, 0.2),
}
FOLDER = Path("configs/segment")
TRAINING_IMAGES = 20_210
# Of the released networks with their heads: at 640 pixels, and by how much the tables are smaller at 512.
PARAMETERS = {"base": (163_407_980, 12 * 12 * (6244 - 3972)), "large": (441_271_084, 24 * 16 * (6244 - 3972))}


def load(name: str) -> tuple[Recipe, TrainSegmenter]:
    recipe = load_recipe(FOLDER / f"{name}.toml", kind="segment")
    assert isinstance(recipe.task, TrainSegmenter)
    return recipe, recipe.task


def build(recipe: Recipe, num_classes: int) -> Segmenter:
    options = {**recipe.model.overrides, "head": "segment", "num_classes": num_classes}
    model: object = beitzoo.create_model(recipe.model.name, device="meta", **options)
    assert isinstance(model, Segmenter)
    return model


def test_all_published_configurations_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("beit*.toml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_what_the_original_does(name: str) -> None:
    recipe, task = load(name)
    train, overrides = recipe.train, recipe.model.overrides
    assert recipe.model.pretrained
    assert (train.lr, train.layer_decay, overrides["drop_path_rate"]) == PUBLISHED[name]
    assert (train.updates, train.schedule, train.min_lr, train.warmup_updates) == (160_000, "poly", 0, 1500)
    assert (train.batch_size, train.accumulation) == (16, 2 if "large_640" in name else 1)
    assert (train.betas, train.weight_decay, train.clip_grad) == ((0.9, 0.999), 0.05, 0)
    assert (train.precision, task.auxiliary_weight, recipe.data.source) == ("fp16", 0.4, "annotations")
    assert train.val_epochs * (TRAINING_IMAGES // train.batch_size) == pytest.approx(16_000, rel=0.03)
    assert (task.labels.classes, task.labels.reduce_zero_label) == ("ade20k", True)
    # The name says where it starts and at which size.
    assert recipe.model.name.partition("_")[0] == name.partition("_")[0]
    assert recipe.model.name.partition(".")[2].removeprefix("mim_") == name.split("_", 3)[3].removesuffix("_ade20k")
    assert str(overrides["img_size"]) == name.split("_")[2]
    assert (FOLDER / f"{name}.toml").read_text().count(f" {name} ") == 1  # the command trains by this recipe


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_builds_the_originals_network_and_augmentation(name: str) -> None:
    recipe, task = load(name)
    names = label_names(Segment(labels=task.labels.classes))
    assert names is not None
    model = build(recipe, len(names))
    side = model.backbone.config.img_size[0]
    count, smaller = PARAMETERS["large" if "large" in name else "base"]
    assert sum(p.numel() for p in model.parameters()) == count - (smaller if side == 512 else 0)
    assert model.config.out_indices == ((7, 11, 15, 23) if "large" in name else (3, 5, 7, 11))
    data = model.pretrained.data
    fields = {**task.augment.model_dump(), "mean": task.augment.mean or data.mean, "std": task.augment.std or data.std}
    views = PixelViews(size=(side, side), **fields)
    assert (views.mean, views.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (views.fit, views.ratio, views.max_share, views.hflip, views.distort) == (None, (0.5, 2), 0.75, 0.5, True)


@pytest.mark.parametrize("name", ["beit_base_512_in22k_ade20k", "beitv2_large_512_in1k_ade20k"])
def test_layers_learn_as_fast_as_in_the_original(name: str) -> None:
    """`LayerDecayOptimizerConstructor`: patches and class token, each block, and all else at the full rate."""
    recipe, _ = load(name)
    model = build(recipe, 150)
    depth, decay = len(model.backbone.blocks), recipe.train.layer_decay
    of = {id(p): group for group in parameter_groups(model, recipe.train) for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        first, second, third, *_ = [*parameter_name.split("."), ""]
        level = depth + 1 if first != "backbone" else 1 + int(third) if second == "blocks" else 0
        group = of[id(parameter)]
        assert group["lr_scale"] == pytest.approx(decay ** (depth + 1 - level))
        assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0)
    assert len({group["lr_scale"] for group in of.values()}) == depth + 2
    assert of[id(model.backbone.cls_token)]["weight_decay"] == 0.05  # though the original means to leave it out
