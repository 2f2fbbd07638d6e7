"""Masked image models: logits, loss and gradients of the original's, by a plain reference in double precision."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from oracles import randomise, relative_error
from torch import Tensor
from torch.nn import functional as F

import beitzoo
from beitzoo.models.beit import Beit
from beitzoo.models.mim import MaskedImageModel, mim_loss
from beitzoo.weights import layouts
from beitzoo.zoo.networks import BeitConfig, MimConfig

NETWORK = BeitConfig(
    img_size=(48, 80),
    embed_dim=48,
    depth=4,
    num_heads=3,
    num_classes=0,
    use_rel_pos_bias=False,
    use_shared_rel_pos_bias=True,
    use_fc_norm=False,
    use_mask_token=True,
)
V1 = MimConfig(vocab_size=40)
V2 = MimConfig(vocab_size=40, early_layers=3)
OWN_HEAD = MimConfig(vocab_size=40, early_layers=2, head_layers=1, shared_lm_head=False)
ABSOLUTE = replace(NETWORK, use_shared_rel_pos_bias=False, use_abs_pos_emb=True, init_values=0.0)


def build(network: BeitConfig, head: MimConfig) -> MaskedImageModel:
    model = MaskedImageModel(Beit(network), head).eval()
    randomise(model)
    return model


def batch(count: int = 3, size: tuple[int, int] = (48, 80)) -> tuple[Tensor, Tensor, Tensor]:
    """Images, a mask of another count for each image, and a visual token for each masked patch."""
    patches = size[0] * size[1] // 256
    mask = torch.zeros(count, patches, dtype=torch.bool)
    for image in range(count):
        mask[image, torch.randperm(patches)[: 4 + image]] = True
    return torch.randn(count, 3, *size), mask, torch.randint(40, (int(mask.sum()),))


# ---- the reference: the original's words, in double precision, with nothing fused or shared ------------------


def reference_logits(state: dict[str, Tensor], config: BeitConfig, head: MimConfig, images: Tensor, mask: Tensor):
    """Return the logits of each head, (masked patches, tokens), by the paper's steps."""
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    w = mask[..., None].double()
    x = x * (1 - w) + state["mask_token"] * w
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
    if config.use_abs_pos_emb:
        x = x + state["pos_embed"]
    bias = reference_bias(state, config)
    early = x
    for index in range(config.depth):
        x = reference_block(state, f"blocks.{index}.", config, x, bias)
        if index + 1 == head.early_layers:
            early = x
    streams = [(x, "norm", "lm_head")]
    if head.early_layers:
        y = torch.cat([x[:, :1], early[:, 1:]], 1)
        for index in range(head.head_layers):
            y = reference_block(state, f"cls_pt_layers.{index}.", config, y, bias)
        names = ("norm", "lm_head") if head.shared_lm_head else ("cls_pt_norm", "cls_pt_lm_head")
        streams.append((y, *names))
    logits = []
    for tokens, norm, linear in streams:
        normed = layer_norm(state, norm, config, tokens)[:, 1:][mask]
        logits.append(normed @ state[f"{linear}.weight"].t() + state[f"{linear}.bias"])
    return logits


def reference_bias(state: dict[str, Tensor], config: BeitConfig) -> Tensor | float:
    if not config.use_shared_rel_pos_bias:
        return 0.0
    table = state["rel_pos_bias.relative_position_bias_table"]
    h, w = config.grid_size
    bias = table.new_zeros(config.num_heads, 1 + h * w, 1 + h * w)
    bias[:, 0, 1:] = table[-3][:, None]
    bias[:, 1:, 0] = table[-2][:, None]
    bias[:, 0, 0] = table[-1]
    for query in range(h * w):
        for key in range(h * w):
            dy, dx = query // w - key // w, query % w - key % w
            bias[:, 1 + query, 1 + key] = table[(dy + h - 1) * (2 * w - 1) + dx + w - 1]
    return bias


