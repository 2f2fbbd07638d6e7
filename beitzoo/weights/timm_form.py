"""config.json as timm reads and writes it, with what timm has no word for under a key of its own."""

import json
import logging
import math
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from beitzoo.errors import InvalidValueError, closest, describe_invalid
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.checkpoints import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Activation,
    Classify,
    CropMode,
    DataConfig,
    Interpolation,
    Mim,
    PretrainedConfig,
    Segment,
)
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.networks import BeitConfig, MimConfig, SegmenterConfig, override, plain
from beitzoo.zoo.registry import architecture_of

# timm builds any of our networks from this one, given all fields that differ from it.
_BASE = "beit_base_patch16_224"
# An architecture that timm does not know, so that it refuses what it would read as something else.
_NOT_FOR_TIMM = "beit_with_what_timm_lacks"
# Fields that timm's class does not have; they go under this key, which timm passes over.
_OWN_KEY = "beitzoo"
_REDUCES = "reduce_zero_label"
_ACTIVATION = "activation"
_TOKENIZER = "tokenizer"
_PAPER = "paper"
_OWN_FIELDS = ("use_mask_token", "dynamic_img_size", "dynamic_img_pad", "resize_rule", "norm_eps")

_logger = logging.getLogger(__name__)

_Statistics = Annotated[list[float], Field(min_length=1, max_length=1024)]
_Arguments = dict[str, int | float | bool | str | list[int] | None]


class _Data(BaseModel):
    """The fields of timm's `PretrainedCfg` that change what a model computes, with that class's defaults.

    All others are passed over on purpose; `IGNORED` says why, and a test holds both to timm's own list.
    """

    model_config = ConfigDict(extra="ignore")

    input_size: tuple[int, int, int] = (3, 224, 224)
    fixed_input_size: bool = False
    mean: _Statistics | None = None
    std: _Statistics | None = None
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    num_classes: int | None = None
    label_names: list[str] | dict[str, str] | None = None
    license: str | None = None
    # Weights in a form of their own, under other names, or for classes counted from elsewhere.
    custom_load: Literal[False] = False
    label_offset: Literal[0] | None = None
    first_conv: Literal["patch_embed.proj"] | None = None
    classifier: Literal["head"] | None = None


IGNORED = {
    "weights are looked for beside the file alone": (
        "url",
        "file",
        "state_dict",
        "hf_hub_id",
        "hf_hub_filename",
        "source",
    ),
    "said by the config around it": ("architecture", "tag"),
    "timm uses them only where it is told to": ("test_input_size", "test_crop_pct", "test_pool_size"),
    "a vision transformer has no last maps to pool": ("pool_size",),
    "a bound for other kinds of network": ("min_input_size",),
    "words about the model": ("label_descriptions", "description", "origin_url", "paper_name", "paper_ids", "notes"),
}
IGNORED_AROUND = {"follow from the network, for the reader": ("num_features", "global_pool", "label_descriptions")}


class _Form(BaseModel):
    """The fields of config.json around timm's `PretrainedCfg`."""

    model_config = ConfigDict(extra="ignore")

    architecture: str
    num_classes: int | None = None
    model_args: _Arguments = {}
    beitzoo: _Arguments = {}
    pretrained_cfg: _Data
    label_names: list[str] | dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _split(cls, document: Any) -> Any:
        """Read the old form too, which has all fields in one dict."""
        if not isinstance(document, dict) or "architecture" not in document or "pretrained_cfg" in document:
            return document
        names = document.get("label_names", document.get("labels"))
        return {"architecture": document["architecture"], "label_names": names, "pretrained_cfg": document}


def parse(document: bytes, _: bytes | None = None) -> tuple[BeitConfig, PretrainedConfig]:
    """Read timm's config.json; the second file is transformers' and not looked at.

    Raises:
        ValueError: It is not timm's, or describes no BEiT.
        TypeError: It has an option that no BEiT has.
    """
    try:
        form = _Form.model_validate_json(document)
    except ValidationError as error:
        raise InvalidValueError(f"it is not the config of a timm model: {describe_invalid(error)}") from error
    name = _BASE if form.architecture == _NOT_FOR_TIMM else form.architecture
    if name not in ARCHITECTURES:
        raise InvalidValueError(f"{name!r} is no BEiT; {closest(name, ARCHITECTURES)}")
    data = form.pretrained_cfg
    own: dict[str, Any] = dict(form.beitzoo)
    reduces, activation = own.pop(_REDUCES, False), own.pop(_ACTIVATION, "softmax")
    paper = own.pop(_PAPER, None)
    if not isinstance(paper, str | None):
        raise InvalidValueError(f"its paper is {paper!r}; it must be an address.")
    around = _around(own)
    if activation not in get_args(Activation):
        raise InvalidValueError(f"its activation is {activation!r}; there are {', '.join(get_args(Activation))}.")
    # What timm builds where the arguments do not say it.
    arguments: dict[str, Any] = {
        "num_classes": data.num_classes if form.num_classes is None else form.num_classes,
        **({"in_chans": data.input_size[0]} if "input_size" in data.model_fields_set else {}),
        **({"img_size": data.input_size[1:]} if data.fixed_input_size else {}),
        **form.model_args,
        **own,
    }
    config = override(ARCHITECTURES[name], **arguments)
    classes = around.num_classes if isinstance(around, Segment) else config.num_classes
    labels = _labels(form.label_names or data.label_names, classes)
    if isinstance(around, Segment):
        around = replace(around, labels=labels)
    classify = Classify(num_classes=config.num_classes, labels=labels, activation=activation)
    return config, PretrainedConfig(
        head=around or classify,
        data=replace(_data(data), reduce_zero_label=reduces),
        license=data.license,
        paper=paper,
        architecture=architecture_of(config) or name,
    )


