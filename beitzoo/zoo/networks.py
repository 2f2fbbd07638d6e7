"""The record of what is built: everything that decides what a `Beit` computes."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from beitzoo.errors import InvalidOptionError, check, closest

Pair = tuple[int, int]
CLASS_ROWS = 3  # of a bias table, for the class token: to a patch, from a patch, to itself
GlobalPool = Literal["avg", "token", ""]
ResizeRule = Literal["geometric_cubic", "geometric_linear", "bilinear"]
Target = Literal["features", "pixels"]
Decoder = Literal["upernet", "linear"]
Record = TypeVar("Record")

_FLAGS = (
    "qkv_bias",
    "use_abs_pos_emb",
    "use_rel_pos_bias",
    "use_shared_rel_pos_bias",
    "use_mask_token",
    "dynamic_img_size",
    "dynamic_img_pad",
)


def _open_to_notes(record: type[Record]) -> type[Record]:
    """Let others set names that are no fields, on a subclass: the fields of a frozen record stay as they are.

    transformers' Trainer leaves its `use_cache` on the config of every model.
    """
    names = ("__doc__", "__module__", "__qualname__")
    return type(record.__name__, (record,), {name: getattr(record, name) for name in names})


@_open_to_notes
@dataclass(frozen=True, kw_only=True)
class BeitConfig:
    """Everything that decides what a `Beit` computes. The defaults are those all released BEiTs share.

    Attributes:
        img_size: Height and width in pixels that the position tables are made for.
        patch_size: Height and width of one patch, in pixels; both sides of `img_size` are multiples of it.
        in_chans: Colour channels of the images.
        num_classes: Width of the head; 0 builds no head.
        global_pool: Mean of the patch tokens, the class token, or no pooling at all.
        embed_dim: Channels of a token.
        depth: Number of blocks.
        num_heads: Attention heads; divides `embed_dim`.
        mlp_ratio: Hidden width of the MLP as a multiple of `embed_dim`.
        qkv_bias: Give queries and values a bias. Keys never have one (BEiT, `modeling_finetune.py`).
        init_values: First value of the layer scale; 0 builds none.
        use_abs_pos_emb: Add a learned embedding to each token.
        use_rel_pos_bias: Give every block its own table of relative position biases.
        use_shared_rel_pos_bias: One such table for all blocks, as in pretraining; adds to the blocks' own.
        use_fc_norm: Put the last norm behind the pooling (`fc_norm`) instead of on the tokens (`norm`).
            None means: when pooling is the mean, which is what the fine-tuned checkpoints have.
        use_mask_token: Have a learned token that stands in for masked patches, as in pretraining.
        dynamic_img_size: Take images of any size that is a multiple of the patch size; positions are fitted on
            every call. `set_input_size` does it once and is faster for one size.
        dynamic_img_pad: Pad images with zeros on the right and at the bottom to the next such multiple.
        resize_rule: How bias tables follow a new grid, see `models.position.resize_table`; the default is unilm's.
        norm_eps: Epsilon of every LayerNorm; 1e-6 in unilm and timm.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the embeddings.
        proj_drop_rate: Dropout after the attention projection and after the MLP.
        attn_drop_rate: Dropout on the attention probabilities.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        head_init_scale: Factor on a fresh head, so that training starts near uniform predictions.
    """

    img_size: Pair = (224, 224)
    patch_size: Pair = (16, 16)
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: GlobalPool = "avg"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float = 0.1
    use_abs_pos_emb: bool = False
    use_rel_pos_bias: bool = True
    use_shared_rel_pos_bias: bool = False
    use_fc_norm: bool | None = None
    use_mask_token: bool = False
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    resize_rule: ResizeRule = "geometric_cubic"
    norm_eps: float = 1e-6
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    head_init_scale: float = 0.001

    def __post_init__(self) -> None:
        _check_sizes(self, "img_size", "patch_size")
        for name, least in (("in_chans", 1), ("num_classes", 0), ("embed_dim", 1), ("depth", 1), ("num_heads", 1)):
            value = getattr(self, name)
            check(_is_whole(value) and value >= least, f"{name}={value!r}; it must be a whole number from {least} up.")
        for name in ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < 1, f"{name}={value!r}; it must be a number in [0, 1).")
        for name in ("mlp_ratio", "init_values", "norm_eps", "head_init_scale"):
            value = getattr(self, name)
            check(is_number(value) and value >= 0, f"{name}={value!r}; it must be a number from 0 up.")
        for name in _FLAGS:
            check(isinstance(getattr(self, name), bool), f"{name}={getattr(self, name)!r}; it must be True or False.")
        check(
            self.use_fc_norm in (None, True, False),
            f"use_fc_norm={self.use_fc_norm!r}; it must be True, False or None.",
        )
        check(
            self.global_pool in ("avg", "token", ""),
            f"global_pool={self.global_pool!r}; BEiT pools by 'avg', 'token' or '' (not at all).",
        )
        check(
            self.resize_rule in get_args(ResizeRule),
            f"resize_rule={self.resize_rule!r}; there are {', '.join(get_args(ResizeRule))}.",
        )
        check(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim={self.embed_dim} cannot be split over num_heads={self.num_heads}; choose a divisor.",
        )
        check(self.hidden_dim >= 1, f"mlp_ratio={self.mlp_ratio} leaves the MLP without a hidden channel.")
        check_divisible(self.img_size, self.patch_size)

    @property
    def grid_size(self) -> Pair:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of one image: the class token and the patches."""
        return 1 + self.grid_size[0] * self.grid_size[1]

    @property
    def bias_rows(self) -> int:
        """Rows of a relative position bias table: one for each offset of two patches, three for the class token."""
        return table_rows(self.grid_size)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def norm_after_pooling(self) -> bool:
        """Whether the last norm is `fc_norm` (pooled) rather than `norm` (tokens)."""
        return self.global_pool == "avg" if self.use_fc_norm is None else self.use_fc_norm


