"""The same network elsewhere: peers, and the comparison of two sides in interleaved rounds."""

import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.errors import InvalidValueError, UnsupportedError, check, closest
from beitzoo.factory import create_model
from beitzoo.measure import steps
from beitzoo.measure.options import BenchmarkOptions, Precision
from beitzoo.measure.steps import rounded
from beitzoo.models.beit import Beit
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.optimize import optimize
from beitzoo.models.segmentation import Segmenter
from beitzoo.results import Row
from beitzoo.saving import save_pretrained, save_transformers
from beitzoo.weights.timm_form import timm_lacks
from beitzoo.zoo import costs
from beitzoo.zoo.networks import BeitConfig

# Where one side exceeds the rate of torch.mm by more than this factor, torch.mm bounds nothing on that machine.
_BOUND = 1.1


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: A key of `PEERS`.
        model: Ours, float32, in eval mode.
        images: (B, in_chans, height, width), float32.
        options: What was asked for, with the precision of this side.
        folder: Where it can put files.
        mask: (B, h w), of a masked image model; None for any other.
    """

    name: str
    model: Beit | MaskedImageModel | Segmenter
    images: Tensor
    options: BenchmarkOptions
    folder: Path
    mask: Tensor | None = None


@dataclass(frozen=True)
class Peer:
    """A way to run a Beit: a module, which can also be trained, or a runtime.

    Attributes:
        packages: Distributions it needs; the first is the one whose version counts.
        module: Makes a module that maps images, with the mask if there is one, to our model's output, float32.
        compiled: Run the module through torch.compile.
        runtime: Makes a call that returns the output for the images.
    """

    packages: tuple[str, ...]
    module: Callable[[Side], nn.Module] | None = None
    compiled: bool = False
    runtime: Callable[[Side], Callable[[], Any]] | None = None


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

    A ratio whose interval is too wide is an error, to be measured again. Shares of the rate of torch.mm are left out
    where either side exceeds that rate by far: such as in bfloat16 on a processor without the instructions for it.
    """
    kept = steps.without_wide_interval(row)
    if any(float(kept.get(name) or 0) > _BOUND for name in ("gemm_share", "peer_gemm_share")):
        return kept | dict.fromkeys(("gemm_gflops", "gemm_share", "peer_gemm_share"))
    return kept


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


def check_names(names: Iterable[str]) -> None:
    """Refuse names that are no peers.

    Raises:
        InvalidValueError: Names the closest.
    """
    for name in names:
        check(name in PEERS, f"There is no peer {name!r}; {closest(name, PEERS)}")


def check_installed(name: str) -> None:
    """Make sure that what a peer needs is there.

    Raises:
        InvalidValueError: It is not; says how to install it.
    """
    missing = [package for package in PEERS[name].packages if _version(package) is None]
    check(not missing, f"{name} needs {', '.join(missing)}; install it with: pip install 'beitzoo[peers]'")


def peer_version(name: str) -> str:
    """Return the version that a row is about."""
    return _version(PEERS[name].packages[0]) or ""


