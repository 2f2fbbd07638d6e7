"""The pictures of a run: what is in them is what its log and its answers say."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
from colours import COLOURS, colour_recipe, write_colours
from commands import run as command

from beitzoo.errors import InvalidValueError, MissingFileError
from beitzoo.training import report
from beitzoo.training.curves import draw_curves, read_lines
from beitzoo.training.report import draw_run
from beitzoo.training.tasks.finetune import finetune


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    finetune(colour_recipe(write_colours(root / "data"), {"pictures": True}, epochs=2), root / "out")
    return root / "out"


def test_a_run_leaves_pictures_and_they_can_be_drawn_again(run: Path) -> None:
    names = ("curves.png", "confusion.png")
    before = {name: (run / name).read_bytes() for name in names}
    for name in names:
        (run / name).unlink()
    result = command("report", str(run))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(run / name) for name in names]
    assert {name: (run / name).read_bytes() for name in names} == before


def test_answers_are_those_of_the_metrics(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    with (run / "per_class.csv").open() as file:
        classes = list(csv.DictReader(file))
    with (run / "answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert tuple(row["class"] for row in classes) == COLOURS
    right = sum(row["class"] == row["answer"] for row in answers)
    assert len(answers) == sum(int(row["images"]) for row in classes) == metrics["test_count"]
    assert right == sum(int(row["right"]) for row in classes)
    assert metrics["test_top1"] == pytest.approx(100 * right / len(answers))
    assert all(row["image"].split("/")[0] == row["class"] for row in answers)
    assert not any(row["image"] == "red/0.png" for row in answers)  # which cannot be read


def test_curves_are_those_of_the_log(run: Path) -> None:
    lines = read_lines(run / "log.csv")
    metrics = json.loads((run / "metrics.json").read_text())
    figure = draw_curves(lines, metrics)
    loss, accuracy, rate = figure.axes
    epochs = [line for line in lines if line["line"] == "epoch"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.get_lines()}
    assert drawn["loss, training"] == [[int(line["update"]), float(line["loss"])] for line in epochs]
    assert drawn["loss, validation"] == [[int(line["update"]), float(line["val_loss"])] for line in epochs]
    (top1, best) = accuracy.get_lines()
    assert top1.get_xydata().tolist() == [[int(line["update"]), float(line["val_top1"])] for line in epochs]
    best_epoch = max(epochs, key=lambda line: (float(line["val_top1"]), -float(line["val_loss"])))
    assert best.get_xdata() == [int(best_epoch["update"])] * 2
    rates = {(int(line["update"]), float(line["lr"])) for line in lines}
    assert set(map(tuple, rate.get_lines()[0].get_xydata().tolist())) == rates


def test_logs_of_any_task_are_drawn() -> None:
    """What has no value is left out, a loss that falls far is drawn on a logarithmic scale."""
    names = ("line", "update", "loss", "lr", "token_accuracy", "val_token_accuracy", "codes_used", "explained")
    rows = [("updates", 1, 8.0, 0.1, 1, "", "", ""), ("epoch", 2, 0.1, 0.2, "nan", 5, 7, "")]
    figure = draw_curves([dict(zip(names, map(str, row), strict=True)) for row in rows], {}, "a title")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "%", "codes", "learning rate"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]
    labels = [text.get_text() for axes in figure.axes[:3] for text in axes.get_legend().get_texts()]
    assert labels == ["loss", "token accuracy, training", "token accuracy, validation", "codes used"]


def test_without_matplotlib_a_run_says_so_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends as others do, but for two pictures."""
    plain = importlib.util.find_spec
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else plain(name))
    out = tmp_path / "out"
    finetune(colour_recipe(write_colours(tmp_path / "data"), {"pictures": True}, epochs=1), out)
    said = capsys.readouterr().err
    start = said.index("curves.png and confusion.png will be missing")
    assert start < said.index("epoch 1, update 3")
    assert f"pip install 'beitzoo[plots]'; if the run has ended by then, `beitzoo report {out}` draws them." in said
    assert not (out / "curves.png").exists()
    assert (out / "mistakes.png").exists() and (out / "metrics.json").exists()
    monkeypatch.undo()
    assert draw_run(out) == [out / "curves.png", out / "confusion.png"]


def test_what_is_no_run_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="is no folder of a run"):
        draw_run(tmp_path)
    (tmp_path / "log.csv").write_text("a,b\n")
    with pytest.raises(InvalidValueError, match="is no log of a run"):
        read_lines(tmp_path / "log.csv")
    assert command("report", str(tmp_path)).exit_code == 2
