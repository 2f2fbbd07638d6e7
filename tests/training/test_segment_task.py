"""Training segmentation models by a recipe: what the loss is, what a run leaves, and what is refused before it."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from squares import CLASSES, TEST, TRAIN, squares_recipe, write_squares
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForSemanticSegmentationLoss
from typer.testing import CliRunner

import beitzoo
from beitzoo.cli import app
from beitzoo.errors import UserError
from beitzoo.models.segmentation import Segmenter
from beitzoo.training.pixels import PixelBatch
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, load_recipe
from beitzoo.training.tasks.segment import SegmentTask, pixel_loss, prepare, train_segmenter

ALONE = Processes(0, 1, torch.device("cpu"))
LINEAR = {"overrides": {"embed_dim": 32, "img_size": 48, "patch_size": 8, "decoder": "linear"}}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("data"), broken=True)


@pytest.fixture(scope="module")
def run(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that learns the squares, as fast as can be."""
    out = tmp_path_factory.mktemp("run") / "out"
    overrides = {**LINEAR["overrides"], "patch_size": 4, "decoder_drop_rate": 0.0}
    model = {"name": "test_beit", "overrides": overrides}
    recipe = squares_recipe(squares, model=model, epochs=14, val_epochs=7, batch_size=2, lr=5e-3)
    torch.set_num_threads(1)
    train_segmenter(recipe, out)
    return out


def prepared(recipe: Recipe) -> tuple[SegmentTask, Segmenter]:
    return prepare(recipe, ALONE)


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


# ---- the loss ---------------------------------------------------------------------------------------------------


def drawn(*heads: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """Logits of three classes on maps of these sizes, and masks of 12 x 20 pixels with some of no class."""
    draw = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (2, 12, 20), generator=draw)
    masks[0, :5] = 255
    return [torch.randn(2, 3, *size, generator=draw) for size in heads], masks


