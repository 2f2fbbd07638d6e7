"""Parameters learn as fast as the recipe says, and when it says."""

import math

import pytest
import torch
from torch import nn

import beitzoo
from beitzoo.training.optim import make_schedule, parameter_groups, spread_bias_tables
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


def test_schedule_rises_then_falls_to_its_end() -> None:
    recipe = TrainSection(epochs=10, batch_size=1, lr=2.0, min_lr=0.5, warmup_epochs=2)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr)
    schedule = make_schedule(optimizer, recipe, updates_per_epoch=5)
    rates = []
    for update in range(50):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    cosine = [0.5 + 0.75 * (1 + math.cos(math.pi * t / 40)) for t in range(40)]
    assert rates == pytest.approx([0.5 * r for r in [*(0.2 * t for t in range(10)), *cosine]], rel=1e-6)
