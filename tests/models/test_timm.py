"""Networks behave as timm's `tests/test_models.py` asks of a model, and as people's code for timm calls them.

Of timm's tests that reach BEiT, two do not apply: `test_model_forward_torchscript` and
`test_model_forward_fx_torchscript`. `torch.jit.script` is deprecated and not aimed at; `torch.jit.trace`,
`torch.compile` and `torch.export` work. `test_model_load_pretrained` needs the network: here it loads the weights of
the package. `test_model_forward_fx` and `test_model_backward_fx` are in `test_tools.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomise, relative_error
from timm.data import resolve_data_config
from torch import Tensor, nn

import beitzoo
from beitzoo import Beit

# Every kind of checkpoint: own tables, shared table, class token, absolute positions; narrow, and at 64 pixels.
NAMES = [
    "test_beit",
    "beit_large_patch16_512",
    "beitv2_base_patch16_224.in1k_ft_in1k",
    "beit_base_patch16_224.mim_in22k",
]
NARROW: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}


def build(name: str, fresh: bool = True, **options: Any) -> Any:
    options = {**NARROW, **({"num_classes": 0} if "mim" in name else {}), **options}
    model = beitzoo.create_model(name, **options)
    return randomise(model) if fresh else model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64)


@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str) -> None:
    """timm: `test_model_forward`."""
    model, x = build(name).eval(), images(1)
    expected = model(x)
    assert expected.shape == (1, model.num_classes or model.num_features)
    assert expected.isfinite().all()
    model.train().set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_backward(name: str) -> None:
    """timm: `test_model_backward`."""
    model = build(name, num_classes=42)
    outputs = model(images())
    outputs.mean().backward()
    assert outputs.shape == (2, 42)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_what_a_model_says_of_itself_is_so(name: str) -> None:
    """timm: `test_model_default_cfgs_non_std`."""
    model, x = build(name, num_classes=7).eval(), images(1)
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (7, 32, 32)
    tokens = model.forward_features(x)
    features = model.forward_head(tokens, pre_logits=True)
    assert (tokens.shape, features.shape) == ((1, 17, 32), (1, 32))
    said, names = model.default_cfg, model.state_dict().keys()
    assert {f"{said['classifier']}.weight", f"{said['first_conv']}.weight"} <= names
    assert (said["input_size"], said["architecture"]) == ((3, 64, 64), name.partition(".")[0])
    model.reset_classifier(0)
    assert torch.equal(model(x), features)
    model.reset_classifier(5)
    assert (model.num_classes, model(x).shape) == (5, (1, 5))
    assert build(name, num_classes=0)(x).shape == (1, 32)


@pytest.mark.parametrize("fields", [{"in_chans": 1}, {"num_classes": 5}, {"num_classes": 0}, {"in_chans": 4}], ids=str)
def test_pretrained_weights_fit_other_channels_and_classes(fields: dict[str, int]) -> None:
    """timm: `test_model_load_pretrained`, with the weights of the package."""
    model = beitzoo.create_model(pretrained=True, **fields).eval()
    outputs = model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    assert outputs.shape == (1, fields.get("num_classes", 10) or model.num_features)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps(name: str) -> None:
    """timm: `test_model_forward_intermediates_features` and `test_model_forward_intermediates`."""
    model, x = build(name).eval(), images(1)
    features = build(name, num_classes=None, features_only=True, feature_cls="getter", out_indices=(0, 1)).eval()
    features.backbone.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in features.backbone.state_dict()}
    )
    final, maps = model.forward_intermediates(x, indices=(0, 1))
    assert torch.equal(final, model.forward_features(x))
    info = features.feature_info
    for found, expected, channels, stride in zip(features(x), maps, info.channels(), info.reduction(), strict=True):
        assert found.shape == (1, channels, 64 // stride, 64 // stride)
        assert torch.equal(found, expected)
    assert [layer["module"] for layer in model.feature_info] == ["blocks.0", "blocks.1"]
    model.train().set_grad_checkpointing()
    for found, expected in zip(model.forward_intermediates(x, (0, 1), intermediates_only=True), maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_beit", {"features_only": True, "out_indices": (0,)}),
        ("test_beit", {"features_only": True, "global_pool": "token", "norm": True}),
        ("beit_base_patch16_224.mim_in22k", {"features_only": True, "norm": True, "num_classes": None}),
        ("beit_base_patch16_224", {"features_only": True, "pyramid": True, "depth": 4}),
        ("test_beit", {"global_pool": "token"}),
    ],
    ids=str,
)
def test_what_a_model_saves_loads_by_the_call_that_made_it(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = build(name, **options).eval(), images()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = build(name, **options, checkpoint_path=tmp_path / "weights.pth", fresh=False).eval()
    for found, expected in zip(again(x), model(x), strict=True):
        assert torch.equal(found, expected)


def test_unknown_kinds_of_feature_extractors_are_named() -> None:
    with pytest.raises(TypeError, match=r"feature_cls='hook'.*forward_intermediates"):
        build("test_beit", features_only=True, feature_cls="hook")


def test_arguments_of_timms_scripts_pass_if_unset() -> None:
    """As timm's train.py and PyTorch's benchmarks call: every argument, what is not given as None, False or empty."""
    unset: dict[str, Any] = {"drop_path_rate": None, "drop_block_rate": None, "drop_rate": 0.0, "in_chans": 3}
    unset |= {"bn_momentum": None, "bn_eps": None, "scriptable": False, "checkpoint_path": "", "global_pool": None}
    model = build("test_beit", num_classes=5, **unset)
    assert (model.num_classes, model.global_pool) == (5, "avg")
    assert build("test_beit", **{**unset, "num_classes": None}).num_classes == 10
    with pytest.raises(TypeError, match="'drop_block_rate' is not an option"):
        build("test_beit", drop_block_rate=0.1)


def test_timm_resolves_the_data_config() -> None:
    model = beitzoo.create_model("beit_large_patch16_384", device="meta")
    expected = {
        "input_size": (3, 384, 384),
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    assert resolve_data_config({}, model=model) == expected
    assert resolve_data_config({}, pretrained_cfg=model.pretrained_cfg) == expected


def test_list_models_leaves_out_what_timms_argument_names() -> None:
    assert beitzoo.list_models("beitv2_base*", exclude_filters="*512*") == ["beitv2_base_patch16_224"]
    assert "beit_nano_patch4_32.digits" not in beitzoo.list_pretrained(exclude_filters=["*digits"])


# ---- parts called by hand -----------------------------------------------------------------------------------


def by_hand(model: Beit, x: Tensor) -> Tensor:
    """Run a network as custom forwards are written for timm's vision transformers."""
    x = model.patch_embed(x)
    x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    if model.pos_embed is not None:
        x = x + model.pos_embed
    x = model.pos_drop(x)
    for block in model.blocks:
        x = block(x)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize(
    "fields", [{}, {"img_size": (48, 80)}, {"use_abs_pos_emb": True, "use_rel_pos_bias": False}], ids=str
)
def test_blocks_run_with_tokens_alone(fields: dict[str, Any]) -> None:
    model = build("test_beit", **fields).eval()
    x = torch.randn(2, 3, *model.config.img_size)
    assert relative_error(by_hand(model, x), model(x)) < 1e-6
    with torch.no_grad():
        assert relative_error(by_hand(model, x), model(x)) < 1e-6
        fast = beitzoo.optimize(model)
        assert relative_error(by_hand(fast, x), model(x)) < 1e-5
    model.set_input_size(96)
    x = torch.randn(2, 3, 96, 96)
    assert relative_error(by_hand(model, x), model(x)) < 1e-6


