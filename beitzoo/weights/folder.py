"""A model folder in timm's form: config.json and model.safetensors, which timm reads as `local-dir:` too."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beitzoo.weights.checkpoint import CheckpointError, write_atomically
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.config import BeitConfig, CropMode, DataConfig, LocalFile, PretrainedConfig, closest, override
from beitzoo.zoo.labels import label_names
from beitzoo.zoo.registry import Entry

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

# timm builds any of our networks from this one, given all fields that differ from it.
_TIMM_ARCHITECTURE = "beit_base_patch16_224"

_Statistics = Annotated[list[float], Field(min_length=1, max_length=64)]


class _TimmData(BaseModel):
    model_config = ConfigDict(extra="ignore")

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: _Statistics | None = None
    std: _Statistics | None = None
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: CropMode = "center"
    license: str | None = None


class _TimmConfig(BaseModel):
    model_config = ConfigDict(extra="ignore")

    architecture: str
    num_classes: int | None = None
    model_args: dict[str, int | float | bool | str | list[int] | None] = {}
    pretrained_cfg: _TimmData
    label_names: list[str] | dict[str, str] | None = None


def read(directory: Path) -> Entry:
    """Read what a folder says about its model: the network, the transform, and where its weights are.

    Raises:
        FileNotFoundError: No such folder, or no config.json in it.
        CheckpointError: config.json describes no BEiT.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; a model folder has a {CONFIG_NAME} and a {WEIGHTS_NAME}.")
    try:
        form = _TimmConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path} is not the config of a timm model: {_summary(error)}") from error
    if form.architecture not in ARCHITECTURES:
        raise CheckpointError(f"{path}: {form.architecture!r} is no BEiT; {closest(form.architecture, ARCHITECTURES)}")
    try:
        config = override(ARCHITECTURES[form.architecture], **{"num_classes": form.num_classes, **form.model_args})
        return Entry(f"local-dir:{directory}", config, _pretrained(form, config, directory))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def write_config(directory: Path, config: BeitConfig, pretrained: PretrainedConfig) -> None:
    """Write the config.json that `read`, and timm, build the same network and transform from."""
    base = ARCHITECTURES[_TIMM_ARCHITECTURE]
    settled = replace(config, use_fc_norm=config.norm_after_pooling)
    differing = {f.name: getattr(settled, f.name) for f in fields(BeitConfig)}
    model_args = {name: value for name, value in differing.items() if value != getattr(base, name)}
    document: dict[str, Any] = {
        "architecture": _TIMM_ARCHITECTURE,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": config.global_pool,
        "model_args": model_args,
        "pretrained_cfg": {**pretrained.to_timm(config), "num_classes": config.num_classes},
    }
    document["pretrained_cfg"].pop("hf_hub_id", None)
    if config.num_classes == pretrained.num_classes and (names := label_names(pretrained)):
        document["label_names"] = names
    text = json.dumps(document, indent=2) + "\n"
    write_atomically(directory / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _pretrained(form: _TimmConfig, config: BeitConfig, directory: Path) -> PretrainedConfig:
    data = form.pretrained_cfg
    given = {name: tuple(value) for name, value in (("mean", data.mean), ("std", data.std)) if value is not None}
    chans = {} if given else {"mean": (0.5,) * data.input_size[0], "std": (0.5,) * data.input_size[0]}
    names = form.label_names
    return PretrainedConfig(
        sources=(LocalFile(directory / WEIGHTS_NAME),),
        num_classes=config.num_classes,
        data=DataConfig(
            input_size=data.input_size,
            interpolation=data.interpolation,
            crop_pct=data.crop_pct,
            crop_mode=data.crop_mode,
            **given,
            **chans,
        ),
        labels=tuple(names.values()) if isinstance(names, dict) else tuple(names) if names else None,
        license=data.license,
    )


def _summary(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
