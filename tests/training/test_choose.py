"""The rules by which a recipe is chosen: against unilm's recipes where they agree, and by how they change."""

from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import draw_split
from beitzoo.training.choose import choose
from beitzoo.training.memory import activation_bytes
from beitzoo.training.recipe import Recipe, load_recipe
from beitzoo.training.sections import CropAugment, DataSection, Finetune
from beitzoo.training.situation import Situation
from beitzoo.zoo.registry import find

BASE = Situation(find("beitv2_base_patch16_224.in1k_ft_in22k").config, "labels", 1_000, 2, True, True, None)


def chosen(at: Situation = BASE, **changes: Any) -> Recipe:
    recipe, rules = choose("test_beit", DataSection(source="folder"), replace(at, **changes))
    assert all(rule.reason for rule in rules)
    return recipe


def augmentation(recipe: Recipe) -> CropAugment:
    assert isinstance(recipe.task, Finetune) and isinstance(recipe.task.augment, CropAugment)
    return recipe.task.augment


@pytest.mark.parametrize(
    ("architecture", "start", "decay", "drop_path"),
    [
        ("beit_base_patch16_224", "masked", 0.65, 0.1),  # unilm, v1 and v2 base
        ("beit_large_patch16_224", "masked", 0.8, 0.2),  # unilm, v2 large
        ("beit_base_patch16_224", "labels", 0.75, 0.1),  # unilm, v2 base after ImageNet-22k
        ("beit_nano_patch4_32", "labels", 0.65, None),
        ("beit_base_patch16_224", "random", 1.0, None),
    ],
)
def test_layer_decay_and_drop_path_are_those_of_unilm(
    architecture: str, start: Any, decay: float, drop_path: float | None
) -> None:
    recipe = chosen(config=find(architecture).config, start=start)
    assert recipe.train.layer_decay == decay
    assert recipe.model.overrides.get("drop_path_rate") == drop_path


def test_fewer_images_are_seen_more_often_in_smaller_batches() -> None:
    lengths = {}
    for images in (20, 100, 1_000, 6_000, 100_000):
        train = chosen(images=images).train
        lengths[images] = (train.batch_size, train.epochs)
    assert lengths == {20: (4, 40), 100: (8, 40), 1_000: (32, 40), 6_000: (64, 10), 100_000: (128, 10)}
    assert chosen(images=100).train.lr == pytest.approx(chosen(images=1_000).train.lr / 2)
    assert chosen(start="masked", images=100_000).train.epochs == 30


def test_augmentation_is_milder_for_few_images() -> None:
    few, more, many = (augmentation(chosen(images=images)) for images in (500, 5_000, 50_000))
    assert [few.scale[0], more.scale[0], many.scale[0]] == [0.35, 0.35, 0.08]
    assert [one.auto_augment[:7] for one in (few, more, many)] == ["rand-m5", "rand-m9", "rand-m9"]
    assert [few.re_prob, more.re_prob] == [0, 0.25]
    mixed = chosen(start="masked", images=50_000).task
    assert isinstance(mixed, Finetune)
    assert (mixed.mixup, mixed.cutmix) == (0.8, 1.0)


def test_a_small_network_from_random_weights_is_trained_as_on_digits() -> None:
    nano = chosen(config=find("beit_nano_patch4_32").config, start="random")
    assert not nano.model.pretrained
    assert nano.model.overrides == {"in_chans": 3}
    assert (nano.train.bias_lr_scale, nano.train.batch_size, nano.train.patience) == (10, 64, 0)
    assert augmentation(nano).auto_augment == ""
    assert chosen(config=find("beit_nano_patch4_32").config, start="random", in_colour=False).model.overrides == {}


def test_adapters_are_trained_as_in_their_recipe() -> None:
    ours, theirs = chosen(adapters=True), load_recipe("lora")
    assert ours.train.lr == pytest.approx(theirs.train.lr, rel=0.05)
    assert ours.train.lr > 4 * chosen().train.lr
    for name in ("batch_size", "epochs", "min_lr", "weight_decay", "layer_decay", "clip_grad", "patience"):
        assert getattr(ours.train, name) == getattr(theirs.train, name), name
    assert ours.model.overrides == theirs.model.overrides == {}


def test_parts_of_a_data_set_are_kept() -> None:
    drawn = chosen(in_parts=False)
    assert (drawn.data.test_fraction, drawn.data.val_fraction) == (0.2, 0.2)
    assert drawn.train.lr == chosen(images=640).train.lr
    assert (chosen().data.test_fraction, chosen().data.val_fraction) == (None, None)


@pytest.mark.parametrize(("classes", "each"), [(2, 3), (3, 3), (7, 3), (10, 3), (10, 4), (3, 12)])
def test_each_class_is_held_out_and_chooses_however_few_images_it_has(classes: int, each: int) -> None:
    labels = [number % classes for number in range(classes * each)]
    images = ImageSet([Image.new("L", (1, 1))] * len(labels), labels, tuple(map(str, range(classes))))
    test, val = replace(BASE, images=len(labels), classes=classes, in_parts=False).fractions
    split = draw_split(images, val, test, seed=0)
    assert all(
        {labels[index] for index in part} == set(range(classes)) for part in (split.train, split.val, split.test)
    )


def test_a_gpu_gets_processes_that_load() -> None:
    assert (chosen().run.workers, chosen(workers=6).run.workers) == (0, 6)


def test_an_update_is_done_in_parts_that_fit_into_memory() -> None:
    one = activation_bytes(BASE.config, "fp32")
    assert one == 2 * 12 * 197 * (34 * 768 + 5 * 12 * 197)
    assert [chosen(memory=one * images).train.accumulation for images in (64, 32, 31, 8, 0)] == [1, 1, 2, 4, 32]
