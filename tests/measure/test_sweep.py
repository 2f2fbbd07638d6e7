"""A sweep loses and repeats no row: not when a row fails, not when a process dies, not when it is killed itself."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from beitzoo.measure import sweep as room
from beitzoo.measure.child import Outcome, run_in_child
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.speed import measure_inference
from beitzoo.measure.sweep import BENCHMARK_COLUMNS, COMPARISON_COLUMNS, KEY, sweep
from beitzoo.results import Row, Table, environment, read_rows

STAMP = environment(torch.device("cpu"))


def jobs(count: int = 4) -> list[BenchmarkOptions]:
    return [BenchmarkOptions(model="test_beit", batch_size=size, bench="profile") for size in range(1, count + 1)]


def table(folder: Path) -> Table:
    return Table(folder / "rows.csv", BENCHMARK_COLUMNS, KEY)


def sizes(path: Path) -> list[int]:
    return [int(str(row["batch_size"])) for row in read_rows(path)]


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(sweep(jobs(2), STAMP, table(tmp_path)))
    assert [row["infer_gmacs"] for row in first] == [0.0, 0.0]
    measured: list[int] = []
    original = room._measure
    monkeypatch.setattr(room, "_measure", lambda job: measured.append(job.batch_size) or original(job))
    assert len(list(sweep(jobs(4), {**STAMP, "date": "2030-01-01"}, table(tmp_path)))) == 4
    assert measured == [3, 4]
    assert sizes(tmp_path / "rows.csv") == [1, 2, 3, 4]
    list(sweep(jobs(1), {**STAMP, "commit": "0000000"}, table(tmp_path)))  # other code: another measurement
    assert sizes(tmp_path / "rows.csv") == [1, 2, 3, 4, 1]


def test_each_row_is_on_disk_when_it_is_given(tmp_path: Path) -> None:
    for number, _ in enumerate(sweep(jobs(3), STAMP, table(tmp_path)), 1):
        assert sizes(tmp_path / "rows.csv") == list(range(1, number + 1))


def test_failures_are_kept_and_tried_again_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [BenchmarkOptions(model="test_beit", batch_size=1), *jobs(2)[1:]]
    monkeypatch.setattr(room, "run_in_child", lambda *_, **__: Outcome(error="Boom"))
    assert [row["error"] for row in sweep(broken, STAMP, table(tmp_path))] == ["Boom", None]
    monkeypatch.setattr(room, "run_in_child", lambda *_, **__: Outcome({"infer_step_time": 1.0}))
    assert [row["error"] or None for row in sweep(broken, STAMP, table(tmp_path))] == ["Boom", None]
    rows = list(sweep(broken, STAMP, table(tmp_path), retry_failed=True))
    assert [row["infer_step_time"] or None for row in rows] == [1.0, None]
    assert sizes(tmp_path / "rows.csv") == [2, 1]


@pytest.mark.parametrize(
    ("retry", "out_of_memory", "tried"), [(True, True, [8, 6, 4, 3]), (True, False, [8]), (False, True, [8])]
)
def test_a_batch_shrinks_for_want_of_memory_only(
    retry: bool, out_of_memory: bool, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def run(function: object, job: BenchmarkOptions, limit_memory: bool) -> Outcome:
        seen.append(job.batch_size)
        if job.batch_size > 3:
            return Outcome(error="no room", out_of_memory=out_of_memory)
        return Outcome({"infer_batch_size": job.batch_size})

    monkeypatch.setattr(room, "run_in_child", run)
    job = BenchmarkOptions(model="test_beit", batch_size=8, retry=retry)
    (row,) = sweep([job], STAMP, Table(None, BENCHMARK_COLUMNS))
    assert seen == tried
    assert (row["batch_size"], row["infer_batch_size"]) == (8, 3 if tried[-1] == 3 else None)
    assert row["error"] == (None if tried[-1] == 3 else "no room")


def test_an_absent_peer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beitzoo.measure.peers._version", lambda package: None)
    job = BenchmarkOptions(model="test_beit", peer="openvino")
    (row,) = sweep([job], STAMP, Table(None, COMPARISON_COLUMNS))
    assert row["peer"] == "openvino"
    assert "openvino needs openvino, onnx, onnxscript; install it with: pip install 'beitzoo[peers]'" in str(
        row["error"]
    )


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path: Path) -> None:
    """As a process that is killed outright, at many moments; then what is left is measured to its end."""
    wanted, clock = 6, random.Random(0)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        for _ in range(1 + attempt % 3):
            _kill(lambda folder=folder: list(sweep(jobs(wanted), STAMP, table(folder))), clock.uniform(0, 0.1))
            done = sizes(folder / "rows.csv") if (folder / "rows.csv").exists() else []
            assert done == list(range(1, len(done) + 1))
        assert len(list(sweep(jobs(wanted), STAMP, table(folder)))) == wanted
        assert sizes(folder / "rows.csv") == list(range(1, wanted + 1))


def _kill(work: Callable[[], object], after: float) -> None:
    """Do something in a copy of this process and kill that, if it is not finished by then."""
    process = os.fork()
    if process == 0:
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
    return {"how": how}


def test_a_process_of_its_own_can_die_and_fail_and_measure() -> None:
    def run(how: str) -> Outcome:
        if how == "measure":
            job = BenchmarkOptions(model="test_beit", num_warm_iter=0, num_bench_iter=2)
            return run_in_child(measure_inference, job, limit_memory=True)
        return run_in_child(misbehave, how, limit_memory=True)

    with ThreadPoolExecutor(2) as pool:  # what a process costs is its imports
        killed, memory, measured = pool.map(run, ("kill", "memory", "measure"))
    assert killed.error is not None and "killed by SIGKILL" in killed.error
    assert (killed.row, killed.out_of_memory) == ({}, False)
    assert memory.out_of_memory and memory.error is not None
    assert measured.error is None
    assert float(measured.row["infer_step_time_median"] or 0) > 0
    assert 100 < float(measured.row["infer_peak_memory"] or 0) < 10_000


@pytest.mark.slow
def test_a_killed_command_leaves_no_process_and_finishes_later(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("test_beit\nbeit_nano_patch4_32\n")
    command = [sys.executable, "benchmark.py", "--model-list", str(tmp_path / "names"), "--bench", "inference"]
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
