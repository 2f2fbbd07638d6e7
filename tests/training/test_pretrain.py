"""Masked image modelling by a recipe: what is predicted, what is drawn, and what a run leaves."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import mim_recipe, write_colours
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import beitzoo
from beitzoo.errors import UserError
from beitzoo.factory import create_tokenizer
from beitzoo.images.loading import Sample, load_batches
from beitzoo.images.masks import Masking, draw_mask, sample_generator
from beitzoo.inference.tokenize import TokenJob, tokenize
from beitzoo.models.beit import Beit
from beitzoo.models.mim import MaskedImageModel
from beitzoo.saving import save_tokenizer
from beitzoo.training.masked_images import MaskedBatch
from beitzoo.training.optim import make_optimizer
from beitzoo.training.pretrain_sections import Pretrain
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError, load_recipe
from beitzoo.training.tasks.finetune import prepare as prepare_finetuning
from beitzoo.training.tasks.pretrain import PretrainTask, code_use, prepare, pretrain
from beitzoo.zoo.checkpoints import HALF, IMAGENET_MEAN, IMAGENET_STD, Mim

ALONE = Processes(0, 1, torch.device("cpu"))
AGGREGATION = {"early_layers": 1, "head_layers": 1}
BIAS = "relative_position_bias_table"


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("data"), per_class=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tokenizer") / "dvae"
    save_tokenizer(create_tokenizer("test_dvae"), folder)
    return folder


@pytest.fixture(scope="module")
def run(colours: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with all that is optional: validation, held-out images, probe, pictures."""
    out = tmp_path_factory.mktemp("run") / "out"
    recipe = mim_recipe(
        colours,
        tokenizer,
        split={"val_fraction": 0.2, "test_fraction": 0.2},
        task={"picture_epochs": 2, "probe": {"data": {"source": "folder", "path": colours}, "epochs": 2}},
        epochs=3,
        batch_size=4,
    )
    pretrain(recipe, out)
    return out


def prepared(recipe: Recipe) -> tuple[PretrainTask, MaskedImageModel]:
    return prepare(recipe, ALONE)


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


# ---- what is predicted ------------------------------------------------------------------------------------------


