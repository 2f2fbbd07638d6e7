"""The comparison of two sides in interleaved rounds: outputs, times, memory."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.errors import InvalidValueError, UnsupportedError
from beitzoo.factory import create_model
from beitzoo.measure import steps
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.peers import PEERS, peer_version
from beitzoo.measure.sides import Side
from beitzoo.measure.steps import rounded
from beitzoo.results import Row
from beitzoo.zoo import costs
from beitzoo.zoo.networks import BeitConfig

# Where one side exceeds the rate of torch.mm by more than this factor, torch.mm bounds nothing on that machine.
_BOUND = 1.1

# Largest error of an output against float32, as a share of the largest output. Rounding to 8 bits takes 3 % at most;
# OpenVINO 2026.4 once was off by 74 % in float32, and right in all other runs.
MOST_ERROR = 0.2


@dataclass(frozen=True)
class _Ready:
    """A side that can be timed: its step, its output before any step, and the seconds the first step took."""

    step: Callable[[], Any]
    output: Tensor
    first_call_time: float


def compare(options: BenchmarkOptions) -> Row:
    """Time our network and a peer's in interleaved rounds and return the row of their ratio.

    Both have the same weights, get the same images and may use the same threads. `ratio` is the median over rounds of
    the peer's time by ours: above 1 the peer is slower.

    Raises:
        UserError: One of them cannot do what was asked for.
    """
    assert options.peer is not None
    with tempfile.TemporaryDirectory() as folder:
        their_side = _side(options, Path(folder, "theirs"))
        own = replace(options, precision=options.subject_precision or options.precision)
        our_side = replace(their_side, name=options.subject, options=own, folder=Path(folder, "ours"))
        model, config = our_side.model, our_side.model.backbone.config
        inputs = [one for one in (our_side.images, our_side.mask) if one is not None]
        with torch.inference_mode():
            exact = steps.stacked(model(*inputs))
        steps.set_switches(options)
        ours, theirs = _prepare(our_side), _prepare(their_side)
        times = _time(ours, theirs, config, own)
    return publishable(
        _timed_columns(times, config, options)
        | {
            "output_difference": rounded(relative_difference(theirs.output, ours.output)),
            "subject_error": rounded(relative_difference(ours.output, exact)),
            "peer_error": rounded(relative_difference(theirs.output, exact)),
            "first_call_time": round(ours.first_call_time, 3),
            "peer_first_call_time": round(theirs.first_call_time, 3),
            "peer_version": peer_version(options.peer),
        }
    )


def measure_memory(options: BenchmarkOptions) -> Row:
    """Run the peer alone; return the most memory in use, in MB, of a process that does no more.

    Of training, that is from building the network on; of inference, from the second pass on.
    """
    steps.set_switches(options)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        step = _prepare(_side(options, Path(folder, "peer"))).step
    if options.bench != "train":
        steps.reset_peak_memory(device)
    for _ in range(2):
        step()
    return {"peak_memory": round(steps.peak_memory(device), 1)}


def _side(options: BenchmarkOptions, folder: Path) -> Side:
    """Make the peer's side: our network with random weights, and a random batch."""
    assert options.peer is not None
    torch.manual_seed(options.seed)
    model = create_model(
        options.model, checkpoint_path=options.checkpoint, device=options.device, **options.overrides
    ).eval()
    if options.checkpoint is None:
        randomise(model)
    config = model.backbone.config
    images = steps.random_images(config, options, model.backbone.cls_token.device)
    return Side(options.peer, model, images, options, folder, steps.random_mask(config, options, images.device))


def publishable(row: Row) -> Row:
    """Return a row of a comparison without the figures that bound nothing.

    A ratio whose interval is too wide is an error, to be measured again, and so is one between sides of which one
    computed something else. Shares of the rate of torch.mm are left out where either side exceeds that rate by far:
    such as in bfloat16 on a processor without the instructions for it.
    """
    kept = _without_wrong_outputs(steps.without_wide_interval(row))
    if any(float(kept.get(name) or 0) > _BOUND for name in ("gemm_share", "peer_gemm_share")):
        return kept | dict.fromkeys(("gemm_gflops", "gemm_share", "peer_gemm_share"))
    return kept


def _without_wrong_outputs(row: Row) -> Row:
    """Return a row that has an error instead of a ratio where outputs are off by more than rounding explains."""
    off = {side: float(row.get(f"{side}_error") or 0) for side in ("subject", "peer")}
    wrong = {side: error for side, error in off.items() if not error <= MOST_ERROR}
    if not wrong:
        return row
    found = " and ".join(f"the {side}'s by {error:.1%}" for side, error in wrong.items())
    error = f"outputs are off by more than {MOST_ERROR:.0%} of the largest one, {found}: it computes something else"
    return row | {"ratio": None, "ratio_low": None, "ratio_high": None, "error": error}


def _prepare(side: Side) -> _Ready:
    """Build one side and run it once."""
    runtime, device = PEERS[side.name].runtime, side.images.device
    if side.options.bench == "train":
        training = _training(side)
        with torch.no_grad():
            output = training.outputs()
        return _Ready(training, output, steps.time_call(training, device))
    if runtime is not None:
        side.folder.mkdir()
        return _run_once(runtime(side), device)
    network, options = _network(side)
    network = steps.prepared(network.eval(), options)
    return _run_once(steps.inference_step(network, side.images, options.precision), device)


