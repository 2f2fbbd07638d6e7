"""Parameters learn as fast as the recipe says, and when it says."""

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import beitzoo
from beitzoo.models.segmentation import Segmenter
from beitzoo.training.failure import Start, moved_names
from beitzoo.training.optim import (
    Schedule,
    freeze_unused,
    freeze_up_to,
    groups_without_layers,
    make_optimizer,
    parameter_groups,
    spread_bias_tables,
)
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


# Every part that a network may have, so that each kind of name is there.
ALL_PARTS = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True, "use_mask_token": True, "init_values": 0.1}


def unilm_layer(name: str, depth: int) -> int:
    """What `get_num_layer_for_vit` of the original's `optim_factory.py` says."""
    first, *rest = name.split(".")
    if first in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest[0]) + 1 if first == "blocks" else depth + 1


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_layers_are_those_of_unilm(pool: str) -> None:
    """Names, learning rates and, with tables decayed, weight decays; `norm` and `fc_norm`, `q_bias` and `gamma_1`."""
    model = beitzoo.create_model("test_beit", global_pool=pool, depth=3, **ALL_PARTS)
    recipe = TrainSection(epochs=1, batch_size=1, lr=1.0, layer_decay=0.65, weight_decay=0.05, decay_bias_tables=True)
    found = {id(p): group for group in parameter_groups(model, recipe) for p in group["params"]}
    names = dict(model.named_parameters())
    assert {"rel_pos_bias.relative_position_bias_table", "mask_token", "blocks.2.attn.q_bias", "head.bias"} < set(names)
    assert ("norm.weight" in names, "fc_norm.weight" in names) == (pool == "token", pool == "avg")
    for name, parameter in names.items():
        group = found[id(parameter)]
        assert group["lr_scale"] == pytest.approx(0.65 ** (4 - unilm_layer(name, 3)), rel=1e-12), name
        plain = parameter.ndim == 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
        assert group["weight_decay"] == (0 if plain else 0.05), name