def test_the_loss_is_the_mean_over_labelled_pixels_one_by_one() -> None:
    (logits,), masks = drawn((3, 5))
    resized = F.interpolate(logits.double(), size=(12, 20), mode="bilinear", align_corners=False)
    losses = [
        -float(resized[image, :, y, x].log_softmax(0)[masks[image, y, x]])
        for image, y, x in (masks != 255).nonzero().tolist()
    ]
    assert len(losses) == 2 * 12 * 20 - 5 * 20
    assert pixel_loss(logits, masks).item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_both_heads_weigh_as_in_transformers(squares: Path) -> None:
    heads, masks = drawn((6, 10), (3, 5))
    expected = ForSemanticSegmentationLoss(heads[0], masks, auxiliary_logits=heads[1])
    task, _ = prepared(squares_recipe(squares))
    batch = PixelBatch(torch.zeros(2, 3, 48, 48), masks, [])

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return heads[0], heads[1]

    loss, count, logs = task.loss(Fixed(), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count == (masks != 255).sum()
    assert logs["decode_loss"] + 0.4 * logs["auxiliary_loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("images", [2, 0])
def test_a_batch_with_nothing_labelled_moves_nothing_and_is_finite(squares: Path, images: int) -> None:
    task, model = prepared(squares_recipe(squares))
    batch = PixelBatch(torch.randn(images, 3, 48, 48), torch.full((images, 48, 48), 255), [])
    loss, count, logs = task.loss(model.train(), batch)
    loss.backward()
    assert (loss, count) == (0, 0)
    assert not any(logs.values())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_one_image_of_a_batch_that_can_be_read_is_enough(squares: Path) -> None:
    task, model = prepared(squares_recipe(squares))
    batch = next(iter(task.batches(0)))
    one = PixelBatch(batch.images[:1], batch.masks[:1], [])
    loss, count, _ = task.loss(model.train(), one)
    assert loss.isfinite()
    assert count == (one.masks != 255).sum()


# ---- a run ------------------------------------------------------------------------------------------------------


def test_squares_are_learnt(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_miou"] > 90
    assert metrics["val_miou"] > 90
    assert metrics["test_aacc"] > 95
    each = [metrics[f"test_iou_{name}"] for name in CLASSES]
    assert sum(each) / len(each) == pytest.approx(metrics["test_miou"])
    assert metrics["train_images"] == TRAIN


def test_the_log_says_what_could_not_be_read_and_how_right_the_model_is(run: Path) -> None:
    epochs = [line for line in log_of(run) if line["line"] == "epoch"]
    assert [line["unreadable"] for line in epochs] == ["1"] * 14
    assert [bool(line["val_miou"]) for line in epochs] == ([False] * 6 + [True]) * 2


def test_the_best_model_knows_its_classes_and_names_pixels(run: Path, squares: Path) -> None:
    model = beitzoo.create_model(run, pretrained=True)
    assert isinstance(model, Segmenter)
    assert model.class_names == CLASSES
    names = [str(number) for number in range(TEST)]
    results = beitzoo.segment(model, [squares / "images" / "test" / f"{name}.png" for name in names])
    truths = [np.array(Image.open(squares / "annotations" / "test" / f"{name}.png")) for name in names]
    right = [(result.labels == truth)[truth < 3].mean() for result, truth in zip(results, truths, strict=True)]
    assert min(right) > 0.9


def test_heads_stay_for_the_same_classes_and_are_fresh_for_others(run: Path, squares: Path, tmp_path: Path) -> None:
    model = {"name": str(run), "pretrained": True, "overrides": {}}
    trained = beitzoo.create_model(run, pretrained=True)
    _, same = prepared(squares_recipe(squares, model=model))
    assert isinstance(trained, Segmenter)
    assert torch.equal(same.decode_head.conv_seg.weight, trained.decode_head.conv_seg.weight)
    names = ["floor", "bush", "brick"]
    (write_squares(tmp_path) / "classes.txt").write_text("\n".join(names))
    _, other = prepared(squares_recipe(tmp_path, model=model))
    assert other.class_names == tuple(names)
    assert not torch.equal(other.decode_head.conv_seg.weight, trained.decode_head.conv_seg.weight)
    assert torch.equal(other.decode_head.bn.weight, trained.decode_head.bn.weight)


@pytest.mark.parametrize("head", ["mim", None])
def test_training_starts_from_a_pretrained_backbone(squares: Path, tmp_path: Path, head: str | None) -> None:
    small = {"embed_dim": 32, "img_size": 48, "patch_size": 8}
    start = beitzoo.create_model("test_beit", **small, **({"head": head} if head else {}))
    for name, parameter in start.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    beitzoo.save_pretrained(start, tmp_path)
    recipe = squares_recipe(squares, model={"name": str(tmp_path), "pretrained": True}, task={"bias_init_std": 0.5})
    _, model = prepared(recipe)
    tables = [block.attn.relative_position_bias_table for block in model.backbone.blocks]
    shared = start.backbone.rel_pos_bias.relative_position_bias_table if head else None
    own = [shared] * 2 if head else [block.attn.relative_position_bias_table for block in start.blocks]
    assert all(torch.equal(table, expected) for table, expected in zip(tables, own, strict=True))
    assert torch.equal(model.backbone.patch_embed.proj.weight, start.backbone.patch_embed.proj.weight)


def test_a_frozen_network_stays_as_it_is(squares: Path, tmp_path: Path) -> None:
    overrides = {**LINEAR["overrides"], "drop_path_rate": 0.5}
    recipe = squares_recipe(
        squares, model={"name": "test_beit", "overrides": overrides}, task={"frozen": True}, epochs=1
    )
    _, before = prepared(recipe)
    train_segmenter(recipe, tmp_path)
    after = beitzoo.create_model(tmp_path, pretrained=True)
    assert isinstance(after, Segmenter)
    moved = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])}
    assert moved == {name for name in before.state_dict() if name.startswith("decode_head.")}
    assert "auxiliary_loss" not in log_of(tmp_path)[0]


def test_the_mean_and_deviation_of_a_recipe_are_used_and_kept(squares: Path) -> None:
    augment = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "distort": False}
    task, model = prepared(squares_recipe(squares, task={"augment": augment}))
    data = model.pretrained.data
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (task.samples.views.mean, task.samples.views.std) == (data.mean, data.std)
    task, model = prepared(squares_recipe(squares))
    assert task.samples.views.mean == model.pretrained.data.mean == (0.5, 0.5, 0.5)


