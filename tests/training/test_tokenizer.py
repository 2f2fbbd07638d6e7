"""Tokenizer training: loss and codebook are those of a plain reference; restarts change nothing."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colours import tokenizer_recipe, write_colours
from oracles import randomise
from torch.nn import functional as F

import beitzoo
from beitzoo.errors import UserError
from beitzoo.factory import create_tokenizer
from beitzoo.models.quantizer import kmeans
from beitzoo.models.tokenizers import Vqkd
from beitzoo.training.generators import derive_seed
from beitzoo.training.optim import groups_without_layers
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, dump_recipe, load_recipe
from beitzoo.training.tasks.tokenizer import TokenizerTask, prepare, train_tokenizer
from beitzoo.training.viewed_images import ViewBatch

ALONE = Processes(0, 1, torch.device("cpu"))


def prepared(recipe: Recipe) -> TokenizerTask:
    task, model = prepare(recipe, ALONE)
    model.train()
    return task


def one_update(task: TokenizerTask) -> list[torch.Tensor]:
    """Do what the loop does in the first update, but for the step; return the images."""
    batches = task.batches(0)
    images = []
    for _ in range(task.recipe.train.accumulation):
        batch = next(batches)
        task.loss(task.model, batch)[0].backward()
        images.append(batch.images)
    return images


def test_a_run_learns_and_says_how_well(tmp_path: Path) -> None:
    recipe = tokenizer_recipe(write_colours(tmp_path / "data"), epochs=6)
    metrics = train_tokenizer(recipe, tmp_path / "run")
    with (tmp_path / "run" / "log.csv").open() as file:
        epochs = [row for row in csv.DictReader(file) if row["line"] == "epoch"]
    losses = [float(row["val_loss"]) for row in epochs]
    assert len(epochs) == 6
    assert losses[-1] < 0.7 * losses[0]
    assert all(1 <= float(row["perplexity"]) <= float(row["codes_used"]) <= 16 for row in epochs)
    assert metrics["val_loss"] == min(losses)
    best = create_tokenizer(tmp_path / "run" / "best", pretrained=True)
    assert best.decodes_to == "pixels"
    decoded = best.decode(best.encode(torch.rand(2, 3, 64, 64)))
    assert decoded.shape == (2, 3, 64, 64)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_the_codebook_starts_from_kmeans_of_the_first_update(tmp_path: Path) -> None:
    task = prepared(tokenizer_recipe(write_colours(tmp_path / "data")))
    torch.manual_seed(0)
    before = task.model.quantize.embedding.weight.clone()
    images = torch.cat([batch.images for batch in [next(task.batches(0))]])
    with torch.no_grad():
        features = task.model.features(images).flatten(0, 1)
    generator = torch.Generator().manual_seed(derive_seed(0, "k-means"))
    expected = kmeans(features, 16, generator)
    task._start_codebook()
    weight = task.model.quantize.embedding.weight
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(weight, before, atol=0.1)
    task._start_codebook()
    assert torch.equal(weight, task.model.quantize.embedding.weight)


def test_an_update_is_the_reference(tmp_path: Path) -> None:
    """Loss of pixels with commitment, and codes that move once by all features of the update."""
    recipe = tokenizer_recipe(write_colours(tmp_path / "data"), {"commitment": 0.5, "kmeans_init": False})
    task = prepared(recipe)
    before = task.model.quantize.embedding.weight.double().clone()
    batch = next(task.batches(0))
    found = task.model(batch.images)
    loss, count, logs = task.loss(task.model, batch)
    # Patch 6 of 4 x 4 is in the second row, third column.
    error = torch.stack(
        [
            (found.prediction[i, 6].view(3, 16, 16) - (2 * batch.images[i, :, 16:32, 32:48] - 1)).square().mean()
            for i in range(len(batch.images))
        ]
    )
    targets = task.model.pixel_targets(batch.images)
    torch.testing.assert_close((found.prediction - targets)[:, 6].square().mean(1), error)
    whole = (found.prediction - targets).square().mean()
    assert count == len(batch.images) == task.count_images(batch)
    torch.testing.assert_close(loss, whole + 0.5 * found.commitment)
    torch.testing.assert_close(logs["explained"], 1 - whole / (targets - targets.mean()).square().mean())
    after = task.model.quantize.embedding.weight.double()
    features = found.features.detach().double()
    for code in range(16):
        members = features[found.codes == code]
        moved = F.normalize(members.sum(0), dim=0) if len(members) else before[code]
        torch.testing.assert_close(
            after[code], F.normalize(0.99 * before[code] + 0.01 * moved, dim=0), atol=1e-6, rtol=0
        )
    assert not torch.equal(before, after)


def test_parts_of_an_update_learn_as_one(tmp_path: Path) -> None:
    """Codes move after the last part only, by all features; restarts draw from all of them."""
    data = write_colours(tmp_path / "data")
    books = []
    for accumulation in (1, 3):
        task = prepared(tokenizer_recipe(data, {"restart_codes": 1}, accumulation=accumulation))
        one_update(task)
        books.append(task.model.quantize.state_dict())
        gradient = task.model.encode_task_layer[0].weight.grad
        assert float(gradient.norm()) > 0
    for name, tensor in books[0].items():
        torch.testing.assert_close(tensor, books[1][name], rtol=0, atol=1e-5)


def test_a_dead_code_becomes_a_feature_of_the_update(tmp_path: Path) -> None:
    task = prepared(tokenizer_recipe(write_colours(tmp_path / "data"), {"restart_codes": 5, "kmeans_init": False}))
    quantizer = task.model.quantize
    with torch.no_grad():
        quantizer.embedding.weight[7] = -quantizer.embedding.weight[7]
    task._started = True
    quantizer.embedding.cluster_size.data.fill_(6.0)
    quantizer.embedding.cluster_size.data[7] = 0.0
    batch = next(task.batches(0))
    features = task.model(batch.images).features.flatten(0, 1)
    far = -F.normalize(features.mean(0), dim=0)  # no feature is near
    quantizer.embedding.weight.data[7] = far
    task.loss(task.model, batch)
    nearest = (features @ quantizer.embedding.weight[7]).max()
    torch.testing.assert_close(nearest, torch.tensor(1.0))


def test_features_of_a_teacher_are_compared_by_their_angle(tmp_path: Path) -> None:
    teacher = beitzoo.create_model("test_beit", global_pool="avg")
    randomise(teacher)
    beitzoo.save_pretrained(teacher.eval(), tmp_path / "teacher")
    recipe = tokenizer_recipe(write_colours(tmp_path / "data"), {"teacher": f"local-dir:{tmp_path / 'teacher'}"})
    task = prepared(recipe)
    assert task.model.config.teacher_dim == teacher.config.embed_dim
    batch = next(task.batches(0))
    task._start_codebook()
    found = task.model(batch.images)
    loss, _, logs = task.loss(task.model, batch)
    tokens = teacher.forward_features((batch.images - 0.5) / 0.5)[:, 1:]
    expected = F.layer_norm(tokens, tokens.shape[-1:], teacher.fc_norm.weight, teacher.fc_norm.bias, 1e-6)
    cosine = (F.normalize(found.prediction, dim=-1) * F.normalize(expected, dim=-1)).sum(-1).mean()
    torch.testing.assert_close(logs["cosine"], cosine)
    torch.testing.assert_close(loss, 1 - cosine + found.commitment)
    assert set(task.validate(task.model.eval())) == {"val_loss", "val_cosine"}


def test_a_batch_that_cannot_be_read_changes_no_code(tmp_path: Path) -> None:
    task = prepared(tokenizer_recipe(write_colours(tmp_path / "data")))
    task._start_codebook()
    before = task.model.quantize.embedding.weight.clone()
    loss, count, logs = task.loss(task.model, ViewBatch(torch.empty(0, 3, 64, 64), [("red/0.png", "broken")]))
    loss.backward()
    assert count == 0
    assert loss.item() == 0
    assert set(logs) == set(task.log_names)
    assert torch.equal(task.model.quantize.embedding.weight, before)


def test_images_that_all_cannot_be_read_measure_nothing(tmp_path: Path) -> None:
    task = prepared(tokenizer_recipe(write_colours(tmp_path / "data")))
    broken = next(place for place, path in enumerate(task.images.images) if str(path).endswith("red/0.png"))
    with pytest.raises(UserError, match="None of 1 images to measure the model on could be read"):
        task.measure(task.model.eval(), [broken])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"ema_decay": 0.9}}, "leave out train.ema_decay"),
        ({"train": {"layer_decay": 0.9}}, "leave out train.layer_decay"),
        ({"model": {"overrides": {"target": "features"}}}, "follows from task.teacher"),
        ({"model": {"name": "test_dvae"}}, "test_dvae is not trained here; name a VQ-KD"),
        ({"task": {"teacher": "resnet18"}}, "'resnet18' is no teacher"),
    ],
)
def test_what_is_no_run(change: dict[str, dict[str, object]], message: str, tmp_path: Path) -> None:
    recipe = tokenizer_recipe(write_colours(tmp_path / "data")).model_dump()
    recipe["model"]["overrides"] = {}
    for section, values in change.items():
        recipe[section] |= values
    with pytest.raises(UserError, match=message):
        prepare(Recipe.model_validate(recipe), ALONE)


@pytest.mark.parametrize("path", sorted(Path("configs/tokenizer").glob("*.toml")), ids=str)
def test_every_recipe_describes_a_tokenizer(path: Path) -> None:
    recipe = load_recipe(path, kind="tokenizer")
    with torch.device("meta"):
        model = create_tokenizer(recipe.model.name, **recipe.model.overrides)
    assert isinstance(model, Vqkd)
    assert recipe.task.views.jitter == 0  # as in the original; colours of the image are what is to be told
    groups = groups_without_layers(model, recipe.train)
    learned = sum(p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in groups) == learned


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation(tmp_path: Path) -> None:
    """Up to rounding; one of them meets a batch of a broken image only. Codes start, move and restart alike."""
    data = write_colours(tmp_path / "data")
    states, ends = [], []
    for count in (1, 2):
        out = tmp_path / str(count)
        recipe = tokenizer_recipe(data, {"restart_codes": 3}, accumulation=3 - count, batch_size=4, epochs=3)
        (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
        program = (
            "import sys; from pathlib import Path; from beitzoo.training.recipe import read_resolved;"
            "from beitzoo.training.tasks.tokenizer import train_tokenizer;"
            "train_tokenizer(read_resolved(Path(sys.argv[1])), Path(sys.argv[2]))"
        )
        (tmp_path / "program.py").write_text(program)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [*launch, str(tmp_path / "program.py"), str(tmp_path / "recipe.toml"), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        states.append(create_tokenizer(out / "last", pretrained=True).state_dict())
        with (out / "log.csv").open() as file:
            ends.append([row for row in csv.DictReader(file) if row["line"] == "epoch"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=2e-4, rtol=1e-3)
    for one, two in zip(*ends, strict=True):
        assert one["codes_used"] == two["codes_used"]
        assert float(one["perplexity"]) == pytest.approx(float(two["perplexity"]))
        assert float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), rel=1e-3)
