"""Whose parameter names a file uses, and one table to read it in both directions.

Our names are unilm's, which timm kept. transformers has two spellings: the one in its files, which every version
writes, and the one its version 5 has in memory. Both are recognised by the keys alone.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from beitzoo.errors import UserError

_logger = logging.getLogger(__name__)

Layout = Literal["unilm", "transformers", "transformers5"]


class LayoutError(UserError, ValueError):
    """Parameter names that belong to no BEiT we know."""


# Our name, that of transformers' files, that of transformers 5 in memory; {} is the number of the block.
_NAMES: tuple[tuple[str, str, str], ...] = (
    ("cls_token", "embeddings.cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings", "embeddings.position_embeddings"),
    ("patch_embed.proj.weight", *("embeddings.patch_embeddings.projection.weight",) * 2),
    ("patch_embed.proj.bias", *("embeddings.patch_embeddings.projection.bias",) * 2),
    (
        "rel_pos_bias.relative_position_bias_table",
        "encoder.relative_position_bias.relative_position_bias_table",
        "shared_position_bias.relative_position_bias_table",
    ),
    ("blocks.{}.gamma_1", "encoder.layer.{}.lambda_1", "layers.{}.lambda_1"),
    ("blocks.{}.gamma_2", "encoder.layer.{}.lambda_2", "layers.{}.lambda_2"),
    ("blocks.{}.norm1.weight", "encoder.layer.{}.layernorm_before.weight", "layers.{}.layernorm_before.weight"),
    ("blocks.{}.norm1.bias", "encoder.layer.{}.layernorm_before.bias", "layers.{}.layernorm_before.bias"),
    ("blocks.{}.norm2.weight", "encoder.layer.{}.layernorm_after.weight", "layers.{}.layernorm_after.weight"),
    ("blocks.{}.norm2.bias", "encoder.layer.{}.layernorm_after.bias", "layers.{}.layernorm_after.bias"),
    (
        "blocks.{}.attn.q.weight",
        "encoder.layer.{}.attention.attention.query.weight",
        "layers.{}.attention.q_proj.weight",
    ),
    ("blocks.{}.attn.k.weight", "encoder.layer.{}.attention.attention.key.weight", "layers.{}.attention.k_proj.weight"),
    (
        "blocks.{}.attn.v.weight",
        "encoder.layer.{}.attention.attention.value.weight",
        "layers.{}.attention.v_proj.weight",
    ),
    ("blocks.{}.attn.q_bias", "encoder.layer.{}.attention.attention.query.bias", "layers.{}.attention.q_proj.bias"),
    ("blocks.{}.attn.v_bias", "encoder.layer.{}.attention.attention.value.bias", "layers.{}.attention.v_proj.bias"),
    (
        "blocks.{}.attn.proj.weight",
        "encoder.layer.{}.attention.output.dense.weight",
        "layers.{}.attention.o_proj.weight",
    ),
    ("blocks.{}.attn.proj.bias", "encoder.layer.{}.attention.output.dense.bias", "layers.{}.attention.o_proj.bias"),
    (
        "blocks.{}.attn.relative_position_bias_table",
        "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table",
        "layers.{}.relative_position_bias.relative_position_bias_table",
    ),
    ("blocks.{}.mlp.fc1.weight", "encoder.layer.{}.intermediate.dense.weight", "layers.{}.mlp.fc1.weight"),
    ("blocks.{}.mlp.fc1.bias", "encoder.layer.{}.intermediate.dense.bias", "layers.{}.mlp.fc1.bias"),
    ("blocks.{}.mlp.fc2.weight", "encoder.layer.{}.output.dense.weight", "layers.{}.mlp.fc2.weight"),
    ("blocks.{}.mlp.fc2.bias", "encoder.layer.{}.output.dense.bias", "layers.{}.mlp.fc2.bias"),
    ("norm.weight", "layernorm.weight", "layernorm.weight"),
    ("norm.bias", "layernorm.bias", "layernorm.bias"),
    ("fc_norm.weight", "pooler.layernorm.weight", "pooler.layernorm.weight"),
    ("fc_norm.bias", "pooler.layernorm.bias", "pooler.layernorm.bias"),
    ("head.weight", "classifier.weight", "classifier.weight"),
    ("head.bias", "classifier.bias", "classifier.bias"),
    ("lm_head.weight", "lm_head.weight", "lm_head.weight"),
    ("lm_head.bias", "lm_head.bias", "lm_head.bias"),
)

# The same of the modules of a segmentation model, each with what it holds; our names have no prefix in files.
_LINEAR = ("weight", "bias")
_KERNEL = ("weight",)
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_UPER, _FCN = "decode_head", "auxiliary_head"
_SEGMENT_MODULES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("fpn1.0", "fpn1.0", "fpn.fpn1.conv_transpose1", _LINEAR),
    ("fpn1.1", "fpn1.1", "fpn.fpn1.normalization", _BATCH_NORM),
    ("fpn1.3", "fpn1.3", "fpn.fpn1.conv_transpose2", _LINEAR),
    ("fpn2.0", "fpn2.0", "fpn.fpn2", _LINEAR),
    *(
        (f"{ours}.{part}", f"{ours}.{part}", f"{memory}.{theirs}", leaves)
        for ours, memory in (
            (f"{_UPER}.psp_modules.{{}}.1", f"{_UPER}.psp_modules.blocks.{{}}.conv"),
            (f"{_UPER}.bottleneck", f"{_UPER}.psp_bottleneck"),
            (f"{_UPER}.lateral_convs.{{}}", f"{_UPER}.lateral_convs.{{}}"),
            (f"{_UPER}.fpn_convs.{{}}", f"{_UPER}.fpn_convs.{{}}"),
            (f"{_UPER}.fpn_bottleneck", f"{_UPER}.fpn_bottleneck"),
            (f"{_FCN}.convs.{{}}", f"{_FCN}.convs.{{}}"),
        )
        for part, theirs, leaves in (("conv", "convolution", _KERNEL), ("bn", "normalization", _BATCH_NORM))
    ),
    *((f"{head}.conv_seg", f"{head}.classifier", f"{head}.classifier", _LINEAR) for head in (_UPER, _FCN)),
)
_NAMES += tuple(
    (f"{ours}.{leaf}", f"{disk}.{leaf}", f"{memory}.{leaf}")
    for ours, disk, memory, leaves in _SEGMENT_MODULES
    for leaf in leaves
)

# What segmentation models have beside the backbone's own names: in files, the neck's are among them.
_DECODERS = re.compile(r"(decode_head|auxiliary_head)\.")
NECK = re.compile(r"fpn[1-4]?\.")
SEGMENT_HEAD = re.compile(rf"{_DECODERS.pattern}|{NECK.pattern}")

# What transformers puts between the prefix of a model and the names of its table.
_MODELS = ("beit.", "data2vec_vision.")
# Tensors that are derived from others or count steps, in every layout that ever saved them.
_DERIVED = re.compile(r"(^|\.)(relative_position_index|k_bias|n_averaged)$")
# What wraps a module in place adds its own step to the names, anywhere.
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged)(?![a-z])")
# timm's order, where a file has several networks of one kind.
_FIRST = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class _Anchor:
    """Where a network is among the names of a file, found by its class token, which every BEiT has.

    Attributes:
        prefix: What a trainer or another module put before all names of the network: `module.`, `model.backbone.`.
        model: What transformers puts behind that before the backbone's names, but not before the head's.
        ours: Whether the names behind it are unilm's.
    """

    prefix: str
    model: str
    ours: bool


@dataclass(frozen=True)
class Network:
    """One network among what a file holds.

    Attributes:
        label: The keys and, where several share a state dict, the prefix that lead to it, joined by dots.
        state: The state dict it is in.
        anchor: Where it is in there.
    """

    label: str
    state: Mapping[str, Tensor]
    anchor: _Anchor


def choose_network(document: object, use_ema: bool | None = None, origin: str = "") -> Network:
    """Find a BEiT in what a file holds: at the top, or up to two keys deep, whatever keys and prefixes are called.

    Args:
        document: The content of a file.
        use_ema: Take averaged weights (True), plain ones (False), or as timm does (None): averaged, if there are any.
        origin: What to call the file in the log; with '' nothing is said.

    Raises:
        LayoutError: There is none, or several that could be meant.
    """
    networks = {network.label: network for network in _networks(document)}
    if not networks:
        raise LayoutError(
            f"it holds no BEiT: {_outline(document)}; a BEiT has 'cls_token' (unilm, timm) or "
            "'beit.embeddings.cls_token' (transformers), under any prefix and key."
        )
    return networks[_choose(list(networks), use_ema, origin)]


def recognise(keys: Iterable[str]) -> Layout:
    """Tell whose names these are.

    Raises:
        LayoutError: Nobody's, or those of several networks.
    """
    keys = list(keys)
    return _layout(keys, choose_network(dict.fromkeys(keys)).anchor)


def to_ours(network: Network) -> dict[str, Tensor]:
    """Rename the tensors of a network of any layout; derived ones are left out, queries, keys and values fused.

    Raises:
        LayoutError: Two names become the same.
    """
    anchor = network.anchor
    kept = {name: tensor for name, tensor in network.state.items() if not _DERIVED.search(name)}
    others = tuple(other.prefix for other in _anchors(kept) if other.prefix not in ("", anchor.prefix))
    bare = _unique(
        (_without_prefix(_WRAPPED.sub("", name), anchor.prefix), tensor)
        for name, tensor in kept.items()
        if not (others and _WRAPPED.sub("", name).startswith(others))
    )
    return bare if anchor.ours else _fuse(_rename(bare, _layout(kept, anchor)))


def to_transformers(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename our tensors as transformers' files have them; `prefix` is `beit.` beside a head.

    The norm of a masked image model belongs to the head there, and has no prefix.
    """
    table = {ours: disk for ours, disk, _ in _NAMES}
    outside = {"classifier", "lm_head", "fpn1", "fpn2", "decode_head", "auxiliary_head"}
    outside |= {"layernorm"} if "lm_head.weight" in state_dict else set()
    renamed = {}
    for name, tensor in _split(state_dict).items():
        foreign = _look_up(name, table)
        if foreign is None:
            raise LayoutError(f"transformers has no name for {name!r}; leave that part out of the model to save.")
        renamed[foreign if foreign.split(".")[0] in outside else prefix + foreign] = tensor
    return renamed


