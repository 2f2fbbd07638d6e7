"""config.json as timm reads and writes it, with what timm has no word for under a key of its own."""

import json
import logging
import math
from dataclasses import fields, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beitzoo.errors import closest, describe_invalid
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.checkpoints import Classify, CropMode, DataConfig, Interpolation, PretrainedConfig
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.networks import BeitConfig, override

# timm builds any of our networks from this one, given all fields that differ from it.
_BASE = "beit_base_patch16_224"
# An architecture that timm does not know, so that it refuses what it would read as something else.
_NOT_FOR_TIMM = "beit_with_what_timm_lacks"
# Fields that timm's class does not have; they go under this key, which timm passes over.
_OWN_KEY = "beitzoo"
_REDUCES = "reduce_zero_label"
_OWN_FIELDS = ("use_mask_token", "dynamic_img_size", "dynamic_img_pad", "resize_rule", "norm_eps")

_logger = logging.getLogger(__name__)

_Statistics = Annotated[list[float], Field(min_length=1, max_length=1024)]
_Arguments = dict[str, int | float | bool | str | list[int] | None]


class _Data(BaseModel):
    model_config = ConfigDict(extra="ignore")

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: _Statistics | None = None
    std: _Statistics | None = None
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    license: str | None = None


class _Form(BaseModel):
    model_config = ConfigDict(extra="ignore")

    architecture: str
    num_classes: int | None = None
    model_args: _Arguments = {}
    beitzoo: _Arguments = {}
    pretrained_cfg: _Data
    label_names: list[str] | dict[str, str] | None = None


def parse(document: bytes, _: bytes | None = None) -> tuple[BeitConfig, PretrainedConfig]:
    """Read timm's config.json; the second file is transformers' and not looked at.

    Raises:
        ValueError: It is not timm's, or describes no BEiT.
        TypeError: It has an option that no BEiT has.
    """
    try:
        form = _Form.model_validate_json(document)
    except ValidationError as error:
        raise ValueError(f"it is not the config of a timm model: {describe_invalid(error)}") from error
    name = _BASE if form.architecture == _NOT_FOR_TIMM else form.architecture
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} is no BEiT; {closest(name, ARCHITECTURES)}")
    own: dict[str, Any] = dict(form.beitzoo)
    reduces = own.pop(_REDUCES, False)
    arguments: dict[str, Any] = {"num_classes": form.num_classes, **form.model_args, **own}
    config = override(ARCHITECTURES[name], **arguments)
    return config, PretrainedConfig(
        head=Classify(num_classes=config.num_classes, labels=_labels(form.label_names, config.num_classes)),
        data=replace(_data(form.pretrained_cfg), reduce_zero_label=reduces),
        license=form.pretrained_cfg.license,
    )


def dump(config: BeitConfig, pretrained: PretrainedConfig) -> str:
    """Write the config.json from which `parse`, and timm, build the same network and transform."""
    lacking = _timm_lacks(config)
    if lacking is not None:
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
    document["pretrained_cfg"].pop("hf_hub_id", None)
    if pretrained.data.reduce_zero_label:
        document[_OWN_KEY][_REDUCES] = True
    names = label_names(pretrained.head)
    if names and len(names) == config.num_classes:
        document["label_names"] = names
    return json.dumps(document, indent=2) + "\n"


def _timm_lacks(config: BeitConfig) -> str | None:
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
        mean=tuple(form.mean or [0.5] * channels),
        std=tuple(form.std or [0.5] * channels),
        interpolation=form.interpolation,
        crop_pct=form.crop_pct,
        crop_mode=form.crop_mode,
    )


def _labels(names: list[str] | dict[str, str] | None, classes: int) -> tuple[str, ...] | None:
    if not names:
        return None
    if isinstance(names, dict):
        by_index = {int(index): name for index, name in names.items()}
        names = [by_index[index] for index in range(classes) if index in by_index]
    if len(names) != classes:
        raise ValueError(f"it has {len(names)} label_names for {classes} classes; name each or none.")
    return tuple(names)
