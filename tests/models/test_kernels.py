"""Fast paths give the same numbers as the standard calls, and are taken in ordinary eager inference only."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import randomise, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import beitzoo
from beitzoo import Beit
from beitzoo.models import kernels, position
from beitzoo.zoo.architectures import ARCHITECTURES

SMALL = ARCHITECTURES["test_beit"]


def build(**fields: object) -> Beit:
    model = Beit(replace(SMALL, **fields)).eval()
    randomise(model)
    return model


# ---- the one rule -------------------------------------------------------------------------------------------


def in_trace(ask: Callable[[Tensor], Tensor]) -> None:
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
        torch.jit.trace(ask, torch.ones(2), check_trace=False)


def in_compile(ask: Callable[[Tensor], Tensor]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ask(x)

    torch.export.export(Module(), (torch.ones(2),), strict=False)


def in_dual_level(ask: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        ask(torch.ones(2))


def in_dispatch_mode(ask: Callable[[Tensor], Tensor]) -> None:
    with FlopCounterMode(display=False):
        ask(torch.ones(2))


CONTEXTS: list[Callable[[Callable[[Tensor], Tensor]], object]] = [
    in_trace,
    in_compile,
    in_dual_level,
    in_dispatch_mode,
    lambda ask: torch.vmap(ask)(torch.ones(2)),
    lambda ask: torch.func.grad(lambda x: ask(x).sum())(torch.ones(2)),
    lambda ask: torch.func.jvp(ask, (torch.ones(2),), (torch.ones(2),)),
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which jvp itself calls
@pytest.mark.parametrize("context", CONTEXTS)
def test_no_fast_path_where_operators_are_traced_transformed_or_watched(
    context: Callable[[Callable[[Tensor], Tensor]], object],
) -> None:
    seen: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen.append(kernels.is_eager() or kernels.is_plain_inference(x))
        return x * 2

    context(ask)
    assert seen == [False]
    ask(torch.ones(2))
    assert seen == [False, True]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_only_ordinary_tensors_of_a_cpu_are_plain() -> None:
    x = torch.ones(2, 2)

    class Subclass(Tensor):
        pass

    assert kernels.is_plain(x, nn.Parameter(x))
    for other in (x.as_subclass(Subclass), x.to("meta"), x.to_sparse_csr(), x.to_mkldnn()):
        assert not kernels.is_plain(x, other)
    assert not kernels.is_plain_inference(x)
    with torch.no_grad():
        assert kernels.is_plain_inference(x)


@pytest.mark.parametrize("name", ["_len_torch_dispatch_stack", "_functorch"])
def test_a_pytorch_without_these_names_has_no_fast_paths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.delattr(torch._C, name)
        assert not kernels.is_eager()
        assert relative_error(model(x), expected) < 1e-6


def test_a_pytorch_without_these_probes_has_no_such_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.cpu_has.cache_clear()
    monkeypatch.delattr(torch.cpu, "_is_avx2_supported", raising=False)
    assert not kernels.cpu_has("avx2")
    kernels.cpu_has.cache_clear()


# ---- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 4 << 20])
def test_blocked_attention_is_attention(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", block_bytes)
    q, k, v = torch.randn(3, 2, 5, 17, 8).unbind(0)
    bias = torch.randn(5, 17, 24)[..., :17]
    with torch.inference_mode():
        mixed = kernels.attend_blocked(torch.stack([q, k, v]), bias)
        assert relative_error(mixed, kernels.attend(torch.stack([q, k, v]), bias)) <= 1e-6
    assert mixed.transpose(1, 2).is_contiguous()


def test_blocked_attention_leaves_all_but_inference_to_the_other() -> None:
    qkv, bias = torch.randn(3, 2, 5, 17, 8), torch.randn(5, 17, 17, requires_grad=True)
    assert torch.equal(kernels.attend_blocked(qkv, None), kernels.attend(qkv, None))
    kernels.attend_blocked(qkv, bias).sum().backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0


def trained_attention(dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Make queries, keys and values as a linear leaves them, and a bias of padded rows, all trained."""
    qkv = torch.randn(batch, 9, 3, 2, 4, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4)
    return qkv, torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)[..., :9]


@pytest.fixture
def image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEAST_SCORES", 0)


