"""One network at work: forward passes and training steps, timed in timm's units."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitzoo.factory import create_model
from beitzoo.measure.options import BenchmarkOptions, Precision, autocast_dtype, stored_dtype
from beitzoo.measure.timing import peak_memory, percentile, time_call, time_steps
from beitzoo.models.beit import Beit
from beitzoo.results import Row
from beitzoo.zoo import costs
from beitzoo.zoo.networks import BeitConfig


def measure_inference(options: BenchmarkOptions) -> Row:
    """Time forward passes of one fixed random batch."""
    model, images, load_time = _set_up(options)
    device = images.device
    network = prepared(model.eval(), options)
    step = inference_step(network, images.to(stored_dtype(options.precision)), options.precision)
    compile_time = time_call(step, device) if options.torchcompile else None
    times = time_steps(step, options.num_warm_iter, options.num_bench_iter, device)
    return {
        "infer_img_size": model.config.img_size[1],
        **timed_columns("infer", times, options.batch_size),
        "load_time": round(load_time, 3),
        "infer_compile_time": compile_time and round(compile_time, 3),
        "infer_peak_memory": round(peak_memory(device), 1),
    }


def measure_training(options: BenchmarkOptions) -> Row:
    """Time steps of training on one fixed random batch: forward, backward, update."""
    model, images, load_time = _set_up(options)
    device = images.device
    training = TrainingStep(model, images, options)
    compile_time = time_call(training, device) if options.torchcompile else None
    times = time_steps(training, options.num_warm_iter, options.num_bench_iter, device)
    return {
        "train_img_size": model.config.img_size[1],
        **timed_columns("train", times, options.batch_size),
        **(training.parts(options.num_bench_iter) if options.detail else {}),
        "load_time": round(load_time, 3),
        "train_compile_time": compile_time and round(compile_time, 3),
        "train_peak_memory": round(peak_memory(device), 1),
    }


def _set_up(options: BenchmarkOptions) -> tuple[Beit, Tensor, float]:
    """Create the network and its batch of images; return them and the seconds that the network took."""
    set_switches(options)
    torch.manual_seed(options.seed)
    model, load_time = load(options)
    return model, random_images(model.config, options, model.cls_token.device), load_time


def counted_columns(config: BeitConfig) -> Row:
    """Count parameters, multiply-adds and activations by closed formula."""
    return {
        "param_count": round(costs.parameters(config) / 1e6, 2),
        "infer_gmacs": round(costs.macs(config) / 1e9, 2),
        "infer_macts": round(costs.activations(config) / 1e6, 2),
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


def load(options: BenchmarkOptions) -> tuple[Beit, float]:
    """Create the network on its device, in its precision; return it and the seconds that took."""
    started = time.perf_counter()
    dtype = stored_dtype(options.precision)
    model = create_model(options.model, device=options.device, dtype=dtype, **options.overrides)
    return model, time.perf_counter() - started


def random_images(config: BeitConfig, options: BenchmarkOptions, device: torch.device) -> Tensor:
    """Draw a batch of images (B, in_chans, *img_size), float32."""
    images = torch.randn(options.batch_size, config.in_chans, *config.img_size).to(device)
    return images.contiguous(memory_format=torch.channels_last) if options.channels_last else images


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
    """Return a call that runs the network on the images and gives its output."""

    def step() -> Tensor:
        with torch.inference_mode(), casting(precision, images.device):
            return network(images)

    return step


def casting(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast of a precision, or nothing where it has none."""
    dtype = autocast_dtype(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class TrainingStep:
    """Forward, backward and update of a network on one fixed batch, by timm's optimizers; call it for one step.

    Attributes:
        network: What is trained, prepared as asked for.
    """

    def __init__(self, network: nn.Module, images: Tensor, options: BenchmarkOptions) -> None:
        from timm.optim import create_optimizer_v2  # late: importing timm costs seconds

        self._options, self._precision = options, options.precision
        self.network = prepared(network.train(), options)
        self._images = images.to(stored_dtype(self._precision))
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
        """Return what the network makes of the batch without dropout."""
        self.network.eval()
        with casting(self._precision, self._images.device):
            output: Tensor = self.network(self._images)
        self.network.train()
        return output

    def parts(self, count: int) -> Row:
        """Time the three parts of a step each, `count` times; return the mean milliseconds."""
        times: dict[str, list[float]] = {"fwd": [], "bwd": [], "opt": []}
        for _ in range(count):
            for name, part in {"fwd": self._forward, "bwd": self._backward, "opt": self._update}.items():
                times[name].append(1e3 * time_call(part, self._images.device))
        return {f"train_{name}_time": round(statistics.fmean(values), 3) for name, values in times.items()}

    def _forward(self) -> None:
        with casting(self._precision, self._images.device):
            outputs = self.network(self._images).flatten(0, -2)  # tokens that were not pooled are classified one by one
            if self._targets is None:
                count, classes = outputs.shape
                generator = torch.Generator().manual_seed(self._options.seed)
                self._targets = torch.randint(classes, (count,), generator=generator).to(outputs.device)
            self._loss = F.cross_entropy(outputs, self._targets, label_smoothing=self._options.smoothing)

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