def _around(own: dict[str, Any]) -> Mim | Segment | None:
    """Take what is around the backbone out of the fields that timm does not have."""
    tokenizer = own.pop(_TOKENIZER, None)
    if not isinstance(tokenizer, str | None):
        raise InvalidValueError(f"its tokenizer is {tokenizer!r}; it must be a name.")
    mim, segmenter = (
        {name: plain(own.pop(name)) for name in kind.__dataclass_fields__.keys() & own.keys()}
        for kind in (MimConfig, SegmenterConfig)
    )
    if segmenter:
        return Segment(network=SegmenterConfig(**segmenter))
    return Mim(network=MimConfig(**mim), tokenizer=tokenizer) if mim else None


def dump(config: BeitConfig, pretrained: PretrainedConfig) -> str:
    """Write the config.json from which `parse`, and timm, build the same network and transform."""
    head = pretrained.head
    lacking = "it has no heads for pixels" if isinstance(head, Segment) else timm_lacks(config)
    if lacking is not None and isinstance(head, Classify):  # of others nobody expects it
        _logger.warning("timm will not read this model: %s.", lacking)
    settled = replace(config, use_fc_norm=config.norm_after_pooling)
    values = {field.name: getattr(settled, field.name) for field in fields(BeitConfig)}
    changed = {name: value for name, value in values.items() if value != getattr(ARCHITECTURES[_BASE], name)}
    document: dict[str, Any] = {
        "architecture": _BASE if lacking is None else _NOT_FOR_TIMM,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": config.global_pool,
        "model_args": {name: value for name, value in changed.items() if name not in _OWN_FIELDS},
        _OWN_KEY: {name: value for name, value in changed.items() if name in _OWN_FIELDS},
        "pretrained_cfg": {**pretrained.to_timm(config), "num_classes": config.num_classes},
    }
    for name in ("hf_hub_id", "architecture"):  # whence it came is not where it is; the name is said above
        document["pretrained_cfg"].pop(name, None)
    if pretrained.data.reduce_zero_label:
        document[_OWN_KEY][_REDUCES] = True
    if isinstance(head, Mim | Segment) and head.network is not None:
        document[_OWN_KEY] |= asdict(head.network)
    if isinstance(head, Mim) and head.tokenizer is not None:
        document[_OWN_KEY][_TOKENIZER] = head.tokenizer
    if isinstance(head, Classify) and head.activation != "softmax":
        document[_OWN_KEY][_ACTIVATION] = head.activation
    if pretrained.paper is not None:
        document[_OWN_KEY][_PAPER] = pretrained.paper
    names = label_names(head)
    if names and len(names) == (head.num_classes if isinstance(head, Segment) else config.num_classes):
        document["label_names"] = names
    return json.dumps(document, indent=2) + "\n"


def timm_lacks(config: BeitConfig) -> str | None:
    """Say what timm 1.0.31 would read as something else; None if nothing.

    An epsilon below its own, such as transformers' 1e-12, moves outputs by rounding only and is let pass.
    """
    if config.use_mask_token:
        return "it has no mask token"
    if config.norm_eps > 1e-6:
        return f"its epsilon is 1e-6, not {config.norm_eps}"
    h, w = (2 * side - 1 for side in config.grid_size)
    has_table = config.use_rel_pos_bias or config.use_shared_rel_pos_bias
    if has_table and h != w and math.isqrt(h * w) ** 2 == h * w:
        return "it would take the bias tables of this oblong grid for those of a square one"
    return None


def _data(form: _Data) -> DataConfig:
    channels = form.input_size[0]
    return DataConfig(
        input_size=form.input_size,
        mean=tuple(form.mean or _default(IMAGENET_MEAN, channels)),
        std=tuple(form.std or _default(IMAGENET_STD, channels)),
        interpolation=form.interpolation,
        crop_pct=form.crop_pct,
        crop_mode=form.crop_mode,
    )


def _default(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return timm's statistics where none are stated; of other channels than three, their average."""
    return values if channels == len(values) else (sum(values) / len(values),) * channels


def _labels(names: list[str] | dict[str, str] | None, classes: int) -> tuple[str, ...] | None:
    if not names:
        return None
    if isinstance(names, dict):
        by_index = {int(index): name for index, name in names.items()}
        names = [by_index[index] for index in range(classes) if index in by_index]
    if len(names) != classes:
        raise InvalidValueError(f"it has {len(names)} label_names for {classes} classes; name each or none.")
    return tuple(names)
