"""Tensors in and out of files: read safely, load strictly, save atomically. No sockets, no model names."""

import argparse
import functools
import json
import struct
import threading
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beitzoo.errors import InvalidValueError, UserError
from beitzoo.files import write_atomically
from beitzoo.weights.identify import explain, shapes_of
from beitzoo.weights.layouts import Layout, LayoutError, choose_network, recognise, strip_backbone, to_ours
from beitzoo.weights.shards import INDEX_SUFFIX, shards
from beitzoo.zoo.networks import BeitConfig

_ZIP = b"PK\x03\x04"
_OLD_PICKLE = b"\x80\x02\x8a\x0a"  # protocol 2 and a long integer, PyTorch's magic number
_LONGEST_PICKLE = 16 * 2**20
# The dtypes of weights, by their names in safetensors.
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
_UNPICKLING = threading.Lock()


class CheckpointError(UserError, ValueError):
    """A file that is not a checkpoint, or one of another network."""


def read(path: Path, *, map_file: bool = False, use_ema: bool | None = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, under our names, whichever file format and layout it has.

    Safetensors and PyTorch's zipped pickles are told apart by content; an index of sharded safetensors by its name.
    A pickle is read with PyTorch's restricted unpickler, which runs no code of the file.

    Args:
        path: The file.
        map_file: Make the tensors views of the file until something writes to them. Only for files that are never
            written to: who writes to such a file changes the tensors, and who shortens it ends the process.
        use_ema: Of averaged and plain weights in one file, take the averaged ones, or not; None is as in timm: the
            averaged ones, if there are any.

    Raises:
        CheckpointError: Names the file and why it is not a checkpoint of a BEiT.
    """
    try:
        document, size = _read_document(path, map_file)
        network = choose_network(document, use_ema, str(path))
        _check_tensors(network.state, size)
        return _own(to_ours(network))
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {error.filename or path}; name a file that exists.") from error
    except (LayoutError, InvalidValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_tensors(path: Path, *, map_file: bool = False) -> dict[str, Tensor]:
    """Read a state dict as it is, whatever network it is of; that of a PyTorch file may be under the key `model`.

    Args:
        path: The file, in either of the formats of `read`.
        map_file: As in `read`.

    Raises:
        CheckpointError: Names the file and why it is no state dict.
    """
    try:
        document, size = _read_document(path, map_file)
        state = document.get("model", document) if isinstance(document, Mapping) else document
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise LayoutError("it holds no tensors by name.")
        _check_tensors(state, size)
        return _own(state)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {error.filename or path}; name a file that exists.") from error
    except (LayoutError, InvalidValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], Layout]:
    """Read the shapes of a checkpoint's tensors, under our names, and whose names they have in the file.

    Raises:
        CheckpointError: Names the file and why it is not a checkpoint of a BEiT.
    """
    try:
        document, _ = _read_document(path, map_file=True)
        network = choose_network(document)
        for name, tensor in network.state.items():
            if not isinstance(tensor, Tensor):
                raise LayoutError(f"{name!r} is no plain tensor.")
        return shapes_of(to_ours(network)), recognise(network.state)
    except (LayoutError, InvalidValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_document(path: Path, map_file: bool) -> tuple[Any, int]:
    """Return what a file holds, tensors or a dict of more, and the bytes it takes."""
    if path.name.endswith(INDEX_SUFFIX):
        parts = [path.with_name(name) for name in shards(path)]
        merged: dict[str, Tensor] = {}
        for part in parts:
            if not part.is_file():
                raise LayoutError(f"its file {part.name} is missing; get all of its files.")
            merged |= _read_safetensors(part, map_file)
        return merged, sum(part.stat().st_size for part in parts)
    with path.open("rb") as file:
        start = file.read(4)
    if start == _OLD_PICKLE:
        raise LayoutError(
            "it is a pickle in the form of PyTorch before 1.6, which is not read; "
            "load it with torch.load(..., weights_only=True) and save it again with torch.save."
        )
    document = _read_pickle(path, map_file) if start == _ZIP else _read_safetensors(path, map_file)
    return document, path.stat().st_size


def _read_safetensors(path: Path, map_file: bool) -> dict[str, Tensor]:
    try:
        if map_file:
            return load_file(path)
        with safe_open(path, "pt"):  # checks that the header describes exactly the bytes behind it
            return _read_into_memory(path)
    except (SafetensorError, struct.error, KeyError, ValueError) as error:
        raise LayoutError(f"it is not a readable safetensors file: {error}.") from error


def _read_into_memory(path: Path) -> dict[str, Tensor]:
    """Read each tensor into memory of its own; faster than copies of mapped tensors, and nothing is held twice."""
    tensors = {}
    with path.open("rb", buffering=0) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise LayoutError(f"{name!r} is {entry['dtype']}; weights are {', '.join(list(_DTYPES)[:4])}.")
            tensors[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="cpu")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            file.seek(8 + length + entry["data_offsets"][0])
            left = tensors[name].view(-1).view(torch.uint8).numpy().data
            while left:
                count = file.readinto(left)
                if not count:
                    raise LayoutError("it is not a readable safetensors file: it was cut while it was read.")
                left = left[count:]
    return tensors


def _read_pickle(path: Path, map_file: bool) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        # PyTorch stores tensors as they are; a compressed entry could unfold to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise LayoutError("it is a compressed zip file, which PyTorch does not write.")
        if any(entry.file_size > _LONGEST_PICKLE for entry in entries if entry.filename.endswith(".pkl")):
            raise LayoutError("its pickle is too long to be that of a checkpoint.")
        return _unpickle(path, map_file)
    except LayoutError:
        raise
    except Exception as error:  # whatever a broken or hostile pickle makes the unpickler raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LayoutError(f"it is not a readable PyTorch checkpoint: {reason}") from error


def _unpickle(path: Path, map_file: bool) -> Any:
    # The original's checkpoints hold the arguments of their run. The list of allowed classes is the process's: nobody
    # else may read meanwhile, and what the user allowed stays allowed.
    with _UNPICKLING:
        allowed = argparse.Namespace in torch.serialization.get_safe_globals()
        with nullcontext() if allowed else torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=map_file)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make every tensor one that can be trained: dense, its memory its own, all numbers of one precision."""
    widest = widest_dtype(tensors)
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.to(widest) if tensor.is_floating_point() else tensor
        if not tensor.is_contiguous() or tensor.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
        owned[name] = tensor
    return owned


def widest_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the precision that holds the numbers of all tensors."""
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, floating) if floating else torch.float32


def _check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse what no checkpoint has: other objects, tensors that claim more than the file holds, infinite numbers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise LayoutError(f"{name!r} is no plain tensor.")
        if tensor.dtype not in _DTYPES.values():
            raise LayoutError(f"{name!r} is {tensor.dtype}; weights are {', '.join(list(_DTYPES)[:4])}.")
        if tensor.numel() * tensor.element_size() > size:
            raise LayoutError(f"{name!r} of shape {tuple(tensor.shape)} is larger than the file.")
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            raise LayoutError(f"{name!r} has numbers that are not finite.")


def load(model: nn.Module, state_dict: Mapping[str, Tensor], origin: str, config: BeitConfig | None = None) -> None:
    """Give every parameter of the model the tensor of its name; all or nothing.

    Tensors are taken over, not copied, so a model on the meta device becomes real without ever being filled
    with anything else.

    Args:
        model: Left unchanged if anything does not fit.
        state_dict: Tensors by parameter name.
        origin: What to call the tensors in an error.
        config: The BEiT that the model is; an error says which one the tensors are of.

    Raises:
        CheckpointError: Lists missing names with a minus, unexpected ones with a plus, and other shapes.
    """
    lines = compare(model.state_dict(), state_dict)
    if lines:
        hint = config and explain(shapes_of(strip_backbone(state_dict)), config)
        raise CheckpointError(
            f"{origin} is not a checkpoint of this network (- missing, + unexpected, ~ different):\n"
            + "\n".join(lines)
            + f"\n{hint or 'Name the model that the checkpoint was saved from.'}"
        )
    model.load_state_dict(state_dict, strict=True, assign=True)


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that are missing (-), unexpected (+) or of another shape or kind (~), 20 lines at most."""
    lines = [f"  - {name} {tuple(tensor.shape)}" for name, tensor in expected.items() if name not in found]
    lines += [f"  + {name} {tuple(tensor.shape)}" for name, tensor in found.items() if name not in expected]
    both = [name for name in expected if name in found]
    lines += [
        f"  ~ {name}: {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in both
        if found[name].shape != expected[name].shape
    ]
    lines += [
        f"  ~ {name}: {found[name].dtype}, expected {'floating point' if tensor.is_floating_point() else tensor.dtype}"
        for name, tensor in expected.items()
        if name in found and found[name].is_floating_point() != tensor.is_floating_point()
    ]
    return [*lines[:20], f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else lines


def save_pickle(document: Mapping[str, object], path: Path) -> None:
    """Write a PyTorch file atomically.

    Raises:
        FileAccessError: The file cannot be written.
    """
    _write(path, lambda temporary: torch.save(dict(document), temporary))


def save(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file atomically.

    Raises:
        FileAccessError: The file cannot be written.
    """
    tensors = _own({name: tensor.detach() for name, tensor in state_dict.items()})
    _write(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically, and let what the libraries call their own error be the system's, as it is."""

    def attempt(temporary: Path) -> None:
        try:
            write(temporary)
        except (SafetensorError, RuntimeError) as error:  # of a full disk, for example
            raise OSError(str(error).splitlines()[0]) from error

    write_atomically(path, attempt)
