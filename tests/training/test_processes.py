"""Several processes do what one does: the mean over all items, whoever has how many of them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colours import colour_recipe, mim_recipe, mixture_recipe, write_colours, write_mixtures
from safetensors.torch import load_file
from squares import squares_recipe, write_squares

from beitzoo.factory import create_model, create_tokenizer
from beitzoo.saving import save_tokenizer
from beitzoo.training.folder import saved_states
from beitzoo.training.recipe import Recipe, dump_recipe
from beitzoo.training.replay import Replay, replay
from beitzoo.training.tasks.finetune import finetune, prepare
from beitzoo.training.tasks.pretrain import pretrain
from beitzoo.training.tasks.segment import train_segmenter

_PROGRAM = Path(__file__).parents[1] / "killed_runs.py"


def pretraining(directory: Path, **train: object) -> Recipe:
    """Masks of unlike size, and a broken image, so that no two parts of an update have as many masked patches."""
    tokenizer = directory / "tokenizer"
    save_tokenizer(create_tokenizer("test_dvae"), tokenizer)
    data = write_colours(directory / "data", per_class=6)
    return mim_recipe(
        data,
        tokenizer,
        model={"overrides": {"early_layers": 1, "head_layers": 1}},
        run={"log_updates": 1},
        batch_size=4,
        **train,
    )


def train_by_two(recipe: Recipe, out: Path, sharding: str) -> None:
    """Train by two processes; the run is in `whole`."""
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"sharding": sharding})})
    out.mkdir()
    (out / "recipe.toml").write_text(dump_recipe(recipe))
    command = [sys.executable, str(_PROGRAM), "0", "2", "events", "1", "0", str(out / "recipe.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def numbers(run: Path) -> list[list[float]]:
    with (run / "log.csv").open() as file:
        names = ("loss", "token_accuracy", "aggregation_loss", "grad_norm", "lr", "codes_used", "unreadable")
        return [[float(line[name] or 0) for name in names] for line in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_equal_one_in_two_parts(tmp_path: Path, sharding: str) -> None:
    recipe = pretraining(tmp_path, accumulation=1)
    train_by_two(recipe, tmp_path / "two", sharding)
    train = {**recipe.train.model_dump(), "accumulation": 2}
    torch.set_num_threads(1)
    pretrain(Recipe.model_validate({**recipe.model_dump(), "train": train}), tmp_path / "one")
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two" / "whole")
    assert len(one) == 2 * (4 + 1)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        load_file(run / "best" / "model.safetensors") for run in (tmp_path / "one", tmp_path / "two" / "whole")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ways", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_weights_in_shards_learn_as_whole_ones(ways: str, tmp_path: Path) -> None:
    """Two processes with whole weights, two with parts of them, and one by itself end with the same model.

    In all ways, so do runs that are broken off and go on in another of these; in the same way, they end bit-equal.
    """
    program = Path(__file__).parents[1] / "shards_in_two.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(program), str(tmp_path), ways]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr
    runs, others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = runs.pop("alone")
    assert len(runs) == {"some": 2, "all": 7}[ways]
    for name, run in runs.items():
        for kind in ("model", "average"):
            torch.testing.assert_close(run[kind], alone[kind], rtol=0, atol=1e-13)
            if name in others:
                torch.testing.assert_close(others[name][kind], run[kind], rtol=0, atol=0)
        assert run["best"] == pytest.approx(alone["best"], rel=1e-12)
    for way in ("whole", "sharded") if ways == "all" else ():
        for kind in ("model", "average"):
            torch.testing.assert_close(runs[way][kind], runs[f"stopped {way}, {way}"][kind], rtol=0, atol=0)
    assert runs["sharded"]["moments"] == pytest.approx(alone["moments"] / 2, rel=0.01)
    for name in ("best", "last"):
        ours, theirs = (load_file(tmp_path / run / name / "model.safetensors") for run in ("sharded", "alone"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_batch_norms_are_those_of_all_processes(tmp_path: Path) -> None:
    """Two processes with unlike shares of a batch, one even empty, do what one does with the whole batch.

    Nobody waits for the gradients of the block that is not read. What is saved is an ordinary model.
    """
    program = Path(__file__).parents[1] / "batch_norms_in_two.py"
    for count in ("1", "2"):
        (tmp_path / count).mkdir()
        command = [sys.executable, str(program), str(tmp_path / count), count]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert result.returncode == 0, result.stderr
    one, first, second = (torch.load(tmp_path / name) for name in ("1/0.pt", "2/0.pt", "2/1.pt"))
    torch.testing.assert_close(first, one, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    start = create_model("test_beit", head="segment", num_classes=3, out_indices=(-1, 0, 0, 0), auxiliary_channels=8)
    moved = {name for name in first["model"] if name.endswith("num_batches_tracked")}
    assert moved == {name for name in start.state_dict() if name.endswith("num_batches_tracked")} != set()
    assert {int(first["model"][name]) for name in moved} == {3}
    saved = create_model(f"local-dir:{tmp_path / '2' / 'best'}", pretrained=True).state_dict()
    assert list(saved) == list(start.state_dict())
    expected = {name: tensor.to(saved[name].dtype) for name, tensor in first["model"].items()}
    torch.testing.assert_close(dict(saved), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"], 2),
        # On CPUs Accelerate starts several processes by MPI only.
        (["accelerate.commands.launch", "--cpu", "--num_processes=1", "--mixed_precision=no", "-m"], 1),
    ],
)
def test_launchers_start_the_command(tmp_path: Path, launcher: list[str], processes: int) -> None:
    recipe = pretraining(tmp_path, epochs=1)
    lines = [
        f'[model]\nname="test_beit"\n[data]\nsource="folder"\npath="{recipe.data.path}"\n[train]\nepochs=1\nlr=1e-3',
        f'batch_size=4\n[task]\nkind="pretrain"\ntokenizer="{tmp_path / "tokenizer"}"\npicture_epochs=0',
        'mask={count=6, min_block=2}\n[run]\nsharding="full"',
    ]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    command = ["beitzoo", "pretrain", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *command], capture_output=True, text=True, timeout=900, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["processes"] == processes
    shards = ", which have the weights in shards" * (processes > 1)
    assert result.stderr.count(f"1 epochs of 4 updates of 4 images, in fp32 on {processes} x cpu{shards}. ") == 1


@pytest.mark.slow
def test_two_processes_choose_one_recipe_and_say_so_once(tmp_path: Path) -> None:
    data = write_colours(tmp_path / "data", per_class=6)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "beitzoo", "finetune"]
    options = ["--data", str(data), "--model", "test_beit", "--set", "train.updates=3", "--set", "run.sharding=full"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for last in (["--dry-run"], []):
        command = [sys.executable, "-m", *launch, *options, "--out", str(tmp_path / "out"), *last]
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert result.returncode == 0, result.stderr
        said = result.stderr + result.stdout
        for line in ("18 images of 3 classes", "images to train on", "The recipe for test_beit", "An update takes"):
            assert said.count(line) == 1, line
    assert json.loads(result.stdout)["processes"] == 2
    assert "3 updates of 4 images, 1.5 epochs of 2 updates, in" in result.stderr
    assert result.stderr.count(" on 2 x cpu, which have the weights in shards. Starting.") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "sharding", "task"),
    [
        ("one", "full", {"lora": {"rank": 2, "besides": "all"}, "freeze_blocks": 1}),
        ("many", "none", {"mixup": 0.8, "cutmix": 1.0, "balance": "loss", "label_smoothing": 0.1}),
    ],
)
def test_two_processes_fine_tune_as_one_does(
    tmp_path: Path, labels: str, sharding: str, task: dict[str, object]
) -> None:
    """Adapters in shards; several labels, mixed and balanced. Both in parts, and averaged; an image is broken."""
    train = {"epochs": 2, "warmup_epochs": 0, "batch_size": 8, "ema_decay": 0.5}
    if labels == "many":
        recipe = mixture_recipe(write_mixtures(tmp_path / "data", rounds=3), **train)
    else:
        recipe = colour_recipe(write_colours(tmp_path / "data"), **train)
    document = recipe.model_dump()
    document["task"].update(task)
    document["model"]["overrides"]["drop_path_rate"] = 0.0
    whole, parts = (
        Recipe.model_validate({**document, "train": {**document["train"], "accumulation": count}}) for count in (4, 2)
    )
    train_by_two(parts, tmp_path / "two", sharding)
    torch.set_num_threads(1)
    finetune(whole, tmp_path / "one")
    for name in ("best", "last"):
        ours, theirs = (load_file(tmp_path / run / name / "model.safetensors") for run in ("one", "two/whole"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_train_a_segmentation_model_as_one_does(tmp_path: Path, sharding: str) -> None:
    """One has a broken image and so fewer labelled pixels; norms go over the images of both.

    Weights are not compared: biases before a batch norm have gradients of rounding alone, which AdamW steps along.
    """
    data = write_squares(tmp_path / "data", broken=True)
    small = squares_recipe(data).model.overrides
    model = {"name": "test_beit", "overrides": {**small, "decoder_drop_rate": 0.0}}
    recipe = squares_recipe(data, model=model)
    train_by_two(recipe, tmp_path / "two", sharding)
    torch.set_num_threads(1)
    train_segmenter(recipe, tmp_path / "one")
    names = ("loss", "decode_loss", "auxiliary_loss", "grad_norm", "val_miou", "val_aacc", "unreadable")
    one, two = (pixel_numbers(tmp_path / run, names) for run in ("one", "two/whole"))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-3, atol=1e-4)


def pixel_numbers(run: Path, names: tuple[str, ...]) -> list[list[float]]:
    with (run / "log.csv").open() as file:
        return [[float(line[name] or 0) for name in names] for line in csv.DictReader(file)]


@pytest.mark.slow
def test_an_update_that_failed_in_shards_is_done_again_by_one_process(colours: Path, tmp_path: Path) -> None:
    """What is kept of it is what processes with whole weights keep, and it fails in the same place."""
    program = Path(__file__).parents[1] / "failed_in_two.py"
    command = [sys.executable, str(program), str(colours), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr
    kept = {}
    for name in ("none", "full"):
        (state,) = saved_states(tmp_path / name / "failed")
        tensors = torch.load(state / "tensors.pt")
        kept[name] = (state.name, {part: tensors[part] for part in ("model", "ema")})
        replayed = replay(tmp_path / name, prepare)
        assert isinstance(replayed, Replay)
        assert (replayed.failed, f"state-{replayed.update - 1}") == (True, state.name)
        assert replayed.module is not None
    assert kept["none"][0] == kept["full"][0]
    for part, tensors in kept["none"][1].items():
        for name, theirs in tensors.items():
            scale = theirs.abs().max().double().clamp(min=1)  # of numbers that are about to end
            ours = kept["full"][1][part][name]
            torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-6, msg=f"{part} {name}")
