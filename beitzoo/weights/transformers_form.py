"""config.json and preprocessor_config.json as transformers reads and writes them for BEiT."""

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beitzoo.weights.validation import describe
from beitzoo.zoo.config import BeitConfig, DataConfig, GlobalPool, Head, Interpolation, Pair, PretrainedConfig
from beitzoo.zoo.labels import label_names

_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_HEADS: dict[str, Head] = {
    "BeitForMaskedImageModeling": "mim",
    "BeitForSemanticSegmentation": "segment",
    "BeitBackbone": "segment",
    "BeitForImageClassification": "classify",
}

_Rate = Annotated[float, Field(ge=0, lt=1)]
_Side = Annotated[int, Field(ge=1, le=2**20)]
_Size = _Side | tuple[_Side, _Side]


class _Form(BaseModel):
    """The fields of `BeitConfig` in transformers that a backbone depends on, with that class's defaults."""

    model_config = ConfigDict(extra="ignore")

    model_type: Literal["beit"]
    architectures: list[str] | None = None
    vocab_size: _Side = 8192
    hidden_size: _Side = 768
    num_hidden_layers: _Side = 12
    num_attention_heads: _Side = 12
    intermediate_size: _Side = 3072
    hidden_act: Literal["gelu"] = "gelu"
    hidden_dropout_prob: _Rate = 0.0
    attention_probs_dropout_prob: _Rate = 0.0
    layer_norm_eps: float = 1e-12
    image_size: _Size = 224
    patch_size: _Size = 16
    num_channels: _Side = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: _Rate = 0.1
    use_mean_pooling: bool = True
    id2label: dict[str, str] | None = None
    num_labels: int | None = None


class _Sides(BaseModel):
    model_config = ConfigDict(extra="ignore")

    height: _Side
    width: _Side


class _Preprocessor(BaseModel):
    """The settings of `BeitImageProcessor`; sizes are written as one number in old files."""

    model_config = ConfigDict(extra="ignore")

    do_resize: bool = True
    size: _Side | _Sides = 224
    resample: int = 3
    do_center_crop: bool = False
    crop_size: _Side | _Sides | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Annotated[list[float], Field(min_length=1, max_length=1024)] = [0.5, 0.5, 0.5]
    image_std: Annotated[list[float], Field(min_length=1, max_length=1024)] = [0.5, 0.5, 0.5]


def parse(document: bytes, preprocessor: bytes | None) -> tuple[BeitConfig, PretrainedConfig]:
    """Read transformers' config.json and, if there is one, preprocessor_config.json.

    Raises:
        ValueError: They are not of a BEiT in transformers.
    """
    try:
        form = _Form.model_validate_json(document)
        settings = _Preprocessor.model_validate_json(preprocessor) if preprocessor is not None else None
    except ValidationError as error:
        raise ValueError(f"it is not the config of a transformers BEiT: {describe(error)}") from error
    head = _head(form)
    classes = _num_classes(form, head)
    _check_readable(form, head)
    config = BeitConfig(
        img_size=_pair(form.image_size),
        patch_size=_pair(form.patch_size),
        in_chans=form.num_channels,
        num_classes=classes if head == "classify" else 0,
        global_pool=_pooling(form, head),
        embed_dim=form.hidden_size,
        depth=form.num_hidden_layers,
        num_heads=form.num_attention_heads,
        mlp_ratio=_ratio(form.intermediate_size, form.hidden_size),
        init_values=max(form.layer_scale_init_value, 0.0),
        use_abs_pos_emb=form.use_absolute_position_embeddings,
        use_rel_pos_bias=form.use_relative_position_bias,
        use_shared_rel_pos_bias=form.use_shared_relative_position_bias,
        use_fc_norm=form.use_mean_pooling and head != "mim",
        use_mask_token=form.use_mask_token,
        norm_eps=form.layer_norm_eps,
        pos_drop_rate=form.hidden_dropout_prob,
        proj_drop_rate=form.hidden_dropout_prob,
        attn_drop_rate=form.attention_probs_dropout_prob,
        drop_path_rate=form.drop_path_rate,
    )
    labels = _labels(form) if head == "classify" else None
    data = _data(config) if settings is None else _stated_data(config, settings)
    return config, PretrainedConfig(head=head, num_classes=classes, data=data, labels=labels)


