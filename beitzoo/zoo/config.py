"""Frozen records: what is built, what it is fed, and where its weights come from."""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

Pair = tuple[int, int]
GlobalPool = Literal["avg", "token", ""]
ResizeRule = Literal["geometric_cubic", "geometric_linear", "bilinear"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
CropMode = Literal["center", "center_floor", "squash", "border"]

_FLAGS = (
    "qkv_bias",
    "use_abs_pos_emb",
    "use_rel_pos_bias",
    "use_shared_rel_pos_bias",
    "use_mask_token",
    "dynamic_img_size",
    "dynamic_img_pad",
)

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        for name in ("img_size", "patch_size"):
            _check(_is_pair(getattr(self, name)), f"{name}={getattr(self, name)!r}; it must be a pair (height, width).")
        for name, least in (("in_chans", 1), ("num_classes", 0), ("embed_dim", 1), ("depth", 1), ("num_heads", 1)):
            value = getattr(self, name)
            _check(_is_whole(value) and value >= least, f"{name}={value!r}; it must be a whole number from {least} up.")
        for name in ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            _check(_is_number(value) and 0 <= value < 1, f"{name}={value!r}; it must be a number in [0, 1).")
        for name in ("mlp_ratio", "init_values", "norm_eps", "head_init_scale"):
            value = getattr(self, name)
            _check(_is_number(value) and value >= 0, f"{name}={value!r}; it must be a number from 0 up.")
        for name in _FLAGS:
            _check(isinstance(getattr(self, name), bool), f"{name}={getattr(self, name)!r}; it must be True or False.")
        _check(
            self.use_fc_norm in (None, True, False),
            f"use_fc_norm={self.use_fc_norm!r}; it must be True, False or None.",
        )
        _check(
            self.global_pool in ("avg", "token", ""),
            f"global_pool={self.global_pool!r}; BEiT pools by 'avg', 'token' or '' (not at all).",
        )
        _check(
            self.resize_rule in get_args(ResizeRule),
            f"resize_rule={self.resize_rule!r}; there are {', '.join(get_args(ResizeRule))}.",
        )
        _check(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim={self.embed_dim} cannot be split over num_heads={self.num_heads}; choose a divisor.",
        )
        _check(self.hidden_dim >= 1, f"mlp_ratio={self.mlp_ratio} leaves the MLP without a hidden channel.")
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
class DataConfig:
    """What a checkpoint expects of an image; the fields and their meaning are timm's.

    Attributes:
        input_size: Channels, height, width.
        mean: Per channel, subtracted after scaling to [0, 1].
        std: Per channel, divided by afterwards.
        interpolation: Filter of the resize.
        crop_pct: Share of the resized image that the crop keeps, per side.
        crop_mode: Crop the centre, squash to the crop, or pad to it. Of an odd number of pixels to cut, `center` rounds
            the half to even, as timm, and `center_floor` down, as transformers; timm takes that word for `center`.
        reduce_zero_label: Maps of classes count from 1, and 0 is a pixel without one, as in ADE20K.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.9
    crop_mode: CropMode = "center"
    reduce_zero_label: bool = False

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        _check(
            len(self.mean) == len(self.std) == channels,
            f"{channels} channels with {len(self.mean)} means and {len(self.std)} deviations; give one each.",
        )
        _check(all(map(_is_number, self.mean)), f"mean={self.mean}; it must be numbers.")
        _check(all(_is_number(s) and s > 0 for s in self.std), f"std={self.std}; it must be positive numbers.")
        for name, kind in (("interpolation", Interpolation), ("crop_mode", CropMode)):
            value = getattr(self, name)
            _check(value in get_args(kind), f"{name}={value!r}; there are {', '.join(get_args(kind))}.")
        _check(0 < self.crop_pct <= 1, f"crop_pct={self.crop_pct}; it must be in (0, 1].")
        reduces = self.reduce_zero_label
        _check(isinstance(reduces, bool), f"reduce_zero_label={reduces!r}; it must be True or False.")

    def fitted_to(self, config: BeitConfig) -> "DataConfig":
        """Return this config with the network's size and channels.

        Statistics of another channel count are averaged: there is no telling which channel is which.
        """
        size = (config.in_chans, *config.img_size)
        if config.in_chans == self.input_size[0]:
            return replace(self, input_size=size)
        mean = (sum(self.mean) / len(self.mean),) * config.in_chans
        std = (sum(self.std) / len(self.std),) * config.in_chans
        return replace(self, input_size=size, mean=mean, std=std)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub; `revision` None follows the main branch."""

    repo_id: str
    filename: str = "model.safetensors"
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ReleaseFile:
    """A file of the authors' releases (addf400/files on GitHub)."""

    release: str
    filename: str
    sha256: str | None = None

    @property
    def url(self) -> str:
        """Where the file is."""
        return f"https://github.com/addf400/files/releases/download/{self.release}/{self.filename}"


@dataclass(frozen=True)
class PackageFile:
    """A file that is installed with beitzoo, relative to the package."""

    path: str
    sha256: str


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path


Source = HubFile | ReleaseFile | PackageFile | LocalFile
Head = Literal["classify", "mim", "segment"]


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """One checkpoint: where its bytes are and all that must be known to use them.

    Attributes:
        sources: Places that have the weights, tried in this order. All hold the same tensors.
        head: What the file was trained for: classes, masked patches (visual tokens) or pixels.
        num_classes: Classes of that head.
        data: The images it was trained on.
        labels: The set of class names of the head (see `zoo.labels`), or the names themselves.
        license: Of the weights, as their authors state it.
        paper: Where the training is described.
        overrides: Fields of `BeitConfig` in which the file differs from its architecture.
    """

    sources: tuple[Source, ...] = ()
    head: Head = "classify"
    num_classes: int = 1000
    data: DataConfig = field(default_factory=DataConfig)
    labels: str | tuple[str, ...] | None = None
    license: str | None = None
    paper: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def to_timm(self, config: BeitConfig) -> dict[str, Any]:
        """Return timm's `pretrained_cfg` dict for a network of this config, at its current size."""
        data = self.data.fitted_to(config)
        names = {name: getattr(data, name) for name in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
        hub = [source.repo_id for source in self.sources if isinstance(source, HubFile)]
        return {
            **({"hf_hub_id": hub[0]} if hub else {}),
            "input_size": data.input_size,
            "fixed_input_size": not (config.dynamic_img_size or config.dynamic_img_pad),
            **names,
            "num_classes": self.num_classes if self.head == "classify" else 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": self.license,
        }


def override(config: BeitConfig, **overrides: Any) -> BeitConfig:
    """Return the config with fields replaced, in timm's spellings.

    A single int stands for both sides of a size, and None leaves a field as it is, as in timm.

    Raises:
        TypeError: A name is no field; the closest ones are named.
        ValueError: A value is out of range.
    """
    known = {f.name for f in fields(BeitConfig)}
    for name in overrides.keys() - known:
        raise TypeError(f"{name!r} is not an option of a BEiT; {closest(name, known)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        given[name] = _plain(value)
    for name in given.keys() & {"img_size", "patch_size"}:
        side = given[name]
        given[name] = (side, side) if isinstance(side, int) else side
    return replace(config, **given)


def closest(name: str, known: Iterable[str]) -> str:
    """Say which known names look most like the given one, as the tail of an error message."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else f"there are {', '.join(sorted(known))}."


def _plain(value: Any) -> Any:
    """Turn NumPy's and PyTorch's numbers, and lists of them, into Python's."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_whole(side) and side >= 1 for side in value)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_divisible(img_size: Pair, patch_size: Pair) -> None:
    """Refuse a size that is no whole number of patches, and name the two nearest that are."""
    for side, patch in zip(img_size, patch_size, strict=True):
        lower = side // patch * patch
        nearest = f"{lower} or {lower + patch}" if lower else f"{patch}"
        _check(side == lower, f"img_size={img_size} is not a multiple of patch_size={patch_size}; use {nearest}.")
