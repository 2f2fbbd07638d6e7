"""The same network with the same weights elsewhere: what a Beit is measured against, and our own second routes."""

import importlib.metadata
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.errors import closest
from beitzoo.measure.options import Precision, stored_dtype
from beitzoo.models.beit import Beit
from beitzoo.models.optimize import optimize
from beitzoo.saving import save_pretrained, save_transformers


@dataclass(frozen=True)
class Asked:
    """What a runtime is given.

    Attributes:
        model: Ours, float32, in eval mode.
        images: (B, in_chans, height, width), float32.
        precision: What it is to compute in.
        threads: How many it may use.
        folder: Where it can put files.
    """

    model: Beit
    images: Tensor
    precision: Precision
    threads: int
    folder: Path


@dataclass(frozen=True)
class Peer:
    """A way to run a Beit; either a module, which can also be trained, or a runtime's call.

    Attributes:
        packages: Distributions it needs; the first is the one whose version counts.
        module: Makes a module that maps images to our model's output, float32, from our model and a folder.
        compiled: Run the module through torch.compile.
        runtime: Makes a call that gives the output for the images.
    """

    packages: tuple[str, ...]
    module: Callable[[Beit, Path], nn.Module] | None = None
    compiled: bool = False
    runtime: Callable[[Asked], Callable[[], Any]] | None = None


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
        ValueError: Names the closest.
    """
    for name in names:
        if name not in PEERS:
            raise ValueError(f"There is no peer {name!r}; {closest(name, PEERS)}")


def check_installed(name: str) -> None:
    """Make sure that what a peer needs is there.

    Raises:
        ValueError: It is not; says how to install it.
    """
    missing = [package for package in PEERS[name].packages if _version(package) is None]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}; install it with: pip install 'beitzoo[peers]'")


def peer_version(name: str) -> str:
    """Return the version that a row is about."""
    return _version(PEERS[name].packages[0]) or ""


class _Logits(nn.Module):
    """A network of transformers that gives its output alone, not a record of outputs."""

    def __init__(self, network: nn.Module, output: str) -> None:
        super().__init__()
        self.network = network
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = getattr(self.network(images), self.output)
        return output

    def set_grad_checkpointing(self) -> None:
        self.network.gradient_checkpointing_enable()  # type: ignore[operator]


def _ours(model: Beit, _: Path) -> nn.Module:
    return deepcopy(model)


def _timm(model: Beit, folder: Path) -> nn.Module:
    import timm

    save_pretrained(model, folder / "timm")
    network: nn.Module = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True)
    return network


def _transformers(model: Beit, folder: Path) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    save_transformers(model, folder / "transformers")
    if model.num_classes:
        network = transformers.BeitForImageClassification.from_pretrained(folder / "transformers")
        return _Logits(network, "logits")
    return _Logits(transformers.BeitModel.from_pretrained(folder / "transformers"), "pooler_output")


def _optimized(asked: Asked) -> Callable[[], Tensor]:
    _refuse(asked, "beitzoo.optimize", ("float32", "bfloat16", "float16", "int8"))
    network = optimize(asked.model, dtype="int8" if asked.precision == "int8" else stored_dtype(asked.precision))
    images = asked.images

    def run() -> Tensor:
        with torch.inference_mode():
            output: Tensor = network(images)
        return output

    return run


def _onnxruntime(asked: Asked) -> Callable[[], Any]:
    import onnxruntime

    _refuse(asked, "onnxruntime", ("float32", "int8"))
    path = _onnx_file(asked)
    if asked.precision == "int8":
        path = _quantised(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked.threads
    # Threads that go on spinning after a run took most of a core from whoever was timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = asked.images.numpy()
    return lambda: session.run(None, {"images": images})[0]


def _openvino(asked: Asked) -> Callable[[], Any]:
    import openvino

    _refuse(asked, "openvino", ("float32", "bfloat16"))
    core = openvino.Core()
    hint = {"float32": "f32", "bfloat16": "bf16"}[asked.precision]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": asked.threads,
        "INFERENCE_PRECISION_HINT": hint,
    }
    compiled = core.compile_model(core.read_model(_onnx_file(asked)), "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if taken != hint:  # on a CPU without the instructions it would be a float32 row under another name
        raise ValueError(f"openvino computes in {taken} on this CPU when asked for {hint}.")
    request = compiled.create_infer_request()
    images = asked.images.numpy()
    return lambda: request.infer({0: images}, share_inputs=True, share_outputs=True)[0]


@torch.no_grad()  # with a gradient in sight the bias is cast where the exporter cannot follow
def _onnx_file(asked: Asked) -> Path:
    path = asked.folder / "model.onnx"
    torch.onnx.export(
        asked.model,
        (asked.images,),
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


def _refuse(asked: Asked, name: str, possible: tuple[Precision, ...]) -> None:
    if asked.precision not in possible:
        raise ValueError(f"{name} is not measured in {asked.precision}; there are {', '.join(possible)}.")
    if asked.images.device.type != "cpu" and name != "beitzoo.optimize":
        raise ValueError(f"{name} is measured on the CPU only; use --device cpu.")


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
