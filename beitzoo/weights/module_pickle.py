"""Read the tensors of a pickled module without running any code of the file.

OpenAI published its dVAE as two pickles of whole modules (`torch.save(module, path)`), which `torch.load` only reads
by importing and running whatever classes the file names. Here every class of the file becomes an empty stand-in that
keeps its state and does nothing, and tensors are rebuilt from their bytes by our own code.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from beitzoo.weights.checkpoint import CheckpointError

_DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "LongStorage": torch.int64}
_LONGEST_PICKLE = 2**24  # of the structure; the tensors lie beside it
_DEEPEST = 32
_MAGIC = 0x1950A86A20F9469CFC6C  # of PyTorch's form before 1.6


def read_module_pickle(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a pickled module by name, float32 where they were half precision.

    Both forms of PyTorch are read, the zip archive and the one before version 1.6.

    Raises:
        CheckpointError: The file is no such pickle; names it and what is wrong.
    """
    try:
        module = _read_archive(path) if zipfile.is_zipfile(path) else _read_stream(path)
        return dict(_tensors(module, prefix="", depth=0))
    except Exception as error:  # whatever a broken or hostile pickle makes the unpickler stumble over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} is not a pickled module of PyTorch: {reason}. Download the file again."
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
    """An unpickler that knows tensors and ordered dictionaries; all else becomes a stand-in.

    Attributes:
        storage: Returns the numbers (n,) of a storage, given its dtype, its key and n.
    """

    def __init__(self, file: IO[bytes], storage: Callable[[torch.dtype, str, int], Tensor]) -> None:
        super().__init__(file)
        self.storage = storage

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

    def persistent_load(self, pid: Any) -> Any:
        """Return the numbers of a storage, (n,), or the class in what older pickles say about its source."""
        if pid[0] == "module":
            return pid[1]
        kind, dtype, key, _, count, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isdigit():
            raise ValueError(f"it refers to {kind!r}, not to numbers of a known type")
        return self.storage(dtype, str(key), count)


def _read_archive(path: Path) -> object:
    """Read the zip archive of PyTorch 1.6 and later: the structure, and a file for each storage."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
        if entry.file_size > _LONGEST_PICKLE or any(e.compress_type != zipfile.ZIP_STORED for e in archive.infolist()):
            raise ValueError("it is compressed or its structure is too long, as PyTorch does not write it")
        folder = entry.filename.removesuffix("/data.pkl")

        def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
            numbers = torch.frombuffer(bytearray(archive.read(f"{folder}/data/{key}")), dtype=dtype)
            if len(numbers) != count:
                raise ValueError(f"storage {key} has {len(numbers)} numbers, expected {count}")
            return numbers

        return _Unpickler(io.BytesIO(archive.read(entry)), storage).load()


def _read_stream(path: Path) -> object:
    """Read the form before 1.6: a mark, a version, the writer's machine, the structure, and the storages in turn."""
    size = path.stat().st_size
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in storages:
            if count * dtype.itemsize + sum(numbers.nbytes for numbers in storages.values()) > size:
                raise ValueError(f"storage {key} is larger than the file")
            storages[key] = torch.zeros(count, dtype=dtype, device="cpu")  # filled below
        return storages[key]

    with path.open("rb") as file:
        if _Unpickler(file, storage).load() != _MAGIC:
            raise ValueError("it does not begin as PyTorch's files do")
        for _ in ("version", "machine"):
            _Unpickler(file, storage).load()
        module = _Unpickler(file, storage).load()
        for key in _Unpickler(file, storage).load():
            numbers = storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            content = file.read(numbers.nbytes)
            if count != len(numbers) or len(content) != numbers.nbytes:
                raise ValueError(f"storage {key} is cut short")
            if count:
                numbers.copy_(torch.frombuffer(bytearray(content), dtype=numbers.dtype))
    return module


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    # PyTorch refuses what lies outside of the storage.
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _tensors(module: object, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Walk through the parts of a module as its state describes them."""
    if not isinstance(module, _StandIn) or depth > _DEEPEST:
        raise ValueError(f"{prefix or 'its content'!r} is no module")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.state.get(kind, {}).items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    for name, part in module.state.get("_modules", {}).items():
        if part is not None:
            yield from _tensors(part, f"{prefix}{name}.", depth + 1)
