"""Initialisation, and everything that changes a built model."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import randomise, relative_error
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import beitzoo
from beitzoo import Beit
from beitzoo.models import position
from beitzoo.zoo.architectures import ARCHITECTURES

SMALL = ARCHITECTURES["test_beit"]
IMAGES = (2, 3, 64, 64)


def look_up(table: torch.Tensor, grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return position.bias(table, position.relative_position_index(grid, table.device), dtype)


def build(**fields: object) -> Beit:
    model = Beit(replace(SMALL, **fields)).eval()
    randomise(model)
    return model


def test_initialisation_is_the_originals() -> None:
    model = Beit(replace(SMALL, embed_dim=128, depth=4, use_abs_pos_emb=True, use_shared_rel_pos_bias=True))
    state = model.state_dict()
    for layer in range(1, 5):
        block = f"blocks.{layer - 1}."
        for name in ("attn.qkv", "mlp.fc1"):
            assert state[block + name + ".weight"].std() == pytest.approx(0.02, rel=0.05)
        for name in ("attn.proj", "mlp.fc2"):
            assert state[block + name + ".weight"].std() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.05)
        assert (state[block + "gamma_1"] == 0.1).all()
        assert not state[block + "attn.relative_position_bias_table"].any()
        assert not state[block + "attn.q_bias"].any()
    assert not state["rel_pos_bias.relative_position_bias_table"].any()
    assert state["pos_embed"].std() == pytest.approx(0.02, rel=0.1)
    assert 0.005 < state["cls_token"].std() < 0.04
    assert state["head.weight"].std() == pytest.approx(0.02 * 0.001, rel=0.1)
    assert not state["head.bias"].any()
    # PyTorch's default for a convolution: uniform within 1 / sqrt(inputs).
    assert state["patch_embed.proj.weight"].abs().max() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.01)
    assert (state["fc_norm.weight"] == 1).all()


def test_init_weights_reaches_every_parameter() -> None:
    with torch.device("meta"):
        model = Beit(replace(SMALL, use_abs_pos_emb=True, use_shared_rel_pos_bias=True))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_stochastic_depth_grows_linearly_and_keeps_the_mean() -> None:
    model = Beit(replace(SMALL, depth=3, drop_path_rate=0.4))
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    drop = model.blocks[2].drop_path
    ones = torch.ones(20_000, 1, 1)
    dropped = drop(ones)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(ones), ones)


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_every_rate_acts_in_training_and_only_there(rate: str) -> None:
    model = build(**{rate: 0.5})
    x = torch.randn(IMAGES)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_no_head_gives_features_and_no_pooling_keeps_tokens() -> None:
    model = build()
    x = torch.randn(IMAGES)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    assert features.shape == (2, 64)
    model.reset_classifier(5, "")
    assert model(x).shape == (2, 17, 5)
    assert model.num_classes == 5


def test_reset_classifier_keeps_norm_dtype_and_device_and_starts_near_uniform() -> None:
    model = build().to(torch.bfloat16)
    norm = model.fc_norm
    model.reset_classifier(7, "token")
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    assert head.weight.dtype == torch.bfloat16
    assert model.fc_norm is norm
    assert isinstance(model.norm, nn.Identity)
    assert head.weight.abs().max() < 1e-4


def test_set_input_size_keeps_what_a_trained_model_says_about_near_offsets() -> None:
    model = build(use_abs_pos_emb=True, use_shared_rel_pos_bias=True)
    before = model.blocks[0].attn.relative_position_bias_table.detach()[:-3].view(7, 7, 2)
    model.set_input_size((96, 128))
    after = model.blocks[0].attn.relative_position_bias_table.detach()[:-3].view(11, 15, 2)
    torch.testing.assert_close(after[5, 7], before[3, 3])
    assert model.pos_embed is not None
    assert model.pos_embed.shape == (1, 1 + 6 * 8, 64)
    assert model(torch.randn(2, 3, 96, 128)).shape == (2, 10)
    assert model.default_cfg["input_size"] == (3, 96, 128)


def test_set_in_chans_sees_grey_as_the_same_image() -> None:
    model = build()
    grey = torch.randn(2, 1, 64, 64)
    logits = model(grey.expand(-1, 3, -1, -1))
    model.set_in_chans(1)
    assert relative_error(model(grey), logits) < 1e-5
    model = build()
    logits = model(grey.expand(-1, 3, -1, -1))
    model.set_in_chans(6)
    assert relative_error(model(grey.expand(-1, 6, -1, -1)), logits) < 1e-5


def test_images_of_another_shape_are_refused_with_both_shapes() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"\(2, 3, 64, 48\).*'batch', 3, 64, 64.*img_size"):
        model(torch.randn(2, 3, 64, 48))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = build(use_shared_rel_pos_bias=True).train()
    x = torch.randn(IMAGES)
    gradients: list[list[Tensor]] = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_timm_groups_parameters_by_layer() -> None:
    model = build(use_shared_rel_pos_bias=True, use_abs_pos_emb=True)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    place = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    by_name = {name: place[id(p)] for name, p in model.named_parameters()}
    assert by_name["patch_embed.proj.weight"] == (0.125, 0.05)
    assert by_name["cls_token"] == (0.125, 0)
    assert by_name["pos_embed"] == (0.125, 0)
    assert by_name["blocks.0.attn.qkv.weight"] == (0.25, 0.05)
    assert by_name["blocks.1.attn.relative_position_bias_table"] == (0.5, 0)
    assert by_name["rel_pos_bias.relative_position_bias_table"] == (1, 0)
    assert by_name["fc_norm.weight"] == (1, 0)
    assert by_name["head.weight"] == (1, 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_full(dtype: torch.dtype) -> None:
    model = build()
    x = torch.randn(IMAGES)
    with torch.inference_mode():
        full = model(x)
        assert relative_error(model.to(dtype)(x.to(dtype)).float(), full) < 0.05


def test_autocast_trains() -> None:
    model = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(IMAGES))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_after_inference_mode() -> None:
    model = build()
    with torch.inference_mode():
        model(torch.randn(IMAGES))
    model.train()(torch.randn(IMAGES)).sum().backward()
    assert model.cls_token.grad is not None


def test_parameter_names_are_frozen() -> None:
    config = replace(SMALL, depth=1, use_abs_pos_emb=True, use_shared_rel_pos_bias=True)
    block = "gamma_1 gamma_2 norm1.weight norm1.bias norm2.weight norm2.bias attn.q_bias attn.v_bias attn.qkv.weight "
    block += "attn.relative_position_bias_table attn.proj.weight attn.proj.bias "
    block += "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
    outer = "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias fc_norm.weight fc_norm.bias head.weight "
    outer += "head.bias rel_pos_bias.relative_position_bias_table"
    expected = {*outer.split(), *(f"blocks.0.{name}" for name in block.split())}
    assert Beit(config).state_dict().keys() == expected
    assert {"norm.weight", "norm.bias"} <= Beit(replace(config, global_pool="token")).state_dict().keys()


def test_a_setter_that_fails_changes_nothing() -> None:
    model = build()
    config, x = model.config, torch.randn(IMAGES)
    expected = model(x)
    with pytest.raises(ValueError, match="num_classes=-1"):
        model.reset_classifier(-1, "token")
    with pytest.raises(ValueError, match="num_classes=None"):
        model.reset_classifier(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_chans=0"):
        model.set_in_chans(0)
    with pytest.raises(ValueError, match="use 96 or 112"):
        model.set_input_size(100)
    assert model.config == config
    assert torch.equal(model(x), expected)


def test_setters_work_under_another_default_device() -> None:
    model = build()
    with torch.device("meta"):
        model.set_input_size(96)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model(torch.randn(1, 3, 96, 96)).isfinite().all()


def test_frozen_parameters_stay_frozen_and_unchanged_ones_stay() -> None:
    model = build(use_abs_pos_emb=True, use_shared_rel_pos_bias=True).requires_grad_(False)
    kept = list(model.parameters())
    model.set_input_size(64)
    assert all(a is b for a, b in zip(kept, model.parameters(), strict=True))
    model.set_input_size(96, patch_size=8)
    model.set_in_chans(1)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_fresh_head_forgets_the_old_names() -> None:
    model = beitzoo.create_model(pretrained=True)
    assert model.pretrained.head.labels == "digits"
    model.reset_classifier(10)
    assert model.pretrained.head.labels is None


def test_table_gradients_are_summed_in_full_precision() -> None:
    """Thousands of pairs share an offset; a half-precision sum of ones would stall at 256."""
    grid = (32, 32)
    table = torch.zeros(position.table_rows(grid), 1, requires_grad=True)
    look_up(table, grid, torch.bfloat16).float().sum().backward()
    assert table.grad is not None
    assert table.grad[-3:, 0].tolist() == [1024, 1024, 1]
    assert table.grad.max() == 1024
