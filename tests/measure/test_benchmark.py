"""A benchmark run is a row with its environment, and rows of another kind are refused."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import beitzoo
from beitzoo.measure.benchmark import benchmark_inference, inference_row, main
from beitzoo.measure.results import ENVIRONMENT, append_row, environment

TIMM_COLUMNS = [
    "model",
    "infer_img_size",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "param_count",
    "infer_gmacs",
    "infer_macts",
]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmark.py", "--num-warm-iter", "1", "--num-bench-iter", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_appends_its_row(tmp_path: Path) -> None:
    table = tmp_path / "new" / "rows.csv"
    for size in ("64", "48"):
        result = bench("--model", "test_beit", "-b", "2", "--img-size", size, "--results-file", str(table))
        assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.partition("--result\n")[2])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["infer_img_size"] for row in rows] == ["64", "48"]
    assert {key: str(value) for key, value in printed.items()} == rows[1]
    assert set(TIMM_COLUMNS) <= set(rows[0])
    for column in ("device", "threads", "torch", "beitzoo", "commit", "python", "platform", "date", "precision"):
        assert column in rows[0]
    rate = 2e3 / float(rows[0]["infer_step_time"])
    assert float(rows[0]["infer_samples_per_sec"]) == pytest.approx(rate, rel=0.01)


def test_a_foreign_results_file_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("a,b\n1,2\n")
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--model", "test_beit", "--results-file", str(table)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "['a', 'b']" in capsys.readouterr().err
    assert table.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tset_beit"], "did you mean 'test_beit'"),
        (["--model", "test_beit", "--precision", "int4"], "float32, bfloat16"),
        (["--model", "test_beit", "--img-size", "65"], "use 64 or 80"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_row_has_timms_figures() -> None:
    model = beitzoo.create_model("beit_base_patch16_224", device="meta")
    row = inference_row(model, "beit_base_patch16_224", 4, [10.0, 20.0, 30.0])
    assert [row[column] for column in TIMM_COLUMNS] == [
        "beit_base_patch16_224",
        224,
        200.0,
        20.0,
        4,
        86.53,
        17.56,
        23.9,
    ]


def test_every_timed_step_is_kept() -> None:
    times = benchmark_inference(beitzoo.create_model("test_beit"), 1, warm_iterations=1, iterations=3)
    assert len(times) == 3
    assert all(0 < time < 10_000 for time in times)


def test_a_row_is_on_disk_with_the_header_of_the_first(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    append_row(table, {"a": 1, "b": None})
    append_row(table, {"a": 2, "b": "x,y"})
    assert table.read_text() == 'a,b\n1,\n2,"x,y"\n'
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\], not \['a'\]"):
        append_row(table, {"a": 3})


def test_a_table_cut_short_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("a,b\n1,2")
    with pytest.raises(ValueError, match="does not end with a line"):
        append_row(table, {"a": 3, "b": 4})
    assert table.read_text() == "a,b\n1,2"


def test_environment_says_what_a_reader_needs() -> None:
    stamp = environment(torch.device("cpu"))
    assert tuple(stamp) == ENVIRONMENT
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(stamp["date"]))
    assert re.fullmatch(r"([0-9a-f]{7,}\+?)?", str(stamp["commit"]))
    assert all(isinstance(value, str | int) for value in stamp.values())
