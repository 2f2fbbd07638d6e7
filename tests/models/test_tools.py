"""What people's tools do to a network: trace, export, transform, count, quantise, shard, offload, train."""

import copy
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from oracles import randomise, relative_error, timm_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import beitzoo
from beitzoo import Beit, optimize
from beitzoo.zoo.architectures import ARCHITECTURES

SMALL = ARCHITECTURES["test_beit"]
SHARED: dict[str, Any] = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}
deprecated = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore::torch.jit.TracerWarning")


def build(**fields: Any) -> Beit:
    model = Beit(replace(SMALL, **fields)).eval()
    randomise(model)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


# ---- graphs -------------------------------------------------------------------------------------------------


@deprecated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_runs_any_batch(dtype: torch.dtype, grad: bool) -> None:
    """As tutorials write it, with PyTorch's own check that a second trace is the same."""
    model, x = build().to(dtype), images(3).to(dtype)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x[:1])
        assert relative_error(traced(x).float(), model(x).float()) < (1e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("fields", [{}, SHARED], ids=["own", "shared"])
def test_fx_traces_the_same_numbers_and_gradients(fields: dict[str, Any]) -> None:
    model, x = build(**fields), images()
    traced = torch.fx.symbolic_trace(model)
    traced(x).sum().backward()
    found = {name: parameter.grad for name, parameter in traced.named_parameters()}
    model.zero_grad()
    expected = model(x)
    expected.sum().backward()
    assert relative_error(traced(x), expected) < 1e-6
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], parameter.grad) < 1e-5, name


def test_torchvision_extracts_what_any_module_returns() -> None:
    model, x = build(), images()
    seen: list[Tensor] = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output))
    extractor = create_feature_extractor(model, ["blocks.0", "blocks.1.attn.qkv"])
    found = extractor(x)
    model(x)
    assert relative_error(found["blocks.1.attn.qkv"], seen[-1]) < 1e-6
    expected = model.forward_intermediates(x, [0], output_fmt="NLC", intermediates_only=True)[0]
    assert relative_error(found["blocks.0"][:, 1:], expected) < 1e-6


def test_fx_is_told_what_stands_in_for_it_where_sizes_change() -> None:
    with pytest.raises(NotImplementedError, match=r"Create it without dynamic_img_size.*features_only=True"):
        torch.fx.symbolic_trace(build(dynamic_img_size=True))


@deprecated
@pytest.mark.parametrize("batch", [pytest.param(2, marks=pytest.mark.slow), 5], ids=["fixed", "dynamic"])
def test_onnx_runs_what_pytorch_exports_by_default(batch: int, tmp_path: Path) -> None:
    model, x = build(depth=1, **SHARED), images()
    dynamic = {"dynamic_shapes": ({0: "batch"},)} if batch != len(x) else {}
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", verbose=False, **dynamic)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    y = images(batch)
    (logits,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
    assert relative_error(torch.from_numpy(logits), model(y)) < 1e-5


@deprecated
@pytest.mark.slow
def test_openvino_converts_the_model_itself() -> None:
    model, x = build(), images()
    whole = {"INFERENCE_PRECISION_HINT": "f32"}  # by itself it takes bfloat16 where the processor has it
    converted = openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU", whole)
    assert relative_error(torch.from_numpy(converted(x.numpy())[0]), model(x)) < 1e-4


def test_checkpoints_compile_in_one_graph() -> None:
    model, x = build(depth=1).train(), images()
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert relative_error(parameter.grad, gradient) < 1e-5


# ---- transforms ---------------------------------------------------------------------------------------------


def test_an_ensemble_runs_under_vmap() -> None:
    models, x = [build(), build()], images()
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    with torch.no_grad():
        found = torch.vmap(
            lambda p, b: torch.func.functional_call(base, (p, b), (x,)),
        )(parameters, buffers)
        for logits, model in zip(found, models, strict=True):
            assert relative_error(logits, model(x)) < 1e-5


def test_gradients_of_single_images_are_those_of_each() -> None:
    model, x = build(depth=1), images()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    single = torch.func.grad(lambda p, image: torch.func.functional_call(model, p, (image[None],)).sum())
    found = torch.vmap(single, (None, 0))(parameters, x)
    for index, image in enumerate(x):
        model.zero_grad()
        model(image[None]).sum().backward()
        for name, parameter in model.named_parameters():
            assert relative_error(found[name][index], parameter.grad) < 1e-5, name


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which jvp itself calls
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_agrees_with_finite_differences(grad: bool) -> None:
    model, x = build(depth=1).double(), images(1).double()
    direction = torch.randn_like(x)
    with torch.set_grad_enabled(grad):
        expected = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) / 2e-6
        _, tangent = torch.func.jvp(model, (x,), (direction,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    assert relative_error(tangent, expected) < 1e-6
    assert relative_error(dual, expected) < 1e-6


# ---- what looks for linears ---------------------------------------------------------------------------------


def test_every_linear_is_a_linear_of_pytorch_and_counted() -> None:
    model, x = build(), images()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 4 * model.config.depth + 1
    assert {type(layer) for layer in layers} == {nn.Linear}
    counts = []
    for network in (model, timm_model(model)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x)
        counts.append(counter.get_total_flops())
        assert any(name.endswith("blocks.0.attn.qkv") for name in counter.get_flop_counts()) or network is not model
    assert counts[0] == counts[1] > 0


@deprecated
def test_quantised_and_sparsified_linears_are_found_and_not_optimized() -> None:
    model, x = build(), images()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    assert sum(isinstance(module, dynamic) for module in quantised.modules()) == 4 * model.config.depth + 1
    with torch.no_grad():
        assert 1e-4 < relative_error(quantised(x), model(x)) < 0.1
    with pytest.raises(ValueError, match=r"Got 'blocks.0.attn.qkv', a Linear, .*quantised"):
        optimize(quantised)
    sparsifier = torch.ao.pruning.WeightNormSparsifier(sparsity_level=0.5)
    sparsifier.prepare(model, config=None)
    assert len(sparsifier.groups) == 4 * model.config.depth + 1
    sparsifier.step()
    assert (model.blocks[0].attn.qkv.weight == 0).float().mean() > 0.3
    with pytest.raises(ValueError, match=r"Got 'blocks.0.attn.qkv'"):
        optimize(model)


def test_weights_of_another_class_are_not_optimized() -> None:
    class Quantised(Tensor):
        pass

    model = build()
    weight = model.blocks[1].mlp.fc1.weight.data.as_subclass(Quantised)
    model.blocks[1].mlp.fc1.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"Got 'blocks.1.mlp.fc1', a Linear"):
        optimize(model)


# ---- several devices and processes --------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


TABLES: list[dict[str, Any]] = [{}, SHARED, {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}]


@pytest.mark.parametrize("fields", TABLES, ids=["own", "both", "shared"])
@pytest.mark.parametrize("grad", [True, False])
def test_blocks_on_another_device_find_their_positions_there(fields: dict[str, Any], grad: bool) -> None:
    model = build(**fields)
    model.blocks[1].to("meta")
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0].to("meta"), *args[1:]))
    model.fc_norm.to("meta")
    model.head.to("meta")
    with torch.set_grad_enabled(grad):
        logits = model(images())
    assert (logits.device.type, logits.shape) == ("meta", (2, 10))


