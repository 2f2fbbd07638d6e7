"""Which network a file holds, told by the names and shapes of its tensors."""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from beitzoo.zoo.checkpoints import Classify, Head, Mim, Segment
from beitzoo.zoo.networks import BeitConfig, MimConfig, SegmenterConfig
from beitzoo.zoo.registry import architecture_of

Shapes = Mapping[str, tuple[int, ...]]

_TABLE = "relative_position_bias_table"
# Embedding widths by the words that papers use; DeiT's for the two small ones.
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by their names."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def identify(shapes: Shapes) -> tuple[BeitConfig, Head] | None:
    """Return the network and the head of a state dict, under our names; None if its shapes do not tell.

    Oblong grids are not told apart: only a square one is found. What shapes never tell is as in the released models:
    rates of dropout, epsilon, and which images the network was made for.
    """
    try:
        config = _network(shapes)
        return None if config is None else (config, _head(shapes))
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        return None


def explain(shapes: Shapes, expected: BeitConfig) -> str:
    """Say which network a file holds instead of the expected one, and what to do; empty if nothing can be said."""
    found = identify(shapes)
    if found is None:
        return _explain_foreign(shapes)
    config, _ = found
    side = config.img_size[0]
    if config.img_size != expected.img_size and _but_for_size(config) == _but_for_size(expected):
        return f"It is the same network at {side}: give img_size={side}."
    name = architecture_of(config)
    if name is not None and name == architecture_of(expected):
        return ""  # the same architecture with another head or of another stage; the list says what differs
    details = f"patch_size={config.patch_size[0]}, embed_dim={config.embed_dim}, depth={config.depth}"
    details += f", num_heads={config.num_heads}, mlp_ratio={config.mlp_ratio:g}"
    word = _SIZES.get(config.embed_dim)
    return f"It is a BEiT{f' {word}' if word else ''} at {side}: {name or details}."


def _explain_foreign(shapes: Shapes) -> str:
    names = " ".join(shapes)
    if _TABLE not in names and ("attn.qkv.bias" in names or "attention.attention.key.bias" in names):
        return "It is a ViT: its keys have a bias, and it has no relative positions. timm and transformers load it."
    return ""


def _network(shapes: Shapes) -> BeitConfig | None:
    width = shapes["cls_token"][-1]
    numbers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    channels, *patch = shapes["patch_embed.proj.weight"][1:]
    own, shared = shapes.get(f"blocks.0.attn.{_TABLE}"), shapes.get(f"rel_pos_bias.{_TABLE}")
    table = own or shared
    grid = _square_grid(table, shapes.get("pos_embed"))
    if table is None or grid is None or "blocks.0.attn.qkv.bias" in shapes:
        return None  # without a table there is no telling how many heads it has
    pooled = "fc_norm.weight" in shapes
    return BeitConfig(
        img_size=(grid * patch[0], grid * patch[1]),
        patch_size=(patch[0], patch[1]),
        in_chans=channels,
        num_classes=shapes.get("head.weight", (0,))[0],
        global_pool="token" if "norm.weight" in shapes and "head.weight" in shapes else "avg",
        embed_dim=width,
        depth=1 + max(numbers),
        num_heads=table[1],
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / width,
        qkv_bias="blocks.0.attn.q_bias" in shapes,
        init_values=0.1 if "blocks.0.gamma_1" in shapes else 0.0,
        use_abs_pos_emb="pos_embed" in shapes,
        use_rel_pos_bias=own is not None,
        use_shared_rel_pos_bias=shared is not None,
        use_fc_norm=pooled or not {"norm.weight", "lm_head.weight"} & shapes.keys(),
        use_mask_token="mask_token" in shapes,
    )


def _head(shapes: Shapes) -> Head:
    if "lm_head.weight" in shapes:
        extra = {name.split(".")[1] for name in shapes if name.startswith("cls_pt_layers.")}
        depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
        network = MimConfig(
            vocab_size=shapes["lm_head.weight"][0],
            early_layers=max(depth - 3, 1) if extra else 0,  # as in all that BEiT v2 released; shapes do not tell
            head_layers=len(extra) or 2,
            shared_lm_head="cls_pt_lm_head.weight" not in shapes,
        )
        return Mim(network=network)
    if "decode_head.conv_seg.weight" in shapes:
        return Segment(network=_segmenter(shapes))
    return Classify(num_classes=shapes.get("head.weight", (0,))[0])


def _segmenter(shapes: Shapes) -> SegmenterConfig:
    """Return the heads; which blocks they read is taken to be as in the original, as shapes do not tell."""
    convs = {name.split(".")[2] for name in shapes if name.startswith("auxiliary_head.convs.")}
    return SegmenterConfig(
        num_classes=shapes["decode_head.conv_seg.weight"][0],
        decoder="upernet" if "decode_head.fpn_bottleneck.conv.weight" in shapes else "linear",
        auxiliary_channels=shapes.get("auxiliary_head.conv_seg.weight", (0, 0))[1],
        auxiliary_convs=len(convs) or 1,
    )


def _square_grid(table: tuple[int, ...] | None, pos_embed: tuple[int, ...] | None) -> int | None:
    """Return the side of the square grid that a table, or else position embeddings, are for."""
    if table is not None:
        root = math.isqrt(max(table[0] - 3, 0))
        return (root + 1) // 2 if root % 2 and root * root == table[0] - 3 else None
    side = math.isqrt(pos_embed[1] - 1) if pos_embed is not None else 0
    return side if pos_embed is not None and side * side == pos_embed[1] - 1 else None


def _but_for_size(config: BeitConfig) -> tuple[object, ...]:
    return config.patch_size, config.embed_dim, config.depth, config.num_heads, config.hidden_dim