def _training(side: Side) -> steps.TrainingStep:
    network, options = _network(side)
    return steps.TrainingStep(network, side.images, options, side.mask)


def _network(side: Side) -> tuple[nn.Module, BenchmarkOptions]:
    """Build a side that is a module; return with it the options by which it is prepared."""
    peer, options = PEERS[side.name], side.options
    if peer.module is None:
        raise UnsupportedError(f"{side.name} does not train; compare it with --bench inference.")
    if options.precision == "int8":
        raise UnsupportedError(
            f"{side.name} has no int8; compare it in another --precision, ours by --subject-precision."
        )
    side.folder.mkdir()
    # Only those are compiled whose name says so.
    compiler = (options.torchcompile or "inductor") if peer.compiled else None
    return peer.module(side).to(side.images.device), replace(options, torchcompile=compiler)


def _run_once(step: Callable[[], Any], device: torch.device) -> _Ready:
    outputs: list[Any] = []
    first = steps.time_call(lambda: outputs.append(step()), device)
    return _Ready(step, torch.as_tensor(outputs[0]).clone(), first)


def _time(ours: _Ready, theirs: _Ready, config: BeitConfig, options: BenchmarkOptions) -> dict[str, list[float]]:
    """Time both sides, and torch.mm, in interleaved rounds; return the seconds of a step in each round."""
    calls = {"ours": ours.step, "theirs": theirs.step}
    device = torch.device(options.device)
    if options.precision != "int8" and options.segmenter is None:  # torch.mm has none, and bounds no convolutions
        dtype = steps.autocast_dtype(options.precision) or steps.stored_dtype(options.precision)
        calls["gemm"] = gemm_call(config, options.batch_size, dtype, device)
    for _ in range(options.num_warm_iter):
        ours.step()
        theirs.step()
    return steps.time_rounds(calls, options.num_bench_iter, device, options.seed)


def _timed_columns(times: dict[str, list[float]], config: BeitConfig, options: BenchmarkOptions) -> Row:
    row = steps.ratio_columns(times["theirs"], times["ours"])
    for prefix, name in (("", "ours"), ("peer_", "theirs")):
        median = statistics.median(times[name])
        row |= {
            f"{prefix}samples_per_sec": rounded(options.batch_size / median),
            f"{prefix}step_time": rounded(1e3 * median),
            f"{prefix}step_time_p5": rounded(1e3 * steps.percentile(times[name], 0.05)),
            f"{prefix}step_time_p95": rounded(1e3 * steps.percentile(times[name], 0.95)),
        }
    return row | _gemm_columns(times, config, options)


def _gemm_columns(times: dict[str, list[float]], config: BeitConfig, options: BenchmarkOptions) -> Row:
    """Compare the arithmetic that was done with what torch.mm does in the same rounds.

    A training step is counted as three forward passes, the usual estimate.
    """
    if options.segmenter is not None:
        return {}
    passes = 3 if options.bench == "train" else 1
    macs = costs.macs(config)
    if (mim := options.mim) is not None:
        macs = costs.mim_macs(config, mim, steps.masked_patches(config.grid_size))
    work = 2 * passes * options.batch_size * macs
    row: Row = {"gflops": rounded(work / statistics.median(times["ours"]) / 1e9)}
    if "gemm" not in times:
        return row
    flops = gemm_flops(config, options.batch_size)
    row["gemm_gflops"] = rounded(flops / statistics.median(times["gemm"]) / 1e9)
    shares = {"gemm_share": "ours"}
    if options.subject_precision in (None, options.precision):
        shares["peer_gemm_share"] = "theirs"
    for column, name in shares.items():
        by_time = [gemm / one for gemm, one in zip(times["gemm"], times[name], strict=True)]
        row[column] = rounded(work / flops * statistics.median(by_time))
    return row


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value of `theirs`."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    if ours.shape != theirs.shape:
        raise InvalidValueError(
            f"The two outputs have shapes {tuple(ours.shape)} and {tuple(theirs.shape)}; they must be alike."
        )
    return float((ours - theirs).abs().max() / theirs.abs().max())


def gemm_call(config: BeitConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Return a call that multiplies matrices of the shapes of one block's four linears, `torch.mm` and nothing else."""
    rows, width, hidden = batch_size * config.num_tokens, config.embed_dim, config.hidden_dim
    shapes = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    pairs = [
        (torch.randn(rows, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device))
        for k, n in shapes
    ]
    return lambda: [torch.mm(left, right) for left, right in pairs]


def gemm_flops(config: BeitConfig, batch_size: int) -> int:
    """Count the floating point operations of `gemm_call`."""
    width, hidden = config.embed_dim, config.hidden_dim
    return 2 * batch_size * config.num_tokens * (4 * width * width + 2 * width * hidden)


def randomise(model: nn.Module) -> nn.Module:
    """Fill every parameter so that each matters and logits have a spread of about 1.

    Fresh weights hide mistakes: bias tables are zero, layer scales nearly so.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        with torch.no_grad():
            if "gamma" in name:
                parameter.copy_(0.3 + 0.1 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif "relative_position_bias_table" in name or name in ("cls_token", "pos_embed"):
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.2 * noise)
    return model
