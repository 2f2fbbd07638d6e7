"""The one place where a name, a network, its weights and its head meet."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from beitzoo.files import write_text
from beitzoo.models.beit import Beit
from beitzoo.models.features import BeitFeatures
from beitzoo.models.position import relative_position_index, table_rows
from beitzoo.weights import checkpoint, layouts
from beitzoo.weights.checksums import AbsentError
from beitzoo.zoo.checkpoints import Classify, HubFile, Mim, Segment, Source
from beitzoo.zoo.networks import BeitConfig, override
from beitzoo.zoo.registry import DEFAULT_MODEL, Entry, UnknownModelError, find

# `folder` (pydantic), `hub` and `sources` (the hub's client) are imported by the functions that need them: together
# they cost as much time as all the rest of beitzoo, and a model is often made without them.

_logger = logging.getLogger(__name__)

_FEATURE_OPTIONS = ("out_indices", "norm", "output_fmt", "pyramid")


@overload
def create_model(
    model_name: str = ...,
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
    model_name: str = ...,
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
    model_name: str = DEFAULT_MODEL,
    pretrained: bool = False,
    *,
    features_only: bool = False,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Beit | BeitFeatures:
    """Create a model by name, in training mode, as timm does.

    Args:
        model_name: `architecture`, `architecture.tag`, or a folder in the form of timm or transformers:
            `local-dir:PATH` or `hf-hub:owner/name@revision`. Without a name, the small model of the package.
        pretrained: Load the weights of the tag; otherwise they are random.
        features_only: Return feature maps of chosen blocks; `out_indices`, `norm`, `output_fmt` and `pyramid` are
            then options, see `BeitFeatures`.
        checkpoint_path: Load this file of the same network instead, in any format and layout. Labels and transform
            stay those of the name.
        cache_dir: Where downloads are kept; the hub's own cache if None.
        device: Where the parameters live; PyTorch's default device if None.
        dtype: Of the parameters; that of the weights, or float32, if None.
        **overrides: Fields of `BeitConfig`, in timm's spellings. A loaded model is fitted to another
            `img_size`, `patch_size`, `in_chans`, `num_classes` (a fresh head; 0 for none) or `global_pool`.
            A masked image model with `num_classes=0` is the network as pretrained; with N classes it is prepared
            for fine-tuning as unilm does (shared bias table copied to the blocks, fresh `fc_norm` and head).

    Raises:
        UnknownModelError: The name is unknown; the closest are named.
        TypeError: An override is unknown; the closest is named.
        ValueError: An override is out of range, or the weights are of another network.
        NotImplementedError: The checkpoint's own head is not for classes, and no `num_classes` was given.
        DownloadError: The weights cannot be had.
    """
    directory = None if cache_dir is None else Path(cache_dir).expanduser()
    device = torch.get_default_device() if device is None else device
    entry = look_up(model_name, directory)
    options = {name: overrides.pop(name) for name in _FEATURE_OPTIONS if features_only and name in overrides}
    if features_only:
        overrides["num_classes"] = 0
    stored = _config_of_use(entry, overrides)
    if checkpoint_path is not None:
        model = _load(Path(checkpoint_path).expanduser(), entry, stored, overrides, own=True)
    elif pretrained:
        from beitzoo.weights import sources

        model = _load(sources.fetch(_sources(entry), directory), entry, stored, overrides)
    else:
        model = _initialise(override(stored, **overrides), device)
        model.pretrained = entry.pretrained or model.pretrained
    result = BeitFeatures(model, **options) if features_only else model
    return result.to(device=device, dtype=dtype)


def save_pretrained(model: Beit, directory: str | Path) -> None:
    """Save weights and config to a folder that `create_model('local-dir:...')` reads, here and in timm.

    What timm would read as something else it refuses ("Unknown model"), and a warning says why: a mask token, a
    larger epsilon, and the few oblong grids whose bias tables it would scramble.
    """
    from beitzoo.weights import folder

    _check_whole(model)
    config = folder.timm_form.dump(model.config, model.pretrained)
    checkpoint.save(model.state_dict(), Path(directory) / folder.WEIGHTS[0])
    write_text(Path(directory) / folder.CONFIG, config)


def save_transformers(model: Beit, directory: str | Path) -> None:
    """Save to a folder that transformers loads as `BeitForImageClassification`, or without a head as `BeitModel`.

    Raises:
        ValueError: transformers cannot build this network; says why.
    """
    from beitzoo.weights import folder

    _check_whole(model)
    config, preprocessor = folder.transformers_form.dump(model.config, model.pretrained)
    tensors = layouts.to_transformers(model.state_dict(), prefix="beit." if model.num_classes else "")
    checkpoint.save(tensors, Path(directory) / folder.WEIGHTS[0])
    write_text(Path(directory) / folder.CONFIG, config)
    write_text(Path(directory) / folder.PREPROCESSOR, preprocessor)


def save_unilm(model: Beit, path: str | Path) -> None:
    """Save to a `.pth` file with the key `model`, as the original's scripts load it."""
    _check_whole(model)
    index = relative_position_index(model.config.grid_size, torch.device("cpu"))
    checkpoint.save_pickle({"model": layouts.to_unilm(model.state_dict(), index)}, Path(path))


def _check_whole(model: Beit) -> None:
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        raise ValueError(
            "This backbone has lost its norm (features_only, prune_intermediate_layers); save the model itself."
        )