@dataclass(frozen=True, kw_only=True)
class MimConfig:
    """The head of a masked image model. The defaults are BEiT's; the fields from `early_layers` on are BEiT v2's.

    Attributes:
        vocab_size: Visual tokens to tell apart.
        early_layers: Blocks after which patch tokens are taken for patch aggregation; 0 for none (BEiT).
        head_layers: Further blocks that see these patch tokens and the last class token.
        shared_lm_head: Use one norm and one head for both; otherwise patch aggregation has its own.
    """

    vocab_size: int = 8192
    early_layers: int = 0
    head_layers: int = 2
    shared_lm_head: bool = True

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("early_layers", 0), ("head_layers", 1)):
            value = getattr(self, name)
            check(_is_whole(value) and value >= least, f"{name}={value!r}; it must be a whole number from {least} up.")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """The heads of a segmentation model. The defaults are those of BEiT and BEiT v2 on ADE20K.

    Attributes:
        num_classes: Classes of a pixel.
        decoder: UPerNet, with the neck and, in training, the auxiliary head; or one norm and one linear on the patches
            of one block, which is how frozen features are compared.
        out_indices: Blocks whose outputs are read, one for each map; -1 is what enters the first block. None for those
            of the original, see `pyramid_blocks`, or with the linear decoder for the last.
        pool_scales: Sides of the grids to which UPerNet pools the last map.
        auxiliary_channels: Channels of the auxiliary head of UPerNet; 0 for none.
        auxiliary_convs: Its convolutions before the classifier.
        decoder_drop_rate: Dropout of whole channels before the classifiers.
    """

    num_classes: int = 150
    decoder: Decoder = "upernet"
    out_indices: tuple[int, ...] | None = None
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    auxiliary_channels: int = 256
    auxiliary_convs: int = 1
    decoder_drop_rate: float = 0.1

    def __post_init__(self) -> None:
        _check_counts(self, "num_classes", "auxiliary_convs")
        channels, rate, scales, blocks = (
            getattr(self, name) for name in ("auxiliary_channels", "decoder_drop_rate", "pool_scales", "out_indices")
        )
        check(
            self.decoder in get_args(Decoder),
            f"decoder={self.decoder!r}; there are {' and '.join(map(repr, get_args(Decoder)))}. Choose one of them.",
        )
        check(
            _is_whole(channels) and channels >= 0,
            f"auxiliary_channels={channels!r}; it must be a whole number from 0 up.",
        )
        check(is_number(rate) and 0 <= rate < 1, f"decoder_drop_rate={rate!r}; it must be a number in [0, 1).")
        check(
            isinstance(scales, tuple) and bool(scales) and all(_is_whole(side) and side >= 1 for side in scales),
            f"pool_scales={scales!r}; they must be whole numbers from 1 up, such as (1, 2, 3, 6).",
        )
        maps = 1 if self.decoder == "linear" else 4
        check(
            blocks is None
            or (isinstance(blocks, tuple) and len(blocks) == maps and all(_is_whole(b) and b >= -1 for b in blocks)),
            f"out_indices={blocks!r}; the decoder {self.decoder!r} reads {maps} of the blocks, which count from 0 (-1 "
            "is what enters the first). Name as many, or leave it out.",
        )

    def of_depth(self, depth: int) -> "SegmenterConfig":
        """Return the config with the blocks that are read of a network of this depth.

        Raises:
            InvalidValueError: The network has not all of them.
        """
        blocks = self.out_indices
        if blocks is None:
            blocks = (depth - 1,) if self.decoder == "linear" else pyramid_blocks(depth)
        check(
            max(blocks) < depth,
            f"out_indices={blocks} of a network of {depth} blocks, 0 to {depth - 1}; name blocks that it has.",
        )
        return replace(self, out_indices=blocks)

    @property
    def has_auxiliary(self) -> bool:
        """Whether there is an auxiliary head."""
        return self.decoder == "upernet" and self.auxiliary_channels > 0


