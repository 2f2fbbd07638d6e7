"""Clocks and what is made of their readings."""

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from beitzoo.zoo.networks import BeitConfig

# Seconds that a turn of an interleaved round lasts at least, by repeating what is faster.
_TURN = 0.05
# Seconds between turns, in which the threads of another runtime stop spinning.
_PAUSE = 0.01


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds a call takes, with what it leaves running on the device."""
    started = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def time_steps(step: Callable[[], object], warm: int, count: int, device: torch.device) -> list[float]:
    """Run a step `warm` times, then time it `count` times; return the milliseconds of each."""
    # The first line is that of the sweep, in the parent process.
    progress = tqdm(range(warm + count), unit="step", leave=False, disable=None, position=1)
    times = [1e3 * time_call(step, device) for _ in progress]
    return times[warm:]


def time_rounds(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """Time calls by turns, each once in a round and in a new order; return the seconds of each per round.

    What slows the machine for a while slows neighbours in a round alike, so that their ratio holds.
    """
    order = random.Random(seed)
    repeats = {name: max(1, round(_TURN / time_call(call, device))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), unit="round", leave=False, disable=None, position=1):
        for name in order.sample(list(calls), len(calls)):
            time.sleep(_PAUSE)
            times[name].append(time_call(_repeat(calls[name], repeats[name]), device) / repeats[name])
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median of the ratios of pairs, and the ratios."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return statistics.median(ratios), ratios


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Return bounds of the true median, from the order of the values alone; None if they are too few.

    The k-th value from either end: the number of values below the median is binomial(n, 1/2), whatever the
    distribution, so the bounds miss it with probability 2 P(X < k). Six values are the fewest for 95 %.
    """
    n = len(values)
    tail, k = 0.0, 0
    while (tail := tail + math.comb(n, k) / 2**n) <= (1 - confidence) / 2:
        k += 1
    ordered = sorted(values)
    return (ordered[k - 1], ordered[-k]) if k else None


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value of `theirs`."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    if ours.shape != theirs.shape:
        raise ValueError(f"Got outputs of shapes {tuple(ours.shape)} and {tuple(theirs.shape)}; they must be alike.")
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


def peak_memory(device: torch.device) -> float:
    """Return the most memory that was in use so far, in MB: of the device's allocator, on the CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss is the parent's at the start of a process on Linux
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _repeat(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated
