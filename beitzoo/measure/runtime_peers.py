"""Peers that infer only: our optimized copy, and runtimes that read our network from an ONNX file.

Each computes in the way that was fastest of those its own tools offer, see results/README.md, "Peers at their best".
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from beitzoo.errors import UnsupportedError
from beitzoo.measure import steps
from beitzoo.measure.options import Precision
from beitzoo.measure.sides import Side, require
from beitzoo.models.optimize import optimize

if TYPE_CHECKING:
    import openvino

# What OpenVINO is told to compute in; int8 leaves what is not quantised to it: bfloat16 where the processor has it.
_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


def optimized_call(side: Side) -> Callable[[], Tensor]:
    """Return a call of the optimized copy of our network."""
    _refuse(side, "beitzoo.optimize", ("float32", "bfloat16", "float16", "int8"))
    precision, images = side.options.precision, side.images
    batch, channels, height, width = images.shape
    network = optimize(
        side.model,
        dtype="int8" if precision == "int8" else steps.stored_dtype(precision),
        images_like=(batch, channels, height, width),
    )

    def run() -> Tensor:
        with torch.inference_mode():
            output: Tensor = network(images)
        return output

    return run


def onnxruntime_call(side: Side) -> Callable[[], Any]:
    """Return a call of a session of ONNX Runtime."""
    import onnxruntime

    _refuse(side, "onnxruntime", ("float32", "int8"), "its kernels for x86 have no bfloat16 or float16 products")
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


def openvino_call(side: Side) -> Callable[[], Tensor]:
    """Return a call of a network that OpenVINO compiled."""
    import openvino

    _refuse(side, "openvino", ("float32", "bfloat16", "int8"))
    threads = torch.get_num_threads()
    # Two halves of a batch at once, on half of the threads each, are a little faster than one after the other.
    parts = side.images.chunk(1 if side.options.batch_size % 2 or threads % 2 else 2)
    core = openvino.Core()
    network = core.read_model(_onnx_file(replace(side, images=parts[0])))
    settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": len(parts), "INFERENCE_NUM_THREADS": threads}
    hint = _HINTS.get(side.options.precision)
    if hint is None:
        network = _calibrated(network, parts)
    else:
        settings["INFERENCE_PRECISION_HINT"] = hint
    compiled = core.compile_model(network, "CPU", settings)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if hint not in (None, taken):  # on a CPU without the instructions it would be a float32 row under another name
        raise UnsupportedError(f"openvino computes in {taken} on this CPU when asked for {hint}.")
    inputs = [part.numpy() for part in parts]
    requests = [compiled.create_infer_request() for _ in parts]

    def run() -> Tensor:
        for request, images in zip(requests, inputs, strict=True):
            request.start_async({0: images}, share_inputs=True)
        for request in requests:
            request.wait()
        return torch.cat([torch.from_numpy(request.get_output_tensor(0).data) for request in requests])

    return run


def _calibrated(network: "openvino.Model", batches: Sequence[Tensor]) -> "openvino.Model":
    """Quantise weights and activations of a network to int8 by NNCF, with the ranges that these images have."""
    require("openvino in int8", ("nncf",))
    os.environ.setdefault("NNCF_CI", "1")  # else it tells its makers over the network that it was used
    import nncf

    nncf.set_log_level(logging.ERROR)
    samples = nncf.Dataset([images.numpy() for images in batches])
    return nncf.quantize(network, samples, subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER)


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


def _refuse(side: Side, name: str, possible: tuple[Precision, ...], reason: str = "") -> None:
    if side.options.precision not in possible:
        why = f": {reason}" if reason else ""
        raise UnsupportedError(
            f"{name} is not measured in {side.options.precision}{why}; there are {', '.join(possible)}."
        )
    if side.images.device.type != "cpu" and name != "beitzoo.optimize":
        raise UnsupportedError(f"{name} is measured on the CPU only; use --device cpu.")
