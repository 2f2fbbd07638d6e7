"""What a benchmark is asked for: records whose fields are the flags, each with its type, default and help."""

import argparse
import ast
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from beitzoo.errors import InvalidOptionError, InvalidValueError, check
from beitzoo.results import Format
from beitzoo.zoo.checkpoints import Classify, Mim, Segment
from beitzoo.zoo.networks import BeitConfig, HeadConfig, MimConfig, SegmenterConfig

if TYPE_CHECKING:
    import torch

    from beitzoo.weights.adapt import Plan
    from beitzoo.zoo.registry import Entry

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

Bench = Literal["inference", "train", "both", "profile", "load", "data"]
Phase = Literal["inference", "train"]
Precision = Literal["float32", "float16", "bfloat16", "amp", "amp_bfloat16", "int8"]
ClipMode = Literal["norm", "value", "agc"]

# The checkpoint whose transform `--bench data` uses: that of most.
DATA_MODEL = "beit_base_patch16_224.in22k_ft_in22k_in1k"
# What a benchmark of loading or of images can be asked for; its rows have no columns for more.
_OF_FILES = {"model", "bench", "num_bench_iter", "images", "seed"}
# What has a column of its own; all else that was asked for goes into the column `options`.
_COLUMNS = {"model", "bench", "img_size", "input_size", "batch_size", "precision", "device", "peer", "subject"}
_COLUMNS |= {"subject_precision", "num_warm_iter", "num_bench_iter", "retry", "memory"}
# What is not timm's default where visual tokens or the classes of pixels are predicted: as in BEiT's own training.
_OF_ORIGINAL: dict[str, Any] = {"opt": "adamw", "smoothing": 0.0}
_HEADS: dict[object, type[Mim | Segment]] = {"mim": Mim, "segment": Segment}


@dataclass(frozen=True)
class Flag:
    """How a field of a record is given on the command line; its type and default are the field's.

    Attributes:
        help: What it is.
        names: Its spellings; the field's name with dashes if there are none.
        reads: What else argparse is told, for values that it does not read by their type.
    """

    help: str
    names: tuple[str, ...] = ()
    reads: Mapping[str, Any] = field(default_factory=dict)