def dump(config: BeitConfig, pretrained: PretrainedConfig) -> tuple[str, str]:
    """Write config.json and preprocessor_config.json of the same network and transform.

    Raises:
        ValueError: transformers cannot build this network; says why.
    """
    _check_expressible(config)
    hidden = config.hidden_dim
    names = label_names(pretrained) if config.num_classes == pretrained.num_classes else None
    names = names or tuple(f"LABEL_{index}" for index in range(config.num_classes))
    document: dict[str, Any] = {
        "model_type": "beit",
        "architectures": ["BeitForImageClassification" if config.num_classes else "BeitModel"],
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.proj_drop_rate,
        "attention_probs_dropout_prob": config.attn_drop_rate,
        "layer_norm_eps": config.norm_eps,
        "image_size": config.img_size[0],
        "patch_size": config.patch_size[0],
        "num_channels": config.in_chans,
        "use_mask_token": config.use_mask_token,
        "use_absolute_position_embeddings": config.use_abs_pos_emb,
        "use_relative_position_bias": config.use_rel_pos_bias,
        "use_shared_relative_position_bias": config.use_shared_rel_pos_bias,
        "layer_scale_init_value": float(config.init_values),
        "drop_path_rate": config.drop_path_rate,
        "use_mean_pooling": config.norm_after_pooling,
        "torch_dtype": "float32",
    }
    if config.num_classes:
        document["id2label"] = {str(index): name for index, name in enumerate(names)}
        document["label2id"] = {name: index for index, name in enumerate(names)}
    data = pretrained.data.fitted_to(config)
    size = {"height": config.img_size[0], "width": config.img_size[1]}
    processor = {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": next((number for number, name in _FILTERS.items() if name == data.interpolation), 3),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
        "do_reduce_labels": False,
    }
    return json.dumps(document, indent=2) + "\n", json.dumps(processor, indent=2) + "\n"


def _check_readable(form: _Form, head: Head) -> None:
    """Refuse what would load and give other numbers than transformers does."""
    (height, width), (ph, pw) = _pair(form.image_size), _pair(form.patch_size)
    biased = form.use_relative_position_bias or form.use_shared_relative_position_bias
    if biased and height // ph != width // pw:
        raise ValueError("its input is not square, and transformers reads the bias tables of oblong grids transposed.")
    if head == "mim" and not form.use_mean_pooling:
        raise ValueError("a masked image model with use_mean_pooling=False is normed twice, which is not built here.")


def _check_expressible(config: BeitConfig) -> None:
    pooling: GlobalPool = "avg" if config.norm_after_pooling else "token"
    reasons = {
        "its input is not square, and transformers reads the bias tables of oblong grids transposed": (
            config.img_size[0] != config.img_size[1] or config.patch_size[0] != config.patch_size[1]
        ),
        "its queries and values have no bias": not config.qkv_bias,
        f"it pools by {config.global_pool!r}, and with its norm transformers pools by {pooling!r}": (
            config.num_classes > 0 and config.global_pool != pooling
        ),
        "its dropout after the embeddings differs from that of its blocks": (
            config.pos_drop_rate != config.proj_drop_rate
        ),
        "it has dropout before the head": config.drop_rate > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"transformers cannot build this network: {reason}. Save it with save_pretrained.")


def _head(form: _Form) -> Head:
    for name in form.architectures or ():
        if name in _HEADS:
            return _HEADS[name]
    return "classify"


def _num_classes(form: _Form, head: Head) -> int:
    if head == "mim":
        return form.vocab_size
    if form.architectures and not set(form.architectures) & _HEADS.keys():
        return 0  # a bare BeitModel
    stated = form.num_labels if form.id2label is None else len(form.id2label)
    return 2 if stated is None else stated  # transformers' default


def _pooling(form: _Form, head: Head) -> GlobalPool:
    return "avg" if form.use_mean_pooling or head == "mim" else "token"


def _labels(form: _Form) -> tuple[str, ...] | None:
    if form.id2label is None:
        return None
    try:
        return tuple(form.id2label[str(index)] for index in range(len(form.id2label)))
    except KeyError as error:
        raise ValueError(
            f"its id2label has {len(form.id2label)} names but none for output {error.args[0]}; the gap would shift "
            "every later name. Number the names from 0 up."
        ) from error


def _data(config: BeitConfig) -> DataConfig:
    half = (0.5,) * config.in_chans
    size = (config.in_chans, *config.img_size)
    return DataConfig(input_size=size, mean=half, std=half, crop_pct=1.0, crop_mode="squash")


def _stated_data(config: BeitConfig, settings: _Preprocessor) -> DataConfig:
    """Express the processor in timm's words: it resizes to a square without keeping proportions, and crops nothing."""
    crops = settings.do_center_crop and settings.crop_size != settings.size
    rescales = settings.do_rescale and math.isclose(settings.rescale_factor, 1 / 255, rel_tol=1e-3)
    if not settings.do_resize or crops or not rescales or not settings.do_normalize:
        raise ValueError(
            "its preprocessor does not resize, crops the centre, or does not scale by 1/255 and normalise; "
            "only resizing to the input size, scaling and normalising is read."
        )
    if settings.resample not in _FILTERS:
        raise ValueError(f"its preprocessor has resample={settings.resample}; Pillow's filters are 0 to 5.")
    size = settings.size
    height, width = (size, size) if isinstance(size, int) else (size.height, size.width)
    return DataConfig(
        input_size=(config.in_chans, height, width),
        mean=tuple(settings.image_mean),
        std=tuple(settings.image_std),
        interpolation=_FILTERS[settings.resample],
        crop_pct=1.0,
        crop_mode="squash",
    )


def _ratio(hidden: int, width: int) -> float:
    """Return the ratio from which `int(width * ratio)` gives the hidden width back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _pair(size: int | Pair) -> Pair:
    return (size, size) if isinstance(size, int) else size