def look_up(name: str, cache_dir: Path | None = None) -> Entry:
    """Say what a name stands for, wherever it points; names and errors are those of `create_model`."""
    if name.startswith("local-dir:"):
        from beitzoo.weights import folder

        return folder.read(Path(name.removeprefix("local-dir:")).expanduser())
    if name.startswith("hf-hub:"):
        return _look_up_on_hub(name, cache_dir)
    if {"/", "\\", ":"} & set(name):
        raise UnknownModelError(
            f"{name!r} is no model name; a folder is given as 'local-dir:{name}', a repository as 'hf-hub:{name}'."
        )
    return find(name)


def _look_up_on_hub(name: str, cache_dir: Path | None) -> Entry:
    from beitzoo.weights import folder, hub

    repo_id, _, revision = name.removeprefix("hf-hub:").partition("@")

    def file(filename: str) -> HubFile:
        return HubFile(repo_id, filename, revision or None)

    path = hub.fetch(file(folder.CONFIG), cache_dir)
    revision = hub.commit_of(path) or revision  # all files of one load are of one commit
    config, preprocessor = folder.read_json(path), None
    if folder.needs_preprocessor(config):
        try:
            preprocessor = folder.read_json(hub.fetch(file(folder.PREPROCESSOR), cache_dir))
        except AbsentError:
            _logger.info("%s says nothing about its images; transformers' defaults are used.", name)
    return folder.parse(name, config, preprocessor, tuple(file(weights) for weights in folder.WEIGHTS))


def _config_of_use(entry: Entry, overrides: Mapping[str, Any]) -> BeitConfig:
    """Return the network of a checkpoint for the use it is asked for: its own, or as a start for fine-tuning."""
    head = Classify() if entry.pretrained is None else entry.pretrained.head
    classes = overrides.get("num_classes")
    if isinstance(head, Classify):
        return entry.config
    if classes is None:
        job = "visual tokens" if isinstance(head, Mim) else "segmentation"
        raise NotImplementedError(
            f"{entry.name} was trained with a head for {job}, which is not built here. Give "
            "num_classes=0 for its features, num_classes=N for a classifier to fine-tune, or features_only=True for "
            "maps."
        )
    return _for_finetuning(entry.config) if isinstance(head, Mim) and classes else entry.config


def _for_finetuning(config: BeitConfig) -> BeitConfig:
    """Describe the network into which `layouts.for_finetuning` turns a pretrained one."""
    return replace(
        config,
        use_rel_pos_bias=config.use_rel_pos_bias or config.use_shared_rel_pos_bias,
        use_shared_rel_pos_bias=False,
        use_fc_norm=True,
        use_mask_token=False,
    )


def _sources(entry: Entry) -> tuple[Source, ...]:
    if entry.pretrained is None:
        raise UnknownModelError(f"{entry.name!r} has no pretrained weights; create it with pretrained=False.")
    return entry.pretrained.sources


def _initialise(config: BeitConfig, device: torch.device | str) -> Beit:
    with torch.device("meta"):
        model = Beit(config)
    model.to_empty(device=device)
    model.init_weights()
    return model


def _load(path: Path, entry: Entry, stored: BeitConfig, overrides: Mapping[str, Any], own: bool = False) -> Beit:
    """Build the network of the file, load it strictly, then fit it to what was asked for.

    A file of the user's `own` need not have the classes, channels and size of the row it is loaded by.
    """
    state = _state_for(stored, entry, checkpoint.read(path))
    if own:
        stored = _as_in_file(state, stored, overrides)
    wanted = override(stored, **overrides)
    with torch.device("meta"):
        model = Beit(
            replace(
                wanted,
                img_size=stored.img_size,
                patch_size=stored.patch_size,
                in_chans=stored.in_chans,
                num_classes=stored.num_classes,
                global_pool=stored.global_pool,
            )
        )
    checkpoint.load(model, state, origin=str(path))
    model.pretrained = entry.pretrained or model.pretrained
    if (wanted.img_size, wanted.patch_size) != (stored.img_size, stored.patch_size):
        model.set_input_size(wanted.img_size, wanted.patch_size)
    if wanted.in_chans != stored.in_chans:
        model.set_in_chans(wanted.in_chans)
    if wanted.global_pool != stored.global_pool:
        model.set_global_pool(wanted.global_pool)
    if wanted.num_classes != stored.num_classes:
        model.reset_classifier(wanted.num_classes)
    return model


def _as_in_file(state: Mapping[str, Tensor], config: BeitConfig, overrides: Mapping[str, Any]) -> BeitConfig:
    """Correct a row's classes, channels and size by what the shapes in a file say."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if len(shapes.get("head.weight", ())) == 2 and config.num_classes:
        config = replace(config, num_classes=shapes["head.weight"][0])
    elif "head.weight" not in shapes and overrides.get("num_classes") is not None:
        config = replace(config, num_classes=0)  # a backbone; what head it gets was said
    if len(shapes.get("patch_embed.proj.weight", ())) == 4:
        config = replace(config, in_chans=shapes["patch_embed.proj.weight"][1])
    # A table's length does not say the sides of its grid, so only a size that was asked for is tried.
    wanted = override(config, **overrides)
    tables = {shape[0] for name, shape in shapes.items() if name.endswith("relative_position_bias_table")}
    if tables == {table_rows(wanted.grid_size)} or shapes.get("pos_embed", ())[1:2] == (wanted.num_tokens,):
        config = replace(config, img_size=wanted.img_size, patch_size=wanted.patch_size)
    return config


def _state_for(stored: BeitConfig, entry: Entry, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out of a file what its row says is of another head, and add what is meant to be fresh."""
    head = Classify() if entry.pretrained is None else entry.pretrained.head
    state = layouts.without_head(state, head)
    if isinstance(head, Mim) and stored != entry.config:
        return layouts.for_finetuning(state)
    if isinstance(head, Segment) and stored.norm_after_pooling and "fc_norm.weight" not in state:
        return layouts.with_fresh_norm(state)
    return state
