"""The network gives the numbers of timm and of the plain reference, and the tests would notice if not."""

from dataclasses import replace

import pytest
import torch
from oracles import randomise, reference_logits, relative_error, timm_model
from torch import Tensor

from beitzoo import Beit, BeitConfig
from beitzoo.zoo.architectures import ARCHITECTURES

SMALL = ARCHITECTURES["test_beit"]
FLAGS: list[dict[str, object]] = [
    {},
    {"global_pool": "token"},
    {"global_pool": "token", "use_fc_norm": True},
    {"global_pool": ""},
    {"num_classes": 0},
    {"in_chans": 1},
    {"img_size": (48, 80)},
    {"patch_size": (8, 16)},
    {"init_values": 0.0},
    {"qkv_bias": False},
    {"mlp_ratio": 2.5},
    {"use_abs_pos_emb": True, "use_rel_pos_bias": False},
    {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    {"use_abs_pos_emb": True, "use_shared_rel_pos_bias": True, "depth": 1},
]


def build(config: BeitConfig) -> Beit:
    model = Beit(config)
    randomise(model)
    return model


def images(config: BeitConfig, batch: int) -> Tensor:
    return torch.randn(batch, config.in_chans, *config.img_size)


def assert_parity(config: BeitConfig, batch: int, tolerance: float) -> None:
    """Compare tokens, features, logits, and the gradient of every parameter with timm's."""
    model = build(config)
    peer = timm_model(model)
    x = images(config, batch)
    outputs = []
    for network in (model, peer):
        tokens = network.forward_features(x)
        features = network.forward_head(tokens, pre_logits=True)
        logits = network.forward_head(tokens)
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        outputs.append((tokens, features, logits))
    assert torch.equal(model.eval()(x), outputs[0][2])  # no dropout in this config, so the parts are the whole
    for ours, theirs in zip(*outputs, strict=True):
        assert relative_error(ours, theirs) <= tolerance
    gradients = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradients[name].grad) <= tolerance, name


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_option_agrees_with_timm(flags: dict[str, object]) -> None:
    assert_parity(replace(SMALL, **flags), batch=3, tolerance=1e-5)


def of_own_width(config: BeitConfig) -> BeitConfig:
    return replace(config, depth=1, img_size=(2 * config.patch_size[0], 3 * config.patch_size[1]))


def of_own_depth_and_size(config: BeitConfig) -> BeitConfig:
    """Where tokens are many, of two blocks: the others are compared at a smaller size."""
    depth = config.depth if config.num_tokens < 600 else 2
    return replace(config, embed_dim=16, num_heads=1, depth=depth)


# What differs in one of these only, many architectures share.
DISTINCT = {
    reduce(config): f"{name}-{reduce.__name__}"
    for reduce in (of_own_width, of_own_depth_and_size)
    for name, config in ARCHITECTURES.items()
}


@pytest.mark.parametrize("config", DISTINCT, ids=DISTINCT.values())
def test_every_architecture_agrees_with_timm(config: BeitConfig) -> None:
    assert_parity(config, batch=1, tolerance=1e-4 if config.depth > 2 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees_with_timm_as_it_is(name: str) -> None:
    config = ARCHITECTURES[name]
    assert_parity(replace(config, depth=min(config.depth, 2)), batch=1, tolerance=1e-5)


@pytest.mark.parametrize(
    "flags", [f for f in FLAGS if f.get("num_classes") != 0 and f.get("global_pool") != ""], ids=str
)
def test_every_option_agrees_with_the_plain_reference(flags: dict[str, object]) -> None:
    config = replace(SMALL, **{"img_size": (32, 48), **flags})
    model = build(config).double().eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    x = images(config, 2).double()
    with torch.inference_mode():
        logits = model(x)
    for row, image in zip(logits, x.numpy(), strict=True):
        assert relative_error(row, torch.from_numpy(reference_logits(state, config, image))) <= 1e-12


def test_spread_of_random_logits_is_about_one() -> None:
    config = replace(SMALL, depth=12, num_classes=1000)
    logits = build(config)(images(config, 4))
    assert 0.5 < logits.std() < 2


@pytest.mark.parametrize("name", [n for n, _ in Beit(replace(SMALL, use_abs_pos_emb=True)).named_parameters()])
def test_parity_would_notice_one_zeroed_tensor(name: str) -> None:
    config = replace(SMALL, use_abs_pos_emb=True)
    model = build(config).eval()
    x = images(config, 2)
    with torch.no_grad():
        before = model(x)
        model.get_parameter(name).zero_()
        assert relative_error(model(x), before) >= 100 * 1e-5