def test_few_scores_of_a_trained_bias_are_computed_in_steps() -> None:
    qkv, bias = trained_attention()
    weights = torch.ones(2, 2, 9, 4, dtype=torch.float64)
    found = kernels.attend(qkv, bias)
    assert type(found.grad_fn).__name__ != "_AttentionBackward"
    fused = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias)
    expected = torch.autograd.grad(fused, (qkv, bias), weights)
    for a, b in zip(torch.autograd.grad(found, (qkv, bias), weights), expected, strict=True):
        assert relative_error(a, b) <= 1e-12


@pytest.mark.usefixtures("image_by_image")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_with_a_trained_bias_has_the_gradients_of_the_fused_kernel(dropout: float) -> None:
    qkv, bias = trained_attention()
    mixed = kernels.attend(qkv, bias, dropout)
    if dropout:  # which elements are dropped depends on the kernel
        assert mixed.shape == (2, 2, 9, 4)
        return
    q, k, v = qkv.unbind(0)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert type(mixed.grad_fn).__name__ == "_AttentionBackward"
    assert relative_error(mixed, fused) <= 1e-12
    weights = torch.randn_like(fused)
    ours = torch.autograd.grad(mixed, (qkv, bias), weights)
    theirs = torch.autograd.grad(fused, (qkv, bias), weights)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) <= 1e-12
    assert ours[0].permute(1, 3, 0, 2, 4).is_contiguous()  # as the output of the linear


@pytest.mark.usefixtures("image_by_image")
def test_attention_with_a_trained_bias_can_be_differentiated_twice_and_for_several_outputs_at_once() -> None:
    qkv, bias = trained_attention(batch=1)
    assert torch.autograd.gradcheck(kernels.attend, (qkv, bias), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(kernels.attend, (qkv, bias))


@pytest.mark.usefixtures("image_by_image")
def test_attention_with_a_trained_bias_in_bfloat16_is_as_exact_as_its_inputs() -> None:
    qkv, bias = trained_attention(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (qkv, bias)]
    found, expected = kernels.attend(qkv, bias), kernels.attend(exact[0], exact[1])
    assert relative_error(found, expected) < 0.01
    weights = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, (qkv, bias), weights),
        torch.autograd.grad(expected, exact, weights.double()),
        strict=True,
    ):
        assert relative_error(a, b) < 0.02


# ---- position -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(14, 14), (1, 1), (1, 4), (3, 1), (2, 5), (7, 4)])
def test_a_workspace_holds_the_bias(grid: tuple[int, int]) -> None:
    table = torch.randn(position.table_rows(grid), 3)
    expected = position.bias(table, position.relative_position_index(grid, table.device), table.dtype)
    with torch.no_grad():
        workspace = kernels.Workspace.for_grid(grid, 3, table)
        workspace.scores.fill_(torch.nan)
        assert torch.equal(workspace.write(table, grid), expected)
    assert workspace.scores.stride(1) % 8 == 0  # rows are padded


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_mode_finds_the_same_biases(shared: bool, dtype: torch.dtype) -> None:
    """With and without a gradient, for one block after the other, in the dtype of a model or another."""
    model = build(use_shared_rel_pos_bias=shared, img_size=(32, 48))
    grid, like = (2, 3), torch.empty(0, dtype=dtype)
    index = position.relative_position_index(grid, like.device)
    common = position.bias(model.rel_pos_bias.relative_position_bias_table, index, dtype) if shared else 0
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            bias = model.position_bias(grid)
            assert (bias.workspace is None) == enabled
            for block in model.blocks:
                table = block.attn.relative_position_bias_table
                found = bias.of(table, like)
                assert found is not None
                assert (found.dtype, found.requires_grad) == (dtype, enabled)
                torch.testing.assert_close(found, position.bias(table, index, dtype) + common, rtol=1e-6, atol=1e-6)


def test_one_forward_pass_without_a_gradient_has_one_workspace() -> None:
    model = build()
    with torch.no_grad():
        bias = model.position_bias((4, 4))
        found = [bias.of(block.attn.relative_position_bias_table, model.cls_token) for block in model.blocks]
        assert found[0].data_ptr() == found[1].data_ptr()
        with torch.autocast("cpu", torch.bfloat16):
            workspace = model.position_bias((4, 4)).workspace
            assert workspace is not None and workspace.scores.dtype == torch.bfloat16


# ---- linears ------------------------------------------------------------------------------------------------


needs_onednn = pytest.mark.skipif(
    not (kernels.cpu_has("avx512") and torch.backends.mkldnn.is_available()), reason="oneDNN is not taken here"
)


@pytest.fixture
def with_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_onednn_products", lambda: True)


