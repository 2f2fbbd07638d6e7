"""collect: rows go into a table once, whatever is collected again."""

import csv
import json
from pathlib import Path

import pytest
from colours import colour_recipe, write_colours
from commands import run

from beitzoo.training.tasks.finetune import finetune


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    finetune(colour_recipe(write_colours(tmp_path / "data")), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_that_is_collected_again_replaces_its_row(finished: Path, tmp_path: Path) -> None:
    table = tmp_path / "r.csv"
    first = run("collect", str(finished), "--results-file", str(table))
    assert first.exit_code == 0
    metrics = json.loads((finished / "metrics.json").read_text())
    told = f"data, all labels, {metrics['updates']} updates from random: top1 {metrics['test_top1']:.2f} (n=1)"
    header, *lines = first.stdout.splitlines()
    assert header.split() == ["run", "from", "seconds", "loss", "val", "loss", "top1"]
    assert str(finished) in "".join(line.split()[0] for line in lines[:-1])  # folded, and not cut
    assert lines[-1] == told
    (finished / "metrics.json").write_text(json.dumps({**metrics, "test_top1": 12.5}))
    again = run("collect", str(finished), str(tmp_path), "--results-file", str(table), "--json")
    assert (again.exit_code, "is no run: it has no recipe.toml" in again.stderr) == (1, True)
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert row["top1"] == "12.5"
    assert json.loads(again.stdout)[0]["top1"] == 12.5
