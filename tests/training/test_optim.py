"""Parameters learn as fast as the recipe says, and when it says."""

import numpy as np
import pytest
import torch
from torch import nn

import beitzoo
from beitzoo.training.optim import Schedule, parameter_groups, spread_bias_tables
from beitzoo.training.sections import TrainSection


def test_bias_tables_learn_at_their_own_rate() -> None:
    model = beitzoo.create_model("test_beit")
    recipe = TrainSection(epochs=1, batch_size=1, lr=1.0, layer_decay=0.5, bias_lr_scale=10, weight_decay=0.1)
    scales = {id(p): (g["lr_scale"], g["weight_decay"]) for g in parameter_groups(model, recipe) for p in g["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert by_name["blocks.1.attn.relative_position_bias_table"] == (5, 0)
    assert by_name["blocks.0.attn.relative_position_bias_table"] == (2.5, 0)
    assert by_name["blocks.1.attn.qkv.weight"] == (0.5, 0.1)
    assert by_name["head.weight"] == (1, 0.1)
    assert by_name["cls_token"] == (0.125, 0)


def test_bias_tables_are_spread_and_nothing_else() -> None:
    model = beitzoo.create_model("beit_nano_patch4_32")
    before = {name: p.clone() for name, p in model.named_parameters()}
    spread_bias_tables(model, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            assert parameter.detach().std() == pytest.approx(0.5, rel=0.15)
        else:
            assert torch.equal(parameter, before[name])


def original_array(start: float, end: float, epochs: int, per_epoch: int, warmup: int = 0) -> list[float]:
    """BEiT's schedule as its documentation in the paper's code has it, by NumPy: linear to the peak, then a cosine."""
    t = np.arange(epochs * per_epoch - warmup)
    return [*np.linspace(0, start, warmup), *(end + (start - end) * np.cos(np.pi * t / len(t) / 2) ** 2)]


@pytest.mark.parametrize("warmup", [{"warmup_epochs": 2}, {"warmup_epochs": 1, "warmup_updates": 10}, {}])
def test_schedule_is_the_array_of_the_original(warmup: dict[str, int]) -> None:
    recipe = TrainSection(epochs=10, batch_size=1, lr=2.0, min_lr=0.5, weight_decay=0.1, weight_decay_end=0.4, **warmup)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": parameters[:1], "lr_scale": 0.5, "weight_decay": 0.1},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr)
    schedule = Schedule(recipe, updates_per_epoch=5)
    rates, decays = [], []
    for update in range(50):
        schedule.set(optimizer, update)
        rates.append([group["lr"] for group in optimizer.param_groups])
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
    expected = np.array(original_array(2.0, 0.5, 10, 5, 10 if warmup else 0))
    np.testing.assert_allclose(np.array(rates), expected[:, None] * [0.5, 1], rtol=1e-12)
    expected = np.array(original_array(0.1, 0.4, 10, 5))
    np.testing.assert_allclose(np.array(decays), expected[:, None] * [1, 0], rtol=1e-12)


def test_weight_decay_stays_where_nothing_else_is_said() -> None:
    group = {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.3}
    optimizer = torch.optim.SGD([group], lr=1)
    Schedule(TrainSection(epochs=2, batch_size=1, lr=1.0), updates_per_epoch=5).set(optimizer, 7)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_weight_decay_cannot_start_from_none() -> None:
    """The groups that would be decayed are those that are."""
    with pytest.raises(ValueError, match="weight_decay_end needs a weight_decay above 0"):
        TrainSection(epochs=1, batch_size=1, lr=1.0, weight_decay=0, weight_decay_end=0.1)