@pytest.mark.parametrize("fields", TABLES, ids=["own", "both", "shared"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharding_with_mixed_precision_trains(fields: dict[str, Any], checkpointing: bool, one_process: None) -> None:
    model, x = build(**fields).train(), images()
    expected = model(x)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (1,)), "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.set_grad_checkpointing(checkpointing)
    logits = model(x)
    logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.float(), expected) < 0.05
    with torch.no_grad():
        assert relative_error(model.eval()(x).float(), expected) < 0.05


@pytest.mark.parametrize("fields", TABLES, ids=["own", "both", "shared"])
def test_offloaded_parameters_come_when_they_are_used(fields: dict[str, Any]) -> None:
    model, x = build(**fields), images()
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert relative_error(model(x), expected) < 1e-6


@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_every_parameter_of_a_feature_extractor_gets_a_gradient(one_process: None) -> None:
    fields: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 2, "img_size": 64}
    features = beitzoo.create_model("beit_base_patch16_224.mim_in22k", features_only=True, **fields)
    model = DistributedDataParallel(features)
    for _ in range(2):  # of a parameter without a gradient, DDP complains in the second step
        sum(maps.square().sum() for maps in model(images(1))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# ---- training by others -------------------------------------------------------------------------------------


def test_others_leave_notes_on_a_config_but_change_no_field() -> None:
    model = build()
    model.config.use_cache = False  # type: ignore[attr-defined]  # as transformers' Trainer does
    with pytest.raises(FrozenInstanceError):
        model.config.depth = 3  # type: ignore[misc]
    assert model.config == replace(SMALL)
    assert not hasattr(SMALL, "use_cache")
    assert copy.deepcopy(model).config == model.config


@pytest.mark.slow
def test_the_trainer_of_transformers_trains(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Classification(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return nn.functional.cross_entropy(model(inputs["images"]), inputs["labels"])

    def collate(rows: list[int]) -> dict[str, Tensor]:
        return {"images": torch.stack([images(1)[0] + row for row in rows]), "labels": torch.tensor(rows)}

    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, use_cpu=True, remove_unused_columns=False, save_steps=2
    )
    model = build()
    before = model.cls_token.clone()
    trainer = Classification(model=model, args=arguments, train_dataset=list(range(8)), data_collator=collate)
    trainer.train()
    assert not torch.equal(model.cls_token, before)
    saved = beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(saved.cls_token, model.cls_token)
