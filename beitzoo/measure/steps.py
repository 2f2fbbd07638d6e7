"""What is timed (forward passes, training steps, loading), the clocks, and statistics of their readings."""

import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from beitzoo.factory import create_model
from beitzoo.images.masks import Masking, draw_mask, sample_generator
from beitzoo.measure.options import BenchmarkOptions, Precision
from beitzoo.results import Row
from beitzoo.zoo.networks import BeitConfig, Pair

CPU = torch.device("cpu")
# A ratio whose interval is wider than this factor is not published.
WIDEST = 1.5

# Seconds that a turn of an interleaved round lasts at least, by repeating what is faster.
_TURN = 0.05
# Seconds between turns, in which the threads of another runtime stop spinning.
_PAUSE = 0.01
_NO_CLASS = 255  # of a pixel, as in the original
_AUXILIARY_WEIGHT = 0.4  # of the auxiliary head's loss
_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_AUTOCAST = {"amp": torch.float16, "amp_bfloat16": torch.bfloat16}


def measure_steps(options: BenchmarkOptions) -> Row:
    """Time forward passes or training steps, as `bench` says, of one fixed random batch."""
    set_switches(options)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    dtype = stored_dtype(options.precision)
    model = create_model(
        options.model, checkpoint_path=options.checkpoint, device=options.device, dtype=dtype, **options.overrides
    )
    load_time = time.perf_counter() - started
    config = model.backbone.config
    images = random_images(config, options, model.backbone.cls_token.device)
    training = None
    if options.bench == "train":
        network = PixelLoss(model) if options.segmenter else model
        training = TrainingStep(network, images, options, random_mask(config, options, images.device))
    step = training or inference_step(prepared(model.eval(), options), images, options.precision)
    compile_time = round(time_call(step, images.device), 3) if options.torchcompile else None
    times = time_steps(step, options.num_warm_iter, options.num_bench_iter, images.device)
    prefix = "train" if training else "infer"
    return {
        f"{prefix}_img_size": config.img_size[1],
        **timed_columns(prefix, times, options.batch_size),
        **(training.parts(options.num_bench_iter) if training and options.detail else {}),
        "load_time": round(load_time, 3),
        f"{prefix}_compile_time": compile_time,
        f"{prefix}_peak_memory": round(peak_memory(images.device), 1),
    }


def timed_columns(prefix: str, times: list[float], batch_size: int) -> Row:
    """Make the columns of timed steps (ms). Throughput and step time are means, as in timm; the spread is beside."""
    mean = statistics.fmean(times)
    return {
        f"{prefix}_samples_per_sec": round(1e3 * batch_size / mean, 2),
        f"{prefix}_step_time": round(mean, 3),
        f"{prefix}_batch_size": batch_size,
        f"{prefix}_step_time_median": round(statistics.median(times), 3),
        f"{prefix}_step_time_p5": round(percentile(times, 0.05), 3),
        f"{prefix}_step_time_p95": round(percentile(times, 0.95), 3),
    }


def set_switches(options: BenchmarkOptions) -> None:
    """Let a GPU compute float32 as timm's script does: products in TF32, the fastest convolution found by trial."""
    if options.device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def random_images(config: BeitConfig, options: BenchmarkOptions, device: torch.device) -> Tensor:
    """Draw a batch of images (B, in_chans, *img_size), float32."""
    images = torch.randn(options.batch_size, config.in_chans, *config.img_size).to(device)
    return images.contiguous(memory_format=torch.channels_last) if options.channels_last else images


def random_mask(config: BeitConfig, options: BenchmarkOptions, device: torch.device) -> Tensor | None:
    """Mask blocks of patches, as many in each image, (B, h w); None where no visual tokens are predicted."""
    if options.mim is None:
        return None
    masking = Masking(grid=config.grid_size, count=masked_patches(config.grid_size), exact=True)
    images = range(options.batch_size)
    masks = [draw_mask(masking, sample_generator(options.seed, 0, image, "mask")) for image in images]
    return torch.stack(masks).flatten(1).to(device)