@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_other_rule_is_that_of_timm(pool: str, shared: bool) -> None:
    """By timm's own network and groups; where no bias is shared and the norm is behind the pooling, both are one."""
    options = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared, "global_pool": pool, "depth": 3}
    model = beitzoo.create_model("test_beit", **options)
    sizes = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
    theirs = timm.create_model("beit_base_patch16_224", **sizes, init_values=0.1, **options)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    groups = param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.65)
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    def assigned(**rule: str) -> dict[str, tuple[float, float]]:
        recipe = TrainSection(epochs=1, batch_size=1, lr=1.0, layer_decay=0.65, **rule)
        ours = {id(parameter): name for name, parameter in model.named_parameters()}
        found = parameter_groups(model, recipe)
        return {ours[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in found for p in g["params"]}

    assert assigned(layer_rule="timm") == expected
    differing = {name for name, value in assigned().items() if value != expected[name]}
    norms = {"norm.weight", "norm.bias"} if pool == "token" else set()
    assert differing == norms | ({"rel_pos_bias.relative_position_bias_table"} if shared else set())


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_what_is_frozen_has_no_optimizer_state_and_drops_nothing(blocks: int) -> None:
    rates = {"drop_path_rate": 0.5, "pos_drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5}
    model = beitzoo.create_model("test_beit", depth=3, **ALL_PARTS, **rates)
    freeze_up_to(model, blocks)
    expected = {name for name, _ in model.named_parameters() if unilm_layer(name, 3) > blocks} - {
        "rel_pos_bias.relative_position_bias_table"
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    recipe = TrainSection(epochs=1, batch_size=1, lr=1.0, layer_decay=0.5)
    groups = parameter_groups(model, recipe)
    assert sum(len(group["params"]) for group in groups) == len(expected)
    assert max(group["lr_scale"] for group in groups) == 1  # of the head, whatever is frozen

    images = torch.randn(2, 3, 64, 64)
    outputs = []
    for _ in range(2):
        x, bias = model.train().embed(images)
        for index in range(blocks):
            x = model.run_block(index, x, bias)
        outputs.append(x)
    assert torch.equal(*outputs)
    assert not outputs[0].requires_grad
    if blocks < 3:
        assert not torch.equal(model(images), model(images))


def test_bias_tables_are_spread_and_nothing_else() -> None:
    model = beitzoo.create_model("beit_nano_patch4_32")
    before = {name: p.clone() for name, p in model.named_parameters()}
    spread_bias_tables(model, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            assert parameter.detach().std() == pytest.approx(0.5, rel=0.15)
        else:
            assert torch.equal(parameter, before[name])


def segmenter(**options: object) -> Segmenter:
    """One whose second block is not read, without dropout, as transformers' files have blocks."""
    model = beitzoo.create_model(
        "test_beit", head="segment", num_classes=3, out_indices=(-1, 0, 0, 0), decoder_drop_rate=0, **options
    )
    assert isinstance(model, Segmenter)
    return model


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    """A model says which they are, and that is what the graph of its loss says; no weight decay reaches them."""
    model = segmenter()
    train = TrainSection(epochs=1, batch_size=1, lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(parameter_groups(model, train), train)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        sum(logits.square().mean() for logits in model(torch.randn(2, 3, 64, 64))).backward()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        optimizer.step()
        optimizer.zero_grad()
    assert without == model.unused_parameters() == {name for name in before if name.startswith("backbone.blocks.1.")}
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == without
    freeze_unused(model)
    for groups in (parameter_groups(model, train), groups_without_layers(model, train)):
        learning = {id(parameter) for group in groups for parameter in group["params"]}
        assert learning == {id(p) for name, p in model.named_parameters() if name not in without}


def test_a_frozen_backbone_is_left_out_and_stays_in_evaluation_mode() -> None:
    model = segmenter(drop_path_rate=0.5, drop_rate=0.5)
    model.backbone.requires_grad_(False)
    model.train()
    assert model.training
    assert model.decode_head.training
    assert not any(module.training for module in model.backbone.modules())
    train = TrainSection(epochs=1, batch_size=1, lr=0.1)
    learning = {id(parameter) for group in parameter_groups(model, train) for parameter in group["params"]}
    assert learning == {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")}
    images = torch.randn(2, 3, 64, 64)
    features = [model.backbone.embed(images)[0] for _ in range(2)]
    assert not features[0].requires_grad
    assert torch.equal(*features)
    assert model.backbone.requires_grad_().training is False
    assert all(module.training for module in model.train().modules())


def test_what_updates_start_from_shares_frozen_weights() -> None:
    """Otherwise each update of a line would keep a copy of them; what changes is copied each time."""
    model = segmenter()
    model.backbone.requires_grad_(False)
    names = moved_names(model)
    first = Start.of(model, names, torch.device("cpu"))
    model.train()(torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        model.backbone.cls_token += 1
    second = Start.of(model, names, torch.device("cpu"), first)
    changed = {name for name in names if first.moved[name] is not second.moved[name]}
    assert changed == {"backbone.cls_token", *(name for name, _ in model.named_buffers())}
    assert not torch.equal(first.moved["backbone.cls_token"], second.moved["backbone.cls_token"])
    assert not torch.equal(
        first.moved["decode_head.bottleneck.bn.running_mean"], model.decode_head.bottleneck.bn.running_mean
    )
    torch.testing.assert_close({name: model.state_dict()[name] for name in names}, second.moved, rtol=0, atol=0)


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


def mmcv_rates(updates: int, warmup: int, peak: float, end: float) -> list[float]:
    """What mmcv's hook sets before each iteration: its line, and during the warm-up what it takes off."""
    rates = []
    for i in range(updates):
        rate = (peak - end) * (1 - i / updates) ** 1.0 + end
        if i < warmup:
            missing = (1 - i / warmup) * (1 - 1e-6)
            rate = rate * (1 - missing)
        rates.append(rate)
    return rates


@pytest.mark.parametrize("end", [0.0, 0.5])
@pytest.mark.parametrize("warmup", [0, 1, 6])
@pytest.mark.parametrize("length", [{"updates": 23}, {"epochs": 5}])
def test_poly_is_that_of_mmcv(length: dict[str, int], warmup: int, end: float) -> None:
    """Over the updates of the run, wherever an epoch ends; layers learn at their share of it."""
    recipe = TrainSection(batch_size=1, lr=2.0, min_lr=end, schedule="poly", warmup_updates=warmup, **length)
    schedule = Schedule(recipe, updates_per_epoch=5)
    rates = [schedule.lr(update) for update in range(schedule.updates)]
    np.testing.assert_allclose(rates, mmcv_rates(length.get("updates", 25), warmup, 2.0, end), rtol=1e-12)
    group = {"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.25}
    optimizer = torch.optim.SGD([group], lr=2.0)
    schedule.set(optimizer, 3)
    assert optimizer.param_groups[0]["lr"] == 0.25 * rates[3]


def test_poly_of_ade20k_is_that_of_its_configurations() -> None:
    """A few rates of 160,000 updates, computed by hand: 3e-5 to 0, 1500 of warm-up from a millionth."""
    recipe = TrainSection(batch_size=16, updates=160_000, lr=3e-5, schedule="poly", warmup_updates=1500)
    schedule = Schedule(recipe, updates_per_epoch=1263)
    assert schedule.lr(0) == pytest.approx(3e-11, rel=1e-9)
    assert schedule.lr(750) == pytest.approx(3e-5 * (1 - 750 / 160_000) * 0.5000005, rel=1e-9)
    assert schedule.lr(1500) == pytest.approx(3e-5 * (1 - 1500 / 160_000), rel=1e-9)
    assert schedule.lr(80_000) == pytest.approx(1.5e-5, rel=1e-9)
    assert schedule.lr(159_999) == pytest.approx(3e-5 / 160_000, rel=1e-9)


def test_weight_decay_stays_where_nothing_else_is_said() -> None:
    group = {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.3}
    optimizer = torch.optim.SGD([group], lr=1)
    Schedule(TrainSection(epochs=2, batch_size=1, lr=1.0), updates_per_epoch=5).set(optimizer, 7)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_weight_decay_cannot_start_from_none() -> None:
    """The groups that would be decayed are those that are."""
    with pytest.raises(ValueError, match="weight_decay_end needs a weight_decay above 0"):
        TrainSection(epochs=1, batch_size=1, lr=1.0, weight_decay=0, weight_decay_end=0.1)
