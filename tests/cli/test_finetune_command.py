"""The command finetune: with a recipe or without one, tried first, and gone on with."""

from pathlib import Path

from colours import write_colours
from commands import run


def test_without_a_recipe_it_is_tried_first(tmp_path: Path) -> None:
    data = write_colours(tmp_path / "data")
    options = ["--data", str(data), "--model", "test_beit", "--out", str(tmp_path / "out"), "--set", "train.epochs=1"]
    tried = run("finetune", *options, "--dry-run")
    assert tried.exit_code == 0, tried.stderr
    assert "  train.epochs = 1: as set\n" in tried.stderr
    assert tried.stdout.endswith("Nothing was found that would stop this run; nothing was written.\n")
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_tried_as_well(tmp_path: Path) -> None:
    tried = run("finetune", "digits", "--out", str(tmp_path / "out"), "--dry-run", "--set", "train.batch_size=4")
    assert tried.exit_code == 0, tried.stderr
    assert "so that 20,175 with their validations take about" in tried.stdout
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_too_much_is_said(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    for arguments, reason in (
        ([], "Name what is trained and on what: --data PHOTOS --model NAME"),
        (["--data", "digits"], "Name what is trained and on what"),
        (["digits", "--model", "test_beit"], "Give a recipe, or --data and --model"),
        (["digits", "--resume"], "--resume goes on with the run in --out by its own recipe"),
        (["--resume"], "There is no run in"),
    ):
        ended = run("finetune", *arguments, *out)
        assert (ended.exit_code, reason in ended.stderr) == (2, True), ended.stderr
