"""8-bit linears give the rounded product to the last integer, for each image as if it were alone."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from inference_copies import made_of
from oracles import randomise, relative_error
from torch import Tensor
from torch.nn import functional as F

from beitzoo import Beit, optimize
from beitzoo.models import choosing, int8, kernels, packed
from beitzoo.models.int8 import Int8ImageLinear, Int8Linear
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


def slow_by_image(weight: Tensor, bias: Tensor | None, image: Tensor, levels: int) -> Tensor:
    """Round and multiply number by number, in exact integers, from the least activation of an image to its largest."""
    least, largest = min(float(image.min()), 0.0), max(float(image.max()), 0.0)
    step = (largest - least) / (2 * levels + 1) or 1.0
    zero = round(-least / step)
    outputs = torch.zeros(len(image), len(weight), dtype=torch.float64)
    for i, token in enumerate(image.tolist()):
        whole = [round(value / step + zero) - zero for value in token]
        for j, row in enumerate(weight.double()):
            weight_step = float(row.abs().max()) / 127
            of_weight = [round(value / weight_step) for value in row.tolist()]
            outputs[i, j] = step * weight_step * sum(a * b for a, b in zip(whole, of_weight, strict=True))
            outputs[i, j] += 0.0 if bias is None else float(bias[j])
    return outputs.float()


@pytest.mark.parametrize("shift", [0.0, 20.0, -20.0], ids=["both_sides", "above_zero", "below_zero"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_by_image_it_is_the_exact_product_too(shift: float, with_bias: bool, levels: int) -> None:
    weight, bias, x = torch.randn(12, 64), torch.randn(12) if with_bias else None, torch.randn(3, 5, 64) * 3 + shift
    x[1] *= 40  # one image is louder, and has a scale of its own
    linear, residual = Int8ImageLinear(weight, bias), torch.randn(3, 5, 12)
    exact = torch.stack([slow_by_image(weight, bias, image, levels) for image in x])
    torch.testing.assert_close(linear(x), exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(linear.gelu(x), F.gelu(exact), rtol=1e-5, atol=1e-3)
    before = residual.clone()
    torch.testing.assert_close(linear.add(residual, x), residual + exact, rtol=1e-5, atol=1e-3)
    assert torch.equal(residual, before)
    assert torch.equal(linear(x)[:1], linear(x[:1]))
    assert linear(x[:0]).shape == (0, 5, 12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_image_alone(value: float) -> None:
    linear, x = Int8ImageLinear(torch.randn(12, 64), torch.randn(12)), torch.randn(2, 5, 64)
    expected = linear(x)
    x[0, 2, 7] = value
    found = linear(x)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", [Int8Linear, Int8ImageLinear])
def test_outputs_in_bfloat16_are_those_in_float32_to_rounding(kind: type[Int8Linear] | type[Int8ImageLinear]) -> None:
    weight, bias, x = torch.randn(12, 64), torch.randn(12), torch.randn(2, 5, 64)
    found, exact = kind(weight, bias, returns=torch.bfloat16)(x), kind(weight, bias)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@KINDS
def test_no_sum_overflows(least: float | None, levels: int) -> None:
    """All at full range: the largest sums there can be."""
    x, weight = torch.ones(3, 3072), torch.ones(16, 3072)
    for sign in (1.0, -1.0):
        full = torch.full((3, 16), sign * 3072)
        torch.testing.assert_close(Int8Linear(sign * weight, None, least)(x), full, rtol=1e-5, atol=0)
        torch.testing.assert_close(Int8ImageLinear(sign * weight, None)(x[None]), full[None], rtol=1e-5, atol=0)


@KINDS
def test_weights_and_tokens_of_zeros_give_the_bias(least: float | None, levels: int) -> None:
    bias = torch.randn(8)
    zeros, x = torch.zeros(8, 16), inputs(least, 2, 3, 16)
    torch.testing.assert_close(Int8Linear(zeros, bias, least)(x), bias.expand(2, 3, 8))
    nothing = Int8Linear(torch.randn(8, 16), bias, least)(torch.zeros(2, 3, 16))
    torch.testing.assert_close(nothing, bias.expand(2, 3, 8), rtol=0, atol=0.0 if least is None else 0.02)
    assert Int8Linear(zeros, bias, least)(torch.zeros(0, 3, 16)).shape == (0, 3, 8)
    torch.testing.assert_close(Int8ImageLinear(torch.randn(8, 16), bias)(torch.zeros(2, 3, 16)), bias.expand(2, 3, 8))


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
    weight, bias, x = torch.randn(24, 64), torch.randn(24), inputs(least, 2, 5, 64)
    for linear in (Int8Linear(weight, bias, least), Int8ImageLinear(weight, bias, torch.bfloat16)):
        for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            assert torch.equal(copied(x), linear(x))


@pytest.mark.parametrize("linear", ["int8", "int8_image"])
@pytest.mark.parametrize("attention", ["fused", "blocked", "blocked_bfloat16"])
def test_a_copy_is_near_and_an_image_independent_of_its_batch(linear: str, attention: str, levels: int) -> None:
    if attention == "blocked_bfloat16" and not packed.has_bfloat16():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    model = Beit(replace(ARCHITECTURES["test_beit"])).eval()
    randomise(model)
    fast = optimize(model, dtype="int8", choices=made_of(model, linear, attention, dtype="int8"))
    if linear == "int8":
        assert [fast.blocks[0].fc1.least, fast.blocks[0].fc2.least] == [None, int8.GELU_LEAST]
    bias = fast.blocks[0].attn.ready[1]
    assert bias.dtype == (torch.bfloat16 if attention == "blocked_bfloat16" else torch.float32)
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        assert 1e-4 < relative_error(fast(x), model(x)) <= (0.02 if levels == 127 else 0.04)
        louder = torch.cat([x[:1], 50 * x])
        torch.testing.assert_close(fast(louder)[:1], fast(x)[:1], rtol=1e-5, atol=1e-5)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(x), fast(x))
        maps = fast.attention_maps(x)
        assert maps.dtype == torch.float32
        assert relative_error(maps, model.attention_maps(x)) <= 0.1


def test_attention_in_bfloat16_is_only_for_8_bits_and_where_it_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Beit(replace(ARCHITECTURES["test_beit"])).eval()
    with pytest.raises(ValueError, match="attention='blocked_bfloat16'; use fused, blocked"):
        optimize(model, choices=made_of(model, "plain", "blocked_bfloat16"))
    monkeypatch.setattr(choosing, "has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="attention='blocked_bfloat16'; use fused, blocked"):
        optimize(model, "int8", choices=made_of(model, "int8", "blocked_bfloat16", dtype="int8"))
