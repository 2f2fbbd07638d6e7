"""config.json and preprocessor_config.json as transformers reads and writes them for BEiT."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from beitzoo.errors import InvalidValueError, describe_invalid
from beitzoo.zoo.checkpoints import (
    Activation,
    Classify,
    CropMode,
    DataConfig,
    Head,
    Interpolation,
    Mim,
    PretrainedConfig,
    Segment,
)
from beitzoo.zoo.labels import is_ade20k, is_misnumbered_22k, label_names
from beitzoo.zoo.networks import BeitConfig, GlobalPool, MimConfig, Pair, SegmenterConfig
from beitzoo.zoo.registry import architecture_of

_logger = logging.getLogger(__name__)

_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_HeadName = Literal["classify", "mim", "segment", "maps"]
_HEADS: dict[str, _HeadName] = {
    "BeitForMaskedImageModeling": "mim",
    "BeitForSemanticSegmentation": "segment",
    "BeitBackbone": "maps",
    "BeitForImageClassification": "classify",
}

_Rate = Annotated[float, Field(ge=0, lt=1)]
_Side = Annotated[int, Field(ge=1, le=2**20)]
_Size = _Side | tuple[_Side, _Side]


class _Form(BaseModel):
    """The fields of `BeitConfig` in transformers that change what a model computes, with that class's defaults.

    All others are passed over on purpose; `IGNORED` says why, and a test holds both to transformers' own list.
    """

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
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None
    quantization_config: dict[str, Any] | None = None
    pruned_heads: dict[str, Any] | None = None
    out_indices: list[int] | None = None
    pool_scales: Annotated[list[_Side], Field(min_length=1, max_length=16)] = [1, 2, 3, 6]
    use_auxiliary_head: bool = True
    auxiliary_channels: _Side = 256
    auxiliary_num_convs: Annotated[int, Field(ge=1, le=64)] = 1
    auxiliary_concat_input: Literal[False] = False


IGNORED = {
    "the class of the model, not its numbers": ("transformers_version", "_name_or_path", "auto_map"),
    "the precision is that of the tensors": ("dtype", "torch_dtype"),
    "the inverse of id2label": ("label2id",),
    "only what a call returns beside the logits": ("output_attentions", "output_hidden_states", "return_dict"),
    "only how much is computed at once": ("chunk_size_feed_forward",),
    "no meaning for an image encoder": ("is_encoder_decoder",),
    "only how training starts; unilm's way is used": ("initializer_range",),
    "the same as out_indices, by names": ("out_features", "stage_names"),
    "the shape of a backbone's maps is said by features_only": ("reshape_hidden_states", "add_fpn"),
    "only the loss of a segmentation model": ("auxiliary_loss_weight", "semantic_loss_ignore_index"),
}


_ProcessorSize = _Side | tuple[_Side, _Side] | dict[str, _Side | None]
_Statistics = float | Annotated[list[float], Field(min_length=1, max_length=1024)]


class _Preprocessor(BaseModel):
    """The settings of `BeitImageProcessor` that change pixels, with that class's defaults.

    Old files have sizes of one number and `reduce_labels`, which transformers 5.23 passes over without a word. All
    other settings are passed over on purpose, see `IGNORED_SETTINGS`.
    """

    model_config = ConfigDict(extra="ignore")

    do_resize: bool = True
    size: _ProcessorSize = 224
    resample: int | None = 3
    do_center_crop: bool = False
    crop_size: _ProcessorSize | None = 224
    do_rescale: bool = True
    rescale_factor: Annotated[float, Field(gt=0)] = 1 / 255
    do_normalize: bool = True
    image_mean: _Statistics = 0.5
    image_std: _Statistics = 0.5
    do_reduce_labels: bool = Field(False, validation_alias=AliasChoices("do_reduce_labels", "reduce_labels"))
    default_to_square: bool = True
    data_format: Literal["channels_first"] | None = None
    image_processor_type: str | None = Field(
        None, validation_alias=AliasChoices("image_processor_type", "feature_extractor_type")
    )


IGNORED_SETTINGS = {
    "BeitImageProcessor takes them and does nothing with them": ("do_pad", "pad_size"),
    "images are always opened with the channels of the network": ("do_convert_rgb",),
    "arguments of a call, not of an image": ("device", "disable_grouping", "input_data_format", "return_tensors"),
    "the length of a sequence of another kind of model": ("image_seq_length",),
}


def parse(document: bytes, preprocessor: bytes | None) -> tuple[BeitConfig, PretrainedConfig]:
    """Read transformers' config.json and, if there is one, preprocessor_config.json.

    Raises:
        ValueError: They are not of a BEiT in transformers.
    """
    try:
        form = _Form.model_validate_json(document)
        settings = _Preprocessor.model_validate_json(preprocessor) if preprocessor is not None else None
    except ValidationError as error:
        raise InvalidValueError(f"it is not the config of a transformers BEiT: {describe_invalid(error)}") from error
    head = _head(form)
    _check_readable(form, head)
    if settings is not None:
        _check_processor(settings)
    config = BeitConfig(
        img_size=_pair(form.image_size),
        patch_size=_pair(form.patch_size),
        in_chans=form.num_channels,
        num_classes=_num_classes(form) if head == "classify" else 0,
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
    data = _data(config) if settings is None else _stated_data(config, settings)
    return config, PretrainedConfig(head=_record(form, head), data=data, architecture=architecture_of(config))


def dump(config: BeitConfig, pretrained: PretrainedConfig, dtype: str = "float32") -> tuple[str, str]:
    """Write config.json and preprocessor_config.json of the same network, precision and transform.

    Raises:
        ValueError: transformers cannot build this network; says why.
    """
    _check_expressible(config)
    around = pretrained.head.network if isinstance(pretrained.head, Mim | Segment) else None
    hidden = config.hidden_dim
    classes = around.num_classes if isinstance(around, SegmenterConfig) else config.num_classes
    names = label_names(pretrained.head) or ()
    names = names if len(names) == classes else tuple(f"LABEL_{index}" for index in range(classes))
    document: dict[str, Any] = {
        "model_type": "beit",
        "architectures": [_class(config, around)],
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
        "use_mean_pooling": config.norm_after_pooling or around is not None,
        "dtype": dtype,
        **_around(config, around),
    }
    if config.num_classes > 1 and isinstance(pretrained.head, Classify) and pretrained.head.activation == "sigmoid":
        document["problem_type"] = "multi_label_classification"
    if classes:
        document["id2label"] = {str(index): name for index, name in enumerate(names)}
        document["label2id"] = {name: index for index, name in enumerate(names)}
    return json.dumps(document, indent=2) + "\n", json.dumps(_processor(config, pretrained.data), indent=2) + "\n"


def _around(config: BeitConfig, around: MimConfig | SegmenterConfig | None) -> dict[str, Any]:
    """Write the fields of what is around the backbone.

    Raises:
        InvalidValueError: transformers has nothing like it; says why.
    """
    match around:
        case None:
            return {}
        case MimConfig():
            if around.early_layers:
                raise InvalidValueError(
                    "transformers cannot build this network: it has no patch aggregation. Save the backbone "
                    "(create_model(..., num_classes=0)), or all of it with save_pretrained or save_unilm."
                )
            return {"vocab_size": around.vocab_size}
    if around.decoder != "upernet":
        raise InvalidValueError(
            f"transformers cannot build this network: it has no decoder {around.decoder!r}, only 'upernet'. Save it "
            "with save_pretrained or save_unilm."
        )
    return {
        "out_indices": _their_blocks(around.of_depth(config.depth).out_indices or (), config.depth),
        "pool_scales": list(around.pool_scales),
        "use_auxiliary_head": around.has_auxiliary,
        "auxiliary_channels": around.auxiliary_channels or 256,
        "auxiliary_num_convs": around.auxiliary_convs,
    }


def _their_blocks(blocks: Sequence[int], depth: int) -> list[int]:
    """Return the `out_indices` with which transformers reads these blocks: block 0 is 2, and the last one 0."""
    theirs = [(block + 2) % (depth + 1) for block in blocks]
    if theirs != sorted(set(theirs)):
        raise InvalidValueError(
            f"transformers cannot build this network: it reads the blocks {tuple(blocks)} of {depth}, and there blocks "
            "must rise, and the last one can only be read first. Save it with save_pretrained or save_unilm."
        )
    return theirs


def _our_blocks(form: _Form) -> tuple[int, ...]:
    """Return the blocks that transformers reads. A config that names none is of version 4, which left out defaults."""
    theirs = form.out_indices or [3, 5, 7, 11]
    depth = form.num_hidden_layers
    if len(theirs) != 4 or not all(-depth <= index <= depth for index in theirs):
        raise InvalidValueError(
            f"its out_indices are {theirs}; a segmentation model reads four of 0 to {depth}. Set them in its config."
        )
    return tuple((index - 1) % (depth + 1) - 1 for index in theirs)


def _class(config: BeitConfig, around: MimConfig | SegmenterConfig | None) -> str:
    if around is not None:
        return "BeitForMaskedImageModeling" if isinstance(around, MimConfig) else "BeitForSemanticSegmentation"
    return "BeitForImageClassification" if config.num_classes else "BeitModel"


def _processor(config: BeitConfig, data: DataConfig) -> dict[str, Any]:
    """Write the settings of `BeitImageProcessor` that give the same pixels.

    Of `center`, where half a pixel is rounded to even, transformers may crop one pixel beside.
    """
    data = data.fitted_to(config)
    if data.crop_mode == "border":
        raise InvalidValueError(
            "transformers cannot prepare images so: it does not pad to a border. Use save_pretrained."
        )
    height, width = config.img_size
    resized = [math.floor(side / data.crop_pct) for side in (height, width)]
    squashes = data.crop_mode == "squash"
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": {"height": resized[0], "width": resized[1]} if squashes else {"shortest_edge": resized[0]},
        "resample": next(number for number, name in _FILTERS.items() if name == data.interpolation),
        "do_center_crop": not squashes or data.crop_pct < 1,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
        "do_reduce_labels": data.reduce_zero_label,
    }


def _check_readable(form: _Form, head: _HeadName) -> None:
    """Refuse what would load and give other numbers than transformers does."""
    (height, width), (ph, pw) = _pair(form.image_size), _pair(form.patch_size)
    biased = form.use_relative_position_bias or form.use_shared_relative_position_bias
    if biased and height // ph != width // pw:
        raise InvalidValueError(
            "its input is not square, and transformers reads the bias tables of oblong grids transposed."
        )
    if form.problem_type == "regression":
        raise InvalidValueError("it was trained for regression (problem_type), and has no classes to tell apart.")
    if form.quantization_config:
        raise InvalidValueError(
            "its weights are quantised (quantization_config); load it in transformers and dequantise it."
        )
    if form.pruned_heads:
        raise InvalidValueError("attention heads were taken out of it (pruned_heads), which is not built here.")
    if head == "mim" and not form.use_mean_pooling:
        raise InvalidValueError(
            "a masked image model with use_mean_pooling=False is normed twice, which is not built here."
        )


def _check_processor(settings: _Preprocessor) -> None:
    """Refuse the settings of another processor, whose defaults are others."""
    kind = settings.image_processor_type
    if kind is not None and not kind.startswith("Beit"):
        raise InvalidValueError(
            f"its preprocessor is a {kind}, and only BeitImageProcessor is read; save the same settings as a "
            "BeitImageProcessor, or remove the file for that class's defaults."
        )


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
            raise InvalidValueError(f"transformers cannot build this network: {reason}. Save it with save_pretrained.")


def _head(form: _Form) -> _HeadName:
    for name in form.architectures or ():
        if name in _HEADS:
            return _HEADS[name]
    return "classify"


def _record(form: _Form, head: _HeadName) -> Head:
    match head:
        case "mim":
            return Mim(network=MimConfig(vocab_size=form.vocab_size))
        case "segment":
            return Segment(network=_segmenter(form), labels=_labels(form))
        case "maps":
            return Segment(network=None)
    return Classify(num_classes=_num_classes(form), labels=_labels(form), activation=_activation(form))


def _segmenter(form: _Form) -> SegmenterConfig:
    """Describe the heads; there is no dropout in transformers."""
    return SegmenterConfig(
        num_classes=_num_classes(form),
        out_indices=_our_blocks(form),
        pool_scales=tuple(form.pool_scales),
        auxiliary_channels=form.auxiliary_channels if form.use_auxiliary_head else 0,
        auxiliary_convs=form.auxiliary_num_convs,
        decoder_drop_rate=0.0,
    )


def _activation(form: _Form) -> Activation:
    """Decide as transformers' image-classification pipeline does."""
    several = form.problem_type == "multi_label_classification" or _num_classes(form) == 1
    return "sigmoid" if several else "softmax"


