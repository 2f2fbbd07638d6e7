"""Fine-tuning without a recipe: from a folder and a name to a measured model, and what cannot be done."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from colours import COLOURS, write_mixtures

import beitzoo
from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError, OutOfMemoryError
from beitzoo.training import rehearsal
from beitzoo.training.first_probe import first_probe
from beitzoo.training.folder import RunError
from beitzoo.training.own_images import data_at, going_on, make_plan, resumed
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import RecipeError, change_recipe, load_recipe
from beitzoo.training.rehearsal import rehearse
from beitzoo.training.sections import Finetune
from beitzoo.training.tasks.finetune import prepare
from beitzoo.zoo.registry import UnknownModelError

SHORT = ["train.epochs=3", "train.precision=fp32", "run.tensorboard=false"]


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        beitzoo.finetune("test_beit", colours, out=out, settings=SHORT)
    (out.parent / "said.txt").write_text(said.getvalue())
    return out


def test_a_run_without_a_recipe_writes_the_one_that_was_chosen(run: Path, colours: Path) -> None:
    plan = make_plan("test_beit", data_at(colours), SHORT)
    assert load_recipe(run / "recipe.toml") == plan.recipe
    assert (plan.recipe.train.epochs, plan.recipe.train.warmup_epochs, plan.recipe.data.test_fraction) == (3, 0.3, 0.2)
    assert beitzoo.create_model(str(run / "best"), pretrained=True).class_names == COLOURS
    lines = plan.describe()
    found = [
        f"36 images of 3 classes in {colours}: 12 of each",
        "23 images to train on, 6 to choose by, 7 held out.",
        "These parts are drawn by chance, with data.split_seed 0.",
    ]
    assert set(found) <= set(lines)
    assert "  train.epochs = 3: as set" in lines
    said = (run.parent / "said.txt").read_text().splitlines()
    assert [said.count(line) for line in lines] == [1] * len(lines)  # by the plan, and not by the run again


def test_a_length_in_updates_replaces_the_chosen_epochs(colours: Path) -> None:
    """And a tenth of it is the warm-up."""
    plan = make_plan("test_beit", data_at(colours), [*SHORT[1:], "train.updates=20"])
    train = plan.recipe.train
    assert (train.epochs, train.updates, train.warmup_epochs, train.warmup_updates) == (None, 20, 0.0, 2)
    lines = [
        line for line in plan.describe() if line.startswith(("  train.epochs", "  train.updates", "  train.warmup"))
    ]
    assert lines == ["  train.warmup_updates = 2: a tenth of the run", "  train.updates = 20: as set"]


def test_adapters_get_rates_of_their_own_and_less_disk(colours: Path, tmp_path: Path) -> None:
    plan, whole = (make_plan("test_beit", data_at(colours), [*SHORT, *more]) for more in (["task.lora.rank=2"], []))
    assert (plan.recipe.train.weight_decay, whole.recipe.train.weight_decay) == (0, 0.05)
    assert plan.recipe.train.lr == pytest.approx(1.25e-3 * 8**-0.5 * 2, rel=0.05)  # of 4 images an update, and narrow
    assert "  task.lora.rank = 2: as set" in plan.describe()
    model = prepare(plan.recipe, Processes(0, 1, torch.device("cpu")))[1]
    learned, all_there = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or every)
        for every in (False, True)
    )
    # Twice a state, with two moments of what is learned, and two models, of 4 bytes each.
    assert rehearse(plan.recipe, prepare, tmp_path).disk == 4 * (4 * all_there + 4 * learned)


def test_a_csv_of_several_labels_is_recognised(tmp_path: Path) -> None:
    labels = write_mixtures(tmp_path / "data")
    plan = make_plan("test_beit", data_at(labels), SHORT)
    assert isinstance(plan.recipe.task, Finetune)
    assert (plan.recipe.task.labels, plan.recipe.task.label_smoothing) == ("many", 0.0)
    expected = "  task.labels = many: the images have any number of labels each: sigmoid, judged by mAP"
    assert expected in plan.describe()
    pretrained = change_recipe(plan.recipe, ["model.pretrained=true"]).model
    said = first_probe(pretrained, plan.images, plan.split)
    assert said.startswith("No probe: probes tell one class of each image")


def test_a_finished_run_and_one_of_something_else_are_kept(run: Path, colours: Path, tmp_path: Path) -> None:
    for model, data, reason in (
        ("test_beit", colours, "holds a finished run"),
        ("beit_nano_patch4_32", colours, "holds a run of test_beit on .*, not of beit_nano_patch4_32"),
        ("test_beit", tmp_path, "holds a run of test_beit on .*colours, not of test_beit on"),
    ):
        with pytest.raises(RunError, match=reason):
            going_on(model, data_at(data), run, SHORT)
    with pytest.raises(RunError, match="holds a finished run"):
        resumed(run)
    with pytest.raises(RunError, match=r"no run in .* to go on with: it has no recipe\.toml"):
        resumed(tmp_path)
    assert going_on("test_beit", data_at(colours), tmp_path, ()) is None


def test_an_interrupted_run_goes_on_by_its_own_recipe(run: Path, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "recipe.toml").write_bytes((run / "recipe.toml").read_bytes())
    recipe = load_recipe(run / "recipe.toml")
    assert going_on("test_beit", data_at(colours), tmp_path, SHORT) == resumed(tmp_path) == recipe
    with pytest.raises(RunError, match=r"train\.epochs is 3 there and 4 here"):
        going_on("test_beit", data_at(colours), tmp_path, ["train.epochs=4"])


def test_data_that_cannot_be_trained_on(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "red").symlink_to(colours / "red")
    (tmp_path / "few.csv").write_text(
        "path,label\n" + "".join(f"{colours}/{name}/{n}.png,{name}\n" for name in COLOURS for n in range(len(name) - 2))
    )
    for data, error, reason in (
        ("one", RecipeError, "There is one class only, red"),
        ("few.csv", RecipeError, r"Classes with too few images: blue \(2\), red \(1\)\. A class needs at least 3"),
        ("absent", MissingFileError, "There is no folder"),
        ("", MissingFileError, "No images in class folders"),
    ):
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        with pytest.raises(error, match=reason):
            make_plan("test_beit", data_at(tmp_path / data if data else empty))
    with pytest.raises(UnknownModelError, match="no model 'tset_beit'"):
        make_plan("tset_beit", data_at(colours))
    with pytest.raises(RecipeError, match=r"train: there is no key 'leraning_rate'; did you mean .*'\?$"):
        make_plan("test_beit", data_at(colours), ["train.leraning_rate=1"])


def test_a_probe_says_what_frozen_features_reach() -> None:
    plan = make_plan("beit_nano_patch4_32", data_at("digits"), ["train.precision=fp32"])
    assert plan.recipe.model.pretrained
    said = first_probe(plan.recipe.model, plan.images, plan.split)
    assert said.startswith("A linear probe on frozen features, fitted on 400 of the images, is right on 9")
    assert said.endswith("The optimized copy computed the features, the same to rounding.")
    assert "% of 200 others (block " in said
    random = load_recipe("digits").model
    assert first_probe(random, plan.images, plan.split).startswith("No probe: the weights start")


def test_a_rehearsal_measures_and_writes_nothing(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_plan("test_beit", data_at(colours), SHORT).recipe
    found = rehearse(recipe, prepare, tmp_path / "out")
    parameters = sum(parameter.numel() for parameter in beitzoo.create_model("test_beit", num_classes=3).parameters())
    assert (found.updates, found.disk) == (15, 8 * 4 * parameters)
    # Between what computing alone, and loading alone, would take: 3 validations of 6 images and a test of 7.
    assert found.seconds * (15 + 25 / 4 / 3) < found.total_seconds < found.seconds * (15 + 25 / 4) + 5
    assert found.describe().startswith(f"An update takes {found.seconds:.2g} s here, so that 15 with their validations")
    for patience, early in ((0, False), (1, True), (2, False)):  # the third validation is the last one anyway
        patient = change_recipe(recipe, [f"train.patience={patience}"])
        assert ("(less if it ends early" in rehearse(patient, prepare, tmp_path / "out").describe()) is early
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(FileAccessError, match=r"Nothing can be written in .*file: Not a directory"):
        rehearse(recipe, prepare, tmp_path / "file" / "out")
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda _: rehearsal.shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(FileAccessError, match="free space, and the run takes up to"):
        rehearse(recipe, prepare, tmp_path / "out")


def test_images_none_of_which_can_be_read_and_a_loss_of_nothing_are_known_before(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(12):
            (tmp_path / name / f"{number}.png").write_bytes(b"broken")
    recipe = make_plan("test_beit", data_at(colours), SHORT).recipe
    far = change_recipe(recipe, ["train.lr=1e30", "train.warmup_epochs=0"])
    with pytest.raises(
        InvalidValueError, match=r"nan after 1 of the updates .* of 1e\+30, in fp32. Lower train.lr, or"
    ):
        rehearse(far, prepare, tmp_path / "out")
    with pytest.raises(InvalidValueError, match="None of 4 images to train on can be read"):
        rehearse(change_recipe(recipe, [f"data.path={tmp_path}"]), prepare, tmp_path / "out")
    monkeypatch.setattr(rehearsal, "compute_loss", lambda *_: (torch.tensor(torch.nan), 4, {}))
    with pytest.raises(InvalidValueError, match="The loss is nan before anything is trained, in fp32"):
        rehearse(recipe, prepare, tmp_path / "out")


def test_a_network_larger_than_the_memory_is_refused_before_it_is_built(colours: Path, tmp_path: Path) -> None:
    """The system would kill what asks for its bias tables."""
    recipe = make_plan("test_beit", data_at(colours), SHORT).recipe
    side = recipe.model_copy(update={"model": recipe.model.model_copy(update={"overrides": {"img_size": 160_000}})})
    with pytest.raises(OutOfMemoryError, match=r"tokens takes .* GB or more, and .* GB are free"):
        rehearse(side, prepare, tmp_path)


def test_an_update_that_does_not_fit_says_what_takes_less(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recipe = change_recipe(make_plan("test_beit", data_at(colours), SHORT).recipe, ["train.accumulation=2"])
    monkeypatch.setattr(rehearsal, "compute_loss", full)
    with pytest.raises(OutOfMemoryError, match=r"One update of 4 images does not fit .* train.accumulation to 4"):
        rehearse(recipe, prepare, tmp_path)
    in_shards = change_recipe(recipe, ["run.sharding=full"])
    with pytest.raises(OutOfMemoryError, match="in shards each has a part of the moments, so that the run itself may"):
        rehearse(in_shards, prepare, tmp_path)


def test_a_rehearsal_says_what_a_process_of_a_run_in_shards_needs_less(colours: Path, tmp_path: Path) -> None:
    """Gradients, two moments and the average of what is trained; weights every process has for a while."""
    settings = [*SHORT, "run.sharding=full", "train.ema_decay=0.9", "task.freeze_blocks=1"]
    recipe = make_plan("test_beit", data_at(colours), settings).recipe
    found, model = rehearse(recipe, prepare, tmp_path), prepare(recipe, Processes(0, 1, torch.device("cpu")))[1]
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (found.shares, found.processes) == (4 * 4 * learned, 1)
    assert rehearse(change_recipe(recipe, ["run.sharding=none"]), prepare, tmp_path).shares == 0
    found = replace(found, memory=8_000_000_000, shares=4_000_000_000)
    assert "8 GB of memory (in shards, 4 of them are shared out among the processes of a run) and" in found.describe()
    assert "8 GB of memory here, with all in one process; each of 4 needs 3 GB less" in (
        replace(found, processes=4).describe()
    )
