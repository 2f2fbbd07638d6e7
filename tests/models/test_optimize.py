"""The inference copy gives the model's numbers, and refuses what it is not made for."""

import copy
import pickle
import threading
from dataclasses import replace
from typing import Literal

import pytest
import torch
from inference_copies import made_of
from oracles import randomise, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import beitzoo
from beitzoo import Beit, optimize
from beitzoo.models import optimize as optimize_module
from beitzoo.models import packed
from beitzoo.models.inference_linear import InferenceLinear
from beitzoo.zoo.architectures import ARCHITECTURES

SMALL = ARCHITECTURES["test_beit"]
CPU_HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def build(**fields: object) -> Beit:
    model = Beit(replace(SMALL, **fields)).eval()
    randomise(model)
    return model


def images(batch: int = 3, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(batch, 3, *size)


CLASSES = {
    "plain": InferenceLinear,
    "packed": packed.PackedLinear,
    "packed_for_tokens": packed.PackedLinear,
    "packed_gelu_behind": packed.PackedGeluBehind,
    "convolution": packed.ConvolutionLinear,
}
# Every kind of linear and of attention, with batches of three mapped at once, one by one, or in twos where they can be.
COPIES = [
    ("plain", "fused", "all"),
    ("packed", "blocked", "1"),
    ("packed_for_tokens", "blocked", "all"),
    ("packed_gelu_behind", "fused", "2"),
    ("convolution", "blocked", "2"),
]


def kinds_in(fast: Beit) -> set[type]:
    return {type(module) for module in fast.modules() if isinstance(module, InferenceLinear)}


FLAGS: list[dict[str, object]] = [
    {},
    {"global_pool": "token"},
    {"num_classes": 0, "global_pool": ""},
    {"init_values": 0.0, "qkv_bias": False},
    {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "img_size": (48, 80)},
    {"use_shared_rel_pos_bias": True},
    {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kinds", COPIES, ids="-".join)
def test_every_option_gives_the_models_outputs(flags: dict[str, object], kinds: tuple[str, str, str]) -> None:
    model = build(**flags)
    x = images(size=model.config.img_size)
    with torch.inference_mode():
        logits, tokens = model(x), model.forward_features(x)
        maps = model.forward_intermediates(x, norm=True, intermediates_only=True)
        attention_maps = model.attention_maps(x)
        inplace = kinds[0] == "packed"
        fast = optimize(model, inplace=inplace, choices=made_of(model, *kinds))
        assert (fast is model) == inplace
        assert isinstance(fast, Beit)
        assert CLASSES[kinds[0]] in kinds_in(fast)
        assert relative_error(fast(x), logits) <= 1e-5
        assert relative_error(fast(x[:1]), logits[:1]) <= 1e-5
        assert relative_error(fast.forward_features(x), tokens) <= 1e-5
        for ours, theirs in zip(fast.forward_intermediates(x, norm=True, intermediates_only=True), maps, strict=True):
            assert relative_error(ours, theirs) <= 1e-5
        assert relative_error(fast.attention_maps(x), attention_maps) <= 1e-5
        assert fast(images(0, model.config.img_size)).shape == (0, *logits.shape[1:])


def test_a_new_linear_in_a_block_is_taken_over() -> None:
    model = build()
    fc1 = model.blocks[0].mlp.fc1
    model.blocks[0].mlp.fc1 = nn.Linear(fc1.in_features, fc1.out_features)
    x = images()
    assert relative_error(optimize(model)(x), model(x)) <= 1e-5


@pytest.mark.parametrize(
    ("onednn", "bf16", "dtype", "kinds"),
    [
        (False, True, torch.float32, {"plain"}),
        (True, False, torch.float32, set(CLASSES)),
        (True, True, torch.bfloat16, set(CLASSES) - {"convolution"}),
        (True, True, torch.float64, {"plain"}),
    ],
)
def test_kinds_of_linears_follow_what_pytorch_has(
    onednn: bool, bf16: bool, dtype: torch.dtype, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(packed, "has_bfloat16", lambda: bf16)
    assert set(packed.linears_for(torch.empty(1), dtype, 51)) == kinds


def test_a_pytorch_without_these_operators_gets_plain_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert kinds_in(optimize(build())) == {InferenceLinear}


def test_shapes_that_keep_changing_end_in_a_plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_REPACKS", 2)
    weight, bias = torch.randn(48, 64), torch.randn(48)
    linear = packed.ConvolutionLinear(weight, bias)
    packed_so_far = []
    for batch in (1, 1, 3, 2, 1):
        x, residual = torch.randn(batch, 17, 64), torch.randn(batch, 17, 48)
        expected = F.linear(x, weight, bias)
        assert relative_error(linear(x), expected) <= 1e-6
        assert relative_error(linear.add(residual, x), residual + expected) <= 1e-6
        assert relative_error(linear.gelu(x), F.gelu(expected)) <= 1e-6
        packed_so_far.append(linear.packing.weight.is_mkldnn)
    assert packed_so_far == [True, True, True, False, False]
    assert torch.equal(linear.packing.weight, weight)


def test_a_plain_linear_at_the_end_is_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_REPACKS", 0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(2, 17, 64)
    linear = packed.ConvolutionLinear(weight, bias)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert relative_error(linear(x), F.linear(x.double(), weight.double(), bias.double())) <= 1e-6
        assert linear.add(torch.zeros(2, 17, 48), x).dtype == torch.float32
    assert not linear.packing.weight.is_mkldnn


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_onednn_takes_weights_as_they_were_packed_so_far(capfd: pytest.CaptureFixture[str]) -> None:
    """In any other form it would repack them in every call."""
    linear = packed.ConvolutionLinear(torch.randn(768, 384), torch.randn(768))
    x, residual = torch.randn(1, 197, 384), torch.randn(1, 197, 768)
    with torch.inference_mode():
        linear(x)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            linear(x)
            linear.add(residual, x)
    lines = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert [",convolution," in line for line in lines] == [True, True]


@pytest.mark.parametrize("ready_bytes", [0, 1 << 30])
def test_any_grid_with_biases_ready_or_not(ready_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize_module, "READY_BYTES", ready_bytes)
    model = build(dynamic_img_size=True, use_shared_rel_pos_bias=True)
    fast = optimize(model)
    assert all((block.attn.ready is None) == (ready_bytes == 0) for block in fast.blocks)
    with torch.inference_mode():
        for size in [(64, 64), (32, 96), (16, 16)]:
            x = images(size=size)
            assert relative_error(fast(x), model(x)) <= 1e-5
    for either in (model, fast):
        either.set_input_size((96, 48))
    x = images(size=(96, 48))
    assert relative_error(fast(x), model(x)) <= 1e-5


def test_other_heads_and_channels_work_as_ever() -> None:
    model = build()
    fast = optimize(model)
    head = nn.Linear(64, 5)
    for either in (model, fast):
        either.reset_classifier(5)
        either.head.load_state_dict(head.state_dict())
        either.set_in_chans(1)
    x = images()[:, :1]
    assert relative_error(fast(x), model(x)) <= 1e-5


def test_feature_extractors_hold_a_copy() -> None:
    features = beitzoo.create_model("test_beit", features_only=True, out_indices=[0, 1]).eval()
    randomise(features)
    x = images()
    fast = optimize(features)
    assert isinstance(fast.backbone, optimize_module.InferenceBeit)
    for ours, theirs in zip(fast(x), features(x), strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast.train()


def test_a_copy_is_a_snapshot() -> None:
    model = build()
    x = images()
    fast = optimize(model)
    before = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fast(x), before)
    assert repr(fast).startswith("InferenceBeit(")


def test_what_needs_the_model_itself_is_refused() -> None:
    fast = optimize(build(drop_rate=0.5))
    x = images()
    assert fast.eval() is fast
    assert not fast(x).requires_grad
    for refused, reason in [
        (lambda: fast.train(), "be trained"),
        (lambda: fast.requires_grad_(), "give gradients"),
        (lambda: fast(x.clone().requires_grad_()), "give gradients"),
        (lambda: fast.state_dict(), "be saved as weights"),
        (lambda: fast.load_state_dict({}), "load weights"),
        (lambda: fast.half(), "change its device or dtype"),
        (lambda: fast.to("meta"), "change its device or dtype"),
    ]:
        with pytest.raises(RuntimeError, match=f"cannot {reason}.*inference snapshot.*Use the model it was made from"):
            refused()
    assert not fast.training
    assert torch.equal(fast.to("cpu", torch.float32)(x), fast(x))
    with pytest.raises(ValueError, match=r"Got a model that optimize\(\) made"):
        optimize(fast)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="Got a Linear without a Beit"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Got dtype='int4'; use torch.bfloat16"):
        optimize(build(), dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype='int8' on meta.*Move the model to the CPU"):
        optimize(build().to("meta"), dtype="int8")


def test_additions_to_blocks_are_refused_not_lost() -> None:
    model = build()
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"Got 'blocks.1.attn.qkv', a Linear, .*hooked"):
        optimize(model, inplace=True)
    handle.remove()
    model.blocks[0].mlp.fc1 = nn.Sequential(model.blocks[0].mlp.fc1)
    with pytest.raises(ValueError, match=r"Got 'blocks.0.mlp.fc1', a Sequential.*Merge adapters"):
        optimize(model, inplace=True)
    assert type(model) is Beit


@pytest.mark.parametrize("kind", [*CLASSES, "int8"])
def test_copies_are_copied_and_pickled(kind: str) -> None:
    model = build()
    dtype: Literal["int8"] | None = "int8" if kind == "int8" else None
    fast = optimize(model, dtype, choices=made_of(model, kind, "blocked", "2", dtype or "float32"))
    x = images()
    with torch.inference_mode():
        expected = fast(x)
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(copied(x), expected)
            assert copied.choices == fast.choices


@pytest.mark.parametrize("most_repacks", [2, 16])
@pytest.mark.parametrize("kind", ["packed_for_tokens", "convolution", "int8"])
def test_threads_share_a_copy(kind: str, most_repacks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_REPACKS", most_repacks)
    model = build()
    dtype: Literal["int8"] | None = "int8" if kind == "int8" else None
    choices = made_of(model, kind, images="2", dtype=dtype or "float32")
    fast = optimize(model, dtype, choices=choices)
    batches = [images(1 + i % 3) for i in range(8)]
    expected = [optimize(model, dtype, choices=choices)(x) for x in batches]
    found: dict[int, Tensor] = {}

    def run(i: int) -> None:
        with torch.inference_mode():
            found[i] = fast(batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative_error(found[i], expected[i]) < 1e-6 for i in range(8))


def test_plain_linears_compile_and_export() -> None:
    model = build()
    fast = optimize(model, choices=made_of(model, "plain", "blocked", "2"))
    x = images()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), fast(x)) < 1e-6
    assert relative_error(torch.export.export(fast, (x,)).module()(x), fast(x)) < 1e-6


@pytest.mark.parametrize("kind", ["packed", "convolution"])
def test_linears_of_onednn_stay_outside_the_graph(kind: str) -> None:
    model, x = build(), images()
    fast = optimize(model, choices=made_of(model, kind))
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model itself"):
        torch.compile(fast, fullgraph=True, backend=count)(x)
    assert torch.equal(torch.compile(fast, backend=count)(x), fast(x))
    assert not graphs
    with pytest.raises(RuntimeError, match=r"cannot be exported or traced: its linears are oneDNN's own"):
        torch.export.export(fast, (x,))
    with (
        pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"),
        pytest.raises(RuntimeError, match="cannot be exported or traced"),
    ):
        torch.jit.trace(fast, x)


@pytest.mark.filterwarnings("ignore:This CPU has no arithmetic")
def test_bfloat16_is_no_further_from_float32_than_the_model_in_bfloat16() -> None:
    """Over many images: of few, either may be the luckier."""
    model = build(embed_dim=128, depth=4, num_classes=100)
    x = images(16)
    with torch.inference_mode():
        full = model(x)
        ours = optimize(model, dtype=torch.bfloat16)(x)
        plain = model.bfloat16()(x.bfloat16())
    assert ours.dtype == torch.bfloat16
    errors = [float((logits.float() - full).norm() / full.norm()) for logits in (ours, plain)]
    assert 0 < errors[0] <= 1.1 * errors[1]


@pytest.mark.skipif(CPU_HAS_BF16, reason="this CPU has bfloat16 arithmetic")
def test_a_dtype_that_the_processor_lacks_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"no arithmetic in torch.bfloat16; torch.float32 is faster"):
        optimize(build(), dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_copy_runs_under_autocast(kind: str) -> None:
    model = build()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            fast = optimize(model, choices=made_of(model, kind, "blocked"))
            assert relative_error(fast(x).float(), expected) < 2e-2


def test_a_module_around_a_copy_cannot_load_or_train_it() -> None:
    features = beitzoo.create_model("test_beit", features_only=True)
    state = features.state_dict()
    fast = beitzoo.optimize(features)
    with pytest.raises(RuntimeError, match="cannot load weights"):
        fast.load_state_dict(state, strict=False)
    backbone = next(module for module in fast.modules() if isinstance(module, beitzoo.Beit))
    with pytest.raises(RuntimeError, match="cannot be initialised"):
        backbone.init_weights()
    backbone.cls_token.requires_grad_(True)
    with pytest.raises(RuntimeError, match="cannot give gradients"):
        fast(torch.randn(1, 3, 64, 64))


def test_a_copy_refuses_what_its_model_refuses() -> None:
    model = beitzoo.create_model("test_beit").eval()
    with pytest.raises(TypeError, match=r"Got images of torch.uint8; .*beitzoo.open_image"):
        beitzoo.optimize(model)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"Got dtype=torch\.float8_e4m3fn"):
        beitzoo.optimize(model, dtype=torch.float8_e4m3fn)
    model.blocks[0].mlp.act = torch.nn.GELU("tanh")
    with pytest.raises(ValueError, match="not of the plain network"):
        beitzoo.optimize(model)
