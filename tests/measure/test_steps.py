"""What is timed is what was asked for; clocks, and what is made of their readings."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import beitzoo
from beitzoo.measure import steps
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.models.mim import mim_loss

CPU = torch.device("cpu")
OPTIONS = BenchmarkOptions(model="test_beit", batch_size=2, num_warm_iter=0, num_bench_iter=1)


@pytest.mark.parametrize("precision", ["bfloat16", "amp"])
def test_every_precision_runs_and_trains(precision: Any) -> None:
    options = replace(OPTIONS, precision=precision, channels_last=True, img_size=48)
    inference = steps.measure_steps(options)
    training = steps.measure_steps(replace(options, bench="train", grad_checkpointing=True))
    assert (inference["infer_img_size"], inference["infer_batch_size"]) == (48, 2)
    assert (training["train_img_size"], training["train_batch_size"]) == (48, 2)
    for row, prefix in ((inference, "infer"), (training, "train")):
        assert float(row[f"{prefix}_step_time"] or 0) > 0
        assert float(row[f"{prefix}_peak_memory"] or 0) > 100
        assert float(row[f"{prefix}_samples_per_sec"] or 0) == pytest.approx(
            2e3 / float(row[f"{prefix}_step_time"] or 0), rel=0.01
        )


def test_the_parts_of_a_step_are_timed_when_asked_for() -> None:
    row = steps.measure_steps(replace(OPTIONS, bench="train", detail=True))
    parts = [float(row[f"train_{name}_time"] or 0) for name in ("fwd", "bwd", "opt")]
    assert all(part > 0 for part in parts)


MIM = (("head", "mim"), ("vocab_size", 40))
AGGREGATION = (*MIM, ("early_layers", 1), ("head_layers", 1))


@pytest.mark.parametrize("fields", [MIM, AGGREGATION], ids=["one head", "patch aggregation"])
def test_visual_tokens_of_masked_patches_are_learned(fields: Any) -> None:
    options = replace(OPTIONS, bench="train", model_kwargs=fields, precision="amp_bfloat16", opt="adamw", detail=True)
    row = steps.measure_steps(options)
    assert (row["train_img_size"], row["train_batch_size"]) == (64, 2)
    assert all(float(row[f"train_{name}"] or 0) > 0 for name in ("step_time", "fwd_time", "peak_memory"))


@pytest.mark.parametrize("fields", [MIM, AGGREGATION], ids=["one head", "patch aggregation"])
def test_the_loss_of_a_masked_image_model_is_that_of_pretraining(fields: Any) -> None:
    options = replace(OPTIONS, bench="train", model_kwargs=fields, opt="adamw", smoothing=0.0, lr=1e-3)
    model = beitzoo.create_model("test_beit", **options.overrides)
    mask = steps.random_mask(model.backbone.config, options, CPU)
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [6, 6]  # 6 of 16 are the nearest to 75 of 196
    images = torch.randn(2, 3, 64, 64)
    training = steps.TrainingStep(model, images, options, mask)
    targets = torch.randint(40, (12,), generator=torch.Generator().manual_seed(options.seed))
    before = training.loss().item()
    assert before == pytest.approx(mim_loss(model(images, mask), targets).item(), abs=1e-5)
    for _ in range(3):
        training()
    assert training.loss().item() < before - 0.1


def test_seventy_five_patches_of_an_image_at_224_are_masked() -> None:
    options = replace(OPTIONS, model="beit_base_patch16_224.mim_in22k", bench="train", batch_size=4)
    mask = steps.random_mask(options.network(), options, CPU)
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [75] * 4
    assert len({tuple(one) for one in mask.tolist()}) == 4
    blocks = mask.view(4, 14, 14)
    assert (blocks[:, 1:] == blocks[:, :-1]).float().mean() > 0.75  # 0.53 of patches that are drawn one by one


def stepped(**changed: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    options = replace(OPTIONS, **{"lr": 0.1, **changed})
    model = beitzoo.create_model("test_beit", **options.overrides)
    training = steps.TrainingStep(model, torch.randn(2, 3, 64, 64), options)
    for _ in range(3):
        training()
    return {name: value.clone() for name, value in model.state_dict().items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.stack([(one[name] - other[name]).norm() for name in one]).norm())


@pytest.fixture(scope="module")
def plain() -> Iterator[dict[str, Tensor]]:
    yield stepped()


@pytest.mark.parametrize(
    "changed",
    [
        {"opt": "adamw"},
        {"momentum": 0.5},
        {"weight_decay": 0.5},
        {"lr": 0.05},
        {"clip_grad": 1e-3},
        {"clip_grad": 1e-6, "clip_mode": "value"},
        {"smoothing": 0.5},
        {"drop": 0.5},
        {"drop_path": 0.5},
    ],
    ids=str,
)
def test_every_flag_of_training_changes_what_is_learned(changed: dict[str, Any], plain: dict[str, Tensor]) -> None:
    assert distance(stepped(), plain) == 0
    assert distance(stepped(**changed), plain) > 1e-5


@pytest.mark.parametrize("changed", [{"opt_betas": (0.5, 0.5)}, {"opt_eps": 1.0}], ids=str)
def test_options_of_one_optimizer_reach_it(changed: dict[str, Any]) -> None:
    assert distance(stepped(opt="adamw", **changed), stepped(opt="adamw")) > 1e-3


def test_a_clipped_step_is_no_longer_than_said() -> None:
    torch.manual_seed(0)
    before = beitzoo.create_model("test_beit", **OPTIONS.overrides).state_dict()
    after = stepped(opt="momentum", clip_grad=1e-3, momentum=0.0, weight_decay=0.0, lr=1.0)
    assert 0 < distance(after, before) <= 3 * 1.01e-3


def test_throughput_is_of_the_mean_and_the_spread_is_beside() -> None:
    assert steps.timed_columns("infer", [10.0, 20.0, 60.0], 4) == {
        "infer_samples_per_sec": 133.33,
        "infer_step_time": 30.0,
        "infer_batch_size": 4,
        "infer_step_time_median": 20.0,
        "infer_step_time_p5": 11.0,
        "infer_step_time_p95": 56.0,
    }


class Clock:
    """A clock that goes on only while something sleeps by it, in the place of the module time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(steps, "time", clock := Clock())
    return clock


