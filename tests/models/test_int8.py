"""8-bit linears give the rounded product to the last integer, for each image as if it were alone."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from oracles import randomise, relative_error
from torch import Tensor
from torch.nn import functional as F

from beitzoo import Beit, optimize
from beitzoo.models import int8, kernels
from beitzoo.models.int8 import Int8Linear
from beitzoo.zoo.architectures import ARCHITECTURES

KINDS = pytest.mark.parametrize("least", [None, int8.GELU_LEAST], ids=["both_sides", "behind_gelu"])


@pytest.fixture(params=[False, True], ids=["without_vnni", "vnni"])
def levels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    if request.param and not kernels.cpu_has("vnni"):
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(kernels, "cpu_has", lambda feature: request.param)
    yield 127 if request.param else 63


def inputs(least: float | None, *shape: int) -> Tensor:
    x = torch.randn(*shape) * 3
    return x if least is None else F.gelu(x)


def slow(weight: Tensor, bias: Tensor | None, x: Tensor, levels: int, least: float | None) -> Tensor:
    """Round and multiply number by number, in exact integers."""
    outputs = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for i, token in enumerate(x.double()):
        if least is None:
            start, step = 0.0, float(token.abs().max()) / levels
        else:
            start, step = least, (float(token.max()) - least) / (2 * levels + 1)
        whole = [round((value - start) / step) for value in token.tolist()]
        for j, row in enumerate(weight.double()):
            weight_step = float(row.abs().max()) / 127
            of_weight = [round(value / weight_step) for value in row.tolist()]
            product = sum(a * b for a, b in zip(whole, of_weight, strict=True))
            outputs[i, j] = (step * product + start * sum(of_weight)) * weight_step
            outputs[i, j] += 0.0 if bias is None else float(bias[j])
    return outputs.float()


@KINDS
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_is_the_exact_product_of_what_was_rounded(least: float | None, with_bias: bool, levels: int) -> None:
    weight, bias, x = torch.randn(12, 64), torch.randn(12) if with_bias else None, inputs(least, 5, 64)
    linear, residual = Int8Linear(weight, bias, least), torch.randn(5, 12)
    exact = slow(weight, bias, x, levels, least)
    torch.testing.assert_close(linear(x), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.gelu(x), F.gelu(exact), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear.add(residual, x), residual + exact, rtol=1e-5, atol=1e-4)


@KINDS
def test_no_sum_overflows(least: float | None, levels: int) -> None:
    """All at full range: the largest sums there can be."""
    x, weight = torch.ones(3, 3072), torch.ones(16, 3072)
    for sign in (1.0, -1.0):
        full = torch.full((3, 16), sign * 3072)
        torch.testing.assert_close(Int8Linear(sign * weight, None, least)(x), full, rtol=1e-5, atol=0)


@KINDS
def test_weights_and_tokens_of_zeros_give_the_bias(least: float | None, levels: int) -> None:
    bias = torch.randn(8)
    zeros, x = torch.zeros(8, 16), inputs(least, 2, 3, 16)
    torch.testing.assert_close(Int8Linear(zeros, bias, least)(x), bias.expand(2, 3, 8))
    nothing = Int8Linear(torch.randn(8, 16), bias, least)(torch.zeros(2, 3, 16))
    torch.testing.assert_close(nothing, bias.expand(2, 3, 8), rtol=0, atol=0.0 if least is None else 0.02)
    assert Int8Linear(zeros, bias, least)(torch.zeros(0, 3, 16)).shape == (0, 3, 8)


def test_gelu_never_falls_below_its_least() -> None:
    least = float(F.gelu(torch.linspace(-1, 0, 100_001)).min())
    assert int8.GELU_LEAST < least < int8.GELU_LEAST + 1e-4


def test_behind_gelu_rounding_is_about_twice_as_fine(levels: int) -> None:
    weight, x = torch.randn(64, 256), F.gelu(torch.randn(40, 256))
    exact = x.double() @ weight.double().t()
    either, behind = (relative_error(Int8Linear(weight, None, least)(x), exact) for least in (None, int8.GELU_LEAST))
    assert behind < (0.7 if levels == 63 else 0.85) * either


@KINDS
def test_a_linear_is_copied_and_pickled(least: float | None) -> None:
    linear, x = Int8Linear(torch.randn(24, 64), torch.randn(24), least), inputs(least, 5, 64)
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(copied(x), linear(x))


def test_a_copy_is_near_and_an_image_independent_of_its_batch(levels: int) -> None:
    model = Beit(replace(ARCHITECTURES["test_beit"])).eval()
    randomise(model)
    fast = optimize(model, dtype="int8")
    assert [fast.blocks[0].fc1.least, fast.blocks[0].fc2.least] == [None, int8.GELU_LEAST]
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        assert 1e-4 < relative_error(fast(x), model(x)) <= (0.02 if levels == 127 else 0.04)
        louder = torch.cat([x[:1], 50 * x])
        torch.testing.assert_close(fast(louder)[:1], fast(x)[:1], rtol=1e-5, atol=1e-5)
