"""The one place where a name, a network, its weights and its head meet."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from beitzoo.errors import InvalidOptionError, UnsupportedError, check
from beitzoo.files import full_path
from beitzoo.models.beit import Beit
from beitzoo.models.features import BeitFeatures
from beitzoo.models.mim import MaskedImageModel
from beitzoo.models.random_tokenizer import RandomTokenizer
from beitzoo.models.segmentation import Segmenter
from beitzoo.models.tokenizers import Dvae, Vqkd
from beitzoo.weights import adapt, checkpoint, layouts
from beitzoo.weights.adapt import Plan, State
from beitzoo.weights.names import find_weights, look_elsewhere
from beitzoo.zoo.checkpoints import Classify, LocalFile, Mim, PretrainedConfig, Segment
from beitzoo.zoo.networks import (
    BeitConfig,
    DvaeConfig,
    HeadConfig,
    MimConfig,
    Pair,
    RandomConfig,
    SegmenterConfig,
    VqkdConfig,
)
from beitzoo.zoo.registry import DEFAULT_MODEL, Entry, UnknownModelError, find
from beitzoo.zoo.tokenizers import (
    TokenizerConfig,
    TokenizerEntry,
    TokenizerFile,
    find_tokenizer,
    is_tokenizer,
    override_tokenizer,
)

# `sources` (the hub's client) is imported by the function that needs it: it costs as much time as all the rest of
# beitzoo, and a model is often made without it.

_FEATURE_OPTIONS = ("out_indices", "norm", "output_fmt", "pyramid")
# Switches of timm's `create_model` for networks of other kinds; off, they change nothing.
_SWITCHES = ("scriptable", "exportable", "no_jit")

_HEADS: dict[object, type[Mim | Segment]] = {"mim": Mim, "segment": Segment}

Tokenizer = Dvae | Vqkd | RandomTokenizer
Model = Beit | MaskedImageModel | Segmenter


@overload
def create_model(
    model_name: str | Path = ...,
    pretrained: bool = ...,
    *,
    features_only: Literal[False] = ...,
    checkpoint_path: str | Path | None = ...,
    cache_dir: str | Path | None = ...,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | None = ...,
    **overrides: Any,
) -> Beit: ...


@overload
def create_model(
    model_name: str | Path = ...,
    pretrained: bool = ...,
    *,
    features_only: Literal[True],
    checkpoint_path: str | Path | None = ...,
    cache_dir: str | Path | None = ...,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | None = ...,
    **overrides: Any,
) -> BeitFeatures: ...


@torch.inference_mode(False)  # what is made under inference mode could never be trained
def create_model(
    model_name: str | Path = DEFAULT_MODEL,
    pretrained: bool = False,
    *,
    features_only: bool = False,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Model | BeitFeatures:
    """Create a model by name, in training mode, as timm does.

    Args:
        model_name: `architecture`, `architecture.tag`, the path of a folder, run or checkpoint file, or a repository
            `hf-hub:owner/name@revision`; see `look_up`. Without a name, the small model of the package.
        pretrained: Load the weights of the tag; otherwise they are random.
        features_only: Return feature maps of chosen blocks; `out_indices`, `norm`, `output_fmt` and `pyramid` are
            then options, see `BeitFeatures`.
        checkpoint_path: Load this file (or folder) of the same network instead, in any format and layout. Labels
            and transform stay those of the name. Of averaged and plain weights in one file the averaged are taken, as
            in timm; `use_ema=False` takes the plain ones.
        cache_dir: Where downloads are kept; the hub's own cache if None.
        device: Where the parameters live; PyTorch's default device if None.
        dtype: Of the parameters; that of the weights, or float32, if None.
        **overrides: Fields of `BeitConfig`, in timm's spellings. A loaded model is fitted to another
            `img_size`, `patch_size`, `in_chans`, `num_classes` (a fresh head; 0 for none) or `global_pool`.
            A checkpoint of masked image modelling is a `MaskedImageModel`, with the fields of `MimConfig` too; with
            `num_classes=0` it is the network as pretrained, and with N classes it is prepared for fine-tuning as
            unilm does (shared bias table copied to the blocks, fresh `fc_norm` and head).
            `head="mim"` makes a `MaskedImageModel` to pretrain of any architecture: with the fields and the head of
            its released checkpoint of masked image modelling, if there is one (BEiT v2's has patch aggregation), else
            with BEiT's.
            A checkpoint of segmentation is a `Segmenter`, with the fields of `SegmenterConfig` too; with
            `num_classes=N` its classifiers are fresh, with 0 it is the backbone. `head="segment"` and `num_classes=N`
            make a `Segmenter` of any other, with fresh heads around its backbone.

    Raises:
        UnknownModelError: The name is unknown; the closest are named.
        TypeError: An override is unknown.
        ValueError: An override is out of range, or the weights are of another network.
        NotImplementedError: There is no way from the checkpoint's head to the one that was asked for.
        DownloadError: The weights cannot be had.
    """
    directory = None if cache_dir is None else full_path(cache_dir)
    device = torch.get_default_device() if device is None else device
    use_ema = _check_use_ema(overrides.pop("use_ema", None))
    overrides = {name: value for name, value in overrides.items() if name not in _SWITCHES or value}
    options = _take_feature_options(overrides) if features_only else {}
    head = _check_head(overrides.pop("head", None))
    # Heads for pixels may be put around any checkpoint, so that an architecture's first one is as good as any.
    entry = look_up(model_name, directory, head if head is Mim else None)
    known = entry.pretrained or _untrained(entry)
    plan = adapt.make_plan(entry.name, entry.config, known.head, overrides, head)
    predicts_tokens = isinstance(plan.wanted_head, MimConfig)
    if pretrained and not checkpoint_path and predicts_tokens and not isinstance(known.head, Mim):
        raise UnsupportedError(
            f"{entry.name} was not trained to predict visual tokens: its head, mask token and shared bias table would "
            "be new, and each of its blocks has a bias table of its own. Give pretrained=False to start from random "
            "values, or name a checkpoint of masked image modelling (`beitzoo list --pretrained '*mim*'`)."
        )
    if not (checkpoint_path or pretrained):
        model = _initialise(plan, device)
        model.backbone.pretrained = known.without_weights(
            plan.head if predicts_tokens else model.backbone.pretrained.head
        )
    else:
        path, is_cached = _weights(entry, checkpoint_path, directory)
        tensors = checkpoint.read(path, map_file=is_cached, use_ema=use_ema)
        state = plan.convert(tensors)
        if checkpoint_path:
            plan = adapt.fit_to_file(plan, state)
        model, options = _load(plan, state, path, options if features_only else None)
        model.backbone.pretrained = replace(known, head=plan.head)
        _fit(model.backbone, plan.wanted)
        if isinstance(plan.wanted_head, SegmenterConfig) and plan.wanted_head != plan.loaded_head:
            assert isinstance(model, Segmenter)
            model.reset_classifier(plan.wanted_head.num_classes)
    result = BeitFeatures(model.backbone, **options) if features_only else model
    return result.to(device=device, dtype=dtype)


def look_up(name: str | Path, cache_dir: Path | None = None, head: type[Mim | Segment] | None = None) -> Entry:
    """Say what a name stands for, wherever it points: the one way from a name to an entry.

    Args:
        name: `architecture`, `architecture.tag`, or a repository that a row of the table has as a source
            (`microsoft/beit-base-patch16-224`); else a path or `hf-hub:owner/name@revision`, see `look_elsewhere`.
        cache_dir: Where downloads are kept; the hub's own cache if None.
        head: Of the checkpoint that an architecture alone stands for; its first one if None.

    Raises:
        UnknownModelError: The name is unknown; the closest are named.
        UserError: What it points to holds no BEiT, or cannot be had.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise InvalidOptionError(f"Got {name!r} as a model; give a name such as {DEFAULT_MODEL!r}, or a path.")
    name = str(name)
    try:
        return find(name, head)
    except UnknownModelError:
        if is_tokenizer(name):
            raise UnknownModelError(
                f"{name!r} is an image tokenizer, not a model; make it with create_tokenizer({name!r})."
            ) from None
        entry = look_elsewhere(name, cache_dir)
        if entry is None:
            raise
        return entry


def _check_head(head: object) -> type[Mim | Segment] | None:
    if head is not None and head not in _HEADS:
        raise InvalidOptionError(
            f"head={head!r}; it must be 'mim' (to predict visual tokens), 'segment' (to name pixels) or be left out."
        )
    return _HEADS.get(head)


def _check_use_ema(use_ema: object) -> bool | None:
    if use_ema is None or isinstance(use_ema, bool):
        return use_ema
    raise InvalidOptionError(f"use_ema={use_ema!r}; it must be True (averaged weights), False (plain ones) or None.")


def _untrained(entry: Entry) -> PretrainedConfig:
    """Describe a network that has no checkpoint."""
    return PretrainedConfig(head=Classify(num_classes=entry.config.num_classes), architecture=entry.name)


def _take_feature_options(overrides: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a feature extractor out of the overrides; it has no head.

    Of timm's ways to get maps out of a network, there is the one that timm uses for a BEiT.
    """
    overrides["num_classes"] = 0
    feature_cls = overrides.pop("feature_cls", None)
    if feature_cls not in (None, "getter"):
        raise InvalidOptionError(
            f"feature_cls={feature_cls!r}; maps of a BEiT come from forward_intermediates, which timm calls 'getter'. "
            "Leave it out, or for the output of any module use torchvision's create_feature_extractor."
        )
    return {name: overrides.pop(name) for name in _FEATURE_OPTIONS if name in overrides}


def _weights(entry: Entry, checkpoint_path: str | Path | None, cache_dir: Path | None) -> tuple[Path, bool]:
    """Return the file of the weights, and whether it is of a cache, where nobody writes to it."""
    if checkpoint_path:
        return find_weights(full_path(checkpoint_path)), False
    sources = entry.pretrained.sources if entry.pretrained else ()
    if not sources:
        raise UnknownModelError(f"{entry.name!r} has no pretrained weights; create it with pretrained=False.")
    from beitzoo.weights.sources import fetch

    return fetch(sources, cache_dir), not any(isinstance(source, LocalFile) for source in sources)


def build(config: BeitConfig, head: HeadConfig | None) -> Model:
    """Build a network without values, and around it what was asked for."""
    with torch.device("meta"):
        match head:
            case None:
                return Beit(config)
            case MimConfig():
                return MaskedImageModel(Beit(config), head)
            case SegmenterConfig():
                return Segmenter(Beit(config), head)


def _initialise(plan: Plan, device: torch.device | str) -> Model:
    model = build(plan.wanted, plan.wanted_head)
    model.to_empty(device=device)
    model.init_weights()
    return model


def _load(plan: Plan, state: State, origin: Path, options: dict[str, Any] | None) -> tuple[Model, dict[str, Any]]:
    """Build the network of the file and load it strictly; heads for pixels that no file has yet are fresh.

    Of a feature extractor, which is given by its `options`, the parts that it does not use need not be in the file;
    they are dropped first. Its options for what is left are returned.
    """
    model = build(plan.loaded, plan.loaded_head)
    if isinstance(model, Segmenter) and not plan.has_heads and not any(map(layouts.SEGMENT_HEAD.match, state)):
        checkpoint.load(model.backbone, layouts.strip_backbone(state), str(origin), plan.loaded)
        _make_heads(model)
        return model, {}
    if options is None:
        checkpoint.load(model, state, str(origin), plan.loaded)
        return model, {}
    names = model.state_dict().keys()
    chosen = BeitFeatures(model.backbone, **options).out_indices
    unused = names - model.state_dict().keys()
    used = {name: tensor for name, tensor in state.items() if name not in unused}
    checkpoint.load(model, used, str(origin), plan.loaded)
    return model, {**options, "out_indices": chosen}


def _make_heads(model: Segmenter) -> None:
    """Give the parts around a loaded backbone values, where and as precise as its own."""
    like = model.backbone.cls_token
    for name, part in model.named_children():
        if name != "backbone":
            part.to(dtype=like.dtype).to_empty(device=like.device)
    model.init_heads()


def _fit(model: Beit, wanted: BeitConfig) -> None:
    """Change a loaded network to the size, channels, pooling and classes that were asked for."""
    model.set_input_size(wanted.img_size, wanted.patch_size)
    if wanted.in_chans != model.config.in_chans:
        model.set_in_chans(wanted.in_chans)
    if wanted.global_pool != model.config.global_pool:
        model.set_global_pool(wanted.global_pool)
    if wanted.num_classes != model.config.num_classes:
        model.reset_classifier(wanted.num_classes)


@torch.inference_mode(False)
def create_tokenizer(
    name: str | Path,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | Sequence[str | Path] | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Tokenizer:
    """Create an image tokenizer, with random values or those of a checkpoint, in evaluation mode.

    Args:
        name: A name of the table (`vqkd_encoder_base_decoder_3x768x12.clip`), a folder that `save_tokenizer` made, or
            that of a run of `beitzoo train-tokenizer`, whose best checkpoint is meant.
        pretrained: Load the weights; downloads are verified and kept. A random tokenizer has none: its values follow
            from its seed.
        checkpoint_path: Load this file (or folder) of the same tokenizer instead, in our form or the original's; of
            OpenAI's dVAE the pair of its files, encoder and decoder.
        cache_dir: Where downloads are kept; the hub's own cache if None.
        device: Where the parameters live; PyTorch's default device if None.
        dtype: Of the parameters; that of the weights, or float32, if None.
        **overrides: Fields of its record: `img_size`, `in_chans`, `vocab_size`, `code_dim`, `teacher_dim`, ….
            Loaded weights are fitted to another `img_size`; all else must be as in the file.

    Raises:
        UnknownModelError: The name is unknown, or there are no weights of it.
        InvalidOptionError: An override is unknown.
        InvalidValueError: An override is out of range.
        CheckpointError: The weights are of another tokenizer.
        DownloadError: The weights cannot be had.
    """
    from beitzoo.weights import tokenizers

    entry = look_up_tokenizer(name)
    device = torch.get_default_device() if device is None else device
    wanted = override_tokenizer(entry.config, overrides)
    if not checkpoint_path and (not pretrained or (isinstance(wanted, RandomConfig) and not entry.files)):
        return _build_tokenizer(wanted).eval().to(device=device, dtype=dtype)
    if checkpoint_path:
        files = _given_files(checkpoint_path, entry.files)
    elif not entry.files:
        raise UnknownModelError(
            f"{entry.name!r} has no pretrained weights: train it with `beitzoo train-tokenizer` and name the folder of "
            "that run, or create it with pretrained=False."
        )
    else:
        files = entry.files
    # Weights are loaded at the size that they are of, and fitted then; a VQ-KD has positions.
    stored = override_tokenizer(wanted, {"img_size": _img_size(entry.config)})
    with torch.device("meta"):
        model = _build_tokenizer(stored)
    tensors = tokenizers.read(files, None if cache_dir is None else full_path(cache_dir))
    checkpoint.load(model, tensors, str(checkpoint_path or entry.name))
    model.set_input_size(_img_size(wanted))
    return model.eval().to(device=device, dtype=dtype)


def _given_files(
    given: str | Path | Sequence[str | Path], released: tuple[TokenizerFile, ...]
) -> tuple[TokenizerFile, ...]:
    """Describe files of the user's own: one of a whole tokenizer, or as many as were released."""
    paths = [given] if isinstance(given, str | Path) else list(given)
    parts = [None] if len(paths) == 1 else [file.part for file in released]
    if len(paths) != len(parts):
        raise InvalidOptionError(
            f"checkpoint_path has {len(paths)} files; give one of the whole tokenizer"
            + (f", or its {' and '.join(map(str, parts))}." if len(released) > 1 else ".")
        )
    return tuple(
        TokenizerFile(sources=(LocalFile(find_weights(full_path(path))),), part=part)
        for path, part in zip(paths, parts, strict=True)
    )


def look_up_tokenizer(name: str | Path) -> TokenizerEntry:
    """Say what the name of a tokenizer stands for: an entry of the table, a folder, or the folder of a run.

    Raises:
        UnknownModelError: The name is unknown; the closest are named.
        UserError: The folder holds no tokenizer.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise InvalidOptionError(
            f"Got {name!r} as a tokenizer; give a name such as 'dvae_patch8_112.dalle', or a path."
        )
    try:
        return find_tokenizer(str(name))
    except UnknownModelError:
        path = full_path(str(name).removeprefix("local-dir:"))
        if not path.is_dir():
            raise
    from beitzoo.weights import tokenizers

    return tokenizers.read_folder(path)


def check_tokenizer(model: MaskedImageModel, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that does not give one code of the model's vocabulary for each of its patches.

    Raises:
        InvalidValueError: Grids or vocabularies differ; says how, and what to do.
    """
    ours, theirs = model.backbone.config.grid_size, tokenizer.grid_size
    check(
        ours == theirs,
        f"The model has {ours[0]} x {ours[1]} patches, and the tokenizer makes {theirs[0]} x {theirs[1]} tokens of an "
        "image; there must be one for each patch. Choose another tokenizer or model, or another img_size of one.",
    )
    head = model.pretrained.head
    named = f" {head.tokenizer!r}" if isinstance(head, Mim) and head.tokenizer else ""
    check(
        model.config.vocab_size == tokenizer.vocab_size,
        f"The model predicts {model.config.vocab_size:,} visual tokens, and the tokenizer has "
        f"{tokenizer.vocab_size:,}; they must be the same. Choose the tokenizer of its pretraining{named}, or make the "
        f"model with vocab_size={tokenizer.vocab_size}.",
    )


def names_tokenizer(name: str) -> bool:
    """Tell whether a name is that of an image tokenizer: of the table, or a folder that holds one."""
    if is_tokenizer(name):
        return True
    from beitzoo.weights import folder

    path = folder.model_folder(full_path(name.removeprefix("local-dir:"))) / folder.CONFIG
    return path.is_file() and folder.is_tokenizer(folder.read_json(path))


def _build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    match config:
        case DvaeConfig():
            return Dvae(config)
        case VqkdConfig():
            return Vqkd(config)
        case RandomConfig():
            return RandomTokenizer(config)


def _img_size(config: TokenizerConfig) -> Pair:
    return config.encoder.img_size if isinstance(config, VqkdConfig) else config.img_size