# What is built around a backbone.
HeadConfig = MimConfig | SegmenterConfig


def pyramid_blocks(depth: int) -> tuple[int, ...]:
    """Return the four blocks that the original's segmentation models read, of a network of any depth.

    A third, half, two thirds and all of the depth: 3, 5, 7, 11 of 12 blocks, 7, 11, 15, 23 of 24. Of shallow networks
    the last four, and of fewer than four blocks the first one again.
    """
    original = (depth // 3 - 1, depth // 2 - 1, depth * 2 // 3 - 1, depth - 1)
    is_deep = len(set(original)) == len(original) and min(original) >= 0
    return original if is_deep else tuple(max(block, 0) for block in range(depth - 4, depth))


@dataclass(frozen=True, kw_only=True)
class DvaeConfig:
    """DALL-E's discrete autoencoder; the defaults are those of the released one.

    Attributes:
        img_size: Height and width of its images in pixels, eight times the grid of codes.
        in_chans: Colour channels.
        vocab_size: Codes.
        hidden_dim: Channels of the encoder's first group; later ones have 2, 4 and 8 times as many.
        decoder_dim: Channels of the decoder's first layer.
        blocks_per_group: Residual blocks of each of the four groups.
    """

    img_size: Pair = (112, 112)
    in_chans: int = 3
    vocab_size: int = 8192
    hidden_dim: int = 256
    decoder_dim: int = 128
    blocks_per_group: int = 2

    def __post_init__(self) -> None:
        _check_sizes(self, "img_size")
        _check_counts(self, "in_chans", "vocab_size", "hidden_dim", "decoder_dim", "blocks_per_group")
        check_divisible(self.img_size, (8, 8))
        check(self.hidden_dim % 4 == 0, f"hidden_dim={self.hidden_dim}; it must be a multiple of 4.")


@dataclass(frozen=True, kw_only=True)
class RandomConfig:
    """A tokenizer that learned nothing: random projections of patches, and the nearest of random codes.

    Attributes:
        img_size: Height and width of its images in pixels.
        patch_size: Height and width of the patch that becomes one code.
        in_chans: Colour channels.
        vocab_size: Codes.
        code_dim: Channels of a code; BEST-RQ has 16.
        seed: Of the projection and the codes.
    """

    img_size: Pair = (224, 224)
    patch_size: Pair = (16, 16)
    in_chans: int = 3
    vocab_size: int = 8192
    code_dim: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self, "img_size", "patch_size")
        _check_counts(self, "in_chans", "vocab_size", "code_dim")
        check(_is_whole(self.seed) and self.seed >= 0, f"seed={self.seed!r}; it must be a whole number from 0 up.")
        check_divisible(self.img_size, self.patch_size)


