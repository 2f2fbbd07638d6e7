"""What a name stands for that is in no table: a folder or file on this machine, or a repository on the hub."""

import logging
from dataclasses import replace
from pathlib import Path

from beitzoo.errors import MissingFileError
from beitzoo.files import full_path
from beitzoo.weights import checkpoint
from beitzoo.weights.checkpoint import CheckpointError
from beitzoo.weights.identify import identify
from beitzoo.zoo.checkpoints import DataConfig, HubFile, LocalFile, PretrainedConfig
from beitzoo.zoo.registry import Entry, UnknownModelError, architecture_of, find

# `folder` (pydantic) and `hub` (the hub's client) are imported by the functions that need them: together they cost as
# much time as all the rest of beitzoo, and a model is often made without them.

_logger = logging.getLogger(__name__)

_FOLDER = "local-dir:"
_HUB = ("hf-hub:", "hf_hub:")


def look_elsewhere(name: str, cache_dir: Path | None = None) -> Entry | None:
    """Say what a name that is in no table stands for; None if it looks like one of the table, misspelt.

    Args:
        name: A path: a folder in the form of timm or transformers, the folder of a run, whose best checkpoint is meant,
            or a checkpoint file. `local-dir:PATH` is a path in any case, `hf-hub:owner/name@revision` a repository.
        cache_dir: Where downloads are kept; the hub's own cache if None.

    Raises:
        UnknownModelError: The path does not exist.
        MissingFileError: No such folder, or no model in it.
        CheckpointError: The folder or file holds no BEiT.
        DownloadError: The repository cannot be had.
    """
    if name.startswith(_HUB):
        return _look_up_on_hub(name, cache_dir)
    if name.startswith(_FOLDER):
        return _look_up_path(full_path(name.removeprefix(_FOLDER)))
    path = full_path(name)
    if path.exists():
        return _look_up_path(path)
    if {"/", "\\", ":", "~"} & set(name):
        raise UnknownModelError(
            f"There is no file or folder {name!r}, and no model of that name. A repository on the hub is given as "
            f"'hf-hub:{name}'; `beitzoo.list_models()` or `beitzoo list` shows all models."
        )
    return None


def find_weights(path: Path) -> Path:
    """Return the file with the weights: this one, or the one in this folder, or in the best checkpoint of this run.

    Raises:
        MissingFileError: It is a folder without weights.
    """
    if not path.is_dir():
        return path
    from beitzoo.weights import folder

    sources = folder.sources_in(folder.model_folder(path))
    if not sources:
        raise MissingFileError(f"There are no weights in {path}; a model folder has a {folder.WEIGHTS[0]}.")
    return sources[0].path


def _look_up_path(path: Path) -> Entry:
    from beitzoo.weights import folder

    if not path.is_file():
        return folder.read(folder.model_folder(path))
    if (path.parent / folder.CONFIG).is_file():
        entry = folder.read(path.parent)
        assert entry.pretrained is not None
        return replace(entry, name=str(path), pretrained=replace(entry.pretrained, sources=(LocalFile(path),)))
    return _look_up_file(path)


def _look_up_file(path: Path) -> Entry:
    """Tell the network of a checkpoint file from the shapes of its tensors.

    Raises:
        CheckpointError: They do not tell.
    """
    shapes, layout = checkpoint.read_shapes(path)
    found = identify(shapes)
    if found is None:
        raise CheckpointError(
            f"{path}: its shapes do not tell which network it is of. Name the model, with checkpoint_path={str(path)!r}"
        )
    config, head = found
    if layout != "unilm":
        config = replace(config, norm_eps=1e-12)  # transformers' default, as in all its released models
    architecture = architecture_of(config)
    row = find(architecture).pretrained if architecture else None
    data = (row.data if row else DataConfig()).fitted_to(config)
    _logger.warning(
        "%s says nothing about its images: they are prepared as for %s (mean %s, std %s). Give a model's name and "
        "checkpoint_path=%r for another way.",
        *(path, architecture or "a BEiT", data.mean, data.std, str(path)),
    )
    return Entry(
        str(path),
        config,
        PretrainedConfig(sources=(LocalFile(path),), head=head, data=data, architecture=architecture),
    )


def _look_up_on_hub(name: str, cache_dir: Path | None) -> Entry:
    from beitzoo.weights import folder, hub
    from beitzoo.weights.checksums import AbsentError

    repo_id, _, revision = name.partition(":")[2].partition("@")

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
