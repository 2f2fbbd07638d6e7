"""What a benchmark was asked for: one frozen record for one row."""

import shlex
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from beitzoo.zoo.networks import BeitConfig, override
from beitzoo.zoo.registry import find

Bench = Literal["inference", "train", "both", "profile"]
Phase = Literal["inference", "train"]
Precision = Literal["float32", "float16", "bfloat16", "amp", "amp_bfloat16", "int8"]
ClipMode = Literal["norm", "value", "agc"]

_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_AUTOCAST = {"amp": torch.float16, "amp_bfloat16": torch.bfloat16}

# What has a column of its own; all else that was asked for goes into the column `options`.
_COLUMNS = {"model", "bench", "img_size", "input_size", "batch_size", "precision", "device", "peer", "subject"}
_COLUMNS |= {"subject_precision", "num_warm_iter", "num_bench_iter", "retry"}


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """One row to measure. Names, meanings and defaults are those of timm's flags where timm has one.

    Attributes:
        model: Name as in `create_model`; the weights are random.
        bench: Forward passes, training steps, both, or only what is counted without running.
        batch_size: Images of a step.
        img_size: Height and width, the model's own if None.
        input_size: Channels, height and width; goes before `img_size`.
        precision: Type of weights and input; `amp` and `amp_bfloat16` are float32 under autocast to float16 and
            bfloat16. `int8` is for comparisons of prepared models.
        device: Such as cpu or cuda.
        num_classes: Width of the head; the checkpoint's own if None, and none for one trained without classes.
        gp: Pooling, as `global_pool`.
        model_kwargs: Fields of `BeitConfig`, by name.
        channels_last: Keep images and kernels in that memory format.
        torchcompile: Backend of torch.compile; not compiled if None.
        torchcompile_mode: Its mode.
        grad_checkpointing: Recompute activations in the backward pass.
        num_warm_iter: Steps before the timed ones.
        num_bench_iter: Timed steps; in a comparison, rounds.
        retry: Go on with a smaller batch when memory does not suffice.
        detail: Time forward, backward and update of a training step each.
        seed: Of weights, images and the order of turns.
        opt: Optimizer, by timm's name.
        opt_eps: Its epsilon, if it has one.
        opt_betas: Its betas, if it has them.
        momentum: Its momentum.
        weight_decay: Its weight decay.
        lr: Learning rate, which timm's script fixes at this default.
        clip_grad: Bound of the gradient; not clipped if None.
        clip_mode: Whether that bounds its norm, each value, or its share of the weights.
        smoothing: Of the labels.
        drop: Dropout before the head.
        drop_path: Stochastic depth.
        peer: What the subject is compared with; a plain benchmark if None.
        subject: Which of our own routes is measured in a comparison.
        subject_precision: Its precision if that differs from the peer's.
    """

    model: str
    bench: Bench = "inference"
    batch_size: int = 1
    img_size: int | None = None
    input_size: tuple[int, int, int] | None = None
    precision: Precision = "float32"
    device: str = "cpu"
    num_classes: int | None = None
    gp: str | None = None
    model_kwargs: tuple[tuple[str, Any], ...] = ()
    channels_last: bool = False
    torchcompile: str | None = None
    torchcompile_mode: str | None = None
    grad_checkpointing: bool = False
    num_warm_iter: int = 10
    num_bench_iter: int = 40
    retry: bool = True
    detail: bool = False
    seed: int = 0
    opt: str = "sgd"
    opt_eps: float | None = None
    opt_betas: tuple[float, float] | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0001
    lr: float = 0.0001
    clip_grad: float | None = None
    clip_mode: ClipMode = "norm"
    smoothing: float = 0.1
    drop: float = 0.0
    drop_path: float | None = None
    peer: str | None = None
    subject: str = "beitzoo"
    subject_precision: Precision | None = None

    def __post_init__(self) -> None:
        for name, kind in (("bench", Bench), ("precision", Precision), ("clip_mode", ClipMode)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(f"--{_flag(name)} {value!r}; there are {', '.join(get_args(kind))}.")
        for name, least in (("batch_size", 1), ("num_bench_iter", 1), ("num_warm_iter", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"--{_flag(name)} {value}; it must be a whole number from {least} up.")
        if self.precision == "int8" and self.peer is None:
            raise ValueError("--precision int8 is for --compare with --subject beitzoo+optimize; a Beit has no int8.")
        if self.peer is not None and self.bench not in ("inference", "train"):
            raise ValueError(f"--bench {self.bench} compares nothing; use --bench inference or --bench train.")
        self.network()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is run, each in a process of its own."""
        return tuple(phase for phase in get_args(Phase) if self.bench in (phase, "both"))

    @property
    def overrides(self) -> dict[str, Any]:
        """The arguments of `create_model` behind the name."""
        channels, *size = self.input_size or (None, self.img_size, self.img_size)
        entry = find(self.model)
        headless = entry.pretrained is not None and entry.pretrained.head != "classify"
        return {
            "in_chans": channels,
            "img_size": None if size[0] is None else tuple(size),
            "num_classes": 0 if headless and self.num_classes is None else self.num_classes,
            "global_pool": self.gp,
            "drop_rate": self.drop,
            "drop_path_rate": self.drop_path,
            **dict(self.model_kwargs),
        }

    def network(self) -> BeitConfig:
        """Return the network's config.

        Raises:
            ValueError: The name is unknown, or the network impossible.
            TypeError: It has no such field.
        """
        return override(find(self.model).config, **self.overrides)

    def others(self) -> str:
        """Write what was asked for beside what has a column of its own, as flags; empty if nothing was."""
        flags = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _COLUMNS or value == field.default:
                continue
            if isinstance(value, tuple):
                pairs = field.name == "model_kwargs"
                words = [f"{key}={item}" for key, item in value] if pairs else [str(item) for item in value]
            else:
                words = [] if value is True else [str(value)]
            flags.append(shlex.join([f"--{_flag(field.name)}", *words]))
        return " ".join(flags)


def usable_device(name: str) -> torch.device:
    """Check a device before anything is loaded onto it.

    Raises:
        ValueError: It is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {name!r} here: {str(error).splitlines()[0]} Use --device cpu.") from error
    return device


def stored_dtype(precision: Precision) -> torch.dtype:
    """Return the type of weights and images under a precision."""
    return _STORED.get(precision, torch.float32)


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """Return what a precision casts to while it runs; None if to nothing."""
    return _AUTOCAST.get(precision)


def _flag(name: str) -> str:
    return name.replace("_", "-")