def _num_classes(form: _Form) -> int:
    if form.architectures and not set(form.architectures) & _HEADS.keys():
        return 0  # a bare BeitModel
    stated = form.num_labels if form.id2label is None else len(form.id2label)
    return 2 if stated is None else stated  # transformers' default


def _pooling(form: _Form, head: _HeadName) -> GlobalPool:
    return "avg" if form.use_mean_pooling or head == "mim" else "token"


def _labels(form: _Form) -> str | tuple[str, ...] | None:
    if form.id2label is None:
        return None
    if is_misnumbered_22k(form.id2label):
        _logger.warning(
            "The names in id2label are numbered as in another list of ImageNet-22k, wrongly from output 9205 on; "
            "the right ones are used."
        )
        return "imagenet-22k"
    try:
        names = tuple(form.id2label[str(index)] for index in range(len(form.id2label)))
    except KeyError as error:
        raise InvalidValueError(
            f"its id2label has {len(form.id2label)} names but none for output {error.args[0]}; the gap would shift "
            "every later name. Number the names from 0 up."
        ) from error
    if is_ade20k(names):
        return "ade20k"
    # What transformers writes where nobody gave names.
    return None if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def _data(config: BeitConfig) -> DataConfig:
    half = (0.5,) * config.in_chans
    size = (config.in_chans, *config.img_size)
    return DataConfig(input_size=size, mean=half, std=half, crop_pct=1.0, crop_mode="squash")


def _stated_data(config: BeitConfig, settings: _Preprocessor) -> DataConfig:
    """Express the processor in timm's words.

    A resize to both sides is `squash`, one to the shorter side is `center_floor`; whatever it scales by is folded into
    mean and deviation. The numbers are those of transformers' PIL backend to rounding. Its torchvision backend resizes
    tensors: of photographs it differs by at most two of 255 levels with bilinear, bicubic and Lanczos; with nearest it
    takes other pixels, and box and Hamming it has not.
    """
    if not settings.do_resize:
        raise InvalidValueError(
            "its preprocessor does not resize (do_resize), so that inputs have any size; set it to true."
        )
    resized, crop_mode = _resized(settings.size, settings.default_to_square)
    cropped = _cropped(settings, resized, crop_mode)
    resample = 2 if settings.resample is None else settings.resample
    if resample not in _FILTERS:
        raise InvalidValueError(f"its preprocessor has resample={resample}; Pillow's filters are 0 to 5.")
    scale = 255 * settings.rescale_factor if settings.do_rescale else 255.0
    scale = 1.0 if math.isclose(scale, 1, rel_tol=1e-6) else scale
    mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else (0.0, 1.0)
    return DataConfig(
        input_size=(config.in_chans, *cropped),
        mean=_per_channel(mean, config.in_chans, scale),
        std=_per_channel(std, config.in_chans, scale),
        interpolation=_FILTERS[resample],
        crop_pct=_share(cropped, resized),
        crop_mode=crop_mode,
        reduce_zero_label=settings.do_reduce_labels,
    )