def reference_block(state: dict[str, Tensor], name: str, config: BeitConfig, x: Tensor, bias: Tensor | float):
    y = layer_norm(state, f"{name}norm1", config, x) @ state[f"{name}attn.qkv.weight"].t()
    q, k, v = y.chunk(3, -1)
    q, v = q + state[f"{name}attn.q_bias"], v + state[f"{name}attn.v_bias"]
    q, k, v = (part.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_dim) + bias
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    branch = mixed @ state[f"{name}attn.proj.weight"].t() + state[f"{name}attn.proj.bias"]
    x = x + state.get(f"{name}gamma_1", 1.0) * branch
    y = layer_norm(state, f"{name}norm2", config, x)
    y = F.gelu(y @ state[f"{name}mlp.fc1.weight"].t() + state[f"{name}mlp.fc1.bias"])
    branch = y @ state[f"{name}mlp.fc2.weight"].t() + state[f"{name}mlp.fc2.bias"]
    return x + state.get(f"{name}gamma_2", 1.0) * branch


def layer_norm(state: dict[str, Tensor], name: str, config: BeitConfig, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


@pytest.mark.parametrize(
    ("network", "head"),
    [(NETWORK, V1), (NETWORK, V2), (NETWORK, OWN_HEAD), (ABSOLUTE, V1)],
    ids=["v1", "v2", "own head", "absolute positions"],
)
def test_logits_loss_and_gradients_are_the_references(network: BeitConfig, head: MimConfig) -> None:
    model = build(network, head)
    images, mask, targets = batch()
    logits = model(images, mask)
    loss = mim_loss(logits, targets)
    loss.backward()
    state = {
        name.removeprefix("backbone."): p.detach().double().requires_grad_() for name, p in model.named_parameters()
    }
    expected = reference_logits(state, network, head, images.double(), mask)
    expected_loss = sum(F.cross_entropy(one, targets) for one in expected)
    expected_loss.backward()
    several = (logits,) if isinstance(logits, Tensor) else logits
    assert len(several) == len(expected)
    for ours, theirs in zip(several, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        gradient = state[name.removeprefix("backbone.")].grad
        assert parameter.grad is not None and gradient is not None, name
        assert relative_error(parameter.grad, gradient) < 1e-4, name


@pytest.mark.parametrize("absolute", [False, True])
def test_v1_is_transformers(absolute: bool) -> None:
    network = replace(ABSOLUTE if absolute else NETWORK, img_size=(64, 64), norm_eps=1e-12, init_values=0.1)
    model = build(network, V1)
    theirs = transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(
            image_size=64,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=192,
            vocab_size=40,
            use_mask_token=True,
            use_absolute_position_embeddings=absolute,
            use_shared_relative_position_bias=not absolute,
            drop_path_rate=0.0,
        )
    ).eval()
    state = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
    converted = layouts.to_transformers(state, prefix="beit.")
    found = theirs.load_state_dict(_in_memory(converted), strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    images, mask, targets = batch(size=(64, 64))
    result = theirs(images, bool_masked_pos=mask, labels=targets)
    result.loss.backward()
    loss = mim_loss(model(images, mask), targets)
    loss.backward()
    assert relative_error(model(images, mask, all_patches=True), result.logits) < 1e-5
    assert relative_error(model(images, mask), result.logits[mask]) < 1e-5
    assert loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    assert relative_error(model.lm_head.weight.grad, theirs.lm_head.weight.grad) < 1e-4
    patches = theirs.beit.embeddings.patch_embeddings.projection.weight.grad
    assert relative_error(model.backbone.patch_embed.proj.weight.grad, patches) < 1e-4


def _in_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what transformers has on disk to what its version 5 has in memory."""
    memory = {disk: name for _, disk, name in layouts._NAMES}
    renamed = {}
    for name, tensor in state.items():
        bare = name.removeprefix("beit.")
        template, number = layouts._template(bare)
        renamed[name[: len(name) - len(bare)] + memory[template].format(number)] = tensor
    return renamed


def test_initialisation_is_the_originals() -> None:
    model = MaskedImageModel(Beit(NETWORK), V2)
    weights = [model.lm_head.weight, model.backbone.blocks[0].attn.qkv.weight, model.backbone.patch_embed.proj.weight]
    for weight in [*weights, model.backbone.cls_token, model.backbone.mask_token]:
        assert weight.abs().max() <= 0.02
        # The deviation of a normal distribution that is cut at one deviation.
        assert weight.std().item() == pytest.approx(0.02 * 0.5396, rel=0.15)
    for layer, block in enumerate(model.backbone.blocks, start=1):
        assert 0.9 * 0.02 < block.mlp.fc2.weight.abs().max() * math.sqrt(2 * layer) <= 0.02 * (1 + 1e-6)
    aggregation = model.cls_pt_layers[1]
    assert aggregation.attn.qkv.weight.abs().max().item() == pytest.approx(48**-0.5, rel=0.02)
    assert aggregation.attn.proj.weight.abs().max().item() == pytest.approx((48 * 2 * 5) ** -0.5, rel=0.02)
    assert (aggregation.gamma_1 == 0.1).all()


def test_stochastic_depth_of_the_aggregation_goes_on_where_the_original_does() -> None:
    model = MaskedImageModel(Beit(replace(NETWORK, drop_path_rate=0.3)), V2)
    assert [block.drop_path.rate for block in model.cls_pt_layers] == pytest.approx([0.3 * 3 / 4, 0.3])
    model = MaskedImageModel(Beit(replace(NETWORK, drop_path_rate=0.3)), OWN_HEAD)
    assert [block.drop_path.rate for block in model.cls_pt_layers] == pytest.approx([0.3 * 2 / 3])


def test_a_masked_patch_does_not_reach_its_own_prediction() -> None:
    model = build(NETWORK, V2)
    images, mask, _ = batch(1)
    patch = int(mask[0].nonzero()[0])
    y, x = divmod(patch, 5)
    changed = images.clone()
    changed[..., 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = 7.0
    with torch.no_grad():
        for before, after in zip(model(images, mask), model(changed, mask), strict=True):
            assert torch.equal(before, after)


def test_bad_masks_and_backbones_are_refused() -> None:
    model = build(NETWORK, V1)
    images, mask, _ = batch()
    with pytest.raises(ValueError, match="without a masked patch"):
        model(images, torch.zeros_like(mask))
    assert model(images, torch.zeros_like(mask), all_patches=True).shape == (3, 15, 40)
    with pytest.raises(ValueError, match=r"must be torch\.bool of shape"):
        model(images, mask[:, :-1])
    with pytest.raises(ValueError, match="needs a backbone with use_mask_token=True"):
        MaskedImageModel(Beit(replace(NETWORK, use_mask_token=False)), V1)
    with pytest.raises(ValueError, match="early_layers=9 of a network of 4 blocks"):
        MaskedImageModel(Beit(NETWORK), MimConfig(early_layers=9))


@pytest.mark.parametrize("head", [V1, V2], ids=["v1", "v2"])
def test_an_inference_copy_gives_the_same_logits(head: MimConfig) -> None:
    model = build(NETWORK, head)
    images, mask, _ = batch()
    with torch.inference_mode():
        ours, copy = model(images, mask), beitzoo.optimize(model)(images, mask)
    pairs = [(ours, copy)] if isinstance(ours, Tensor) else zip(ours, copy, strict=True)
    for one, other in pairs:
        assert relative_error(other, one) < 1e-5


@pytest.mark.parametrize("head", [V1, V2])
def test_tokens_that_nobody_reads_skip_the_last_mlp(head: MimConfig) -> None:
    model = build(NETWORK, head)
    images, mask, _ = batch()
    last = model.cls_pt_layers[-1] if head.early_layers else model.backbone.blocks[-1]
    rows: list[int] = []
    last.mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    few, every = (model(images, mask, all_patches=patches) for patches in (False, True))
    for ours, all_of_them in zip(few, every, strict=True) if head.early_layers else [(few, every)]:
        torch.testing.assert_close(ours, all_of_them[mask], rtol=1e-5, atol=1e-5)
    assert rows == [1 + 6, 1 + 15]
