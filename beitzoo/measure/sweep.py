"""Many rows, one after the other: each measured in processes of its own, and on disk before the next one starts."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from beitzoo.measure import speed
from beitzoo.measure.child import Outcome, run_in_child
from beitzoo.measure.comparison import compare
from beitzoo.measure.options import BenchmarkOptions, Phase
from beitzoo.measure.peers import check_installed, peer_version
from beitzoo.results import ENVIRONMENT, Row, Table

_TIMM_COLUMNS = (
    "model",
    "infer_img_size",
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "train_samples_per_sec",
    "train_step_time",
    "train_fwd_time",
    "train_bwd_time",
    "train_opt_time",
    "train_batch_size",
    "train_img_size",
    "param_count",
    "infer_gmacs",
    "infer_macts",
)
_SPREAD = tuple(
    f"{phase}_{name}"
    for phase in ("infer", "train")
    for name in ("step_time_median", "step_time_p5", "step_time_p95", "compile_time", "peak_memory")
)
_ASKED = ("bench", "input_size", "batch_size", "precision", "options", "num_warm_iter", "num_bench_iter")

BENCHMARK_COLUMNS = (*_TIMM_COLUMNS, *_SPREAD, "load_time", *_ASKED, *ENVIRONMENT, "error")
COMPARISON_COLUMNS = (
    "model",
    "peer",
    "subject",
    "ratio",
    "ratio_low",
    "ratio_high",
    "samples_per_sec",
    "step_time",
    "step_time_p5",
    "step_time_p95",
    "peer_samples_per_sec",
    "peer_step_time",
    "peer_step_time_p5",
    "peer_step_time_p95",
    "output_difference",
    "subject_error",
    "peer_error",
    "gflops",
    "gemm_gflops",
    "gemm_share",
    "peer_gemm_share",
    "first_call_time",
    "peer_first_call_time",
    "subject_precision",
    "peer_version",
    *_ASKED,
    *ENVIRONMENT,
    "error",
)
# What makes two rows the same measurement: all that was asked for, and where; not when.
_PLACE = tuple(name for name in ENVIRONMENT if name != "date")
KEY = ("model", "peer", "peer_version", "subject", "subject_precision", *_ASKED, *_PLACE)
_PHASES = {"inference": speed.measure_inference, "train": speed.measure_training}

_logger = logging.getLogger(__name__)


def sweep(jobs: Sequence[BenchmarkOptions], stamp: Row, table: Table, retry_failed: bool = False) -> Iterator[Row]:
    """Measure what is not in the table yet; give the row of each job, in order, as soon as it is there.

    Args:
        jobs: A row each.
        stamp: The environment, as `results.environment` gives it.
        table: Where rows are looked for and go; checked already.
        retry_failed: Measure again what failed before.
    """
    rows = [_asked(job, stamp) for job in jobs]
    if retry_failed:
        table.drop_failed(rows)
    with logging_redirect_tqdm():
        for job, row in zip(tqdm(jobs, unit="row", disable=None), rows, strict=True):
            found = table.find(row)
            if found is not None:
                _logger.info("%s: in %s already%s", _title(job), table.path, _failure(found))
            else:
                found = table.append({**row, **_measure(job)})
                _logger.info("%s: %s", _title(job), _failure(found) or _summary(found))
            yield found


def _measure(job: BenchmarkOptions) -> Row:
    """Measure a row in processes of its own; a failure is a row with `error`."""
    if job.peer is not None:
        return _compared(job)
    row = speed.counted_columns(job.network())
    if job.bench == "profile":
        return row | {"infer_img_size": job.network().img_size[1], "infer_batch_size": 1}  # nothing runs
    errors = []
    for phase in job.phases:
        outcome = _run_phase(job, phase)
        row |= outcome.row
        if outcome.error is not None:
            errors.append(f"{phase}: {outcome.error}" if len(job.phases) > 1 else outcome.error)
    return row | ({"error": "; ".join(errors)} if errors else {})


def _run_phase(job: BenchmarkOptions, phase: Phase) -> Outcome:
    """Run a phase, with ever smaller batches while memory does not suffice and nothing else is wrong."""
    while True:
        outcome = run_in_child(_PHASES[phase], job, limit_memory=job.device == "cpu")
        smaller = _smaller_batch(job.batch_size) if outcome.out_of_memory and job.retry else 0
        if not smaller:
            return outcome
        _logger.info("%s: out of memory; trying batch size %d", _title(job), smaller)
        job = replace(job, batch_size=smaller)


def _smaller_batch(batch_size: int) -> int:
    """Return timm's next batch size down, two steps an octave; 0 below 1."""
    from timm.utils import decay_batch_step  # late: importing timm costs seconds

    return int(decay_batch_step(batch_size))


def _compared(job: BenchmarkOptions) -> Row:
    """Compare in a process of its own; a peer that is not installed is a row, too."""
    assert job.peer is not None
    try:
        for name in (job.peer, job.subject):
            check_installed(name)
    except ValueError as error:
        return {"error": str(error)}
    outcome = run_in_child(compare, job, limit_memory=job.device == "cpu")
    return outcome.row if outcome.error is None else {"error": outcome.error}


def _asked(job: BenchmarkOptions, stamp: Row) -> Row:
    """Make the part of a row that is known beforehand."""
    config = job.network()
    asked: Row = {
        "model": job.model,
        "bench": job.bench,
        "input_size": "x".join(map(str, (config.in_chans, *config.img_size))),
        "batch_size": job.batch_size,
        "precision": job.precision,
        "options": job.others(),
        "num_warm_iter": job.num_warm_iter,
        "num_bench_iter": job.num_bench_iter,
        **stamp,
    }
    if job.peer is not None:
        precision = job.subject_precision or job.precision
        asked |= {"peer": job.peer, "subject": job.subject, "subject_precision": precision}
        asked |= {"peer_version": peer_version(job.peer)}
    return asked


def _title(job: BenchmarkOptions) -> str:
    versus = f" against {job.peer}" if job.peer else ""
    return f"{job.model} {job.bench} {job.precision} batch {job.batch_size}{versus}"


def _failure(row: Row) -> str:
    return f" failed: {row['error']}" if row.get("error") else ""


def _summary(row: Row) -> str:
    names = ("infer_samples_per_sec", "train_samples_per_sec", "ratio", "ratio_low", "ratio_high", "infer_gmacs")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)