class _Logits(nn.Module):
    """A network of transformers that gives what is read of its outputs; with a mask, where that is."""

    def __init__(self, network: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.read = read

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.read(self.network(images))
        return self.read(self.network(images, bool_masked_pos=mask))[mask]

    def set_grad_checkpointing(self) -> None:
        self.network.gradient_checkpointing_enable()  # type: ignore[operator]


class _PixelLogits(_Logits):
    """A segmentation network of transformers, with its own loss: what `steps.PixelLoss` is for ours."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return self.read(self.network(images))
        loss: Tensor = self.network(images, labels=labels).loss
        return loss


def _ours(side: Side) -> nn.Module:
    model = deepcopy(side.model)
    return steps.PixelLoss(model) if isinstance(model, Segmenter) else model


def _timm(side: Side) -> nn.Module:
    import timm

    if side.mask is not None:
        raise UnsupportedError(
            f"timm has no masked image modelling to train {side.options.model} by; compare it with transformers, or "
            "give --num-classes to train it as a classifier."
        )
    if isinstance(side.model, Segmenter):
        raise UnsupportedError(f"timm has no segmentation models such as {side.options.model}; try transformers.")
    lacking = timm_lacks(side.model.backbone.config)
    if lacking is not None:
        raise UnsupportedError(f"timm cannot build {side.options.model}: {lacking}. Compare it with transformers.")
    save_pretrained(side.model, side.folder / "timm")
    network: nn.Module = timm.create_model(f"local-dir:{side.folder / 'timm'}", pretrained=True)
    return network


def _transformers(side: Side) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = side.folder / "transformers"
    if isinstance(side.model, MaskedImageModel) and side.model.config.early_layers:
        raise UnsupportedError(
            f"transformers has no patch aggregation, with which {side.options.model} is trained; time our network "
            "alone by leaving out --compare, or use --bench inference."
        )
    save_transformers(side.model, folder)
    if isinstance(side.model, MaskedImageModel):
        return _Logits(transformers.BeitForMaskedImageModeling.from_pretrained(folder), _logits)
    if isinstance(side.model, Segmenter):
        return _PixelLogits(transformers.BeitForSemanticSegmentation.from_pretrained(folder), _logits)
    if side.model.num_classes:
        return _Logits(transformers.BeitForImageClassification.from_pretrained(folder), _logits)
    config = side.model.config
    read = _mean_of_patches if config.global_pool == "avg" and not config.norm_after_pooling else _pooled
    return _Logits(transformers.BeitModel.from_pretrained(folder), read)


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs.logits
    return logits


def _pooled(outputs: Any) -> Tensor:
    features: Tensor = outputs.pooler_output
    return features


def _mean_of_patches(outputs: Any) -> Tensor:
    """Pool normed tokens: where they are normed, transformers' pooler takes the class token."""
    tokens: Tensor = outputs.last_hidden_state
    return tokens[:, 1:].mean(dim=1)


def _optimized(side: Side) -> Callable[[], Tensor]:
    _refuse(side, "beitzoo.optimize", ("float32", "bfloat16", "float16", "int8"))
    network = optimize(
        side.model, dtype="int8" if side.options.precision == "int8" else steps.stored_dtype(side.options.precision)
    )
    images = side.images

    def run() -> Tensor:
        with torch.inference_mode():
            output: Tensor = network(images)
        return output

    return run


def _onnxruntime(side: Side) -> Callable[[], Any]:
    import onnxruntime

    _refuse(side, "onnxruntime", ("float32", "int8"))
    path = _onnx_file(side)
    if side.options.precision == "int8":
        path = _quantised(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that go on spinning after a run took most of a core from whoever was timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = side.images.numpy()
    return lambda: session.run(None, {"images": images})[0]


def _openvino(side: Side) -> Callable[[], Any]:
    import openvino

    _refuse(side, "openvino", ("float32", "bfloat16"))
    core = openvino.Core()
    hint = {"float32": "f32", "bfloat16": "bf16"}[side.options.precision]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
    }
    compiled = core.compile_model(core.read_model(_onnx_file(side)), "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != hint:  # on a CPU without the instructions it would be a float32 row under another name
        raise UnsupportedError(f"openvino computes in {taken} on this CPU when asked for {hint}.")
    request = compiled.create_infer_request()
    images = side.images.numpy()
    return lambda: request.infer({0: images}, share_inputs=True, share_outputs=True)[0]


@torch.no_grad()  # with a gradient in sight the bias is cast where the exporter cannot follow
def _onnx_file(side: Side) -> Path:
    path = side.folder / "model.onnx"
    torch.onnx.export(
        side.model,
        (side.images,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
        external_data=True,
    )
    return path


def _quantised(path: Path) -> Path:
    """Quantise the weights of all matrix products per channel, and their inputs as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # shapes that the exporter left, which the quantiser contradicts
    target = path.with_name("int8.onnx")
    quantize_dynamic(
        model,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )
    return target


def _refuse(side: Side, name: str, possible: tuple[Precision, ...]) -> None:
    if side.options.precision not in possible:
        raise UnsupportedError(f"{name} is not measured in {side.options.precision}; there are {', '.join(possible)}.")
    if side.images.device.type != "cpu" and name != "beitzoo.optimize":
        raise UnsupportedError(f"{name} is measured on the CPU only; use --device cpu.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


PEERS = {
    "beitzoo": Peer(("beitzoo",), module=_ours),
    "beitzoo+compile": Peer(("beitzoo",), module=_ours, compiled=True),
    "beitzoo+optimize": Peer(("beitzoo",), runtime=_optimized),
    "timm": Peer(("timm",), module=_timm),
    "timm+compile": Peer(("timm",), module=_timm, compiled=True),
    "transformers": Peer(("transformers",), module=_transformers),
    "onnxruntime": Peer(("onnxruntime", "onnx", "onnxscript"), runtime=_onnxruntime),
    "openvino": Peer(("openvino", "onnx", "onnxscript"), runtime=_openvino),
}
