"""What a benchmark runs is what was asked for."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import beitzoo
from beitzoo.measure.options import BenchmarkOptions
from beitzoo.measure.speed import TrainingStep, counted_columns, measure_inference, measure_training, timed_columns
from beitzoo.zoo.networks import BeitConfig

OPTIONS = BenchmarkOptions(model="test_beit", batch_size=2, num_warm_iter=0, num_bench_iter=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "amp", "amp_bfloat16"])
def test_every_precision_runs_and_trains(precision: Any) -> None:
    options = replace(OPTIONS, precision=precision, channels_last=True, img_size=48)
    inference, training = measure_inference(options), measure_training(replace(options, grad_checkpointing=True))
    assert (inference["infer_img_size"], inference["infer_batch_size"]) == (48, 2)
    assert (training["train_img_size"], training["train_batch_size"]) == (48, 2)
    for row, prefix in ((inference, "infer"), (training, "train")):
        assert float(row[f"{prefix}_step_time"] or 0) > 0
        assert float(row[f"{prefix}_peak_memory"] or 0) > 100
        assert float(row[f"{prefix}_samples_per_sec"] or 0) == pytest.approx(
            2e3 / float(row[f"{prefix}_step_time"] or 0), rel=0.01
        )


def test_the_parts_of_a_step_are_timed_when_asked_for() -> None:
    row = measure_training(replace(OPTIONS, detail=True))
    parts = [float(row[f"train_{name}_time"] or 0) for name in ("fwd", "bwd", "opt")]
    assert all(part > 0 for part in parts)


def stepped(**changed: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    options = replace(OPTIONS, **{"lr": 0.1, **changed})
    model = beitzoo.create_model("test_beit", **options.overrides)
    training = TrainingStep(model, torch.randn(2, 3, 64, 64), options)
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


def test_what_is_counted_is_timms() -> None:
    assert counted_columns(BeitConfig()) == {"param_count": 86.53, "infer_gmacs": 17.56, "infer_macts": 23.9}


def test_throughput_is_of_the_mean_and_the_spread_is_beside() -> None:
    assert timed_columns("infer", [10.0, 20.0, 60.0], 4) == {
        "infer_samples_per_sec": 133.33,
        "infer_step_time": 30.0,
        "infer_batch_size": 4,
        "infer_step_time_median": 20.0,
        "infer_step_time_p5": 11.0,
        "infer_step_time_p95": 56.0,
    }