def likelihood(logits: Tensor, targets: list[int]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in per cent, one patch at a time in double precision."""
    losses = [float(-F.log_softmax(row.double(), 0)[code]) for row, code in zip(logits, targets, strict=True)]
    right = [int(row.argmax()) == code for row, code in zip(logits, targets, strict=True)]
    return sum(losses) / len(losses), 100 * sum(right) / len(right)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_loss_is_that_of_the_tokens_of_masked_patches(colours: Path, tokenizer: Path, heads: int) -> None:
    overrides = {} if heads == 1 else AGGREGATION
    task, model = prepared(mim_recipe(colours, tokenizer, model={"overrides": overrides}))
    batch = next(task.batches(0))
    with torch.no_grad():
        loss, count, logs = task.loss(model.eval(), batch)
        every = model(batch.images, batch.masks, all_patches=True)
        codes = create_tokenizer(tokenizer, pretrained=True).encode(batch.token_images).flatten(1)
    masked = [(image, patch) for image, patch in batch.masks.flatten(1).nonzero().tolist()]
    targets = [int(codes[place]) for place in masked]
    expected = [
        likelihood(torch.stack([one[place] for place in masked]), targets) for one in ([every] if heads == 1 else every)
    ]
    assert count == len(masked) > 20
    assert loss.item() == pytest.approx(sum(loss for loss, _ in expected), abs=1e-5)
    assert logs["token_accuracy"].item() == pytest.approx(expected[0][1])
    if heads == 2:
        assert logs["token_loss"].item() == pytest.approx(expected[0][0], abs=1e-5)
        assert logs["aggregation_loss"].item() == pytest.approx(expected[1][0], abs=1e-5)
        assert logs["aggregation_accuracy"].item() == pytest.approx(expected[1][1])
    assert torch.equal(task.counts["codes"], torch.bincount(torch.tensor(targets), minlength=64))


def test_images_are_cropped_as_for_the_network_that_was_named(
    colours: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = beitzoo.create_model("test_beit")
    named.pretrained = replace(named.pretrained, data=replace(named.pretrained.data, crop_pct=1.0))
    beitzoo.save_pretrained(named, tmp_path)
    monkeypatch.chdir(tokenizer.parent)
    recipe = changed(mim_recipe(colours, Path(tokenizer.name)), "model", name=str(tmp_path))
    assert recipe.task.tokenizer == str(tokenizer)  # a folder is found from elsewhere, too
    assert prepared(recipe)[1].pretrained.data.crop_pct == 1.0


def test_the_tokenizer_does_not_learn(colours: Path, tokenizer: Path) -> None:
    task, model = prepared(mim_recipe(colours, tokenizer))
    task.loss(model.train(), next(task.batches(0)))[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in task.tokenizer.parameters())
    assert not task.tokenizer.training


def test_a_batch_without_images_has_gradients(colours: Path, tokenizer: Path) -> None:
    """Other processes wait for them; the broken image is counted."""
    task, model = prepared(mim_recipe(colours, tokenizer, model={"overrides": AGGREGATION}))
    broken = next(place for place, path in enumerate(task.images.images) if Path(str(path)).match("red/0.png"))
    batch = next(iter(load_batches(task.samples, [[Sample(0, broken)]], 0)))
    loss, count, logs = task.loss(model.train(), batch)
    loss.backward()
    assert (loss.item(), count, {value.item() for value in logs.values()}) == (0, 0, {0})
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert task.counts["unreadable"] == 1
    assert batch.unreadable[0][0] == "red/0.png"


def test_code_use_counts_codes_and_their_perplexity() -> None:
    used, perplexity = code_use(torch.tensor([5, 5, 0, 5, 5]))
    assert (used, perplexity) == (4, pytest.approx(4))
    assert code_use(torch.tensor([9, 0])) == (1, pytest.approx(1))
    assert code_use(torch.tensor([1, 3]))[1] == pytest.approx(4 / 27**0.25)


# ---- what is drawn ----------------------------------------------------------------------------------------------


def same(one: MaskedBatch, other: MaskedBatch) -> bool:
    tensors = [(one.images, other.images), (one.token_images, other.token_images), (one.masks, other.masks)]
    return all(torch.equal(*pair) for pair in tensors) and one.unreadable == other.unreadable


def test_workers_change_nothing(colours: Path, tokenizer: Path) -> None:
    batches = {
        workers: list(prepared(mim_recipe(colours, tokenizer, run={"workers": workers}))[0].batches(1))
        for workers in (0, 2)
    }
    assert len(batches[0]) == len(batches[2]) == 5
    assert all(map(same, batches[0], batches[2]))


def test_masks_and_views_are_of_the_seed_the_epoch_and_the_image(colours: Path, tokenizer: Path) -> None:
    """As they are said to be drawn; not of the order, nor of what was drawn before."""
    task, _ = prepared(mim_recipe(colours, tokenizer, seed=3))
    first, second, again = (
        next(iter(load_batches(task.samples, [[Sample(epoch, image) for image in images]], 0)))
        for epoch, images in ((0, (4, 7)), (1, (4, 7)), (0, (7,)))
    )
    assert torch.equal(first.masks[1], draw_mask(task.samples.masking, sample_generator(3, 0, 7, "mask")))
    assert torch.equal(first.masks[1], again.masks[0])
    assert torch.equal(first.images[1], again.images[0])
    assert torch.equal(first.token_images[1], again.token_images[0])
    assert not torch.equal(first.masks, second.masks)
    assert not torch.equal(first.images, second.images)
    other, _ = prepared(mim_recipe(colours, tokenizer, seed=4))
    assert not same(first, other.samples.__getitems__([Sample(0, 4), Sample(0, 7)]))


def test_images_to_validate_on_look_the_same_in_every_epoch(colours: Path, tokenizer: Path) -> None:
    task, model = prepared(mim_recipe(colours, tokenizer, split={"val_fraction": 0.25}))
    first = task.validate(model.eval())
    assert first == task.validate(model)
    assert set(first) == {"val_loss", "val_token_accuracy"}
    assert first["val_loss"] == pytest.approx(math.log(64), abs=0.3)  # it has not learnt yet


# ---- tokens that were computed before ---------------------------------------------------------------------------


def token_job(recipe: Recipe, **changes: Any) -> TokenJob:
    """What `beitzoo tokenize` makes of a recipe, two views of each image."""
    task, _ = prepared(recipe)
    options = {"tokenizer": task.tokenizer, "views": task.samples.views, "seed": recipe.train.seed, **changes}
    return TokenJob(name="tokens", images=task.images, samples=task.split.train, count=2, **options)


def test_tokens_computed_before_are_those_of_the_loop(colours: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The same images, masks and targets in the first epochs; then the views come again, with other masks."""
    recipe = mim_recipe(colours, tokenizer, split={"val_fraction": 0.2}, epochs=3, batch_size=14)
    tokenize(token_job(recipe), tmp_path / "tokens")
    task, model = prepared(recipe)
    stored, _ = prepared(changed(recipe, "task", tokens=tmp_path / "tokens"))
    stored.tokenizer.encode = fail  # type: ignore[method-assign, assignment]
    batches = [[*one.batches(0)] for one in (task, stored)]
    for epoch, (batch, cached) in enumerate(zip(*batches, strict=True)):
        again = torch.equal(batch.images, cached.images)
        assert again == (epoch < 2)
        assert torch.equal(batch.masks, cached.masks)
        assert [name for name, _ in batch.unreadable] == [name for name, _ in cached.unreadable]
        losses = [one.loss(model.eval(), looked)[0] for one, looked in ((task, batch), (stored, cached))]
        assert torch.equal(*losses) == again
    first, last = batches[1][0], batches[1][2]  # in another order
    assert sorted(image.sum().item() for image in first.images) == sorted(image.sum().item() for image in last.images)


def fail(images: Tensor) -> Tensor:
    raise AssertionError("the tokenizer runs")


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    document = recipe.model_dump()
    document[section] |= values
    return Recipe.model_validate(document)


def test_tokens_of_something_else_are_refused(colours: Path, tokenizer: Path, tmp_path: Path) -> None:
    recipe = mim_recipe(colours, tokenizer)
    torch.manual_seed(2)
    tokenize(token_job(recipe, tokenizer=create_tokenizer("test_dvae")), tmp_path / "weights")
    tokenize(token_job(recipe), tmp_path / "tokens")
    others = write_colours(tmp_path / "others", per_class=5)
    for change, message in (
        (changed(recipe, "task", tokens=tmp_path / "weights"), "are of tokens with other weights than those of"),
        (changed(recipe, "task", tokens=tmp_path / "tokens", views={"hflip": 0.1}), "hflip is 0.5 there and 0.1 here"),
        (changed(recipe, "task", tokens=tmp_path / "absent"), "so it holds no tokens"),
        (mim_recipe(others, tokenizer, task={"tokens": tmp_path / "tokens"}), "are of other images than these"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            prepare(change, ALONE)


# ---- what a run leaves ------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(run: Path, tokenizer: Path) -> None:
    epochs = [row for row in log_of(run) if row["line"] == "epoch"]
    losses = [float(row["val_loss"]) for row in epochs]
    assert losses[-1] < losses[0] < 4.2
    assert all(0 < int(row["codes_used"]) <= 64 and 1 <= float(row["code_perplexity"]) <= 64 for row in epochs)
    assert [bool(row["probe_linear"]) for row in epochs] == [False, True, True]  # every second, and the last
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["epoch-0002.png", "epoch-0003.png"]
    with Image.open(run / "pictures" / "epoch-0003.png") as picture:
        assert min(picture.size) > 300
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val_loss"] == min(losses)
    assert metrics["test_loss"] == pytest.approx(metrics["val_loss"], abs=0.5)
    best = beitzoo.create_model(run / "best", pretrained=True)
    assert isinstance(best, MaskedImageModel)
    assert best.pretrained.head == Mim(network=best.config, tokenizer=str(tokenizer))


def test_an_unreadable_image_is_counted_once_in_an_epoch(
    colours: Path, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the only one of its update, which is skipped then; no neighbour takes its place."""
    pretrain(mim_recipe(colours, tokenizer, batch_size=1, split={"source": "images"}), tmp_path / "out")
    assert [row["unreadable"] for row in log_of(tmp_path / "out") if row["line"] == "epoch"] == ["1", "1"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Left out red/0.png"]


def test_without_validation_the_best_model_is_the_last(colours: Path, tokenizer: Path, tmp_path: Path) -> None:
    metrics = pretrain(mim_recipe(colours, tokenizer, epochs=1), tmp_path / "out")
    assert (tmp_path / "out" / "best" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "last").exists()
    assert not any(name.startswith(("val_", "test_")) for name in metrics)


def test_the_number_of_parts_changes_nothing_but_rounding(colours: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Masks differ in their counts, and the parts in their images: each masked patch weighs the same."""
    weights = []
    for accumulation in (1, 3):
        recipe = mim_recipe(colours, tokenizer, model={"overrides": {}}, accumulation=accumulation)
        out = tmp_path / str(accumulation)
        pretrain(recipe, out)
        weights.append(beitzoo.create_model(out, pretrained=True).state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=2e-5, rtol=1e-3)


def test_finetuning_takes_the_result_by_path(run: Path, colours: Path) -> None:
    """The shared bias table is then each block's own, and what was for pretraining only is left behind."""
    pretrained = beitzoo.create_model(run, pretrained=True).backbone.state_dict()
    assert pretrained[f"rel_pos_bias.{BIAS}"].abs().max() > 0
    for name in (run, run / "best"):
        recipe = Recipe.model_validate(
            {
                "model": {"name": str(name), "pretrained": True},
                "data": {"source": "folder", "path": colours, "val_fraction": 0.25},
                "train": {"epochs": 1, "batch_size": 6, "lr": 1e-3},
                "task": {"kind": "finetune", "bias_init_std": 0.5},  # of networks with random weights only
            }
        )
        model = prepare_finetuning(recipe, ALONE)[1]
        assert type(model) is Beit
        state = model.state_dict()
        for block in range(2):
            assert torch.equal(state.pop(f"blocks.{block}.attn.{BIAS}"), pretrained[f"rel_pos_bias.{BIAS}"])
        fresh = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
        assert all(torch.equal(state[name], pretrained[name]) for name in state.keys() - fresh)
        assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


# ---- what learns how fast ---------------------------------------------------------------------------------------


def test_what_is_decayed_is_what_the_original_decays(colours: Path, tokenizer: Path) -> None:
    """Matrices, the mask token and the bias table; no vector, and neither the class token nor positions."""
    overrides = {"use_abs_pos_emb": True, **AGGREGATION}
    recipe = mim_recipe(colours, tokenizer, model={"overrides": overrides}, bias_lr_scale=10, weight_decay=0.07)
    task, model = prepared(recipe)
    groups = task.parameter_groups(model)
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    decayed = {name for name, parameter in model.named_parameters() if of[id(parameter)]["weight_decay"] == 0.07}
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = ("backbone.blocks.0", "backbone.blocks.1", "cls_pt_layers.0")
    assert decayed == {
        "backbone.mask_token",
        "backbone.patch_embed.proj.weight",
        f"backbone.rel_pos_bias.{BIAS}",
        "lm_head.weight",
        *(f"{block}.{linear}.weight" for block in blocks for linear in linears),
    }
    assert {of[id(p)]["lr_scale"] for name, p in model.named_parameters() if name.endswith(BIAS)} == {10}
    assert {of[id(p)]["lr_scale"] for name, p in model.named_parameters() if not name.endswith(BIAS)} == {1}
    assert {group["eps"] for group in make_optimizer(groups, recipe.train).param_groups} == {1e-8}


# ---- the recipes ------------------------------------------------------------------------------------------------

# unilm's models with their heads, counted from the original code.
PUBLISHED = {
    "beit_base": 91_965_776,
    "beit_large": 311_534_016,
    "beitv2_base": 106_143_056,
    "beitv2_large": 336_728_512,
}


@pytest.mark.parametrize("path", sorted(Path("configs/pretrain").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_builds_the_network_for_its_tokenizer(path: Path) -> None:
    recipe = load_recipe(path, kind="pretrain")
    assert isinstance(recipe.task, Pretrain)
    name = recipe.task.tokenizer
    overrides: dict[str, Any] = {}
    if name.startswith("runs/"):  # one that is trained before, by the recipe of the same name
        section = load_recipe(path.stem, kind="tokenizer").model
        name, overrides = section.name, section.overrides
    with torch.device("meta"):
        tokenizer = create_tokenizer(name, device="meta", **overrides)
        options: dict[str, Any] = {**recipe.model.overrides, "head": "mim", "vocab_size": tokenizer.vocab_size}
        model: object = beitzoo.create_model(recipe.model.name, device="meta", **options)
    assert isinstance(model, MaskedImageModel)
    network = model.backbone.config
    assert (network.grid_size, network.in_chans) == (tokenizer.grid_size, tokenizer.in_chans)
    assert Masking(grid=network.grid_size, **recipe.task.mask.model_dump())
    assert network.use_mask_token
    family = "_".join(path.stem.split("_")[:2])
    if family in PUBLISHED:
        assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[family]


def test_recipes_of_the_originals_differ_where_they_do() -> None:
    recipes = {path.stem: load_recipe(path, kind="pretrain") for path in Path("configs/pretrain").glob("beit*.toml")}
    assert len(recipes) == 9
    for name, recipe in recipes.items():
        assert isinstance(recipe.task, Pretrain)
        second, large = name.startswith("beitv2"), "large" in name
        train, views, overrides = recipe.train, recipe.task.views, recipe.model.overrides
        assert (train.batch_size, train.lr, train.min_lr, train.clip_grad) == (2048, 1.5e-3, 1e-5, 3)
        assert train.betas == ((0.9, 0.98) if name.endswith("_300e") and second else (0.9, 0.999))
        assert overrides["drop_path_rate"] == (0 if name.endswith("_300e") and second else 0.1)
        assert overrides["init_values"] == (1e-5 if large else 0.1)
        assert overrides.get("early_layers", 0) == (0 if not second else 21 if large else 9)
        assert (recipe.task.mask.count, recipe.task.mask.exact) == (75, second)
        assert views.scale == ((0.2, 1) if second else (0.08, 1))
        assert views.mean == (HALF if "in22k" in name else IMAGENET_MEAN)
        assert views.std == (HALF if "in22k" in name else IMAGENET_STD)
        assert (train.warmup_updates, train.warmup_epochs) == ((10_000, 0) if "in22k" in name else (0, 10))


# ---- what cannot be done ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"mask": {"count": 17}}}, "task.mask.count=17; of 4 x 4 patches, 1 to 16 can be masked"),
        ({"batch_size": 99}, "There are 18 images to train on, less than one update of 99"),
        ({"layer_decay": 0.9}, "leave train.layer_decay out"),
        ({"model": {"overrides": {"vocab_size": 9}}}, "vocab_size comes from task.tokenizer"),
        (
            {"model": {"overrides": {"img_size": 32}}},
            "The model has 2 x 2 patches, and the tokenizer makes 4 x 4 tokens",
        ),
        ({"model": {"overrides": {"in_chans": 1}}}, "The network has in_chans=1, and the tokenizer"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_known_before(
    colours: Path, tokenizer: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        pretrain(mim_recipe(colours, tokenizer, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        prepare(mim_recipe(tmp_path / "empty", tokenizer, split={"source": "images"}), ALONE)


def test_a_probe_needs_classes(colours: Path, tokenizer: Path) -> None:
    probe = {"data": {"source": "images", "path": colours}}
    with pytest.raises(RecipeError, match=r"have no classes, and task\.probe needs one class of each"):
        prepare(mim_recipe(colours, tokenizer, task={"probe": probe}), ALONE)


def test_a_recipe_of_finetuning_is_refused() -> None:
    with pytest.raises(RecipeError, match="is a recipe for `beitzoo finetune`, not `beitzoo pretrain`"):
        load_recipe(Path("configs/finetune/digits.toml"), kind="pretrain")
