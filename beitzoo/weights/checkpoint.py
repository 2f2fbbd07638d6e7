"""Tensors in and out of files: read safely, load strictly, save atomically. No sockets, no model names."""

import argparse
import functools
import threading
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beitzoo.errors import UserError
from beitzoo.files import write_atomically
from beitzoo.weights.layouts import LayoutError, to_ours

_ZIP = b"PK\x03\x04"
_OLD_PICKLE = b"\x80\x02\x8a\x0a"  # protocol 2 and a long integer, PyTorch's magic number
_LONGEST_PICKLE = 16 * 2**20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
_UNPICKLING = threading.Lock()
# Where the state dict of a checkpoint lies: unilm's, DeepSpeed's, and others'.
_CONTAINERS = ("model", "module", "state_dict")


class CheckpointError(UserError, ValueError):
    """A file that is not a checkpoint, or one of another network."""


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, under our names, whichever file format and layout it has.

    Safetensors and PyTorch's zipped pickles are told apart by content. Tensors are views of the mapped file until
    something writes to them. A pickle is read with PyTorch's restricted unpickler, which runs no code of the file.

    Raises:
        CheckpointError: Names the file and why it is not a checkpoint of a BEiT.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        tensors = _read_pickle(path) if start == _ZIP else _read_safetensors(path, start)
        _check_tensors(tensors, path.stat().st_size)
        return _own(to_ours(tensors))
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}; name a file that exists.") from error
    except (LayoutError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_safetensors(path: Path, start: bytes) -> dict[str, Tensor]:
    if start == _OLD_PICKLE:
        raise LayoutError(
            "it is a pickle in the form of PyTorch before 1.6, which is not read; "
            "load it with torch.load(..., weights_only=True) and save it again with torch.save."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise LayoutError(f"it is not a readable safetensors file: {error}.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        # PyTorch stores tensors as they are; a compressed entry could unfold to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise LayoutError("it is a compressed zip file, which PyTorch does not write.")
        if any(entry.file_size > _LONGEST_PICKLE for entry in entries if entry.filename.endswith(".pkl")):
            raise LayoutError("its pickle is too long to be that of a checkpoint.")
        document = _unpickle(path)
    except LayoutError:
        raise
    except Exception as error:  # whatever a broken or hostile pickle makes the unpickler raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LayoutError(f"it is not a readable PyTorch checkpoint: {reason}") from error
    for key in _CONTAINERS:
        if isinstance(document, dict) and isinstance(document.get(key), dict):
            document = document[key]
            break
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise LayoutError(f"it holds no state dict, alone or under {', '.join(_CONTAINERS)}.")
    return document


def _unpickle(path: Path) -> Any:
    # The original's checkpoints hold the arguments of their run. The list of allowed classes is the process's: nobody
    # else may read meanwhile, and what the user allowed stays allowed.
    with _UNPICKLING:
        allowed = argparse.Namespace in torch.serialization.get_safe_globals()
        with nullcontext() if allowed else torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make every tensor one that can be trained: dense, its memory its own, all numbers of one precision."""
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    widest = functools.reduce(torch.promote_types, floating) if floating else torch.float32
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.to(widest) if tensor.is_floating_point() else tensor
        if not tensor.is_contiguous() or tensor.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
        owned[name] = tensor
    return owned


def _check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse what no checkpoint has: other objects, tensors that claim more than the file holds, infinite numbers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise LayoutError(f"{name!r} is no plain tensor.")
        if tensor.dtype not in _DTYPES:
            raise LayoutError(f"{name!r} is {tensor.dtype}; weights are {', '.join(map(str, _DTYPES[:4]))}.")
        if tensor.numel() * tensor.element_size() > size:
            raise LayoutError(f"{name!r} of shape {tuple(tensor.shape)} is larger than the file.")
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise LayoutError(f"{name!r} has numbers that are not finite.")


def load(model: nn.Module, state_dict: Mapping[str, Tensor], origin: str) -> None:
    """Give every parameter of the model the tensor of its name; all or nothing.

    Tensors are taken over, not copied, so a model on the meta device becomes real without ever being filled
    with anything else.

    Args:
        model: Left unchanged if anything does not fit.
        state_dict: Tensors by parameter name.
        origin: What to call the tensors in an error.

    Raises:
        CheckpointError: Lists missing names with a minus, unexpected ones with a plus, and other shapes.
    """
    own = model.state_dict()
    lines = [f"  - {name} {tuple(own[name].shape)}" for name in own if name not in state_dict]
    lines += [f"  + {name} {tuple(state_dict[name].shape)}" for name in state_dict if name not in own]
    lines += [
        f"  ~ {name}: {tuple(state_dict[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]
    lines += [
        f"  ~ {name}: {tensor.dtype}, expected floating point"
        for name, tensor in state_dict.items()
        if name in own and not tensor.is_floating_point()
    ]
    if lines:
        shown = [*lines[:20], f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else lines
        raise CheckpointError(
            f"{origin} is not a checkpoint of this network (- missing, + unexpected, ~ different):\n"
            + "\n".join(shown)
            + "\nCreate the architecture that the checkpoint was saved from."
        )
    model.load_state_dict(state_dict, strict=True, assign=True)


def save_pickle(document: Mapping[str, object], path: Path) -> None:
    """Write a PyTorch file in one step."""
    write_atomically(path, lambda temporary: torch.save(dict(document), temporary))


def save(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file in one step: readers see the old file or the new one, never a part."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
