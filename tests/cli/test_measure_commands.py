"""report and benchmark: what they write, and how they end."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from commands import run

from beitzoo import cli

RESULTS = Path("results").resolve()


def test_report_reads_every_csv_of_a_folder_and_writes_to_out_only(tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    result = run("report", "--results", str(results), "--out", str(out))
    assert (result.exit_code, "No CSV in" in result.stderr) == (2, True)
    assert not out.exists()
    (results / "notes.csv").write_text("a,b\n1,2\n")
    shutil.copy(RESULTS / "comparison.csv", results / "any name.csv")
    before = {path: path.read_bytes() for path in results.iterdir()}
    result = run("report", "--results", str(results), "--out", str(out))
    assert result.exit_code == 0
    written = sorted(str(path) for path in out.rglob("*") if path.is_file())
    assert sorted(result.stdout.splitlines()) == written
    assert {path: path.read_bytes() for path in results.iterdir()} == before
    assert len(list((out / "accuracy").glob("*.csv"))) == 9
    assert (out / "plots" / "ratio-inference-float32-beitzoo.png").exists()
    assert not (out / "plots" / "accuracy-speed.png").exists()
    assert run("report").exit_code == 2


@pytest.mark.parametrize("door", ["benchmark.py", "beitzoo benchmark", "beitzoo.measure.benchmark"])
def test_every_door_prints_rows_and_says_what_is_wrong_in_one_line(
    door: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> int:
        with pytest.raises(SystemExit) as caught:
            if door == "beitzoo benchmark":
                monkeypatch.setattr(sys, "argv", ["beitzoo", "benchmark", *arguments])
                cli.main()
            monkeypatch.setattr(sys, "argv", [door, *arguments])
            if door.endswith(".py"):
                runpy.run_path(door, run_name="__main__")
            else:
                monkeypatch.delitem(sys.modules, door, raising=False)
                runpy.run_module(door, run_name="__main__")
        return int(caught.value.code or 0)

    assert call("--model", "test_beit", "--bench", "profile") == 0
    assert json.loads(capsys.readouterr().out.partition("--result\n")[2])["model"] == "test_beit"
    assert call("--model", "beit_bas") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: There is no model 'beit_bas'; did you mean")
    assert len(printed.err.splitlines()) == 1
    assert call("--help") == 0
    assert "--num-bench-iter" in capsys.readouterr().out