def pair(word: str) -> tuple[str, Any]:
    """Read `field=value`, the value as Python writes it, or else as text."""
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{word!r} is not field=value, such as img_size=384")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What is measured for one row. Names, meanings and defaults are those of timm's flags where timm has one.

    Attributes:
        model: Name as in `create_model`; the weights are random.
        peer: What the subject is compared with; None for a benchmark of one network.
    """

    model: str
    peer: str | None = None
    bench: Annotated[
        Bench,
        Flag(
            "inference, train, both (the default), or profile (count, run nothing); with --compare inference (the "
            "default) or train; load: from a file to the first logits; data: from an image file to a tensor. "
            "A checkpoint of masked image modelling is trained to predict visual tokens of masked patches; inference "
            "runs it without that head. One of segmentation is trained on random labels of all pixels."
        ),
    ] = "inference"
    batch_size: Annotated[
        int, Flag("Images of a step; 256 as in timm, but 1 on a CPU, where 256 take minutes.", ("--batch-size", "-b"))
    ] = 1
    img_size: Annotated[int | None, Flag("Height and width; the model's own by default.")] = None
    input_size: Annotated[tuple[int, int, int] | None, Flag("Channels, height and width; goes before --img-size.")] = (
        None
    )
    precision: Annotated[
        Precision, Flag("Of weights and input; amp and amp_bfloat16: float32 under autocast; int8: with --compare.")
    ] = "float32"
    device: Annotated[str, Flag("Such as cpu; cuda where there is one.")] = "cpu"
    checkpoint: Annotated[Path | None, Flag("Weights for the model from this file; random by default.")] = None
    num_classes: Annotated[int | None, Flag("Width of the head; the checkpoint's own by default.")] = None
    gp: Annotated[str | None, Flag("Pooling: avg or token.")] = None
    model_kwargs: Annotated[
        tuple[tuple[str, Any], ...],
        Flag(
            "Fields of BeitConfig, or what else create_model takes: field=value ...",
            reads={"type": pair, "nargs": "*", "metavar": "FIELD=VALUE"},
        ),
    ] = ()
    channels_last: Annotated[bool, Flag("Keep images and kernels in that memory format.")] = False
    torchcompile: Annotated[
        str | None,
        Flag("Compile with this backend, inductor if none is given.", reads={"nargs": "?", "const": "inductor"}),
    ] = None
    torchcompile_mode: Annotated[str | None, Flag("Mode of the compiler, such as max-autotune.")] = None
    grad_checkpointing: Annotated[bool, Flag("Recompute activations in the backward pass.")] = False
    num_warm_iter: Annotated[int, Flag("Steps before the timed ones.")] = 10
    num_bench_iter: Annotated[int, Flag("Timed steps; rounds with --compare, load (9 by default) and data (15).")] = 40
    retry: Annotated[
        bool,
        Flag(
            "Do not try smaller batches when memory runs out.",
            ("--no-retry",),
            {"action": "store_false", "dest": "retry"},
        ),
    ] = True
    detail: Annotated[bool, Flag("Time forward, backward and update of a training step as well.")] = False
    seed: Annotated[int, Flag("Of weights, images and the order of rounds.")] = 0
    opt: Annotated[str, Flag("Any optimizer of timm; adamw where visual tokens or pixels are predicted.")] = "sgd"
    opt_eps: Annotated[float | None, Flag("Its epsilon.")] = None
    opt_betas: Annotated[tuple[float, float] | None, Flag("Its betas.")] = None
    momentum: Annotated[float, Flag("Its momentum.")] = 0.9
    weight_decay: Annotated[float, Flag("Its weight decay.")] = 0.0001
    lr: Annotated[float, Flag("Its learning rate.")] = 0.0001
    clip_grad: Annotated[float | None, Flag("Bound of the gradient.")] = None
    clip_mode: Annotated[ClipMode, Flag("What that bounds: norm, value, or agc (relative to the weights).")] = "norm"
    smoothing: Annotated[float, Flag("Label smoothing; none where visual tokens or pixels are predicted.")] = 0.1
    drop: Annotated[float, Flag("Dropout before the head.")] = 0.0
    drop_path: Annotated[float | None, Flag("Stochastic depth.")] = None
    subject: Annotated[str, Flag("Our side of a comparison: beitzoo, beitzoo+compile or beitzoo+optimize.")] = "beitzoo"
    subject_precision: Annotated[
        Precision | None, Flag("Its precision where that differs from the peer's, such as int8.")
    ] = None
    memory: Annotated[
        bool, Flag("Compare the most memory in use too, of each side alone; of training and segmentation it always is.")
    ] = False
    images: Annotated[
        tuple[Path, ...], Flag("Photographs for --bench data.", reads={"type": Path, "nargs": "+", "metavar": "FILE"})
    ] = ()

    def __post_init__(self) -> None:
        for name, kind in (("bench", Bench), ("precision", Precision), ("clip_mode", ClipMode)):
            _check_choice(name, getattr(self, name), kind)
        if self.subject_precision is not None:
            _check_choice("subject_precision", self.subject_precision, Precision)
        for name, least in (("batch_size", 1), ("num_bench_iter", 1), ("num_warm_iter", 0)):
            value = getattr(self, name)
            check(value >= least, f"--{_spelled(name)} {value}; it must be a whole number from {least} up.")
        check(
            self.precision != "int8" or self.peer is not None,
            "--precision int8 is for --compare with --subject beitzoo+optimize; a Beit has no int8.",
        )
        check(
            self.peer is None or self.bench in ("inference", "train"),
            f"--bench {self.bench} compares nothing; use --bench inference or --bench train.",
        )
        if self.bench in ("load", "data"):
            self._check_files()
        check(
            bool(self.images) == (self.bench == "data"),
            f"--bench {self.bench} {'needs' if self.bench == 'data' else 'has no use for'} --images FILE ...",
        )
        self._check_head()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is run, each in a process of its own."""
        return tuple(phase for phase in get_args(Phase) if self.bench in (phase, "both"))

    @property
    def overrides(self) -> dict[str, Any]:
        """The arguments of `create_model` behind the name."""
        channels, *size = self.input_size or (None, self.img_size, self.img_size)
        trained = self._entry().pretrained
        kept = (Classify, Segment, Mim) if self.bench == "train" else (Classify, Segment)
        headless = trained is not None and not isinstance(trained.head, kept)
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
            InvalidValueError: The name is unknown, or the network impossible.
            InvalidOptionError: It has no such field.
        """
        return self._plan().wanted

    @property
    def mim(self) -> MimConfig | None:
        """The head of masked image modelling, if that is trained."""
        return self.heads if isinstance(self.heads, MimConfig) else None

    @property
    def segmenter(self) -> SegmenterConfig | None:
        """The heads of segmentation, if there are any."""
        return self.heads if isinstance(self.heads, SegmenterConfig) else None

    @property
    def heads(self) -> HeadConfig | None:
        """What is around the backbone."""
        return self._plan().wanted_head

    def phase(self, phase: Phase) -> "BenchmarkOptions":
        """Return the options of one of the phases."""
        return replace(self, bench=phase)

    def others(self) -> str:
        """Write what was asked for beside what has a column of its own, as flags; empty if nothing was."""
        flags = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in _COLUMNS or value == one.default:
                continue
            if isinstance(value, tuple):
                pairs = one.name == "model_kwargs"
                words = [f"{key}={item}" for key, item in value] if pairs else [str(item) for item in value]
            else:
                words = [] if value is True else [str(value)]
            flags.append(shlex.join([f"--{_spelled(one.name)}", *words]))
        return " ".join(flags)

    def _entry(self) -> "Entry":
        from beitzoo.factory import look_up

        return look_up(self.model, head=_HEADS.get(self._head()))

    def _head(self) -> object:
        return dict(self.model_kwargs).get("head")

    def _plan(self) -> "Plan":
        from beitzoo.weights.adapt import make_plan

        entry = self._entry()
        trained = entry.pretrained.head if entry.pretrained else Classify(num_classes=entry.config.num_classes)
        wanted = {name: value for name, value in self.overrides.items() if name != "head"}
        return make_plan(entry.name, entry.config, trained, wanted, _HEADS.get(self._head()))

    def _check_head(self) -> None:
        """Make sure that the network can be built, and trained as asked for."""
        check(
            self._head() in (None, "segment") or (self._head() == "mim" and self.bench == "train"),
            f"head={self._head()} with --bench {self.bench}; there are head=segment, and head=mim with --bench train.",
        )
        self.network()
        if self.bench == "both":
            self.phase("train")
        unused = [name for name in ("drop", "gp") if getattr(self, name)] if self.heads else []
        what, way = ("the classes of pixels", "") if self.segmenter else ("visual tokens", ", or give --num-classes")
        check(
            not unused,
            f"--{' and --'.join(unused)} without a head for classes of images: {self.model} is trained to predict "
            f"{what}. Leave that out{way}.",
        )

    def _check_files(self) -> None:
        asked = [f"--{_spelled(one.name)}" for one in fields(self) if getattr(self, one.name) != one.default]
        foreign = [name for name in asked if name[2:].replace("-", "_") not in _OF_FILES]
        if foreign:
            raise InvalidOptionError(f"--bench {self.bench} has no use for {', '.join(foreign)}; leave that out.")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What a run of the benchmark does: which models and peers, what is asked of all rows, where rows go.

    Attributes:
        rows: Fields of `BenchmarkOptions` that were given.
    """

    model: Annotated[tuple[str, ...], Flag("Name, glob or 'all' architectures; repeatable.", ("--model", "-m"))] = ()
    model_list: Annotated[Path | None, Flag("File with a name or glob per line; # starts a comment.")] = None
    compare: Annotated[str | None, Flag("Peers, such as timm,timm+compile,transformers,onnxruntime,openvino.")] = None
    amp: Annotated[bool, Flag("As --precision amp.")] = False
    amp_dtype: Annotated[str, Flag("Of amp: float16 or bfloat16.")] = "float16"
    results_file: Annotated[
        Path | None, Flag("Append rows to this file; those that are there are not measured again.")
    ] = None
    results_format: Annotated[Format, Flag("csv or json.")] = "csv"
    retry_failed: Annotated[bool, Flag("Measure rows with an error again.")] = False
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("results_format", self.results_format, Format)
        _check_choice("amp_dtype", self.amp_dtype, Literal["float16", "bfloat16"])

    def jobs(self, names: list[str], peers: list[str | None]) -> list[BenchmarkOptions]:
        """Return what is measured for each model and peer, with the defaults that depend on what was given."""
        import torch

        given = {"bench": "inference" if self.compare else "both", **self.rows, "precision": self._precision()}
        if given["bench"] in ("load", "data"):
            given = {"num_bench_iter": {"load": 9, "data": 15}[given["bench"]], **given}
        else:
            device = usable_device(given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
            given = {"batch_size": 1 if device.type == "cpu" else 256, **given, "device": str(device)}
        return [
            _with_defaults(BenchmarkOptions(model=name, peer=peer, **given), given) for name in names for peer in peers
        ]

    def _precision(self) -> str:
        """Join timm's three flags."""
        precision: str = self.rows.get("precision", "float32")
        check(
            not self.amp or precision in ("float32", "amp"),
            f"--amp with --precision {precision}; give one of the two.",
        )
        if self.amp or precision == "amp":
            return "amp" if self.amp_dtype == "float16" else "amp_bfloat16"
        return precision


def _with_defaults(job: BenchmarkOptions, given: Mapping[str, Any]) -> BenchmarkOptions:
    """Fill in what was not given as BEiT's own training has it, if that is what is timed, and what a peer can build."""
    missing = {name: value for name, value in _OF_ORIGINAL.items() if name not in given}
    heads = job.phase("train").heads if "train" in job.phases else job.heads
    if "train" in job.phases and heads is not None:
        job = replace(job, **missing)
    if isinstance(heads, SegmenterConfig) and heads.out_indices is None and "transformers" in (job.peer or ""):
        blocks = heads.of_depth(job.network().depth).out_indices or ()
        # transformers reads two blocks earlier than it is told to, and cannot be told to read the original's.
        read = tuple(max(block - 2, 0) for block in blocks)
        job = replace(job, model_kwargs=(*job.model_kwargs, ("out_indices", read)))
    return job


def usable_device(name: str) -> "torch.device":
    """Return a device after checking that it is there.

    Raises:
        InvalidValueError: It is not.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidValueError(f"There is no device {name!r} here: {reason} Use --device cpu.") from error
    return device


def _check_choice(name: str, value: str, kind: Any) -> None:
    check(value in get_args(kind), f"--{_spelled(name)} {value!r}; there are {', '.join(get_args(kind))}.")


def _spelled(name: str) -> str:
    return name.replace("_", "-")
