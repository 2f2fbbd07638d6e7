"""A run leaves what it promises, and what cannot be done is known before it."""

import csv
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import resources
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from colours import COLOURS, colour_recipe, write_colours
from commands import run as command
from PIL import Image

import beitzoo
from beitzoo.errors import UserError
from beitzoo.factory import look_up
from beitzoo.images.datasets import labelled_folder
from beitzoo.images.splits import read_split
from beitzoo.models.beit import Beit
from beitzoo.training import folder, loop
from beitzoo.training.data import Batch
from beitzoo.training.folder import RunError, saved_states
from beitzoo.training.loop import NonFiniteError
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError, read_resolved
from beitzoo.training.signals import Interrupted
from beitzoo.training.tasks.finetune import FinetuneTask, _labels_of_same_classes, finetune, prepare
from beitzoo.zoo.checkpoints import Classify, Mim, PretrainedConfig
from beitzoo.zoo.labels import label_names

ALONE = Processes(0, 1, torch.device("cpu"))
ANSWERED = {"answers.csv", "per_class.csv", "mistakes.png"}
FILES = {"best", "last", "log.csv", "metrics.json", "recipe.toml", "split.csv", "tensorboard", *ANSWERED}
OF_TIME = ("seconds", "images_per_sec", "wait_share")


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    finetune(colour_recipe(colours), out)
    return out


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))


def changed(recipe: Recipe, section: str, **values: object) -> Recipe:
    document = recipe.model_dump()
    document[section].update(values)
    return Recipe.model_validate(document)


def test_a_run_leaves_what_it_promises(run: Path, colours: Path) -> None:
    assert {path.name for path in run.iterdir()} == FILES
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_count"] + metrics["test_failures"] == 12
    assert metrics["test_top1"] > 90
    assert metrics["seed"] == metrics["split_seed"] == 0
    lines = log_of(run)
    assert (metrics["train_images"], str(metrics["updates"]), metrics["processes"]) == (18, lines[-1]["update"], 1)
    assert (metrics["torch"], metrics["threads"]) == (torch.__version__, torch.get_num_threads())
    epochs = [line for line in lines if line["line"] == "epoch"]
    assert [line["epoch"] for line in epochs] == ["1", "2", "3", "4", "5"]
    assert [line["update"] for line in lines if line["line"] == "updates"][:4] == ["2", "3", "4", "6"]
    assert float(epochs[-1]["loss"]) < float(epochs[0]["loss"])
    best = max(epochs, key=lambda line: (float(line["val_top1"]), -float(line["val_loss"])))
    assert metrics["val_top1"] == float(best["val_top1"])
    split = read_split(run / "split.csv", labelled_folder(colours))
    assert [len(part) for part in (split.train, split.val, split.test)] == [18, 6, 12]


def test_losses_of_lines_make_the_loss_of_their_epoch(tmp_path: Path) -> None:
    data = write_colours(tmp_path / "data")
    (data / "blue" / "0.png").replace(data / "red" / "0.png")
    Image.new("RGB", (8, 8), "blue").save(data / "blue" / "0.png")
    finetune(changed(colour_recipe(data, epochs=1), "run", log_updates=1), tmp_path / "out")
    *lines, epoch = log_of(tmp_path / "out")
    assert [line["update"] for line in lines] == ["1", "2", "3"]
    assert float(epoch["loss"]) == pytest.approx(sum(float(line["loss"]) for line in lines) / 3)
    rates = [float(line["lr"]) for line in lines]
    assert rates == pytest.approx([0, 1e-3, 2e-3])


@pytest.mark.parametrize(("warmup", "told"), [(3, True), (2, False)])
def test_a_warmup_and_a_moving_average_that_do_not_end_are_told(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], warmup: int, told: bool
) -> None:
    # A moving average over 2 or 1.25 updates, in a run of 3: half of it, or less.
    finetune(colour_recipe(colours, epochs=1, warmup_updates=warmup, ema_decay=0.5 - 0.3 * told), tmp_path / "out")
    said = capsys.readouterr().err
    assert ("The warm-up is not shorter than the run" in said) is told
    assert ("the moving average goes over about 2 updates, and the run has 3" in said) is not told


def test_a_run_of_updates_says_how_long_it_is(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(colour_recipe(colours, epochs=None, updates=4, val_epochs=3), tmp_path / "out")
    said = capsys.readouterr().err
    assert "4 updates of 6 images, 1.333 epochs of 3 updates, in fp32 on 1 x cpu. Starting." in said
    assert "It is validated every 3 epochs and in the last" in said
    assert [line["update"] for line in log_of(tmp_path / "out") if line["line"] == "epoch"] == ["3", "4"]


def test_a_trained_model_knows_its_classes(run: Path) -> None:
    model = beitzoo.create_model(f"local-dir:{run / 'best'}", pretrained=True)
    assert model.class_names == COLOURS
    assert model.num_classes == 3


def test_a_finished_run_is_refused(run: Path) -> None:
    with pytest.raises(RunError, match="holds a finished run; choose another folder"):
        finetune(read_resolved(run / "recipe.toml"), run)


def test_a_second_run_in_the_same_folder_is_refused(colours: Path, tmp_path: Path) -> None:
    recipe = colour_recipe(colours)
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    tmp_path.joinpath("out").mkdir()
    lock = [sys.executable, "-c", code, str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(lock, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(RunError, match="A run is going on in"):
            finetune(recipe, tmp_path / "out")
        other.communicate("\n")


def test_the_number_of_parts_changes_nothing_but_rounding(run: Path, colours: Path, tmp_path: Path) -> None:
    """Without stochastic depth, which is drawn for each part."""
    losses = []
    for parts in (1, 3):
        recipe = changed(colour_recipe(colours, epochs=2, accumulation=parts), "model", overrides={})
        finetune(recipe, tmp_path / str(parts))
        losses.append([float(line["loss"]) for line in log_of(tmp_path / str(parts))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_interrupted_run_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within an epoch; the models, the log and the metrics are those of a run that was not."""
    recipe = read_resolved(run / "recipe.toml")
    interrupt_after(5, monkeypatch)
    with pytest.raises(Interrupted, match="Stopped after 5 of 15 updates"):
        finetune(recipe, tmp_path)
    assert [path.name for path in saved_states(tmp_path)] == ["state-5"]
    with pytest.raises(RunError, match=r"another recipe: train.lr is 0.002 there and 1.0 here"):
        finetune(changed(recipe, "train", lr=1), tmp_path)
    monkeypatch.undo()
    finetune(changed(recipe, "run", log_updates=2, save_epochs=2), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in ("best", "last"):
        path = Path(name, "model.safetensors")
        assert (tmp_path / path).read_bytes() == (run / path).read_bytes()
    for ours, theirs in zip(log_of(tmp_path), log_of(run), strict=True):
        assert {k: v for k, v in ours.items() if k not in OF_TIME} == {
            k: v for k, v in theirs.items() if k not in OF_TIME
        }


def interrupt_after(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal come while an update is done."""
    plain = loop._Fit._update

    def interrupted(self: loop._Fit, *arguments: object) -> None:
        plain(self, *arguments)  # type: ignore[arg-type]
        if self.state.update == update:
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(loop._Fit, "_update", interrupted)


def test_other_images_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_colours(tmp_path / "data")
    interrupt_after(1, monkeypatch)
    with pytest.raises(Interrupted):
        finetune(colour_recipe(data), tmp_path / "out")
    Image.new("RGB", (8, 8)).save(data / "red" / "new.png")
    with pytest.raises(RunError, match="The images are not those of the run"):
        finetune(colour_recipe(data), tmp_path / "out")


def test_a_run_that_did_nothing_does_not_block_its_folder(colours: Path, tmp_path: Path) -> None:
    recipe = colour_recipe(colours, epochs=1)
    with pytest.raises(NonFiniteError):
        finetune(changed(recipe, "train", lr=1e30, warmup_epochs=0, clip_grad=0), tmp_path)
    assert folder.check_folder(tmp_path, recipe) is None


def test_a_loss_that_is_not_finite_stops_the_run(colours: Path, tmp_path: Path) -> None:
    """At the first one; what was saved before stays, and can be read."""
    recipe = colour_recipe(colours, epochs=20, lr=1e12, warmup_epochs=19, clip_grad=0)
    message = r"at update \d+ \(epoch \d+\), with a learning rate of .*train\.lr.*train\.precision=fp32"
    with pytest.raises(NonFiniteError, match=message):
        finetune(recipe, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    for name in ("best", "last"):
        if (tmp_path / name).exists():
            model = beitzoo.create_model(str(f"local-dir:{tmp_path / name}"), pretrained=True)
            assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_linear_probe_changes_the_head_and_the_norm_only(colours: Path, tmp_path: Path) -> None:
    recipe = changed(colour_recipe(colours, epochs=1), "task", freeze_blocks="all", crop_pct=0.5)
    before = prepared(recipe).state_dict()
    finetune(recipe, tmp_path)
    probe = beitzoo.create_model(f"local-dir:{tmp_path / 'last'}", pretrained=True)
    moved = {name for name, weight in probe.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert probe.config.drop_path_rate == 0.2
    assert probe.pretrained.data.crop_pct == 0.5


def test_mixing_needs_pairs(colours: Path) -> None:
    recipe = changed(colour_recipe(colours, accumulation=6), "task", mixup=0.8)
    with pytest.raises(RecipeError, match="6 per update in as many parts leave one to each"):
        prepare(recipe, ALONE)


def test_weights_and_order_are_those_of_the_classes(tmp_path: Path) -> None:
    """In the loss each image has the weight of its class, mixed or not; an epoch shows as many of each class."""
    data = write_colours(tmp_path / "data", per_class=20)
    for name in [f"green/{number}.png" for number in range(10)] + [f"red/{number}.png" for number in range(15)]:
        (data / name).unlink()
    recipe = changed(colour_recipe(data, batch_size=10), "data", val_fraction=0.2, test_fraction=0.3)

    def prepared_with(**values: object) -> tuple[FinetuneTask, Beit]:
        return prepare(changed(recipe, "task", label_smoothing=0.1, **values), ALONE)

    weighted, model = prepared_with(balance="loss")
    found = Counter(weighted.images.classes_of(index)[0] for index in weighted.split.train)
    weights = torch.tensor([20 / (3 * found[label]) for label in range(3)])
    images, labels = torch.randn(10, 3, 64, 64), torch.tensor([0] * 6 + [1] * 3 + [2] * 1)
    with torch.no_grad():
        logits = model.eval()(images).log_softmax(1)
        each = -0.9 * logits[range(10), labels] - 0.1 * logits.mean(1)
        for task, expected in (
            (prepared_with()[0], each.mean()),
            (weighted, (each * weights[labels]).mean()),
            (prepared_with(balance="loss", mixup=0.8, mixup_prob=0)[0], (each * weights[labels]).mean()),
        ):
            loss, items, _ = task.loss(model, Batch(images, labels, []))
            assert (loss.item(), items) == (pytest.approx(expected.item(), rel=1e-5), 10)
    assert shown_in_an_epoch(weighted) == found
    assert len(found) == 3 and min(found.values()) < 4 < 10 < max(found.values())
    assert sorted(shown_in_an_epoch(prepared_with(balance="sampling")[0]).values()) == [6, 7, 7]


def shown_in_an_epoch(task: FinetuneTask) -> Counter[int]:
    assert task.images.labels is not None
    parts = islice(task.order.parts(0), task.updates_per_epoch)
    return Counter(task.images.labels[sample.image] for part in parts for sample in part)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"overrides": {"in_chans": 4}}, "takes 4 channels, but images are read as grey"),
        ("model", {"overrides": {"dephth": 4}}, "did you mean 'depth'"),
        ("model", {"overrides": {"global_pool": ""}}, "one logit for each of 3 classes"),
        ("model", {"name": "test_biet"}, "test_beit"),
        ("model", {"checkpoint": "absent.pth"}, "absent.pth"),
        ("data", {"path": "absent"}, "absent"),
        ("data", {"test_fraction": 0.01}, "A fraction of 0.01 of 36 images is 0"),
        ("train", {"accumulation": 4}, "6 images per update cannot be shared evenly by 1 processes in 4 parts"),
        ("task", {"augment": {"kind": "crop", "auto_augment": "rnd-m9"}}, "'rnd-m9' is no policy of timm"),
        (
            "task",
            {"freeze_blocks": 3},
            "task.freeze_blocks is 3, but the network has 2 blocks; give at most 2, or 'all'",
        ),
    ],
)
def test_what_cannot_be_done_is_known_before(
    colours: Path, tmp_path: Path, section: str, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        finetune(changed(colour_recipe(colours), section, **values), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "only" / "0.png")
    with pytest.raises(RecipeError, match="There is one class only, only"):
        finetune(colour_recipe(tmp_path / "data"), tmp_path / "out")


def test_a_broken_file_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        finetune(colour_recipe(write_colours(tmp_path / "data"), epochs=3), tmp_path / "out")
    messages = [record.message for record in caplog.records if "0.png" in record.message]
    assert len(messages) == 1
    assert messages[0].startswith("Left out red/0.png: not an image that can be read")


def test_a_head_for_the_same_classes_stays(colours: Path, tmp_path: Path) -> None:
    start = beitzoo.create_model("test_beit", num_classes=3)
    start.pretrained = PretrainedConfig(head=Classify(num_classes=3, labels=COLOURS), license="mit")
    beitzoo.save_pretrained(start, tmp_path / "start")
    recipe = changed(colour_recipe(colours), "model", name=f"local-dir:{tmp_path / 'start'}", pretrained=True)
    kept = prepared(recipe)
    assert torch.equal(kept.head.weight, start.head.weight)
    assert kept.pretrained.license == "mit"
    start.pretrained = replace(start.pretrained, head=Classify(num_classes=3, labels=("a", "b", "c")))
    beitzoo.save_pretrained(start, tmp_path / "start")
    other = prepared(recipe)
    assert not torch.equal(other.head.weight, start.head.weight)
    assert torch.equal(other.blocks[1].mlp.fc1.weight, start.blocks[1].mlp.fc1.weight)
    assert label_names(other.pretrained.head) == COLOURS


def test_random_weights_have_no_licence_of_others(colours: Path) -> None:
    recipe = changed(colour_recipe(colours), "model", name="beit_nano_patch4_32.digits", overrides={"in_chans": 3})
    assert prepared(recipe).pretrained.license is None


def test_a_pretraining_start_becomes_a_classifier(colours: Path, tmp_path: Path) -> None:
    """Started from a file, with the name of a row whose head is for visual tokens."""
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
    name = "beit_base_patch16_224.mim_in22k"
    row = look_up(name).pretrained
    assert row is not None and isinstance(row.head, Mim)
    start = beitzoo.create_model(name, num_classes=0, **small)
    torch.save({"model": start.state_dict()}, tmp_path / "start.pth")
    recipe = changed(colour_recipe(colours), "model", name=name, checkpoint=tmp_path / "start.pth", overrides=small)
    model = prepared(recipe)
    assert model.pretrained.paper == row.paper
    beitzoo.save_pretrained(model, tmp_path / "tuned")
    tuned = beitzoo.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True)
    assert tuned.pretrained.head == Classify(num_classes=3, labels=COLOURS)
    assert tuned.pretrained.license == row.license == "MIT"
    assert tuned.pretrained.paper == row.paper
    facts = json.loads(command("info", str(tmp_path / "tuned"), "--json").stdout)
    assert (facts["license"], facts["paper"]) == ("MIT", row.paper)
    assert torch.equal(tuned.blocks[1].mlp.fc1.weight, start.blocks[1].mlp.fc1.weight)


def test_a_head_of_imagenet_stays_for_folders_named_by_synset() -> None:
    """As ImageNet's folders are; the labels go on to be its names."""
    with resources.files("timm.data").joinpath("_info/imagenet_synsets.txt").open() as file:
        synsets = tuple(file.read().split())
    head = Classify(labels="imagenet-1k")
    assert _labels_of_same_classes(head, synsets, "softmax") == "imagenet-1k"
    assert _labels_of_same_classes(head, synsets[::-1], "softmax") is None
    assert _labels_of_same_classes(Classify(), synsets, "softmax") is None
    assert _labels_of_same_classes(head, synsets, "sigmoid") is None
    several = replace(head, activation="sigmoid")
    assert _labels_of_same_classes(several, synsets, "softmax") is None
    assert _labels_of_same_classes(several, synsets, "sigmoid") == "imagenet-1k"


def prepared(recipe: Recipe) -> Beit:
    return prepare(recipe, ALONE)[1]


@pytest.mark.slow
def test_torchrun_starts_the_command(colours: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\nname="test_beit"\n[data]\nsource="folder"\npath="{colours}"\nval_fraction=0.25\n'
        "[train]\nepochs=2\nbatch_size=6\nlr=1e-3\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "beitzoo"]
    command = [*launch, "finetune", str(path), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result.stderr.count("2 epochs of 3 updates of 6 images, in fp32 on 2 x cpu") == 1


def test_a_batch_without_images_has_gradients(colours: Path) -> None:
    """Other processes wait for them."""
    task, model = prepare(colour_recipe(colours), ALONE)
    nothing = Batch(torch.empty(0, 3, *model.config.img_size), torch.empty(0, dtype=torch.int64), [])
    loss, count, _ = task.loss(model.train(), nothing)
    loss.backward()
    assert (loss.item(), count) == (0, 0)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_a_classifier_needs_classes_and_images_to_be_measured_on(colours: Path) -> None:
    recipe = colour_recipe(colours)
    with pytest.raises(RecipeError, match="The images have no classes"):
        prepare(changed(recipe, "data", source="images"), ALONE)
    for name, counts in (("val_fraction", (0, 12)), ("test_fraction", (9, 0))):
        expected = rf"There are {counts[0]} images to choose the best model by and {counts[1]} held out"
        with pytest.raises(RecipeError, match=expected):
            prepare(changed(recipe, "data", **{name: 0.0}), ALONE)


def test_tables_are_trained_on_part_by_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is named test is never trained on, an unreadable row is named, and workers change nothing."""
    colours = write_colours(tmp_path / "colours", per_class=4)
    files = sorted(colours.rglob("*.png"))
    for name, those in (("train-00000-of-00001", files), ("test-00000-of-00001", files[::2])):
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in those]
        table = pa.table({"image": images, "label": [file.parent.name for file in those]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    metrics = []
    for workers in (0, 2):
        out = tmp_path / f"run-{workers}"
        recipe = changed(colour_recipe(tmp_path / "data", epochs=1, batch_size=3), "data", source="parquet")
        metrics.append(finetune(changed(recipe, "run", workers=workers), out))
    assert {name: value for name, value in metrics[0].items() if "second" not in name} == {
        name: value for name, value in metrics[1].items() if "second" not in name
    }
    assert (metrics[0]["test_count"], metrics[0]["test_failures"]) == (5, 1)
    assert "Left out train-00000-of-00001.parquet:8: not an image" in caplog.text
    split = (tmp_path / "run-0" / "split.csv").read_text().splitlines()
    assert {line.split("-")[0] for line in split if line.endswith('"test"')} == {'"test'}
    assert sum(line.startswith('"train-00000-of-00001.parquet:') for line in split) == 12