@dataclass(frozen=True, kw_only=True)
class VqkdConfig:
    """BEiT v2's tokenizer.

    Attributes:
        encoder: The network from pixels to patch tokens.
        decoder: The network from codes to the teacher's features; its images are maps of codes, its patches one code.
        vocab_size: Codes.
        code_dim: Channels of a code.
        teacher_dim: Channels of the teacher's features.
        target: What the decoder predicts: features of a teacher, or the pixels of the patches, for which there is no
            teacher and `teacher_dim` means nothing.
    """

    encoder: BeitConfig
    decoder: BeitConfig
    vocab_size: int = 8192
    code_dim: int = 32
    teacher_dim: int = 512
    target: Target = "features"

    def __post_init__(self) -> None:
        check(
            self.target in get_args(Target),
            f"target={self.target!r}; a decoder predicts {' or '.join(map(repr, get_args(Target)))}.",
        )
        _check_counts(self, "vocab_size", "code_dim", "teacher_dim")
        grids = self.encoder.grid_size, self.decoder.grid_size
        check(
            grids[0] == grids[1] and self.decoder.in_chans == self.code_dim,
            f"The encoder makes {grids[0]} codes of {self.code_dim} channels, the decoder takes {grids[1]} of "
            f"{self.decoder.in_chans}; both must agree.",
        )

    @property
    def prediction_dim(self) -> int:
        """Numbers that the decoder predicts for each patch."""
        pixels = self.encoder.in_chans * math.prod(self.encoder.patch_size)
        return pixels if self.target == "pixels" else self.teacher_dim


def table_rows(grid: Pair) -> int:
    """Count the rows of a relative position bias table for a grid of patches: each offset, and the class token's."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + CLASS_ROWS


def override(config: BeitConfig, **overrides: Any) -> BeitConfig:
    """Return the config with fields replaced, in timm's spellings.

    A single int stands for both sides of a size, and None leaves a field as it is, as in timm.

    Raises:
        TypeError: A name is no field and has a value; the closest fields are named.
        ValueError: A value is out of range.
    """
    known = {f.name for f in fields(BeitConfig)}
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in given.keys() - known:
        raise InvalidOptionError(f"{name!r} is not an option of a BEiT; {closest(name, known)}")
    for name, value in given.items():
        given[name] = plain(value)
    for name in given.keys() & {"img_size", "patch_size"}:
        side = given[name]
        given[name] = (side, side) if isinstance(side, int) else side
    return replace(config, **given)


def plain(value: Any) -> Any:
    """Turn NumPy's and PyTorch's numbers, and lists of them, into Python's."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return value.item() if hasattr(value, "item") else value


def _check_sizes(record: object, *names: str) -> None:
    for name in names:
        check(_is_pair(getattr(record, name)), f"{name}={getattr(record, name)!r}; it must be a pair (height, width).")


def _check_counts(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        check(_is_whole(value) and value >= 1, f"{name}={value!r}; it must be a whole number from 1 up.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Tell whether this is a finite number and no truth value."""
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_whole(side) and side >= 1 for side in value)


def check_divisible(img_size: Pair, patch_size: Pair) -> None:
    """Refuse a size that is no whole number of patches, and name the two nearest that are."""
    for side, patch in zip(img_size, patch_size, strict=True):
        lower = side // patch * patch
        nearest = f"{lower} or {lower + patch}" if lower else f"{patch}"
        check(side == lower, f"img_size={img_size} is not a multiple of patch_size={patch_size}; use {nearest}.")
