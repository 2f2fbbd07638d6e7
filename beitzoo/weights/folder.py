"""A model's folder, here or on the hub: what its JSON says, in timm's form or in that of transformers."""

from dataclasses import replace
from pathlib import Path

from beitzoo.errors import FileAccessError, InvalidValueError, MissingFileError
from beitzoo.weights import timm_form, transformers_form
from beitzoo.weights.checkpoint import CheckpointError
from beitzoo.zoo.checkpoints import LocalFile, Source
from beitzoo.zoo.networks import BeitConfig
from beitzoo.zoo.registry import Entry

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

# Label lists of 21,841 classes with descriptions are the longest configs in the wild, 1.7 MB.
_LONGEST = 8 * 2**20


def model_folder(directory: Path) -> Path:
    """Return the folder of the model: this one or, of a run, that of its best checkpoint."""
    best = directory / "best"
    return best if (best / CONFIG).is_file() and not (directory / CONFIG).is_file() else directory


def sources_in(directory: Path) -> tuple[LocalFile, ...]:
    """Return the files of weights in a folder, in the order in which they are preferred."""
    return tuple(LocalFile(directory / name) for name in WEIGHTS if (directory / name).is_file())


def read(directory: Path) -> Entry:
    """Read what a folder says about its model: the network, the transform, and where its weights are.

    Raises:
        MissingFileError: No such folder, or no config.json in it.
        CheckpointError: The JSON describes no BEiT.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise MissingFileError(f"There is no {path}; a model folder has a {CONFIG} and a {WEIGHTS[0]}.")
    preprocessor = directory / PREPROCESSOR
    return parse(
        f"local-dir:{directory}",
        read_json(path),
        read_json(preprocessor) if preprocessor.is_file() else None,
        sources_in(directory) or (LocalFile(directory / WEIGHTS[0]),),
    )


def parse(name: str, config: bytes, preprocessor: bytes | None, sources: tuple[Source, ...]) -> Entry:
    """Make the entry of a folder from its files; what they say about other files or places is not used.

    Raises:
        CheckpointError: The JSON describes no BEiT, or one beyond all bounds.
    """
    if is_tokenizer(config):
        raise CheckpointError(f"{name} is an image tokenizer, not a model; make it with create_tokenizer.")
    form = transformers_form if needs_preprocessor(config) else timm_form
    try:
        network, pretrained = form.parse(config, preprocessor)
        check_bounds(network)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}/{CONFIG}: {error}") from error
    return Entry(name, network, replace(pretrained, sources=sources))


def needs_preprocessor(config: bytes) -> bool:
    """Tell whether the transform is in a second file, as in transformers' form."""
    return b'"model_type"' in config


def is_tokenizer(config: bytes) -> bool:
    """Tell whether this is the config of an image tokenizer, as `save_tokenizer` writes it."""
    return b'"tokenizer_kind"' in config


def read_json(path: Path) -> bytes:
    """Read a document of a folder, unless it is longer than any model's.

    Raises:
        CheckpointError: It is too long.
        FileAccessError: It cannot be read.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; no model's is longer than {_LONGEST}.")
        return path.read_bytes()
    except OSError as error:
        raise FileAccessError(f"Cannot read {path}: {error.strerror or error}. Check its permissions.") from error


def check_bounds(config: BeitConfig) -> None:
    """Refuse what would take all memory before the first tensor is read; released models are a tenth of it."""
    weights = config.depth * config.embed_dim**2 * (4 + 2 * config.mlp_ratio)
    bounds = {
        "the number of weights": (weights, 2**34),
        "embed_dim": (config.embed_dim, 16_384),
        "depth": (config.depth, 512),
        "in_chans": (config.in_chans, 1024),
        "num_classes": (config.num_classes, 1_000_000),
        "mlp_ratio": (config.mlp_ratio, 64),
        "img_size": (max(config.img_size), 16_384),
        "the number of tokens": (config.num_tokens, 2**18),
    }
    for name, (value, most) in bounds.items():
        if value > most:
            raise InvalidValueError(f"{name} is {value}; a model of more than {most} is not built from a file's word.")