def _resized(size: _ProcessorSize, is_square: bool = True) -> tuple[Pair, CropMode]:
    """Return height and width after the resize, with `center_floor` of the shorter side, and how it is cropped."""
    if isinstance(size, int) and not is_square:
        size = {"shortest_edge": size}
    if not isinstance(size, dict):
        return _pair(size), "squash"
    match {name: side for name, side in size.items() if side is not None}:
        case {"height": int(height), "width": int(width), **others} if not others:
            return (height, width), "squash"
        case {"shortest_edge": int(side), **others} if not others:
            return (side, side), "center_floor"
    raise InvalidValueError(
        f"its preprocessor resizes by {', '.join(size)}; height and width are read, or shortest_edge and a centre crop."
    )


def _cropped(settings: _Preprocessor, resized: Pair, crop_mode: CropMode) -> Pair:
    """Return height and width after the centre crop, if there is one."""
    if not settings.do_center_crop:
        if crop_mode == "center_floor":
            raise InvalidValueError(
                "its preprocessor resizes the shorter side and crops nothing; set do_center_crop to true."
            )
        return resized
    crop, _ = _resized(settings.crop_size or 224)
    for side, whole in zip(crop, resized, strict=True):
        if side > whole:
            raise InvalidValueError(
                f"its preprocessor pads {whole} pixels to crop_size {side}; only a smaller crop is read."
            )
        if crop_mode == "squash" and round((whole - side) / 2) != (whole - side) // 2:
            raise InvalidValueError(
                f"its preprocessor crops {whole} pixels to {side}, and half a pixel is rounded otherwise here than in "
                "transformers; make the difference even."
            )
    return crop


def _share(cropped: Pair, resized: Pair) -> float:
    """Return the `crop_pct` from which timm computes these sizes before the crop: `floor(side / crop_pct)`."""
    for share in (cropped[0] / resized[0], math.nextafter(cropped[0] / resized[0], 0)):
        if all(math.floor(side / share) == whole for side, whole in zip(cropped, resized, strict=True)):
            return share
    raise InvalidValueError(
        f"its preprocessor crops {resized} to {cropped}; only the same share of both sides is read."
    )


def _per_channel(statistics: float | list[float], channels: int, scale: float) -> tuple[float, ...]:
    values = statistics if isinstance(statistics, list) else [statistics] * channels
    return tuple(value / scale for value in values)


def _ratio(hidden: int, width: int) -> float:
    """Return the ratio from which `int(width * ratio)` gives the hidden width back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _pair(size: int | Pair) -> Pair:
    return (size, size) if isinstance(size, int) else size