def test_a_run_is_evaluated_on_its_test_images_as_it_read_their_masks(run: Path, squares: Path) -> None:
    """Neither --ignore nor the parts are said again."""
    result = CliRunner().invoke(app, ["evaluate", str(run), "--data", str(squares), "--mode", "whole", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    metrics = json.loads((run / "metrics.json").read_text())
    assert (row["count"], metrics["test_count"], metrics["test_failures"]) == (TEST, TEST, 0)
    assert row["miou"] == pytest.approx(metrics["test_miou"], abs=1e-3)


def test_an_image_whose_mask_labels_nothing_is_left_out_and_said(tmp_path: Path) -> None:
    write_squares(tmp_path)
    for part in ("training", "test"):
        Image.new("L", (72, 56), 255).save(tmp_path / "annotations" / part / "1.png")
    task, model = prepared(squares_recipe(tmp_path, epochs=1, batch_size=TRAIN))
    assert "Left out as no pixel of the mask has a class, 1: annotations/training/1.png" in task.describe()
    (batch,) = task.batches(0)
    assert (len(batch.images), batch.unreadable) == (
        TRAIN - 1,
        [("images/training/1.png", "its mask annotations/training/1.png: no pixel has a class")],
    )
    metrics = task.measure_test(model.eval())
    assert (metrics["test_count"], metrics["test_failures"]) == (TEST - 1, 1)


def test_a_validation_of_outputs_that_are_not_finite_is_not_finite(squares: Path) -> None:
    task, model = prepared(squares_recipe(squares))
    nn.init.constant_(model.decode_head.conv_seg.bias, math.nan)
    metrics = task.validate(model.eval())
    assert metrics.keys() == set(task.metric_names)
    assert all(map(math.isnan, metrics.values()))


# ---- what is refused --------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_said_before_the_run(squares: Path, tmp_path: Path) -> None:
    good = squares_recipe(squares).model_dump()

    def refused(reason: str, **changes: Any) -> None:
        sections = {name: {**good[name], **change} for name, change in changes.items()}
        with pytest.raises(UserError, match=reason):
            prepared(Recipe.model_validate({**good, **sections}))

    refused("images without masks", data={"source": "folder"})
    refused("data.path is missing", data={"path": None})
    refused("train_per_class", data={"train_per_class": 2})
    refused("2 to 255 classes", task={"labels": {"classes": ["all"], "ignore": [1, 2, 3]}})
    refused("no pixel has a class", data={"path": _unlabelled(tmp_path)})
    refused("two or more", train={"batch_size": 4, "accumulation": 4})
    refused("2 channels", model={"overrides": {**good["model"]["overrides"], "in_chans": 2}})
    refused("out of range: 3", task={"labels": {}})
    refused("The stride is", task={"inference": {"stride": 49}})
    for part, numbers, reason in (("validation", 9, "out of range: 9"), ("test", 255, "to hold out no pixel has a cl")):
        root = write_squares(tmp_path / part)
        for mask in (root / "annotations" / part).glob("*.png"):
            Image.new("L", (72, 56), numbers).save(mask)
        refused(reason, data={"path": root})


def _unlabelled(root: Path) -> Path:
    write_squares(root)
    for mask in (root / "annotations").rglob("*.png"):
        with Image.open(mask) as image:
            Image.new("L", image.size, 3).save(mask)
    return root


def test_the_command_trains_a_segmentation_model(squares: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "squares.toml"
    recipe.write_text(
        '[model]\nname = "test_beit"\noverrides = { embed_dim = 32, img_size = 48, decoder = "linear" }\n'
        '[data]\nsource = "annotations"\n[train]\nupdates = 1\nbatch_size = 2\nlr = 1e-3\n'
        '[task]\nkind = "segment"\nlabels = { ignore = [3] }\n'
    )
    command = ["finetune", str(recipe), "--set", f"data.path={squares}", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 <= metrics["test_miou"] <= 100
    assert math.isfinite(metrics["val_macc"])


def test_recipes_of_both_tasks_are_found_by_name() -> None:
    assert load_recipe("camvid").task.kind == "segment"
    assert load_recipe("cifar10").task.kind == "finetune"
