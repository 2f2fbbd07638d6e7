"""Tokenizers in and out of folders: config.json and model.safetensors."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from beitzoo.errors import InvalidValueError, MissingFileError, check, describe_invalid
from beitzoo.weights import checkpoint
from beitzoo.weights.checkpoint import CheckpointError
from beitzoo.weights.folder import CONFIG, check_bounds, is_tokenizer, model_folder, read_json
from beitzoo.weights.module_pickle import read_module_pickle
from beitzoo.zoo.checkpoints import LocalFile
from beitzoo.zoo.networks import BeitConfig, DvaeConfig, RandomConfig, VqkdConfig
from beitzoo.zoo.tokenizers import TokenizerConfig, TokenizerEntry, TokenizerFile

WEIGHTS = "model.safetensors"

_KINDS: dict[str, type[TokenizerConfig]] = {"dvae": DvaeConfig, "vqkd": VqkdConfig, "random": RandomConfig}
_FOR_TRAINING = re.compile(r"loss|teacher|scaling|.*relative_position_index$")
# Names in OpenAI's encoder and decoder, and in mmpretrain's copy of the encoder.
_HALVES = {"blocks.input.w", "encoder.blocks.input.w", "decoder.blocks.input.w"}
# Released ones have 8,192 codes of 32 channels.
_MOST = {"vocab_size": 2**20, "code_dim": 2**14, "teacher_dim": 2**14, "hidden_dim": 2**14, "decoder_dim": 2**14}
_MOST |= {"blocks_per_group": 64, "in_chans": 1024}


class _Form(BaseModel):
    """config.json of a tokenizer. The key `tokenizer_kind` tells it from that of a model."""

    model_config = ConfigDict(extra="forbid")

    tokenizer_kind: Literal["dvae", "vqkd", "random"]
    config: dict[str, Any]


def read_folder(directory: Path) -> TokenizerEntry:
    """Read what a folder, or the best checkpoint of a run, says about its tokenizer.

    Raises:
        MissingFileError: No such folder, or no config.json in it.
        CheckpointError: The JSON describes no tokenizer, or one beyond all bounds.
    """
    directory = model_folder(directory)
    path = directory / CONFIG
    if not path.is_file():
        raise MissingFileError(f"There is no {path}; the folder of a tokenizer has a {CONFIG} and a {WEIGHTS}.")
    try:
        document = read_json(path)
        if not is_tokenizer(document):
            raise CheckpointError(f"{path} is not the config of an image tokenizer; make models with create_model.")
        form = _Form.model_validate_json(document)
        kind = _KINDS[form.tokenizer_kind]
        config = TypeAdapter(kind).validate_python(form.config, extra="forbid")
        _check_bounds(config)
    except ValidationError as error:
        raise CheckpointError(f"{path} is not the config of a tokenizer: {describe_invalid(error)}") from error
    except InvalidValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    files = (TokenizerFile(sources=(LocalFile(directory / WEIGHTS),)),)
    return TokenizerEntry(config=config, files=files, name=str(directory))


def read(files: Sequence[TokenizerFile], cache_dir: Path | None = None) -> dict[str, Tensor]:
    """Fetch the files of a tokenizer and read their tensors, under our names.

    Raises:
        DownloadError: A file cannot be had.
        CheckpointError: A file holds no tensors.
    """
    from beitzoo.weights.sources import fetch

    state: dict[str, Tensor] = {}
    for file in files:
        path = fetch(file.sources, cache_dir)
        if file.part is None:
            state |= _read_whole(path)
        else:
            state |= {f"{file.part}.{name}": tensor for name, tensor in read_module_pickle(path).items()}
    return state


def _read_whole(path: Path) -> dict[str, Tensor]:
    """Read a tokenizer's file, ours or unilm's, without what a VQ-KD has for its training only.

    Left out are the same names as unilm leaves out (`modeling_vqkd.py`, `get_visual_tokenizer`).
    """
    tensors = checkpoint.read_tensors(path)
    if len(_HALVES & tensors.keys()) == 1:
        raise CheckpointError(
            f"{path} holds one half of a dVAE only. Convert OpenAI's two files with 'beitzoo convert-tokenizer "
            "dvae_patch8_112.dalle --out FOLDER', and name that folder."
        )
    return {name: tensor for name, tensor in tensors.items() if not _FOR_TRAINING.match(name)}


def dump(config: TokenizerConfig) -> str:
    """Write the config.json that `read_folder` reads."""
    kind = next(kind for kind, record in _KINDS.items() if isinstance(config, record))
    return json.dumps({"tokenizer_kind": kind, "config": asdict(config)}, indent=2) + "\n"


def _check_bounds(config: TokenizerConfig) -> None:
    """Refuse what would take all memory before the first tensor is read."""
    for record in (getattr(config, name) for name in ("encoder", "decoder") if hasattr(config, name)):
        assert isinstance(record, BeitConfig)
        check_bounds(record)
    for name, most in _MOST.items():
        value = getattr(config, name, 1)
        check(value <= most, f"{name} is {value}; a tokenizer of more than {most} is not built from a file's word.")
    sides = getattr(config, "img_size", (1, 1))
    check(
        max(sides) <= 2**14, f"img_size is {sides}; a tokenizer of more than {2**14} is not built from a file's word."
    )