def to_unilm(state_dict: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Add to our tensors, whose names are unilm's, the index (N, N) that it keeps beside every bias table."""
    table = "relative_position_bias_table"
    indices = {f"{name.removesuffix(table)}relative_position_index": index for name in state_dict if table in name}
    return {**state_dict, **indices}


def add_backbone(state_dict: Mapping[str, Tensor], heads: re.Pattern[str]) -> dict[str, Tensor]:
    """Put `backbone.` before all names but those of heads: what holds a backbone has it under that name."""
    return {name if heads.match(name) else f"backbone.{name}": tensor for name, tensor in state_dict.items()}


def strip_backbone(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take `backbone.` and `neck.` off all names, as files have them."""
    return {name.removeprefix("backbone.").removeprefix("neck."): tensor for name, tensor in state_dict.items()}


def add_segmenter(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `backbone.` before the names of the backbone, and `neck.` before those of the neck; heads have none."""
    return {
        f"neck.{name}" if NECK.match(name) else name: tensor
        for name, tensor in add_backbone(state_dict, SEGMENT_HEAD).items()
    }


def to_mmsegmentation(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `backbone.` before all our names but those of decoders: there the neck is part of the backbone."""
    return add_backbone(state_dict, _DECODERS)


def _networks(document: object, path: str = "", depth: int = 2) -> Iterator[Network]:
    if not isinstance(document, Mapping):
        return
    anchors = _anchors(key for key in document if isinstance(key, str))
    for anchor in anchors:
        prefix = anchor.prefix.rstrip(".") if len(anchors) > 1 else ""
        named = {key: value for key, value in document.items() if isinstance(key, str)}
        yield Network(".".join(filter(None, (path, prefix))), named, anchor)
    if not anchors and depth:
        for key, value in document.items():
            yield from _networks(value, f"{path}.{key}" if path else str(key), depth - 1)


def _choose(labels: Sequence[str], use_ema: bool | None, origin: str) -> str:
    """Choose one of several networks by what they are called; says so where there are averaged and plain ones."""
    averaged = [label for label in labels if _AVERAGED.search(label)]
    plain = [label for label in labels if label not in averaged]
    candidates = plain if use_ema is False else averaged or ([] if use_ema else plain)
    if not candidates:
        kind = "averaged" if use_ema else "plain"
        raise LayoutError(f"it holds no {kind} weights (use_ema={use_ema}), only {', '.join(map(repr, labels))}.")
    chosen = next((name for name in _FIRST if name in candidates), candidates[0] if len(candidates) == 1 else None)
    if chosen is None:
        raise LayoutError(
            f"it holds several networks ({', '.join(map(repr, candidates))}); save the one you mean to a file of its "
            "own."
        )
    if averaged and plain and use_ema is None and origin:
        _logger.warning(
            "%s holds averaged weights (%s) and plain ones (%s): the averaged were taken, as in timm. use_ema=False "
            "takes the plain ones.",
            *(origin, chosen, ", ".join(map(repr, plain))),
        )
    return chosen


def _outline(document: object) -> str:
    """Say in a few words what a file holds instead of a BEiT."""
    if not isinstance(document, Mapping) or not document:
        return f"it is a {type(document).__name__}" if not isinstance(document, Mapping) else "it is empty"
    inner = {str(key): value for key, value in document.items() if isinstance(value, Mapping) and value}
    if not inner:
        return f"its parameter names are no BEiT's ({', '.join(sorted(map(str, document))[:3])})"
    told = [f"{key!r} with {', '.join(sorted(map(str, value))[:3])}" for key, value in inner.items()]
    return f"its keys are {', '.join(map(repr, map(str, document)))} ({'; '.join(told[:3])})"


def _anchor_at(name: str) -> _Anchor | None:
    """Return the anchor if this is the name of a class token, under any prefix."""
    prefix, dot, last = name.rpartition(".")
    if last != "cls_token":
        return None
    prefix += dot
    if not f".{prefix}".endswith(".embeddings."):
        return _Anchor(prefix, "", ours=True)
    prefix = prefix.removesuffix("embeddings.")
    model = next((model for model in _MODELS if f".{prefix}".endswith(f".{model}")), "")
    return _Anchor(prefix.removesuffix(model), model, ours=False)


def _anchors(names: Iterable[str]) -> list[_Anchor]:
    found = (_anchor_at(_WRAPPED.sub("", name)) for name in names if name.endswith("cls_token"))
    return [anchor for anchor in found if anchor is not None]


def _layout(names: Iterable[str], anchor: _Anchor) -> Layout:
    if anchor.ours:
        return "unilm"
    old = f"{anchor.prefix}{anchor.model}encoder.layer."
    return "transformers" if any(_WRAPPED.sub("", name).startswith(old) for name in names) else "transformers5"


def _without_prefix(name: str, prefix: str) -> str:
    """Take the prefix off, and off a name that shares only its first steps these: a head beside the backbone."""
    for step in prefix.split(".")[:-1]:
        if not name.startswith(f"{step}."):
            break
        name = name.removeprefix(f"{step}.")
    return name


def _rename(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    table = {(disk if layout == "transformers" else memory): ours for ours, disk, memory in _NAMES}

    def ours(name: str) -> str:
        for model in _MODELS:  # a file of a BeitBackbone has it before some names only
            name = name.removeprefix(model)
        # A name that is not in the table stays, and is then unexpected or of another head.
        return _look_up(name, table) or name

    return _unique((ours(name), tensor) for name, tensor in state_dict.items())


def _look_up(name: str, table: Mapping[str, str]) -> str | None:
    """Return what a table has for a name: as it is, or with the first of its numbers left open."""
    template, number = _template(name)
    return table.get(name) or (table[template].format(number) if template in table else None)


def _unique(items: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in items:
        if name in renamed:
            raise LayoutError(f"two of its tensors are {name!r}.")
        renamed[name] = tensor
    return renamed


def _template(name: str) -> tuple[str, str]:
    """Split `blocks.3.norm1.weight` into `blocks.{}.norm1.weight` and `3`."""
    match = re.search(r"\.(\d+)\.", name)
    return (f"{name[: match.start()]}.{{}}.{name[match.end() :]}", match[1]) if match else (name, "")


def _fuse(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the three projections of each block to one, rows in the order q, k, v."""
    state = dict(state_dict)
    for name in state_dict:
        if name.endswith(".attn.q.weight"):
            stem = name.removesuffix("q.weight")
            names = [f"{stem}{part}.weight" for part in "qkv"]
            parts = [state[part] for part in names if part in state]
            # Anything else stays as it is, and is then unexpected.
            if len(parts) == 3 and all(part.ndim == 2 and part.shape[1:] == parts[0].shape[1:] for part in parts):
                state = {key: tensor for key, tensor in state.items() if key not in names}
                state[f"{stem}qkv.weight"] = torch.cat(parts)
    return state


def _split(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in state_dict.items():
        if name.endswith(".attn.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            state.update({f"{stem}{part}.weight": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)})
        else:
            state[name] = tensor
    return state