def test_every_timed_step_is_kept_and_no_other(clock: Clock) -> None:
    seconds = iter([0.5, 0.25, 0.002, 0.001, 0.003])
    times = steps.time_steps(lambda: clock.sleep(next(seconds)), warm=2, count=3, device=CPU)
    assert times == pytest.approx([2.0, 1.0, 3.0])
    assert next(seconds, None) is None


def test_rounds_are_interleaved_in_an_order_that_a_seed_fixes(clock: Clock) -> None:
    def orders(seed: int) -> list[str]:
        turns: list[str] = []

        def turn(name: str) -> None:
            turns.append(name)
            clock.sleep(0.06)  # longer than a turn lasts at least: it is not repeated

        calls = {"a": lambda: turn("a"), "b": lambda: turn("b")}
        times = steps.time_rounds(calls, 6, CPU, seed)
        assert times == {name: pytest.approx([0.06] * 6) for name in calls}
        return turns[2:]  # behind the calls that find out how long a turn is

    first = orders(1)
    assert all(set(first[i : i + 2]) == {"a", "b"} for i in range(0, 12, 2))
    assert first == orders(1)
    assert len({tuple(first[i : i + 2]) for i in range(0, 12, 2)}) == 2


def test_what_is_quick_is_repeated_within_a_turn(clock: Clock) -> None:
    calls: list[None] = []
    times = steps.time_rounds({"quick": lambda: calls.append(clock.sleep(0.005))}, 2, CPU)
    assert len(calls) == 1 + 2 * 10  # once to find out how quick it is, then 0.05 s in each of two rounds
    assert times["quick"] == pytest.approx([0.005] * 2)


def test_the_median_lies_in_its_interval_as_often_as_said() -> None:
    for count in (6, 9, 15, 40):
        interval = steps.median_interval(list(map(float, range(count))))
        assert interval is not None
        below = int(interval[0])  # the bounds are the values of ranks below + 1 and count - below
        assert interval[1] == count - 1 - below
        missed = 2 * binom.cdf(below, count, 0.5)
        assert missed <= 0.05 < 2 * binom.cdf(below + 1, count, 0.5)
    assert steps.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None


def test_a_ratio_is_the_median_over_pairs_with_its_interval() -> None:
    assert steps.ratio_columns([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == {
        "ratio": 2.0,
        "ratio_low": None,
        "ratio_high": None,
    }
    pairs = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    assert steps.ratio_columns(pairs, [1.0] * 6) == {"ratio": 1.25, "ratio_low": 1.0, "ratio_high": 1.5}


def test_a_ratio_with_a_wide_interval_is_an_error() -> None:
    row = steps.ratio_columns([1.0, 1.1, 1.2, 1.3, 1.4, 1.51], [1.0] * 6)
    assert [row[name] for name in ("ratio", "ratio_low", "ratio_high")] == [None] * 3
    assert "wider than a factor of 1.5; measure again" in str(row["error"])


def test_peak_memory_grows_with_what_is_held() -> None:
    before = steps.peak_memory(CPU)
    held = torch.ones(2**26)  # 268 MB
    assert steps.peak_memory(CPU) >= max(before, held.numel() * 4 / 1e6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_a_peak_of_memory_can_be_forgotten() -> None:
    torch.ones(2**26)  # 256 MB, free again at once
    before = steps.peak_memory(CPU)
    steps.reset_peak_memory(CPU)
    now = steps.peak_memory(CPU)
    assert now < before - 200
    torch.ones(2**26)
    assert steps.peak_memory(CPU) > now + 200