def test_patch_embedding_says_what_it_cuts() -> None:
    patches = build("test_beit", img_size=(48, 80), patch_size=(16, 8)).patch_embed
    assert (patches.img_size, patches.patch_size, patches.grid_size) == ((48, 80), (16, 8), (3, 10))
    assert patches(torch.randn(2, 3, 48, 80)).shape == (2, patches.num_patches, 32) == (2, 30, 32)


def test_prompt_tokens_need_a_network_without_relative_positions() -> None:
    """As prompt tuning puts learned tokens between the class token and the patches."""
    model, x = build("test_beit", use_rel_pos_bias=False, use_abs_pos_emb=True), images()
    prompts = nn.Parameter(torch.randn(1, 3, 32))
    tokens, bias = model.embed(x)
    tokens = torch.cat([tokens[:, :1], prompts.expand(2, -1, -1), tokens[:, 1:]], dim=1)
    assert torch.equal(model.blocks[0](tokens), model.blocks[0](tokens, bias))
    for block in model.blocks:
        tokens = block(tokens)
    model.forward_head(tokens).square().sum().backward()
    assert prompts.grad is not None and prompts.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"Got 20 tokens; .*for 17: .*\(4, 4\) patches.*use_rel_pos_bias=False"):
        build("test_beit").blocks[0](tokens)
    with pytest.raises(ValueError, match=r"share their table. Give bias=model.position_bias"):
        build("test_beit", use_shared_rel_pos_bias=True).blocks[0](tokens)


def test_a_block_takes_the_positions_of_another_grid() -> None:
    model, x = build("test_beit").eval(), torch.randn(2, 1 + 6, 32)
    bias = model.position_bias((2, 3))
    assert torch.equal(model.blocks[0](x, bias), model.blocks[0](x, bias=bias))
    assert model.blocks[0].attn(x, bias).shape == x.shape


def test_hooks_see_tokens_and_gradients_as_class_activation_maps_need_them() -> None:
    model, x = build("test_beit").eval(), images()
    seen: dict[str, Tensor] = {}
    layer = model.blocks[-1].norm1
    layer.register_forward_hook(lambda module, args, output: seen.update(activations=output))
    layer.register_full_backward_hook(lambda module, gradient, outputs: seen.update(gradients=outputs[0]))
    model.patch_embed.register_forward_hook(lambda module, args, output: seen.update(patches=output))
    model(x)[:, 3].sum().backward()
    assert seen["patches"].shape == (2, 16, 32)
    maps = (seen["gradients"].mean(1, keepdim=True) * seen["activations"]).sum(-1)[:, 1:].view(2, 4, 4)
    assert maps.isfinite().all() and maps.std() > 0
    model.patch_embed.register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(model(x)[0], model(x)[1])  # what a hook returns is what the network goes on with


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "Got images of torch.uint8"),
        (torch.zeros(3, 64, 64).numpy(), "Got a ndarray"),
        ("cat.jpg", "Got a str"),
    ],
    ids=["bytes", "array", "path"],
)
def test_what_is_no_batch_of_images_is_told_how_it_becomes_one(images: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message + r".*resolve_data_config\(model\)\)\(beitzoo\.open_image\(path\)\)"):
        build("test_beit")(images)
