"""Independent sources of the same numbers: random weights that hide nothing, timm, and a slow plain reference."""

import math

import numpy as np
import timm.models.beit
import torch
from scipy.special import erf
from torch import Tensor, nn

from beitzoo import Beit, BeitConfig
from beitzoo.measure.comparison import randomise as randomise
from beitzoo.models.segmentation import Segmenter

Array = np.ndarray


def timm_model(model: Beit) -> nn.Module:
    """Build timm's network of the same config, and give it the same weights."""
    c = model.config
    peer = timm.models.beit.Beit(
        img_size=c.img_size,
        patch_size=c.patch_size,
        in_chans=c.in_chans,
        num_classes=c.num_classes,
        global_pool=c.global_pool,
        embed_dim=c.embed_dim,
        depth=c.depth,
        num_heads=c.num_heads,
        mlp_ratio=c.mlp_ratio,
        qkv_bias=c.qkv_bias,
        init_values=c.init_values or None,
        use_abs_pos_emb=c.use_abs_pos_emb,
        use_rel_pos_bias=c.use_rel_pos_bias,
        use_shared_rel_pos_bias=c.use_shared_rel_pos_bias,
        use_fc_norm=c.norm_after_pooling,
        device="meta",
    )
    for module in peer.modules():  # buffers that are not saved, and so not loaded either
        if hasattr(module, "relative_position_index"):
            window = c.grid_size
            module.relative_position_index = timm.models.beit.gen_relative_position_index(window)
        if getattr(module, "k_bias", None) is not None:
            module.k_bias = torch.zeros(c.embed_dim)
    peer.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True, assign=True)
    return peer.train(model.training)


@torch.no_grad()
def vary_classes(model: Segmenter, size: tuple[int, int]) -> None:
    """Scale the classifier so that logits of noise have mean 0 and deviation 1 in each class: all become likeliest."""
    noise = torch.randn(2, model.backbone.in_chans, *size, generator=torch.Generator().manual_seed(0))
    logits = model.eval()(noise)
    mean, std = logits.mean((0, 2, 3)), logits.std((0, 2, 3))
    classifier = model.decode_head.conv_seg
    classifier.weight.div_(std[:, None, None, None])
    classifier.bias.sub_(mean).div_(std)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def reference_logits(state: dict[str, Array], config: BeitConfig, image: Array) -> Array:
    """Compute the logits of one image (C, H, W) in double precision, by loops that follow the paper's words."""
    (h, w), (ph, pw) = config.grid_size, config.patch_size
    kernel = state["patch_embed.proj.weight"]
    tokens = [state["cls_token"][0, 0]]
    for y in range(h):
        for x in range(w):
            patch = image[:, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw]
            tokens.append((kernel * patch).sum((1, 2, 3)) + state["patch_embed.proj.bias"])
    x = np.stack(tokens)
    if config.use_abs_pos_emb:
        x = x + state["pos_embed"][0]
    for index in range(config.depth):
        x = _reference_block(state, f"blocks.{index}.", config, x)
    if not config.norm_after_pooling:
        x = _norm(x, state, "norm.", config)
    pooled = x[1:].mean(0) if config.global_pool == "avg" else x[0]
    if config.norm_after_pooling:
        pooled = _norm(pooled, state, "fc_norm.", config)
    return state["head.weight"] @ pooled + state["head.bias"]


def _reference_block(state: dict[str, Array], prefix: str, config: BeitConfig, x: Array) -> Array:
    branch = _reference_attention(state, prefix + "attn.", config, _norm(x, state, prefix + "norm1.", config))
    x = x + state.get(prefix + "gamma_1", 1.0) * branch
    hidden = _linear(_norm(x, state, prefix + "norm2.", config), state, prefix + "mlp.fc1.")
    hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    return x + state.get(prefix + "gamma_2", 1.0) * _linear(hidden, state, prefix + "mlp.fc2.")


def _reference_attention(state: dict[str, Array], prefix: str, config: BeitConfig, x: Array) -> Array:
    dim, size = config.embed_dim, config.head_dim
    weight = state[prefix + "qkv.weight"]
    q = x @ weight[:dim].T + state.get(prefix + "q_bias", 0.0)
    k = x @ weight[dim : 2 * dim].T
    v = x @ weight[2 * dim :].T + state.get(prefix + "v_bias", 0.0)
    tables = [prefix + "relative_position_bias_table"] * config.use_rel_pos_bias
    tables += ["rel_pos_bias.relative_position_bias_table"] * config.use_shared_rel_pos_bias
    mixed = np.zeros_like(x)
    for head in range(config.num_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            scores = np.array([q[i, part] @ k[j, part] / math.sqrt(size) for j in range(len(x))])
            for name in tables:
                scores += [state[name][_table_row(i, j, config.grid_size), head] for j in range(len(x))]
            weights = np.exp(scores - scores.max())
            mixed[i, part] = weights @ v[:, part] / weights.sum()
    return _linear(mixed, state, prefix + "proj.")


def _table_row(query: int, key: int, grid: tuple[int, int]) -> int:
    """Number offsets row by row from the upper left; then class to patch, patch to class, class to class."""
    h, w = grid
    offsets = (2 * h - 1) * (2 * w - 1)
    if query == 0 and key == 0:
        return offsets + 2
    if query == 0:
        return offsets
    if key == 0:
        return offsets + 1
    (qy, qx), (ky, kx) = divmod(query - 1, w), divmod(key - 1, w)
    return (qy - ky + h - 1) * (2 * w - 1) + qx - kx + w - 1


def _linear(x: Array, state: dict[str, Array], prefix: str) -> Array:
    return x @ state[prefix + "weight"].T + state[prefix + "bias"]


def _norm(x: Array, state: dict[str, Array], prefix: str, config: BeitConfig) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
    return scaled * state[prefix + "weight"] + state[prefix + "bias"]
