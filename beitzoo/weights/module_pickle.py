"""Read the tensors of a pickled module without running any code of the file.

OpenAI published its dVAE as two pickles of whole modules (`torch.save(module, path)`), which `torch.load` only reads
by importing and running whatever classes the file names. Here every class of the file becomes an empty stand-in that
keeps its state and does nothing, and tensors are rebuilt from their bytes by our own code.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beitzoo.weights.checkpoint import CheckpointError

_DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "LongStorage": torch.int64}
_LONGEST_PICKLE = 2**24  # of the structure; the tensors lie beside it
_DEEPEST = 32


def read_module_pickle(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a pickled module by name, float32 where they were half precision.

    Raises:
        CheckpointError: The file is no such pickle; names it and what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            module = _Unpickler(archive).load()
            return dict(_tensors(module, prefix="", depth=0))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a broken or hostile pickle makes the unpickler stumble over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is not a pickled module of PyTorch 1.6 or later: {reason}. Download the file again."
        ) from error


class _StandIn:
    """An object of a class that the file names: its state, and nothing that could be run."""

    def __new__(cls, *args: object, **kwargs: object) -> "_StandIn":
        """Take any arguments and leave them unused."""
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows tensors and ordered dictionaries; all else becomes a stand-in."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        if entry.file_size > _LONGEST_PICKLE or any(e.compress_type != zipfile.ZIP_STORED for e in archive.infolist()):
            raise ValueError("it is compressed or its structure is too long, as PyTorch does not write it")
        super().__init__(io.BytesIO(archive.read(entry)))
        self.archive = archive
        self.folder = entry.filename.removesuffix("/data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function; nothing is imported."""
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return _rebuild_tensor
            case "torch._utils", "_rebuild_parameter":
                return _rebuild_parameter
            case "torch", storage if storage in _DTYPES:
                return _DTYPES[storage]
        return type(name, (_StandIn,), {})

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the numbers of a storage, (n,)."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdigit():
            raise ValueError(f"it refers to {kind!r}, not to numbers of a known type")
        content = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
        numbers = torch.frombuffer(content, dtype=dtype)
        if len(numbers) != count:
            raise ValueError(f"storage {key} has {len(numbers)} numbers, expected {count}")
        return numbers


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    # PyTorch refuses what lies outside of the storage.
    return storage.as_strided(size, stride, offset).clone()


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _tensors(module: object, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Walk through the parts of a module as its state describes them."""
    if not isinstance(module, _StandIn) or depth > _DEEPEST:
        raise ValueError(f"{prefix or 'its content'!r} is no module")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.state.get(kind, {}).items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor.float() if tensor.is_floating_point() else tensor
    for name, part in module.state.get("_modules", {}).items():
        if part is not None:
            yield from _tensors(part, f"{prefix}{name}.", depth + 1)
