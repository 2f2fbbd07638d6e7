"""Linears of few tokens are computed in parts, to the same numbers, and only in float32 inference on a CPU."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracles import randomise, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from beitzoo import Beit, optimize
from beitzoo.models import linear, prepared
from beitzoo.models.linear import TokenLinear
from beitzoo.zoo.architectures import ARCHITECTURES

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Products(TorchDispatchMode):
    """Note which products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "mm" in func._schema.name:
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def products(layer: nn.Module, x: Tensor) -> list[str]:
    with Products() as products:
        layer(x)
    return products.names


def build(inputs: int = 768, outputs: int = 1024, bias: bool = True) -> TokenLinear:
    return TokenLinear(inputs, outputs, bias=bias).requires_grad_(False)


@needs_mkl
@pytest.mark.parametrize("shape", [(1, 197), (3, 5), (256,), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_give_the_same_numbers(shape: tuple[int, ...], bias: bool, count: int) -> None:
    layer, x = build(bias=bias), torch.randn(*shape, 768)
    with torch.inference_mode(), threads(count):
        assert products(layer, x) == ["baddbmm" if bias else "bmm"]
        y = layer(x)
        assert y.shape == (*shape, 1024)
        assert y.is_contiguous()
        assert relative_error(y, x.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0)) < 1e-6
        strided = torch.randn(768, *shape).movedim(0, -1)
        assert relative_error(layer(strided), F.linear(strided, layer.weight, layer.bias)) < 1e-6


@needs_mkl
@pytest.mark.parametrize(
    ("layer", "x", "count"),
    [
        (build(), torch.randn(1, 257, 768), 2),
        (build(), torch.randn(0, 197, 768), 2),
        (build(), torch.randn(1, 197, 768), 3),
        (build(outputs=764), torch.randn(1, 197, 768), 2),
        (build(outputs=1022), torch.randn(1, 197, 768), 2),
        (build(inputs=764), torch.randn(1, 197, 764), 2),
        (build(), torch.randn(768), 2),
        (build().double(), torch.randn(1, 197, 768).double(), 2),
        (build().bfloat16(), torch.randn(1, 197, 768).bfloat16(), 2),
    ],
    ids=["many", "none", "three threads", "few outputs", "uneven", "few inputs", "one token", "float64", "bfloat16"],
)
def test_elsewhere_the_product_is_one(layer: TokenLinear, x: Tensor, count: int) -> None:
    with torch.inference_mode(), threads(count):
        assert products(layer, x) in (["addmm"], [])
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


@needs_mkl
def test_gradients_and_autocast_keep_one_product() -> None:
    layer, x = TokenLinear(768, 1024), torch.randn(1, 197, 768)
    assert products(layer, x) == ["addmm"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert products(layer, x) == ["addmm"]


class Doubled(Tensor):
    """A weight that brings its own product, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, 2 * weight.as_subclass(Tensor), bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_of_another_class_multiplies_as_it_likes() -> None:
    layer, x = build(), torch.randn(1, 197, 768)
    expected = F.linear(x, 2 * layer.weight, layer.bias)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Doubled), requires_grad=False)
    assert type(layer.weight) is not nn.Parameter
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


def test_exported_graphs_have_one_product() -> None:
    layer, x = build(), torch.randn(1, 197, 768)
    with torch.no_grad():
        graph = torch.export.export(layer, (x,)).graph
        with pytest.warns(FutureWarning, match="deprecated"):
            traced = torch.jit.trace(layer, x).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["aten.linear.default"]
    assert "baddbmm" not in str(traced)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_weight_multiplies_as_it_likes() -> None:
    layer, x = build(), torch.randn(1, 197, 768)
    expected = layer(x)
    layer.weight = nn.Parameter(layer.weight.data.to_sparse_csr(), requires_grad=False)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


@needs_mkl
@pytest.mark.parametrize("twin", [False, True], ids=["plain", "twin"])
def test_a_network_of_bases_width_uses_parts(twin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_fastest", lambda dtype, width: prepared.PreparedLinear)
    config = ARCHITECTURES["beit_base_patch16_224"]
    model = Beit(replace(config, depth=1, img_size=(64, 80), num_classes=10)).eval()
    randomise(model)
    network, x = optimize(model) if twin else model, torch.randn(2, 3, 64, 80)
    with torch.inference_mode(), threads(2):
        assert products(network, x).count("baddbmm") == 4
        logits = network(x)
        monkeypatch.setattr(linear, "MOST_TOKENS", 0)
        assert "baddbmm" not in products(network, x)
        assert relative_error(logits, network(x)) < 1e-5


@needs_mkl
def test_compiled_graphs_have_one_product() -> None:
    layer, x = build(), torch.randn(1, 197, 768)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), threads(2):
        assert products(layer, x) == ["baddbmm"]
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
