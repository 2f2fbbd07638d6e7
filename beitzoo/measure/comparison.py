"""Two ways to run one network, by turns: how much longer the other takes, and how far its outputs are from ours."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beitzoo.factory import create_model
from beitzoo.measure import timing
from beitzoo.measure.options import BenchmarkOptions, autocast_dtype, stored_dtype
from beitzoo.measure.peers import PEERS, Asked, Peer, peer_version, randomise
from beitzoo.measure.speed import TrainingStep, inference_step, prepared, random_images, set_switches
from beitzoo.models.beit import Beit
from beitzoo.results import Row
from beitzoo.zoo import costs


@dataclass(frozen=True)
class _Contender:
    """One of the two: a step to time, its output before any step, and the seconds its first step took."""

    step: Callable[[], Any]
    output: Tensor
    first_call_time: float


def compare(options: BenchmarkOptions) -> Row:
    """Time our network and a peer's by turns and make the row of their ratio.

    Both have the same random weights, get the same images and may use the same threads. `ratio` is the median over
    rounds of the peer's time by ours: above 1 the peer is slower.

    Raises:
        ValueError: One of them cannot do what was asked for.
    """
    assert options.peer is not None
    torch.manual_seed(options.seed)
    model = create_model(options.model, device=options.device, **options.overrides)
    randomise(model).eval()
    device = model.cls_token.device
    images = random_images(model.config, options, device)
    with torch.inference_mode():
        exact = model(images)
    set_switches(options)
    precision = options.subject_precision or options.precision
    with tempfile.TemporaryDirectory() as folder:
        ours = _contender(options.subject, model, images, replace(options, precision=precision), Path(folder, "ours"))
        theirs = _contender(options.peer, model, images, options, Path(folder, "theirs"))
        calls = {"ours": ours.step, "theirs": theirs.step}
        if precision != "int8":  # torch.mm has none
            dtype = autocast_dtype(precision) or stored_dtype(precision)
            calls["gemm"] = timing.gemm_call(model.config, options.batch_size, dtype, device)
        for _ in range(options.num_warm_iter):
            ours.step()
            theirs.step()
        times = timing.time_rounds(calls, options.num_bench_iter, device, options.seed)
    return {
        **_timed(times, model, options),
        "output_difference": _rounded(timing.relative_difference(theirs.output, ours.output)),
        "subject_error": _rounded(timing.relative_difference(ours.output, exact)),
        "peer_error": _rounded(timing.relative_difference(theirs.output, exact)),
        "first_call_time": round(ours.first_call_time, 3),
        "peer_first_call_time": round(theirs.first_call_time, 3),
        "peer_version": peer_version(options.peer),
    }


def _contender(name: str, model: Beit, images: Tensor, options: BenchmarkOptions, folder: Path) -> _Contender:
    """Build one way to run the model, and run it once."""
    folder.mkdir()
    peer = PEERS[name]
    if options.bench == "train":
        training = _training(name, peer, model, images, options, folder)
        with torch.no_grad():
            output = training.outputs()
        return _Contender(training, output, timing.time_call(training, images.device))
    step = _inference(name, peer, model, images, options, folder)
    outputs: list[Any] = []
    first = timing.time_call(lambda: outputs.append(step()), images.device)
    return _Contender(step, torch.as_tensor(outputs[0]).clone(), first)


def _inference(
    name: str, peer: Peer, model: Beit, images: Tensor, options: BenchmarkOptions, folder: Path
) -> Callable[[], Any]:
    if peer.runtime is not None:
        return peer.runtime(Asked(model, images, options.precision, torch.get_num_threads(), folder))
    network = _module(name, peer, model, options, folder).eval().to(images.device)
    network = prepared(network, _compiling(peer, options))
    return inference_step(network, images.to(stored_dtype(options.precision)), options.precision)


def _training(
    name: str, peer: Peer, model: Beit, images: Tensor, options: BenchmarkOptions, folder: Path
) -> TrainingStep:
    if peer.module is None:
        raise ValueError(f"{name} does not train; compare it with --bench inference.")
    network = _module(name, peer, model, options, folder).to(images.device)
    return TrainingStep(network, images, _compiling(peer, options))


def _module(name: str, peer: Peer, model: Beit, options: BenchmarkOptions, folder: Path) -> torch.nn.Module:
    assert peer.module is not None
    if options.precision == "int8":
        raise ValueError(f"{name} has no int8; compare it in another --precision, ours by --subject-precision.")
    return peer.module(model, folder)


def _compiling(peer: Peer, options: BenchmarkOptions) -> BenchmarkOptions:
    """Let only those be compiled whose name says so."""
    return replace(options, torchcompile=(options.torchcompile or "inductor") if peer.compiled else None)


def _timed(times: dict[str, list[float]], model: Beit, options: BenchmarkOptions) -> Row:
    """Make the columns of seconds per step and round."""
    ratio, ratios = timing.median_ratio(times["theirs"], times["ours"])
    low, high = timing.median_interval(ratios) or (None, None)
    row: Row = {
        "ratio": _rounded(ratio),
        "ratio_low": low and _rounded(low),
        "ratio_high": high and _rounded(high),
    }
    for prefix, name in (("", "ours"), ("peer_", "theirs")):
        median = statistics.median(times[name])
        row |= {
            f"{prefix}samples_per_sec": _rounded(options.batch_size / median),
            f"{prefix}step_time": _rounded(1e3 * median),
            f"{prefix}step_time_p5": _rounded(1e3 * timing.percentile(times[name], 0.05)),
            f"{prefix}step_time_p95": _rounded(1e3 * timing.percentile(times[name], 0.95)),
        }
    return row | _of_gemm(times, model, options)


def _of_gemm(times: dict[str, list[float]], model: Beit, options: BenchmarkOptions) -> Row:
    """Set the arithmetic that was done in relation to what `torch.mm` does in the same rounds.

    A training step is counted as three forward passes, the usual estimate. Products in parts and convolutions can
    exceed 1.
    """
    passes = 3 if options.bench == "train" else 1
    work = 2 * passes * options.batch_size * costs.macs(model.config)
    row: Row = {"gflops": _rounded(work / statistics.median(times["ours"]) / 1e9)}
    if "gemm" not in times:
        return row
    flops = timing.gemm_flops(model.config, options.batch_size)
    by_time, _ = timing.median_ratio(times["gemm"], times["ours"])
    row |= {
        "gemm_gflops": _rounded(flops / statistics.median(times["gemm"]) / 1e9),
        "gemm_share": _rounded(work / flops * by_time),
    }
    if options.subject_precision in (None, options.precision):
        by_time, _ = timing.median_ratio(times["gemm"], times["theirs"])
        row["peer_gemm_share"] = _rounded(work / flops * by_time)
    return row


def _rounded(value: float) -> float:
    """Keep four digits, whatever the size."""
    return float(f"{value:.4g}")
