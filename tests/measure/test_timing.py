"""Clocks, and what is made of their readings."""

import time

import pytest
import torch
from scipy.stats import binom

from beitzoo.measure import timing
from beitzoo.zoo import costs
from beitzoo.zoo.networks import BeitConfig

CPU = torch.device("cpu")


def test_every_timed_step_is_kept_and_no_other() -> None:
    calls: list[None] = []
    times = timing.time_steps(lambda: calls.append(time.sleep(0.002)), warm=2, count=3, device=CPU)
    assert (len(times), len(calls)) == (3, 5)
    assert all(2 <= milliseconds < 1000 for milliseconds in times)


def test_rounds_take_turns_in_an_order_that_a_seed_fixes() -> None:
    def orders(seed: int) -> list[str]:
        turns: list[str] = []

        def turn(name: str) -> None:
            turns.append(name)
            time.sleep(0.06)  # longer than a turn lasts at least: it is not repeated

        calls = {"a": lambda: turn("a"), "b": lambda: turn("b")}
        times = timing.time_rounds(calls, 6, CPU, seed)
        assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6}
        return turns[2:]  # behind the calls that find out how long a turn is

    first = orders(1)
    assert all(set(first[i : i + 2]) == {"a", "b"} for i in range(0, 12, 2))
    assert first == orders(1)
    assert len({tuple(first[i : i + 2]) for i in range(0, 12, 2)}) == 2


def test_what_is_quick_is_repeated_within_a_turn() -> None:
    calls: list[None] = []
    times = timing.time_rounds({"quick": lambda: calls.append(time.sleep(0.005))}, 2, CPU)
    assert len(calls) > 6
    assert all(0.005 <= seconds < 1 for seconds in times["quick"])


def test_the_median_lies_in_its_interval_as_often_as_said() -> None:
    for count in (6, 9, 15, 40):
        interval = timing.median_interval(list(map(float, range(count))))
        assert interval is not None
        below = int(interval[0])  # the bounds are the values of ranks below + 1 and count - below
        assert interval[1] == count - 1 - below
        missed = 2 * binom.cdf(below, count, 0.5)
        assert missed <= 0.05 < 2 * binom.cdf(below + 1, count, 0.5)
    assert timing.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None


def test_a_ratio_is_the_median_over_pairs() -> None:
    assert timing.median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == (2.0, [2.0, 3.0, 1.0])


def test_a_difference_is_relative_and_needs_like_shapes() -> None:
    assert timing.relative_difference(torch.tensor([1.0, -2.0]), torch.tensor([1.5, -4.0])) == 0.5
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        timing.relative_difference(torch.ones(1), torch.ones(2))


def test_matrix_products_have_the_shapes_of_the_linears() -> None:
    config = BeitConfig(embed_dim=64, num_heads=2, img_size=(32, 64))
    products = timing.gemm_call(config, 3, torch.float32, CPU)()
    assert [tuple(product.shape) for product in products] == [(27, 192), (27, 64), (27, 256), (27, 64)]  # type: ignore[attr-defined]
    deeper, attention = (2, 1), 2 * config.num_tokens**2 * config.embed_dim
    block = [costs.macs(BeitConfig(**{**vars(config), "depth": depth})) for depth in deeper]
    assert timing.gemm_flops(config, 3) == 2 * 3 * (block[0] - block[1] - attention)


def test_peak_memory_grows_with_what_is_held() -> None:
    before = timing.peak_memory(CPU)
    held = torch.ones(2**26)  # 268 MB
    assert timing.peak_memory(CPU) >= max(before, held.numel() * 4 / 1e6)
