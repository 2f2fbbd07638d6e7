"""Whose parameter names a file uses, and one table to read it in both directions.

Our names are unilm's, which timm kept. transformers has two spellings: the one in its files, which every version
writes, and the one its version 5 has in memory. Both are recognised by the keys alone.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from beitzoo.errors import UserError
from beitzoo.zoo.checkpoints import Classify, Head, Mim, Segment

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

# Where a backbone may sit inside another module: a wrapper of training, a segmentation model, a tokenizer.
_PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "backbone.",
    "encoder.",
    "module.backbone.",
    "module.encoder.",
)
_FOREIGN_PREFIXES = ("", "beit.", "data2vec_vision.")

# Tensors that are derived from others, in every layout that ever saved them.
_DERIVED = re.compile(r"(^|\.)(relative_position_index|k_bias)$")

# What belongs to another head than a classifier's, by our names.
_HEAD_TENSORS: dict[type[Head], re.Pattern[str]] = {
    Classify: re.compile(r"(?!)"),
    Mim: re.compile(r"(lm_head|cls_pt_layers|cls_pt_norm|cls_pt_lm_head)\."),
    Segment: re.compile(r"(decode_head|auxiliary_head|fpn[1-4]|fpn)\."),
}


def recognise(keys: Iterable[str]) -> Layout:
    """Tell whose names these are.

    Raises:
        LayoutError: Nobody's; says which keys came and which were looked for.
    """
    keys = list(keys)
    for prefix in _FOREIGN_PREFIXES:
        if f"{prefix}embeddings.cls_token" in keys:
            old = any(key.startswith(f"{prefix}encoder.layer.") for key in keys)
            return "transformers" if old else "transformers5"
    if any(f"{prefix}cls_token" in keys for prefix in _PREFIXES):
        return "unilm"
    shown = ", ".join(sorted(keys)[:3]) or "none at all"
    raise LayoutError(
        f"its parameter names are no BEiT's ({shown}); a BEiT has 'cls_token' (unilm, timm) or "
        "'beit.embeddings.cls_token' (transformers)."
    )


def to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a file of any layout; derived ones are left out, queries, keys and values fused.

    Raises:
        LayoutError: The names are no BEiT's, or two of them become the same.
    """
    layout = recognise(state_dict)
    kept = {name: tensor for name, tensor in state_dict.items() if not _DERIVED.search(name)}
    renamed = _without_prefix(kept) if layout == "unilm" else _rename(kept, layout)
    return _fuse(renamed) if layout != "unilm" else renamed


def to_transformers(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename our tensors as transformers' files have them; `prefix` is `beit.` beside a head.

    The norm of a masked image model belongs to the head there, and has no prefix.
    """
    table = {ours: disk for ours, disk, _ in _NAMES}
    outside = {"classifier", "lm_head"} | ({"layernorm"} if "lm_head.weight" in state_dict else set())
    renamed = {}
    for name, tensor in _split(state_dict).items():
        template, number = _template(name)
        if template not in table:
            raise LayoutError(f"transformers has no name for {name!r}; leave that part out of the model to save.")
        foreign = table[template].format(number)
        renamed[foreign if foreign.split(".")[0] in outside else prefix + foreign] = tensor
    return renamed


def to_unilm(state_dict: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Add to our tensors, whose names are unilm's, the index (N, N) that it keeps beside every bias table."""
    table = "relative_position_bias_table"
    indices = {f"{name.removesuffix(table)}relative_position_index": index for name in state_dict if table in name}
    return {**state_dict, **indices}


def without_head(state_dict: Mapping[str, Tensor], head: Head) -> dict[str, Tensor]:
    """Leave out the tensors of a head other than a classifier's; the backbone, and a classifier, stay."""
    return {name: tensor for name, tensor in state_dict.items() if not _HEAD_TENSORS[type(head)].match(name)}


def for_finetuning(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a pretrained backbone into what a classifier starts from, as unilm's fine-tuning script does.

    The shared bias table is copied to every block; the mask token and the norm on tokens are left out, and the
    norm behind the pooling starts fresh.
    """
    state = {name: t for name, t in state_dict.items() if not name.startswith(("norm.", "mask_token"))}
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        blocks = {match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
        tables = {f"blocks.{block}.attn.relative_position_bias_table": shared.clone() for block in blocks}
        state.update(tables)
    return with_fresh_norm(state)


def with_fresh_norm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the norm behind the pooling as it is before training."""
    like = state_dict["cls_token"]
    width = like.shape[-1]
    return {**state_dict, "fc_norm.weight": like.new_ones(width), "fc_norm.bias": like.new_zeros(width)}


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = next(prefix for prefix in _PREFIXES if f"{prefix}cls_token" in state_dict)
    return _unique((name.removeprefix(prefix), tensor) for name, tensor in state_dict.items())


def _rename(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    table = {(disk if layout == "transformers" else memory): ours for ours, disk, memory in _NAMES}
    prefix = next(prefix for prefix in _FOREIGN_PREFIXES if f"{prefix}embeddings.cls_token" in state_dict)

    def ours(name: str) -> str:
        template, number = _template(name.removeprefix(prefix))
        # A name that is not in the table stays, and is then unexpected or of another head.
        return table[template].format(number) if template in table else name.removeprefix(prefix)

    return _unique((ours(name), tensor) for name, tensor in state_dict.items())


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