@pytest.fixture
def as_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_bfloat16_convolutions", lambda: True)
    monkeypatch.setattr(kernels, "LEAST_ROWS", 1)


@needs_onednn
@pytest.mark.usefixtures("with_onednn")
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_onednn_have_the_gradients_of_a_linear(bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(7, 2, 24).transpose(0, 1).requires_grad_()
    ours = kernels.linear(x, layer.weight, layer.bias)
    assert ours.shape == (2, 7, 40)
    exact, twin = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    theirs = exact(twin)
    assert relative_error(ours, theirs) < 1e-6
    weights = torch.randn(2, 7, 40)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert relative_error(x.grad, twin.grad) < 1e-6
    for a, b in zip(layer.parameters(), exact.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-6


@needs_onednn
@pytest.mark.usefixtures("with_onednn", "as_convolutions")
@pytest.mark.parametrize(("dtype", "exactness"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_products_of_onednn_can_be_differentiated_twice_and_for_several_outputs_at_once(
    dtype: torch.dtype, exactness: float
) -> None:
    layer, x = nn.Linear(4, 3, dtype=dtype), torch.randn(5, 4, dtype=dtype)

    def slope(product: Callable[..., Tensor]) -> Tensor:
        """Return the gradient in the weight of the squared gradient in the inputs of a sum of squares."""
        at = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(product(at, layer.weight, layer.bias).square().sum(), at, create_graph=True)
        return torch.autograd.grad(first.square().sum(), layer.weight)[0]

    assert relative_error(slope(kernels.linear), slope(F.linear)) < exactness
    at = x.clone().requires_grad_()
    y = kernels.linear(at, layer.weight, layer.bias)[0]
    (rows,) = torch.autograd.grad(y, at, torch.eye(3, dtype=dtype), is_grads_batched=True)
    assert relative_error(rows[:, 0], layer.weight) < 1e-6


def test_onednn_is_taken_for_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_onednn_products", lambda: True)
    layer, x = wide(8, 8), torch.randn(3, 8)
    pays = kernels._onednn_pays
    assert pays(x, layer.weight, layer.bias)
    assert not pays(x.double(), layer.weight.double(), layer.bias.double())
    assert not pays(x, layer.weight.double(), layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(x, layer.weight, layer.bias)
        assert kernels.linear(x, layer.weight, layer.bias).dtype == torch.bfloat16


@pytest.mark.usefixtures("with_onednn", "as_convolutions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_and_no_row_are_left_to_the_standard_linear(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 5, dtype=dtype)
    for x in (torch.randn(8, dtype=dtype), torch.randn(0, 8, dtype=dtype)):
        assert torch.equal(kernels.linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.usefixtures("as_convolutions")
@pytest.mark.parametrize("outputs", [12, 40], ids=["narrow", "wide"])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_are_a_linear_under_autocast(bias: bool, outputs: int) -> None:
    """Outputs, and gradients in the precision of the parameters, are as near to exact ones as those of a linear."""
    layer, x = nn.Linear(24, outputs, bias=bias), torch.randn(7, 2, 24).transpose(0, 1)
    weights = torch.randn(2, 7, outputs)

    def train(product: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        at, own = x.to(dtype, copy=True).requires_grad_(), copy.deepcopy(layer).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = product(at, own.weight, own.bias)
        (y * weights).sum().backward()
        return [y, *(tensor.grad for tensor in (at, *own.parameters()) if tensor.grad is not None)]

    exact, standard = train(F.linear, torch.float64), train(F.linear, torch.float32)
    found = train(kernels.linear, torch.float32)
    for ours, theirs, right in zip(found, standard, exact, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert relative_error(ours, right) < 1.5 * relative_error(theirs, right) + 1e-6


def test_gradients_of_convolutions_are_those_of_finite_differences() -> None:
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (3, 4), (3,)))
    assert torch.autograd.gradcheck(kernels._Convolution.apply, (x, weight, bias), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(kernels._Convolution.apply, (x, weight, bias))


def test_convolutions_are_taken_for_many_rows_of_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_bfloat16_convolutions", lambda: True)
    layer, x = wide(8, 8), torch.randn(kernels.LEAST_ROWS, 8)
    pays = kernels._convolution_pays
    assert not pays(x, layer.weight, layer.bias)
    for dtype, taken in ((torch.bfloat16, True), (torch.float16, False)):
        with torch.autocast("cpu", dtype):
            assert pays(x, layer.weight, layer.bias) == taken
            assert not pays(x[1:], layer.weight)
            assert not pays(x, layer.weight.double())
    half = layer.weight.bfloat16()
    assert pays(x.bfloat16(), half)
    assert not pays(x, half)


@pytest.mark.parametrize(
    ("probe", "needed"),
    [(kernels._has_onednn_products, "avx512"), (kernels._has_bfloat16_convolutions, "avx512_bf16")],
    ids=["float32", "bfloat16"],
)
def test_where_onednn_is_taken(probe: Any, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, available, taken in (
        ({needed}, True, True),
        (set(), True, False),
        ({needed, "amx_tile"}, True, False),
        ({needed}, False, False),
    ):
        monkeypatch.setattr(kernels, "cpu_has", has.__contains__)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda available=available: available)
        assert probe.__wrapped__() == taken


def wide(inputs: int = 768, outputs: int = 1024, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


class Adapter(nn.Module):
    """A low-rank adapter around a linear, as people put one there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(64, 2, bias=False), nn.Linear(2, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_qkv_is_a_linear_that_can_be_hooked_and_replaced() -> None:
    model = build()
    attn, x = model.blocks[1].attn, torch.randn(2, 3, 64, 64)
    before, seen = model(x), []
    handle = attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert relative_error(model(x), before) < 1e-6
    handle.remove()
    assert seen == [(2, 17, 192)]
    handle = attn.qkv.register_full_backward_hook(lambda module, *gradients: seen.append(gradients[1][0].shape))
    model(x).sum().backward()
    handle.remove()
    assert seen == [(2, 17, 192)] * 2
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append("any") if module is attn.qkv else None
    )
    model(x)
    handle.remove()
    assert seen[2:] == ["any"]
    handle = attn.qkv.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    doubled = model(x)
    handle.remove()
    with torch.no_grad():
        attn.qkv.weight.mul_(2)
        assert relative_error(model(x), doubled) < 1e-5
        attn.qkv.weight.div_(2)
    attn.qkv = Adapter(attn.qkv)
    after = model(x)
    assert not torch.allclose(after, before)
    after.sum().backward()
    assert attn.qkv.up.weight.grad.abs().sum() > 0
    with torch.no_grad():
        attn.qkv.up.weight.zero_()
        assert relative_error(model(x), before) < 1e-5


@pytest.mark.parametrize("change", [prune.l1_unstructured, parametrizations.orthogonal])
def test_pruned_and_parametrised_weights_of_qkv_are_used(change: Callable[..., object]) -> None:
    model, x = build(), torch.randn(2, 3, 64, 64)
    qkv = model.blocks[0].attn.qkv
    change(qkv, "weight", **({"amount": 0.9} if change is prune.l1_unstructured else {}))
    with torch.no_grad():
        found = model(x)
        plain = build()
        plain.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "blocks.0.attn.qkv" not in k}, strict=False
        )
        plain.blocks[0].attn.qkv.weight.copy_(qkv.weight)
        assert relative_error(found, plain(x)) < 1e-6


def test_a_weight_of_another_class_multiplies_as_it_likes() -> None:
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is F.linear:
                x, weight, bias = args
                return F.linear(x, 2 * weight.as_subclass(Tensor), bias)
            return super().__torch_function__(func, types, args, kwargs or {})

    model, x = build().requires_grad_(False), torch.randn(2, 3, 64, 64)
    attn = model.blocks[0].attn
    weights = [attn.qkv.weight.data, attn.proj.weight.data]
    attn.qkv.weight, attn.proj.weight = (nn.Parameter(w * 2, requires_grad=False) for w in weights)
    expected = model(x)
    attn.qkv.weight, attn.proj.weight = (nn.Parameter(w.as_subclass(Doubled), requires_grad=False) for w in weights)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_a_bias_of_queries_keys_and_values_counts() -> None:
    """A linear put in by hand may have one; the plain network has none."""
    model = beitzoo.create_model("test_beit", head_init_scale=50.0).eval()
    x = torch.randn(1, 3, 64, 64)
    plain, dim = model.blocks[0].attn.qkv, model.num_features
    model.blocks[0].attn.qkv = torch.nn.Linear(dim, 3 * dim)
    model.blocks[0].attn.qkv.weight = plain.weight
    with torch.no_grad():
        changed = model(x)
        model.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
        assert torch.allclose(model(x), changed, atol=1e-6)
    with pytest.raises(ValueError, match=r"attn\.qkv"):
        beitzoo.optimize(model)
