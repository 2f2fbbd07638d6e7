"""What one image costs, by closed formula."""

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

from beitzoo.zoo.networks import BeitConfig, HeadConfig, MimConfig, SegmenterConfig


def parameters(config: BeitConfig, around: HeadConfig | None = None) -> int:
    """Count the numbers that training can change, with those of the heads around the backbone."""
    width, hidden = config.embed_dim, config.hidden_dim
    table = config.bias_rows * config.num_heads
    patches = width * (config.in_chans * config.patch_size[0] * config.patch_size[1] + 1)
    tokens = width * (1 + config.use_mask_token + config.use_abs_pos_emb * config.num_tokens)
    block = 4 * width * width + width + 2 * width * hidden + hidden + width  # linears
    block += 4 * width + 2 * width * config.qkv_bias + 2 * width * bool(config.init_values)  # norms, biases, scales
    block += config.use_rel_pos_bias * table
    body = patches + tokens + config.use_shared_rel_pos_bias * table + config.depth * block
    if isinstance(around, SegmenterConfig):
        layers = [*_decoder(config, around), *_auxiliary(config, around)]
        return body + sum(layer.weights + layer.vectors for layer in layers)
    head = config.num_classes * (width + 1)
    if around is not None:
        head += around.vocab_size * (width + 1)
        if around.early_layers:
            own = 0 if around.shared_lm_head else 2 * width + around.vocab_size * (width + 1)
            head += around.head_layers * block + own
    return body + 2 * width + head


def columns(config: BeitConfig, around: HeadConfig | None = None) -> dict[str, float]:
    """Return parameters, multiply-adds and activations in timm's columns and units.

    A head of masked image modelling, and the auxiliary head of segmentation, count among the parameters alone:
    inference does without them.
    """
    heads = around if isinstance(around, SegmenterConfig) else None
    return {
        "param_count": round(parameters(config, around) / 1e6, 2),
        "infer_gmacs": round(macs(config, heads) / 1e9, 2),
        "infer_macts": round(activations(config, heads) / 1e6, 2),
    }


def input_size(config: BeitConfig) -> str:
    """Write channels, height and width as the column of that name has them: 3x224x224."""
    return "x".join(map(str, (config.in_chans, *config.img_size)))


def macs(config: BeitConfig, heads: SegmenterConfig | None = None) -> int:
    """Count the multiply-adds of one image: linears, patch projection and the two products of attention.

    Of a segmentation model, those of its convolutions as its definition has them, and of the blocks that it runs; ours
    makes fewer (`models/convolutions.py`).
    """
    if heads is not None:
        return macs(_run(config, heads)) + sum(layer.weights * layer.pixels for layer in _decoder(config, heads))
    n, c, patches = config.num_tokens, config.embed_dim, config.num_tokens - 1
    linears = n * (4 * c * c + 2 * c * config.hidden_dim)
    products = 2 * n * n * c
    pixels = config.in_chans * config.patch_size[0] * config.patch_size[1]
    return patches * pixels * c + config.depth * (linears + products) + _head_rows(config) * c * config.num_classes


def mim_macs(config: BeitConfig, mim: MimConfig, masked: int) -> int:
    """Count the multiply-adds of one image, of which visual tokens of that many masked patches are predicted.

    The last MLP, and that of patch aggregation, are counted for the class token and masked patches alone: no head
    reads more.
    """
    n, c = config.num_tokens, config.embed_dim
    block = n * (4 * c * c + 2 * c * config.hidden_dim) + 2 * n * n * c
    branches = 2 if mim.early_layers else 1
    unread = (n - 1 - masked) * 2 * c * config.hidden_dim
    cut = branches - (mim.early_layers == config.depth)
    further = mim.head_layers * block if mim.early_layers else 0
    return macs(config) + further + branches * masked * c * mim.vocab_size - cut * unread


def activations(config: BeitConfig, heads: SegmenterConfig | None = None) -> int:
    """Count the numbers that those operations put out for one image (timm's `macts`)."""
    if heads is not None:
        return activations(_run(config, heads)) + sum(layer.outputs * layer.pixels for layer in _decoder(config, heads))
    n, c, patches = config.num_tokens, config.embed_dim, config.num_tokens - 1
    linears = n * (5 * c + config.hidden_dim)
    products = config.num_heads * n * n + n * c
    return patches * c + config.depth * (linears + products) + _head_rows(config) * config.num_classes


def _head_rows(config: BeitConfig) -> int:
    return config.num_tokens if config.global_pool == "" else 1


class _Layer(NamedTuple):
    """A convolution with what is behind it.

    Attributes:
        weights: Its numbers that are multiplied.
        pixels: How often each of them is.
        outputs: Numbers put out for each of these pixels.
        vectors: Its bias, and weight and bias of a norm.
    """

    weights: int
    pixels: int
    outputs: int
    vectors: int


def _run(config: BeitConfig, heads: SegmenterConfig) -> BeitConfig:
    """Return the part of the backbone that runs: up to the last block that is read."""
    return replace(config, depth=max(heads.of_depth(config.depth).out_indices or ()) + 1, num_classes=0)


def _decoder(config: BeitConfig, heads: SegmenterConfig) -> list[_Layer]:
    """List neck and decode head."""
    c, (h, w), scales = config.embed_dim, config.grid_size, heads.pool_scales
    if heads.decoder == "linear":
        return [_Layer(0, 0, 0, 2 * c), _classifier(c, heads.num_classes, h * w)]
    grids = [16 * h * w, 4 * h * w, h * w, (h // 2) * (w // 2)]
    doubled = [h * w, 4 * h * w, h * w]
    layers = [_Layer(4 * c * c, pixels, 4 * c, c) for pixels in doubled] + [_Layer(0, 0, 0, 2 * c)]  # with one norm
    layers += [_normed(c, c, 1, side * side) for side in scales]
    layers += [_normed(c * (1 + len(scales)), c, 9, grids[3])]
    layers += [_normed(c, c, area, pixels) for area in (1, 9) for pixels in grids[:3]]
    return [*layers, _normed(4 * c, c, 9, grids[0]), _classifier(c, heads.num_classes, grids[0])]


def _auxiliary(config: BeitConfig, heads: SegmenterConfig) -> list[_Layer]:
    if not heads.has_auxiliary:
        return []
    pixels, width = math.prod(config.grid_size), heads.auxiliary_channels
    widths = [config.embed_dim] + [width] * heads.auxiliary_convs
    layers = [_normed(before, after, 9, pixels) for before, after in itertools.pairwise(widths)]
    return [*layers, _classifier(width, heads.num_classes, pixels)]


def _normed(inputs: int, outputs: int, area: int, pixels: int) -> _Layer:
    return _Layer(inputs * outputs * area, pixels, outputs, 2 * outputs)


def _classifier(inputs: int, classes: int, pixels: int) -> _Layer:
    return _Layer(inputs * classes, pixels, classes, classes)