def random_labels(options: BenchmarkOptions, images: Tensor) -> Tensor:
    """Draw a class for each pixel of a batch of images, (B, H, W); a sixteenth has none."""
    assert options.segmenter is not None
    generator = torch.Generator().manual_seed(options.seed)
    batch, _, height, width = images.shape
    labels = torch.randint(options.segmenter.num_classes, (batch, height, width), generator=generator)
    labels[:, : height // 16] = _NO_CLASS
    return labels.to(images.device)


def masked_patches(grid: Pair) -> int:
    """Say how many patches of a grid are masked: BEiT's share, 75 of 196."""
    return max(1, round(math.prod(grid) * 75 / 196))


def prepared(network: nn.Module, options: BenchmarkOptions) -> nn.Module:
    """Bring a network, ours or a peer's, into the asked precision and memory format, and compile it if asked to."""
    network = network.to(stored_dtype(options.precision))
    if options.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if options.grad_checkpointing:
        network.set_grad_checkpointing()  # type: ignore[operator]
    if options.torchcompile is None:
        return network
    return cast(nn.Module, torch.compile(network, backend=options.torchcompile, mode=options.torchcompile_mode))


def inference_step(network: Callable[[Tensor], Tensor], images: Tensor, precision: Precision) -> Callable[[], Tensor]:
    """Return a call that runs the network on the images, in its precision, and returns its output."""
    images = images.to(stored_dtype(precision))

    def step() -> Tensor:
        with torch.inference_mode(), casting(precision, images.device):
            return network(images)

    return step


def casting(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast of a precision, or nothing where it has none."""
    dtype = autocast_dtype(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class PixelLoss(nn.Module):
    """A segmentation model that returns its loss when it is given labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images to logits, or with labels (B, H, W), 255 where there is none, to the loss of all pixels."""
        outputs = self.model(images)
        if labels is None:
            return cast(Tensor, outputs)
        several = [outputs] if isinstance(outputs, Tensor) else outputs
        losses = [
            F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, ignore_index=_NO_CLASS)
            for logits in several
        ]
        return losses[0] if len(losses) == 1 else losses[0] + _AUXILIARY_WEIGHT * losses[1]

    def set_grad_checkpointing(self) -> None:
        """Recompute the blocks in the backward pass."""
        self.model.set_grad_checkpointing()  # type: ignore[operator]


class TrainingStep:
    """Forward, backward and update of a network on one fixed batch, by timm's optimizers; call it for one step.

    A network of segmentation is a `PixelLoss`, or what is called as one.

    With a mask, (B, h w), the network is called with it too. It returns logits of the masked patches, those of patch
    aggregation beside, and their losses are added.

    Attributes:
        network: What is trained, prepared as asked for.
    """

    def __init__(
        self, network: nn.Module, images: Tensor, options: BenchmarkOptions, mask: Tensor | None = None
    ) -> None:
        from timm.optim import create_optimizer_v2  # late: importing timm costs seconds

        self._options, self._precision = options, options.precision
        self.network = prepared(network.train(), options)
        images = images.to(stored_dtype(self._precision))
        self._inputs = (images,) if mask is None else (images, mask)
        self._labels = random_labels(options, images) if options.segmenter else None
        self._device = images.device
        self._targets: Tensor | None = None
        self._loss: Tensor | None = None
        given: dict[str, Any] = {"eps": options.opt_eps, "betas": options.opt_betas}
        self._optimizer = create_optimizer_v2(
            network,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **{name: value for name, value in given.items() if value is not None},
        )
        self._scaler = torch.amp.GradScaler(images.device.type, enabled=self._precision == "amp")

    def __call__(self) -> None:
        """Take one step."""
        self._forward()
        self._backward()
        self._update()

    def outputs(self) -> Tensor:
        """Return what the network makes of the batch without dropout; that of several heads is stacked."""
        self.network.eval()
        with casting(self._precision, self._device):
            output = stacked(self.network(*self._inputs))
        self.network.train()
        return output

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        with casting(self._precision, self._device):
            if self._labels is not None:
                return cast(Tensor, self.network(*self._inputs, self._labels))
            outputs = self.network(*self._inputs)
            several = [outputs] if isinstance(outputs, Tensor) else outputs
            # Tokens that were not pooled are classified one by one.
            logits = [one.flatten(0, -2) for one in several]
            if self._targets is None:
                count, classes = logits[0].shape
                generator = torch.Generator().manual_seed(self._options.seed)
                self._targets = torch.randint(classes, (count,), generator=generator).to(self._device)
            losses = [F.cross_entropy(one, self._targets, label_smoothing=self._options.smoothing) for one in logits]
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def parts(self, count: int) -> Row:
        """Time the three parts of a step each, `count` times; return the mean milliseconds."""
        times: dict[str, list[float]] = {"fwd": [], "bwd": [], "opt": []}
        for _ in range(count):
            for name, part in {"fwd": self._forward, "bwd": self._backward, "opt": self._update}.items():
                times[name].append(1e3 * time_call(part, self._device))
        return {f"train_{name}_time": round(statistics.fmean(values), 3) for name, values in times.items()}

    def _forward(self) -> None:
        self._loss = self.loss()

    def _backward(self) -> None:
        assert self._loss is not None
        self._scaler.scale(self._loss).backward()
        self._loss = None

    def _update(self) -> None:
        """Clip the gradients if asked to, and change the parameters."""
        if self._options.clip_grad is not None:
            from timm.utils import dispatch_clip_grad

            self._scaler.unscale_(self._optimizer)
            dispatch_clip_grad(self.network.parameters(), self._options.clip_grad, mode=self._options.clip_mode)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()


def stacked(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the output of a network, or those of its several heads as one tensor."""
    return outputs if isinstance(outputs, Tensor) else torch.stack(list(outputs))


def stored_dtype(precision: Precision) -> torch.dtype:
    """Return the type of weights and images under a precision."""
    return _STORED.get(precision, torch.float32)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """Return what a precision casts to while it runs; None if to nothing."""
    return _AUTOCAST.get(precision)


@dataclass(frozen=True)
class Load:
    """A library and the folder with a model's files, in the forms of timm and transformers.

    Attributes:
        library: One of `LIBRARIES`.
        model: The name by which `create_model` builds the network of the files.
        input_size: Channels, height and width.
        folder: Where the files are.
    """

    library: str
    model: str
    input_size: tuple[int, int, int]
    folder: Path


def first_logits(load: Load) -> Row:
    """Load a model and classify one image; return the seconds to either, and the memory this added, in MB."""
    make = LIBRARIES[load.library](load)  # imports the library, which is not timed
    before = peak_memory(CPU)
    started = time.perf_counter()
    model = make().eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        model(torch.zeros(1, *load.input_size))
    seconds = time.perf_counter() - started
    return {"load_time": loaded - started, "logits_time": seconds, "added_memory": peak_memory(CPU) - before}


def _load_with_timm(load: Load) -> Callable[[], nn.Module]:
    import timm

    return lambda: timm.create_model(f"local-dir:{load.folder / 'timm'}", pretrained=True)


def _load_with_transformers(load: Load) -> Callable[[], nn.Module]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return lambda: transformers.BeitForImageClassification.from_pretrained(load.folder / "transformers")


LIBRARIES: dict[str, Callable[[Load], Callable[[], nn.Module]]] = {
    "beitzoo": lambda load: lambda: create_model(load.model, checkpoint_path=load.folder / "timm/model.safetensors"),
    "beitzoo local-dir": lambda load: lambda: create_model(f"local-dir:{load.folder / 'timm'}", pretrained=True),
    "timm": _load_with_timm,
    "transformers": _load_with_transformers,
}


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
    """Time interleaved calls, each once in a round and in a new order; return the seconds of each per round.

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


def ratio_columns(numerators: Sequence[float], denominators: Sequence[float]) -> Row:
    """Return the median of the ratios of pairs and its 95 % interval, which fewer than six pairs do not have."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low, high = median_interval(ratios) or (None, None)
    return without_wide_interval(
        {
            "ratio": rounded(statistics.median(ratios)),
            "ratio_low": low and rounded(low),
            "ratio_high": high and rounded(high),
        }
    )


def without_wide_interval(row: Row) -> Row:
    """Return a row that has an error instead of a ratio where the interval is wider than a factor of `WIDEST`."""
    low, high = (float(row[name] or 0) for name in ("ratio_low", "ratio_high"))
    if high <= WIDEST * low:
        return row
    error = (
        f"the interval of the ratio was wider than a factor of {WIDEST}; measure again on a quiet machine or in more "
        "rounds (--num-bench-iter)"
    )
    return row | {"ratio": None, "ratio_low": None, "ratio_high": None, "error": error}


def rounded(value: float) -> float:
    """Keep four digits, whatever the size."""
    return float(f"{value:.4g}")


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


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


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start again from what is in use now, where the system can do that: on Linux and on CUDA."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")


def _repeat(call: Callable[[], object], times: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated
