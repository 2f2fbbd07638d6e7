"""Many rows, one after the other: each measured in processes of its own, and on disk before the next one starts."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from beitzoo.errors import InvalidValueError, UserError, is_out_of_memory
from beitzoo.factory import create_model
from beitzoo.measure import data_path, steps
from beitzoo.measure.comparison import compare, measure_memory
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.peers import check_installed, peer_version
from beitzoo.results import ENVIRONMENT, Row, Table
from beitzoo.saving import save_pretrained, save_transformers
from beitzoo.zoo import costs

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_PARTS = ("train_fwd_time", "train_bwd_time", "train_opt_time")
_INFER = ("infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size")
_TRAIN = ("train_samples_per_sec", "train_step_time", *_PARTS, "train_batch_size", "train_img_size")
_SPREAD = tuple(
    f"{phase}_{name}"
    for phase in ("infer", "train")
    for name in ("step_time_median", "step_time_p5", "step_time_p95", "compile_time", "peak_memory")
)
_ASKED = ("bench", "input_size", "batch_size", "precision", "options", "num_warm_iter", "num_bench_iter")
_RATIO = ("ratio", "ratio_low", "ratio_high")
_STEP = ("samples_per_sec", "step_time", "step_time_p5", "step_time_p95")
_ERRORS = ("output_difference", "subject_error", "peer_error")
_RATES = ("gflops", "gemm_gflops", "gemm_share", "peer_gemm_share", "first_call_time", "peer_first_call_time")
_PIXELS = ("images_per_sec", "max_difference", "mean_difference", "images", "mean_pixels")

# timm's columns come first, in its order.
_TIMM = ("model", *_INFER, *_TRAIN, "param_count", "infer_gmacs", "infer_macts")
_SIDES = ("peer", "peer_version", "subject", "subject_precision")
_PEER_STEP = tuple(f"peer_{name}" for name in _STEP)
_MEMORY = ("peak_memory", "peer_peak_memory")
_COMPARED = (*_RATIO, *_STEP, *_PEER_STEP, *_ERRORS, *_RATES, *_MEMORY, "subject_precision", "peer_version")
BENCHMARK_COLUMNS = (*_TIMM, *_SPREAD, "load_time", *_ASKED, *ENVIRONMENT, "error")
COMPARISON_COLUMNS = ("model", "peer", "subject", *_COMPARED, *_ASKED, *ENVIRONMENT, "error")
LOADING_COLUMNS = ("model", "library", *_RATIO, "load_time", "logits_time", "added_memory", "rounds", *ENVIRONMENT)
DATA_COLUMNS = ("route", *_RATIO, *_PIXELS, "rounds", *ENVIRONMENT)
# Where a row was measured; not when.
_PLACE = tuple(name for name in ENVIRONMENT if name != "date")
_LONGEST_MESSAGE = 400

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """A kind of benchmark: the rows of a job, and how they are measured.

    Attributes:
        columns: Of its rows.
        key: What makes two rows the same measurement.
        ask: Returns the rows of a job, with all that is known beforehand but the environment.
        measure: Returns what is measured for each of them; a failure is an `error`.
    """

    columns: tuple[str, ...]
    key: tuple[str, ...]
    ask: Callable[[BenchmarkOptions], list[Row]]
    measure: Callable[[BenchmarkOptions], list[Row]]


def experiment_of(job: BenchmarkOptions) -> Experiment:
    """Return the kind of benchmark that a job is."""
    kind = job.bench if job.bench in EXPERIMENTS else "speed" if job.peer is None else "comparison"
    return EXPERIMENTS[kind]


def sweep(jobs: Sequence[BenchmarkOptions], stamp: Row, table: Table, retry_failed: bool = False) -> Iterator[Row]:
    """Measure what is not in the table yet; give the rows of each job, in order, as soon as they are there.

    Args:
        jobs: All of one kind.
        stamp: The environment, as `results.environment` gives it.
        table: Where rows are looked for and go; checked already.
        retry_failed: Measure again what failed before.
    """
    asked = [[{**stamp, **row} for row in experiment_of(job).ask(job)] for job in jobs]
    if retry_failed:
        table.drop_failed([row for rows in asked for row in rows])
    with logging_redirect_tqdm([logging.getLogger("beitzoo")]):
        for job, rows in zip(tqdm(jobs, unit="row", disable=None), asked, strict=True):
            found = [table.find(row) for row in rows]
            measured = [{}] * len(rows) if all(found) else experiment_of(job).measure(job)
            for row, old, new in zip(rows, found, measured, strict=True):
                full = old or _keep({**row, **new}, table)
                where = f"in {table.path} already" if old else ""
                _logger.info("%s: %s", _title(job, full), _failure(full) or where or _summary(full))
                yield full


def _keep(row: Row, table: Table) -> Row:
    """Append a row; not one that failed, if the table has no column for that."""
    return row if row.get("error") and "error" not in table.columns else table.append(row)


def _ask_speed(job: BenchmarkOptions) -> list[Row]:
    asked: Row = {
        "model": job.model,
        "bench": job.bench,
        "input_size": costs.input_size(job.network()),
        "batch_size": job.batch_size,
        "precision": job.precision,
        "options": job.others(),
        "num_warm_iter": job.num_warm_iter,
        "num_bench_iter": job.num_bench_iter,
    }
    return [asked]


def _measure_speed(job: BenchmarkOptions) -> list[Row]:
    heads = job.phase("train").heads if "train" in job.phases else job.heads
    row: Row = {**costs.columns(job.network(), heads)}
    if job.bench == "profile":
        return [row | {"infer_img_size": job.network().img_size[1], "infer_batch_size": 1}]  # nothing runs
    errors = []
    for phase in job.phases:
        outcome = _run_phase(job.phase(phase))
        row |= outcome.result or {}
        if outcome.error is not None:
            errors.append(f"{phase}: {outcome.error}" if len(job.phases) > 1 else outcome.error)
    return [row | ({"error": "; ".join(errors)} if errors else {})]


def _run_phase(job: BenchmarkOptions) -> "Outcome[Row]":
    """Run a phase, with ever smaller batches while memory does not suffice and nothing else is wrong."""
    while True:
        outcome = run_in_child(steps.measure_steps, job, limit_memory=job.device == "cpu")
        smaller = _smaller_batch(job.batch_size) if outcome.out_of_memory and job.retry else 0
        if not smaller:
            return outcome
        _logger.info("%s: out of memory; trying batch size %d", job.model, smaller)
        job = replace(job, batch_size=smaller)


def _smaller_batch(batch_size: int) -> int:
    """Return timm's next batch size down, two steps an octave; 0 below 1."""
    from timm.utils import decay_batch_step  # late: importing timm costs seconds

    return int(decay_batch_step(batch_size))


def _ask_comparison(job: BenchmarkOptions) -> list[Row]:
    assert job.peer is not None
    sides: Row = {
        "peer": job.peer,
        "subject": job.subject,
        "subject_precision": job.subject_precision or job.precision,
        "peer_version": peer_version(job.peer),
    }
    return [row | sides for row in _ask_speed(job)]


def _measure_comparison(job: BenchmarkOptions) -> list[Row]:
    """Compare in a process of its own; a peer that is not installed is a row as well."""
    assert job.peer is not None
    try:
        for name in (job.peer, job.subject):
            check_installed(name)
    except InvalidValueError as error:
        return [{"error": str(error)}]
    outcome = run_in_child(compare, job, limit_memory=job.device == "cpu")
    if outcome.result is None:
        return [{"error": outcome.error}]
    takes_much = job.memory or job.bench == "train" or job.segmenter is not None
    return [outcome.result | _measure_memory(job)] if takes_much else [outcome.result]


def _measure_memory(job: BenchmarkOptions) -> Row:
    """Let each side run in a process of its own, and return the most memory it had in use."""
    row: Row = {}
    sides = {"": (job.subject, job.subject_precision or job.precision), "peer_": (job.peer, job.precision)}
    for prefix, (name, precision) in sides.items():
        alone = replace(job, peer=name, precision=precision)
        outcome = run_in_child(measure_memory, alone, limit_memory=job.device == "cpu")
        if outcome.result is None:
            row["error"] = f"memory of {name}: {outcome.error}"
        else:
            row[f"{prefix}peak_memory"] = outcome.result["peak_memory"]
    return row


def _ask_loading(job: BenchmarkOptions) -> list[Row]:
    return [{"model": job.model, "library": name, "rounds": job.num_bench_iter} for name in steps.LIBRARIES]


def _measure_loading(job: BenchmarkOptions) -> list[Row]:
    """Write a model with random weights and load it with each library, in processes of their own, interleaved."""
    order, names = random.Random(job.seed), list(steps.LIBRARIES)
    loads: dict[str, list[Row]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        network = create_model(job.model)
        size = (network.config.in_chans, *network.config.img_size)
        save_pretrained(network, Path(folder, "timm"))
        save_transformers(network, Path(folder, "transformers"))
        for _ in tqdm(range(job.num_bench_iter), unit="round", leave=False, disable=None, position=1):
            for name in order.sample(names, len(names)):
                outcome = run_in_child(steps.first_logits, steps.Load(name, job.model, size, Path(folder)))
                if outcome.result is None:
                    raise InvalidValueError(f"{name} did not load {job.model}: {outcome.error}")
                loads[name].append(outcome.result)
    return [_loading_columns(loads[name], loads["beitzoo"]) for name in names]


def _loading_columns(theirs: Sequence[Row], ours: Sequence[Row]) -> Row:
    def column(loads: Sequence[Row], name: str) -> list[float]:
        return [float(load[name] or 0) for load in loads]

    row = steps.ratio_columns(column(theirs, "logits_time"), column(ours, "logits_time"))
    for name, digits in {"load_time": 3, "logits_time": 3, "added_memory": 0}.items():
        row[name] = round(statistics.median(column(theirs, name)), digits)
    return row


def _ask_data(job: BenchmarkOptions) -> list[Row]:
    images = " ".join(path.name for path in job.images)
    known: Row = {"images": images, "rounds": job.num_bench_iter, "threads": 1}
    return [{"route": route.name, **known} for route in data_path.ROUTES]


def _measure_data(job: BenchmarkOptions) -> list[Row]:
    outcome = run_in_child(data_path.measure_data, job)
    if outcome.result is None:
        raise InvalidValueError(f"The images could not be timed: {outcome.error}")
    return outcome.result


EXPERIMENTS = {
    "speed": Experiment(BENCHMARK_COLUMNS, ("model", *_ASKED, *_PLACE), _ask_speed, _measure_speed),
    "comparison": Experiment(
        COMPARISON_COLUMNS, ("model", *_SIDES, *_ASKED, *_PLACE), _ask_comparison, _measure_comparison
    ),
    "load": Experiment(LOADING_COLUMNS, ("model", "library", "rounds", *_PLACE), _ask_loading, _measure_loading),
    "data": Experiment(DATA_COLUMNS, ("route", "images", "rounds", *_PLACE), _ask_data, _measure_data),
}


def _title(job: BenchmarkOptions, row: Row) -> str:
    names = ("model", "library", "route", "bench", "precision", "batch_size")
    versus = f" against {job.peer}" if job.peer else ""
    return " ".join(str(row[name]) for name in names if row.get(name) is not None) + versus


def _failure(row: Row) -> str:
    return f"failed: {row['error']}" if row.get("error") else ""


def _summary(row: Row) -> str:
    names = ("infer_samples_per_sec", "train_samples_per_sec", "ratio", "ratio_low", "ratio_high", "infer_gmacs")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of a function in a process of its own: its result, or why there is none."""

    result: Result | None = None
    error: str | None = None
    out_of_memory: bool = False


def run_in_child(
    function: Callable[[Argument], Result], argument: Argument, limit_memory: bool = False
) -> Outcome[Result]:
    """Call a function in a fresh process, so that its memory can be measured and its death survived.

    Args:
        function: Importable by name.
        argument: Can be pickled.
        limit_memory: Let the process fail when it asks for more memory than is free, rather than let the system
            kill it or another.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, argument, limit_memory))
    process.start()
    sender.close()
    try:
        outcome: Outcome[Result] = receiver.recv()
    except EOFError:
        process.join()
        return Outcome(error=_cause_of_death(process.exitcode))
    finally:
        if sys.exc_info()[0] is not None:  # such as KeyboardInterrupt
            process.kill()
        process.join(timeout=10)
        process.kill()  # runtimes have been seen to hang while they unload
        process.join()
    return outcome


def _serve(sender: Connection, function: Callable[[Argument], Result], argument: Argument, limit_memory: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.dup2(2, 1)  # standard output is the parent's, for its rows
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of exporters and peers
    try:
        if limit_memory:
            _limit_memory()
        outcome = Outcome(function(argument))
    except UserError as error:
        outcome = Outcome(None, str(error))
    except Exception as error:
        if not (out_of_memory := is_out_of_memory(error)):
            traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        outcome = Outcome(None, message[:_LONGEST_MESSAGE], out_of_memory)
    sender.send(outcome)
    sender.close()


def _die_with_parent() -> None:
    """Do not go on, and take the cores of the next run, when the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _limit_memory() -> None:
    """Bound the data of this process by what it has and what is free; where the system does not say, do not."""
    meminfo, status = Path("/proc/meminfo"), Path("/proc/self/status")
    if not (meminfo.exists() and status.exists()):
        return
    import resource

    limit = _kibibytes(meminfo, "MemAvailable") + _kibibytes(status, "VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * limit, 1024 * limit))


def _kibibytes(path: Path, name: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", as by a system whose memory ran out; try a smaller --batch-size" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process ended with code {code} and no result"
