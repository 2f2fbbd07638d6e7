"""A sweep loses and repeats no row: not when a row fails, not when a process dies, not when it is killed itself."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from beitzoo.errors import InvalidValueError
from beitzoo.measure import comparison, steps
from beitzoo.measure import sweep as room
from beitzoo.measure.data_path import ROUTES
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.sweep import EXPERIMENTS, Outcome, run_in_child, sweep
from beitzoo.results import ENVIRONMENT, Row, Table, read_rows

STAMP: Row = dict.fromkeys(ENVIRONMENT, "x")


def jobs(count: int = 4) -> list[BenchmarkOptions]:
    return [BenchmarkOptions(model="test_beit", batch_size=size, bench="profile") for size in range(1, count + 1)]


def table(path: Path | None, kind: str = "speed") -> Table:
    return Table(path, EXPERIMENTS[kind].columns, EXPERIMENTS[kind].key)


def sizes(path: Path) -> list[int]:
    return [int(str(row["batch_size"])) for row in read_rows(path)]


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    first = list(sweep(jobs(2), STAMP, table(path)))
    assert [row["infer_gmacs"] for row in first] == [0.0, 0.0]
    measured: list[dict[str, float]] = []
    original = room.costs.columns
    monkeypatch.setattr(room.costs, "columns", lambda *asked: measured.append(original(*asked)) or measured[-1])
    assert len(list(sweep(jobs(4), {**STAMP, "date": "2030-01-01"}, table(path)))) == 4
    assert len(measured) == 2
    assert sizes(path) == [1, 2, 3, 4]
    # Other code, another machine or part of it, other libraries: another measurement.
    for other in ("commit", "device", "threads", "torch", "platform"):
        list(sweep(jobs(1), {**STAMP, other: "y"}, table(path)))
    assert sizes(path) == [1, 2, 3, 4, 1, 1, 1, 1, 1]


def test_each_row_is_on_disk_when_it_is_given(tmp_path: Path) -> None:
    for number, _ in enumerate(sweep(jobs(3), STAMP, table(tmp_path / "rows.csv")), 1):
        assert sizes(tmp_path / "rows.csv") == list(range(1, number + 1))


def test_failures_are_kept_and_tried_again_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(tmp_path / "rows.csv")
    broken = [BenchmarkOptions(model="test_beit", batch_size=1), *jobs(2)[1:]]
    monkeypatch.setattr(room, "run_in_child", lambda *_, **__: Outcome(error="Boom"))
    assert [row["error"] for row in sweep(broken, STAMP, rows)] == ["Boom", None]
    monkeypatch.setattr(room, "run_in_child", lambda *_, **__: Outcome({"infer_step_time": 1.0}))
    assert [row["error"] or None for row in sweep(broken, STAMP, rows)] == ["Boom", None]
    assert [row["infer_step_time"] or None for row in sweep(broken, STAMP, rows, retry_failed=True)] == [1.0, None]
    assert sizes(tmp_path / "rows.csv") == [2, 1]


@pytest.mark.parametrize(
    ("retry", "out_of_memory", "tried"), [(True, True, [8, 6, 4, 3]), (True, False, [8]), (False, True, [8])]
)
def test_a_batch_shrinks_for_want_of_memory_only(
    retry: bool, out_of_memory: bool, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def run(function: object, job: BenchmarkOptions, limit_memory: bool) -> Outcome[Row]:
        seen.append(job.batch_size)
        if job.batch_size > 3:
            return Outcome(error="no room", out_of_memory=out_of_memory)
        return Outcome({"infer_batch_size": job.batch_size})

    monkeypatch.setattr(room, "run_in_child", run)
    (row,) = sweep([BenchmarkOptions(model="test_beit", batch_size=8, retry=retry)], STAMP, table(None))
    assert seen == tried
    assert (row["batch_size"], row["infer_batch_size"]) == (8, 3 if tried[-1] == 3 else None)
    assert row["error"] == (None if tried[-1] == 3 else "no room")


def test_an_absent_peer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beitzoo.measure.sides.version_of", lambda package: None)
    job = BenchmarkOptions(model="test_beit", peer="openvino")
    (row,) = sweep([job], STAMP, table(None, "comparison"))
    assert row["peer"] == "openvino"
    assert row["error"] == "openvino needs openvino, onnx, onnxscript; install it with: pip install 'beitzoo[peers]'"


def test_memory_is_that_of_each_side_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str | None, str]] = []

    def run(function: object, job: BenchmarkOptions, limit_memory: bool) -> Outcome[Row]:
        if function is comparison.compare:
            return Outcome({"ratio": 1.5})
        asked.append((job.peer, job.precision))
        return Outcome({"peak_memory": 10.0}) if job.peer == "beitzoo" else Outcome(error="no room")

    monkeypatch.setattr(room, "run_in_child", run)
    job = BenchmarkOptions(model="test_beit", bench="train", peer="timm", subject_precision="amp")
    (row,) = sweep([job], STAMP, table(None, "comparison"))
    assert asked == [("beitzoo", "amp"), ("timm", "float32")]
    assert (row["ratio"], row["peak_memory"], row["peer_peak_memory"]) == (1.5, 10.0, None)
    assert row["error"] == "memory of timm: no room"
    (row,) = sweep([replace(job, bench="inference")], STAMP, table(None, "comparison"))
    assert (row["ratio"], row["peak_memory"]) == (1.5, None)
    (row,) = sweep([replace(job, bench="inference", memory=True)], STAMP, table(None, "comparison"))
    assert (row["peak_memory"], row["options"]) == (10.0, "")


def load_in_process(function: Callable[[Any], Row], load: steps.Load, **_: object) -> Outcome[Row]:
    seconds = {"beitzoo": 1.0, "beitzoo local-dir": 1.5}.get(load.library, 3.0)
    real = function(load) if load.library.startswith("beitzoo") else {}
    return Outcome({**real, "load_time": seconds / 2, "logits_time": seconds, "added_memory": 12.4})


def test_loading_gives_a_row_for_each_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "run_in_child", load_in_process)
    job = BenchmarkOptions(model="test_beit", bench="load", num_bench_iter=2)
    rows = table(tmp_path / "loading.csv", "load")
    measured = list(sweep([job], STAMP, rows))
    assert [(row["library"], row["ratio"], row["load_time"], row["added_memory"]) for row in measured] == [
        ("beitzoo", 1.0, 0.5, 12.0),
        ("beitzoo local-dir", 1.5, 0.75, 12.0),
        ("timm", 3.0, 1.5, 12.0),
        ("transformers", 3.0, 1.5, 12.0),
    ]
    monkeypatch.setattr(room, "run_in_child", lambda *_: Outcome(error="no"))
    assert [row["ratio"] for row in sweep([job], STAMP, rows)] == ["1.0", "1.5", "3.0", "3.0"]
    with pytest.raises(InvalidValueError, match=r"did not load test_beit: no"):
        list(sweep([job], {**STAMP, "commit": "y"}, rows))


def test_what_failed_is_not_kept_where_there_is_no_column_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "run_in_child", lambda *_: Outcome([{"ratio": 2.0}] * 3 + [{"error": "too wide"}] * 5))
    job = BenchmarkOptions(model="test_beit", bench="data", images=(Path("a b/x.jpg"), Path("y.jpg")))
    measured = list(sweep([job], STAMP, table(tmp_path / "rows.csv", "data")))
    assert [(row["route"], row.get("error")) for row in measured][2:4] == [
        ("fast", None),
        ("fast from open_tensor", "too wide"),
    ]
    kept = read_rows(tmp_path / "rows.csv")
    assert [(row["route"], row["images"], row["threads"]) for row in kept] == [
        (route.name, "x.jpg y.jpg", "1") for route in ROUTES[:3]
    ]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """As a process that is killed outright, at many moments; then what is left is measured to its end."""
    wanted, clock = 6, random.Random(0)
    for attempt in range(10):
        path = tmp_path / str(attempt) / "rows.csv"
        for _ in range(1 + attempt % 3):
            _kill(lambda path=path: list(sweep(jobs(wanted), STAMP, table(path))), clock.uniform(0, 0.05))
            done = sizes(path) if path.exists() else []
            assert done == list(range(1, len(done) + 1))
        assert len(list(sweep(jobs(wanted), STAMP, table(path)))) == wanted
        assert sizes(path) == list(range(1, wanted + 1))


def _kill(work: Callable[[], object], after: float) -> None:
    """Do something in a copy of this process and kill that, if it is not finished by then."""
    process = os.fork()
    if process == 0:
        tqdm.set_lock(threading.RLock())  # its own is shared with this process, which would wait for it for ever
        work()
        os._exit(0)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def misbehave(how: str) -> Row:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        torch.ones(2**45)
    raise InvalidValueError("say this")


def test_a_process_of_its_own_can_die() -> None:
    outcome = run_in_child(misbehave, "kill")
    assert outcome.error is not None and "killed by SIGKILL, as by a system whose memory ran out" in outcome.error


class Sender:
    """What a child process sends its outcome through, here in this process."""

    def send(self, outcome: Outcome[Row]) -> None:
        self.outcome = outcome

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("how", "error", "out_of_memory"), [("memory", "RuntimeError: ", True), ("say", "say this", False)]
)
def test_what_a_child_raises_is_its_outcome(
    how: str, error: str, out_of_memory: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("signal.signal", "threading.Thread.start", "os.dup2", "warnings.simplefilter"):
        monkeypatch.setattr(f"beitzoo.measure.sweep.{name}", lambda *_: None)
    sender = Sender()
    room._serve(sender, misbehave, how, False)  # type: ignore[arg-type]
    assert str(sender.outcome.error).startswith(error)
    assert sender.outcome.out_of_memory == out_of_memory
    assert capfd.readouterr().err == ""  # a traceback is for faults of our own


@pytest.mark.slow
def test_a_process_of_its_own_measures_within_free_memory() -> None:
    job = BenchmarkOptions(model="test_beit", num_warm_iter=0, num_bench_iter=2)
    outcome = run_in_child(steps.measure_steps, job, limit_memory=True)
    assert outcome.error is None and outcome.result is not None
    assert 100 < float(outcome.result["infer_peak_memory"] or 0) < 10_000


@pytest.mark.slow
def test_a_killed_command_leaves_no_process_and_finishes_later(tmp_path: Path) -> None:
    command = [sys.executable, "benchmark.py", "-m", "test_beit", "-m", "beit_nano_patch4_32", "--bench", "inference"]
    command += ["--num-warm-iter", "1", "--num-bench-iter", "2", "--results-file", str(tmp_path / "rows.csv")]
    for after in (0, 1, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not (children := _children(process.pid)):
            time.sleep(0.1)
        time.sleep(after)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30  # one that is killed among its imports finishes them
        while any(Path("/proc", child).exists() for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [row["model"] for row in read_rows(tmp_path / "rows.csv")] == ["test_beit", "beit_nano_patch4_32"]


def _children(process: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split()
